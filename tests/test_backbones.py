"""Every backbone by name: shapes, freezing by block, and weights that Keras cannot download."""

import hashlib
import socket
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras.src.applications import efficientnet as keras_efficientnet
from keras.src.backend import config as keras_config
from keras.src.legacy.saving import legacy_h5_format

from marsclf.classify import classifier_file
from marsclf.errors import MarsclfError
from marsclf.networks import backbones
from marsclf.networks.backbones import BLOCKS, build_backbone, fetch_weights
from marsclf.networks.engine import network_digest
from marsclf.training.stages import build_head, join

B0_FILE = "efficientnetb0_notop.h5"
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
NAMES = ("EfficientNetB0", "EfficientNetLite0")


@pytest.fixture(scope="module")
def networks() -> dict[str, keras.Model]:
    """Networks with random weights."""
    keras.utils.set_random_seed(7)
    return {name: build_backbone(name, 64, weights=None) for name in NAMES}


@pytest.fixture(scope="module")
def b0(networks: dict[str, keras.Model]) -> keras.Model:
    return networks["EfficientNetB0"]


@pytest.fixture(scope="module")
def b0_file(b0: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a random B0 in the format of the published files."""
    path = tmp_path_factory.mktemp("published") / B0_FILE
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, b0)
    return path


@pytest.fixture
def keras_models(b0_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Keras cache, a Keras that wants `b0_file`, and no server that has it."""
    monkeypatch.setattr(keras_config, "_KERAS_DIR", str(tmp_path))
    md5 = hashlib.md5(b0_file.read_bytes()).hexdigest()
    monkeypatch.setitem(keras_efficientnet.WEIGHTS_HASHES, "b0", ("", md5))
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed_port = server.getsockname()[1]
    monkeypatch.setenv("no_proxy", "*")
    url = f"http://127.0.0.1:{closed_port}/"
    monkeypatch.setattr(keras_efficientnet, "BASE_WEIGHTS_PATH", url)
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def test_wrong_arguments() -> None:
    with pytest.raises(MarsclfError, match="no backbone 'ResNet50'; choose one of EfficientNetB0"):
        build_backbone("ResNet50")
    with pytest.raises(MarsclfError, match="at least 32 pixels, not 31"):
        build_backbone("EfficientNetB0", (64, 31), weights=None)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_with_weights_belongs_to_a_block(name, networks) -> None:
    model, found = networks[name], []
    for block in BLOCKS:
        backbones.unfreeze_blocks(model, [block])
        found += [w.path for w in model.trainable_weights]
        assert found and all(w.path.startswith(block) for w in model.trainable_weights)
    norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    others = [w.path for layer in model.layers if layer not in norms for w in layer.weights]
    # Keras's Normalization layer keeps its mean, variance and count as fixed weights.
    assert found == [path for path in others if not path.startswith("normalization")]


@pytest.mark.parametrize(
    ("name", "blocks", "shape"),
    [
        ("EfficientNetLite0", ["block1", "block5"], (2, 32, 32, 32)),
        ("EfficientNetB0", ["top", "block4"], (2, 8, 8, 40)),
    ],
)
def test_the_parts_of_a_split_network_give_its_outputs(name, blocks, shape) -> None:
    model = build_backbone(name, 64, weights=None)
    frozen, trained = backbones.split_frozen(model, blocks)
    between = frozen.predict_on_batch(IMAGES)
    assert between.shape == shape
    expected = model.predict_on_batch(IMAGES)
    np.testing.assert_allclose(trained.predict_on_batch(between), expected, atol=1e-6)
    again = build_backbone(name, 64, weights=None)
    again.set_weights(model.get_weights())
    for part, other in zip((frozen, trained), backbones.split_frozen(again, blocks), strict=True):
        assert network_digest(part) == network_digest(other)
    assert backbones.split_frozen(model, []) == (model, None)


def test_a_file_of_weights_is_copied_to_where_keras_looks(keras_models, b0_file, b0) -> None:
    for file in (b0_file, keras_models / B0_FILE):  # the last one is there already
        fetch_weights("EfficientNetB0", file)
    assert [path.name for path in keras_models.iterdir()] == [B0_FILE]
    model = build_backbone("EfficientNetB0", 64)
    # ImageNet weights come with one Rescaling layer more than random weights.
    assert len(model.layers) == len(b0.layers) + 1
    for loaded, written in zip(model.weights, b0.weights, strict=True):
        np.testing.assert_array_equal(loaded.numpy(), written.numpy())
    options = {"include_top": False, "pooling": "avg", "input_shape": (64, 64, 3)}
    keras_own = keras.applications.EfficientNetB0(weights="imagenet", **options)
    expected = keras_own.predict_on_batch(IMAGES)
    np.testing.assert_array_equal(model.predict_on_batch(IMAGES), expected)


def test_a_classifier_file_holds_what_was_trained(keras_models, b0_file, tmp_path) -> None:
    fetch_weights("EfficientNetB0", b0_file)
    build_backbone("EfficientNetB0", 64)  # so that Keras names the layers of the next differently
    model = join(build_backbone("EfficientNetB0", 64), build_head(1280, 4, 0.0, 3))
    kernel = model.get_layer("top_conv").kernel
    kernel.assign(kernel * 1.01)
    file, about = tmp_path / "b0.safetensors", {"preset": "none", "seed": 0, "commit": "none"}
    classifier_file.save_classifier(
        model, file, backbone="EfficientNetB0", classes=["a", "b", "c"], training=about
    )
    weights, metadata, _ = classifier_file.read(file)
    assert metadata["first_learning_block"] == "top"
    loaded, _ = classifier_file.build_network(file, weights, metadata)
    expected = model.predict_on_batch(IMAGES)
    np.testing.assert_allclose(loaded.predict_on_batch(IMAGES), expected, atol=1e-3)


def test_without_the_published_weights_one_sentence_says_what_to_put_where(
    keras_models, b0_file, tmp_path
) -> None:
    (tmp_path / "cut.h5").write_bytes(b0_file.read_bytes()[:1000])
    md5 = keras_efficientnet.WEIGHTS_HASHES["b0"][1]
    for name, reason in (("cut", "does not match the known hash"), ("gone", "No such file")):
        with pytest.raises(MarsclfError, match=rf"(?s){reason}.*get {B0_FILE} \(md5 {md5}\)"):
            fetch_weights("EfficientNetB0", tmp_path / f"{name}.h5")
    with pytest.raises(MarsclfError, match="EfficientNetLite0 takes no file of weights"):
        fetch_weights("EfficientNetLite0", b0_file)
    assert list(keras_models.iterdir()) == []
    wanted = rf"get {B0_FILE} \(md5 {md5}\).* name it with --weights .*\. EfficientNetLite0"
    with pytest.raises(MarsclfError, match=wanted):
        build_backbone("EfficientNetB0", 64)
