"""The engine's outputs are Keras's; a network is exported once; Keras predicts where it must."""

import errno
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import keras
import numpy as np
import pytest

from marsclf.errors import MarsclfError
from marsclf.networks import engine
from marsclf.networks.engine import make_predictor, network_digest, predict_each, stored_predictor

IMAGES = np.random.default_rng(1).integers(0, 256, (24, 16, 16, 3), np.uint8)


def tiny_network(seed: int = 0, width: int = 8) -> keras.Model:
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((16, 16, 3), name="image")
    x = keras.layers.Rescaling(1 / 128, -1, name="scale")(pixels)
    x = keras.layers.Conv2D(width, 3, strides=2, activation="relu6", name="conv")(x)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def exported(cache: Path) -> keras.Model:
    """A tiny network whose export is in the cache."""
    network = tiny_network()
    make_predictor(network, cache)
    return network


def check_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "networks").iterdir())


def test_equal_networks_have_equal_digests() -> None:
    network, again = tiny_network(), tiny_network()
    again.compile("adam", "mse")
    assert network_digest(network) == network_digest(again)
    digests = {network_digest(n) for n in (network, tiny_network(1), tiny_network(width=4))}
    assert len(digests) == 3
    weights = network.get_weights()
    weights[0][0, 0, 0, 0] += 1e-6
    network.set_weights(weights)
    assert network_digest(network) not in digests


def test_a_network_is_exported_once_and_then_needs_no_keras(exported, cache, monkeypatch) -> None:
    before = entries(cache)
    again = tiny_network()
    monkeypatch.setattr(engine, "_save_openvino", lambda *_: pytest.fail("it is exported again"))
    expected = exported.predict_on_batch(IMAGES)
    predict = make_predictor(again, cache)
    first = predict(IMAGES)
    check_equal(predict(IMAGES[:1]), expected[:1])
    check_equal(first, expected)  # not overwritten by another batch
    assert entries(cache) == before
    check_equal(stored_predictor(before[0], cache)(IMAGES), expected)
    assert stored_predictor("another", cache) is None


def test_a_damaged_export_is_replaced(exported: keras.Model, tmp_path: Path) -> None:
    damaged = tmp_path / "networks" / "mine" / "network.xml"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("<net")
    assert stored_predictor("mine", tmp_path) is None
    predict = make_predictor(exported, tmp_path, name="mine")
    check_equal(predict(IMAGES), exported.predict_on_batch(IMAGES))
    assert stored_predictor("mine", tmp_path) is not None


def test_without_openvino_keras_predicts(exported, cache, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.warns(UserWarning, match=r"predicting with Keras, which is slower: .*openvino"):
        predict = make_predictor(exported, cache)
    np.testing.assert_array_equal(predict(IMAGES), exported.predict_on_batch(IMAGES))


def test_keras_predicts_where_openvino_gives_other_outputs(
    exported: keras.Model, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    other = openvino.Core().read_model(next(cache.glob("networks/*/network.xml")))
    monkeypatch.setattr(openvino, "convert_model", lambda _: other)
    network = tiny_network(seed=2)
    with pytest.warns(UserWarning, match=r"OpenVINO's outputs differ from Keras's by \d"):
        predict = make_predictor(network, tmp_path)
    np.testing.assert_array_equal(predict(IMAGES), network.predict_on_batch(IMAGES))
    assert entries(tmp_path) == []


def test_another_process_may_export_the_same_network(tmp_path, monkeypatch) -> None:
    replace, network = engine.replace_atomically, tiny_network()

    @contextmanager
    def fail_after_the_other(path: Path) -> Iterator[Path]:
        with replace(path) as folder:
            yield folder
        raise OSError(errno.ENOTEMPTY, "the other has put its folder there")

    monkeypatch.setattr(engine, "replace_atomically", fail_after_the_other)
    check_equal(make_predictor(network, tmp_path)(IMAGES), network.predict_on_batch(IMAGES))


def test_threads_may_share_a_predictor(exported: keras.Model, cache: Path) -> None:
    predict = make_predictor(exported, cache)
    expected, starts = predict(IMAGES), [*range(0, 22, 3)] * 5
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: predict(IMAGES[i : i + 3]), starts))
    for part, start in zip(found, starts, strict=True):
        np.testing.assert_array_equal(part, expected[start : start + 3])


def test_on_a_gpu_keras_predicts(exported, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engine, "gpu_capability", lambda: (8, 0))
    predict = make_predictor(exported, tmp_path)
    np.testing.assert_array_equal(predict(IMAGES), exported.predict_on_batch(IMAGES))
    assert not (tmp_path / "networks").exists()


def double(images: np.ndarray) -> np.ndarray:
    return 2 * images


def test_each_item_is_predicted_in_order_up_to_one_that_fails() -> None:
    def load(item: int) -> np.ndarray:
        time.sleep(0.002 * (item % 5 == 0))  # some take longer and are overtaken
        if item == 4 * engine.CHUNK:
            raise MarsclfError("an image is missing")
        return np.array([item])

    outputs, number = predict_each(itertools.count(), load, double), 4 * engine.CHUNK
    found = np.stack(list(islice(outputs, number)))
    assert found[:, 0].tolist() == list(range(0, 2 * number, 2))
    with pytest.raises(MarsclfError, match="an image is missing"):
        next(outputs)
    assert list(predict_each([], load, double)) == []


def test_items_are_loaded_ahead_within_a_bound() -> None:
    begun, lock = [], threading.Lock()

    def load(item: int) -> np.ndarray:
        with lock:
            begun.append(item)
        return np.array([item])

    outputs = predict_each(itertools.count(), load, double)
    next(outputs)
    limit = engine.CHUNK * (engine.cores() + engine.CHUNKS_AHEAD)
    deadline = time.monotonic() + 5
    while len(begun) < limit and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(begun) == limit
    outputs.close()
