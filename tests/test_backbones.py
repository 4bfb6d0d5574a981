"""Every backbone by name: shapes, freezing by block, and weights that Keras cannot fetch."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras.src.applications import efficientnet as keras_efficientnet
from keras.src.backend import config as keras_config
from keras.src.legacy.saving import legacy_h5_format

from marsclf.errors import MarsclfError
from marsclf.networks import backbones
from marsclf.networks.backbones import (
    BLOCKS,
    SPECS,
    build_backbone,
    install_weights,
    unfreeze_blocks,
)
from marsclf.networks.engine import network_digest

B0_FILE = "efficientnetb0_notop.h5"
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def b7() -> keras.Model:
    return build_backbone("EfficientNetB7", 64, weights=None)


@pytest.fixture(scope="module")
def b0() -> keras.Model:
    keras.utils.set_random_seed(7)
    return build_backbone("EfficientNetB0", 64, weights=None)


@pytest.fixture(scope="module")
def lite2() -> keras.Model:
    return build_backbone("EfficientNetLite2", 64, weights=None)


@pytest.fixture(scope="module")
def b0_file(b0: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a random B0 in the format of the published files."""
    path = tmp_path_factory.mktemp("published") / B0_FILE
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, b0)
    return path


@pytest.fixture
def keras_models(b0_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Keras cache, a Keras that wants `b0_file`, and a server that is not there."""
    monkeypatch.setattr(keras_config, "_KERAS_DIR", str(tmp_path))
    md5 = hashlib.md5(b0_file.read_bytes()).hexdigest()
    monkeypatch.setitem(keras_efficientnet.WEIGHTS_HASHES, "b0", ("", md5))
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed_port = server.getsockname()[1]
    _point_keras_to(closed_port, monkeypatch)
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def serve(keras_models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """A function that starts a loopback server with a handler, and points Keras to it."""
    servers = []

    def start(handler: type[BaseHTTPRequestHandler] | partial) -> None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        _point_keras_to(server.server_port, monkeypatch)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_specs_are_those_of_the_networks() -> None:
    sizes = {name: spec.input_size for name, spec in SPECS.items()}
    b_sizes = (224, 240, 260, 300, 380, 456, 528, 600)
    assert sizes == {f"EfficientNetB{i}": s for i, s in enumerate(b_sizes)} | {
        f"EfficientNetLite{i}": s for i, s in enumerate((224, 240, 260))
    }


@pytest.mark.parametrize("name", ["EfficientNetB0", "EfficientNetB2", "EfficientNetLite0"])
def test_shapes_of_input_and_output(name: str) -> None:
    spec = SPECS[name]
    model = build_backbone(name, weights=None)
    assert model.input_shape == (None, spec.input_size, spec.input_size, 3)
    assert model.output_shape == (None, spec.feature_width)


def test_an_image_that_is_not_square_and_bytes_as_input() -> None:
    model = build_backbone("EfficientNetLite0", (49, 64))
    images = IMAGES[:, :49].astype(np.uint8)
    features = model.predict(images, verbose=0)
    assert features.shape == (2, 1280)
    np.testing.assert_array_equal(features, model.predict(images.astype(np.float32), verbose=0))


def test_wrong_arguments() -> None:
    with pytest.raises(MarsclfError, match="no backbone 'ResNet50'; choose one of EfficientNetB0"):
        build_backbone("ResNet50")
    with pytest.raises(MarsclfError, match="at least 32 pixels, not 31"):
        build_backbone("EfficientNetB0", (64, 31), weights=None)
    with pytest.raises(MarsclfError, match='"imagenet" or None'):
        build_backbone("EfficientNetB0", weights="b0.h5")


def test_b7_is_the_network_of_the_paper(b7: keras.Model) -> None:
    assert len(b7.layers) == 814  # 813 of Keras without its top, and the pooling
    assert b7.count_params() == 64_097_687
    assert b7.output_shape == (None, 2560)


@pytest.mark.parametrize("name", ["EfficientNetB7", "EfficientNetB0", "EfficientNetLite2"])
def test_every_layer_with_weights_belongs_to_a_block(
    name: str, b7: keras.Model, b0: keras.Model, lite2: keras.Model
) -> None:
    model = {"EfficientNetB7": b7, "EfficientNetB0": b0, "EfficientNetLite2": lite2}[name]
    seen = set()
    for block in BLOCKS:
        unfreeze_blocks(model, [block])
        weights = {w.path for w in model.trainable_weights}
        assert weights and all(path.startswith(block) for path in weights)
        assert not weights & seen
        seen |= weights
    unfreeze_blocks(model, BLOCKS)
    assert {w.path for w in model.trainable_weights} == seen
    is_norm = [isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers]
    norms = [layer for layer, norm in zip(model.layers, is_norm, strict=True) if norm]
    assert (
        len(norms) == {"EfficientNetB7": 163, "EfficientNetB0": 49, "EfficientNetLite2": 64}[name]
    )
    assert not any(norm.trainable for norm in norms)
    others = [w for layer in model.layers if layer not in norms for w in layer.weights]
    # Keras' Normalization layer keeps its mean, variance and count as fixed weights.
    assert len(seen) == len([w for w in others if not w.path.startswith("normalization")])


def test_an_unknown_block(b0: keras.Model) -> None:
    with pytest.raises(MarsclfError, match="no block 'block8' .* stem, block1, .* block7, top"):
        unfreeze_blocks(b0, ["top", "block8"])


@pytest.mark.parametrize("name", ["EfficientNetB7", "EfficientNetB0", "EfficientNetLite2"])
def test_one_training_step_of_each_stage(
    name: str, b7: keras.Model, b0: keras.Model, lite2: keras.Model
) -> None:
    backbone = {"EfficientNetB7": b7, "EfficientNetB0": b0, "EfficientNetLite2": lite2}[name]
    x = keras.layers.BatchNormalization(name="head_bn")(backbone.output)
    x = keras.layers.Dense(25, activation="softmax", name="head")(x)
    model = keras.Model(backbone.input, x)
    model.trainable = False
    for blocks in ((), ("block7", "top")):
        unfreeze_blocks(model, blocks)
        model.compile(
            keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy", run_eagerly=True
        )
        before = {w.path: w.numpy() for w in model.weights}
        loss = model.train_on_batch(IMAGES, np.array([3, 24]))
        assert np.isfinite(loss)
        changed = {w.path for w in model.weights if (w.numpy() != before[w.path]).any()}
        head = {path for path in before if path.startswith("head")}
        convolutions = {p for p in before if p.startswith(blocks) and "bn/" not in p}
        assert {p for p in changed if not p.startswith("head")} <= (
            convolutions if blocks else set()
        )
        assert changed & head
        if blocks:
            assert {path.partition("_")[0] for path in changed} >= {"block7a", "top"}


def test_weights_in_the_cache_of_keras_are_used(
    keras_models: Path, b0_file: Path, b0: keras.Model
) -> None:
    (keras_models / B0_FILE).write_bytes(b0_file.read_bytes())
    model = build_backbone("EfficientNetB0", 64)
    # "imagenet" has one Rescaling layer more than random weights have.
    assert len(model.layers) == len(b0.layers) + 1
    for loaded, written in zip(model.weights, b0.weights, strict=True):
        np.testing.assert_array_equal(loaded.numpy(), written.numpy())


def test_without_network_one_sentence_says_what_to_put_where(keras_models: Path) -> None:
    with pytest.raises(MarsclfError) as caught:
        build_backbone("EfficientNetB0", 64)
    md5 = keras_efficientnet.WEIGHTS_HASHES["b0"][1]
    sentence = str(caught.value)
    assert f"get {B0_FILE} (md5 {md5})" in sentence
    assert f"put it at {keras_models / B0_FILE}. EfficientNetLite0" in sentence


def test_the_sentence_for_b7_names_the_published_file(keras_models: Path) -> None:
    sentence = r"get efficientnetb7_notop.h5 \(md5 cbcfe4450ddf6f3ad90b1b398090fe4a\)"
    with pytest.raises(MarsclfError, match=sentence):
        build_backbone("EfficientNetB7")


def test_a_file_of_weights_is_put_where_keras_looks(
    keras_models: Path, b0_file: Path, b0: keras.Model, tmp_path: Path
) -> None:
    mine = tmp_path / "my weights.h5"
    mine.write_bytes(b0_file.read_bytes())
    for _ in range(2):  # the second time it is there already
        assert install_weights("EfficientNetB0", mine) == keras_models / B0_FILE
    assert install_weights("EfficientNetB0", keras_models / B0_FILE) == keras_models / B0_FILE
    assert [path.name for path in keras_models.iterdir()] == [B0_FILE]
    # The extra Rescaling of "imagenet" is there.
    assert len(build_backbone("EfficientNetB0", 64).layers) == len(b0.layers) + 1


def test_a_file_of_weights_that_is_not_the_published_one(
    keras_models: Path, b0_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b0_file.read_bytes()
    files = {name: tmp_path / f"{name}.h5" for name in ("cut", "other", "text", "top", "top2")}
    files["cut"].write_bytes(content[: len(content) // 2])
    files["text"].write_text("<html>404</html>")
    for name, layer in (("other", "stem_conv"), ("top", "predictions"), ("top2", "x")):
        with h5py.File(files[name], "w") as file:
            file.create_group(layer)
    wanted = keras_efficientnet.WEIGHTS_HASHES["b0"][1]
    top = hashlib.md5(files["top2"].read_bytes()).hexdigest()
    monkeypatch.setitem(keras_efficientnet.WEIGHTS_HASHES, "b0", (top, wanted))
    reasons = {"cut": "cut off or damaged", "other": "another md5", "text": "not an HDF5 file"}
    reasons |= {"top": "without top", "top2": "without top", "gone": "cannot be read"}
    for name, reason in reasons.items():
        with pytest.raises(MarsclfError, match=f"{reason}.*{B0_FILE}, md5 {wanted}"):
            install_weights("EfficientNetB0", files.get(name, tmp_path / "gone.h5"))
    assert list(keras_models.iterdir()) == []


def test_a_backbone_without_a_file_of_weights(b0_file: Path) -> None:
    for name in ("EfficientNetLite0", "Inception"):
        with pytest.raises(MarsclfError, match=f"{name} takes no file of weights"):
            install_weights(name, b0_file)


def test_a_damaged_file_in_the_cache_is_named_and_kept(keras_models: Path) -> None:
    (keras_models / B0_FILE).write_bytes(b"half of it")
    with pytest.raises(MarsclfError, match="the file found there has another md5"):
        build_backbone("EfficientNetB0", 64)
    assert (keras_models / B0_FILE).read_bytes() == b"half of it"


def test_a_damaged_file_is_replaced_where_there_is_a_network(
    keras_models: Path, b0_file: Path, b0: keras.Model, serve, capsys: pytest.CaptureFixture
) -> None:
    (keras_models / B0_FILE).write_bytes(b"half of it")
    serve(partial(_Quiet, directory=str(b0_file.parent)))
    model = build_backbone("EfficientNetB0", 64)
    assert (keras_models / B0_FILE).read_bytes() == b0_file.read_bytes()
    np.testing.assert_array_equal(model.weights[-1].numpy(), b0.weights[-1].numpy())
    capsys.readouterr()


def test_a_server_that_sends_something_else(serve, keras_models: Path, tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / B0_FILE).write_text("<html>please log in</html>")
    serve(partial(_Quiet, directory=str(tmp_path / "www")))
    with pytest.raises(MarsclfError, match="hash does not match"):
        build_backbone("EfficientNetB0", 64)


def test_a_server_that_never_answers(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "SECONDS_TO_ANSWER", 0.3)
    serve(_Silent)
    start = time.monotonic()
    with pytest.raises(MarsclfError, match="does not answer"):
        build_backbone("EfficientNetB0", 64)
    assert time.monotonic() - start < 3


def _point_keras_to(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(keras_efficientnet, "BASE_WEIGHTS_PATH", f"http://127.0.0.1:{port}/")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


class _Silent(_Quiet):
    def do_HEAD(self) -> None:
        time.sleep(1)


@pytest.mark.parametrize(
    ("name", "blocks", "shape"),
    [
        ("EfficientNetLite0", ["block1", "block5"], (32, 32, 32)),
        ("EfficientNetLite0", ["top", "block4"], (8, 8, 40)),
        ("EfficientNetLite0", ["top"], (2, 2, 320)),
        ("EfficientNetB0", ["top", "block4"], (8, 8, 40)),
    ],
)
def test_the_parts_of_a_split_network_are_the_whole(
    name: str, blocks: list[str], shape: tuple[int, ...]
) -> None:
    model = build_backbone(name, 64, weights=None)
    frozen, learning = backbones.split_frozen(model, blocks)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    between = frozen.predict_on_batch(images)
    assert between.shape == (2, *shape)
    expected = model.predict_on_batch(images)
    np.testing.assert_allclose(learning.predict_on_batch(between), expected, atol=1e-6)
    assert not {layer.name for layer in learning.layers if layer.name.startswith("stem")}
    again = build_backbone(name, 64, weights=None)
    again.set_weights(model.get_weights())
    for part, other in zip((frozen, learning), backbones.split_frozen(again, blocks), strict=True):
        assert network_digest(part) == network_digest(other)


@pytest.mark.parametrize("name", ["EfficientNetB0", "EfficientNetLite0"])
def test_where_the_stem_learns_only_the_scaling_is_split_off(name: str) -> None:
    model = build_backbone(name, 32, weights=None)
    frozen, learning = backbones.split_frozen(model, ["block7", "stem"])
    assert frozen.output_shape == (None, 32, 32, 3)
    assert len(learning.layers) > 100 and not frozen.trainable_weights
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    found = learning.predict_on_batch(frozen.predict_on_batch(images))
    np.testing.assert_allclose(found, model.predict_on_batch(images), atol=1e-6)


def test_where_nothing_learns_there_is_no_second_part() -> None:
    model = build_backbone("EfficientNetLite0", 32, weights=None)
    assert backbones.split_frozen(model, []) == (model, None)
