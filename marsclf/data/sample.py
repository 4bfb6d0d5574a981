"""Generated sample data with the layout and the difficulties of the real data set.

Every class except `ground` and `horizon` is a patterned shape on noisy soil. As in the real data,
splits follow the sols, pictures come in bursts, later sols differ, and a few files are gray.
"""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from marsclf.data.dataset import SPLITS
from marsclf.data.msl import MSL_V1, SAMPLE_MARKER, SAMPLE_NOTICE
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

GROUND, HORIZON = map(MSL_V1.classes.index, ("ground", "horizon"))

# Images per class id: roughly the square roots of the real counts, at least four in train.
COUNTS = {
    "train": [4, 4, 4, 5, 4, 4, 4, 4, 36, 12, 10, 4, 4, 5, 8, 7, 4, 6, 4, 4, 6, 10, 0, 10, 6],
    "val": [3, 2, 0, 5, 3, 16, 1, 2, 7, 6, 7, 0, 4, 0, 2, 3, 3, 5, 3, 3, 0, 4, 0, 3, 18],
    "test": [4, 3, 3, 7, 3, 0, 6, 9, 12, 6, 3, 3, 5, 4, 5, 3, 5, 2, 1, 4, 3, 2, 0, 0, 13],
}
# As in the real data: the first and last sol of each split.
SOLS = {"train": (3, 180), "val": (182, 564), "test": (565, 1060)}
SOLS_PER_SPLIT = 16
# Radius of the object as a fraction of the height, and brightness: later sols vary more.
RADIUS = {"train": (0.22, 0.38), "val": (0.22, 0.42), "test": (0.28, 0.48)}
EXPOSURE = {"train": (0.85, 1.1), "val": (0.75, 1.15), "test": (0.6, 1.2)}
SIZES = {"ML": [(256, 192), (255, 188)], "MR": [(256, 192), (256, 256)], "MH": [(255, 255)]}
GRAY_EVERY = 20  # sequences


def make_sample(target: Path) -> Path:
    """Write about 400 pictures, always the same, to the folder `target`, and return that folder.

    Keeps sample data that is there; raises MarsclfError if `target` holds anything else.
    """
    if (target / SAMPLE_MARKER).is_file():
        return target
    if target.exists():
        raise MarsclfError(f"{target} holds no sample data: name another folder for it.")
    with replace_atomically(target) as folder:
        (folder / "calibrated").mkdir(parents=True)
        rng = np.random.default_rng(0)
        for split in SPLITS:
            lines = []
            for name, label, image in _split_images(split, rng):
                path = f"calibrated/{name}"
                _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])
                (folder / path).write_bytes(encoded.tobytes())
                lines.append(f"{path} {label}\n")
            rng.shuffle(lines)
            (folder / MSL_V1.lists[split]).write_bytes("".join(lines).encode())
        classes = [f"{label:<8}{name}\n" for label, name in enumerate(MSL_V1.classes)]
        (folder / MSL_V1.class_file).write_bytes("".join(classes).encode())
        (folder / SAMPLE_MARKER).write_text(SAMPLE_NOTICE, encoding="utf-8")
    return target


def _split_images(split: str, rng: np.random.Generator) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield (file name, label, BGR or gray picture) of a split, sequence by sequence."""
    sols = rng.choice(np.arange(SOLS[split][0], SOLS[split][1] + 1), SOLS_PER_SPLIT, replace=False)
    sequence = 0
    for label, count in enumerate(COUNTS[split]):
        made = 0
        while made < count:
            sol, camera = rng.choice(sols), rng.choice(list(SIZES))
            sequence += 1
            for frame, image in enumerate(_burst(label, split, camera, rng)):
                if sequence % GRAY_EVERY == 0:
                    image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
                for product_type in "EI" if rng.random() < 0.4 else "I":
                    if made == count:
                        break
                    made += 1
                    if product_type == "I":  # the coarser of the two products of a frame
                        image = cv2.GaussianBlur(image, (3, 3), 0)
                    identity = f"{sequence:06d}{frame:03d}{sequence:04d}{frame:03d}"
                    yield f"{sol:04d}{camera}{identity}{product_type}01_DRCL.JPG", label, image


def _burst(label: int, split: str, camera: str, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield one or two frames of an object, uint8 BGR (height, width, 3), which differ slightly."""
    sizes = SIZES[camera]
    width, height = sizes[rng.integers(len(sizes))]
    radius = height * rng.uniform(*RADIUS[split])
    center = rng.uniform(0.35, 0.65, 2) * (width, height)
    angle, squash = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1)
    exposure = rng.uniform(*EXPOSURE[split])
    dark = np.float32(rng.uniform((30, 30, 35), (80, 80, 90)))
    light = np.float32(rng.uniform(150, 230, 3))
    background = _background(label, width, height, rng)
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    for _ in range(rng.integers(1, 3)):
        image = background
        center = center + rng.normal(0, 2, 2)
        if label not in (GROUND, HORIZON):
            x, y = np.arange(width) - center[0], np.arange(height)[:, None] - center[1]
            u, v = x * cos - y * sin, (x * sin + y * cos) / squash
            shape, bright = _object(label, u, v)
            surface = np.where(bright[..., None], light, dark)
            surface *= np.float32(1 - 0.2 * v[..., None])
            image = np.where(shape[..., None], surface, image)
        image = cv2.GaussianBlur(image * exposure, (3, 3), 0)
        image = image + 5 * rng.standard_normal(image.shape, np.float32)
        yield np.clip(image, 0, 255).astype(np.uint8)


def _background(label: int, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return soil, and for `horizon` sky above it, as float BGR (height, width, 3)."""
    relief = np.zeros((height, width), np.float32)
    for cells, strength in ((4, 18), (16, 14), (64, 12)):
        coarse = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        relief += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    soil = np.float32(rng.uniform((60, 85, 130), (90, 125, 180))) + relief[..., None]
    if label != HORIZON:
        return soil
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(0, 1, height))
    edge = rng.uniform(0.3, 0.7) + rng.uniform(-0.2, 0.2) * x + relief / 900
    return np.where((y < edge)[..., None], np.float32((165, 190, 205)), soil)


def _object(label: int, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the masks of a class's shape and of its bright parts; u and v in units of a radius."""
    r, box = np.hypot(u, v), np.maximum(abs(u), abs(v))
    shapes = (
        r < 1,  # disk
        box < 0.85,  # square
        (v > -0.6) & (v < 1 - 1.7 * abs(u)),  # triangle
        (r > 0.55) & (r < 1),  # ring
        (np.minimum(abs(u), abs(v)) < 0.32) & (box < 1),  # cross
        r < 0.7 + 0.35 * np.cos(5 * np.arctan2(v, u)),  # star
        (abs(u) < 1) & (abs(v) < 0.4),  # bar
        (r < 1) & (np.hypot(u - 0.5, v) > 0.75),  # crescent
    )
    patterns = (
        u > -2,  # plain
        np.sin(14 * u) > 0,  # stripes
        np.sin(11 * u) * np.sin(11 * v) > 0,  # squares
        np.hypot((3 * u) % 1 - 0.5, (3 * v) % 1 - 0.5) < 0.28,  # dots
    )
    return shapes[label % 8], patterns[label // 8]
