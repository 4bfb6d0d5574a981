"""Any image file that an archive may hold, as 8-bit RGB: JPEG, PNG, TIFF, PDS3 and PDS4 products.

What cannot be read raises MarsclfError with a reason that fits one cell of a table; no file makes
this module run out of bounds, wait, or execute something.
"""

import stat
import sys
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from marsclf.errors import MarsclfError

FORMATS = ("JPEG", "PNG", "TIFF")
PDS_SUFFIXES = (".img", ".lbl", ".xml")
PDS_DATA_SUFFIXES = (".img", ".dat")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff", ".img")
MAX_PIXELS = 100_000_000  # decoded, about 0.8 GB
MAX_BYTES = 1_000_000_000
# Larger images are shrunk after decoding; OpenCV's warps end at 32,767 pixels a side.
LARGE_PIXELS, LARGE_SIDE = 20_000_000, 16_000
FULL_SCALES = (2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, 2**16 - 1)
STRETCH = (0.5, 99.5)  # percentiles that become black and white where no scale is known
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How Pillow names the orders of bytes of 16-bit colours (N: the machine's), and the other order.
SWAPPED = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA")
    for order, other in {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}.items()
}
# Bounds the memory: threads decode small images side by side, but large ones in turn.
_one_large_at_a_time = threading.Lock()


def read_rgb(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 (height, width, 3), RGB.

    Greyscale becomes three equal channels, what is transparent becomes black, an EXIF rotation is
    carried out. Integers of more than 8 bits are taken to fill the smallest of 8, 10, 12, 14 and 16
    bits that holds them (but CMYK, and grey with transparency, all 16); other numbers are stretched
    between two percentiles. Of a file with several pictures the first is read. Images of over 20
    megapixels come shrunk to that.

    Raises:
        MarsclfError: the file cannot be read, holds no such image, is cut off, or has over 100
            megapixels.
    """
    path = Path(path)
    try:
        _check_file(path)
        if path.suffix.lower() in PDS_SUFFIXES:
            return _read_pds(path)
        with Image.open(path, formats=FORMATS) as image:
            return _decode(image)
    except UnidentifiedImageError:
        raise MarsclfError("it is not a JPEG, PNG or TIFF image") from None
    except Image.DecompressionBombError:
        raise MarsclfError(f"the image has over {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise MarsclfError("there is not enough memory to decode it") from None
    except OSError as error:
        # With a number it is the system's, without one Pillow's word for a damaged file.
        reason = error.strerror or f"the image is damaged: {_one_line(error)}"
        raise MarsclfError(reason) from None
    except MarsclfError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        raise MarsclfError(f"the image is damaged: {_one_line(error)}") from None


def ignore_decoders_warnings() -> None:
    """Silence what decoders say of odd files; the rows tell of those that cannot be read.

    To be called within warnings.catch_warnings, which counts for all threads.
    """
    warnings.filterwarnings("ignore", module=r"(PIL|pdr)\b")


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
        raise MarsclfError("it is not a file")
    if status.st_size == 0:
        raise MarsclfError("the file is empty")
    if status.st_size > MAX_BYTES:
        raise MarsclfError(f"the file has more than {MAX_BYTES:,} bytes")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MarsclfError(
            f"the image has {width:,} x {height:,} pixels, over {MAX_PIXELS:,}; cut it up"
        )


def _decode(image: Image.Image) -> np.ndarray:
    _check_size(*image.size)
    if image.width * image.height > LARGE_PIXELS or max(image.size) > LARGE_SIDE:
        with _one_large_at_a_time:
            # Lets a JPEG be decoded at half, a quarter or an eighth of its size.
            image.draft(None, _shrunk_size(*image.size))
            return _to_rgb(image)
    return _to_rgb(image)


def _shrunk_size(width: int, height: int) -> tuple[int, int]:
    scale = min(1, (LARGE_PIXELS / (width * height)) ** 0.5, LARGE_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _to_rgb(image: Image.Image) -> np.ndarray:
    low = _lower_bytes(image)
    image.load()
    orientation = _orientation(image)
    if low is not None:
        turn = TURNS.get(orientation)
        both = [part if turn is None else part.transpose(turn) for part in (image, low)]
        return to_8_bit(_sixteen_bits(*both))
    if image.mode.startswith("I;16"):
        image = image.convert("I")
    elif image.mode == "P" or (image.mode in ("1", "L", "RGB") and "transparency" in image.info):
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    if _shrunk_size(*image.size) != image.size:
        image = image.resize(_shrunk_size(*image.size), Image.Resampling.BOX)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    if image.mode in ("I", "F"):
        return to_8_bit(np.asarray(image))
    if image.mode in ("LA", "PA", "La", "RGBa", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _lower_bytes(image: Image.Image) -> Image.Image | None:
    """Return the lower bytes of RGB of 16 bits, of which Pillow gives the upper ones alone.

    They are what it gives when it is told the other byte order.
    """
    if image.mode not in ("RGB", "RGBA") or not {*map(_raw_mode, image.tile)} <= SWAPPED.keys():
        return None
    with Image.open(image.filename, formats=FORMATS) as low:
        low.tile = [_with_raw_mode(tile, SWAPPED[_raw_mode(tile)]) for tile in low.tile]
        low.load()
        return low


def _raw_mode(tile: NamedTuple) -> str:
    return tile.args if isinstance(tile.args, str) else tile.args[0]


def _with_raw_mode(tile: NamedTuple, mode: str) -> NamedTuple:
    return tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:]))


def _sixteen_bits(high: Image.Image, low: Image.Image) -> np.ndarray:
    """Return uint16 (height, width, 3) of the upper and lower bytes, black where transparent."""
    step = -(-high.width // _shrunk_size(*high.size)[0])
    upper, lower = (np.asarray(part)[::step, ::step].astype(np.uint16) for part in (high, low))
    values = upper[..., :3] << 8 | lower[..., :3]
    return values if high.mode == "RGB" else (values * (upper[..., 3:] / 255)).astype(np.uint16)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # damaged EXIF data does not make the picture unreadable
        return None


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale numbers of any type, (height, width) or (height, width, 3), to uint8 of three channels.

    `read_rgb` says how. Numbers that are not finite become black.
    """
    if values.ndim == 2:
        values = np.repeat(values[..., np.newaxis], 3, axis=2)
    if values.dtype == np.uint8:
        return values
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = 0, values.max()
    if np.issubdtype(values.dtype, np.integer) and high <= FULL_SCALES[-1]:
        high = next(scale for scale in FULL_SCALES if high <= scale)
    else:
        low, high = np.percentile(values, STRETCH)
    spread = float(high) - float(low)
    factor = 255 / spread if spread > 1e-30 else 0.0  # one value everywhere is black
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(factor)
    return np.clip(scaled, 0, 255).round().astype(np.uint8)


def _check_pds_data(found: object) -> None:
    """Check the file with the pixels that a label names, before pdr reads all of it.

    pdr would let Pillow open pictures of any kind, one of which is a program to Ghostscript.
    """
    for data in found if isinstance(found, list | tuple | set) else [found]:
        if data is not None:  # where there is none, pdr says so
            if Path(data).suffix.lower() not in PDS_DATA_SUFFIXES:
                raise MarsclfError(f"its label names {Path(data).name!r} instead of an .IMG file")
            _check_file(Path(data))


def _read_pds(path: Path) -> np.ndarray:
    try:
        import pdr
    except ImportError:
        raise MarsclfError(
            "PDS products need the reader pdr: pip install '.[pds]' in a copy of the repository"
        ) from None
    with _one_large_at_a_time:
        try:
            product = pdr.read(path)
            # The pictures of one product: its own first, then perhaps masks and backplanes.
            names = sorted((k for k in product.keys() if "IMAGE" in k.upper()), key=len)  # noqa: SIM118
            if names:
                _check_pds_data(product._target_path(names[0]))
            values = product[names[0]] if names else None
        except MarsclfError:
            raise
        except Exception as error:
            raise MarsclfError(f"pdr cannot read the product: {_one_line(error)}") from None
        if not isinstance(values, np.ndarray) or values.ndim not in (2, 3) or not values.size:
            raise MarsclfError("the product holds no image that pdr can read; is its label there?")
        if values.ndim == 3:  # PDS keeps the bands first
            values = np.moveaxis(values, 0, 2)
            if values.shape[2] not in (1, 3):
                raise MarsclfError(f"the image has {values.shape[2]} bands instead of 1 or 3")
        values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
        height, width = values.shape[:2]
        _check_size(width, height)
        step = -(-width // _shrunk_size(width, height)[0])  # before numbers become larger ones
        return to_8_bit(np.ma.filled(values[::step, ::step], 0))
