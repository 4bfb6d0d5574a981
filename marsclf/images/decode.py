"""Any image file as 8-bit RGB.

A file that cannot be read raises MarsclfError with a reason short enough for a table cell. No file
can make this module exhaust the memory, hang, or run a program.
"""

import logging
import re
import stat
import threading
import warnings
from contextlib import nullcontext, suppress
from io import BytesIO
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from marsclf.errors import MarsclfError

# What the content of each format begins with.
FORMATS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8",
    "BMP": rb"BM",
    "JPEG2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ",
}
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".webp", ".gif", ".bmp"),
    *(".jp2", ".j2k", ".jpf", ".jpx"),
)
ORIENTATION = 274  # a tag of EXIF
BITS, COLORS, TILE_WIDTH, TILE_LENGTH, NUMBER_TYPE = 258, 262, 322, 323, 339  # tags of TIFF
UNSIGNED, BLACK_IS_ZERO = 1, 1
MAX_PIXELS = 100_000_000  # about 0.8 GB once decoded
MAX_BYTES = 1_000_000_000
# Larger images are shrunk after decoding; OpenCV cannot warp sides of more than 32,767 pixels.
LARGE_PIXELS, LARGE_SIDE = 20_000_000, 16_000
# Threads decode small images in parallel but large ones one at a time, which bounds the memory.
one_at_a_time = threading.Lock()
logging.getLogger("imagecodecs").setLevel(logging.CRITICAL + 1)  # it logs every odd tag


def read_rgb(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 (height, width, 3), RGB.

    Gray images get three equal channels, transparent pixels become black, and the EXIF rotation is
    applied. Numbers of 16 bits are divided by the largest number of the smallest of 8, 10, 12, 14
    and 16 bits that holds them. A file with several pictures gives the first. Images of more than
    20 megapixels are shrunk to that size.

    Raises MarsclfError if the file cannot be read, is not such an image, is damaged, or has more
    than 100 megapixels. The text is the reason alone; callers add the path.
    """
    path, kind = Path(path), None
    try:
        _check_file(path)
        # A stream, because Pillow maps named files into memory, which scrambles some of them.
        with path.open("rb") as stream:
            start = stream.read(16)
            kind = next((k for k, magic in FORMATS.items() if re.match(magic, start, re.S)), None)
            if kind is None:
                raise MarsclfError(f"it is not an image of a known format ({', '.join(FORMATS)})")
            stream.seek(0)
            return _read(stream.read(), kind)
    except MarsclfError:
        raise
    except Image.DecompressionBombError:
        raise MarsclfError(f"the image has over {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        text = f"it is a {kind} file of an unsupported kind, or its header is damaged"
        raise MarsclfError(text) from None
    except Exception as error:  # decoders raise almost anything on a damaged file
        # Only the operating system's errors have a `strerror`, Pillow's do not.
        reason = " ".join((str(error) or type(error).__name__).split())
        text = f"it is a {kind} file that cannot be decoded: {reason:.200}"
        raise MarsclfError(getattr(error, "strerror", None) or text) from None


def ignore_decoder_warnings() -> None:
    """Silence the decoders' warnings about odd files; `read_rgb` reports what cannot be read.

    Call it within warnings.catch_warnings, which applies to all threads.
    """
    warnings.filterwarnings("ignore", module="PIL")


def _check_file(path: Path) -> None:
    """Raise MarsclfError if `path` is not a file, is empty, or has more than a billion bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
        raise MarsclfError("it is not a file")
    if status.st_size == 0:
        raise MarsclfError("the file is empty")
    if status.st_size > MAX_BYTES:
        raise MarsclfError(f"the file has more than {MAX_BYTES:,} bytes")


def _read(content: bytes, kind: str) -> np.ndarray:
    """Return the first picture of a file, upright, as uint8 RGB."""
    with Image.open(BytesIO(content), formats=(kind,)) as image:
        size = _shrunk_size(*image.size)
        with nullcontext() if size == image.size else one_at_a_time:
            if kind == "TIFF":
                _check_tiff(image)
            # Pillow fills in missing pixels without a word, so these two have stricter decoders. Of
            # 16-bit color in PNG, it keeps the upper bytes only.
            values = imagecodecs.png_decode(content) if kind == "PNG" else None
            rgb = _decode_jpeg(content, *size) if kind == "JPEG" else None
            if rgb is None:
                image.load()
                if kind != "PNG" and image.mode in ("I;16", "I;16B"):
                    values = np.asarray(image)
                if values is None or values.dtype == np.uint8:
                    rgb = _without_transparency(image)
                else:
                    step = -(-image.width // size[0])  # to scale all pixels takes much memory
                    rgb = _scaled(values[::step, ::step])
            size = _shrunk_size(rgb.shape[1], rgb.shape[0])
            picture = Image.fromarray(rgb).resize(size, Image.Resampling.BOX)
            with suppress(Exception):  # no EXIF data; damaged data does not make it unreadable
                picture.getexif()[ORIENTATION] = image.getexif()[ORIENTATION]
                ImageOps.exif_transpose(picture, in_place=True)
            return np.asarray(picture)


def _without_transparency(image: Image.Image) -> np.ndarray:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB"))


def _decode_jpeg(content: bytes, width: int, height: int) -> np.ndarray | None:
    """Return a JPEG as RGB, at a fraction of its size if that is still as large as asked for.

    None if this decoder cannot (CMYK, for one). Raises MarsclfError if the pixel data is damaged.
    """
    try:  # strict: libjpeg's warnings are errors
        return simplejpeg.decode_jpeg(content, "RGB", min_width=width, min_height=height)
    except ValueError as error:
        if re.match("Corrupt|Premature", str(error)):
            raise MarsclfError(f"the image data is damaged: {error}") from None
        return None


def _check_tiff(image: TiffImageFile) -> None:
    """Raise MarsclfError for a TIFF image with huge tiles, or that Pillow would read wrongly."""
    tags = image.tag_v2
    _shrunk_size(tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1))
    bits, number_type = tags.get(BITS, (1,)), tags.get(NUMBER_TYPE, (UNSIGNED,))[0]
    is_deep_gray = bits == (16,) and tags.get(COLORS) == BLACK_IS_ZERO
    if number_type != UNSIGNED or not (bits[0] <= 8 or is_deep_gray):
        raise MarsclfError("it is a TIFF file of an unsupported kind; save it as PNG")


def _shrunk_size(width: int, height: int) -> tuple[int, int]:
    """Return the size to which an image is shrunk; MarsclfError for more than 100 megapixels."""
    if width * height > MAX_PIXELS:
        raise MarsclfError(f"the image has over {MAX_PIXELS:,} pixels: {width:,} x {height:,}")
    scale = min(1, (LARGE_PIXELS / (width * height)) ** 0.5, LARGE_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _scaled(values: np.ndarray) -> np.ndarray:
    """Return uint16 values, (height, width[, 1 to 4]), as uint8 RGB; transparent is black."""
    values = values.reshape(*values.shape[:2], -1)
    if values.shape[2] in (2, 4):
        values = values[..., :-1] * (values[..., -1:] > 0)
    highest = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if values.max() < 2**bits)
    scaled = (values.astype(np.float32) * np.float32(255 / highest)).round().astype(np.uint8)
    return np.broadcast_to(scaled, (*scaled.shape[:2], 3))
