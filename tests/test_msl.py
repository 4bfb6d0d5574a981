"""Every fault of a published data set is reported in one sentence, with the file and the line."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from marsclf.cli import main
from marsclf.data.dataset import SPLITS
from marsclf.data.msl import MSL_V1, MSL_V2
from marsclf.data.open import load_dataset, scan
from marsclf.data.product_id import Product, parse_product_id
from marsclf.errors import MarsclfError

TRAIN, VAL, TEST = (MSL_V1.lists[split] for split in SPLITS)
Damage = Callable[[Path], object]


@pytest.fixture
def folder(sample_dir: Path, tmp_path: Path) -> Path:
    """Four images of each split, which a test may damage."""
    (tmp_path / "calibrated").mkdir()
    for name in (TRAIN, VAL, TEST):
        lines = lines_of(sample_dir, name)[:4]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        for line in lines:
            shutil.copy(sample_dir / line.split()[0], tmp_path / "calibrated")
    shutil.copy(sample_dir / MSL_V1.class_file, tmp_path)
    return tmp_path


def lines_of(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().splitlines()


def image_of(folder: Path, name: str = TRAIN, number: int = 1) -> Path:
    return folder / lines_of(folder, name)[number - 1].split()[0]


def set_line(name: str, number: int, line: str) -> Damage:
    """Replace a line, of which `{path}` is the old first word and `{name}` the image's name."""

    def damage(folder: Path) -> None:
        lines = lines_of(folder, name)
        path = lines[number - 1].split()[0]
        lines[number - 1] = line.format(path=path, name=Path(path).name)
        (folder / name).write_text("\n".join(lines) + "\n")

    return damage


def append(name: str, content: bytes) -> Damage:
    """Append bytes, of which `%s` is the first line of the train split."""

    def damage(folder: Path) -> None:
        first = lines_of(folder, TRAIN)[0].encode()
        (folder / name).write_bytes((folder / name).read_bytes() + content.replace(b"%s", first))

    return damage


def move_sol(folder: Path) -> None:
    """List an image of a train sol, with a new name, in the test split."""
    image = image_of(folder)
    other = image.with_name(image.name[:6] + "999999" + image.name[12:])
    shutil.copy(image, other)
    append(TEST, f"calibrated/{other.name} 8".encode())(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "missing or not a folder"),
        (lambda f: (f / VAL).unlink(), f"{VAL}, which cannot be read"),
        (lambda f: (f / TEST).write_text(" \n"), f"{TEST} is empty"),
        (append(VAL, b"\xff\xfe"), f"{VAL}, line 5: "),
        (set_line(TRAIN, 3, "calibrated/x.JPG"), f"{TRAIN}, line 3: 'calibrated"),
        (set_line(VAL, 2, "{path} -1"), f"{VAL}, line 2: .* and a label, 0 to 24"),
        (set_line(VAL, 2, "{path} " + "9" * 5000), f"{VAL}, line 2: "),
        (set_line(TRAIN, 1, "calibrated/cat.JPG 8"), "line 1: 'cat.JPG' is not the name"),
        *(
            (set_line(TRAIN, 1, f"{path}{{name}} 8"), "line 1: .* must be a relative path in")
            for path in ("../x/", "/tmp/", "..\\", "C:")
        ),
        (append(TRAIN, b"%s"), f"is already listed in .*{TRAIN}, line 1"),
        (append(TEST, b"%s"), f"{TEST}, line .* already listed in .*{TRAIN}, line 1"),
        (move_sol, "is in several splits: train, test"),
        (lambda f: image_of(f).unlink(), f"{TRAIN}, line 1: the image .* cannot be read"),
        (lambda f: os.truncate(image_of(f), 2000), f"{TRAIN}, line 1: .* damaged: Premature"),
        (lambda f: (f / MSL_V1.class_file).unlink(), "cannot be read"),
        (set_line(MSL_V1.class_file, 9, "8 soil"), "does not list the classes"),
        (append(MSL_V1.class_file, b"25 x"), "does not list the classes"),
    ],
)
def test_fault_is_reported(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    (fault,) = scan(folder)[0]
    with pytest.raises(MarsclfError, match=message) as raised:
        load_dataset(folder)
    assert str(raised.value) == fault


def test_all_faults_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_of(folder, TRAIN, 4).unlink()
    set_line(VAL, 2, "{path} 25")(folder)
    image_of(folder, TEST, 1).write_bytes(b"")
    assert main(["check-data", "--data-dir", str(folder)]) == 1
    *faults, last = capsys.readouterr().out.splitlines()
    places = [f"{VAL}, line 2", f"{TRAIN}, line 4", f"{TEST}, line 1"]
    assert [place in fault for place, fault in zip(places, faults, strict=True)] == [True] * 3
    assert last == f"{folder}: 3 faults"
    with pytest.raises(MarsclfError, match="2 more: `python -m marsclf check-data`") as raised:
        load_dataset(folder)
    assert str(raised.value).startswith(faults[0])


def test_digest_depends_on_every_byte_but_the_index_not_on_line_endings(folder: Path) -> None:
    before = load_dataset(folder)
    (folder / "calibrated" / "notes.txt").write_text("not listed, so no part of the data")
    assert load_dataset(folder).digest == before.digest
    content = (folder / TRAIN).read_bytes().replace(b"\n", b"\r\n")
    (folder / TRAIN).write_bytes(b"\xef\xbb\xbf" + content + b"\r\n\r\n")
    after = load_dataset(folder)
    assert after.index.equals(before.index) and after.name == "other"
    pixels = bytearray(image_of(folder, VAL).read_bytes())
    pixels[-10] ^= 1
    image_of(folder, VAL).write_bytes(pixels)
    assert len({before.digest, after.digest, load_dataset(folder).digest}) == 3


def test_the_folder_beside_the_given_one(folder: Path, tmp_path_factory) -> None:
    inner = shutil.copytree(folder, tmp_path_factory.mktemp("outer") / "msl-images")
    for named in (inner.parent, inner / "calibrated"):
        (fault,) = scan(named)[0]
        assert fault.endswith(f"but in {inner}: name that folder.")


@pytest.fixture
def version_2(sample_dir: Path, tmp_path: Path) -> Path:
    """Two images of each split as in version 2.1, and a training copy of a test image."""
    (tmp_path / "images").mkdir()
    for split, first_sol in (("train", 1), ("val", 949), ("test", 1921)):
        lines = []
        for label, line in enumerate(lines_of(sample_dir, MSL_V1.lists[split])[:2]):
            name = f"{first_sol + label:04d}ML{label:016d}E01_DRCL"
            shutil.copy(sample_dir / line.split()[0], tmp_path / "images" / f"{name}.jpg")
            lines += [f"{name}{copy}.jpg {label}" for copy in ("", "-fh", "-fv", "-r90", "-r180")]
        (tmp_path / MSL_V2.lists[split]).write_text("\n".join(lines))
    shutil.copy(tmp_path / "images" / f"{name}.jpg", tmp_path / "images" / f"0009{name[4:]}.jpg")
    with (tmp_path / MSL_V2.lists["train"]).open("a") as train:
        train.write(f"\n0009{name[4:]}.jpg 1")
    classes = (f"{label},{name}\n" for label, name in enumerate(MSL_V2.classes))
    (tmp_path / MSL_V2.class_file).write_text("".join(classes))
    return tmp_path


def test_version_2(version_2: Path) -> None:
    assert scan(version_2)[0] == []
    complete = load_dataset(version_2)
    assert complete.classes == MSL_V2.classes and complete.name == "other"
    assert complete.index["split"].tolist() == ["train"] * 2 + ["val"] * 2 + ["test"] * 2
    assert complete.index["class_name"].tolist() == ["Arm cover", "Other rover part"] * 3
    assert complete.index.loc[0, "path"] == "images/0001ML0000000000000000E01_DRCL.jpg"
    assert complete.index["group"].tolist() == ["1", "2", "949", "950", "1921", "1922"]
    (note,) = complete.notes
    assert "left out" in note and note.endswith(": 1.")
    next(version_2.glob("images/1921*")).unlink()
    with pytest.raises(MarsclfError, match="test-set-v2.1.txt, line 1: the image .* cannot be re"):
        load_dataset(version_2)
    # It is the same data set without all test images, and without their list too.
    for missing in (version_2.glob("images/192*"), [version_2 / MSL_V2.lists["test"]]):
        for path in missing:
            path.unlink()
        found = load_dataset(version_2)
        assert found.notes == ("test: not at hand",) and found.digest == complete.digest
        assert found.index["split"].tolist() == ["train"] * 3 + ["val"] * 2


def test_parse_product_id() -> None:
    product = parse_product_id("calibrated/0830MR0036510000500684E01_DRCL.JPG")
    assert product == Product(830, "MR", "0830MR003651", "0830MR0036510000500684", "E")
    assert parse_product_id("0292MH0002810020103587C00_DRCL.JPG").camera == "MH"


@pytest.mark.parametrize("new", ["", "AB", "٠٨٣٠", ".JPG\n"])
def test_bad_product_id(new: str) -> None:
    for old in ("0830", "MR", "0684", "_DRCL", ".JPG"):
        with pytest.raises(MarsclfError, match="is not the name of a Curiosity image"):
            parse_product_id("0830MR0036510000500684E01_DRCL.JPG".replace(old, new))


@pytest.mark.realdata
def test_real_data(real_data_dir: Path) -> None:
    dataset = load_dataset(real_data_dir)
    index = dataset.index
    assert (dataset.name, dataset.digest) == ("msl-v1", MSL_V1.digest)
    assert index["split"].value_counts().to_dict() == {"train": 3746, "val": 1640, "test": 1305}
    assert (index["channels"] == 1).sum() == 172
    assert (index.groupby("frame")["split"].nunique() == 1).all()
    assert index["label"].nunique() == 24 and 22 not in set(index["label"])
    test = index[index["split"] == "test"]
    assert [test[column].nunique() for column in ("frame", "sequence", "sol")] == [820, 326, 97]
    assert set(range(25)) - set(test["label"]) == {5, 22, 23}


@pytest.mark.realdata
def test_real_data_of_version_2(real_data_dir: Path) -> None:
    folder = real_data_dir.with_name(MSL_V2.name)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    dataset = load_dataset(folder)
    counts = dataset.index["split"].value_counts().to_dict()
    assert (dataset.name, counts["train"], counts["val"]) == ("msl-v2.1", 2000, 300)
    assert set(dataset.index["label"]) == set(range(19))
