"""Any image file of an archive as 8-bit RGB: JPEG, PNG, TIFF, and PDS3 and PDS4 products.

A file that cannot be read raises MarsclfError with a reason short enough for a table cell. No file
can make this module exhaust the memory, hang, or run a program.
"""

import re
import stat
import threading
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from marsclf.errors import MarsclfError

FORMATS = ("JPEG", "PNG", "TIFF")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff", ".img")
MAX_PIXELS = 100_000_000  # about 0.8 GB once decoded
MAX_BYTES = 1_000_000_000
# Larger images are shrunk after decoding; OpenCV cannot warp sides of more than 32,767 pixels.
LARGE_PIXELS, LARGE_SIDE = 20_000_000, 16_000
# OpenCV would log every odd tag of a TIFF file; `read_rgb` reports what cannot be read.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
# Threads decode small images in parallel but large ones one at a time, which bounds the memory.
_one_large_at_a_time = threading.Lock()


def read_rgb(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 (height, width, 3), RGB.

    Gray images get three equal channels, transparent pixels become black, and the EXIF rotation is
    applied. Integers of more than 8 bits are assumed to use the smallest of 8, 10, 12, 14 and 16
    bits that holds them (CMYK and images with transparency: always 16); other numbers are stretched
    from their 0.5th to their 99.5th percentile. A file with several pictures gives the first.
    Images of more than 20 megapixels are shrunk to that size.

    Raises:
        MarsclfError: the file cannot be read, is not such an image, is damaged, or has more than
            100 megapixels. The text is the reason alone; callers add the path.
    """
    path = Path(path)
    try:
        _check_file(path)
        if path.suffix.lower() in (".img", ".lbl", ".xml"):
            return _read_pds(path)
        # A stream, because Pillow maps named files into memory, which scrambles gray TIFF files
        # whose EXIF rotation is 90 degrees.
        with (
            path.open("rb") as stream,
            Image.open(stream, formats=("JPEG", "PNG", "TIFF")) as image,
        ):
            size = _shrunk_size(*image.size)
            with nullcontext() if size == image.size else _one_large_at_a_time:
                image.draft(None, size)  # a JPEG may be decoded at a half, a quarter or an eighth
                return _to_rgb(image, path)
    except MarsclfError:
        raise
    except UnidentifiedImageError:
        raise MarsclfError("it is not a JPEG, PNG or TIFF image") from None
    except Image.DecompressionBombError:
        raise MarsclfError(f"the image has over {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise almost anything on a damaged file
        # Only the operating system's errors have a `strerror`, Pillow's do not.
        reason = " ".join((str(error) or type(error).__name__).split())
        text = getattr(error, "strerror", None) or f"it cannot be decoded: {reason:.200}"
        raise MarsclfError(text) from None


def ignore_decoder_warnings() -> None:
    """Silence the decoders' warnings about odd files; `read_rgb` reports what cannot be read.

    Call it within warnings.catch_warnings, which applies to all threads.
    """
    warnings.filterwarnings("ignore", module=r"(PIL|pdr)\b")


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale numbers of any type, (height, width) or (height, width, 3), to uint8 of three channels.

    Scales as described in `read_rgb`. Numbers that are not finite become black.
    """
    if values.ndim == 2:
        values = np.repeat(values[..., np.newaxis], 3, axis=2)
    if values.dtype == np.uint8:
        return values
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = 0, values.max()
    if np.issubdtype(values.dtype, np.integer) and high < 2**16:
        high = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    else:
        low, high = np.percentile(values, (0.5, 99.5))
    spread = float(high) - float(low)
    factor = 255 / spread if spread > 1e-30 else 0.0  # an image of one value is black
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(factor)
    return np.clip(scaled, 0, 255).round().astype(np.uint8)


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
        raise MarsclfError("it is not a file")
    if status.st_size == 0:
        raise MarsclfError("the file is empty")
    if status.st_size > MAX_BYTES:
        raise MarsclfError(f"the file has more than {MAX_BYTES:,} bytes")


def _shrunk_size(width: int, height: int) -> tuple[int, int]:
    """Return the size to which an image is shrunk; MarsclfError for more than 100 megapixels."""
    if width * height > MAX_PIXELS:
        raise MarsclfError(f"the image has over {MAX_PIXELS:,} pixels: {width:,} x {height:,}")
    scale = min(1, (LARGE_PIXELS / (width * height)) ** 0.5, LARGE_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _thinned(values: np.ndarray) -> np.ndarray:
    """Return every n-th row and column of a large image, all of a small one."""
    height, width = values.shape[:2]
    step = -(-width // _shrunk_size(width, height)[0])
    return values[::step, ::step]


def _to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    # Of 16-bit color Pillow keeps the upper bytes only; `tile` says so until it has decoded.
    is_16_bit_color = any(re.search(r"\bRGB;16", str(tile.args)) for tile in image.tile)
    image.load()
    if is_16_bit_color:
        content = np.fromfile(path, np.uint8)
        values = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)  # BGR, upright
        if values is None:
            raise MarsclfError("it cannot be decoded: OpenCV gives no reason")
        return to_8_bit(_thinned(values)[..., ::-1])
    if image.mode.startswith("I;16"):
        image = image.convert("I")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode in ("1", "P"):
        image = image.convert("RGB")
    if _shrunk_size(*image.size) != image.size:
        image = image.resize(_shrunk_size(*image.size), Image.Resampling.BOX)
    with suppress(Exception):  # damaged EXIF data does not make the picture unreadable
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F"):
        return to_8_bit(np.asarray(image))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB"))


def _read_pds(path: Path) -> np.ndarray:
    try:
        import pdr
    except ImportError:
        raise MarsclfError(
            "PDS products need the reader pdr: pip install '.[pds]' in a copy of the repository"
        ) from None
    with _one_large_at_a_time:
        product = pdr.read(path)
        # The shortest name is the image itself; longer ones are masks and backplanes.
        names = [name for name in product.keys() if "IMAGE" in name.upper()]  # noqa: SIM118
        name = min(names, key=len, default=None)
        files = (name and product._target_path(name)) or []
        for file in map(Path, [files] if isinstance(files, str | Path) else files):
            # Of other suffixes pdr lets Pillow open any format, and it runs Ghostscript for one.
            if file.suffix.lower() not in (".img", ".dat"):
                raise MarsclfError(f"its label names {file.name!r} instead of an .IMG file")
            _check_file(file)
        values = product[name] if name else None
        if not isinstance(values, np.ndarray) or values.ndim not in (2, 3) or not values.size:
            raise MarsclfError("the product holds no image that pdr can read; is its label there?")
        if values.ndim == 3:  # PDS puts the bands first
            if len(values) not in (1, 3):
                raise MarsclfError(f"the image has {len(values)} bands instead of 1 or 3")
            values = values[0] if len(values) == 1 else np.moveaxis(values, 0, 2)
        return to_8_bit(np.ma.filled(_thinned(values), 0))
