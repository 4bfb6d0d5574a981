"""Any image file becomes 8-bit RGB or a one-line reason, whatever it contains."""

import io
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from marsclf.errors import MarsclfError
from marsclf.images import decode, scaling
from marsclf.images.decode import read_rgb
from marsclf.images.scaling import to_8_bit
from marsclf.images.views import fit_view

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
RGB = Image.fromarray(PIXELS)
GRAY = PIXELS[..., 0]
EXIF = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0%c\0\0\0\0\0\0"
TIFF_OPTIONS = {"uncompressed.tif": 1, "lzw.tif": 5, "deflate.tif": 8}


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


def encoded_16_bits(values: np.ndarray, name: str, orientation: int = 1) -> bytes:
    """Return the content of a PNG or TIFF file with these uint16 pixels, gray or RGB."""
    options = [cv2.IMWRITE_TIFF_COMPRESSION, TIFF_OPTIONS[name]] if name in TIFF_OPTIONS else []
    bgr = values[..., ::-1] if values.ndim == 3 else values
    content = cv2.imencode(Path(name).suffix, np.ascontiguousarray(bgr), options)[1].tobytes()
    if name in TIFF_OPTIONS:
        return content
    exif = b"eXIf" + EXIF % orientation
    chunk = struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
    return content[:33] + chunk + content[33:]  # behind the header


def turned(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Return an image as a camera stores it that gives it this EXIF orientation."""
    flipped = upright if orientation in (1, 3, 6, 8) else upright[:, ::-1]
    return np.rot90(flipped, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3}[orientation])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_lossless_formats_whatever_the_suffix_says(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(stored(RGB, tmp_path / name), PIXELS)
    (tmp_path / name).rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.jpg"), PIXELS)


@pytest.mark.parametrize("name", ["RGB.jpg", "L.jpg", "L.png", "P.png", "1.tif"])
def test_pixels_are_those_that_pillow_gives(tmp_path: Path, name: str) -> None:
    found = stored(RGB.convert(name.partition(".")[0]), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("full", [65535, 4095, 1023])
@pytest.mark.parametrize("pixels", [PIXELS, GRAY], ids=["color", "gray"])
@pytest.mark.parametrize("name", ["a.png", *TIFF_OPTIONS])
def test_16_bits_fill_their_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pixels: np.ndarray, full: int
) -> None:
    values = (pixels / 255 * full).round().astype(np.uint16)
    values[0, -1] = full
    expected = np.broadcast_to(values.reshape(24, 36, -1) * (255 / full), PIXELS.shape)
    for orientation in (1, 6) if name == "a.png" else (1,):
        content = encoded_16_bits(turned(values, orientation), name, orientation)
        (tmp_path / "a").write_bytes(content)
        np.testing.assert_allclose(read_rgb(tmp_path / "a"), expected, atol=0.5001)
    monkeypatch.setattr(scaling, "LARGE_PIXELS", 24 * 36 // 4)
    assert read_rgb(tmp_path / "a").shape == (12, 18, 3)


def test_exif_rotation(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        # Pillow scrambles such a gray TIFF file if it opens the file itself.
        for name, upright in (("a.png", PIXELS), ("a.tif", GRAY)):
            pixels = np.ascontiguousarray(turned(upright, orientation))
            found = stored(pixels, tmp_path / name, exif=EXIF % orientation)
            np.testing.assert_array_equal(found[..., 0], upright.reshape(24, 36, -1)[..., 0])
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


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("uint16", {"planarconfig": "separate"}),
        ("int16", {"byteorder": ">", "planarconfig": "separate", "compression": "lzw"}),
        ("uint16", {"extrasamples": ["unassalpha"]}),
        ("float32", {"byteorder": ">", "compression": "deflate"}),
        ("uint32", {}),
        ("float64", {}),
    ],
)
def test_legal_tiff_files(tmp_path: Path, dtype: str, options: dict) -> None:
    full = {"int16": 4095, "uint16": 65535, "uint32": 2**32 - 1}.get(dtype, 1)
    values = (PIXELS / 255 * full).astype(dtype)
    if "extrasamples" in options:
        values = np.dstack([values, np.full_like(GRAY, full, dtype)])
    planes = np.moveaxis(values, 2, 0) if "planarconfig" in options else values
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", **options)
    # Of the largest type, percentiles become black and white.
    np.testing.assert_allclose(read_rgb(tmp_path / "a.tif"), PIXELS, atol=3)


def test_a_tiff_file_of_another_kind_is_named(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GRAY.astype(np.complex64))
    with pytest.raises(MarsclfError, match="TIFF images of 64-bit COMPLEXIEEEFP are not supported"):
        read_rgb(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 9, 5), np.uint8), planarconfig="contig")
    with pytest.raises(MarsclfError, match="TIFF images with 5 channels"):
        read_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("fill", [-3.4028235e38, -32768, -9999, -1e32, 1e32, np.nan, "tag", "mask"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_data_are_black_and_do_not_count(
    tmp_path: Path, fill: float | str, dtype: type
) -> None:
    values = GRAY.astype(dtype) * 300
    expected = to_8_bit(values[2:])
    constant = 77777 if isinstance(fill, str) else fill
    if dtype == np.int32 and not -1e9 < constant < 1e9:
        pytest.skip("not an integer of this size")
    values[:2] = constant
    tags = [(42113, 2, 0, "77777", True)] if fill == "tag" else []
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=tags)
    masked = np.ma.masked_equal(values, constant)
    found = to_8_bit(masked) if fill == "mask" else read_rgb(tmp_path / "a.tif")
    np.testing.assert_array_equal(found[2:], expected)
    assert not found[:2].any()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("pixels", [PIXELS, GRAY], ids=["color", "gray"])
def test_hot_pixels_do_not_darken_an_image(pixels: np.ndarray, dtype: type) -> None:
    values = pixels.astype(dtype) * 16
    hot = values.copy()
    hot[7, 9] = hot[20, 3] = 20_000
    expected = to_8_bit(values)
    expected[7, 9] = expected[20, 3] = 255
    np.testing.assert_array_equal(to_8_bit(hot), expected)
    hot[:9, :9] = 20_000  # not a speck
    assert to_8_bit(hot)[:9, :9].max() < 255 / 3


def test_other_formats(tmp_path: Path) -> None:
    for name, options in {"a.webp": {"lossless": True}, "a.bmp": {}, "a.jp2": {}}.items():
        np.testing.assert_array_equal(stored(RGB, tmp_path / name, **options), PIXELS)
    frames = {"save_all": True, "append_images": [Image.new("L", RGB.size)]}
    found = stored(Image.fromarray(GRAY), tmp_path / "a.gif", **frames)
    np.testing.assert_array_equal(found[..., 0], GRAY)
    smooth = cv2.resize(GRAY, (360, 240), interpolation=cv2.INTER_CUBIC)
    content = imagecodecs.jpeg8_encode(smooth.astype(np.uint16) * 16, level=98, bitspersample=12)
    (tmp_path / "a.jpg").write_bytes(content)
    np.testing.assert_allclose(read_rgb(tmp_path / "a.jpg")[..., 0], smooth, atol=4)


@pytest.mark.parametrize("color", [PIXELS, GRAY], ids=["color", "gray"])
def test_transparent_pixels_are_black(tmp_path: Path, color: np.ndarray) -> None:
    alpha = np.where(np.arange(36) < 18, 0, 255).astype(np.uint8) * np.ones((24, 1), np.uint8)
    found = stored(np.dstack([color, alpha]), tmp_path / "a.png")
    expected = np.where(alpha[..., None], color.reshape(24, 36, -1), 0)
    expected = np.broadcast_to(expected, found.shape)
    np.testing.assert_array_equal(found, expected)
    values = np.dstack([color, alpha]).astype(np.uint16) * 257
    for name in ("a.png", "a.tif"):
        if name == "a.png":
            (tmp_path / name).write_bytes(imagecodecs.png_encode(values))
        else:
            photometric = "rgb" if color.ndim == 3 else "minisblack"
            extra = {"photometric": photometric, "extrasamples": ["unassalpha"]}
            tifffile.imwrite(tmp_path / name, values, planarconfig="contig", **extra)
        np.testing.assert_allclose(read_rgb(tmp_path / name), expected, atol=1)
    found = stored(RGB, tmp_path / "t.png", transparency=tuple(int(v) for v in PIXELS[5, 5]))
    assert found[5, 5].tolist() == [0, 0, 0]


def test_cmyk_and_the_first_of_several_pictures(tmp_path: Path) -> None:
    flat = Image.new("RGB", (32, 32), (200, 80, 40))
    found = stored(flat.convert("CMYK"), tmp_path / "a.jpg")
    np.testing.assert_allclose(found[16, 16], [200, 80, 40], atol=4)
    found = stored(RGB, tmp_path / "b.tif", save_all=True, append_images=[flat])
    np.testing.assert_array_equal(found, PIXELS)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 60), (20_000, 2), (60_000, 10), (2, 20_000)])
def test_tiny_and_long_images(tmp_path: Path, size: tuple[int, int]) -> None:
    found = stored(Image.new("L", size, 77), tmp_path / "a.png")
    assert max(found.shape) <= scaling.LARGE_SIDE and (fit_view(found, 32) == 77).all()


@pytest.mark.parametrize(("name", "mode"), [("a.jpg", "L"), ("a.png", "1"), ("b.png", "I;16")])
def test_large_images_are_shrunk(tmp_path: Path, name: str, mode: str) -> None:
    found = stored(Image.new(mode, (6000, 4000), 1), tmp_path / name)
    assert found.shape[0] * found.shape[1] <= scaling.LARGE_PIXELS * 1.001
    assert found.shape[1] / found.shape[0] == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize("side", [10_001, 15_000])  # of the larger one Pillow complains itself
def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, side: int) -> None:
    with pytest.raises(MarsclfError, match="over 100,000,000"):
        stored(Image.new("1", (side, side)), tmp_path / "a.png")


# Pillow would hand it to Ghostscript, which is a program.
SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "the file is empty"),
        ("garbage.jpg", bytes(range(256)) * 9, "it is not an image of a known format"),
        ("script.jpg", SCRIPT, "it is not an image"),
        ("fake.img", b"hello", "it has no PDS label|need the reader pdr"),
    ],
)
def test_a_file_without_an_image(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MarsclfError, match=reason):
        read_rgb(tmp_path / name)


def one_of_each_kind() -> dict[str, bytes]:
    values = PIXELS.astype(np.uint16) * 257
    contents = {name: encoded_16_bits(values, name) for name in ("16 bits.png", *TIFF_OPTIONS)}
    for name in ("RGB.png", "RGB.tif", "L.jpeg", "CMYK.jpeg", "RGB.jpeg"):
        mode, _, kind = name.partition(".")
        stream = io.BytesIO()
        RGB.convert(mode).save(stream, kind.replace("tif", "tiff"), progressive=True)
        contents[name] = stream.getvalue()
    return contents


@pytest.mark.parametrize("name", one_of_each_kind())
def test_a_file_that_is_cut_off(tmp_path: Path, name: str) -> None:
    content = one_of_each_kind()[name]
    for length in (1, 10, len(content) // 2, len(content) - 30):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(MarsclfError):
            read_rgb(tmp_path / "cut")


def test_a_jpeg_with_damaged_pixels(tmp_path: Path) -> None:
    content = bytearray(one_of_each_kind()["L.jpeg"])
    content[len(content) // 2 : len(content) // 2 + 2] = b"\xff\xd9"  # an early end
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(MarsclfError, match="the image data is damaged: (Corrupt|Premature)"):
        read_rgb(tmp_path / "a.jpg")


def test_a_png_with_too_few_rows(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[23] += 9  # the height
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(MarsclfError, match="a PNG file that cannot be decoded: Not enough image"):
        read_rgb(tmp_path / "a.png")


def test_a_damaged_tiff_file_is_called_one_and_libtiff_is_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for options in ({}, {"compression": "lzw"}):
        tifffile.imwrite(tmp_path / "a.tif", PIXELS, **options)
        content = (tmp_path / "a.tif").read_bytes()
        for length in (100, len(content) // 2):
            (tmp_path / "a.tif").write_bytes(content[:length])
            with pytest.raises(MarsclfError, match="it is a TIFF file that cannot be decoded"):
                read_rgb(tmp_path / "a.tif")
    assert capfd.readouterr() == ("", "")


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    reasons = {"pipe": "not a file", "folder": "not a file", "endless": "not a file"}
    reasons |= {"loop": "symbolic links", "gone": "No such file", "x" * 300: "name too long"}
    for name, reason in reasons.items():
        with pytest.raises(MarsclfError, match=reason):
            read_rgb(tmp_path / f"{name}.jpg")


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


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RGB.save(tmp_path / "a.png")
    monkeypatch.setattr(scaling, "LARGE_PIXELS", 100)
    at_once, load = [], Image.Image.load

    def watched(image: Image.Image) -> object:
        at_once.append(0)
        threading.Event().wait(0.02)
        assert at_once.pop() == len(at_once) == 0
        return load(image)

    monkeypatch.setattr(Image.Image, "load", watched)
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(read_rgb, [tmp_path / "a.png"] * 8))) == 8


def write_pds3(folder: Path, values: np.ndarray) -> Path:
    """Write a PDS3 image with a detached label; `values` has the bands first."""
    path = folder / "0830MR0036510000500684E01_DRCL.IMG"
    bands, lines, samples = values.shape
    kind = "UNSIGNED_INTEGER" if values.dtype == np.uint8 else "MSB_INTEGER"
    path.write_bytes(values.astype(values.dtype.newbyteorder(">")).tobytes())
    label = f"""PDS_VERSION_ID = PDS3
RECORD_TYPE = FIXED_LENGTH
RECORD_BYTES = {samples * values.itemsize}
FILE_RECORDS = {lines * bands}
^IMAGE = "{path.name}"
OBJECT = IMAGE
  LINES = {lines}
  LINE_SAMPLES = {samples}
  SAMPLE_TYPE = {kind}
  SAMPLE_BITS = {8 * values.itemsize}
  BANDS = {bands}
  BAND_STORAGE_TYPE = BAND_SEQUENTIAL
END_OBJECT = IMAGE
END
"""
    path.with_suffix(".LBL").write_text(label.replace("\n", "\r\n"))
    return path


PDS4_AXIS = """<Axis_Array><axis_name>{}</axis_name><elements>{}</elements>
<sequence_number>{}</sequence_number></Axis_Array>"""
PDS4_LABEL = f"""<?xml version="1.0" encoding="UTF-8"?>
<Product_Observational xmlns="http://pds.nasa.gov/pds4/pds/v1"><File_Area_Observational>
<File><file_name>a.img</file_name></File>
<Array_2D_Image><local_identifier>IMAGE</local_identifier><offset unit="byte">0</offset>
<axes>2</axes><axis_index_order>Last Index Fastest</axis_index_order>
<Element_Array><data_type>UnsignedMSB2</data_type></Element_Array>
{PDS4_AXIS.format("Line", 24, 1)}{PDS4_AXIS.format("Sample", 36, 2)}
</Array_2D_Image></File_Area_Observational></Product_Observational>
"""


TABLE_LABEL = """PDS_VERSION_ID = PDS3
RECORD_TYPE = FIXED_LENGTH
RECORD_BYTES = 6
^TABLE = "t.img"
OBJECT = TABLE
  INTERCHANGE_FORMAT = ASCII
  ROWS = 4
  COLUMNS = 1
  ROW_BYTES = 6
END_OBJECT = TABLE
END
"""


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
        found = read_rgb(write_pds3(tmp_path, values[np.newaxis]))
        np.testing.assert_allclose(found[..., 1], values * (255 / 4095), atol=0.5001)

    def test_pds4(self, tmp_path: Path) -> None:
        (tmp_path / "a.img").write_bytes((GRAY.astype(">u2") * 257).tobytes())
        (tmp_path / "a.xml").write_text(PDS4_LABEL)
        np.testing.assert_array_equal(read_rgb(tmp_path / "a.img")[..., 0], GRAY)

    def test_no_data(self, tmp_path: Path) -> None:
        values = GRAY.astype(np.int16) * 16
        expected = to_8_bit(values[2:])
        values[:2] = 32000
        path = write_pds3(tmp_path, values[np.newaxis])
        label = path.with_suffix(".LBL")
        label.write_text(
            label.read_text().replace("  BANDS", "  MISSING_CONSTANT = 32000\n  BANDS")
        )
        (tmp_path / "a.img").write_bytes(values.astype(">u2").tobytes())
        constants = "<Special_Constants><invalid_constant>32000</invalid_constant>"
        end = f"{constants}</Special_Constants></Array_2D_Image>"
        (tmp_path / "a.xml").write_text(PDS4_LABEL.replace("</Array_2D_Image>", end))
        for found in (read_rgb(path), read_rgb(tmp_path / "a.img")):
            np.testing.assert_array_equal(found[2:], expected)
            assert not found[:2].any()

    def test_faults(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_pds3(tmp_path, np.zeros((2, 24, 36), np.uint8))
        with pytest.raises(MarsclfError, match="2 bands instead of 1 or 3"):
            read_rgb(path)
        monkeypatch.setitem(sys.modules, "pdr", None)
        with pytest.raises(MarsclfError, match=r"pip install '\.\[pds\]'"):
            read_rgb(path)

    def test_each_fault_has_its_sentence(self, tmp_path: Path) -> None:
        path = write_pds3(tmp_path, np.zeros((1, 24, 36), np.uint8))
        label, content = path.with_suffix(".LBL"), path.read_bytes()

        def reason(path: Path) -> str:
            with pytest.raises(MarsclfError) as caught:
                read_rgb(path)
            return str(caught.value)

        path.write_bytes(content[:400])
        assert reason(path) == "its data are cut short: the label describes a larger image"
        path.rename(tmp_path / "b.IMG")
        missing = f"its data are missing: the label names {path.name!r} in the same folder"
        assert reason(label) == missing
        label.rename(tmp_path / "b.LBL")
        expected = f"it was renamed: its label names {path.name!r}, which is missing"
        assert reason(tmp_path / "b.IMG") == expected
        (tmp_path / "b.LBL").unlink()
        expected = "it has no PDS label, neither in itself nor in b.LBL or b.xml"
        assert reason(tmp_path / "b.IMG") == expected
        (tmp_path / "t.img").write_text("1.23\r\n" * 4)
        (tmp_path / "t.lbl").write_text(TABLE_LABEL.replace("\n", "\r\n"))
        assert reason(tmp_path / "t.img") == "the product holds no image but TABLE"
        (tmp_path / "a.img").write_bytes(bytes(9))
        (tmp_path / "a.xml").write_text(PDS4_LABEL)
        assert reason(tmp_path / "a.img").startswith("its data are cut short")
        (tmp_path / "a.img").unlink()
        assert reason(tmp_path / "a.xml").startswith("its data are missing")

    def test_labels_that_name_other_files(self, tmp_path: Path) -> None:
        """They are checked like the file that the user names, and no program is started."""
        label = write_pds3(tmp_path, np.zeros((1, 24, 36), np.uint8)).with_suffix(".LBL")
        text = label.read_text()
        with (tmp_path / "LARGE.IMG").open("wb") as file:
            file.truncate(scaling.MAX_BYTES + 1)
        (tmp_path / "A.JPG").write_bytes(SCRIPT)
        os.mkfifo(tmp_path / "PIPE.IMG")
        for name, reason in {
            "LARGE.IMG": "the file has more than 1,000,000,000 bytes",
            "A.JPG": "its label names 'A.JPG' instead of an .IMG file",
            "PIPE.IMG": "it is not a file",
        }.items():
            label.write_text(text.replace(label.with_suffix(".IMG").name, name))
            with pytest.raises(MarsclfError, match=reason):
                read_rgb(label)
