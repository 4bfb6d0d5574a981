"""Features of images and of random views: what they depend on, and what the cache keeps."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from marsclf import paths
from marsclf.data.dataset import Dataset
from marsclf.errors import MarsclfError
from marsclf.images.decode import read_rgb
from marsclf.images.views import WHOLE_IMAGE, Augmentation, Condition, fit_view
from marsclf.training import features
from marsclf.training.features import Features, apply_network, image_features
from marsclf.training.sampling import view_counts

AUGMENTATION = Augmentation(rotation=180, zoom=0.5, shift=0.1, flip=True, brightness=0.5)
COUNTS = np.arange(10) % 3 + 1  # views of each image, 19 together


def make_network(size: int = 16, seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((size, size, 3), name="image")
    x = keras.layers.Conv2D(6, 3, strides=2, activation="relu", name="conv")(pixels)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="tiny")


@pytest.fixture(autouse=True)
def computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list:
    """Replace the fast engine with Keras, one item at a time; return the list of these items."""
    done = []

    def predict_each(items: Iterable, load: Callable, predict: Callable) -> Iterator[np.ndarray]:
        for item in items:
            done.append(item)
            yield predict(load(item)[np.newaxis])[0]

    monkeypatch.setattr(features, "make_predictor", lambda network, *_: network.predict_on_batch)
    monkeypatch.setattr(features, "predict_each", predict_each)
    monkeypatch.setattr(features, "VIEWS_PER_FILE", 4)
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return done


@pytest.fixture(scope="module")
def network() -> keras.Model:
    return make_network()


@pytest.fixture(scope="module")
def rows(sample_dataset: Dataset) -> pd.DataFrame:
    """Ten images, one of them with a single channel."""
    index = sample_dataset.index
    return pd.concat([index[index["channels"] == 1].head(1), index.iloc[::40].head(9)])


@pytest.fixture
def view_features(sample_dataset: Dataset, rows: pd.DataFrame, network: keras.Model):
    def call(**changed: object) -> Features:
        defaults = {"root": sample_dataset.root, "rows": rows, "counts": COUNTS, "seed": 0}
        defaults |= {"network": network, "augmentation": AUGMENTATION}
        return features.view_features(**(defaults | changed))

    return call


def cached(cache: Path, unfinished: int = 0) -> list[Path]:
    """Return the files of features; nothing else may be there but so many unfinished ones."""
    found = sorted((cache / "features").glob("*.npy"))
    assert len(list((cache / "features").iterdir())) == len(found) + unfinished
    return found


def test_view_counts_grow_with_rarity() -> None:
    labels = np.array([0] * 16 + [3] * 4 + [7] + [1] * 9)
    # The root of 16 / 4 is 2, of 16 / 1 is 4, of 16 / 9 is 1.33.
    counts = view_counts(labels, views=3, views_rare=10)
    assert counts.tolist() == [3] * 16 + [6] * 4 + [10] + [4] * 9
    assert view_counts(labels, views=2, views_rare=2).tolist() == [2] * 30


@pytest.mark.parametrize("condition", [WHOLE_IMAGE, Condition(zoom=2.0, turn=90)])
def test_features_of_complete_images(condition, sample_dataset, rows, network) -> None:
    root = sample_dataset.root
    image_features(root, rows, network, WHOLE_IMAGE)  # must not be taken for another condition
    found = image_features(root, rows, network, condition, WHOLE_IMAGE).read()
    images = [read_rgb(root / path) for path in rows["path"]]
    views = [fit_view(image, 16, how) for image in images for how in (condition, WHOLE_IMAGE)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, network.predict_on_batch(np.stack(views)), rtol=1e-5)


def test_a_second_call_only_reads_the_cache(
    view_features, sample_dataset, rows, network, computed, tmp_path
) -> None:
    first = view_features()
    complete = image_features(sample_dataset.root, rows, network, WHOLE_IMAGE)
    computed.clear()
    # The images are not read either: their content counts, not their place.
    assert view_features(root=tmp_path / "moved") == first
    assert image_features(tmp_path / "moved", rows, network, WHOLE_IMAGE) == complete
    assert not computed
    content, some = np.concatenate([np.load(file) for file in first.files]), [18, 0, 3, 4, 4, 8]
    assert content.dtype == np.float16 and content.shape == (first.count, 6) == (19, 6)
    np.testing.assert_array_equal(first.read(), content)
    np.testing.assert_array_equal(first[np.array(some)], content[some].astype(np.float32))


def test_a_network_is_applied_to_features_once(view_features, computed) -> None:
    first = view_features()
    one, other = (keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)]) for _ in range(2))
    computed.clear()
    found = apply_network(first, one)
    assert apply_network(first, one) == found
    assert len(computed) == found.count == first.count
    expected = one.predict_on_batch(first.read())
    np.testing.assert_allclose(found.read(), expected, rtol=2e-3, atol=2e-2)
    assert not set(apply_network(first, other).files) & set(found.files)


def test_a_view_does_not_depend_on_the_other_images(view_features, rows: pd.DataFrame) -> None:
    def views(numbers: list[int], counts: list[int]) -> list[np.ndarray]:
        found = view_features(rows=rows.iloc[numbers], counts=np.array(counts)).read()
        return np.split(found, np.cumsum(counts)[:-1])

    (alone,) = views([7], [5])
    others = views([2, 7, 4], [1, 3, 2])
    np.testing.assert_allclose(others[1], alone[:3], rtol=2e-3, atol=1e-2)  # half precision
    for first in range(5):
        for second in range(first):
            assert abs(alone[first] - alone[second]).max() > 0.1


@pytest.mark.parametrize("changed", ["seed", "augmentation", "size", "network", "image"])
def test_what_features_depend_on(changed: str, view_features, rows, computed, tmp_path) -> None:
    few = {"rows": rows.head(2), "counts": np.array([1, 2])}
    other = {
        "seed": {"seed": 1},
        "augmentation": {"augmentation": dataclasses.replace(AUGMENTATION, zoom=0.51)},
        "size": {"network": make_network(size=20)},
        "network": {"network": make_network(seed=1)},
        "image": {"rows": rows.head(2).assign(sha256=rows["sha256"].iloc[2:4].to_list())},
    }[changed]
    first, second = view_features(**few).read(), view_features(**(few | other)).read()
    assert len(cached(tmp_path)) == 2
    assert (abs(first - second).max(axis=1) > 0).all()
    np.testing.assert_array_equal(view_features(**few).read(), first)
    assert len(computed) == 6


def test_a_killed_run_continues_where_it_stopped(
    view_features, computed, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(paths, "CACHE", tmp_path / "uninterrupted")
        uninterrupted, save = view_features().read(), np.save

    def die_in_third(path: Path, content: np.ndarray) -> None:
        if len(cached(tmp_path, unfinished=1)) < 2:
            return save(path, content)
        path.write_bytes(b"\x93NUMPY")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", die_in_third)
        view_features()
    done = {path: path.stat().st_mtime_ns for path in cached(tmp_path)}
    computed.clear()
    np.testing.assert_array_equal(view_features().read(), uninterrupted)
    assert len(done) == 2 and len(computed) == 11
    assert {path: path.stat().st_mtime_ns for path in cached(tmp_path)}.items() >= done.items()


@pytest.mark.parametrize("content", [None, b"not an image"])
def test_an_image_that_cannot_be_read(content, sample_dataset, rows, network, tmp_path) -> None:
    bad = tmp_path / "bad.JPG"
    if content:
        bad.write_bytes(content)
    good = [sample_dataset.root / path for path in rows["path"].iloc[:9]]
    with pytest.raises(MarsclfError) as caught:
        image_features(Path(), rows.assign(path=[*good, bad]), network, WHOLE_IMAGE)
    assert str(caught.value).startswith(f"{bad} cannot be read: ")
    assert str(caught.value).endswith("; restore the file, or run `make check-data`.")
    assert len(cached(tmp_path)) == 2  # of the images before it
