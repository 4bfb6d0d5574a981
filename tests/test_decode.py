"""Any image file becomes 8-bit RGB or a one-line reason, whatever it contains."""

import io
import os
import re
import struct
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from marsclf.errors import MarsclfError
from marsclf.images import decode, scaling
from marsclf.images.decode import read_rgb
from marsclf.images.scaling import to_8_bit
from marsclf.images.views import fit_view

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
RGB = Image.fromarray(PIXELS)
GRAY = PIXELS[..., 0]
EXIF = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0%c\0\0\0\0\0\0"
FORMATS_OF_16_BITS = ("png", "none.tif", "lzw.tif", "deflate.tif")
COLOR_AND_GRAY = pytest.mark.parametrize("pixels", [PIXELS, GRAY], ids=["color", "gray"])


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


def encoded(values: np.ndarray, name: str) -> bytes:
    """Return the content of a PNG or TIFF file with these pixels, gray or RGB."""
    if name == "png":
        return imagecodecs.png_encode(values)
    options = {"photometric": "rgb" if values.ndim == 3 else "minisblack"}
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, compression=name.removesuffix(".tif"), **options)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["RGB.png", "RGB.tif", "RGB.jpg", "L.jpg", "P.png", "1.tif"])
def test_pixels_are_those_that_pillow_gives(tmp_path: Path, name: str) -> None:
    found = stored(RGB.convert(name.partition(".")[0]), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))
    # The content counts, not the suffix.
    (tmp_path / name).rename(tmp_path / "a.webp")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.webp"), found)


@pytest.mark.parametrize("full", [65535, 4095, 1023])
@COLOR_AND_GRAY
@pytest.mark.parametrize("name", FORMATS_OF_16_BITS)
def test_16_bits_fill_their_scale(tmp_path: Path, name: str, pixels: np.ndarray, full: int) -> None:
    values = (pixels / 255 * full).round().astype(np.uint16)
    values[0, -1] = full
    expected = np.broadcast_to(values.reshape(24, 36, -1) * (255 / full), PIXELS.shape)
    (tmp_path / "a").write_bytes(encoded(values, name))
    np.testing.assert_allclose(read_rgb(tmp_path / "a"), expected, atol=0.5001)


def test_exif_rotation(tmp_path: Path) -> None:
    # Pillow scrambles such a gray TIFF file if it opens the file itself.
    for name, pixels in {"a.png": PIXELS, "b.png": GRAY.astype("u2") * 257, "a.tif": GRAY}.items():
        for orientation in range(1, 9):
            found = stored(pixels, tmp_path / name, exif=EXIF % orientation)
            image = Image.fromarray(GRAY)
            image.getexif()[274] = orientation
            np.testing.assert_array_equal(found[..., 0], ImageOps.exif_transpose(image))
    # Damaged EXIF data does not matter.
    stored(RGB, tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x12\x01")


def test_floats_are_stretched_and_negative_integers_are_black(tmp_path: Path) -> None:
    values = np.linspace(-3, 1e4, GRAY.size, dtype=np.float32).reshape(GRAY.shape)
    found = stored(values, tmp_path / "a.tif")
    assert (found.min(), found.max()) == (0, 255) and (np.diff(found[..., 0].ravel()) >= 0).all()
    values[3, 3], values[4, 4] = np.nan, np.inf
    assert stored(values, tmp_path / "n.tif").max() == 255
    assert not stored(np.zeros((4, 4), np.float32), tmp_path / "0.tif").any()
    assert to_8_bit(np.array([[-5, 0, 4095]], np.int16))[0, :, 0].tolist() == [0, 0, 255]


LZW = {"byteorder": ">", "planarconfig": "separate", "compression": "lzw"}
TIFF_KINDS = [("uint16", {"planarconfig": "separate"}), ("int16", LZW), ("uint32", {})]
TIFF_KINDS += [("float32", {"byteorder": ">", "compression": "deflate"})]


@pytest.mark.parametrize(("dtype", "options"), TIFF_KINDS)
def test_legal_tiff_files(tmp_path: Path, dtype: str, options: dict) -> None:
    full = {"int16": 4095, "uint16": 65535, "uint32": 2**32 - 1}.get(dtype, 1)
    values = (PIXELS / 255 * full).astype(dtype)
    planes = np.moveaxis(values, 2, 0) if "planarconfig" in options else values
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", **options)
    # Of the largest type, percentiles become black and white.
    np.testing.assert_allclose(read_rgb(tmp_path / "a.tif"), PIXELS, atol=3)


def test_a_tiff_file_of_another_kind_is_named(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GRAY.astype(np.complex64))
    refused(tmp_path / "a.tif", "TIFF images of 64-bit COMPLEXIEEEFP are not supported")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 9, 5), np.uint8), planarconfig="contig")
    refused(tmp_path / "a.tif", "TIFF images with 5 channels")


FILLS = [(np.float32, -3.4028235e38), (np.float32, 1e32), (np.float32, np.nan)]
FILLS += [(np.int32, "tag"), (np.int32, "mask")]


@pytest.mark.parametrize(("dtype", "fill"), FILLS)
def test_pixels_without_data_are_black(tmp_path: Path, dtype: type, fill: float | str) -> None:
    values = GRAY.astype(dtype) * 300
    expected = to_8_bit(values[2:])
    constant = 77777 if isinstance(fill, str) else fill
    values[:2] = constant
    tags = [(42113, 2, 0, "77777", True)] if fill == "tag" else []
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=tags)
    masked = np.ma.masked_equal(values, constant)
    found = to_8_bit(masked) if fill == "mask" else read_rgb(tmp_path / "a.tif")
    np.testing.assert_array_equal(found[2:], expected)
    assert not found[:2].any()


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


@COLOR_AND_GRAY
def test_transparent_pixels_are_black(tmp_path: Path, pixels: np.ndarray) -> None:
    alpha = np.where(np.arange(36) < 18, 0, 255).astype(np.uint8) * np.ones((24, 1), np.uint8)
    expected = np.where(alpha[..., None], pixels.reshape(24, 36, -1), 0)
    photometric = "rgb" if pixels.ndim == 3 else "minisblack"
    extra = {"photometric": photometric, "extrasamples": ["unassalpha"]}
    for values in (np.dstack([pixels, alpha]), np.dstack([pixels, alpha]).astype(np.uint16) * 257):
        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values))
        tifffile.imwrite(tmp_path / "a.tif", values, planarconfig="contig", **extra)
        for name in ("a.png", "a.tif"):
            found = read_rgb(tmp_path / name)
            np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1)
    found = stored(RGB, tmp_path / "t.png", transparency=tuple(int(v) for v in PIXELS[5, 5]))
    assert found[5, 5].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (20_000, 2), (60_000, 10), (2, 20_000)])
def test_tiny_and_long_images(tmp_path: Path, size: tuple[int, int]) -> None:
    found = stored(Image.new("L", size, 77), tmp_path / "a.png")
    assert max(found.shape) <= scaling.LARGE_SIDE and (fit_view(found, 32) == 77).all()


@pytest.mark.parametrize("name", ["L.jpg", "1.png", "I;16.png", "I;16.tif"])
def test_large_images_are_shrunk(tmp_path: Path, name: str) -> None:
    image = Image.new(name.partition(".")[0], (6000, 4000), 1)
    height, width, _ = stored(image, tmp_path / name).shape
    assert height * width <= scaling.LARGE_PIXELS * 1.001
    assert width / height == pytest.approx(1.5, rel=1e-3)


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
    reasons = {"empty": "the file is empty", "garbage": "it is not an image of a known format"}
    reasons |= {"script": "it is not an image", "pipe": "it is not a file", ".": "it is not a file"}
    reasons |= {"endless": "it is not a file", "loop": ".*symbolic links"}
    reasons |= dict.fromkeys(("bomb", "larger"), "the image has over 100,000,000 pixels")
    reasons |= {"gone": "No such file", "x" * 300: ".*name too long"}
    for name, reason in reasons.items():
        refused(tmp_path / name, reason)


def one_of_each_kind() -> dict[str, bytes]:
    values = PIXELS.astype(np.uint16) * 257
    contents = {name: encoded(values, name) for name in FORMATS_OF_16_BITS}
    for name in ("RGB.png", "RGB.tif", "L.jpeg", "CMYK.jpeg", "RGB.jpeg"):
        mode, _, kind = name.partition(".")
        stream = io.BytesIO()
        RGB.convert(mode).save(stream, kind.replace("tif", "tiff"), progressive=True)
        contents[name] = stream.getvalue()
    return contents


def test_an_odd_tag_is_no_reason_to_say_anything(tmp_path, capfd, caplog) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "odd.png", icc_profile=b"no profile")
    assert read_rgb(tmp_path / "odd.png").max() == 255
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize("name", one_of_each_kind())
def test_a_file_that_is_cut_off(tmp_path, name, capfd) -> None:
    content = one_of_each_kind()[name]
    kind = "it is a TIFF file that cannot be decoded" if name.endswith(".tif") else ""
    for length in (1, 10, len(content) // 2, len(content) - 30):
        (tmp_path / "cut").write_bytes(content[:length])
        refused(tmp_path / "cut", kind if length > 10 else "")
    assert capfd.readouterr() == ("", "")


def test_damaged_pixels_and_too_few_rows(tmp_path: Path) -> None:
    content = bytearray(one_of_each_kind()["L.jpeg"])
    content[len(content) // 2 : len(content) // 2 + 2] = b"\xff\xd9"  # an early end
    (tmp_path / "a.jpg").write_bytes(content)
    refused(tmp_path / "a.jpg", "the image data is damaged: (Corrupt|Premature)")
    content = bytearray(one_of_each_kind()["RGB.png"])
    content[23] += 9  # the height
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", "it is a PNG file that cannot be decoded: Not enough image")


def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    rng, contents, readable = np.random.default_rng(0), list(one_of_each_kind().values()), 0
    for number in range(3_000):
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
    assert 300 < readable < 2_700


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch) -> None:
    def watched(image: Image.Image) -> object:
        assert alone.acquire(blocking=False)
        time.sleep(0.02)
        alone.release()
        return load(image)

    RGB.save(tmp_path / "a.png")
    alone, load = threading.Lock(), Image.Image.load
    monkeypatch.setattr(scaling, "LARGE_PIXELS", 100)
    monkeypatch.setattr(Image.Image, "load", watched)
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(read_rgb, [tmp_path / "a.png"] * 8))) == 8


def write_pds3(folder: Path, values: np.ndarray, more: str = "") -> Path:
    """Write a PDS3 image with a detached label; `values` has the bands first."""
    path = folder / "0830MR0036510000500684E01_DRCL.IMG"
    bands, lines, samples = values.shape
    kind = "UNSIGNED_INTEGER" if values.dtype == np.uint8 else "MSB_INTEGER"
    path.write_bytes(values.astype(values.dtype.newbyteorder(">")).tobytes())
    label = f"""PDS_VERSION_ID = PDS3
RECORD_TYPE = FIXED_LENGTH
RECORD_BYTES = {samples * values.itemsize}
^IMAGE = "{path.name}"
OBJECT = IMAGE
  LINES = {lines}
  LINE_SAMPLES = {samples}
  SAMPLE_TYPE = {kind}
  SAMPLE_BITS = {8 * values.itemsize}
  BANDS = {bands}
  BAND_STORAGE_TYPE = BAND_SEQUENTIAL
  {more}
END_OBJECT = IMAGE
END
"""
    path.with_suffix(".LBL").write_text(label.replace("\n", "\r\n"))
    return path


def write_pds4(folder: Path, values: np.ndarray, more: str = "") -> Path:
    axis = """<Axis_Array><axis_name>{}</axis_name><elements>{}</elements>
<sequence_number>{}</sequence_number></Axis_Array>"""
    label = f"""<?xml version="1.0" encoding="UTF-8"?>
<Product_Observational xmlns="http://pds.nasa.gov/pds4/pds/v1"><File_Area_Observational>
<File><file_name>a.img</file_name></File>
<Array_2D_Image><local_identifier>IMAGE</local_identifier><offset unit="byte">0</offset>
<axes>2</axes><axis_index_order>Last Index Fastest</axis_index_order>
<Element_Array><data_type>UnsignedMSB2</data_type></Element_Array>
{axis.format("Line", 24, 1)}{axis.format("Sample", 36, 2)}{more}
</Array_2D_Image></File_Area_Observational></Product_Observational>
"""
    (folder / "a.xml").write_text(label)
    (folder / "a.img").write_bytes(values.astype(">u2").tobytes())
    return folder / "a.img"


@pytest.mark.filterwarnings("ignore")  # pdr's own, on import and on labels without a mission
class TestPds:
    @pytest.fixture(autouse=True)
    def pdr(self) -> None:
        pytest.importorskip("pdr")

    def test_pds3(self, tmp_path: Path) -> None:
        path = write_pds3(tmp_path, np.moveaxis(PIXELS, 2, 0))
        for named in (path, path.with_suffix(".LBL")):
            np.testing.assert_array_equal(read_rgb(named), PIXELS)
        values = GRAY.astype(np.int16) * 16
        values[0, 0] = 4095
        write_pds3(tmp_path, values[np.newaxis])
        path.with_suffix(".LBL").rename(f"{path}.lbl")
        np.testing.assert_allclose(read_rgb(path)[..., 1], values * (255 / 4095), atol=0.5001)

    def test_pds4_and_no_data(self, tmp_path: Path) -> None:
        path = write_pds4(tmp_path, GRAY.astype(np.uint16) * 257)
        np.testing.assert_array_equal(read_rgb(path)[..., 0], GRAY)
        values = GRAY.astype(np.int16) * 16
        expected = to_8_bit(values[2:])
        values[:2] = 32000
        constant = "<invalid_constant>32000</invalid_constant>"
        more = f"<Special_Constants>{constant}</Special_Constants>"
        path = write_pds3(tmp_path, values[np.newaxis], "MISSING_CONSTANT = 32000")
        for product in (path, write_pds4(tmp_path, values, more)):
            found = read_rgb(product)
            np.testing.assert_array_equal(found[2:], expected)
            assert not found[:2].any()

    def test_each_fault_has_its_sentence(self, tmp_path, monkeypatch) -> None:
        path = write_pds3(tmp_path, np.zeros((2, 24, 36), np.uint8))
        label, gone, renamed = path.with_suffix(".LBL"), tmp_path / "b.LBL", tmp_path / "b.IMG"
        refused(path, ".*2 bands instead of 1 or 3")
        path.write_bytes(path.read_bytes()[:400])
        refused(path, "its data are cut short: the label describes a larger image$")
        path.rename(renamed)
        missing = f"its label names '{path.name}', which is not in the same folder$"
        refused(label, missing)
        label.rename(gone)
        refused(renamed, missing)
        gone.unlink()
        refused(renamed, "it has no PDS label, neither in itself nor in b.LBL or b.xml$")
        path = write_pds4(tmp_path, np.zeros(4))
        refused(path, "its data are cut short")
        path.unlink()
        refused(path.with_suffix(".xml"), "its label names 'a.img', which is not in the same")
        monkeypatch.setitem(sys.modules, "pdr", None)
        refused(write_pds4(tmp_path, GRAY), r".*pip install '\.\[pds\]'")

    def test_labels_that_name_other_files(self, tmp_path: Path) -> None:
        """They are checked like the file that the user names, and no program is started."""
        label = write_pds3(tmp_path, np.zeros((1, 24, 36), np.uint8)).with_suffix(".LBL")
        text = label.read_text()
        with (tmp_path / "LARGE.IMG").open("wb") as file:
            file.truncate(scaling.MAX_BYTES + 1)
        (tmp_path / "A.JPG").write_bytes(SCRIPT)
        for name, reason in (
            ("LARGE.IMG", "the file has more than 1,000,000,000 bytes"),
            ("A.JPG", "its label names 'A.JPG' instead of an .IMG file"),
        ):
            label.write_text(text.replace(label.with_suffix(".IMG").name, name))
            refused(label, reason)
        label.write_text(text.replace("IMAGE", "TABLE"))
        refused(label, "the product holds no image but TABLE")
