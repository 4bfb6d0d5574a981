"""What all tests share: the sample data, made once, and the real data where it is at hand."""

import os
from pathlib import Path

import pytest

from marsclf import data, sample


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.make_sample(tmp_path_factory.mktemp("data") / "sample")


@pytest.fixture(scope="session")
def sample_dataset(sample_dir: Path) -> data.Dataset:
    return data.load_dataset(sample_dir)


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    folder = os.environ.get("MARSCLF_DATA_DIR")
    if not folder:
        pytest.skip("the real images are not at hand: set MARSCLF_DATA_DIR to test with them")
    return Path(folder)


@pytest.fixture(scope="session")
def small_model():
    """A small classifier's network, which has learnt nothing, but differs from its backbone."""
    import keras

    from marsclf.backbones import build_backbone
    from marsclf.training import build_head, join

    keras.utils.set_random_seed(0)
    model = join(build_backbone("EfficientNetLite0", 64), build_head(1280, 16, 0.4))
    kernel = model.get_layer("top_conv").kernel
    kernel.assign(kernel * 1.01)
    return model


@pytest.fixture(scope="session")
def classifier_path(small_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from marsclf.classifier import save_classifier

    path = tmp_path_factory.mktemp("classifier") / "classifier.npz"
    training = {"preset": "none", "seed": 0, "commit": "unknown", "dataset": "none"}
    save_classifier(
        small_model, path, backbone="EfficientNetLite0", training=training, temperature=0.5
    )
    return path


@pytest.fixture(scope="session")
def classifier(classifier_path: Path, tmp_path_factory: pytest.TempPathFactory):
    from marsclf.classifier import load_classifier

    return load_classifier(classifier_path, tmp_path_factory.mktemp("networks"))
