"""A stand-in for the Curiosity images, made by code: same layout and difficulties, other pictures.

Every class but `ground` and `horizon` is a shape with a surface pattern, anywhere on a noisy
Mars-coloured background. As in the real set the splits follow the sols, pictures come in bursts,
later sols look different and have other class frequencies, and a few files have a single channel.
"""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from marsclf.data.msl import CLASS_FILE, CLASS_NAMES, SAMPLE_MARKER, SPLITS, split_file
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

VERSION = 1
GROUND, HORIZON = CLASS_NAMES.index("ground"), CLASS_NAMES.index("horizon")

# Images per class id: square roots of the real counts, thinned, at least four in train.
COUNTS = {
    "train": [4, 4, 4, 5, 4, 4, 4, 4, 36, 12, 10, 4, 4, 5, 8, 7, 4, 6, 4, 4, 6, 10, 0, 10, 6],
    "val": [3, 2, 0, 5, 3, 16, 1, 2, 7, 6, 7, 0, 4, 0, 2, 3, 3, 5, 3, 3, 0, 4, 0, 3, 18],
    "test": [4, 3, 3, 7, 3, 0, 6, 9, 12, 6, 3, 3, 5, 4, 5, 3, 5, 2, 1, 4, 3, 2, 0, 0, 13],
}
# The real sols of each split, first and last; and how large (radius over picture height) and how
# bright the object is in it: small in a wide view at first, later closer and at any exposure.
SOLS = {"train": (3, 180), "val": (182, 564), "test": (565, 1060)}
SOLS_PER_SPLIT = 16
RADIUS = {"train": (0.22, 0.38), "val": (0.22, 0.42), "test": (0.28, 0.48)}
EXPOSURE = {"train": (0.85, 1.1), "val": (0.75, 1.15), "test": (0.6, 1.2)}
SIZES = {"ML": [(256, 192), (255, 188)], "MR": [(256, 192), (256, 256)], "MH": [(255, 255)]}
GREY_EVERY = 20

MARKER_TEXT = """\
SAMPLE DATA, version {version}, seed {seed}

These are not photographs of Mars. marsclf made them by code, for tests and for runs that have no
real images at hand. Results on them say nothing about the classification of Curiosity's images.
"""


def make_sample(target: Path, seed: int = 0) -> Path:
    """Write the sample set of about 400 pictures to the folder `target`, and return that folder.

    The same seed gives the same pictures. A sample set of this version and seed that is there
    already is kept. Raises MarsclfError if `target` holds anything else.
    """
    marker = MARKER_TEXT.format(version=VERSION, seed=seed)
    if target.exists():
        found = target / SAMPLE_MARKER
        if not found.is_file():
            raise MarsclfError(f"{target} holds no sample data: name another folder for it.")
        if found.read_text(encoding="utf-8") == marker:
            return target
    with replace_atomically(target) as folder:
        (folder / "calibrated").mkdir(parents=True)
        rng = np.random.default_rng(seed)
        for split in SPLITS:
            lines = []
            for name, label, image in _split_images(split, rng):
                path = f"calibrated/{name}"
                _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])
                (folder / path).write_bytes(encoded.tobytes())
                lines.append(f"{path} {label}\n")
            rng.shuffle(lines)
            (folder / split_file(split)).write_text("".join(lines), encoding="utf-8")
        classes = "".join(f"{label:<8}{name}\n" for label, name in enumerate(CLASS_NAMES))
        (folder / CLASS_FILE).write_text(classes, encoding="utf-8")
        (folder / SAMPLE_MARKER).write_text(marker, encoding="utf-8")
    return target


def _split_images(split: str, rng: np.random.Generator) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield (file name, label, BGR or grey picture) of a split, sequence by sequence."""
    sols = rng.choice(np.arange(SOLS[split][0], SOLS[split][1] + 1), SOLS_PER_SPLIT, replace=False)
    sequence = 0
    for label, count in enumerate(COUNTS[split]):
        made = 0
        while made < count:
            sol, camera = rng.choice(sols), rng.choice(list(SIZES))
            scene = _Scene(label, split, SIZES[camera], rng)
            sequence += 1
            for frame in range(rng.integers(1, 3)):
                image = scene.picture(rng)
                if sequence % GREY_EVERY == 0:
                    image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
                for product_type in "EI" if rng.random() < 0.4 else "I":
                    if made == count:
                        break
                    made += 1
                    if product_type == "I":  # the coarser of the two products of a frame
                        image = cv2.GaussianBlur(image, (3, 3), 0)
                    identity = f"{sequence:06d}{frame:03d}{sequence:04d}{frame:03d}"
                    yield f"{sol:04d}{camera}{identity}{product_type}01_DRCL.JPG", label, image


class _Scene:
    """What the frames of one burst have in common: they differ by a small move and noise."""

    def __init__(
        self, label: int, split: str, sizes: list[tuple[int, int]], rng: np.random.Generator
    ) -> None:
        self.label = label
        self.width, self.height = sizes[rng.integers(len(sizes))]
        self.radius = self.height * rng.uniform(*RADIUS[split])
        self.centre = rng.uniform(0.35, 0.65, 2) * (self.width, self.height)
        self.angle = rng.uniform(0, 2 * np.pi)
        self.squash = rng.uniform(0.75, 1)
        self.exposure = rng.uniform(*EXPOSURE[split])
        self.dark = np.float32(rng.uniform((30, 30, 35), (80, 80, 90)))
        self.light = np.float32(rng.uniform(150, 230, 3))
        self.background = self._background(rng)

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """Return soil, and for `horizon` sky above it, as float BGR (height, width, 3)."""
        relief = np.zeros((self.height, self.width), np.float32)
        for cells, strength in ((4, 18), (16, 14), (64, 12)):
            coarse = rng.normal(0, strength, (cells, cells)).astype(np.float32)
            relief += cv2.resize(coarse, (self.width, self.height), interpolation=cv2.INTER_CUBIC)
        soil = np.float32(rng.uniform((60, 85, 130), (90, 125, 180))) + relief[..., None]
        if self.label != HORIZON:
            return soil
        x, y = np.meshgrid(np.linspace(-1, 1, self.width), np.linspace(0, 1, self.height))
        edge = rng.uniform(0.3, 0.7) + rng.uniform(-0.2, 0.2) * x + relief / 900
        return np.where((y < edge)[..., None], np.float32((165, 190, 205)), soil)

    def picture(self, rng: np.random.Generator) -> np.ndarray:
        """Return the next frame as uint8 BGR (height, width, 3)."""
        image = self.background
        self.centre = self.centre + rng.normal(0, 2, 2)
        if self.label not in (GROUND, HORIZON):
            x = np.arange(self.width) - self.centre[0]
            y = np.arange(self.height)[:, None] - self.centre[1]
            cos, sin = np.cos(self.angle) / self.radius, np.sin(self.angle) / self.radius
            u, v = x * cos - y * sin, (x * sin + y * cos) / self.squash
            inside, bright = _shape(self.label % 8, u, v), _pattern(self.label // 8, u, v)
            surface = np.where(bright[..., None], self.light, self.dark)
            surface *= np.float32(1 - 0.2 * v[..., None])
            image = np.where(inside[..., None], surface, image)
        image = cv2.GaussianBlur(image * self.exposure, (3, 3), 0)
        image = image + 5 * rng.standard_normal(image.shape, np.float32)
        return np.clip(image, 0, 255).astype(np.uint8)


def _shape(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return where the shape is, as a mask; u and v are coordinates in units of its radius."""
    r, box = np.hypot(u, v), np.maximum(abs(u), abs(v))
    if kind == 0:
        return r < 1  # disc
    if kind == 1:
        return box < 0.85  # square
    if kind == 2:
        return (v > -0.6) & (v < 1 - 1.7 * abs(u))  # triangle
    if kind == 3:
        return (r > 0.55) & (r < 1)  # ring
    if kind == 4:
        return (np.minimum(abs(u), abs(v)) < 0.32) & (box < 1)  # cross
    if kind == 5:
        return r < 0.7 + 0.35 * np.cos(5 * np.arctan2(v, u))  # star
    if kind == 6:
        return (abs(u) < 1) & (abs(v) < 0.4)  # bar
    return (r < 1) & (np.hypot(u - 0.5, v) > 0.75)  # crescent


def _pattern(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return where the surface is bright, as a mask."""
    if kind == 0:
        return u > -2  # plain
    if kind == 1:
        return np.sin(14 * u) > 0  # stripes
    if kind == 2:
        return np.sin(11 * u) * np.sin(11 * v) > 0  # squares
    return np.hypot((3 * u) % 1 - 0.5, (3 * v) % 1 - 0.5) < 0.28  # dots
