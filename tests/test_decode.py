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

import numpy as np
import pytest
from PIL import Image

from marsclf.errors import MarsclfError
from marsclf.images import decode
from marsclf.images.decode import read_rgb, to_8_bit
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


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(header: tuple, content: bytes, *chunks: bytes) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    return start + b"".join(chunks) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def png_of_16_bits(values: np.ndarray, orientation: int = 1) -> bytes:
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = (width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels])
    return png(header, rows, chunk(b"eXIf", EXIF % orientation))


def tiff_of_16_bits(values: np.ndarray, order: str, deflate: bool, orientation: int = 1) -> bytes:
    height, width, channels = values.shape
    content = values.astype(f"{order}u2").tobytes()
    content = zlib.compress(content) if deflate else content
    shorts = {259: 8 if deflate else 1, 262: 1 if channels == 1 else 2, 274: orientation}
    shorts |= {277: channels} | ({338: 2} if channels == 4 else {})
    longs = {256: width, 257: height, 273: 200, 278: height, 279: len(content)}
    entries = {tag: struct.pack(f"{order}HHIHxx", tag, 3, 1, v) for tag, v in shorts.items()}
    entries |= {tag: struct.pack(f"{order}HHII", tag, 4, 1, v) for tag, v in longs.items()}
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    where = bits.ljust(4, b"\0") if channels == 1 else struct.pack(f"{order}I", 192)
    entries[258] = struct.pack(f"{order}HHI", 258, 3, channels) + where
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    directory = b"".join(entries[tag] for tag in sorted(entries))
    return (start + directory).ljust(192, b"\0") + bits.ljust(8, b"\0") + content


def turned(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Return an image as a camera stores it that gives it this EXIF orientation."""
    flipped = upright if orientation in (1, 3, 6, 8) else upright[:, ::-1]
    return np.rot90(flipped, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3}[orientation])


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.TIFF"])
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
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["png", "<", ">", "< deflate", "> deflate"])
def test_16_bits_fill_their_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, channels: int, full: int
) -> None:
    color = (PIXELS[..., : min(channels, 3)] / 255 * full).round().astype(np.uint16)
    color[0, -1] = full
    opaque = np.arange(36) >= 18
    alpha = np.broadcast_to(opaque[:, None] * np.uint16(65535), (24, 36, 1))
    values = np.dstack([color, alpha]) if channels == 4 else color
    expected = color * (255 / full) * (opaque[:, None] if channels == 4 else 1)
    for orientation in (1, 6):
        written = np.ascontiguousarray(turned(values, orientation))
        if kind == "png":
            content = png_of_16_bits(written, orientation)
        else:
            content = tiff_of_16_bits(written, kind[0], "deflate" in kind, orientation)
        (tmp_path / "a").write_bytes(content)
        found = read_rgb(tmp_path / "a")
        np.testing.assert_allclose(found, np.broadcast_to(expected, PIXELS.shape), atol=0.5001)
    monkeypatch.setattr(decode, "LARGE_PIXELS", 24 * 36 // 4)
    assert read_rgb(tmp_path / "a").shape == (12, 18, 3)


def test_exif_rotation(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        found = stored(turned(PIXELS, orientation), tmp_path / "a.png", exif=EXIF % orientation)
        np.testing.assert_array_equal(found, PIXELS)
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


def test_transparent_pixels_are_black(tmp_path: Path) -> None:
    alpha = np.where(np.arange(36) < 18, 0, 255).astype(np.uint8) * np.ones((24, 1), np.uint8)
    for color in (PIXELS, GRAY):
        found = stored(np.dstack([color, alpha]), tmp_path / "a.png")
        expected = PIXELS if color is PIXELS else np.repeat(GRAY[..., None], 3, axis=2)
        assert not found[:, :18].any()
        np.testing.assert_array_equal(found[:, 18:], expected[:, 18:])
    found = stored(RGB, tmp_path / "t.png", transparency=tuple(int(v) for v in PIXELS[5, 5]))
    assert found[5, 5].tolist() == [0, 0, 0]


def test_cmyk_and_the_first_of_several_pictures(tmp_path: Path) -> None:
    flat = Image.new("RGB", (32, 32), (200, 80, 40))
    for name in ("a.jpg", "a.tif"):
        found = stored(flat.convert("CMYK"), tmp_path / name)
        np.testing.assert_allclose(found[16, 16], [200, 80, 40], atol=4)
    found = stored(RGB, tmp_path / "b.tif", save_all=True, append_images=[flat])
    np.testing.assert_array_equal(found, PIXELS)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 60), (20_000, 2), (60_000, 10), (2, 20_000)])
def test_tiny_and_long_images(tmp_path: Path, size: tuple[int, int]) -> None:
    found = stored(Image.new("L", size, 77), tmp_path / "a.png")
    assert max(found.shape) <= decode.LARGE_SIDE and (fit_view(found, 32) == 77).all()


@pytest.mark.parametrize(("name", "mode"), [("a.jpg", "L"), ("a.png", "1"), ("b.png", "I;16")])
def test_large_images_are_shrunk(tmp_path: Path, name: str, mode: str) -> None:
    found = stored(Image.new(mode, (6000, 4000), 1), tmp_path / name)
    assert found.shape[0] * found.shape[1] <= decode.LARGE_PIXELS * 1.001
    assert found.shape[1] / found.shape[0] == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize("side", [10_001, 12_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(png((side, side, 8, 2), b"\0" * 1000))
    with pytest.raises(MarsclfError, match="over 100,000,000"):
        read_rgb(tmp_path / "a.png")


# Pillow would hand it to Ghostscript, which is a program.
SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "the file is empty"),
        ("garbage.jpg", bytes(range(256)) * 9, "it is not a JPEG, PNG or TIFF image"),
        ("text.tif", b"hello", "it is not a JPEG, PNG or TIFF image"),
        ("script.jpg", SCRIPT, "it is not a JPEG"),
        ("fake.img", b"hello", "the product holds no image|pdr cannot read|need the reader pdr"),
    ],
)
def test_a_file_without_an_image(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MarsclfError, match=reason):
        read_rgb(tmp_path / name)


def one_of_each_kind() -> list[bytes]:
    values = PIXELS.astype(np.uint16) * 257
    contents = [png_of_16_bits(values), tiff_of_16_bits(values, "<", False)]
    contents.append(tiff_of_16_bits(values, ">", True))
    jpeg = [("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})]
    for mode, options in (("RGB", {"format": "PNG"}), ("RGB", {"format": "TIFF"}), *jpeg):
        stream = io.BytesIO()
        RGB.convert(mode).save(stream, **{"format": "JPEG", **options})
        contents.append(stream.getvalue())
    return contents


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    for content in one_of_each_kind():
        for length in (1, 10, len(content) // 2, len(content) - 30):
            (tmp_path / "cut").write_bytes(content[:length])
            with pytest.raises(MarsclfError):
                read_rgb(tmp_path / "cut")


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


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RGB.save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    if os.geteuid() == 0:  # root may read everything
        denied = PermissionError(13, "Permission denied")
        monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(denied))
    with pytest.raises(MarsclfError, match="Permission denied"):
        read_rgb(tmp_path / "a.png")


def read_or_give_reason(path: Path) -> bool:
    try:
        found = read_rgb(path)
    except MarsclfError as error:
        assert str(error) and "\n" not in str(error)
        return False
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size
    assert fit_view(found, 32).shape == (32, 32, 3)
    return True


def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    rng, contents, outcomes = np.random.default_rng(0), one_of_each_kind(), []
    for start in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*") * 40:
        (tmp_path / "a").write_bytes(start + rng.bytes(rng.integers(300)))
        read_or_give_reason(tmp_path / "a")
    for number in range(4_000):
        content = bytearray(contents[number % len(contents)])
        for _ in range(rng.integers(1, 5)):
            # The headers at either end break in more ways than the pixels between them.
            place = int(
                rng.integers(len(content)) if rng.random() < 0.5 else rng.integers(-200, 200)
            )
            if rng.random() < 0.9:
                content[place] = rng.integers(256)
            else:
                del content[place : place + 40]
        (tmp_path / "a").write_bytes(content)
        outcomes.append(read_or_give_reason(tmp_path / "a"))
    assert 400 < sum(outcomes) < 3_600


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RGB.save(tmp_path / "a.png")
    monkeypatch.setattr(decode, "LARGE_PIXELS", 100)
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

    def test_faults(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_pds3(tmp_path, np.zeros((2, 24, 36), np.uint8))
        with pytest.raises(MarsclfError, match="2 bands instead of 1 or 3"):
            read_rgb(path)
        path.with_suffix(".LBL").unlink()
        with pytest.raises(MarsclfError, match="label|pdr cannot read"):
            read_rgb(path)
        monkeypatch.setitem(sys.modules, "pdr", None)
        with pytest.raises(MarsclfError, match=r"pip install '\.\[pds\]'"):
            read_rgb(path)

    def test_labels_that_name_other_files(self, tmp_path: Path) -> None:
        """They are checked like the file that the user names, and no program is started."""
        label = write_pds3(tmp_path, np.zeros((1, 24, 36), np.uint8)).with_suffix(".LBL")
        text = label.read_text()
        with (tmp_path / "LARGE.IMG").open("wb") as file:
            file.truncate(decode.MAX_BYTES + 1)
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

    def test_mutated_labels(self, tmp_path: Path) -> None:
        rng, outcomes = np.random.default_rng(0), []
        path = write_pds3(tmp_path, PIXELS.transpose(2, 0, 1))
        label = path.with_suffix(".LBL").read_bytes()
        for _ in range(200):
            content = bytearray(label)
            for place in rng.integers(0, len(content), rng.integers(1, 4)):
                content[place] = rng.choice(list(b'0179 "=^-\r\n()Z\xff'))
            path.with_suffix(".LBL").write_bytes(content)
            outcomes.append(read_or_give_reason(path))
        assert 20 < sum(outcomes) < 180
