"""Any image file becomes 8-bit RGB or a one-line reason, whatever it contains."""

import io
import os
import re
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageOps

from marsclf.errors import MarsclfError
from marsclf.images import decode
from marsclf.images.decode import read_rgb
from marsclf.images.views import fit_view

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
RGB = Image.fromarray(PIXELS)
GRAY = PIXELS[..., 0]
EXIF = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0%c\0\0\0\0\0\0"


@pytest.fixture(autouse=True)
def without_decoder_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        decode.ignore_decoder_warnings()
        yield


def stored(image: Image.Image | np.ndarray, path: Path, **options: object) -> np.ndarray:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    found = read_rgb(path)
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    return found


def refused(path: Path, reason: str = "") -> None:
    """Reading the file fails for this reason, a regular expression for its beginning."""
    with pytest.raises(MarsclfError) as caught:
        read_rgb(path)
    text = str(caught.value)
    assert text and "\n" not in text and re.match(reason, text), text


def deflated_tiff(width: int, height: int, more: dict | None = None) -> bytes:
    """Return a black gray image whose tags, of which `more` changes some, precede its pixels."""
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1} | (more or {})
    data = zlib.compress(bytes(24 * 36 * tags[258] // 8), 0)
    place, size = (324, 325) if 322 in tags else (273, 279)
    tags |= {place: 14 + 12 * (len(tags) + 2), size: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


KINDS = "RGB.png 1.png P.png L.jpg RGB.jpg 1.tif L.tif P.tif RGB.tif"


@pytest.mark.parametrize("name", KINDS.split())
def test_pixels_are_those_that_pillow_gives(tmp_path: Path, name: str) -> None:
    image, path = RGB.convert(name.partition(".")[0]), tmp_path / name
    for compression in (None, "tiff_lzw") if name.endswith(".tif") else (None,):
        found = stored(image, path, compression=compression)
        with Image.open(path) as again:
            np.testing.assert_array_equal(found, np.asarray(again.convert("RGB")))
    path.rename(tmp_path / "a.webp")  # the content counts, not the suffix
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.webp"), found)


@pytest.mark.parametrize("full", [65535, 4095, 1023, 255])
def test_16_bits_fill_their_scale(tmp_path: Path, full: int) -> None:
    path = tmp_path / "a"
    values = (PIXELS / 255 * full).round().astype(np.uint16)
    values[0, -1] = full
    for pixels in (values, values[..., 0].copy()):
        expected = np.broadcast_to(pixels.reshape(24, 36, -1) * (255 / full), PIXELS.shape)
        path.write_bytes(imagecodecs.png_encode(pixels))
        np.testing.assert_allclose(read_rgb(path), expected, atol=0.5001)
    for pixels in (values[..., 0], values[..., 0].astype(">u2")):
        for compression in (None, "tiff_lzw"):
            found = stored(pixels, tmp_path / "a.tif", compression=compression)
            np.testing.assert_allclose(found, expected, atol=0.5001)
    np.testing.assert_allclose(stored(values[..., 0], tmp_path / "a.jp2"), expected, atol=0.5001)


def test_exif_rotation(tmp_path: Path) -> None:
    # Pillow scrambles such a gray TIFF file if it opens the file itself.
    gray = GRAY.astype("u2") * 257
    for name, pixels in {"a.png": PIXELS, "b.png": gray, "a.tif": GRAY, "b.tif": gray}.items():
        for orientation in range(1, 9):
            found = stored(pixels, tmp_path / name, exif=EXIF % orientation)
            image = Image.fromarray(GRAY)
            image.getexif()[274] = orientation
            np.testing.assert_array_equal(found[..., 0], ImageOps.exif_transpose(image))
    # Damaged EXIF data does not matter.
    stored(RGB, tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x12\x01")


def test_tiff_files_of_unsupported_kinds(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for pixels in (PIXELS.astype(np.uint16), *map(GRAY.astype, ("i2", "i4", "f4", "f8"))):
        cv2.imwrite(str(path), pixels)
        refused(path, "it is a TIFF file of an unsupported kind")
    # Signed 8 bits, unsigned 32 bits, and 16 bits with white as zero.
    for tags in ({339: 2}, {258: 32}, {258: 16, 262: 0}):
        path.write_bytes(deflated_tiff(36, 24, tags))
        refused(path, "it is a TIFF file of an unsupported kind")


def test_other_formats(tmp_path: Path) -> None:
    for name, options in {"a.webp": {"lossless": True}, "a.bmp": {}, "a.jp2": {}}.items():
        np.testing.assert_array_equal(stored(RGB, tmp_path / name, **options), PIXELS)
    flat = Image.new("RGB", RGB.size, (200, 80, 40))
    found = stored(flat.convert("CMYK"), tmp_path / "a.jpg")
    np.testing.assert_allclose(found[16, 16], [200, 80, 40], atol=4)
    # Of several pictures the first counts.
    for name, image in {"a.gif": RGB.convert("L"), "a.tif": RGB}.items():
        frames = {"save_all": True, "append_images": [flat.convert(image.mode)]}
        found = stored(image, tmp_path / name, **frames)
        np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("pixels", [PIXELS, GRAY], ids=["color", "gray"])
def test_transparent_pixels_are_black(tmp_path: Path, pixels: np.ndarray) -> None:
    alpha = np.where(np.arange(36) < 18, 0, 255).astype(np.uint8) * np.ones((24, 1), np.uint8)
    opaque = np.where(alpha[..., None], pixels.reshape(24, 36, -1), 0)
    expected = np.broadcast_to(opaque, PIXELS.shape)
    values = np.dstack([pixels, alpha])
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(stored(values, tmp_path / name), expected)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values.astype(np.uint16) * 257))
    np.testing.assert_allclose(read_rgb(tmp_path / "a.png"), expected, atol=1)
    found = stored(RGB, tmp_path / "t.png", transparency=tuple(int(v) for v in PIXELS[5, 5]))
    assert found[5, 5].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (40_000, 10), (2, 40_000), (6000, 4000)])
@pytest.mark.parametrize("name", ["L.jpg", "L.png", "I;16.png", "I;16.tif"])
def test_tiny_long_and_large_images(tmp_path: Path, size: tuple[int, int], name: str) -> None:
    found = stored(Image.new(name.partition(".")[0], size, 255), tmp_path / name)
    assert max(found.shape) <= decode.LARGE_SIDE and (fit_view(found, 32) == 255).all()
    assert found[..., 0].size <= decode.LARGE_PIXELS * 1.001
    if size == (6000, 4000):
        assert found.shape[1] / found.shape[0] == pytest.approx(1.5, rel=1e-3)


# Pillow would hand it to Ghostscript, which is a program.
SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


def test_files_that_are_not_decoded(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "garbage").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "script").write_bytes(SCRIPT)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name, side in {"bomb": 10_001, "larger": 15_000}.items():  # Pillow refuses the latter
        Image.new("1", (side, side)).save(tmp_path / name, "PNG")
    (tmp_path / "wide.tif").write_bytes(deflated_tiff(11_000, 10_000))
    (tmp_path / "tile.tif").write_bytes(deflated_tiff(36, 24, {322: 64_000, 323: 64_000}))
    reasons = {"empty": "the file is empty", "garbage": "it is not an image of a known format"}
    reasons |= {"script": "it is not an image", "pipe": "it is not a file", ".": "it is not a file"}
    reasons |= {"endless": "it is not a file", "loop": ".*symbolic links"}
    large = ("bomb", "larger", "wide.tif", "tile.tif")
    reasons |= dict.fromkeys(large, "the image has over 100,000,000 pixels")
    reasons |= {"gone": "No such file", "x" * 300: ".*name too long"}
    for name, reason in reasons.items():
        refused(tmp_path / name, reason)


def one_of_each_kind() -> dict[str, bytes]:
    contents = {"16.png": imagecodecs.png_encode(PIXELS.astype(np.uint16) * 257)}
    for name in ("RGB.png", "RGB.tiff", "L.tiff", "L.jpeg", "CMYK.jpeg", "RGB.jpeg"):
        mode, _, kind = name.partition(".")
        stream = io.BytesIO()
        RGB.convert(mode).save(stream, kind, progressive=True)
        contents[name] = stream.getvalue()
    return contents | {"deflated.tiff": deflated_tiff(36, 24)}


def test_an_odd_tag_is_no_reason_to_say_anything(tmp_path, capfd, caplog) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "odd.png", icc_profile=b"no profile")
    assert read_rgb(tmp_path / "odd.png").max() == 255
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_no_missing_pixel_is_filled_in(tmp_path: Path) -> None:
    path, contents = tmp_path / "a", one_of_each_kind()
    for content in contents.values():
        path.write_bytes(content)
        assert read_rgb(path).shape == (24, 36, 3)
        for length in (1, 10, len(content) // 2, len(content) - 30):
            path.write_bytes(content[:length])
            refused(path)
    content = bytearray(contents["L.jpeg"])
    content[len(content) // 2 : len(content) // 2 + 2] = b"\xff\xd9"  # an early end
    path.write_bytes(content)
    refused(path, "the image data is damaged: (Corrupt|Premature)")
    content = bytearray(contents["RGB.png"])
    content[23] += 9  # the height
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    refused(path, "it is a PNG file that cannot be decoded: Not enough image")
    path.write_bytes(deflated_tiff(36, 33))
    refused(path, "it is a TIFF file that cannot be decoded")


def test_a_thousand_damaged_files(tmp_path: Path) -> None:
    rng, contents, readable = np.random.default_rng(0), list(one_of_each_kind().values()), 0
    for number in range(1_000):
        content = bytearray(contents[number % len(contents)])
        # The headers at either end break in more ways than the pixels between them.
        for place in rng.integers(-200, 200, rng.integers(1, 5)):
            content[place] = rng.integers(256)
        (tmp_path / "a").write_bytes(content)
        try:
            found = read_rgb(tmp_path / "a")
        except MarsclfError as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert fit_view(found, 32).shape == (32, 32, 3) and found.dtype == np.uint8
            readable += 1
    assert 100 < readable < 900


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch, name) -> None:
    def watched(image: Image.Image) -> object:
        assert alone.acquire(blocking=False)
        time.sleep(0.02)
        alone.release()
        return load(image)

    RGB.save(tmp_path / name)
    alone, load = threading.Lock(), Image.Image.load
    monkeypatch.setattr(decode, "LARGE_PIXELS", 100)
    monkeypatch.setattr(Image.Image, "load", watched)
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(read_rgb, [tmp_path / name] * 8))) == 8
