"""Every fault a data folder can have is named in one sentence, with the file and the line."""

import os
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marsclf import paths
from marsclf.data import download, sample
from marsclf.data import msl as data
from marsclf.data.open import locate, open_dataset
from marsclf.data.product_id import parse_product_id
from marsclf.errors import MarsclfError

TRAIN, VAL, TEST = (data.split_file(split) for split in data.SPLITS)


@pytest.fixture
def folder(sample_dir: Path, tmp_path: Path) -> Path:
    """A copy of the sample data that a test may damage."""
    return Path(shutil.copytree(sample_dir, tmp_path / "copy"))


def lines_of(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().splitlines()


def set_line(folder: Path, name: str, number: int, line: str) -> None:
    lines = lines_of(folder, name)
    lines[number - 1] = line
    (folder / name).write_text("\n".join(lines) + "\n")


def add_line(folder: Path, name: str, line: str) -> None:
    (folder / name).write_text("\n".join([*lines_of(folder, name), line]) + "\n")


def image_of(folder: Path, name: str = TRAIN, number: int = 1) -> Path:
    return folder / lines_of(folder, name)[number - 1].split()[0]


def encoded(size: tuple[int, int], kind: str, mode: str = "RGB") -> bytes:
    buffer = BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def with_header_size(content: bytes, width: int, height: int) -> bytes:
    """Return the JPEG with another size in its header: nothing of that size is ever made."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + height.to_bytes(2) + width.to_bytes(2) + content[at + 4 :]


def swap_out(folder: Path, content: bytes) -> None:
    image_of(folder).write_bytes(content)


def repeat_in(name: str) -> Callable[[Path], None]:
    return lambda folder: add_line(folder, name, lines_of(folder, TRAIN)[0])


def move_sol(folder: Path) -> None:
    """List an image of a train sol, of a name not used yet, in the test split."""
    image = image_of(folder)
    other = image.with_name(image.name[:6] + "999999" + image.name[12:])
    shutil.copy(image, other)
    add_line(folder, TEST, f"calibrated/{other.name} 8")


def relabel(label: str) -> Callable[[Path], None]:
    return lambda folder: set_line(folder, VAL, 2, f"{lines_of(folder, VAL)[1].split()[0]} {label}")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "missing or not a folder"),
    "no split file": (lambda f: (f / VAL).unlink(), f"{VAL} cannot be read"),
    "empty split file": (lambda f: (f / TEST).write_text(" \n"), f"{TEST} is empty"),
    "not text": (
        lambda f: (f / VAL).write_bytes((f / VAL).read_bytes() + b"\xff\xfe"),
        "this is not UTF-8 text",
    ),
    "no label": (lambda f: set_line(f, TRAIN, 3, "calibrated/x.JPG"), f"{TRAIN}, line 3: 'cal"),
    "label not a number": (relabel("wheel"), f"{VAL}, line 2: "),
    "label a fraction": (relabel("1.0"), f"{VAL}, line 2: "),
    "label 25": (relabel("25"), f"{VAL}, line 2: label 25 of"),
    "label -1": (relabel("-1"), f"{VAL}, line 2: label -1 of"),
    "label of many digits": (relabel("9" * 5000), f"{VAL}, line 2: "),
    "not a product id": (
        lambda f: set_line(f, TRAIN, 1, "calibrated/cat.JPG 8"),
        "line 1: 'cat.JPG' is not the name",
    ),
    "absent": (lambda f: image_of(f).unlink(), f"{TRAIN}, line 1: the image"),
    "a folder": (lambda f: (image_of(f).unlink(), image_of(f).mkdir()), "is not there"),
    "listed twice": (repeat_in(TRAIN), "is listed already in"),
    "in two splits": (repeat_in(TEST), f"{TRAIN}, line 1"),
    "sol in two splits": (move_sol, "is already in the train split"),
    "empty": (lambda f: swap_out(f, b""), "is empty"),
    "truncated": (lambda f: swap_out(f, image_of(f).read_bytes()[:-700]), "is truncated"),
    "not an image": (lambda f: swap_out(f, b"<html>" * 99), "is not a JPEG image"),
    "a PNG": (lambda f: swap_out(f, encoded((9, 9), "PNG")), "is not a JPEG image"),
    "four channels": (lambda f: swap_out(f, encoded((9, 9), "JPEG", "CMYK")), "has 4 channels"),
    "enormous": (
        lambda f: swap_out(f, with_header_size(image_of(f).read_bytes(), 10_000, 2_001)),
        r"is enormous \(10000 x 2001 pixels\)",
    ),
    "beyond Pillow's limit": (
        lambda f: swap_out(f, with_header_size(image_of(f).read_bytes(), 65_000, 65_000)),
        "is enormous",
    ),
    "many bytes": (lambda f: os.truncate(image_of(f), data.MAX_BYTES + 1), "is enormous"),
    "no class list": (lambda f: (f / data.CLASS_FILE).unlink(), "cannot be read"),
    "another class": (
        lambda f: set_line(f, data.CLASS_FILE, 9, "8 soil"),
        "line 9: expected class '8 ground', found '8 soil'",
    ),
    "class too many": (lambda f: add_line(f, data.CLASS_FILE, "25 x"), "lists 26 classes"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named(folder: Path, name: str) -> None:
    damage, message = FAULTS[name]
    damage(folder)
    faults = data.find_faults(folder)
    assert len(faults) == 1
    with pytest.raises(MarsclfError, match=message) as raised:
        data.load_dataset(folder)
    assert str(raised.value).startswith(faults[0])


@pytest.mark.parametrize("path", ["../x/", "/tmp/", "calibrated/../../", "..\\", "C:", "a\0/"])
def test_path_out_of_the_folder_is_a_fault(folder: Path, path: str) -> None:
    set_line(folder, TRAIN, 1, f"{path}{image_of(folder).name} 8")
    with pytest.raises(MarsclfError, match=f"{TRAIN}, line 1: .* leads out of the data folder"):
        data.load_dataset(folder)


def test_all_faults_are_listed_at_once(folder: Path) -> None:
    relabel("25")(folder)
    image_of(folder, TRAIN, 4).unlink()
    image_of(folder, TEST, 1).write_bytes(b"")
    faults = data.find_faults(folder)
    assert [("line 4" in fault, "line 2" in fault) for fault in faults[:2]] == [
        (True, False),
        (False, True),
    ]
    assert len(faults) == 3
    with pytest.raises(MarsclfError, match="2 more: `make check-data`"):
        data.load_dataset(folder)


def test_only_decoding_finds_damage_within(folder: Path) -> None:
    image = image_of(folder)
    content = image.read_bytes()
    table = content.index(b"\xff\xc4") + 5  # of the Huffman codes
    image.write_bytes(content[:table] + bytes(16) + content[table + 16 :])
    data.load_dataset(folder)
    (fault,) = data.find_faults(folder)
    assert "cannot be decoded" in fault


def test_line_endings_and_blank_lines_do_not_matter(
    folder: Path, sample_dataset: data.Dataset
) -> None:
    content = (folder / TRAIN).read_bytes().replace(b"\n", b"\r\n")
    (folder / TRAIN).write_bytes(b"\xef\xbb\xbf" + content + b"\r\n\r\n")
    dataset = data.load_dataset(folder)
    assert dataset.index.equals(sample_dataset.index)
    assert dataset.digest != sample_dataset.digest


@pytest.mark.parametrize("name", ["image", TRAIN, data.CLASS_FILE])
def test_digest_depends_on_every_byte(
    folder: Path, sample_dataset: data.Dataset, name: str
) -> None:
    assert data.load_dataset(folder).digest == sample_dataset.digest
    if name == "image":
        content = bytearray(image_of(folder).read_bytes())
        content[-10] ^= 1
        image_of(folder).write_bytes(content)
    else:
        (folder / name).write_text((folder / name).read_text() + "\n")
    assert data.load_dataset(folder).digest != sample_dataset.digest


def test_files_not_listed_do_not_matter(folder: Path, sample_dataset: data.Dataset) -> None:
    (folder / "calibrated" / "notes.txt").write_text("mine")
    assert data.load_dataset(folder).digest == sample_dataset.digest


def test_index(sample_dataset: data.Dataset) -> None:
    index = sample_dataset.index
    first = index.iloc[0]
    with Image.open(sample_dataset.root / first["path"]) as image:
        assert (first["width"], first["height"]) == image.size
    assert list(index["split"].unique()) == list(data.SPLITS)
    for _, part in index.groupby("split"):
        assert part["path"].is_monotonic_increasing
    assert index.index.equals(index.reset_index().index)
    assert (index["class_name"] == np.array(data.CLASS_NAMES)[index["label"]]).all()
    assert sample_dataset.name == "sample"


def test_name_without_marker(folder: Path) -> None:
    (folder / data.SAMPLE_MARKER).unlink()
    assert data.load_dataset(folder).name == "other"


def test_parse_product_id() -> None:
    product = parse_product_id("calibrated/0830MR0036510000500684E01_DRCL.JPG")
    assert product == data.Product(
        sol=830,
        camera="MR",
        sequence="0830MR003651",
        frame="0830MR0036510000500684",
        product_type="E",
    )
    other = parse_product_id("0830MR0036510000500684I01_DRCL.JPG")
    assert other.frame == product.frame and other.product_type == "I"
    assert parse_product_id("0292MH0002810020103587C00_DRCL.JPG").camera == "MH"
    assert parse_product_id("0025ML0001270080100815I02_DRCL.JPG").sol == 25


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cat.jpg",
        "0830MX0036510000500684E01_DRCL.JPG",
        "830MR0036510000500684E01_DRCL.JPG",
        "0830MR003651000050068E01_DRCL.JPG",
        "0830MR0036510000500684E01_DRCL.PNG",
        "0830MR0036510000500684E01_DRCL.JPG\n",
        "٠٨٣٠MR0036510000500684E01_DRCL.JPG",
    ],
)
def test_bad_product_id(name: str) -> None:
    with pytest.raises(MarsclfError, match="is not the name of a Curiosity image"):
        parse_product_id(name)


def test_locate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MARSCLF_DATA_DIR", str(tmp_path / "from-environment"))
    monkeypatch.setattr(paths, "DATA", tmp_path / "default")
    assert locate(tmp_path / "argument") == tmp_path / "argument"
    assert locate() == tmp_path / "from-environment"
    monkeypatch.setenv("MARSCLF_DATA_DIR", "")
    assert locate() is None
    (tmp_path / "default").mkdir()
    assert locate() == tmp_path / "default"
    assert locate("somewhere") == paths.PROJECT_ROOT / "somewhere"


def test_named_folder_is_never_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError("nothing may stand in for a folder that was named")

    monkeypatch.setattr(download, "fetch_msl_images", unexpected)
    monkeypatch.setattr(sample, "make_sample", unexpected)
    with pytest.raises(MarsclfError, match="missing or not a folder"):
        open_dataset(tmp_path / "nowhere")
    monkeypatch.setenv("MARSCLF_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(MarsclfError, match="missing or not a folder"):
        open_dataset()


@pytest.fixture
def nothing_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Neither a folder named nor data downloaded: all is made beneath the returned folder."""
    monkeypatch.delenv("MARSCLF_DATA_DIR", raising=False)
    monkeypatch.setattr(paths, "DATA", tmp_path / "data" / "msl-images")
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path


def test_without_network_the_sample_stands_in_and_says_so(
    nothing_at_hand: Path,
    sample_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreachable(_: Path) -> Path:
        raise download.NetworkUnreachable("zenodo.org cannot be reached.")

    monkeypatch.setattr(download, "fetch_msl_images", unreachable)
    (nothing_at_hand / "cache").mkdir()
    shutil.copytree(sample_dir, nothing_at_hand / "cache" / "sample")
    dataset = open_dataset()
    assert dataset.name == "sample"
    assert dataset.root == nothing_at_hand / "cache" / "sample"
    assert data.SAMPLE_NOTICE in capsys.readouterr().out


def test_download_that_fails_is_no_reason_for_the_sample(
    nothing_at_hand: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Path) -> Path:
        raise MarsclfError("the download broke off")

    monkeypatch.setattr(download, "fetch_msl_images", broken)
    with pytest.raises(MarsclfError, match="broke off"):
        open_dataset()
    assert not (nothing_at_hand / "cache").exists()


@pytest.mark.realdata
def test_real_data(real_data_dir: Path) -> None:
    dataset = data.load_dataset(real_data_dir)
    index = dataset.index
    assert (dataset.name, dataset.digest) == ("msl-v1", data.MSL_V1_DIGEST)
    assert index["split"].value_counts().to_dict() == {"train": 3746, "val": 1640, "test": 1305}
    assert (index["channels"] == 1).sum() == 172
    assert (index.groupby("frame")["split"].nunique() == 1).all()
    assert index["label"].nunique() == 24 and 22 not in set(index["label"])
    test = index[index["split"] == "test"]
    assert [test[column].nunique() for column in ("frame", "sequence", "sol")] == [820, 326, 97]
    assert set(range(25)) - set(test["label"]) == {5, 22, 23}
