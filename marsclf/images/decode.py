"""Any image file of an archive as 8-bit RGB: common image formats, and PDS3 and PDS4 products.

A file that cannot be read raises MarsclfError with a reason short enough for a table cell. No file
can make this module exhaust the memory, hang, or run a program.
"""

import logging
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
from tifffile import COMPRESSION, TiffFile, TiffPage

from marsclf.errors import MarsclfError
from marsclf.images import scaling
from marsclf.images.pds import read_pds

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
TIFF_CHANNELS = {"MINISWHITE": 1, "MINISBLACK": 1, "PALETTE": 1, "RGB": 3}
UNASSOCIATED_ALPHA = 2  # colors that are not multiplied by their opacity yet
ORIENTATION, GDAL_NODATA = 274, 42113  # tags
for name in ("tifffile", "imagecodecs"):  # they log every odd tag
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def read_rgb(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 (height, width, 3), RGB.

    Gray images get three equal channels, transparent pixels become black, and the EXIF rotation is
    applied. Numbers of more than 8 bits are scaled as `to_8_bit` describes. A file with several
    pictures gives the first. Images of more than 20 megapixels are shrunk to that size.

    Raises MarsclfError if the file cannot be read, is not such an image, is damaged, or has more
    than 100 megapixels. The text is the reason alone; callers add the path.
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
            return _upright(*(_read_tiff(stream) if kind == "TIFF" else _read(stream, kind)))
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
        if image.mode == "I;16" and values is None:  # JPEG 2000
            values = np.asarray(image)
        if values is not None and values.dtype == np.uint16:
            values = scaling.shrunk(values)
            if values.ndim == 3 and values.shape[2] in (2, 4):
                values = _without_transparent(values[..., :-1], values[..., -1:])
            return scaling.to_8_bit(values), orientation
        if rgb is None:
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            rgb = np.asarray(image.convert("RGB"))
        return scaling.shrunk(rgb), orientation


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


def _read_tiff(stream: BinaryIO) -> tuple[np.ndarray, int]:
    """Return the first picture of a TIFF file, of any number type, and its EXIF orientation."""
    with TiffFile(stream) as file:
        page = file.pages.first
        colors, numbers = (getattr(x, "name", x) for x in (page.photometric, page.sampleformat))
        if colors == "YCBCR" and page.compression == COMPRESSION.JPEG:
            colors = "RGB"  # tifffile converts it
        extra = page.samplesperpixel - TIFF_CHANNELS.get(colors, 99)
        if extra not in (0, 1) or page.imagedepth > 1:  # one more channel may be opacity
            kind = f"{page.samplesperpixel} channels, {page.imagedepth} layers and {colors} colors"
            raise MarsclfError(f"TIFF images with {kind} are not supported")
        if page.dtype is None or page.dtype.kind not in "buif":
            kind = f"{page.bitspersample}-bit {numbers}"
            raise MarsclfError(f"TIFF images of {kind} are not supported")
        with scaling.one_if_large(page.imagewidth, page.imagelength):
            size = max(page.size, page.tilewidth * page.tilelength) * page.dtype.itemsize
            if size > scaling.MAX_BYTES:
                raise MarsclfError(f"the image takes over {scaling.MAX_BYTES:,} bytes")
            rgb = scaling.shrunk(_decode_tiff(page, colors))
        return rgb, page.tags.valueof(ORIENTATION, default=1)


def _decode_tiff(page: TiffPage, colors: str) -> np.ndarray:
    values = page.asarray(maxworkers=1)
    if page.axes[0] == "S":  # separate planes
        values = np.moveaxis(values, 0, -1)
    values = values.reshape(*values.shape[:2], -1)
    values = values if values.dtype == np.uint8 else scaling.shrunk(values)
    values, extra = np.split(values, [TIFF_CHANNELS[colors]], axis=2)
    if colors == "PALETTE":
        values = (page.colormap.T[values[..., 0]] // 256).astype(np.uint8)
    elif page.bitspersample < 8:
        values = values * np.uint8(255 // (2**page.bitspersample - 1))
    if page.extrasamples[:1] == (UNASSOCIATED_ALPHA,):
        values = _without_transparent(values, extra)
    with suppress(ValueError):  # not a number
        no_data = float(page.tags.valueof(GDAL_NODATA, default="").strip("\0"))
        values = np.ma.masked_equal(values, no_data, copy=False)
    rgb = scaling.to_8_bit(values)
    return 255 - rgb if colors == "MINISWHITE" else rgb


def _without_transparent(values: np.ndarray, alpha: np.ndarray) -> np.ma.MaskedArray:
    return np.ma.masked_array(values, np.broadcast_to(alpha == 0, values.shape))


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        rgb = rgb.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)
