"""The views that a network sees of an image, with examples worked by hand."""

from dataclasses import fields

import numpy as np
import pytest

from marsclf.errors import MarsclfError
from marsclf.images.views import LUMA, Augmentation, Condition, check_zooms, fit_view, random_view

EVERYTHING = {field.name: 0.3 for field in fields(Augmentation)}


class Extreme:
    """In place of a random generator: every draw is the highest (or the lowest) possible."""

    def __init__(self, highest: bool) -> None:
        self.highest = highest

    def uniform(self, low: float, high: float, size: int | None = None) -> np.ndarray:
        return np.full(size or (), high if self.highest else low)

    def random(self) -> float:
        return 0.999 if self.highest else 0.0


HIGHEST, LOWEST = Extreme(True), Extreme(False)


def noise(height: int, width: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (height, width, 3)).astype(np.uint8)


def extreme_view(image: np.ndarray, size: int, rng: Extreme = HIGHEST, **settings) -> np.ndarray:
    return random_view(image, size, Augmentation(**settings), rng).astype(int)


def test_fit_view_keeps_the_complete_image_and_reflects_it_into_the_rest() -> None:
    image = noise(2, 4)
    view = fit_view(image, 4)
    assert view.dtype == np.uint8
    np.testing.assert_array_equal(view, image[[1, 0, 1, 0]])
    upright = image.transpose(1, 0, 2)
    np.testing.assert_array_equal(fit_view(upright, 4), upright[:, [1, 0, 1, 0]])


def test_fit_view_averages_when_it_shrinks_and_does_not_move_the_picture() -> None:
    small = noise(4, 8)
    # Of every 4 x 4 pixels only the corners are lit: sampling in the middle would find black.
    image = np.zeros((16, 32, 3), np.uint8)
    for row, column in ((0, 0), (0, 3), (3, 0), (3, 3)):
        image[row::4, column::4] = small
    np.testing.assert_allclose(fit_view(image, 8)[2:6], small / 4, atol=1)
    ramp = np.repeat(np.arange(0, 160, 10, np.uint8), 3).reshape(1, 16, 3).repeat(16, axis=0)
    expected = 5.0 * np.arange(1, 31) - 2.5  # pixel i of 32 lies at (i - 0.5) / 2 of 16
    np.testing.assert_allclose(fit_view(ramp, 32)[16, 1:31, 0], expected, atol=1)


def test_conditions() -> None:
    image = noise(12, 12)
    gray = (image @ LUMA).round()[..., np.newaxis].repeat(3, axis=2)
    for settings, expected in (
        ({"turn": 180}, image[::-1, ::-1]),
        ({"turn": 90}, np.rot90(image, -1)),
        ({"gain": 1.5}, np.minimum(image * 1.5, 255).astype(np.uint8)),
        ({"grey": True}, gray),
    ):
        np.testing.assert_array_equal(fit_view(image, 12, Condition(**settings)), expected)
    square = np.zeros((32, 32, 3), np.uint8)
    square[12:20, 12:20] = 200
    closer, farther = (fit_view(square, 32, Condition(zoom=zoom)) for zoom in (2.0, 0.5))
    assert (closer[9:23, 9:23] == 200).all() and (closer[:7] == 0).all()
    assert (farther[15:17, 15:17] == 200).all() and (farther[10:12, 15:17] == 0).all()


def test_a_tilted_plane_is_seen_in_perspective() -> None:
    lines = np.zeros((201, 201, 3), np.uint8)
    lines[:, [40, 160]] = 255  # 60 pixels from the center; the eye is 402 away
    view = fit_view(lines, 201, Condition(tilt=30))[100, :, 0].astype(float)
    for side, half in ((-1, slice(None, 100)), (1, slice(100, None))):
        expected = 100 + 60 * side * np.cos(np.pi / 6) * 402 / (402 + side * 60 * 0.5)
        place = np.average(np.arange(201)[half], weights=view[half])
        assert place == pytest.approx(expected, abs=0.3)


def test_rotations_and_flips() -> None:
    image = noise(16, 16).astype(int)
    for settings, rng, expected in (
        ({"rotation": 180}, HIGHEST, np.rot90(image, 2)),
        ({"rotation": 90}, HIGHEST, np.rot90(image, -1)),
        ({"rotation": 90}, LOWEST, np.rot90(image, 1)),
        ({"flip": True}, LOWEST, image[:, ::-1]),
        ({"flip": True}, HIGHEST, image),
    ):
        view = extreme_view(image.astype(np.uint8), 16, rng, **settings)
        np.testing.assert_allclose(view, expected, atol=1)


def test_shift_zoom_and_stretch_to_their_limits() -> None:
    image = noise(16, 16)
    view = extreme_view(image, 16, shift=0.25)
    np.testing.assert_array_equal(view[4:, 4:], image[:-4, :-4])
    view = extreme_view(image, 16, zoom=1.0)
    np.testing.assert_allclose(view, extreme_view(image, 32)[8:24, 8:24], atol=1)
    view = extreme_view(image, 16, LOWEST, zoom=1.0)
    np.testing.assert_array_equal(view[4:12, 4:12], fit_view(image, 8))
    ramp = np.broadcast_to(np.arange(0, 128, 4, np.uint8)[:, None], (32, 32))
    # Four times as wide as high, at equal area: twice as wide and half as high.
    view = extreme_view(np.stack([ramp, ramp.T, ramp], axis=-1), 32, stretch=3.0)
    assert view[16, 20, 1] - view[16, 12, 1] == pytest.approx(8 * 4 / 2, abs=1)
    assert view[20, 16, 0] - view[12, 16, 0] == pytest.approx(8 * 4 * 2, abs=1)


def test_brightness_contrast_and_saturation_to_their_limits() -> None:
    image = noise(16, 16, 60, 120)
    x = image.astype(float)
    gray = (x @ LUMA)[..., None]
    for settings, rng, expected in (
        ({"brightness": 1.0}, HIGHEST, 2 * x),
        ({"brightness": 3.0}, HIGHEST, np.minimum(4 * x, 255)),
        ({"brightness": 1.0}, LOWEST, x / 2),
        ({"contrast": 0.5}, HIGHEST, 1.5 * x - x.mean() / 2),
        ({"saturation": 0.5}, HIGHEST, gray + 1.5 * (x - gray)),
        ({"grey": 1.0}, LOWEST, gray.repeat(3, axis=2)),
    ):
        np.testing.assert_allclose(extreme_view(image, 16, rng, **settings), expected, atol=1)


def test_the_default_changes_nothing_and_a_fraction_is_gray() -> None:
    image = noise(192, 256)
    view = random_view(image, 64, Augmentation(), np.random.default_rng(0))
    np.testing.assert_array_equal(view, fit_view(image, 64))
    are_gray = [
        np.ptp(random_view(image, 16, Augmentation(grey=0.3), rng), axis=2).max() <= 1
        for rng in map(np.random.default_rng, range(200))
    ]
    assert 0.2 < np.mean(are_gray) < 0.4


def test_views_depend_on_the_state_alone_and_each_setting_on_its_own_draw() -> None:
    image, first, again = noise(48, 64), np.random.default_rng(5), np.random.default_rng(5)
    view = random_view(image, 32, Augmentation(**EVERYTHING), first)
    np.testing.assert_array_equal(view, random_view(image, 32, Augmentation(**EVERYTHING), again))
    assert (view != random_view(image, 32, Augmentation(**EVERYTHING), again)).any()
    assert view.shape == (32, 32, 3) and view.dtype == np.uint8
    for setting in EVERYTHING:
        without = np.random.default_rng(5)
        random_view(image, 32, Augmentation(**EVERYTHING | {setting: 0}), without)
        assert without.bit_generator.state == first.bit_generator.state


def test_settings_out_of_range() -> None:
    with pytest.raises(MarsclfError, match="augmentation zoom is -0.1; it must be 0 or more"):
        Augmentation(zoom=-0.1)
    check_zooms([0.1, 1, 10])
    for zooms in ([], [1.0] * 17, [0.09], [10.1], [float("nan")], [True], ["1"], "1", None, 1.0):
        with pytest.raises(MarsclfError, match="give 1 to 16 numbers from 0.1 to 10"):
            check_zooms(zooms)
