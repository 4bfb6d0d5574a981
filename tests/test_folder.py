"""A folder of one's own images: every layout that works, and a sentence for every fault."""

import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marsclf.cli import main
from marsclf.data.open import load_dataset, open_dataset, scan
from marsclf.data.splits import nearest, normalized
from marsclf.errors import MarsclfError
from marsclf.evaluation.predictions import as_predictions

Damage = Callable[[Path], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "my images"


def draw(path: Path, seed: int | None = None, **options: object) -> None:
    """Save 24 x 30 pixels of noise; without a seed, no two are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (24, 30, 3), np.uint8)
    Image.fromarray(noise).save(path, **options)


def in_folders(root: Path, counts: dict[str, int]) -> Path:
    for place, count in counts.items():
        for number in range(count):
            draw(root / place / f"{number}.png")
    return root


def in_table(root: Path, table: str) -> Path:
    """Draw the images that a labels.csv lists, and write it."""
    for line in table.splitlines()[1:]:
        draw(root / line.partition(",")[0])
    (root / "labels.csv").write_text(table, encoding="utf-8")
    return root


def test_one_folder_per_class(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Systems encode accents in two ways.
    composed, split = (unicodedata.normalize(form, "Écran large") for form in ("NFC", "NFD"))
    in_folders(root, {composed: 12, split: 8, "b/deeper/at last": 20, "c": 10})
    for number, name in enumerate(("x.tiff", "y.WEBP", "z z.jpg", "gray.bmp")):
        draw(root / "c" / name)
        if name == "gray.bmp":
            Image.new("L", (40, 20), number).save(root / "c" / name)
    for ignored in ("c/notes.txt", "c/.hidden.png", ".cache/x.png", "__MACOSX/c/._1.png", "a.txt"):
        (root / ignored).parent.mkdir(parents=True, exist_ok=True)
        (root / ignored).write_text("not an image")
    assert scan(root)[0] == []
    dataset = open_dataset(root)
    index = dataset.index
    assert (dataset.name, dataset.classes) == ("my images", ("b", "c", composed))
    assert "No splits are given" in capsys.readouterr().out
    assert index["class_name"].value_counts().tolist() == [20, 20, 14]
    assert (index["class_name"] == np.array(dataset.classes)[index["label"]]).all()
    for name, of in index.groupby("class_name"):
        counts = of["split"].value_counts()
        assert counts["train"] == pytest.approx(0.7 * len(of), abs=1.5), name
        assert min(counts["val"], counts["test"]) >= 2
    assert index["group"].is_unique and index["sequence"].is_unique and "sol" not in index
    gray = index.set_index("path").loc["c/gray.bmp"]
    assert tuple(gray[["width", "height", "channels"]]) == (40, 20, 1)


def test_the_same_images_give_the_same_data_set(root: Path, tmp_path: Path) -> None:
    in_folders(root, {"a": 9, "b": 9})
    first = load_dataset(root)
    copy = load_dataset(shutil.copytree(root, tmp_path / "msl-v1"))
    assert copy.digest == first.digest and copy.index.equals(first.index)
    assert copy.name == "my-msl-v1"  # the name alone makes no published data set


def test_given_splits(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_folders(root, {f"{split}/{name}": 3 for split in ("train", "val", "test") for name in "ab"})
    for split in ("train", "val"):
        shutil.copy(root / "test" / "a" / "0.png", root / split / "a" / "copy.png")
    index = open_dataset(root).index
    assert index["split"].tolist() == ["train"] * 6 + ["val"] * 7 + ["test"] * 6
    assert (index["path"].str.split("/").str[0] == index["split"]).all()
    assert "Training images left out" in capsys.readouterr().out
    shutil.rmtree(root / "test")
    dataset = load_dataset(root)
    assert set(dataset.index["split"]) == {"train", "val"} and dataset.notes == (
        "Training images left out, because validation or test has the same files: 1.",
        "test: not at hand",
    )


def test_labels_in_a_table(root: Path) -> None:
    lines = [f"{split} {i}/ü {i}.png,{['nò', 'yes'][i % 2]},{split},g{split}{i // 2}"
             for split in ("train", "val", "test") for i in range(4)]  # fmt: skip
    table = "\n".join(["\ufeffpath,label,split,group", *lines, ""]).replace("train 1/", "train 1\\")
    in_table(root, table.replace("\\", "/"))
    (root / "labels.csv").write_text(table, encoding="utf-8")
    draw(root / "not listed.png")
    dataset = load_dataset(root)
    assert dataset.classes == ("nò", "yes") and dataset.notes == ()
    assert dataset.index["group"].tolist()[:4] == ["gtrain0", "gtrain0", "gtrain1", "gtrain1"]
    assert dataset.index["split"].value_counts().tolist() == [4, 4, 4]
    assert dataset.index["sequence"].is_unique


@pytest.mark.parametrize("by", ["group", "sol", "group of a sol", "look"])
def test_drawn_splits_never_part_a_group(root: Path, by: str) -> None:
    lines = ["path,label,group"]
    for number in range(60):
        scene = number // 3
        name = f"{scene:04d}ML{number:016d}E01_DRCL.jpg" if "sol" in by else f"{number}.jpg"
        lines.append(f"{name},{'ab'[scene % 2]},{f'g{scene}' if 'group' in by else ''}")
        draw(root / name, scene if by == "look" else None, quality=95 - number % 3)
    (root / "labels.csv").write_text("\n".join(lines))
    dataset = load_dataset(root)
    index = dataset.index
    assert index.groupby("group").size().tolist() == [3] * 20
    assert index.groupby("group")["split"].nunique().max() == 1
    assert index.groupby("split").size().to_dict() == pytest.approx(
        {"train": 42, "val": 9, "test": 9}, abs=3
    )
    assert ("sol" in index) == ("sol" in by)
    assert index["sequence"].nunique() == (60 if by == "group" else 20)
    predictions = as_predictions(index, np.full((60, 2), 0.5))
    assert predictions["group"].astype(str).equals(index["group"])
    assert predictions["sequence"].equals(index["sequence"])


def add(counts: dict[str, int]) -> Damage:
    return lambda root: in_folders(root, counts)


def write(name: str, content: str) -> Damage:
    return lambda root: (root / name).write_text(content)


def remove(*places: str) -> Damage:
    return lambda root: [shutil.rmtree(root / place) for place in places]


def draw_alike(root: Path) -> None:
    for number in range(6):
        draw(root / "ab"[number % 2] / f"{number}.jpg", 0, quality=90 - number)


CLASSES = {"a": 3, "b": 3}
SPLITS = {f"{split}/{name}": 2 for split in ("train", "val", "test") for name in "ab"}


@pytest.mark.parametrize(
    ("counts", "damage", "message"),
    [
        (CLASSES, remove("a", "b"), "no labeled images in .*: make one folder of images per class"),
        (CLASSES, remove("b"), "All images in .* have the label 'a'"),
        (CLASSES, add({"c": 1}), "The class 'c' has 1 image"),
        (CLASSES, add({f"{n}": 1 for n in range(39)}), "41 classes, of which 40 are possible"),
        (
            CLASSES,
            lambda root: shutil.copy(root / "a/0.png", root / "b/9.png"),
            r"several labels \(a and b\): a/0.png and b/9.png",
        ),
        (CLASSES, lambda root: (root / "c").mkdir(), "c holds no images"),
        ({}, draw_alike, "Nothing in .* can be held out, because"),
        (CLASSES, add({".": 1}), "1 such as 0.png, are in no folder of a class"),
        (CLASSES, write("a/9.png", ""), "the image a/9.png cannot be read: the file is empty"),
        (CLASSES, write("a/9.jpg", "<html>"), "image a/9.jpg cannot be read: it is not an image"),
        (CLASSES, add({"A": 2}), "'A' and 'a' differ only by case"),
        (CLASSES, add({"x\ty": 2}), r"'x\\ty' cannot be printed: give"),
        (CLASSES, add({"train": 3, "val/a": 3}), "a is beside splits"),
        (SPLITS, add({"validation/a": 1}), "validation is beside splits: name it train, val or"),
        (SPLITS, remove("val"), "has splits, but no images in val"),
        (SPLITS, remove("train"), "has splits, but no images in train"),
        (SPLITS, remove("train/a"), "The class 'a' is in val or test but not in train"),
        (SPLITS, add({"val": 1}), "my images/val, 1 such as 0.png, are in no folder of a class"),
    ],
)
def test_faults_of_folders(root: Path, counts: dict, damage: Damage, message: str) -> None:
    damage(in_folders(root, counts))
    assert any(re.search(message, fault) for fault in scan(root)[0])


TABLE = "path,label,split,group\n1.png,a,train,x\n2.png,b,train,y\n3.png,a,val,z\n4.png,b,val,\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (TABLE, "", "labels.csv cannot be read as a CSV file .No columns"),
        (TABLE, "path,label\n", "labels.csv lists no images"),
        ("label,", "class,", "line 1 must be path,label.* is path,class,split,group"),
        (",", ";", "line 1 must be path,label.* is path;label;split;group"),
        ("1.png", '"1.png' + 140_000 * " ", "labels.csv cannot be read .*EOF inside"),
        ("1.png,a", "1.png,", "line 2: 1.png has no label"),
        ("1.png,a", ",a", "line 2: the image . cannot be read: it is not a file"),
        ("\n3.png", "\n1.png", "line 4: 1.png is already listed in .*, line 2"),
        ("3.png", "gone.png", "line 4: the image gone.png cannot be read: No such file"),
        ("train,y", "training,y", "line 3: the split 'training' must be train, val or test"),
        ("val,z", ",z", "line 4: 3.png has no split, but others have one"),
        ("val,z", "val,x", "The group 'x' is in several splits: train, val"),
        ("2.png,b", "2.png,B", "'B' and 'b' differ only by case"),
    ],
)
def test_faults_of_tables(root: Path, old: str, new: str, message: str) -> None:
    in_table(root, TABLE)
    (root / "labels.csv").write_text(TABLE.replace(old, new))
    with pytest.raises(MarsclfError, match=message):
        load_dataset(root)


def test_names_that_are_not_text(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_folders(root, {"a": 3, "b": 3})
    (root / "a" / "0.png").rename(root / "a" / "\udcff.png")
    assert main(["check-data", "--data-dir", str(root)]) == 1
    assert r"'a/\udcff.png' is not valid text: rename that file" in capsys.readouterr().err


def test_nearest_finds_the_copy_and_never_the_image_itself() -> None:
    thumbnails = np.random.default_rng(0).integers(0, 256, (200, 256), np.uint8)
    thumbnails[150], thumbnails[151] = thumbnails[3], 90
    thumbnails = normalized(thumbnails)
    assert not thumbnails[151].any()  # of uniform brightness: like no other
    rows = np.arange(200)
    correlation, partner = nearest(thumbnails, rows, rows)
    assert (partner[3], partner[150]) == (150, 3) and (partner != rows).all()
    assert correlation[3] == pytest.approx(1, abs=1e-5) and correlation[:3].max() < 0.5
    assert nearest(thumbnails, rows[:3], rows[100:])[1].min() >= 100
