"""Features of images and of random views of them: what they depend on, and what the cache keeps."""

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from marsclf.data.msl import Dataset
from marsclf.errors import MarsclfError
from marsclf.images.decode import read_rgb
from marsclf.images.views import Augmentation, Condition, fit_view
from marsclf.networks import engine as inference
from marsclf.training import features
from marsclf.training.features import Features, embed_images, embed_views, pass_on, view_counts

AUGMENTATION = Augmentation(rotation=180, zoom=0.5, shift=0.1, flip=True, brightness=0.5)


def make_network(size: int = 16, seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((size, size, 3), name="image")
    x = keras.layers.Conv2D(6, 3, strides=2, activation="relu", name="conv")(pixels)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="tiny")


class Engine:
    """In place of the fast engine: Keras itself, which counts the images and may be killed."""

    def __init__(self) -> None:
        self.made, self.images, self.left = 0, 0, 10**6

    def make_predictor(self, network: keras.Model, cache: Path, sample: np.ndarray):
        self.made += 1

        def predict(batch: np.ndarray) -> np.ndarray:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            self.images += len(batch)
            return network.predict_on_batch(batch)

        return predict


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    counting = Engine()
    monkeypatch.setattr(features, "make_predictor", counting.make_predictor)
    monkeypatch.setattr(features, "VIEWS_PER_FILE", 4)
    # One thread and small chunks, so that the moment of a kill is known.
    monkeypatch.setattr(inference, "cores", lambda: 0)
    monkeypatch.setattr(inference, "CHUNK", 4)
    return counting


@pytest.fixture(scope="module")
def network() -> keras.Model:
    return make_network()


@pytest.fixture(scope="module")
def rows(sample_dataset: Dataset) -> pd.DataFrame:
    """Ten images, among them one of a single channel."""
    index = sample_dataset.index
    return pd.concat([index[index["channels"] == 1].head(1), index.iloc[::40].head(9)])


def files(cache: Path) -> list[Path]:
    found = sorted((cache / "features").iterdir())
    assert all(path.suffix == ".npy" for path in found)
    return found


def test_view_counts_grow_with_rarity() -> None:
    labels = np.array([0] * 16 + [3] * 4 + [7] + [1] * 9)
    # The root of 16 / 4 is 2, of 16 / 1 is 4, of 16 / 9 is 1.33.
    counts = view_counts(labels, views=3, views_rare=10)
    assert counts.tolist() == [3] * 16 + [6] * 4 + [10] + [4] * 9
    assert view_counts(labels, views=2, views_rare=2).tolist() == [2] * 30


@pytest.mark.parametrize(("views", "views_rare"), [(0, 4), (-1, 1), (5, 4)])
def test_view_counts_that_make_no_sense(views: int, views_rare: int) -> None:
    with pytest.raises(MarsclfError, match=f"views is {views} and views_rare {views_rare}"):
        view_counts(np.array([0, 1]), views, views_rare)


def test_whole_images_are_what_the_model_sees(
    sample_dataset: Dataset, rows: pd.DataFrame, network: keras.Model, engine: Engine, tmp_path
) -> None:
    found = embed_images(sample_dataset.root, rows, network, tmp_path).read()
    views = [fit_view(read_rgb(sample_dataset.root / path), 16) for path in rows["path"]]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, network.predict_on_batch(np.stack(views)), rtol=1e-5)
    assert len(files(tmp_path)) == 3  # of four images, four and two
    assert (engine.made, engine.images) == (1, 10)


def test_images_under_a_condition(
    sample_dataset: Dataset, rows: pd.DataFrame, network: keras.Model, engine: Engine, tmp_path
) -> None:
    grey = Condition(grey=True, turn=90)
    found = embed_images(sample_dataset.root, rows, network, tmp_path, grey).read()
    views = [fit_view(read_rgb(sample_dataset.root / path), 16, grey) for path in rows["path"]]
    np.testing.assert_allclose(found, network.predict_on_batch(np.stack(views)), rtol=1e-5)
    whole = embed_images(sample_dataset.root, rows, network, tmp_path).read()
    assert (abs(found - whole).max(axis=1) > 0).all()


def test_features_are_read_by_row(tmp_path: Path, engine: Engine) -> None:
    content = np.random.default_rng(0).normal(size=(10, 2, 3)).astype(np.float16)
    files = [tmp_path / f"{i}.npy" for i in range(3)]
    for i, file in enumerate(files):
        np.save(file, content[4 * i : 4 * i + 4])
    stored = Features(tuple(files), 10)
    rows = np.array([9, 0, 3, 4, 4, 8])
    assert len(stored) == 10 and stored[rows].dtype == np.float32
    np.testing.assert_array_equal(stored[rows], content[rows])
    np.testing.assert_array_equal(stored.read(), content)


def make_upper(seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, name="dense")], name="upper")


def test_features_are_passed_on_once(
    sample_dataset: Dataset, rows: pd.DataFrame, network: keras.Model, engine: Engine, tmp_path
) -> None:
    counts = np.arange(10) % 3 + 1
    first = embed_views(sample_dataset.root, rows, counts, network, AUGMENTATION, 0, tmp_path)
    before, upper = engine.images, make_upper()
    second = pass_on(first, upper, tmp_path)
    assert engine.images == before + counts.sum() == before + len(second)
    expected = upper.predict_on_batch(first.read())
    np.testing.assert_allclose(second.read(), expected, rtol=2e-3, atol=2e-2)
    assert pass_on(first, make_upper(), tmp_path) == second
    assert engine.images == before + counts.sum()
    other = pass_on(first, make_upper(1), tmp_path)
    assert not set(other.files) & set(second.files)


def test_a_second_call_reads_the_cache_alone(
    sample_dataset: Dataset,
    rows: pd.DataFrame,
    network: keras.Model,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = np.arange(10) % 3 + 1
    arguments = (rows, counts, network, AUGMENTATION, 0, tmp_path)
    first = embed_views(sample_dataset.root, *arguments)
    whole = embed_images(sample_dataset.root, rows, network, tmp_path)
    assert first.read().shape == (counts.sum(), 6)
    assert np.load(first.files[0]).dtype == np.float16
    monkeypatch.setattr(features, "make_predictor", None)
    monkeypatch.setattr(features, "read_rgb", lambda _: pytest.fail("an image is read"))
    nowhere = tmp_path / "moved"  # it is the contents that count, not where they lie
    assert embed_views(nowhere, *arguments) == first
    assert embed_images(nowhere, rows, network, tmp_path) == whole


def test_a_view_does_not_depend_on_what_else_is_embedded(
    sample_dataset: Dataset, rows: pd.DataFrame, network: keras.Model, engine: Engine, tmp_path
) -> None:
    def views(numbers: list[int], counts: list[int]) -> list[np.ndarray]:
        found = embed_views(
            sample_dataset.root,
            rows.iloc[numbers],
            np.array(counts),
            network,
            AUGMENTATION,
            0,
            tmp_path,
        ).read()
        return np.split(found, np.cumsum(counts)[:-1])

    scale = {"rtol": 2e-3, "atol": 1e-2}  # half precision
    alone = views([7], [5])[0]
    others = views([2, 7, 4, 0, 1, 3], [1, 3, 2, 1, 1, 1])
    np.testing.assert_allclose(others[1], alone[:3], **scale)
    np.testing.assert_allclose(views([4, 2], [4, 2])[0][:2], others[2], **scale)
    for first in range(5):
        for second in range(first):
            assert abs(alone[first] - alone[second]).max() > 0.1


@pytest.mark.parametrize("changed", ["seed", "augmentation", "size", "network", "image"])
def test_what_features_depend_on(
    changed: str,
    sample_dataset: Dataset,
    rows: pd.DataFrame,
    network: keras.Model,
    engine: Engine,
    tmp_path: Path,
) -> None:
    part = rows.head(2)
    arguments = {"network": network, "augmentation": AUGMENTATION, "seed": 0, "rows": part}
    other = (
        arguments
        | {
            "seed": {"seed": 1},
            "augmentation": {"augmentation": dataclasses.replace(AUGMENTATION, zoom=0.51)},
            "size": {"network": make_network(size=20)},
            "network": {"network": make_network(seed=1)},
            "image": {"rows": part.assign(sha256=rows["sha256"].iloc[2:4].to_list())},
        }[changed]
    )

    def embed(network: keras.Model, augmentation: Augmentation, seed: int, rows: pd.DataFrame):
        counts = np.array([1, 2])
        return embed_views(
            sample_dataset.root, rows, counts, network, augmentation, seed, tmp_path
        ).read()

    first, second = embed(**arguments), embed(**other)
    assert len(files(tmp_path)) == 2
    assert (abs(first - second).max(axis=1) > 0).all()
    np.testing.assert_array_equal(embed(**arguments), first)
    assert engine.made == 2


def test_a_killed_run_goes_on_where_it_stopped(
    sample_dataset: Dataset, rows: pd.DataFrame, network: keras.Model, engine: Engine, tmp_path
) -> None:
    counts = np.full(10, 2)
    root = sample_dataset.root
    whole = embed_views(root, rows, counts, network, AUGMENTATION, 0, tmp_path / "whole").read()
    assert engine.images == 20
    engine.images, engine.left = 0, 2  # files of 4 views: killed in the third
    with pytest.raises(KeyboardInterrupt):
        embed_views(root, rows, counts, network, AUGMENTATION, 0, tmp_path)
    done = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    assert len(done) == 2
    engine.images, engine.left = 0, 10
    resumed = embed_views(root, rows, counts, network, AUGMENTATION, 0, tmp_path).read()
    assert engine.images == 12
    np.testing.assert_array_equal(resumed, whole)
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path)}.items() >= done.items()


def test_a_kill_while_a_file_is_written_leaves_none(
    sample_dataset: Dataset,
    rows: pd.DataFrame,
    network: keras.Model,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(path: Path, _: np.ndarray) -> None:
        path.write_bytes(b"\x93NUMPY")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", half)
        with pytest.raises(KeyboardInterrupt):
            embed_images(sample_dataset.root, rows, network, tmp_path)
    assert files(tmp_path) == []


def test_an_image_that_is_gone(
    sample_dataset: Dataset, rows: pd.DataFrame, network: keras.Model, engine: Engine, tmp_path
) -> None:
    broken = rows.assign(path=[*rows["path"].iloc[:9], "calibrated/none.JPG"])
    with pytest.raises(MarsclfError, match=r"none\.JPG: No such file"):
        embed_images(sample_dataset.root, broken, network, tmp_path)
    assert len(files(tmp_path)) == 2
