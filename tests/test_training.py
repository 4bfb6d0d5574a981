"""Both stages of training: what is drawn, what is kept, what changes, and what a kill costs."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest

from marsclf import files, training
from marsclf.backbones import build_backbone
from marsclf.data import Dataset
from marsclf.errors import MarsclfError
from marsclf.features import view_loader
from marsclf.images import Augmentation
from marsclf.training import BalancedBatches, Schedule, build_head, fine_tune, join, train_head

HEAD = Schedule(
    epochs=4,
    batch_size=30,
    learning_rate=0.01,
    weight_decay=0.001,
    label_smoothing=0.0,
    balance=1.0,
    patience=10,
)
FINETUNE = dataclasses.replace(HEAD, epochs=2, batch_size=8, learning_rate=0.001)
VIEWS = Augmentation(rotation=90, zoom=0.5, flip=True, brightness=0.3)
WIDTH = 8


class Killed(BaseException):
    pass


def toy(count: int = 120, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Features (float16) and labels of four well separated classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4 * 5
    features = rng.normal(0, noise, (count, WIDTH))
    features[np.arange(count), labels // 5] += 4
    return features.astype(np.float16), labels


def train_toy(
    folder: Path, schedule: Schedule = HEAD, seed: int = 0, hidden: int = 16, noise: float = 1.0
) -> tuple[list[dict], list[np.ndarray]]:
    """Train a fresh head; return the history and the weights it ends with."""
    keras.utils.set_random_seed(seed)
    head = build_head(WIDTH, hidden, 0.3)
    history = train_head(head, toy(noise=noise), toy(40, seed=9), schedule, seed, folder)
    return history, head.get_weights()


def assert_equal(found: tuple[list[dict], list], expected: tuple[list[dict], list]) -> None:
    assert found[0] == expected[0]
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(one, other)


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the `call`-th writing of a file, weights or record, be the last deed of the process."""
    calls = []

    def dying(write: Callable) -> Callable:
        def wrapped(*arguments: object) -> None:
            calls.append(1)
            if len(calls) == call:
                raise Killed
            write(*arguments)

        return wrapped

    for name in ("_save_weights", "write_json"):
        monkeypatch.setattr(training, name, dying(getattr(training, name)))


def count_epochs(monkeypatch: pytest.MonkeyPatch) -> list:
    begun, fit = [], keras.Model.fit

    def counting(self: keras.Model, *arguments: object, **options: object) -> object:
        begun.append(1)
        return fit(self, *arguments, **options)

    monkeypatch.setattr(keras.Model, "fit", counting)
    return begun


@pytest.fixture(scope="module")
def head_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("head")


@pytest.fixture(scope="module")
def uninterrupted(head_folder: Path) -> tuple[list[dict], list]:
    return train_toy(head_folder)


def batches(balance: float = 1.0, seed: int = 0, epoch: int = 0, workers: int = 1):
    labels = np.repeat([3, 8, 20], [20, 980, 200])
    schedule = dataclasses.replace(HEAD, balance=balance, batch_size=64)

    def load(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.column_stack([rows, rng.random(len(rows))])

    return BalancedBatches(labels, load, schedule, seed, epoch, workers)


@pytest.mark.parametrize(
    ("balance", "expected"),
    # In proportion to the size, to its root (4.47, 31.3, 14.1), and equal.
    [(0.0, [0.017, 0.817, 0.167]), (0.5, [0.09, 0.627, 0.283]), (1.0, [0.333, 0.333, 0.333])],
)
def test_class_shares(balance: float, expected: list[float]) -> None:
    targets = np.concatenate(
        [
            y
            for epoch in range(5)
            for _, y in map(batches(balance, epoch=epoch).__getitem__, range(19))
        ]
    )
    assert targets.shape == (6000, 25) and targets.dtype == np.float32
    np.testing.assert_allclose(targets.mean(axis=0)[[3, 8, 20]], expected, atol=0.02)
    assert targets.sum() == 6000


def test_batches_hold_the_examples_of_their_targets() -> None:
    sequence = batches()
    assert len(sequence) == 19  # 1,200 examples by 64
    sizes = [len(sequence[i][0]) for i in range(19)]
    assert sizes == [64] * 18 + [48]
    inputs, targets = sequence[4]
    rows = inputs[:, 0].astype(int)
    np.testing.assert_array_equal(
        targets.argmax(axis=1), np.repeat([3, 8, 20], [20, 980, 200])[rows]
    )


def test_equal_seed_and_epoch_give_equal_batches() -> None:
    first, again = batches(), batches(workers=2)
    with ThreadPoolExecutor(4) as pool:
        backwards = list(pool.map(again.__getitem__, reversed(range(19))))[::-1]
    for index, (inputs, targets) in enumerate(backwards):
        np.testing.assert_array_equal(first[index][0], inputs)
        np.testing.assert_array_equal(first[index][1], targets)
    assert (first[0][0][:, 1] != first[1][0][:, 1]).all()
    for other in (batches(seed=1), batches(epoch=1)):
        assert (first[0][0][:, 0] != other[0][0][:, 0]).any()
        assert (first[0][0][:, 1] != other[0][0][:, 1]).all()


def test_head_shapes() -> None:
    linear, deep = build_head(WIDTH, 0, 0.5), build_head(WIDTH, 16, 0.5)
    assert linear.count_params() == (WIDTH + 1) * 25
    assert deep.count_params() == (WIDTH + 1) * 16 + 17 * 25
    probabilities = deep.predict(toy()[0].astype("float32"), verbose=0)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_the_head_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = dataclasses.replace(HEAD, epochs=12, learning_rate=0.05)
    history, _ = train_toy(tmp_path, schedule)
    assert history[-1]["val_accuracy"] > 0.9
    assert history[-1]["val_loss"] < history[0]["val_loss"] / 2
    assert [record["epoch"] for record in history] == list(range(1, 13))
    assert {record["stage"] for record in history} == {"head"}
    names = {"stage", "epoch", "loss", "accuracy", "val_loss", "val_accuracy"}
    assert set(history[0]) == names
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 12
    assert printed[-1].startswith("head epoch 12/12: ")


def overfit(folder: Path, patience: int) -> tuple[list[dict], keras.Model]:
    """Train on clean labels and validate on partly wrong ones: the loss falls, then rises."""
    features, labels = toy(40, seed=9)
    labels[::5] = (labels[::5] + 5) % 20
    keras.utils.set_random_seed(0)
    head = build_head(WIDTH, 16, 0.0)
    schedule = dataclasses.replace(HEAD, epochs=30, learning_rate=0.03, patience=patience)
    return train_head(head, toy(), (features, labels), schedule, 0, folder), head


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    history, head = overfit(tmp_path, patience=3)
    losses = [record["val_loss"] for record in history]
    best = int(np.argmin(losses))
    assert best > 0 and len(losses) == best + 1 + 3 < 30
    features, labels = toy(40, seed=9)
    labels[::5] = (labels[::5] + 5) % 20
    answer = head.predict(features.astype("float32"), verbose=0)[np.arange(40), labels]
    assert -np.log(answer).mean() == pytest.approx(losses[best], abs=1e-5)
    assert losses[-1] > losses[best] + 0.01


def test_a_stage_that_has_ended_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, head = overfit(tmp_path, patience=3)
    begun = count_epochs(monkeypatch)
    again, same = overfit(tmp_path, patience=3)
    assert not begun
    assert_equal((again, same.get_weights()), (stopped, head.get_weights()))


@pytest.mark.parametrize("call", [3, 8])
def test_a_kill_while_a_file_is_written(
    call: int, uninterrupted: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch writes its weights, those of the best epoch if it is that, and the record."""
    with monkeypatch.context() as patch:
        kill_at(patch, call)
        with pytest.raises(Killed):
            train_toy(tmp_path)
    begun = count_epochs(monkeypatch)
    assert_equal(train_toy(tmp_path), uninterrupted)
    whole_epochs = {3: 0, 8: 2}[call]
    assert len(begun) == HEAD.epochs - whole_epochs


def test_sigkill_and_resume(
    uninterrupted: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the third epoch, in another process, whose hashes of texts differ."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_training
from pathlib import Path
from marsclf import training
load = training.BalancedBatches.__getitem__
def dying(self, index):
    if self.seed[1] == 2 and index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return load(self, index)
training.BalancedBatches.__getitem__ = dying
test_training.train_toy(Path({str(tmp_path)!r}))
"""
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    begun = count_epochs(monkeypatch)
    assert_equal(train_toy(tmp_path), uninterrupted)
    assert len(begun) == HEAD.epochs - 2


@pytest.mark.parametrize(
    "changed",
    [
        {"schedule": dataclasses.replace(HEAD, epochs=5)},
        {"seed": 1},
        {"hidden": 15},
        {"noise": 1.1},
    ],
    ids=["epochs", "seed", "head", "features"],
)
def test_another_recipe_starts_anew(
    changed: dict,
    head_folder: Path,
    uninterrupted: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(head_folder, tmp_path, dirs_exist_ok=True)
    begun = count_epochs(monkeypatch)
    assert_equal(train_toy(tmp_path), uninterrupted)
    assert not begun
    history, _ = train_toy(tmp_path, **changed)
    assert len(begun) == len(history) == changed.get("schedule", HEAD).epochs


def test_training_that_diverges(tmp_path: Path) -> None:
    with pytest.raises(MarsclfError, match=r"head diverged in epoch 1: lower its learning rate"):
        train_toy(tmp_path, dataclasses.replace(HEAD, learning_rate=1e30))
    assert not (tmp_path / "head.json").exists()


@pytest.fixture(scope="module")
def backbone() -> keras.Model:
    return build_backbone("EfficientNetLite0", 32)


def test_join_is_flat_and_shares_the_weights(backbone: keras.Model) -> None:
    head = build_head(1280, 4, 0.5)
    model = join(backbone, head)
    assert not any(isinstance(layer, keras.Model) for layer in model.layers)
    assert model.input_shape == (None, 32, 32, 3) and model.output_shape == (None, 25)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    for _ in range(2):
        expected = head.predict_on_batch(backbone.predict_on_batch(images))
        np.testing.assert_allclose(model.predict_on_batch(images), expected, atol=1e-6)
        head.set_weights([weights + 0.1 * weights.std() for weights in head.get_weights()])
        head.layers[-1].bias.assign(np.arange(25) / 10)


def tune(
    dataset: Dataset, folder: Path, views: Augmentation = VIEWS
) -> tuple[tuple[list[dict], list[np.ndarray]], keras.Model, dict[str, np.ndarray]]:
    """Fine-tune a small network on a few images: (history, weights), model, weights before."""
    keras.utils.set_random_seed(0)
    model = join(build_backbone("EfficientNetLite0", 32), build_head(1280, 0, 0.3))
    before = {weights.path: weights.numpy() for weights in model.weights}
    index = dataset.index
    train = index[index["split"] == "train"].iloc[::8].head(24)
    validation = index[index["split"] == "val"].iloc[::8].head(10)
    blocks = ["block6", "top"]
    history = fine_tune(
        model, dataset.root, train, validation, blocks, views, FINETUNE, 0, folder, folder / "cache"
    )
    return (history, model.get_weights()), model, before


@pytest.fixture(scope="module")
def tuned(sample_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("finetune")

    def write_and_copy(path: Path, content: dict) -> None:
        files.write_json(path, content)
        if len(content["history"]) == 1:
            shutil.copytree(folder, folder / "after_one_epoch")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_json", write_and_copy)
        return *tune(sample_dataset, folder), folder


def test_fine_tuning_changes_the_named_blocks_and_the_head_alone(tuned) -> None:
    (history, _), model, before, _ = tuned
    assert [record["epoch"] for record in history] == [1, 2]
    assert {record["stage"] for record in history} == {"finetune"}
    assert all(0 <= record["val_accuracy"] <= 1 for record in history)
    norms = {
        weights.path
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
        for weights in layer.weights
    }
    assert len(norms) == 49 * 4
    assert any(path.startswith("block6") for path in norms)
    for weights in model.weights:
        same = np.array_equal(weights.numpy(), before[weights.path])
        named = weights.path.startswith(("block6", "top_", "head/"))
        assert same != (named and weights.path not in norms), weights.path


def test_the_frozen_part_on_the_engine_learns_as_the_whole_network_does(
    tuned, sample_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nothing is split: the same batches, the same losses but for rounding."""
    monkeypatch.setattr(training, "has_gpu", lambda: True)
    monkeypatch.setattr(training, "make_predictor", None)
    (expected, weights), _, _, _ = tuned
    (history, found), _, _ = tune(sample_dataset, tmp_path)
    for one, other in zip(history, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-3)
    for one, other in zip(found, weights, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-3)


def test_the_best_epoch_is_kept_after_fine_tuning(tuned, sample_dataset: Dataset) -> None:
    (history, _), model, _, _ = tuned
    index = sample_dataset.index
    validation = index[index["split"] == "val"].iloc[::8].head(10)
    load = view_loader(32, VIEWS, 0)
    views = [
        load((sample_dataset.root / row.path, row.sha256, 0)) for row in validation.itertuples()
    ]
    probabilities = model.predict_on_batch(np.stack(views))
    labels = validation["label"].to_numpy()
    # Each class counts the same, however many images it has: the mean of the classes' means.
    losses = -np.log(probabilities[np.arange(10), labels])
    loss = np.mean([losses[labels == label].mean() for label in np.unique(labels)])
    best = min(history, key=lambda record: record["val_loss"])
    assert best["val_loss"] == pytest.approx(loss, abs=2e-3)
    accuracy = np.mean(probabilities.argmax(axis=1) == labels)
    assert best["val_accuracy"] == pytest.approx(accuracy, abs=1e-5)


def test_fine_tuning_goes_on_after_a_kill(
    tuned, sample_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, _, _, folder = tuned
    begun = count_epochs(monkeypatch)
    resumed, _, _ = tune(sample_dataset, folder / "after_one_epoch")
    assert_equal(resumed, finished)
    assert len(begun) == 1


def test_fine_tuning_goes_on_for_the_same_recipe_alone(
    tuned, sample_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(keras.Model, "fit", begin)
    finished, _, _, folder = tuned
    again, _, _ = tune(sample_dataset, folder)
    assert_equal(again, finished)
    with pytest.raises(Killed):
        tune(sample_dataset, folder, dataclasses.replace(VIEWS, zoom=0.6))


def test_an_unknown_block(sample_dataset: Dataset, backbone: keras.Model, tmp_path: Path) -> None:
    model = join(backbone, build_head(1280, 0, 0.3))
    rows = sample_dataset.index.head(4)
    root = sample_dataset.root
    with pytest.raises(MarsclfError, match="no block 'block9'"):
        fine_tune(model, root, rows, rows, ["block9"], VIEWS, FINETUNE, 0, tmp_path, tmp_path)
