"""Any image file of an archive as 8-bit RGB: common image formats, and PDS3 and PDS4 products.

A file that cannot be read raises MarsclfError with a reason short enough for a table cell. No file
can make this module exhaust the memory, hang, or run a program.
"""

import re
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from marsclf.errors import MarsclfError
from marsclf.images import scaling
from marsclf.images.pds import read_pds
from marsclf.images.tiff import ORIENTATION, read_tiff

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
PDS_SUFFIXES = (".img", ".lbl", ".xml")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".webp", ".gif", ".bmp"),
    *(".jp2", ".j2k", ".jpf", ".jpx", ".img"),
)


def read_rgb(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 (height, width, 3), RGB.

    Gray images get three equal channels, transparent pixels become black, and the EXIF rotation is
    applied. Numbers of more than 8 bits are scaled as `to_8_bit` describes. A file with several
    pictures gives the first. Images of more than 20 megapixels are shrunk to that size.

    Raises:
        MarsclfError: the file cannot be read, is not such an image, is damaged, or has more than
            100 megapixels. The text is the reason alone; callers add the path.
    """
    path, kind = Path(path), "PDS"
    try:
        scaling.check_file(path)
        if path.suffix.lower() in PDS_SUFFIXES:
            with scaling.one_at_a_time:
                return read_pds(path)
        # A stream, because Pillow maps named files into memory, which scrambles some of them.
        with path.open("rb") as stream:
            start = stream.read(16)
            kind = next((k for k, magic in FORMATS.items() if re.match(magic, start, re.S)), None)
            if kind is None:
                raise MarsclfError(f"it is not an image of a known format ({', '.join(FORMATS)})")
            stream.seek(0)
            return _upright(*(read_tiff(stream) if kind == "TIFF" else _read(stream, kind)))
    except MarsclfError:
        raise
    except Image.DecompressionBombError:
        raise MarsclfError(f"the image has over {scaling.MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise MarsclfError(f"it is a {kind} file with a damaged or unsupported header") from None
    except Exception as error:  # decoders raise almost anything on a damaged file
        # Only the operating system's errors have a `strerror`, Pillow's do not.
        reason = " ".join((str(error) or type(error).__name__).split())
        text = f"it is a {kind} file that cannot be decoded: {reason:.200}"
        raise MarsclfError(getattr(error, "strerror", None) or text) from None


def ignore_decoder_warnings() -> None:
    """Silence the decoders' warnings about odd files; `read_rgb` reports what cannot be read.

    Call it within warnings.catch_warnings, which applies to all threads.
    """
    warnings.filterwarnings("ignore", module=r"(PIL|pdr)\b")


def _read(stream: BinaryIO, kind: str) -> tuple[np.ndarray, int]:
    """Return the picture of a file that is not a TIFF, and its EXIF orientation."""
    content = stream.read()
    with Image.open(BytesIO(content), formats=(kind,)) as image, scaling.one_if_large(*image.size):
        # Pillow fills in missing pixels without a word, so these two have stricter decoders. Of
        # 16-bit color in PNG, it keeps the upper bytes only.
        values = imagecodecs.png_decode(content) if kind == "PNG" else None
        rgb = _decode_jpeg(content, *scaling.shrunk_size(*image.size)) if kind == "JPEG" else None
        if rgb is None:
            image.load()
        orientation = 1
        with suppress(Exception):  # damaged EXIF data does not make the picture unreadable
            orientation = image.getexif().get(ORIENTATION, 1)
        if rgb is not None:
            return scaling.shrunk(rgb), orientation
        if values is None and image.mode == "I;16":  # JPEG 2000
            values = np.asarray(image)
        if values is not None and values.dtype == np.uint16:
            values = scaling.shrunk(values)
            if values.ndim == 3 and values.shape[2] in (2, 4):
                values, alpha = values[..., :-1], values[..., -1:]
                values = np.ma.masked_array(values, np.broadcast_to(alpha == 0, values.shape))
            return scaling.to_8_bit(values), orientation
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        return scaling.shrunk(np.asarray(image.convert("RGB"))), orientation


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


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        rgb = rgb.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)
