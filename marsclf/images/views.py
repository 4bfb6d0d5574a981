"""From decoded pixels to the square view that a network sees: fitting and augmentation."""

from dataclasses import asdict, dataclass

import cv2
import numpy as np

from marsclf.errors import MarsclfError

VIEWS_VERSION = 2  # raise it when the code below gives other pixels: cached features depend on it
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 weights of red, green and blue
# Callers load images in one thread per core; OpenCV's own threads would only compete with them.
cv2.setNumThreads(1)


@dataclass(frozen=True)
class Augmentation:
    """How far a random view may differ from its image. The defaults change nothing.

    Where a setting x is a spread, the value is drawn log-uniformly from 1 / (1 + x) to 1 + x.
    """

    rotation: float = 0.0  # largest angle in either direction, degrees
    zoom: float = 0.0  # spread of the magnification
    stretch: float = 0.0  # spread of the aspect ratio
    shift: float = 0.0  # largest shift along each axis, as a fraction of the view's side
    flip: bool = False  # whether half of the views are mirrored
    brightness: float = 0.0  # spread of the factor
    contrast: float = 0.0  # spread of the factor
    saturation: float = 0.0  # spread of the factor
    grey: float = 0.0  # fraction of the views that lose their color

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                raise MarsclfError(f"augmentation {name} is {value}; it must be 0 or more")


@dataclass(frozen=True)
class Condition:
    """How a fixed view differs from its image. The defaults change nothing."""

    turn: float = 0.0  # degrees, clockwise
    zoom: float = 1.0  # magnification about the center
    tilt: float = 0.0  # degrees by which the view, as a plane, is turned about its vertical axis
    gain: float = 1.0  # factor of all values
    grey: bool = False  # whether the color is removed


WHOLE_IMAGE = Condition()


def check_zooms(zooms: object) -> None:
    """Raise MarsclfError unless `zooms` is a list of 1 to 16 numbers from 0.1 to 10."""
    numbers = zooms if isinstance(zooms, list | tuple) and len(zooms) <= 16 else []
    if not numbers or not all(type(z) in (int, float) and 0.1 <= z <= 10 for z in numbers):
        raise MarsclfError(f"zooms are {zooms!r:.100}; give 1 to 16 numbers from 0.1 to 10")


def fit_view(image: np.ndarray, size: int, condition: Condition = WHOLE_IMAGE) -> np.ndarray:
    """Return the complete image, uint8 (height, width, 3), in a square, uint8 (size, size, 3).

    The aspect ratio is kept. Reflections fill the rest of the square, so that it shows no edge that
    is not in the scene.
    """
    # Rounded, so that a quarter turn moves pixels without blurring them.
    matrix = np.round(_rotation(condition.turn), 12) * condition.zoom
    view = _warp(image, size, matrix, shift=np.zeros(2))
    if condition.tilt:
        view = _tilted(view, condition.tilt)
    if condition.grey:
        view = np.repeat((view @ LUMA).round().astype(np.uint8)[..., np.newaxis], 3, axis=2)
    return view if condition.gain == 1 else np.clip(view * condition.gain, 0, 255).astype(np.uint8)


def _tilted(view: np.ndarray, degrees: float) -> np.ndarray:
    """Return the view as a plane looks at an angle, from twice its side away."""
    size, angle = len(view), np.deg2rad(degrees)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (size - 1) / 2
    nearness = 2 * size / (2 * size + corners[:, :1] * np.sin(angle))
    seen = corners * [np.cos(angle), 1] * nearness
    points = (np.float32(each + (size - 1) / 2) for each in (corners, seen))
    homography = cv2.getPerspectiveTransform(*points)
    return cv2.warpPerspective(view, homography, (size, size), borderMode=cv2.BORDER_REFLECT_101)


def random_view(
    image: np.ndarray, size: int, augmentation: Augmentation, rng: np.random.Generator
) -> np.ndarray:
    """Return a random view of an image, uint8 (height, width, 3), as uint8 (size, size, 3).

    One affine warp and one color transform. The same state of `rng` gives the same view.
    """
    a = augmentation
    # Always the same draws, whatever the settings, so that changing one leaves the others alone.
    angle = rng.uniform(-a.rotation, a.rotation)
    zoom, stretch = _log_uniform(rng, a.zoom), _log_uniform(rng, a.stretch)
    shift = rng.uniform(-a.shift, a.shift, size=2) * size
    mirror = -1.0 if rng.random() < 0.5 and a.flip else 1.0
    scales = np.diag([mirror * zoom * stretch**0.5, zoom * stretch**-0.5])
    view = _warp(image, size, _rotation(angle) @ scales, shift)
    saturation, contrast, brightness = (
        _log_uniform(rng, spread) for spread in (a.saturation, a.contrast, a.brightness)
    )
    if rng.random() < a.grey:
        saturation = 0.0
    if saturation == contrast == brightness == 1.0:
        return view
    mix = saturation * np.eye(3) + (1 - saturation) * np.tile(LUMA, (3, 1))
    offset = np.full(3, (1 - contrast) * float(view.mean()))
    return cv2.transform(view, np.column_stack([mix * contrast, offset]) * brightness)


def _log_uniform(rng: np.random.Generator, spread: float) -> float:
    return float(np.exp(rng.uniform(-1, 1) * np.log1p(spread)))


def _rotation(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _warp(image: np.ndarray, size: int, matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Map the image's center to the view's center plus `shift`, the longer side to `size`."""
    height, width = image.shape[:2]
    matrix = matrix * (size / max(height, width))
    scale = np.sqrt(abs(np.linalg.det(matrix)))
    # Bilinear sampling skips pixels when it shrinks further: average them first.
    if scale < 0.6 and scale * min(height, width) >= 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        matrix = matrix * (width / image.shape[1])
        height, width = image.shape[:2]
    center = np.array([(width - 1) / 2, (height - 1) / 2])
    affine = np.column_stack([matrix, (size - 1) / 2 + shift - matrix @ center])
    return cv2.warpAffine(image, affine, (size, size), borderMode=cv2.BORDER_REFLECT_101)
