"""The original recipe, its switches one at a time, and the notebook that climbs from it."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest

from marsclf.data import msl as data
from marsclf.errors import MarsclfError
from marsclf.evaluation import ledger
from marsclf.images.views import AsRead, Augmentation, fit_view, read_view
from marsclf.networks.backbones import build_backbone
from marsclf.training import reference
from marsclf.training.reference import Original, split_at, thaw
from marsclf.training.stages import build_head, join

RNG = np.random.default_rng(0)


def test_each_rung_puts_one_thing_right() -> None:
    recipes = list(reference.rungs(Original()).values())
    before = None
    for how in recipes:
        if before:
            changed = [n for n in vars(how) if getattr(how, n) != getattr(before, n)]
            assert len(changed) == 1
        before = how
    first, last = recipes[0], recipes[-1]
    assert first == Original()
    assert (first.bgr, first.squashed, first.batchnorm_trainable) == (True, True, True)
    assert (first.augmented, first.balanced) == (False, False)
    assert (last.bgr, last.squashed, last.batchnorm_trainable) == (False, False, False)
    assert (last.augmented, last.balanced) == (True, True)


def test_a_squashed_image_fills_the_view_and_changes_its_aspect() -> None:
    image = np.zeros((100, 50, 3), np.uint8)
    image[:, 25:] = (200, 100, 50)
    view = read_view(image, (40, 60), AsRead(squashed=True, bgr=False), RNG)
    assert view.shape == (40, 60, 3)
    assert (view[:, :28] == 0).all() and (view[:, 32:] == (200, 100, 50)).all()


def test_blue_and_red_change_places() -> None:
    image = np.full((30, 30, 3), (200, 100, 50), np.uint8)
    for squashed in (True, False):
        view = read_view(image, (30, 30), AsRead(squashed, bgr=True), RNG)
        assert (view == (50, 100, 200)).all()


def test_the_aspect_is_kept_as_elsewhere() -> None:
    image = RNG.integers(0, 256, (50, 80, 3), np.uint8)
    view = read_view(image, (32, 32), AsRead(squashed=False, bgr=False), RNG)
    np.testing.assert_array_equal(view, fit_view(image, 32))


def test_augmentation_reaches_training_alone_and_only_when_switched_on() -> None:
    spread = {"rotation": 90}
    assert Original(augmentation=spread).reading(training=True).augmentation is None
    on = Original(augmentation=spread, augmented=True)
    assert on.reading(training=False).augmentation is None
    assert on.reading(training=True).augmentation == Augmentation(rotation=90)
    image = RNG.integers(0, 256, (50, 80, 3), np.uint8)
    how = on.reading(training=True)
    views = [read_view(image, (40, 60), how, np.random.default_rng(n)) for n in (0, 0, 1)]
    assert views[0].shape == (40, 60, 3)
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()


def test_natural_draws_take_each_image_once_and_balanced_ones_each_class_alike() -> None:
    labels = np.repeat([3, 7], [900, 100])
    natural = reference.draw(Original(), labels, views=1, epoch=0)
    assert sorted(natural) == list(range(1000))
    assert (natural != reference.draw(Original(), labels, 1, epoch=1)).any()
    views = reference.draw(Original(augmented=True), labels, views=4, epoch=0)
    assert sorted(views // 4) == list(range(1000)) and set(views % 4) == {0, 1, 2, 3}
    balanced = reference.draw(Original(balanced=True), labels, views=1, epoch=0)
    assert (labels[balanced] == 7).mean() == pytest.approx(0.5, abs=0.06)


def test_an_unknown_step_or_network(tmp_path: Path) -> None:
    with pytest.raises(MarsclfError, match="there is no 'rgb'; the steps are RGB, aspect kept"):
        reference.rungs(Original(), ["rgb"])
    with pytest.raises(MarsclfError, match="choose one of EfficientNetB7, EfficientNetLite0"):
        reference.learn(Original("EfficientNetB0"), tmp_path, None)


def test_the_upper_layers_of_b7_begin_at_layer_500() -> None:
    whole = build_backbone("EfficientNetB7", 32, weights=None)
    frozen, upper, still_frozen = split_at(whole, reference.FIRST_LAYER["EfficientNetB7"])
    learning = [layer.name for layer in upper.layers[1:] if layer.name not in still_frozen]
    assert learning == [layer.name for layer in whole.layers[500:]]
    assert {name.partition("_")[0] for name in still_frozen} == {"block5g"}
    assert frozen.layers[-1].name == "block5f_add"


def test_batchnorm_thaws_only_where_it_is_to() -> None:
    whole = build_backbone("EfficientNetLite0", 32, weights=None)
    _, upper, still_frozen = split_at(whole, reference.FIRST_LAYER["EfficientNetLite0"])
    assert not still_frozen
    classifier = join(upper, build_head(1280, 0, 0.2))
    images = np.ones((4, *classifier.input_shape[1:]), np.float32)
    for batchnorm in (True, False):
        thaw(classifier, still_frozen, batchnorm)
        layers = [la for la in classifier.layers if isinstance(la, keras.layers.BatchNormalization)]
        before = [layer.moving_variance.numpy() for layer in layers]
        classifier(images, training=True)
        pairs = zip(layers, before, strict=True)
        moved = [bool((la.moving_variance.numpy() != was).any()) for la, was in pairs]
        assert all(moved) if batchnorm else not any(moved)


def test_a_rung_done_before_is_skipped_and_a_score_of_test_is_entered(
    sample_dataset: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt, entered = [], []

    def learn(how: Original, *_: object) -> tuple:
        learnt.append(how)
        layers = keras.layers
        frozen = keras.Sequential([layers.Input((24, 32, 3)), layers.AveragePooling2D(8)])
        classifier = [layers.Input((3, 4, 3)), layers.GlobalAveragePooling2D()]
        classifier.append(layers.Dense(25, "softmax"))
        return frozen, keras.Sequential(classifier), []

    monkeypatch.setattr(reference, "learn", learn)
    monkeypatch.setattr(ledger, "append", lambda record, _: entered.append(record["preset"]))
    real = dataclasses.replace(sample_dataset, name="msl-v1")
    recipes = reference.rungs(Original(sides=(24, 32)), ["RGB"])

    def climb() -> dict:
        return reference.climb("ladder", recipes, real, tmp_path / "run", tmp_path / "cache")

    first = climb()
    assert learnt == list(recipes.values())
    assert entered == ["ladder/original", "ladder/rgb"]
    assert json.loads(json.dumps(climb())) == first
    assert len(learnt) == len(entered) == 2
    # A rung that was cut off before its metrics were written, or has another recipe, is done again.
    (tmp_path / "run" / "rgb" / "metrics.json").unlink()
    climb()
    assert entered[2:] == ["ladder/rgb"]
    recipes = reference.rungs(Original(sides=(24, 32), seed=1), ["RGB"])
    climb()
    assert len(learnt) == 5


def test_without_a_second_stage_the_whole_network_is_frozen(
    sample_dataset: data.Dataset, tmp_path: Path
) -> None:
    how = Original("EfficientNetLite0", sides=(32, 40), frozen_epochs=2, upper_epochs=0)
    train = sample_dataset.index.iloc[::20]
    frozen, classifier, history = reference.learn(how, sample_dataset.root, train, tmp_path)
    assert [record["stage"] for record in history] == ["frozen", "frozen"]
    assert frozen.input_shape == (None, 32, 40, 3) and frozen.output_shape == (None, 1280)
    assert classifier.input_shape == (None, 1280)
