"""The fast engine gives what Keras gives, is exported once, and gives way where it cannot."""

import itertools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest

from marsclf.data.msl import Dataset
from marsclf.errors import MarsclfError
from marsclf.images.views import decode_rgb, fit_view
from marsclf.networks import engine as inference
from marsclf.networks.backbones import build_backbone
from marsclf.networks.engine import compare, make_predictor, network_digest, predict_each


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
    """A tiny network that has its place in the cache."""
    network = tiny_network()
    make_predictor(network, cache)
    return network


def images(count: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "networks").iterdir())


def forbid(monkeypatch: pytest.MonkeyPatch, network: keras.Model) -> None:
    def export(*_: object, **__: object) -> None:
        raise AssertionError("the network is exported again")

    monkeypatch.setattr(network, "export", export)


def test_openvino_gives_what_keras_gives(sample_dataset: Dataset, tmp_path: Path) -> None:
    network = build_backbone("EfficientNetLite0", 64)
    paths = sample_dataset.index["path"].iloc[::9].head(35)
    views = np.stack([fit_view(decode_rgb(sample_dataset.root / path), 64) for path in paths])
    predict = make_predictor(network, tmp_path)
    for part in (views[:32], views[32:], views[:1]):
        expected = network.predict_on_batch(part)
        assert relative_difference(predict(part), expected) < 1e-4
    first = predict(views[:32])
    predict(views[3:])
    np.testing.assert_array_equal(first, predict(views[:32]))  # not overwritten by another batch
    assert sorted(path.name for path in tmp_path.glob("networks/*/*")) == [
        "network.bin",
        "network.xml",
    ]


def test_equal_networks_have_equal_digests() -> None:
    network = tiny_network()
    assert network_digest(network) == network_digest(tiny_network())
    again = tiny_network()
    again.compile("adam", "mse")
    assert network_digest(network) == network_digest(again)
    digests = {network_digest(n) for n in (network, tiny_network(1), tiny_network(width=4))}
    assert len(digests) == 3
    weights = network.get_weights()
    weights[0][0, 0, 0, 0] += 1e-6
    network.set_weights(weights)
    assert network_digest(network) not in digests


@pytest.mark.parametrize("name", ["EfficientNetB0", "EfficientNetLite0"])
def test_a_backbone_that_is_built_again_has_the_same_digest(name: str) -> None:
    digests = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        digests.append(network_digest(build_backbone(name, 32, weights=None)))
    assert digests[0] == digests[1]


def test_a_network_is_exported_once(
    exported: keras.Model, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = entries(cache)
    again = tiny_network()
    forbid(monkeypatch, again)
    predict = make_predictor(again, cache)
    batch = images(5)
    assert relative_difference(predict(batch), exported.predict_on_batch(batch)) < 1e-4
    assert entries(cache) == before


def test_nobody_is_told_of_an_export(exported: keras.Model, cache: Path) -> None:
    make_predictor(exported, cache)
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"


def test_the_loading_thread_is_the_first_to_use_the_engine(
    exported: keras.Model, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two threads that are the first can, now and then, wait for each other for ever."""
    import openvino

    infer, users = openvino.InferRequest.infer, []

    def noted(*arguments: object) -> object:
        users.append(threading.current_thread())
        return infer(*arguments)

    monkeypatch.setattr(openvino.InferRequest, "infer", noted)
    make_predictor(exported, cache)
    assert users == [threading.main_thread()]


def test_another_network_gets_another_place(exported: keras.Model, cache: Path) -> None:
    before = entries(cache)
    other = tiny_network(seed=1)
    predict = make_predictor(other, cache)
    batch = images(3)
    assert relative_difference(predict(batch), other.predict_on_batch(batch)) < 1e-4
    assert relative_difference(predict(batch), exported.predict_on_batch(batch)) > 1e-2
    assert len(entries(cache)) == len(before) + 1


def test_without_openvino_keras_does_the_work(
    exported: keras.Model, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.warns(UserWarning, match=r"running on Keras, which is slower: .*openvino"):
        predict = make_predictor(exported, cache)
    batch = images(3)
    np.testing.assert_array_equal(predict(batch), exported.predict_on_batch(batch))


def test_a_network_that_openvino_cannot_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network()
    # A folder without a network: the converter's own error.
    monkeypatch.setattr(network, "export", lambda path, **_: path.mkdir(parents=True))
    with pytest.warns(UserWarning, match="running on Keras"):
        predict = make_predictor(network, tmp_path)
    np.testing.assert_array_equal(predict(images(2)), network.predict_on_batch(images(2)))
    assert entries(tmp_path) == []


def test_an_engine_with_other_outputs_is_not_trusted(
    exported: keras.Model, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    saved = next((cache / "networks").iterdir()) / "network.xml"
    wrong = openvino.Core().read_model(saved)
    network = tiny_network(seed=2)
    monkeypatch.setattr(network, "export", lambda path, **_: path.mkdir(parents=True))
    monkeypatch.setattr(openvino, "convert_model", lambda _: wrong)
    with pytest.warns(UserWarning, match=r"OpenVINO's outputs differ from Keras's by \d"):
        predict = make_predictor(network, tmp_path)
    np.testing.assert_array_equal(predict(images(2)), network.predict_on_batch(images(2)))
    assert entries(tmp_path) == []


def test_a_kill_before_the_check_leaves_no_network_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "_check", killed)
    with pytest.raises(KeyboardInterrupt):
        make_predictor(tiny_network(), tmp_path)
    assert entries(tmp_path) == []


def test_threads_may_share_a_predictor(exported: keras.Model, cache: Path) -> None:
    predict = make_predictor(exported, cache)
    batch = images(24)
    expected = predict(batch)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: predict(batch[i : i + 3]), [*range(0, 22, 3)] * 5))
    for part, start in zip(found, [*range(0, 22, 3)] * 5, strict=True):
        np.testing.assert_array_equal(part, expected[start : start + 3])


def test_a_gpu_is_left_to_keras(
    exported: keras.Model, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras.distribution, "list_devices", lambda kind: [f"{kind}:0"])
    monkeypatch.setattr(inference, "_openvino_predictor", None)
    batch = images(2)
    predict = make_predictor(exported, cache)
    np.testing.assert_array_equal(predict(batch), exported.predict_on_batch(batch))


def test_compare_by_a_hand_worked_case() -> None:
    expected = np.array([[3.0, 4.0], [0.0, 10.0]])
    difference, cosine = compare(np.array([[3.0, 4.0], [10.0, 10.0]]), expected)
    assert difference == 1.0  # ten apart, the largest output being ten
    assert cosine == pytest.approx(0.5**0.5)  # 45 degrees


def double(images: np.ndarray) -> np.ndarray:
    return 2 * images


def test_each_item_is_predicted_in_order() -> None:
    def load(item: int) -> np.ndarray:
        time.sleep(0.002 * (item % 5 == 0))  # some take longer, and are overtaken
        return np.array([item])

    found = np.stack(list(predict_each(iter(range(70)), load, double)))
    assert found[:, 0].tolist() == list(range(0, 140, 2))
    assert list(predict_each([], load, double)) == []


def test_items_are_loaded_ahead_but_not_without_bound() -> None:
    begun, lock = [], threading.Lock()

    def load(item: int) -> np.ndarray:
        with lock:
            begun.append(item)
        return np.array([item])

    outputs = predict_each(itertools.count(), load, double)
    for chunk in range(1, 5):
        for _ in range(inference.CHUNK if chunk > 1 else 1):
            next(outputs)
        limit = inference.CHUNK * (inference.cores() + inference.CHUNKS_AHEAD + chunk - 1)
        deadline = time.monotonic() + 5
        while len(begun) < limit and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(begun) == limit
    time.sleep(0.02)
    assert len(begun) == limit
    outputs.close()


def test_a_failing_load_ends_the_outputs() -> None:
    def load(item: int) -> np.ndarray:
        if item == 3 * inference.CHUNK:
            raise MarsclfError("an image is gone")
        return np.array([item])

    outputs = predict_each(range(1000), load, double)
    for item in range(3 * inference.CHUNK):
        assert next(outputs)[0] == 2 * item
    with pytest.raises(MarsclfError, match="an image is gone"):
        next(outputs)


def test_jax_without_a_gpu_raises_what_keras_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(_: str) -> list[str]:
        raise RuntimeError("Unknown backend: 'gpu' requested")

    monkeypatch.setattr(keras.distribution, "list_devices", devices)
    assert not inference.has_gpu()
