"""The steps of a recipe: what learns, what stays, and that the parts remain one network."""

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest

from marsclf import recipe
from marsclf.data import Dataset
from marsclf.features import embed_images, pass_on, view_loader
from marsclf.images import Augmentation, decode_rgb, fit_view
from marsclf.presets import parameters_of
from marsclf.recipe import Recipe
from marsclf.training import join

SMALL = {
    "image_size": 32,
    "augmentation": {"rotation": 90, "zoom": 0.5, "flip": True},
    "views": 1,
    "views_rare": 3,
    "head_hidden": 0,
    "head_epochs": 2,
    "finetune_blocks": ["block6", "top"],
    "finetune_epochs": 2,
    "finetune_batch_size": 8,
}


def make_recipe(**changed: object) -> Recipe:
    values = parameters_of("laptop") | SMALL | changed
    return Recipe(**{field.name: values[field.name] for field in dataclasses.fields(Recipe)})


def learn(how: Recipe, dataset: Dataset, folder: Path):
    """Run all steps on a few images: network, head, classifier, history, weights before."""
    index = dataset.index
    train = index[index["split"] == "train"].iloc[::8].head(24)
    validation = index[index["split"] == "val"].iloc[::8].head(10)
    network = recipe.build(how)
    before = {weights.path: weights.numpy() for weights in network.whole.weights}
    counts = recipe.training_counts(how, train["label"].to_numpy())
    cache = folder / "cache"
    seen = recipe.see(how, network, dataset.root, train, counts, cache)
    judged = recipe.see(how, network, dataset.root, validation, np.ones(10, int), cache)
    head, history = recipe.train_head(how, network, seen, judged, 24, folder, cache)
    after_head = [weights.copy() for weights in head.get_weights()]
    classifier, more = recipe.fine_tune(how, network, head, seen, judged, 24, folder)
    return network, head, classifier, history + more, before, after_head, validation


@pytest.fixture(scope="module")
def learnt(sample_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("recipe")
    return learn(make_recipe(), sample_dataset, folder), folder


def test_the_named_blocks_and_the_head_alone_change(learnt) -> None:
    (network, head, _, history, before, after_head, _), _ = learnt
    assert [(r["stage"], r["epoch"]) for r in history] == [
        ("head", 1),
        ("head", 2),
        ("finetune", 1),
        ("finetune", 2),
    ]
    norms = {
        weights.path
        for layer in network.whole.layers
        if isinstance(layer, keras.layers.BatchNormalization)
        for weights in layer.weights
    }
    assert any(path.startswith("block6") for path in norms)
    for weights in network.whole.weights:
        same = np.array_equal(weights.numpy(), before[weights.path])
        named = weights.path.startswith(("block6", "top_"))
        assert same != (named and weights.path not in norms), weights.path
    for found, earlier in zip(head.get_weights(), after_head, strict=True):
        assert (found != earlier).any()


def test_the_parts_answer_as_the_whole_network_does(learnt, sample_dataset: Dataset) -> None:
    (network, head, classifier, _, _, _, rows), folder = learnt
    root, cache = sample_dataset.root, folder / "cache"
    seen = embed_images(root, rows, network.frozen, cache)
    found = pass_on(seen, classifier, cache).read()
    views = np.stack([fit_view(decode_rgb(root / path), 32) for path in rows["path"]])
    expected = join(network.whole, head).predict_on_batch(views)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_best_epoch_is_kept(learnt, sample_dataset: Dataset) -> None:
    (network, head, _, history, _, _, rows), _ = learnt
    load = view_loader(32, Augmentation(**SMALL["augmentation"]), 0)
    root = sample_dataset.root
    views = [load((root / row.path, row.sha256, 0)) for row in rows.itertuples()]
    probabilities = join(network.whole, head).predict_on_batch(np.stack(views))
    labels = rows["label"].to_numpy()
    # Each class counts the same, however many images it has; 0.1 of each target is spread.
    targets = 0.9 * np.eye(25)[labels] + 0.1 / 25
    each = -(targets * np.log(probabilities)).sum(axis=1)
    loss = np.mean([each[labels == label].mean() for label in np.unique(labels)])
    best = min(history[2:], key=lambda record: record["val_loss"])
    assert best["val_loss"] == pytest.approx(loss, abs=5e-3)
    accuracy = np.mean(probabilities.argmax(axis=1) == labels)
    assert best["val_accuracy"] == pytest.approx(accuracy, abs=1e-5)


def test_an_equal_recipe_goes_on_and_another_starts_anew(
    learnt, sample_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (network, _, _, history, _, _, _), folder = learnt
    finished = network.whole.get_weights()
    begun = []

    def fit(*_: object, **__: object) -> None:
        begun.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "fit", fit)
    again = learn(make_recipe(), sample_dataset, folder)
    assert again[3] == history and not begun
    for found, expected in zip(again[0].whole.get_weights(), finished, strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(KeyboardInterrupt):
        learn(make_recipe(augmentation={"zoom": 0.6}), sample_dataset, folder)


def test_a_recipe_without_a_second_stage(sample_dataset: Dataset, tmp_path: Path) -> None:
    how = make_recipe(finetune_epochs=0)
    network, head, classifier, history, before, _, _ = learn(how, sample_dataset, tmp_path)
    assert classifier is head and network.upper is None and network.frozen is network.whole
    assert [record["stage"] for record in history] == ["head", "head"]
    for weights in network.whole.weights:
        np.testing.assert_array_equal(weights.numpy(), before[weights.path])
