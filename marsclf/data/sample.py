"""Generated sample data with the layout and the difficulties of the real data set.

Every class except `ground` is a striped polygon on noisy soil. As in the real data, splits follow
the sols, pictures come in bursts, later sols differ, and a few files are gray.
"""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageFilter

from marsclf.data.dataset import SPLITS
from marsclf.data.msl import MSL_V1, SAMPLE_MARKER, SAMPLE_NOTICE
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

# Images per class id: roughly the square roots of the real counts, at least four in train.
COUNTS = {
    "train": [4, 4, 4, 5, 4, 4, 4, 4, 36, 12, 10, 4, 4, 5, 8, 7, 4, 6, 4, 4, 6, 10, 0, 10, 6],
    "val": [3, 2, 0, 5, 3, 16, 1, 2, 7, 6, 7, 0, 4, 0, 2, 3, 3, 5, 3, 3, 0, 4, 0, 3, 18],
    "test": [4, 3, 3, 7, 3, 0, 6, 9, 12, 6, 3, 3, 5, 4, 5, 3, 5, 2, 1, 4, 3, 2, 0, 0, 13],
}
# As in the real data: the first and last sol of each split.
SOLS = {"train": (3, 180), "val": (182, 564), "test": (565, 1060)}
SOLS_PER_SPLIT = 16
DARKEST = {"train": 0.85, "val": 0.75, "test": 0.6}  # exposure: later sols vary more
SIZES = {"ML": (256, 192), "MR": (255, 188), "MH": (255, 255)}
BURST = ((0, "E"), (0, "I"), (1, "E"))  # frames and their products
GRAY_EVERY = 20  # bursts


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
                image.save(folder / "calibrated" / name, quality=85)
                lines.append(f"calibrated/{name} {label}\n")
            rng.shuffle(lines)
            (folder / MSL_V1.lists[split]).write_bytes("".join(lines).encode())
        classes = [f"{label:<8}{name}\n" for label, name in enumerate(MSL_V1.classes)]
        (folder / MSL_V1.class_file).write_bytes("".join(classes).encode())
        (folder / SAMPLE_MARKER).write_text(SAMPLE_NOTICE, encoding="utf-8")
    return target


def _split_images(split: str, rng: np.random.Generator) -> Iterator[tuple[str, int, Image.Image]]:
    """Yield file name, label and picture of each image of a split, burst by burst."""
    sols = rng.choice(np.arange(SOLS[split][0], SOLS[split][1] + 1), SOLS_PER_SPLIT, replace=False)
    burst = 0
    for label, count in enumerate(COUNTS[split]):
        for number in range(count):
            frame, product_type = BURST[number % len(BURST)]
            if number % len(BURST) == 0:
                burst += 1
                sol, camera, scene = rng.choice(sols), rng.choice(list(SIZES)), rng.integers(2**32)
            image = Image.fromarray(_picture(label, split, SIZES[camera], scene, frame))
            if product_type == "I":  # the coarser of the two products of a frame
                image = image.filter(ImageFilter.GaussianBlur(1))
            identity = f"{burst:06d}{frame:03d}{burst:04d}{frame:03d}{product_type}01_DRCL"
            image = image.convert("RGB" if burst % GRAY_EVERY else "L")
            yield f"{sol:04d}{camera}{identity}.JPG", label, image


def _picture(label: int, split: str, size: tuple[int, int], scene: int, frame: int) -> np.ndarray:
    """Return a frame of a scene, uint8 RGB (height, width, 3); the frames differ slightly."""
    rng, (width, height) = np.random.default_rng(scene), size
    relief = cv2.resize(rng.normal(0, 20, (24, 24)), size, interpolation=cv2.INTER_CUBIC)
    image = rng.uniform((130, 85, 60), (180, 125, 90)) + relief[..., None]
    dark, light = rng.uniform(30, 80, 3), rng.uniform(150, 230, 3)
    radius, turn = height * rng.uniform(0.22, 0.45), rng.uniform(0, 2 * np.pi)
    center = rng.uniform(0.35, 0.65, 2) * size + 3 * frame
    exposure = rng.uniform(DARKEST[split], 1.15)
    if label != MSL_V1.classes.index("ground"):
        x, y = np.arange(width) - center[0], np.arange(height)[:, None] - center[1]
        distance, angle = np.hypot(x, y) / radius, np.arctan2(y, x) + turn
        corner = np.pi / (3 + label % 5)  # half the angle between two corners, which lie at 1
        inside = distance * np.cos(angle % (2 * corner) - corner) < np.cos(corner)
        is_light = np.sin((3 + 4 * (label // 5)) * distance * np.sin(angle)) > 0
        image = np.where(inside[..., None], np.where(is_light[..., None], light, dark), image)
    noise = np.random.default_rng((scene, frame)).normal(0, 5, image.shape)
    return np.clip(image * exposure + noise, 0, 255).astype(np.uint8)
