"""The original recipe, its switches one at a time, and the notebook that climbs from it."""

import numpy as np
import pytest

from marsclf import reference
from marsclf.images import AsRead, Augmentation, fit_view, read_view
from marsclf.reference import Original

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
