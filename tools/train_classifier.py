"""A classifier that is part of the library: python -m tools.train_classifier --preset P.

It learns from every labeled image at hand by the recipe of a preset, to the last epoch. What is
promised of it in results/classifiers/<labels>/ comes from a cross-validation grouped by sol: five
networks, each on images that it has not seen. The classifier of msl-v1 also learns to tell its
images from those of msl-v2.1 that show none of its classes, and from blank frames.
"""

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.classify.classifier_file import save_classifier
from marsclf.data.dataset import Dataset
from marsclf.data.open import open_dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation import metrics
from marsclf.evaluation.calibration import fit_temperature, with_temperature
from marsclf.evaluation.predictions import as_predictions, write_predictions
from marsclf.figures import results as figures
from marsclf.files import replace_atomically, write_json
from marsclf.images.views import WHOLE_IMAGE
from marsclf.networks.pinned import keras
from marsclf.pipeline.presets import data_of, parameters_of
from marsclf.provenance import commit, hardware, peak_rss_mb
from marsclf.training.cross_validation import SOLS_TOGETHER, train_folds
from marsclf.training.familiarity import Familiarity, blank_frames, features_model, fit_familiarity
from marsclf.training.features import image_features
from marsclf.training.recipe import Recipe
from marsclf.training.train import predict, train_network
from tools.command import make_main
from tools.documents import update_documents, write_documents
from tools.results import CLASSIFIERS, read_published, summarize_familiarity

LABELS = {"msl-v1": "parts", "msl-v2.1": "content"}  # the classifier of each data set
OUTSIDE = ("Artifact", "Sun", "Night sky")  # classes of msl-v2.1 that msl-v1 lacks
BLANK_FRAMES = 400
FAMILIARITY = ["known", "class_name", "path", "familiarity", "confidence"]  # columns of the file


def train_classifier(preset: str, data_dir: Path | None, outside_dir: Path | None) -> None:
    """Train the library's classifier of a preset's data set on all labels, and measure it."""
    started, parameters, code = time.monotonic(), parameters_of(preset), commit()
    recipe, dataset = Recipe(**parameters), open_dataset(data_dir, data_of(preset))
    if dataset.name not in LABELS or recipe.ensemble:
        reason = f"It is made from one network and {' or '.join(LABELS)}"
        raise MarsclfError(f"{reason}, not by {preset} from {dataset.name} in {dataset.root}.")
    outside = open_dataset(outside_dir, "msl-v2.1") if dataset.name == "msl-v1" else None
    if outside and outside.name != "msl-v2.1":
        place = f"{outside.root} is {outside.name}"
        raise MarsclfError(f"{place}: name the folder of msl-v2.1 with --outside-dir.")
    labels, rows = LABELS[dataset.name], dataset.index
    probabilities = cross_validate(recipe, dataset)
    temperature = fit_temperature(probabilities, rows["label"].to_numpy())
    calibrated = with_temperature(probabilities, temperature)
    network = train_network(recipe, dataset.root, rows, None, len(dataset.classes))
    about = {"preset": preset, "seed": recipe.seed, "commit": code, "dataset": dataset.name}
    about |= {"data_digest": dataset.digest}
    unit = familiar = None
    if outside:
        about |= {"outside_digest": outside.digest}
        unit, familiar = learn_familiarity(network.model, dataset, outside)
        others = predict([network], outside.root, familiar[len(rows) :])
        confidence = [*calibrated.max(axis=1), *with_temperature(others, temperature).max(axis=1)]
        familiar = familiar.assign(confidence=confidence)
    how = {"backbone": recipe.backbone, "classes": dataset.classes, "zooms": recipe.test_zooms}
    how |= {"temperature": temperature, "training": about, "familiarity": unit}
    with replace_atomically(paths.CLASSIFIERS[labels]) as file:
        save_classifier(network.model, file, **how)
    record = about | {"parameters": parameters, "temperature": temperature}
    record |= {"classes": dataset.classes, "splits": rows["split"].value_counts().to_dict()}
    record |= {"out_of_fold": metrics.summarize(as_predictions(rows, calibrated))}
    record |= {"hardware": hardware(), "peak_rss_mb": peak_rss_mb()}
    record |= {"wall_s": round(time.monotonic() - started, 1)}
    store_measured(labels, record, familiar, rows, calibrated)
    print(f"{paths.CLASSIFIERS[labels]}: {record['out_of_fold']}")


def cross_validate(recipe: Recipe, dataset: Dataset) -> np.ndarray:
    """Return the probabilities of all images (n, classes) by networks that had not seen them."""
    rows = dataset.index
    probabilities = np.empty((len(rows), len(dataset.classes)))
    for network, held_out in train_folds(recipe, dataset.root, rows, len(dataset.classes)):
        probabilities[held_out] = predict([network], dataset.root, rows[held_out])
        right = (probabilities[held_out].argmax(axis=1) == rows["label"][held_out]).mean()
        print(f"a fold of {held_out.sum():,} images: {right:.1%} right", flush=True)
    return probabilities


def learn_familiarity(
    model: keras.Model, known: Dataset, outside: Dataset
) -> tuple[Familiarity, pd.DataFrame]:
    """Return the unit that tells images like those of `known` from others, and what is told.

    Only three classes of `outside` are foreign to it. The others count as known, so that the unit
    does not learn in what else the two data sets differ. The table has the rows of `known` and of
    the foreign images, with `known` and with the familiarity by units that had not seen their sols.
    """
    network = features_model(model)
    is_foreign = outside.index["class_name"].isin(OUTSIDE)
    rows = [known.index, outside.index[~is_foreign], outside.index[is_foreign]]
    *features, foreign = (
        image_features(dataset.root, each, network, WHOLE_IMAGE).read()
        for dataset, each in zip((known, outside, outside), rows, strict=True)
    )
    blank = network.predict(blank_frames(network.input_shape[1], BLANK_FRAMES), verbose=0)
    table = pd.concat(rows).assign(known=np.repeat([True, False, False], [*map(len, rows)]))
    # Each blank frame is a scene of its own.
    groups = [*table["sol"] // SOLS_TOGETHER, *range(-BLANK_FRAMES, 0)]
    like, unlike = np.concatenate(features), np.concatenate([foreign, blank])
    unit, familiarity = fit_familiarity(like, unlike, groups)
    table = table.assign(familiarity=familiarity[: len(table)])
    return unit, pd.concat([table[: len(rows[0])], table[len(like) :]])


def store_measured(
    labels: str, record: dict, familiar: pd.DataFrame | None, *predictions: object
) -> None:
    """Store and chart what is promised of a classifier; `predictions` as in write_predictions."""
    with replace_atomically(paths.RESULTS / CLASSIFIERS / labels) as folder:
        write_predictions(folder / "predictions.csv.gz", *predictions)
        if familiar is not None:
            file = folder / "familiarity.csv.gz"
            familiar[FAMILIARITY].to_csv(file, index=False, float_format="%.4g")
            record |= {"familiarity": summarize_familiarity(pd.read_csv(file))}
            figures.set_style()
            chart = figures.familiarity(familiar)
            figures.save_figure(chart, paths.FIGURES / labels, "familiarity.png", record["dataset"])
        write_json(folder / "metrics.json", record)
    write_documents(update_documents(read_published()))


main = make_main(train_classifier, "preset", "data_dir", "outside_dir")

if __name__ == "__main__":
    sys.exit(main())
