"""Any image file becomes 8-bit RGB or a sentence, whatever lies in it."""

import io
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from marsclf.errors import MarsclfError
from marsclf.images import decode as read
from marsclf.images.decode import read_rgb, to_8_bit
from marsclf.images.views import decode_rgb, fit_view

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
RGB = Image.fromarray(PIXELS)
GREY = PIXELS[..., 0]


@pytest.fixture(autouse=True)
def as_the_command_reads() -> Iterator[None]:
    with warnings.catch_warnings():
        read.ignore_decoders_warnings()
        yield


def stored(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    image.save(path, **options)
    found = read_rgb(path)
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    return found


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    np.testing.assert_array_equal(stored(RGB, tmp_path / f"a{suffix}"), PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_decoded_as_in_training(tmp_path: Path, mode: str) -> None:
    found = stored(RGB.convert(mode), tmp_path / "a.jpg")
    np.testing.assert_array_equal(found, decode_rgb(tmp_path / "a.jpg"))


def test_the_suffix_may_lie(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.jpg"), PIXELS)


def test_greyscale_and_palettes(tmp_path: Path) -> None:
    three = np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(stored(Image.fromarray(GREY), tmp_path / "a.png"), three)
    palette = RGB.quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(stored(palette, tmp_path / "p.png"), expected)
    bits = RGB.convert("1")
    expected = np.asarray(bits.convert("RGB"))
    np.testing.assert_array_equal(stored(bits, tmp_path / "b.tif"), expected)


@pytest.mark.parametrize("scale", [257, 16, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_fill_their_scale(tmp_path: Path, scale: int, suffix: str) -> None:
    full = {257: 65535, 16: 4095, 4: 1023}[scale]
    values = GREY.astype(np.uint16) * scale
    values[0, 0] = full
    found = stored(Image.fromarray(values), tmp_path / f"a{suffix}")
    np.testing.assert_allclose(found[..., 0], values * (255 / full), atol=0.5001)
    assert found[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("full", [65535, 4095])
@pytest.mark.parametrize("name", ["a.png", "lzw.tif", "raw.tif", "alpha.png"])
def test_colours_of_16_bits(tmp_path: Path, name: str, full: int) -> None:
    """Of which Pillow by itself gives the upper bytes alone."""
    values = (PIXELS / 255 * full).round().astype(np.uint16)
    values[0, 0] = full
    stored = np.ascontiguousarray(values[..., ::-1])  # OpenCV has blue first
    if name == "alpha.png":
        alpha = np.where(np.arange(36) < 18, 0, 65535) * np.ones((24, 1), int)
        stored = np.dstack([stored, alpha.astype(np.uint16)])
        values[:, :18] = 0
    compression = [cv2.IMWRITE_TIFF_COMPRESSION, 5 if name == "lzw.tif" else 1]
    assert cv2.imwrite(str(tmp_path / name), stored, compression)
    scale = next(s for s in read.FULL_SCALES if s >= values.max())
    np.testing.assert_allclose(read_rgb(tmp_path / name), values * (255 / scale), atol=0.5001)
    with pytest.MonkeyPatch.context() as patch:  # as a large one
        patch.setattr(read, "LARGE_PIXELS", 24 * 36 // 4)
        assert read_rgb(tmp_path / name).shape == (12, 18, 3)


def test_a_16_bit_colour_image_is_rotated(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(cv2.imencode(".png", PIXELS.astype(np.uint16) * 16)[1])
    upright = read_rgb(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    exif = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), np.rot90(upright, -1))


def test_floats_are_stretched(tmp_path: Path) -> None:
    values = np.linspace(-3, 1e4, GREY.size, dtype=np.float32).reshape(GREY.shape)
    found = stored(Image.fromarray(values), tmp_path / "a.tif")
    assert (found.min(), found.max()) == (0, 255) and (np.diff(found[..., 0].ravel()) >= 0).all()
    values[3, 3], values[4, 4] = np.nan, np.inf
    assert np.isfinite(stored(Image.fromarray(values), tmp_path / "n.tif")).all()
    assert not stored(Image.fromarray(np.zeros((4, 4), np.float32)), tmp_path / "0.tif").any()


def test_signed_numbers_beneath_zero_are_black() -> None:
    found = to_8_bit(np.array([[-5, 0, 4095]], np.int16))
    assert found[0, :, 0].tolist() == [0, 0, 255]


def test_what_is_transparent_is_black(tmp_path: Path) -> None:
    alpha = np.where(np.arange(36) < 18, 0, 255).astype(np.uint8) * np.ones((24, 1), np.uint8)
    found = stored(Image.fromarray(np.dstack([PIXELS, alpha])), tmp_path / "a.png")
    assert not found[:, :18].any()
    np.testing.assert_array_equal(found[:, 18:], PIXELS[:, 18:])
    found = stored(Image.fromarray(np.dstack([GREY, alpha])), tmp_path / "g.png")
    assert not found[:, :18].any() and found[:, 18:].any()
    found = stored(RGB, tmp_path / "t.png", transparency=tuple(int(v) for v in PIXELS[5, 5]))
    assert found[5, 5].tolist() == [0, 0, 0]


def test_cmyk(tmp_path: Path) -> None:
    flat = Image.new("RGB", (32, 32), (200, 80, 40)).convert("CMYK")
    for name in ("a.jpg", "a.tif"):
        found = stored(flat, tmp_path / name)
        np.testing.assert_allclose(found[16, 16], [200, 80, 40], atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Upright, the picture's corners are 1 2 / 3 4; these are they as such a camera stores them.
    upright = np.array([[50, 100], [150, 200]], np.uint8)
    as_stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    large = np.kron(as_stored, np.ones((8, 8), np.uint8))
    found = stored(Image.fromarray(large), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(found[4::8, 4::8, 0], upright)


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    stored(RGB, tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x12\x01")


def test_the_first_of_several_pictures(tmp_path: Path) -> None:
    others = [Image.new("RGB", (5, 5))]
    found = stored(RGB, tmp_path / "a.tif", save_all=True, append_images=others)
    np.testing.assert_array_equal(found, PIXELS)


def test_one_pixel(tmp_path: Path) -> None:
    found = stored(Image.new("RGB", (1, 1), (9, 8, 7)), tmp_path / "a.png")
    assert (fit_view(found, 32) == [9, 8, 7]).all()


@pytest.mark.parametrize("size", [(20_000, 60), (20_000, 2), (60_000, 10), (2, 20_000)])
def test_long_images(tmp_path: Path, size: tuple[int, int]) -> None:
    found = stored(Image.new("L", size, 77), tmp_path / "a.png")
    assert max(found.shape) <= read.LARGE_SIDE + 4_000 and (fit_view(found, 32) == 77).all()


@pytest.mark.parametrize(("name", "mode"), [("a.jpg", "L"), ("a.png", "1"), ("b.png", "I;16")])
def test_large_images_are_shrunk(tmp_path: Path, name: str, mode: str) -> None:
    image = Image.new(mode, (6000, 4000), 1)
    found = stored(image, tmp_path / name)
    assert found.shape[0] * found.shape[1] <= read.LARGE_PIXELS * 1.001
    assert found.shape[1] / found.shape[0] == pytest.approx(1.5, rel=1e-3)


def bomb(path: Path, side: int) -> None:
    """Write a small PNG that says it is a square of that side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)


@pytest.mark.parametrize("side", [10_001, 12_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, side: int) -> None:
    bomb(tmp_path / "a.png", side)
    with pytest.raises(MarsclfError, match="over 100,000,000"):
        read_rgb(tmp_path / "a.png")


REASONS = {
    "empty.jpg": (b"", "the file is empty"),
    "garbage.jpg": (bytes(range(256)) * 9, "it is not a JPEG, PNG or TIFF image"),
    "text.tif": (b"hello", "it is not a JPEG, PNG or TIFF image"),
    # Pillow would give it to Ghostscript, which is a program.
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is not a JPEG"),
    "fake.img": (b"hello", "the product holds no image|pdr cannot read|need the reader pdr"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_no_image(tmp_path: Path, name: str) -> None:
    content, reason = REASONS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MarsclfError, match=reason):
        read_rgb(tmp_path / name)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_a_file_that_is_cut_off(tmp_path: Path, suffix: str) -> None:
    RGB.save(tmp_path / f"a{suffix}")
    content = (tmp_path / f"a{suffix}").read_bytes()
    for length in (1, 10, len(content) // 2, len(content) - 30):
        (tmp_path / f"cut{suffix}").write_bytes(content[:length])
        with pytest.raises(MarsclfError):
            read_rgb(tmp_path / f"cut{suffix}")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    reasons = {"pipe": "not a file", "folder": "not a file", "endless": "not a file"}
    reasons |= {"loop": "symbolic links", "gone": "No such file", "x" * 300: "name too long"}
    for name, reason in reasons.items():
        with pytest.raises(MarsclfError, match=reason):
            read_rgb(tmp_path / f"{name}.jpg")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RGB.save(tmp_path / "a.png")
    if os.geteuid() == 0:  # who may read everything
        denied = PermissionError(13, "Permission denied")
        monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(denied))
    else:
        (tmp_path / "a.png").chmod(0)
    with pytest.raises(MarsclfError, match="Permission denied"):
        read_rgb(tmp_path / "a.png")


def jpegs() -> list[bytes]:
    contents = []
    for mode, options in (("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})):
        stream = io.BytesIO()
        RGB.convert(mode).save(stream, "JPEG", **options)
        contents.append(stream.getvalue())
    return contents


def read_or_say_why(path: Path) -> bool:
    try:
        found = read_rgb(path)
    except MarsclfError as error:
        assert str(error) and "\n" not in str(error)
        return False
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size
    assert fit_view(found, 32).shape == (32, 32, 3)
    return True


def test_thousands_of_mutated_jpegs(tmp_path: Path) -> None:
    rng, contents = np.random.default_rng(0), jpegs()
    path, outcomes = tmp_path / "a.jpg", []
    for number in range(4_000):
        content = bytearray(contents[number % len(contents)])
        for _ in range(rng.integers(1, 6)):
            place, end = sorted(rng.integers(0, len(content), 2))
            match rng.integers(4):
                case 0:
                    content[place] = rng.integers(256)
                case 1:
                    content[place] ^= 1 << rng.integers(8)
                case 2 if rng.random() < 0.2:
                    del content[place : place + 40]
                case 3 if rng.random() < 0.2:
                    content[place:place] = content[place : min(end, place + 40)]
        path.write_bytes(content)
        outcomes.append(read_or_say_why(path))
    assert 400 < sum(outcomes) < 3_600


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*"]),
    rest=st.binary(max_size=300),
    suffix=st.sampled_from([".jpg", ".png", ".tif"]),
)
def test_any_bytes(tmp_path: Path, start: bytes, rest: bytes, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(start + rest)
    read_or_say_why(tmp_path / f"a{suffix}")


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    place=st.integers(0, 10_000),
    value=st.integers(0, 255),
    suffix=st.sampled_from([".png", ".tif"]),
    kind=st.sampled_from([np.uint8, np.uint16]),
)
def test_mutated_png_and_tiff(
    tmp_path: Path, place: int, value: int, suffix: str, kind: type
) -> None:
    path = tmp_path / f"a{suffix}"
    assert cv2.imwrite(str(path), PIXELS[:8, :8].astype(kind))
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    read_or_say_why(path)


def test_large_images_are_decoded_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RGB.save(tmp_path / "a.png")
    monkeypatch.setattr(read, "LARGE_PIXELS", 100)
    at_once, most, lock = 0, 0, threading.Lock()
    original = read._to_rgb

    def watched(image: Image.Image) -> np.ndarray:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        threading.Event().wait(0.02)
        found = original(image)
        with lock:
            at_once -= 1
        return found

    monkeypatch.setattr(read, "_to_rgb", watched)
    threads = [threading.Thread(target=read_rgb, args=(tmp_path / "a.png",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


PDS3_LABEL = """PDS_VERSION_ID = PDS3
RECORD_TYPE = FIXED_LENGTH
RECORD_BYTES = {record}
FILE_RECORDS = {records}
^IMAGE = "{file}"
OBJECT = IMAGE
  LINES = {lines}
  LINE_SAMPLES = {samples}
  SAMPLE_TYPE = {type}
  SAMPLE_BITS = {bits}
  BANDS = {bands}
  BAND_STORAGE_TYPE = BAND_SEQUENTIAL
END_OBJECT = IMAGE
END
"""
PDS4_LABEL = """<?xml version="1.0" encoding="UTF-8"?>
<Product_Observational xmlns="http://pds.nasa.gov/pds4/pds/v1">
  <Identification_Area>
    <logical_identifier>urn:nasa:pds:test:data:image</logical_identifier>
    <version_id>1.0</version_id>
    <product_class>Product_Observational</product_class>
  </Identification_Area>
  <File_Area_Observational>
    <File><file_name>{file}</file_name></File>
    <Array_2D_Image>
      <local_identifier>IMAGE</local_identifier>
      <offset unit="byte">0</offset>
      <axes>2</axes>
      <axis_index_order>Last Index Fastest</axis_index_order>
      <Element_Array><data_type>UnsignedMSB2</data_type></Element_Array>
      <Axis_Array>
        <axis_name>Line</axis_name><elements>{lines}</elements>
        <sequence_number>1</sequence_number>
      </Axis_Array>
      <Axis_Array>
        <axis_name>Sample</axis_name><elements>{samples}</elements>
        <sequence_number>2</sequence_number>
      </Axis_Array>
    </Array_2D_Image>
  </File_Area_Observational>
</Product_Observational>
"""


def write_pds3(folder: Path, values: np.ndarray) -> Path:
    """Write a PDS3 image with a detached label; `values` has the bands first."""
    path = folder / "0830MR0036510000500684E01_DRCL.IMG"
    bands, lines, samples = values.shape
    kind = "UNSIGNED_INTEGER" if values.dtype == np.uint8 else "MSB_INTEGER"
    path.write_bytes(values.astype(values.dtype.newbyteorder(">")).tobytes())
    label = PDS3_LABEL.format(
        record=samples * values.itemsize,
        records=lines * bands,
        file=path.name,
        lines=lines,
        samples=samples,
        type=kind,
        bits=8 * values.itemsize,
        bands=bands,
    )
    path.with_suffix(".LBL").write_text(label.replace("\n", "\r\n"))
    return path


@pytest.mark.filterwarnings("ignore")  # pdr's own, on import and on labels without a mission
@pytest.mark.parametrize("named", [".IMG", ".LBL"])
def test_pds3(tmp_path: Path, named: str) -> None:
    pytest.importorskip("pdr")
    path = write_pds3(tmp_path, np.moveaxis(PIXELS, 2, 0))
    np.testing.assert_array_equal(read_rgb(path.with_suffix(named)), PIXELS)


@pytest.mark.filterwarnings("ignore")
def test_pds3_of_12_bits(tmp_path: Path) -> None:
    pytest.importorskip("pdr")
    values = GREY.astype(np.int16) * 16
    values[0, 0] = 4095
    found = read_rgb(write_pds3(tmp_path, values[np.newaxis]))
    np.testing.assert_allclose(found[..., 1], values * (255 / 4095), atol=0.5001)


@pytest.mark.filterwarnings("ignore")
def test_pds4(tmp_path: Path) -> None:
    pytest.importorskip("pdr")
    values = GREY.astype(">u2") * 257
    (tmp_path / "a.img").write_bytes(values.tobytes())
    label = PDS4_LABEL.format(file="a.img", lines=GREY.shape[0], samples=GREY.shape[1])
    (tmp_path / "a.xml").write_text(label)
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.img")[..., 0], GREY)


@pytest.mark.filterwarnings("ignore")
def test_pds_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pdr")
    path = write_pds3(tmp_path, np.zeros((2, 24, 36), np.uint8))
    with pytest.raises(MarsclfError, match="2 bands instead of 1 or 3"):
        read_rgb(path)
    path.with_suffix(".LBL").unlink()
    with pytest.raises(MarsclfError, match="label|pdr cannot read"):
        read_rgb(path)
    monkeypatch.setitem(sys.modules, "pdr", None)
    with pytest.raises(MarsclfError, match=r"pip install '\.\[pds\]'"):
        read_rgb(path)


@pytest.mark.filterwarnings("ignore")
def test_pds_labels_that_name_other_files(tmp_path: Path) -> None:
    """What a label names is checked as what the user names, and no program is started for it."""
    pytest.importorskip("pdr")
    label = write_pds3(tmp_path, np.zeros((1, 24, 36), np.uint8)).with_suffix(".LBL")
    text = label.read_text()

    def reason(name: str) -> str:
        label.write_text(text.replace(label.with_suffix(".IMG").name, name))
        with pytest.raises(MarsclfError) as raised:
            read_rgb(label)
        return str(raised.value)

    with (tmp_path / "LARGE.IMG").open("wb") as file:
        file.truncate(read.MAX_BYTES + 1)
    assert reason("LARGE.IMG") == "the file has more than 1,000,000,000 bytes"
    (tmp_path / "A.JPG").write_bytes(REASONS["script.jpg"][0])
    assert reason("A.JPG") == "its label names 'A.JPG' instead of an .IMG file"
    os.mkfifo(tmp_path / "PIPE.IMG")
    assert reason("PIPE.IMG") == "it is not a file"


@pytest.mark.filterwarnings("ignore")
def test_mutated_pds_labels(tmp_path: Path) -> None:
    pytest.importorskip("pdr")
    rng, outcomes = np.random.default_rng(0), []
    path = write_pds3(tmp_path, PIXELS.transpose(2, 0, 1))
    label = path.with_suffix(".LBL").read_bytes()
    for _ in range(200):
        content = bytearray(label)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            content[place] = rng.choice(list(b'0179 "=^-\r\n()Z\xff'))
        path.with_suffix(".LBL").write_bytes(content)
        outcomes.append(read_or_say_why(path))
    assert 20 < sum(outcomes) < 180
