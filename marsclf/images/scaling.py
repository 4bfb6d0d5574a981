"""Numbers of any type as 8-bit RGB, and the limits of files and images."""

import stat
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

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
    smallest of 8, 10, 12, 14 and 16 bits that holds them. All other numbers are stretched from
    their 0.5th to their 99.5th percentile. Pixels without data become black and do not influence
    the others: those that are masked, not finite, or beyond 1e20.
    """
    valid, values = ~np.ma.getmaskarray(values), np.ma.getdata(values)
    if values.dtype != np.uint8:
        valid &= np.abs(values) < NO_DATA_FROM  # false for NaN
        known = values[valid] if valid.any() else np.zeros(1)
        if np.issubdtype(values.dtype, np.integer) and known.max() < 2**16:
            low, high = 0, next(2**b - 1 for b in (8, 10, 12, 14, 16) if known.max() < 2**b)
        else:
            low, high = np.percentile(known, (0.5, 99.5))
        spread = float(high) - float(low)
        factor = 255 / spread if spread > 1e-30 else 0.0  # an image of one value is black
        with np.errstate(all="ignore"):  # pixels without data
            scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(factor)
            values = np.clip(scaled, 0, 255).round().astype(np.uint8)
    values = np.where(valid, values, np.uint8(0)).reshape(*values.shape[:2], -1)
    return values if values.shape[2] == 3 else np.repeat(values, 3, axis=2)


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
    return nullcontext() if shrunk_size(width, height) == (width, height) else one_at_a_time


def shrunk_size(width: int, height: int) -> tuple[int, int]:
    """Return the size to which an image is shrunk; MarsclfError for more than 100 megapixels."""
    if width * height > MAX_PIXELS:
        raise MarsclfError(f"the image has over {MAX_PIXELS:,} pixels: {width:,} x {height:,}")
    scale = min(1, (LARGE_PIXELS / (width * height)) ** 0.5, LARGE_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrunk(values: np.ndarray) -> np.ndarray:
    """Return uint8 RGB at its shrunk size, of other images every n-th row and column."""
    height, width = values.shape[:2]
    size = shrunk_size(width, height)
    if values.dtype == np.uint8 and values.shape[2:] == (3,):
        return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))
    step = -(-width // size[0])
    return values[::step, ::step]
