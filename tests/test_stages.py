"""Both stages of training: what batches hold, which epoch is kept, and what a kill costs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from marsclf import files
from marsclf.errors import MarsclfError
from marsclf.networks.backbones import build_backbone
from marsclf.training import stages
from marsclf.training.stages import (
    Batches,
    Checkpoints,
    Examples,
    RandomBatches,
    build_head,
    class_weights,
    compile_model,
    draw_shares,
    join,
)

WIDTH, EPOCHS = 8, 4
# Four batches per epoch, three per step: each epoch ends in the middle of a step.
AVERAGED = {"ema": 0.9, "accumulate": 3}


class Killed(BaseException):
    pass


def toy(count: int = 120, seed: int = 0) -> Examples:
    """Return examples of four well separated classes, drawn equally often."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4 * 5
    features = rng.normal(0, 1, (count, WIDTH))
    features[np.arange(count), labels // 5] += 4
    return Examples(features.astype(np.float32), labels, np.full(count, 1 / count))


def prepare(
    cache: Path,
    train: Examples | None = None,
    validation: Examples | None = None,
    epochs: int = EPOCHS,
    patience: int = 10,
    seed: int = 0,
    batch_size: int = 30,
    hidden: int = 16,
    dropout: float = 0.3,
    learning_rate: float = 0.03,
    **compiled: float,
) -> tuple[keras.Model, Checkpoints]:
    """Return a compiled head and its checkpoints, ready to be resumed."""
    keras.utils.set_random_seed(0)
    head = build_head(WIDTH, hidden, dropout)
    batches = RandomBatches(train or toy(), batch_size, 120, seed)
    options = {"weight_decay": 0.001, "label_smoothing": 0.0} | compiled
    compile_model(head, learning_rate, epochs * len(batches), **options)
    check = Batches(validation or toy(40, seed=9), batch_size)
    return head, Checkpoints("head", batches, check, epochs, patience, cache)


def fit(
    cache: Path, *callbacks: keras.callbacks.Callback, **options: object
) -> tuple[int, list[dict], list[np.ndarray]]:
    """Train a head; return the epochs that were skipped, the history and the final weights."""
    head, kept = prepare(cache, **options)
    skipped = kept.resume(head)
    head.fit(
        kept.batches,
        validation_data=kept.validation,
        initial_epoch=skipped,
        epochs=kept.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[kept, *callbacks],
    )
    return skipped, kept.history, head.get_weights()


def assert_same(found: tuple[int, list, list], expected: tuple[int, list, list]) -> None:
    assert found[1] == expected[1]
    for one, other in zip(found[2], expected[2], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(cache: Path) -> tuple[tuple, tuple]:
    return fit(cache), fit(cache, **AVERAGED)


def batches(balance: float = 1.0, seed: int = 0, epoch: int = 0) -> RandomBatches:
    """Return random batches of 64 out of 20, 980 and 200 views of three classes."""
    rows = pd.DataFrame({"label": [3, 8, 20], "sequence": ["a", "a", "b"]})
    counts = np.array([20, 980, 200])
    shares = draw_shares(rows, counts, balance, 0.0)
    examples = Examples(
        np.arange(1200)[:, np.newaxis], rows["label"].to_numpy().repeat(counts), shares
    )
    drawn = RandomBatches(examples, 64, 1000, seed)
    drawn.draw(epoch)
    return drawn


@pytest.mark.parametrize(
    ("balance", "expected"),
    # In proportion to the size, to its root (4.47, 31.3, 14.1), and equal.
    [(0.0, [0.017, 0.817, 0.167]), (0.5, [0.09, 0.627, 0.283]), (1.0, [0.333, 0.333, 0.333])],
)
def test_class_shares(balance: float, expected: list[float]) -> None:
    epochs = [batches(balance, epoch=epoch) for epoch in range(6)]
    targets = np.concatenate([epoch[i][1] for epoch in epochs for i in range(len(epoch))])
    assert targets.shape == (6000, 25) and targets.sum() == 6000
    np.testing.assert_allclose(targets.mean(axis=0)[[3, 8, 20]], expected, atol=0.02)


@pytest.mark.parametrize(
    ("burst_balance", "expected"),
    # Of the class's half: bursts of 9 and 1 views in proportion, by their roots, and equal.
    [(0.0, [0.45, 0.05]), (0.5, [0.375, 0.125]), (1.0, [0.25, 0.25])],
)
def test_burst_shares_within_a_class(burst_balance: float, expected: list[float]) -> None:
    rows = pd.DataFrame({"label": [3, 3, 3, 8], "sequence": ["a", "a", "b", "a"]})
    shares = draw_shares(rows, np.array([4, 5, 1, 40]), 1.0, burst_balance)
    found = [shares[:9].sum(), shares[9], shares[10:].sum()]
    np.testing.assert_allclose(found, [*expected, 0.5])
    assert np.ptp(shares[:9]) < 1e-12  # all views of a burst are drawn equally often


def test_random_batches() -> None:
    drawn = batches()
    assert [len(drawn[i][0]) for i in range(len(drawn))] == [64] * 15 + [40]
    features, targets, weights = drawn[4]
    labels = np.repeat([3, 8, 20], [20, 980, 200])[features[:, 0]]
    np.testing.assert_array_equal(targets.argmax(axis=1), labels)
    assert (weights == 1).all()
    np.testing.assert_array_equal(batches()[5][0], batches()[5][0])
    for other in (batches(seed=1), batches(epoch=1)):
        assert (drawn[0][0] != other[0][0]).any()


def test_validation_weights_equal_the_shares_of_training() -> None:
    labels = np.repeat([3, 8], [2, 6])
    shares = np.repeat([1 / 4, 1 / 12], [2, 6])
    sequence = Batches(Examples(np.arange(8)[:, np.newaxis], labels, shares), 5)
    both = zip(sequence[0], sequence[1], strict=True)
    features, targets, weights = (np.concatenate(parts) for parts in both)
    assert len(sequence) == 2 and features[:, 0].tolist() == list(range(8))
    np.testing.assert_array_equal(targets.argmax(axis=1), labels)
    np.testing.assert_allclose(weights, [2, 2] + [2 / 3] * 6)
    weights = class_weights(labels)
    assert weights[labels == 3].sum() == pytest.approx(weights[labels == 8].sum())


@pytest.mark.parametrize(("hidden", "count"), [(0, 9 * 25), (16, 9 * 16 + 17 * 25)])
def test_head(hidden: int, count: int) -> None:
    head = build_head(WIDTH, hidden, 0.5)
    assert head.count_params() == count
    probabilities = head.predict_on_batch(toy().features)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_join_is_flat_and_shares_the_weights() -> None:
    backbone, head = build_backbone("EfficientNetLite0", 32), build_head(1280, 4, 0.5)
    model = join(backbone, head)
    assert not any(isinstance(layer, keras.Model) for layer in model.layers)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    for _ in range(2):
        expected = head.predict_on_batch(backbone.predict_on_batch(images))
        np.testing.assert_allclose(model.predict_on_batch(images), expected, atol=1e-6)
        head.set_weights([weights + 0.1 * weights.std() for weights in head.get_weights()])
        head.layers[-1].bias.assign(np.arange(25) / 10)


def test_the_head_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, read = set(), RandomBatches.__getitem__
    monkeypatch.setattr(
        RandomBatches, "__getitem__", lambda self, i: drawn.add(tuple(self.rows)) or read(self, i)
    )
    _, history, _ = fit(tmp_path, epochs=12)
    assert len(drawn) == 12  # every epoch draws its own examples
    assert [(record["stage"], record["epoch"]) for record in history] == [
        ("head", epoch) for epoch in range(1, 13)
    ]
    assert history[-1]["val_accuracy"] > 0.9
    assert history[-1]["val_loss"] < history[0]["val_loss"] / 2
    assert set(history[0]) - {"stage", "epoch"} == {"loss", "accuracy", "val_loss", "val_accuracy"}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 12 and printed[-1].startswith("head epoch 12/12: ")


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    """The training labels are right, some validation labels wrong: the loss falls, then rises."""
    validation = toy(40, seed=9)
    validation.labels[::5] = (validation.labels[::5] + 5) % 20
    options = {"validation": validation, "epochs": 30, "patience": 3, "dropout": 0.0}
    stopped = fit(tmp_path, **options)
    losses = [record["val_loss"] for record in stopped[1]]
    best = int(np.argmin(losses))
    assert best > 0 and len(losses) == best + 1 + 3 < 30
    assert losses[-1] > losses[best] + 0.01
    head, _ = prepare(tmp_path, **options)
    head.set_weights(stopped[2])
    right = head.predict_on_batch(validation.features)[np.arange(40), validation.labels]
    assert -np.log(right).mean() == pytest.approx(losses[best], abs=1e-5)
    again = fit(tmp_path, **options)
    assert again[0] == 30  # no epoch is left
    assert_same(again, stopped)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_of_the_steps_is_kept(accumulate: int, tmp_path: Path) -> None:
    batches_seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, *_: object, **__: object) -> None:
            batches_seen.append(self.model.get_weights())

    _, history, weights = fit(tmp_path, Watch(), ema=0.9, accumulate=accumulate)
    best = 1 + int(np.argmin([record["val_loss"] for record in history]))
    assert len(batches_seen) == 4 * EPOCHS
    steps = batches_seen[: 4 * best]
    # Where two batches make a step, both together count as much as one step does.
    average, share = steps[accumulate - 1], 0.9 ** (1 / accumulate)
    for step in steps[accumulate:]:
        average = [share * a + (1 - share) * b for a, b in zip(average, step, strict=True)]
    for found, expected, last in zip(weights, average, steps[-1], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.abs(found - last).max() > 1e-3


def test_gradients_of_small_batches_add_up_to_those_of_a_large_one() -> None:
    weights = {}
    for batch_size, accumulate in ((40, 1), (20, 2)):
        # A learning rate that hardly falls: Keras reads it for every batch.
        head, kept = prepare(
            Path(), batch_size=batch_size, accumulate=accumulate, dropout=0.0, epochs=10**6
        )
        head.fit(kept.batches, shuffle=False, verbose=0)
        weights[accumulate] = head.get_weights()
    for one, other in zip(weights[1], weights[2], strict=True):
        np.testing.assert_allclose(one, other, atol=5e-4)


def die_in_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Kill the training in the `number`-th file that it writes, before the file gets its name."""
    left = iter(range(number - 1))

    @contextmanager
    def dying(path: Path, replace_atomically=files.replace_atomically) -> Iterator[Path]:
        with replace_atomically(path) as temporary:
            yield temporary
            if next(left, None) is None:
                raise Killed

    for module in (files, stages):
        monkeypatch.setattr(module, "replace_atomically", dying)


@pytest.mark.parametrize("options", [{}, AVERAGED])
def test_a_training_that_is_killed_again_and_again(
    options: dict, uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An epoch writes its weights, then the record. The n-th run dies in its n-th file.
    for run in (1, 2, 3, 4):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_in_write(patch, run)
            fit(tmp_path, **options)
    resumed = fit(tmp_path, **options)
    assert resumed[0] == 2
    assert_same(resumed, uninterrupted[bool(options)])
    names = [path.name for path in (tmp_path / "training").rglob("*") if path.is_file()]
    assert len(names) == 2 and "progress.json" in names  # and the weights of the best epoch


def test_a_process_that_is_killed_while_it_writes(uninterrupted, tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import keras, test_stages
from pathlib import Path
save, calls = keras.Model.save_weights, []
def save_half(model, path):
    calls.append(path)
    if len(calls) < 3:
        return save(model, path)
    path.write_bytes(b"half")
    print("half is written", flush=True)
    time.sleep(600)
keras.Model.save_weights = save_half
test_stages.fit(Path({str(tmp_path)!r}), **test_stages.AVERAGED)
"""
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        lines = iter(child.stdout.readline, "")
        assert any(line == "half is written\n" for line in lines)
        child.kill()
    resumed = fit(tmp_path, **AVERAGED)
    assert resumed[0] == 2
    assert_same(resumed, uninterrupted[1])


def is_new(cache: Path, **changed: object) -> bool:
    """Tell whether a training starts from its first epoch, although `cache` holds another one."""
    head, kept = prepare(cache)
    assert kept.resume(head) == EPOCHS and len(kept.history) == EPOCHS
    head, kept = prepare(cache, **changed)
    return (kept.resume(head), kept.history) == (0, [])


@pytest.mark.parametrize(
    "changed",
    [{"epochs": 5}, {"patience": 9}, {"seed": 1}, {"batch_size": 31}, {"hidden": 15}]
    + [{"dropout": 0.2}, {"learning_rate": 0.02}, {"weight_decay": 0.01}, {"label_smoothing": 0.1}]
    + [{"ema": 0.8}, {"accumulate": 2}, {"train": toy()._replace(shares=np.eye(120)[0])}],
)
def test_other_settings_start_a_new_training(changed: dict, cache: Path, uninterrupted) -> None:
    assert is_new(cache, **changed)


@pytest.mark.parametrize("row", [0, 20, -1])
@pytest.mark.parametrize("part", ["features", "labels"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_any_changed_example_starts_a_new_training(
    split: str, part: str, row: int, cache: Path, uninterrupted
) -> None:
    examples = {"train": toy(), "validation": toy(40, seed=9)}[split]
    getattr(examples, part)[row] += 1
    assert is_new(cache, **{split: examples})


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    message = "The loss of stage head is not finite in epoch 1: lower head_learning_rate."
    with pytest.raises(MarsclfError) as caught:
        fit(tmp_path, learning_rate=1e30)
    assert str(caught.value) == message
    assert not list(tmp_path.rglob("*.json"))
