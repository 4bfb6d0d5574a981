"""From a file to the pixels a network sees, with examples worked by hand."""

from dataclasses import fields
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marsclf.errors import MarsclfError
from marsclf.images.views import LUMA, Augmentation, Condition, decode_rgb, fit_view, random_view

EVERYTHING = {
    "rotation": 90,
    "zoom": 0.5,
    "stretch": 0.3,
    "shift": 0.2,
    "flip": True,
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 0.5,
    "grey": 0.5,
}


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


def test_fit_view_keeps_the_whole_image_and_mirrors_the_rest() -> None:
    image = noise(2, 4)
    view = fit_view(image, 4)
    assert view.dtype == np.uint8
    # Two rows in the middle; above and below them what a mirror at the edge pixel shows.
    np.testing.assert_array_equal(view, image[[1, 0, 1, 0]])
    upright = image.transpose(1, 0, 2)
    np.testing.assert_array_equal(fit_view(upright, 4), upright[:, [1, 0, 1, 0]])


def test_views_under_a_condition() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)

    def view(**changed: object) -> np.ndarray:
        return fit_view(image, 12, Condition(**changed))

    np.testing.assert_array_equal(view(turn=180), image[::-1, ::-1])
    np.testing.assert_array_equal(view(turn=90), np.rot90(image, -1))
    np.testing.assert_array_equal(view(mirror=True), image[:, ::-1])
    np.testing.assert_array_equal(view(turn=90, mirror=True), np.rot90(image[:, ::-1], -1))
    brighter = np.minimum(image * 1.5, 255).astype(np.uint8)
    np.testing.assert_array_equal(view(gain=1.5), brighter)
    grey = view(grey=True)
    np.testing.assert_array_equal(grey[..., 0], (image @ LUMA).round())
    assert (grey == grey[..., :1]).all()


def test_a_condition_that_zooms() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[12:20, 12:20] = 200
    closer, farther = (fit_view(picture, 32, Condition(zoom=zoom)) for zoom in (2.0, 0.5))
    assert (closer[9:23, 9:23] == 200).all() and (closer[:7] == 0).all()
    assert (farther[15:17, 15:17] == 200).all() and (farther[10:12, 15:17] == 0).all()


def test_fit_view_averages_when_it_shrinks() -> None:
    small = noise(4, 8)
    # Of every 4 x 4 pixels only the corners are lit: sampling in the middle would find black.
    image = np.zeros((16, 32, 3), np.uint8)
    for row, column in ((0, 0), (0, 3), (3, 0), (3, 3)):
        image[row::4, column::4] = small
    view = fit_view(image, 8)
    np.testing.assert_allclose(view[2:6], small / 4, atol=1)


def test_fit_view_enlarges_without_moving_the_picture() -> None:
    ramp = np.repeat(np.arange(0, 160, 10, np.uint8), 3).reshape(1, 16, 3).repeat(16, axis=0)
    enlarged = fit_view(ramp, 32)
    assert enlarged.shape == (32, 32, 3)
    # Pixel i of 32 lies at (i - 0.5) / 2 of 16.
    expected = 5.0 * np.arange(1, 31) - 2.5
    np.testing.assert_allclose(enlarged[16, 1:31, 0], expected, atol=1)


@pytest.mark.parametrize("shape", [(1, 2000), (2000, 1), (1, 1), (3, 700)])
def test_fit_view_of_extreme_shapes(shape: tuple[int, int]) -> None:
    assert fit_view(np.full((*shape, 3), 77, np.uint8), 32).tolist() == [[[77] * 3] * 32] * 32


@pytest.mark.parametrize(
    ("settings", "rng", "expected"),
    [
        ({"rotation": 180}, HIGHEST, lambda fit: np.rot90(fit, 2)),
        ({"rotation": 90}, HIGHEST, lambda fit: np.rot90(fit, -1)),
        ({"rotation": 90}, LOWEST, lambda fit: np.rot90(fit, 1)),
        ({"flip": True}, LOWEST, lambda fit: fit[:, ::-1]),
        ({"flip": True}, HIGHEST, lambda fit: fit),
    ],
)
def test_turns_and_mirrors(settings: dict, rng: Extreme, expected) -> None:
    image = noise(16, 16)
    view = extreme_view(image, 16, rng, **settings)
    np.testing.assert_allclose(view, expected(image.astype(int)), atol=1)


def test_shift_is_a_share_of_the_side() -> None:
    image = noise(16, 16).astype(int)
    view = extreme_view(image.astype(np.uint8), 16, shift=0.25)
    np.testing.assert_array_equal(view[4:, 4:], image[:-4, :-4])
    view = extreme_view(image.astype(np.uint8), 16, LOWEST, shift=0.25)
    np.testing.assert_array_equal(view[:-4, :-4], image[4:, 4:])


def test_zoom_and_stretch_to_their_limits() -> None:
    image = noise(16, 16)
    np.testing.assert_allclose(
        extreme_view(image, 16, zoom=1.0), extreme_view(image, 32)[8:24, 8:24], atol=1
    )
    np.testing.assert_array_equal(
        extreme_view(image, 16, LOWEST, zoom=1.0)[4:12, 4:12], fit_view(image, 8)
    )
    ramp = np.broadcast_to(np.arange(0, 128, 4, np.uint8)[:, None], (32, 32, 3)[:2])
    ramp = np.stack([ramp, ramp.T, ramp], axis=-1)
    # Four times as wide as high, at equal area: twice as wide and half as high.
    view = extreme_view(np.ascontiguousarray(ramp), 32, stretch=3.0)
    assert view[16, 20, 1] - view[16, 12, 1] == pytest.approx(8 * 4 / 2, abs=1)
    assert view[20, 16, 0] - view[12, 16, 0] == pytest.approx(8 * 4 * 2, abs=1)


def test_brightness_contrast_and_saturation_to_their_limits() -> None:
    image = noise(16, 16, 60, 120)
    x = image.astype(float)
    np.testing.assert_allclose(extreme_view(image, 16, brightness=1.0), 2 * x, atol=1)
    np.testing.assert_allclose(extreme_view(image, 16, LOWEST, brightness=1.0), x / 2, atol=1)
    np.testing.assert_allclose(
        extreme_view(image, 16, contrast=0.5), 1.5 * x - x.mean() / 2, atol=1
    )
    grey = (x @ LUMA)[..., None]
    np.testing.assert_allclose(
        extreme_view(image, 16, saturation=0.5), grey + 1.5 * (x - grey), atol=1
    )


def test_values_clip_and_do_not_wrap() -> None:
    image = noise(16, 16)
    view = extreme_view(image, 16, brightness=3.0)
    np.testing.assert_array_equal(view, np.minimum(image.astype(int) * 4, 255))
    dark = extreme_view(image, 16, contrast=3.0)
    assert dark.min() == 0 and dark.max() == 255
    assert (dark[image < 60] == 0).all() and (dark[image > 195] == 255).all()


def test_grey_removes_all_colour() -> None:
    image = noise(16, 16)
    view = random_view(image, 16, Augmentation(grey=1.0), np.random.default_rng(0))
    np.testing.assert_allclose(view, (image @ LUMA)[..., None].repeat(3, axis=2), atol=1)
    share = [
        bool(np.ptp(random_view(image, 16, Augmentation(grey=0.3), rng), axis=2).max() <= 1)
        for rng in map(np.random.default_rng, range(200))
    ]
    assert 0.2 < np.mean(share) < 0.4


@pytest.mark.parametrize("shape", [(192, 256), (256, 192), (40, 40)])
def test_the_default_augmentation_changes_nothing(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    for seed in range(5):
        view = random_view(image, 64, Augmentation(), np.random.default_rng(seed))
        np.testing.assert_array_equal(view, fit_view(image, 64))


def test_the_same_state_gives_the_same_view() -> None:
    image, augmentation = noise(48, 64), Augmentation(**EVERYTHING)
    first, again = np.random.default_rng(5), np.random.default_rng(5)
    view = random_view(image, 32, augmentation, first)
    np.testing.assert_array_equal(view, random_view(image, 32, augmentation, again))
    assert (view != random_view(image, 32, augmentation, first)).any()
    assert view.shape == (32, 32, 3) and view.dtype == np.uint8


@pytest.mark.parametrize("setting", EVERYTHING)
def test_one_setting_leaves_the_other_draws_alone(setting: str) -> None:
    """Whatever is set, equally many numbers are drawn, so each draw keeps its number."""
    image = noise(48, 64)
    with_it, without = np.random.default_rng(0), np.random.default_rng(0)
    random_view(image, 32, Augmentation(**EVERYTHING), with_it)
    rest = {name: value for name, value in EVERYTHING.items() if name != setting}
    random_view(image, 32, Augmentation(**rest), without)
    assert with_it.bit_generator.state == without.bit_generator.state


def test_flips_mirror_half_of_the_views_and_change_nothing_else() -> None:
    image, settings = noise(32, 32), {"zoom": 0.4, "brightness": 0.5, "contrast": 0.3}
    mirrored = []
    for seed in range(40):
        plain, flipped = (
            random_view(image, 32, Augmentation(flip=flip, **settings), rng).astype(int)
            for flip, rng in (
                (False, np.random.default_rng(seed)),
                (True, np.random.default_rng(seed)),
            )
        )
        differences = [abs(flipped - plain).max(), abs(flipped - plain[:, ::-1]).max()]
        # OpenCV rounds positions to 1/32 pixel, here of noise.
        assert min(differences) < 16 and max(differences) > 64
        mirrored.append(differences[0] > 64)
    assert 10 <= sum(mirrored) <= 30


@pytest.mark.parametrize("name", [field.name for field in fields(Augmentation)])
def test_a_negative_setting(name: str) -> None:
    with pytest.raises(MarsclfError, match=f"augmentation {name} is -0.1; it must be 0 or more"):
        Augmentation(**{name: -0.1})


def test_files_of_one_and_of_three_channels(tmp_path: Path) -> None:
    pixels = noise(6, 8)
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    np.testing.assert_array_equal(decode_rgb(tmp_path / "colour.png"), pixels)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    grey = decode_rgb(tmp_path / "grey.png")
    assert grey.dtype == np.uint8
    np.testing.assert_array_equal(grey, pixels[..., :1].repeat(3, axis=2))


def jpeg() -> bytes:
    content = BytesIO()
    Image.fromarray(noise(64, 64)).save(content, "JPEG")
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xd8\xff", b"<html>not found</html>", jpeg()[: len(jpeg()) // 2]],
    ids=["empty", "start", "html", "half"],
)
def test_a_file_that_cannot_be_decoded(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.JPG"
    path.write_bytes(content)
    with pytest.raises(MarsclfError, match=r"image\.JPG cannot be decoded .*replace the file"):
        decode_rgb(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MarsclfError, match=r"image\.JPG is gone"):
        decode_rgb(tmp_path / "image.JPG")
    with pytest.raises(MarsclfError, match="cannot be decoded"):
        decode_rgb(tmp_path)
