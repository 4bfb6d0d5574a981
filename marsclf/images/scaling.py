"""Numbers of any type as 8-bit RGB, and the limits of files and images."""

import stat
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from marsclf.errors import MarsclfError

MAX_PIXELS = 100_000_000  # about 0.8 GB once decoded
MAX_BYTES = 1_000_000_000
# Larger images are shrunk after decoding; OpenCV cannot warp sides of more than 32,767 pixels.
LARGE_PIXELS, LARGE_SIDE = 20_000_000, 16_000
# Threads decode small images in parallel but large ones one at a time, which bounds the memory.
one_at_a_time = threading.Lock()
NO_DATA_FROM = 1e20  # no pixel is that bright, but fill values such as -3.4e38 and 1e32 are


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale numbers of any type, (height, width[, 1 or 3]), to uint8 of three channels.

    uint8 is not scaled. Other integers below 65,536 are divided by the largest number of the
    smallest of 8, 10, 12, 14 and 16 bits that holds them. Hot pixels, which are brighter and fill
    less than half of 5 x 5 pixels and 0.5% of the image, become white. All other numbers are
    stretched from their 0.5th to their 99.5th percentile. Pixels without data become black and do
    not influence the others: those that are masked, not finite, or beyond 1e20, and those of a few
    negative values far below all others, such as -9999.
    """
    valid, values = ~np.ma.getmaskarray(values), np.ma.getdata(values)
    if values.dtype != np.uint8:
        values = _scaled(values, valid)
    values = np.where(valid, values, np.uint8(0)).reshape(*values.shape[:2], -1)
    return values if values.shape[2] == 3 else np.repeat(values, 3, axis=2)


def _scaled(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the values as uint8; clear `valid` where they mean no data."""
    low, high = 0, None
    if np.issubdtype(values.dtype, np.integer):
        high = _integer_range(np.where(valid, values, 0))
    else:
        valid &= np.abs(values) < NO_DATA_FROM  # false for NaN
    if high is None:
        while (fill := _highest_fill_value(values[valid])) is not None:
            valid &= values > fill
        low, high = np.percentile(values[valid], (0.5, 99.5)) if valid.any() else (0, 0)
    spread = float(high) - float(low)
    factor = 255 / spread if spread > 1e-30 else 0.0  # an image of one value is black
    with np.errstate(all="ignore"):  # pixels without data
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(factor)
        return np.clip(scaled, 0, 255).round().astype(np.uint8)


def _integer_range(values: np.ndarray) -> int | None:
    """Return the largest integer of the bit depth, None if more than specks exceed 16 bits."""
    # The median removes specks; all else of an ordinary image stays.
    clipped = np.clip(values, 0, 2**16 - 1).astype(np.uint16)
    high = max(cv2.medianBlur(clipped, 5).max(), np.percentile(clipped, 99.5))
    if high == 2**16 - 1 < values.max():
        return None
    return next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)


def _highest_fill_value(values: np.ndarray) -> float | None:
    """Return a negative number that only a few others precede, far below those that follow."""
    values = np.sort(values[:: 1 + values.size // 1_000_000]).astype(np.float64)
    gaps = np.diff(values)[: np.count_nonzero(values < 0)]
    if not gaps.size:
        return None
    place = gaps.argmax()
    low, high = values[place + 1], np.percentile(values[place + 1 :], 99)
    is_fill = gaps[place] > (high - low) / 20 and np.unique(values[: place + 1]).size <= 5
    return values[place] if is_fill else None


def check_file(path: Path) -> None:
    """Raise MarsclfError if `path` is not a file, is empty, or has more than a billion bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
        raise MarsclfError("it is not a file")
    if status.st_size == 0:
        raise MarsclfError("the file is empty")
    if status.st_size > MAX_BYTES:
        raise MarsclfError(f"the file has more than {MAX_BYTES:,} bytes")


def one_if_large(width: int, height: int) -> AbstractContextManager:
    """Return what holds up other threads with large images, if the image is large itself."""
    is_large = shrunk_size(width, height) != (width, height)
    return one_at_a_time if is_large else nullcontext()


def shrunk_size(width: int, height: int) -> tuple[int, int]:
    """Return the size to which an image is shrunk; MarsclfError for more than 100 megapixels."""
    if width * height > MAX_PIXELS:
        raise MarsclfError(f"the image has over {MAX_PIXELS:,} pixels: {width:,} x {height:,}")
    scale = min(1, (LARGE_PIXELS / (width * height)) ** 0.5, LARGE_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrunk(rgb: np.ndarray) -> np.ndarray:
    """Return a large uint8 image at its shrunk size, a small one as it is."""
    size = shrunk_size(rgb.shape[1], rgb.shape[0])
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))


def thinned(values: np.ndarray) -> np.ndarray:
    """Return every n-th row and column of a large image, all of a small one."""
    height, width = values.shape[:2]
    step = -(-width // shrunk_size(width, height)[0])
    return values[::step, ::step]
