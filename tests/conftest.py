"""What all tests share: the sample data, made once, and the real data if it is available."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock
from PIL import Image
from tiny_project import CLASSES, SMALL, environment_of

import marsclf
from marsclf import paths
from marsclf.classify.table import Row, table
from marsclf.data import sample
from marsclf.data.dataset import Dataset
from marsclf.data.open import load_dataset

# The slow files, the longest first, so that no process ends long before another.
LONG = ("notebooks", "train_classifier", "train", "bench", "jupyterlab", "backbones", "run")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slow files."""
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written into the cache of the project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is the same for all processes of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def sample_dir(shared: Path) -> Path:
    with FileLock(shared / "sample.lock"):
        return sample.make_sample(shared / "sample")


@pytest.fixture(scope="session")
def sample_dataset(sample_dir: Path) -> Dataset:
    return load_dataset(sample_dir)


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    folder = os.environ.get("MARSCLF_DATA_DIR")
    if not folder:
        pytest.skip("the real images are not available: set MARSCLF_DATA_DIR to test with them")
    return Path(folder)


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    """Keras itself computes features, because to export a network takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "marsclf.training.features.make_predictor",
            lambda network, *_: lambda batch: network(batch, training=False).numpy(),
        )
        yield


@pytest.fixture(scope="session")
def small_model():
    """The network of a small classifier: untrained, but different from its backbone."""
    import keras

    from marsclf.networks.backbones import build_backbone
    from marsclf.training.stages import build_head, join

    keras.utils.set_random_seed(0)
    model = join(build_backbone("EfficientNetLite0", 64), build_head(1280, 16, 0.4, len(CLASSES)))
    kernel = model.get_layer("top_conv").kernel
    kernel.assign(kernel * 1.01)
    return model


@pytest.fixture(scope="session")
def classifier_path(small_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from marsclf.classify.classifier_file import save_classifier

    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    training = {"preset": "none", "seed": 0, "commit": "unknown", "dataset": "none"}
    options = {"backbone": "EfficientNetLite0", "zooms": [1.0], "temperature": 0.5}
    save_classifier(small_model, path, classes=CLASSES, training=training, **options)
    return path


@pytest.fixture(scope="session")
def prepared(shared: Path) -> Path:
    """The cache that holds the exported networks of classifiers, which take long to export."""
    return shared / "prepared"


@pytest.fixture(scope="session")
def classifier(classifier_path: Path, prepared: Path):
    from marsclf.classify.classifier import load_classifier

    return load_classifier(classifier_path, prepared)


@pytest.fixture(scope="session")
def project(shared: Path) -> Path:
    """A copy of the project's code, so that nothing is written into the project itself."""
    root = shared / "project"
    without = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    with FileLock(shared / "project.lock"):
        examples = paths.PROJECT_ROOT / "examples"
        for folder in (Path(marsclf.__file__).parent, paths.NOTEBOOKS, paths.PRESETS, examples):
            if not (root / folder.name).exists():
                shutil.copytree(folder, root / folder.name, ignore=without)
    return root


@pytest.fixture(scope="session")
def smoke_run(project: Path, shared: Path, sample_dir: Path) -> tuple[Path, str]:
    """The folder of a run of the preset `smoke`, and what the command printed."""
    command = [sys.executable, "-m", "marsclf", "run", "--preset", "smoke"]
    command += ["--data-dir", str(sample_dir), "--set", *SMALL]
    options = {"cwd": project, "env": environment_of(project), "capture_output": True}
    printed = shared / "printed.txt"
    with FileLock(shared / "run.lock"):
        if not printed.exists():
            ended = subprocess.run(command, text=True, **options)
            assert ended.returncode == 0, ended.stderr
            printed.write_text(ended.stdout)
    return project / "runs" / "smoke", printed.read_text()


@pytest.fixture(scope="module")  # not longer: its event loop would disturb other tests
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as started:
        if found is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: install Debian's `chromium`")
        # Root, as in a container, has no sandbox.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        yield started.chromium.launch(executable_path=found, args=arguments)


@pytest.fixture
def classified(tmp_path: Path) -> pd.DataFrame:
    """Predictions for two images, one that is gone since, and one that could not be read."""
    for name in ("a", "b"):
        Image.new("RGB", (1500, 900), "brown").save(tmp_path / f"{name}.png")
    return table(
        [
            Row(str(tmp_path / "a.png"), "wheel", 0.95, "ground", 0.01, False, 0.9, False),
            Row(str(tmp_path / "b.png"), "wheel", 0.35, "ground", 0.3, True, 0.2, True),
            Row(str(tmp_path / "gone.png"), "ground", 0.6, "wheel", 0.3, True, 0.6, False),
            Row(str(tmp_path / "broken.png"), error="the file is empty"),
        ]
    )
