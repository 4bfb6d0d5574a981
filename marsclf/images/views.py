"""From a file to the square of pixels a network sees: decoding, fitting and augmentation."""

from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from marsclf.errors import MarsclfError

VIEWS_VERSION = 2  # raise it when the code below gives other pixels: cached features depend on it
# Callers load images in as many threads as there are cores; OpenCV's own would only compete.
cv2.setNumThreads(1)
# At which an image may be looked at, and how often.
ZOOMS, MOST_ZOOMS = (0.1, 10), 16
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 weights of red, green and blue


@dataclass(frozen=True)
class Augmentation:
    """How far a random view of an image may differ from the image. The defaults change nothing.

    Attributes:
        rotation: largest turn to either side, degrees (180: any direction).
        zoom: enlargement is drawn log-uniformly from 1/(1 + zoom) to 1 + zoom.
        stretch: the aspect ratio is drawn log-uniformly from 1/(1 + stretch) to 1 + stretch.
        shift: largest shift along each axis, as a share of the view's side.
        flip: whether half of the views are mirrored.
        brightness, contrast, saturation: the factor is drawn log-uniformly from 1/(1 + x) to 1 + x.
        grey: share of views that lose all colour.
    """

    rotation: float = 0.0
    zoom: float = 0.0
    stretch: float = 0.0
    shift: float = 0.0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                raise MarsclfError(f"augmentation {name} is {value}; it must be 0 or more")


@dataclass(frozen=True)
class Condition:
    """How a fixed view of a whole image differs from it. The defaults change nothing.

    Attributes:
        turn: degrees.
        mirror: whether left and right are exchanged.
        zoom: enlargement about the centre.
        gain: factor of all values.
        grey: whether all colour is lost.
    """

    turn: float = 0.0
    mirror: bool = False
    zoom: float = 1.0
    gain: float = 1.0
    grey: bool = False


WHOLE_IMAGE = Condition()


def check_zooms(zooms: list[float]) -> None:
    """Raise MarsclfError unless there are 1 to 16 zooms, each from 0.1 to 10."""
    if not 1 <= len(zooms) <= MOST_ZOOMS or not all(ZOOMS[0] <= z <= ZOOMS[1] for z in zooms):
        raise MarsclfError(
            f"test_zooms is {zooms}; it must hold 1 to {MOST_ZOOMS} zooms, each from 0.1 to 10."
        )


@dataclass(frozen=True)
class AsRead:
    """How a notebook reads its images, right or wrong.

    Attributes:
        squashed: whether the image is forced into the view's sides, its aspect ratio lost.
        bgr: whether blue and red are exchanged, as where OpenCV's order is taken for RGB.
        augmentation: how far random views differ from the image; None for the image as it is.
    """

    squashed: bool
    bgr: bool
    augmentation: Augmentation | None = None


def decode_rgb(path: Path) -> np.ndarray:
    """Decode an image file to uint8 (height, width, 3), RGB; one channel becomes three.

    Raises:
        MarsclfError: the file is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise MarsclfError(f"{path} is gone; restore it or run `make check-data`") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise MarsclfError(f"{path} cannot be decoded ({error}); replace the file") from None


def fit_view(image: np.ndarray, size: int, condition: Condition = WHOLE_IMAGE) -> np.ndarray:
    """Return the whole image in a `size` x `size` square, uint8, its aspect ratio kept.

    What the image leaves free is filled by its mirror image, so no edge is drawn that the scene
    does not have.
    """
    c = condition
    angle = np.deg2rad(c.turn)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    # Rounded, so that a quarter turn exchanges pixels and blurs none.
    matrix = np.round(turn, 12) @ np.diag([-c.zoom if c.mirror else c.zoom, c.zoom])
    view = _warp(image, size, matrix, np.zeros(2))
    if c.grey:
        view = np.repeat((view @ LUMA).round().astype(np.uint8)[..., np.newaxis], 3, axis=2)
    return view if c.gain == 1 else np.clip(view * c.gain, 0, 255).astype(np.uint8)


def read_view(
    image: np.ndarray, shape: tuple[int, int], how: AsRead, rng: np.random.Generator
) -> np.ndarray:
    """Return an image as some notebook reads it, uint8 (height, width, 3).

    Args:
        image: uint8 (height, width, 3), RGB.
        shape: height and width of the view, pixels; equal unless the image is squashed.
        how: what is done to it.
        rng: the source of chance, where there is an augmentation.
    """
    height, width = shape
    side = max(shape)
    if how.squashed:
        image = cv2.resize(image, (width, height))  # bilinear, OpenCV's default
    if how.augmentation:
        view = random_view(image, side, how.augmentation, rng)
    else:
        view = image if how.squashed else fit_view(image, side)
    top, left = (view.shape[0] - height) // 2, (view.shape[1] - width) // 2
    view = view[top : top + height, left : left + width]
    return view[..., ::-1] if how.bgr else view


def random_view(
    image: np.ndarray, size: int, augmentation: Augmentation, rng: np.random.Generator
) -> np.ndarray:
    """Return one random view of an image as uint8 (size, size, 3): one affine warp, one colour map.

    Args:
        image: uint8 (height, width, 3).
        size: side of the view, pixels.
        augmentation: how far views may differ from the image.
        rng: the source of chance; the same state gives the same view.
    """
    a = augmentation
    # All draws are made, whatever the settings, so that changing one leaves the others alone.
    angle = np.deg2rad(rng.uniform(-a.rotation, a.rotation))
    zoom, stretch = _log_uniform(rng, a.zoom), _log_uniform(rng, a.stretch)
    shift = rng.uniform(-a.shift, a.shift, size=2) * size
    mirror = -1.0 if rng.random() < 0.5 and a.flip else 1.0
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.diag([mirror * zoom * stretch**0.5, zoom * stretch**-0.5])
    view = _warp(image, size, matrix, shift)
    return _recolour(view, a, rng)


def _log_uniform(rng: np.random.Generator, spread: float) -> float:
    return float(np.exp(rng.uniform(-1, 1) * np.log1p(spread)))


def _warp(image: np.ndarray, size: int, matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Map the image's centre to the view's centre plus `shift`, the longer side to `size`."""
    height, width = image.shape[:2]
    matrix = matrix * (size / max(height, width))
    scale = np.sqrt(abs(np.linalg.det(matrix)))
    # Bilinear sampling skips pixels when it shrinks further: average them first.
    if scale < 0.6 and scale * min(height, width) >= 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        matrix = matrix * (width / image.shape[1])
        height, width = image.shape[:2]
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = (size - 1) / 2 + shift - matrix @ centre
    return cv2.warpAffine(
        image,
        np.column_stack([matrix, offset]),
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )


def _recolour(view: np.ndarray, a: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Saturation, contrast and brightness as one 3 x 4 colour matrix; values clip at 0 and 255."""
    saturation, contrast, brightness = (
        _log_uniform(rng, spread) for spread in (a.saturation, a.contrast, a.brightness)
    )
    if rng.random() < a.grey:
        saturation = 0.0
    if saturation == contrast == brightness == 1.0:
        return view
    mix = saturation * np.eye(3) + (1 - saturation) * np.tile(LUMA, (3, 1))
    middle = float(view.mean())
    colour = np.column_stack([mix * contrast, np.full(3, (1 - contrast) * middle)]) * brightness
    return cv2.transform(view, colour)
