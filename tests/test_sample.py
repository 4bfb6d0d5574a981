"""The sample set has the layout and the difficulties of the real one, and its own pictures."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from marsclf.data import msl as data
from marsclf.data import sample
from marsclf.errors import MarsclfError
from marsclf.images.decode import read_rgb


def test_same_seed_same_files(sample_dataset: data.Dataset, tmp_path: Path) -> None:
    again = data.load_dataset(sample.make_sample(tmp_path / "again"))
    assert again.digest == sample_dataset.digest


def test_another_seed_replaces_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {split: [1] * 4 for split in data.SPLITS}
    monkeypatch.setattr(sample, "COUNTS", few)
    digests = [
        data.load_dataset(sample.make_sample(tmp_path / "sample", seed)).digest for seed in (1, 0)
    ]
    assert digests[0] != digests[1]
    assert data.load_dataset(sample.make_sample(tmp_path / "other", 0)).digest == digests[1]


def test_complete_set_is_kept(sample_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_split_images", None)
    assert sample.make_sample(sample_dir) == sample_dir


def test_other_data_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photo.JPG").write_bytes(b"precious")
    with pytest.raises(MarsclfError, match="holds no sample data"):
        sample.make_sample(tmp_path)
    assert (tmp_path / "photo.JPG").read_bytes() == b"precious"


def test_kill_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample._split_images

    def killed(split: str, rng: np.random.Generator):
        if split == "val":
            raise KeyboardInterrupt
        yield from whole(split, rng)

    monkeypatch.setattr(sample, "COUNTS", {split: [1] * 4 for split in data.SPLITS})
    monkeypatch.setattr(sample, "_split_images", killed)
    with pytest.raises(KeyboardInterrupt):
        sample.make_sample(tmp_path / "sample")
    assert list(tmp_path.iterdir()) == []


def test_faultless(sample_dir: Path) -> None:
    assert data.find_faults(sample_dir) == []


def test_classes_as_in_the_real_set(sample_dataset: data.Dataset) -> None:
    labels = sample_dataset.index.groupby("split")["label"].agg(set)
    everything = set(range(data.NUM_CLASSES))
    assert everything - labels["train"] == {22}
    assert everything - labels["val"] == {2, 11, 13, 20, 22}
    assert everything - labels["test"] == {5, 22, 23}
    counts = sample_dataset.index.groupby(["split", "class_name"]).size()
    assert counts["train"].min() >= 4
    assert counts["train"].idxmax() == "ground"
    assert counts["val"].idxmax() == counts["test"].idxmax() == "wheel"


def test_sols_sequences_frames(sample_dataset: data.Dataset) -> None:
    index = sample_dataset.index
    for split, (first, last) in sample.SOLS.items():
        sols = index.loc[index["split"] == split, "sol"]
        assert sols.between(first, last).all() and sols.nunique() > 8
    frames = index.groupby("frame")
    assert set(frames["product_type"].agg(lambda kinds: "".join(sorted(kinds)))) == {"I", "E", "EI"}
    assert (frames["label"].nunique() == 1).all()
    assert (index.groupby("sequence")["frame"].nunique() > 1).sum() > 50
    assert index["camera"].nunique() == 3


def test_pictures(sample_dataset: data.Dataset) -> None:
    index = sample_dataset.index
    assert 300 <= len(index) <= 450
    assert index["width"].isin([255, 256]).all() and index["height"].between(188, 256).all()
    assert index["sha256"].is_unique
    grey = (index["channels"] == 1).groupby(index["split"]).sum()
    assert (grey >= 2).all() and grey.sum() < 30
    for path in index["path"][::40]:
        assert read_rgb(sample_dataset.root / path).std() > 8


def test_frames_of_a_burst_are_alike(sample_dataset: data.Dataset) -> None:
    """The mean difference within a burst is far below that of one class across bursts."""
    index = sample_dataset.index
    ground = index[(index["class_name"] == "ground") & (index["channels"] == 3)].drop_duplicates(
        "frame"
    )
    pictures = [
        cv2.resize(read_rgb(sample_dataset.root / path), (32, 32)).astype(float)
        for path in ground["path"]
    ]
    sequences = list(ground["sequence"])
    within, across = [], []
    for i in range(len(pictures)):
        for j in range(i):
            gap = abs(pictures[i] - pictures[j]).mean()
            (within if sequences[i] == sequences[j] else across).append(gap)
    assert within and max(within) < np.percentile(across, 10)
