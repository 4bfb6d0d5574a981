"""Training by a recipe: what changes, what stays, and what a GPU does differently."""

import dataclasses
import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from marsclf import paths
from marsclf.data.dataset import Dataset
from marsclf.errors import MarsclfError
from marsclf.evaluation.calibration import with_temperature
from marsclf.evaluation.predictions import write_predictions
from marsclf.images.decode import read_rgb
from marsclf.images.views import WHOLE_IMAGE, Augmentation, Condition, fit_view
from marsclf.networks.engine import make_predictor
from marsclf.pipeline.presets import SET_BY_RUN, notebook_parameters
from marsclf.training import features, train
from marsclf.training.batches import Examples
from marsclf.training.features import view_features
from marsclf.training.recipe import Recipe
from marsclf.training.stages import build_head, join
from marsclf.training.train import TrainedNetwork

PARAMETERS = notebook_parameters(paths.NOTEBOOKS / "02_fine_tuning.ipynb")
PARAMETERS = {name: value for name, value in PARAMETERS.items() if name not in SET_BY_RUN}
SMALL = {"backbone": "EfficientNetLite0", "image_size": 32, "views": 1, "views_rare": 3}
SMALL |= {"augmentation": {"rotation": 90, "zoom": 0.5, "flip": True}}
SMALL |= {"head_hidden": 0, "head_epochs": 2, "head_learning_rate": 0.01}
SMALL |= {"finetune_blocks": ["block6", "top"], "finetune_epochs": 2, "finetune_batch_size": 8}


def make_recipe(**changed: object) -> Recipe:
    return Recipe(**(PARAMETERS | SMALL | changed))


@pytest.fixture(scope="module")
def rows(sample_dataset: Dataset) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A few training images and a few validation images."""
    by_split = dict(list(sample_dataset.index.groupby("split")))
    return by_split["train"].iloc[::8].head(12), by_split["val"].iloc[::8].head(6)


@pytest.fixture(scope="module")
def trained(sample_dataset: Dataset, rows: tuple, eager: None) -> TrainedNetwork:
    return train.train_network(make_recipe(), sample_dataset.root, *rows, 25)


@pytest.mark.parametrize(
    "changed",
    [{"head_epochs": 0}, {"head_batch_size": 0}, {"finetune_epochs": -1}, {"finetune_patience": 0}]
    + [{"finetune_learning_rate": float("nan")}, {"views": 0}, {"views": 4}, {"finetune_ema": 1.0}]
    + [{"head_hidden": -1}, {"head_dropout": 1.0}, {"label_smoothing": 1.1}, {"weight_decay": -1}]
    + [{"seed": -1}, {"temperature": 0.0}]
    + [{"ensemble": [{"seed": 1}]}, {"test_zooms": []}, {"test_zooms": [20.0]}]
    + [{"augmentation": {"zoom": -1}}, {"augmentation": {"zom": 1}}, {"finetune_blocks": ["b7"]}],
)
def test_unusable_values_are_refused(changed: dict) -> None:
    with pytest.raises(MarsclfError) as caught:
        make_recipe(**changed)
    (name,) = changed
    assert name.removeprefix("test_") in str(caught.value) and "\n" not in str(caught.value)


def load_backbone(mixed_precision: bool = False) -> keras.Model:
    return train.load_backbone("EfficientNetLite0", 32, mixed_precision)


def are_equal(one: keras.Model, other: keras.Model) -> bool:
    return all(map(np.array_equal, one.get_weights(), other.get_weights()))


def test_only_what_a_recipe_names_changes(trained, sample_dataset, rows) -> None:
    epochs = [(record["stage"], record["epoch"]) for record in trained.history]
    assert epochs == [("head", 1), ("head", 2), ("finetune", 1), ("finetune", 2)]
    norms = keras.layers.BatchNormalization
    settings = make_recipe(finetune_epochs=0, finetune_patience=0)
    first = train.train_network(settings, sample_dataset.root, *rows, 25)
    assert [record["stage"] for record in first.history] == ["head", "head"]
    for layer in load_backbone().layers:
        assert are_equal(layer, first.model.get_layer(layer.name))
        same = are_equal(layer, trained.model.get_layer(layer.name))
        named = layer.name.startswith(("block6", "top_")) and not isinstance(layer, norms)
        assert same == (not named or not layer.weights), layer.name
    # The second stage trains the head, too.
    assert not are_equal(first.model.layers[-1], trained.model.layers[-1])


def test_the_predictions_of_zooms_are_pooled(trained, sample_dataset, rows) -> None:
    root, validation = sample_dataset.root, rows[1]

    def expected(*conditions: Condition) -> np.ndarray:
        images = [read_rgb(root / path) for path in validation["path"]]
        views = [np.stack([fit_view(image, 32, c) for image in images]) for c in conditions]
        product = np.prod([trained.model.predict_on_batch(each) for each in views], axis=0)
        roots = product ** (1 / len(views))
        return roots / roots.sum(axis=1, keepdims=True)

    found = train.predict([trained], root, validation)
    np.testing.assert_allclose(found, expected(WHOLE_IMAGE), atol=1e-4)
    zoomed = [trained._replace(zooms=[1.0, 0.5])]
    found = train.predict(zoomed, root, validation, Condition(zoom=2.0, turn=90))
    both = Condition(zoom=2.0, turn=90), Condition(zoom=1.0, turn=90)
    np.testing.assert_allclose(found, expected(*both), atol=1e-4)


def test_the_predictions_of_networks_are_pooled(trained, sample_dataset, rows) -> None:
    other = TrainedNetwork(join(load_backbone(), build_head(1280, 0, 0.0, 25)), [1.0], [])
    one, two, both = (
        train.predict(networks, sample_dataset.root, rows[1])
        for networks in ([trained], [other], [trained, other])
    )
    means = np.sqrt(one * two)
    np.testing.assert_allclose(both, means / means.sum(axis=1, keepdims=True), rtol=1e-4)


def test_the_best_epoch_is_kept(trained, sample_dataset, rows) -> None:
    validation, augmentation = rows[1], Augmentation(**SMALL["augmentation"])
    one_each, root = np.ones(len(validation), int), sample_dataset.root
    views = view_features(root, validation, one_each, trained.model, augmentation, 0)
    probabilities = views.read()
    labels = validation["label"].to_numpy()
    # Each class counts the same, however many images it has; 0.1 of each target is spread.
    targets = 0.9 * np.eye(25)[labels] + 0.1 / 25
    losses = -(targets * np.log(probabilities)).sum(axis=1)
    loss = np.mean([losses[labels == label].mean() for label in np.unique(labels)])
    best = min(trained.history[2:], key=lambda record: record["val_loss"])
    assert best["val_loss"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(
    ("capability", "dtype"), [(None, "float32"), ((7, 5), "float16"), ((10, 0), "bfloat16")]
)
def test_mixed_precision_is_that_of_the_gpu(capability, dtype, monkeypatch) -> None:
    monkeypatch.setattr(train, "gpu_capability", lambda: capability)
    backbone = load_backbone(mixed_precision=True)
    assert backbone.output.dtype == dtype
    assert {weights.dtype for weights in backbone.weights} == {"float32"}
    assert join(backbone, build_head(1280, 0, 0.0, 25)).output.dtype == "float32"


@pytest.mark.parametrize("stage", ["head", "finetune"])
def test_a_batch_that_exceeds_the_memory(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(keras.Model, "fit", refuse)
    vectors, labels = np.zeros((4, 8), np.float32), np.arange(4)
    examples = Examples(vectors, labels, np.full(4, 0.25), 25)
    with pytest.raises(MarsclfError, match=f"images in stage {stage}: lower {stage}_batch_size"):
        train.fit_stage(stage, build_head(8, 0, 0.0, 25), examples, None, make_recipe(), 4)


def test_one_network_per_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train_network", lambda settings, *_: settings)
    arguments = (Path(), pd.DataFrame(), pd.DataFrame(), 25)
    for ensemble, seeds in (([], [7]), ([2, 5], [2, 5])):
        settings = make_recipe(seed=7, ensemble=ensemble)
        found = train.train_networks(settings, *arguments)
        assert found == [dataclasses.replace(settings, seed=seed) for seed in seeds]


def test_the_notebook_trains_as_train_network_does(
    smoke_run, project: Path, sample_dataset: Dataset, tmp_path: Path, monkeypatch
) -> None:
    run = smoke_run[0]
    record = json.loads((run / "training.json").read_text(encoding="utf-8"))
    settings, index = Recipe(**record["parameters"]), sample_dataset.index
    assert settings.finetune_epochs and not settings.ensemble
    learned, validation = (index[index["split"] == split] for split in ("train", "val"))
    monkeypatch.setattr(features, "make_predictor", make_predictor)
    # Features and exported networks are cached by their content; checkpoints are left out.
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    shutil.copytree(project / "cache", paths.CACHE, ignore=shutil.ignore_patterns("training"))
    network = train.train_network(settings, sample_dataset.root, learned, validation, 25)
    assert network.history == record["history"]
    probabilities = train.predict([network], sample_dataset.root, index)
    probabilities = with_temperature(probabilities, record["temperature"])
    write_predictions(tmp_path / "predictions.csv", index, probabilities)
    assert (tmp_path / "predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()
