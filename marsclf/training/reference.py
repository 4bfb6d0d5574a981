"""The recipe of the EfficientNetB7 notebook that this project starts from, oddity by oddity.

That notebook came to 78.77 % on test. Each thing in which it differs from a careful recipe is a
field of `Original`, so that they can be put right one at a time: `rungs` does so, and `climb`
trains and scores each rung. Below the first layer that learns each view is computed only once; so
the stochastic depth of B7, which draws at random there, too, is left out below that layer and
while the base is frozen.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from marsclf.data import msl as data
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.evaluation.predictions import write_predictions
from marsclf.files import write_json
from marsclf.images.views import AsRead, Augmentation
from marsclf.networks.backbones import build_backbone
from marsclf.paths import CACHE
from marsclf.provenance import commit
from marsclf.training.features import embed_views, pass_on
from marsclf.training.stages import Batches, History, build_head, class_weights, join

# Where learning begins in the second stage: a layer's number, or how the names of a block begin.
# Layer 500 of B7 lies inside block5g, the seventh of ten repeats; Lite0's block5 has three.
FIRST_LAYER: dict[str, int | str] = {"EfficientNetB7": 500, "EfficientNetLite0": "block5c_"}
BATCH_SIZE = 32
DROPOUT = 0.2
LEARNING_RATES = {"frozen": 1e-4, "upper": 1e-5}  # of Adam, constant


@dataclass(frozen=True)
class Original:
    """The original recipe; the defaults are what it did.

    Beyond these fields it had a linear softmax head over 25 classes behind a dropout of 0.2,
    batches of 32, no validation (the last epoch is kept), and no seed, which this has.

    Attributes:
        backbone: the network; a key of FIRST_LAYER.
        seed: of all that is drawn; the original had none, so no two of its runs were alike.
        sides: height and width of a squashed image, pixels.
        side: of the square that an image fits in when its aspect ratio is kept, pixels: about as
            many of them.
        squashed: every image is forced into `sides`, so that a square target becomes an oblong one.
        bgr: OpenCV's blue, green, red goes into a network that learnt from red, green, blue.
        batchnorm_trainable: BatchNorm of the upper layers thaws, too, and replaces ImageNet's
            statistics by those of batches of 32 images, most of one burst's scene.
        augmented: whether augmentation reaches the network; it was computed, and then the images as
            they were went in.
        augmentation: what it does where it reaches the network (see images.Augmentation).
        views: random views an image that are drawn from where it does.
        balanced: whether each class is drawn equally often; images came as they come, 25 of one
            class for one of another.
        frozen_epochs: with the base frozen.
        upper_epochs: with the upper layers thawed: to epoch 30, then to 50, each time repeating the
            one epoch that `initial_epoch` names.
    """

    backbone: str = "EfficientNetB7"
    seed: int = 0
    sides: tuple[int, int] = (193, 256)
    side: int = 224
    squashed: bool = True
    bgr: bool = True
    batchnorm_trainable: bool = True
    augmented: bool = False
    augmentation: dict | None = None
    views: int = 1
    balanced: bool = False
    frozen_epochs: int = 20
    upper_epochs: int = 32

    def reading(self, training: bool) -> AsRead:
        """Return how images are read, to train on or to be classified."""
        augmentation = Augmentation(**self.augmentation or {})
        views_of = augmentation if training and self.augmented else None
        return AsRead(self.squashed, self.bgr, views_of)


ORIGINAL = "original"
# What can be put right, and how.
STEPS: dict[str, dict[str, object]] = {
    "RGB": {"bgr": False},
    "aspect kept": {"squashed": False},
    "BatchNorm frozen": {"batchnorm_trainable": False},
    "augmented": {"augmented": True},
    "balanced": {"balanced": True},
}


def rungs(original: Original, steps: Sequence[str] = tuple(STEPS)) -> dict[str, Original]:
    """Return the recipe of each rung: the original, and one more thing put right each step.

    Raises MarsclfError for a step that is not in STEPS.
    """
    for step in (step for step in steps if step not in STEPS):
        raise MarsclfError(f"steps: there is no {step!r}; the steps are {', '.join(STEPS)}.")
    recipes = {ORIGINAL: original}
    for step in steps:
        recipes[step] = replace(list(recipes.values())[-1], **STEPS[step])
    return recipes


def original_of(parameters: dict[str, object]) -> Original:
    """Return the original recipe with a notebook's parameters."""
    named = {f.name: parameters[f.name] for f in fields(Original) if f.name in parameters}
    return Original(**named | {"sides": tuple(parameters["sides"])})


def split_at(
    whole: keras.Model, first: int | str
) -> tuple[keras.Model, keras.Model, frozenset[str]]:
    """Split a backbone before the repeat of a block that holds the first layer to learn.

    Args:
        whole: a flat backbone.
        first: that layer's number, or how its name begins.

    Returns:
        What lies below, what lies above, and the names of the layers above that still do not learn.
    """
    names = [layer.name for layer in whole.layers]
    if isinstance(first, str):
        first = next(i for i, name in enumerate(names) if name.startswith(first))
    repeat = re.match(r"block\d[a-z]+_|[a-z]+_", names[first])[0]
    begin = next(i for i, name in enumerate(names) if name.startswith(repeat))
    boundary = whole.layers[begin - 1].output
    return (
        keras.Model(whole.input, boundary, name=f"{whole.name}_frozen"),
        keras.Model(boundary, whole.output, name=f"{whole.name}_upper"),
        frozenset(names[begin:first]),
    )


def thaw(classifier: keras.Model, still_frozen: frozenset[str], batchnorm: bool) -> None:
    """Let a classifier learn, but for the layers named and, unless `batchnorm`, its BatchNorm."""
    for layer in classifier.layers:
        held = isinstance(layer, keras.layers.BatchNormalization) and not batchnorm
        layer.trainable = layer.name not in still_frozen and not held


def draw(how: Original, labels: np.ndarray, views: int, epoch: int) -> np.ndarray:
    """Return which views an epoch takes, as row numbers (images,).

    Args:
        how: the recipe; its `balanced` decides.
        labels: of the images, 0-24 (images,).
        views: of each image, in rows that follow each other; one of them is drawn.
        epoch: equal seed and epoch give equal draws.
    """
    rng = np.random.default_rng((how.seed, epoch))
    if how.balanced:
        shares = class_weights(labels, 1.0)
        images = rng.choice(len(labels), len(labels), p=shares / shares.sum())
    else:
        images = rng.permutation(len(labels))
    return images * views + rng.integers(views, size=len(images))


def learn(
    how: Original, root: Path, train: pd.DataFrame, cache: Path = CACHE
) -> tuple[keras.Model, keras.Model, History]:
    """Train by a rung's recipe.

    Args:
        how: the recipe.
        root: folder that the paths in `train` count from.
        train: rows of a data set's index to learn from.
        cache: of what the frozen part sees.

    Returns:
        What of the backbone stayed as it was; what it gives to probabilities (n, 25); and a record
        an epoch: stage, epoch, loss and accuracy on training images.

    Raises MarsclfError for a backbone that is not in FIRST_LAYER, weights that cannot be had, and
    images that cannot be read.
    """
    if how.backbone not in FIRST_LAYER:
        raise MarsclfError(
            f"There is no such place as layer 500 of B7 named for {how.backbone!r}; choose one of "
            f"{', '.join(FIRST_LAYER)}."
        )
    whole = build_backbone(how.backbone, tuple(how.sides) if how.squashed else how.side)
    frozen, upper, still_frozen = split_at(whole, FIRST_LAYER[how.backbone])
    labels = train["label"].to_numpy()
    views = how.views if how.augmented else 1
    counts = np.full(len(train), views)
    below = frozen if how.upper_epochs else whole
    seen = embed_views(root, train, counts, below, how.reading(training=True), how.seed, cache)
    keras.utils.set_random_seed(how.seed)
    head = build_head(whole.output_shape[1], 0, DROPOUT)
    history: History = []

    def fit(stage: str, model: keras.Model, features: object, epochs: int) -> None:
        model.compile(
            keras.optimizers.Adam(LEARNING_RATES[stage]),
            "categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=keras.backend.backend() == "jax",  # as in training.compile_stage
        )
        of_views = labels.repeat(views)
        weights = np.ones(len(of_views))
        for epoch in range(epochs):
            rows = draw(how, labels, views, len(history))
            batches = Batches(features, of_views, rows, weights, BATCH_SIZE)
            logs = model.fit(batches, shuffle=False, verbose=0).history
            record = {name: round(values[0], 6) for name, values in logs.items()}
            history.append({"stage": stage, "epoch": epoch + 1} | record)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in record.items())
            print(f"{stage} epoch {epoch + 1}/{epochs}: {shown}", flush=True)

    if not how.upper_epochs:
        fit("frozen", head, seen, how.frozen_epochs)
        return whole, head, history
    fit("frozen", head, pass_on(seen, upper, cache), how.frozen_epochs)
    classifier = join(upper, head)
    thaw(classifier, still_frozen, how.batchnorm_trainable)
    fit("upper", classifier, seen, how.upper_epochs)
    return frozen, classifier, history


def climb(
    preset: str,
    recipes: dict[str, Original],
    dataset: data.Dataset,
    folder: Path,
    cache: Path = CACHE,
) -> dict[str, dict]:
    """Train and score each of the `rungs`; return, by the name of its folder, a record of each.

    A rung whose predictions and metrics lie in `folder` from an equal recipe on equal data is not
    done again. Each scoring of the real test split is entered in the ledger.
    """
    return {
        _slug(rung): _climbed(preset, rung, how, dataset, folder / _slug(rung), cache)
        for rung, how in recipes.items()
    }


def _slug(rung: str) -> str:
    """Return a rung's name as that of a file."""
    return rung.lower().replace(" ", "-")


def _climbed(
    preset: str, rung: str, how: Original, dataset: data.Dataset, folder: Path, cache: Path
) -> dict:
    parameters = json.loads(json.dumps(asdict(how)))
    path, predictions = folder / "metrics.json", folder / "predictions.csv"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    done = {"parameters": parameters, "data_digest": dataset.digest}
    if done.items() <= record.items() and predictions.exists():
        print(f"{rung}: done before")
        return record
    print(f"{rung}:", flush=True)
    code, started = commit(), time.monotonic()
    index = dataset.index
    train = index[index["split"] == "train"]
    frozen, classifier, history = learn(how, dataset.root, train, cache)
    once, reading = np.ones(len(index), int), how.reading(training=False)
    seen = embed_views(dataset.root, index, once, frozen, reading, 0, cache)
    # By Keras: to make it ready for the engine takes as long as what that would save.
    probabilities = [
        classifier.predict_on_batch(seen[rows])
        for rows in np.array_split(np.arange(len(index)), len(index) // BATCH_SIZE)
    ]
    write_predictions(predictions, index, np.concatenate(probabilities))
    record = {
        "name": rung,
        "preset": f"{preset}/{_slug(rung)}",
        "dataset": dataset.name,
        **done,
        "seed": how.seed,
        "commit": code,
        "settings": STEPS.get(rung, {}),
        "wall_s": round(time.monotonic() - started, 1),
        "history": history,
    }
    write_json(folder / "training.json", record)
    record["splits"] = ledger.score(predictions)
    write_json(path, record)
    return record
