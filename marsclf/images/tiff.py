"""TIFF files, of any number type, as 8-bit RGB."""

import logging
from contextlib import suppress
from typing import BinaryIO

import numpy as np
from tifffile import COMPRESSION, TiffFile, TiffPage

from marsclf.errors import MarsclfError
from marsclf.images import scaling

CHANNELS = {"MINISWHITE": 1, "MINISBLACK": 1, "PALETTE": 1, "RGB": 3}
UNASSOCIATED_ALPHA = 2  # colors that are not multiplied by their opacity yet
ORIENTATION, GDAL_NODATA = 274, 42113  # tags
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it logs every odd tag


def read_tiff(stream: BinaryIO) -> tuple[np.ndarray, int]:
    """Return the first picture of a TIFF file, uint8 (height, width, 3), and its EXIF orientation.

    Raises MarsclfError for a picture that is too large or of an unsupported kind, and almost any
    error for a damaged file.
    """
    with TiffFile(stream) as file:
        page = file.pages.first
        colors, numbers = (getattr(x, "name", x) for x in (page.photometric, page.sampleformat))
        if colors == "YCBCR" and page.compression == COMPRESSION.JPEG:
            colors = "RGB"  # tifffile converts it
        # One more channel may be opacity.
        if page.samplesperpixel - CHANNELS.get(colors, 99) not in (0, 1) or page.imagedepth > 1:
            kind = f"{page.samplesperpixel} channels, {page.imagedepth} layers and {colors} colors"
            raise MarsclfError(f"TIFF images with {kind} are not supported")
        if page.dtype is None or page.dtype.kind not in "buif":
            kind = f"{page.bitspersample}-bit {numbers}"
            raise MarsclfError(f"TIFF images of {kind} are not supported")
        with scaling.one_if_large(page.imagewidth, page.imagelength):
            size = max(page.size, page.tilewidth * page.tilelength) * page.dtype.itemsize
            if size > scaling.MAX_BYTES:
                raise MarsclfError(f"the image takes over {scaling.MAX_BYTES:,} bytes")
            orientation = page.tags.valueof(ORIENTATION, default=1)
            return scaling.shrunk(_to_rgb(page, colors)), orientation


def _to_rgb(page: TiffPage, colors: str) -> np.ndarray:
    values = page.asarray(maxworkers=1)
    if page.axes[0] == "S":  # separate planes
        values = np.moveaxis(values, 0, -1)
    values = values.reshape(*values.shape[:2], -1)
    values = values if values.dtype == np.uint8 else scaling.shrunk(values)
    values, extra = np.split(values, [CHANNELS[colors]], axis=2)
    if colors == "PALETTE":
        values = (page.colormap.T[values[..., 0]] // 256).astype(np.uint8)
    elif page.bitspersample < 8:
        values = values * np.uint8(255 // (2**page.bitspersample - 1))
    if page.extrasamples[:1] == (UNASSOCIATED_ALPHA,):
        values = np.ma.masked_array(values, np.broadcast_to(extra[..., :1] == 0, values.shape))
    with suppress(ValueError):  # not a number
        no_data = float(page.tags.valueof(GDAL_NODATA, default="").strip("\0"))
        values = np.ma.masked_equal(values, no_data, copy=False)
    rgb = scaling.to_8_bit(values)
    return 255 - rgb if colors == "MINISWHITE" else rgb
