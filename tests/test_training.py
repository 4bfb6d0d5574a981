"""Both stages of training: what is drawn, what is kept, what changes, and what a kill costs."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

from marsclf.errors import MarsclfError
from marsclf.networks.backbones import build_backbone
from marsclf.training import stages as training
from marsclf.training.stages import Batches, Schedule, build_head, draw_shares, join, train

HEAD = Schedule(
    epochs=4,
    epoch_size=120,
    batch_size=30,
    learning_rate=0.01,
    weight_decay=0.001,
    label_smoothing=0.0,
    ema=0.0,
    patience=10,
)
AVERAGED = dataclasses.replace(HEAD, ema=0.9)
WIDTH = 8


class Killed(BaseException):
    pass


def toy(
    count: int = 120, seed: int = 0, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and equal shares of four well separated classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4 * 5
    features = rng.normal(0, noise, (count, WIDTH))
    features[np.arange(count), labels // 5] += 4
    return features.astype(np.float32), labels, np.full(count, 1 / count)


def train_toy(
    folder: Path, schedule: Schedule = HEAD, seed: int = 0, hidden: int = 16, noise: float = 1.0
) -> tuple[list[dict], list[np.ndarray]]:
    """Train a fresh head; return the history and the weights it ends with."""
    keras.utils.set_random_seed(seed)
    head = build_head(WIDTH, hidden, 0.3)
    history = train("head", head, toy(noise=noise), toy(40, seed=9), schedule, seed, folder)
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


def batches(balance: float = 1.0, seed: int = 0, epoch: int = 0) -> Batches:
    labels = np.repeat([3, 8, 20], [20, 980, 200])
    shares = draw_shares(labels, np.arange(1200), balance, 0.0)
    schedule = dataclasses.replace(HEAD, batch_size=64, epoch_size=1000)
    return Batches.drawn(np.arange(1200)[:, np.newaxis], labels, shares, schedule, seed, epoch)


@pytest.mark.parametrize(
    ("balance", "expected"),
    # In proportion to the size, to its root (4.47, 31.3, 14.1), and equal.
    [(0.0, [0.017, 0.817, 0.167]), (0.5, [0.09, 0.627, 0.283]), (1.0, [0.333, 0.333, 0.333])],
)
def test_class_shares(balance: float, expected: list[float]) -> None:
    targets = np.concatenate(
        [
            y
            for epoch in range(6)
            for _, y, _ in map(batches(balance, epoch=epoch).__getitem__, range(16))
        ]
    )
    assert targets.shape == (6000, 25) and targets.dtype == np.float32
    np.testing.assert_allclose(targets.mean(axis=0)[[3, 8, 20]], expected, atol=0.02)
    assert targets.sum() == 6000


@pytest.mark.parametrize(
    ("burst_balance", "expected"),
    # Of the class's half: bursts of 9 and 1 as they come, by their roots (3 and 1), and equal.
    [(0.0, [0.45, 0.05]), (0.5, [0.375, 0.125]), (1.0, [0.25, 0.25])],
)
def test_shares_of_bursts_within_a_class(burst_balance: float, expected: list[float]) -> None:
    labels, bursts = np.repeat([3, 8], [10, 40]), np.repeat([0, 1, 2], [9, 1, 40])
    shares = draw_shares(labels, bursts, 1.0, burst_balance)
    found = [shares[bursts == burst].sum() for burst in range(3)]
    np.testing.assert_allclose(found, [*expected, 0.5])
    assert np.ptp(shares[bursts == 0]) < 1e-12  # within a burst all are alike


def test_batches_hold_the_examples_of_their_targets() -> None:
    sequence = batches()
    assert len(sequence) == 16  # 1,000 examples by 64
    sizes = [len(sequence[i][0]) for i in range(16)]
    assert sizes == [64] * 15 + [40]
    inputs, targets, weights = sequence[4]
    labels = np.repeat([3, 8, 20], [20, 980, 200])[inputs[:, 0]]
    np.testing.assert_array_equal(targets.argmax(axis=1), labels)
    assert (weights == 1).all()


def test_equal_seed_and_epoch_give_equal_batches() -> None:
    np.testing.assert_array_equal(batches()[5][0], batches()[5][0])
    for other in (batches(seed=1), batches(epoch=1)):
        assert (batches()[0][0] != other[0][0]).any()


def test_validation_weighs_examples_as_training_draws_them() -> None:
    labels = np.repeat([3, 8], [2, 6])
    shares = draw_shares(labels, labels, 1.0, 1.0)
    schedule = dataclasses.replace(HEAD, batch_size=5)
    sequence = Batches.in_order(np.arange(8)[:, np.newaxis], labels, shares, schedule)
    both = zip(sequence[0], sequence[1], strict=True)
    inputs, targets, weights = (np.concatenate(parts) for parts in both)
    assert inputs[:, 0].tolist() == list(range(8))
    np.testing.assert_array_equal(targets.argmax(axis=1), labels)
    np.testing.assert_allclose(weights, [2, 2] + [2 / 3] * 6)


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
    features, labels, shares = toy(40, seed=9)
    labels[::5] = (labels[::5] + 5) % 20
    keras.utils.set_random_seed(0)
    head = build_head(WIDTH, 16, 0.0)
    schedule = dataclasses.replace(HEAD, epochs=30, learning_rate=0.03, patience=patience)
    return train("head", head, toy(), (features, labels, shares), schedule, 0, folder), head


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    history, head = overfit(tmp_path, patience=3)
    losses = [record["val_loss"] for record in history]
    best = int(np.argmin(losses))
    assert best > 0 and len(losses) == best + 1 + 3 < 30
    features, labels, _ = toy(40, seed=9)
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


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"epochs": 0}, "epochs is 0; it must be above 0"),
        ({"learning_rate": -0.1}, "learning_rate is -0.1; it must be above 0"),
        ({"ema": 1.0}, "finetune_ema is 1.0; it must be from 0 to below 1"),
        ({"ema": -0.1}, "finetune_ema is -0.1; it must be from 0 to below 1"),
    ],
)
def test_schedules_that_cannot_be(changed: dict, reason: str) -> None:
    with pytest.raises(MarsclfError, match=reason):
        dataclasses.replace(HEAD, **changed)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_averaged_weights_are_kept(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, fit = [], keras.Model.fit
    plain = dataclasses.replace(HEAD, accumulate=accumulate)

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, *_: object, **__: object) -> None:
            steps.append(self.model.get_weights())

    def watched(model: keras.Model, batches: Batches, callbacks: list, **options: object) -> object:
        return fit(model, batches, callbacks=[*callbacks, Watch()], **options)

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "fit", watched)
        train_toy(tmp_path / "plain", plain)
    averaged = dataclasses.replace(AVERAGED, accumulate=accumulate)
    history, weights = train_toy(tmp_path / "averaged", averaged)
    assert len(steps) == 16 and np.argmin([record["val_loss"] for record in history]) == 3
    # Where two batches make a step, each counts so much that both together count as one step does.
    average, share = steps[accumulate - 1], 0.9 ** (1 / accumulate)
    for step in steps[accumulate:]:
        both = zip(average, step, strict=True)
        average = [share * old + (1 - share) * new for old, new in both]
    for found, expected, last in zip(weights, average, steps[-1], strict=True):
        if found.dtype == np.float32:  # others are the states of dropout
            np.testing.assert_allclose(found, expected, atol=1e-6)
            assert np.abs(found - last).max() > 1e-3


@pytest.mark.parametrize("schedule", [HEAD, AVERAGED], ids=["newest", "averaged"])
@pytest.mark.parametrize("call", [3, 8])
def test_a_kill_while_a_file_is_written(
    call: int,
    schedule: Schedule,
    uninterrupted: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An epoch writes its weights, those of the best epoch if it is that, and the record."""
    expected = train_toy(tmp_path / "whole", schedule) if schedule.ema else uninterrupted
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill_at(patch, call)
        with pytest.raises(Killed):
            train_toy(killed, schedule)
    begun = count_epochs(monkeypatch)
    assert_equal(train_toy(killed, schedule), expected)
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
from marsclf.training import stages as training
drawn = training.Batches.drawn
def dying(*arguments, **options):
    if 2 in (*arguments[5:], *options.values()):
        os.kill(os.getpid(), signal.SIGKILL)
    return drawn(*arguments, **options)
training.Batches.drawn = dying
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


def test_gradients_of_small_batches_add_up_to_those_of_a_large_one() -> None:
    weights = {}
    for batch_size, accumulate in ((40, 1), (20, 2)):
        keras.utils.set_random_seed(0)
        head = build_head(WIDTH, 16, 0.0)
        schedule = dataclasses.replace(HEAD, batch_size=batch_size, accumulate=accumulate)
        # A rate that hardly falls: it is looked up for each batch, whole step or not.
        training.compile_stage(head, schedule, 10**6)
        batches = Batches.drawn(*toy(), schedule, seed=0, epoch=0)
        head.fit(batches, shuffle=False, verbose=0)
        weights[accumulate] = head.get_weights()
    for one, other in zip(weights[1], weights[2], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_what_has_accumulated_survives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four batches an epoch, three to a step: each epoch ends within one.
    schedule = dataclasses.replace(HEAD, accumulate=3)
    expected = train_toy(tmp_path / "whole", schedule)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            train_toy(tmp_path / "killed", schedule)
    assert_equal(train_toy(tmp_path / "killed", schedule), expected)
