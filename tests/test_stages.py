"""Both stages of training: what batches hold, which epoch is kept, and what a kill costs."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from marsclf import files, paths
from marsclf.errors import MarsclfError
from marsclf.training import checkpoints, sampling, stages
from marsclf.training.batches import Batches, Examples, RandomBatches
from marsclf.training.checkpoints import Checkpoints
from marsclf.training.stages import build_head

EPOCHS = 4
AVERAGED = {"ema": 0.9}


class Killed(BaseException):
    pass


def toy(count: int = 120, seed: int = 0) -> Examples:
    """Return examples (8 features) of four well separated classes, drawn equally often."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4 * 5
    features = rng.normal(0, 1, (count, 8))
    features[np.arange(count), labels // 5] += 4
    return Examples(features.astype(np.float32), labels, np.full(count, 1 / count), 25)


def prepare(cache: Path, **changed: object) -> tuple[keras.Model, Checkpoints]:
    """Return a compiled head and its checkpoints, and set the cache."""
    paths.CACHE = cache
    defaults = {"train": toy(), "validation": toy(40, seed=9), "batch_size": 30, "hidden": 16}
    defaults |= {"dropout": 0.3, "epochs": EPOCHS, "patience": 10, "seed": 0}
    compiled = {"learning_rate": 0.03, "weight_decay": 0.001, "label_smoothing": 0.0}
    for name, value in changed.items():
        (defaults if name in defaults else compiled)[name] = value
    train, validation, batch_size, hidden, dropout, epochs, patience, seed = defaults.values()
    keras.utils.set_random_seed(0)
    head = build_head(8, hidden, dropout, 25)
    batches = RandomBatches(train, batch_size, 120, seed)
    stages.compile_model(head, steps=epochs * len(batches), **compiled)
    check = Batches(validation, batch_size)
    return head, Checkpoints("head", batches, check, epochs, patience)


def fit(cache: Path, *callbacks: keras.callbacks.Callback, **changed: object) -> tuple:
    """Train a head; return the number of skipped epochs, the history and the final weights."""
    head, kept = prepare(cache, **changed)
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


def assert_same(found: tuple, expected: tuple, skipped: int) -> None:
    assert found[:2] == (skipped, expected[1])
    assert all(map(np.array_equal, found[2], expected[2]))


def log_loss(weights: list[np.ndarray], examples: Examples) -> float:
    head, _ = prepare(Path())
    head.set_weights(weights)
    rows = np.arange(len(examples.labels))
    return -np.log(head.predict_on_batch(examples.features)[rows, examples.labels]).mean()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = paths.CACHE
    yield tmp_path_factory.mktemp("cache")
    paths.CACHE = before


@pytest.fixture(scope="module")
def uninterrupted(cache: Path) -> tuple:
    return fit(cache, **AVERAGED)


@pytest.mark.parametrize(
    ("balance", "burst_balance", "expected"),
    # Classes of 10 and 40 views by their sizes, their roots, and equally; then the bursts of the
    # first class, of 9 views and of 1, likewise.
    [(0, 0, [0.18, 0.02, 0.8]), (0.5, 0, [0.3, 0.1 / 3, 2 / 3]), (1, 0, [0.45, 0.05, 0.5])]
    + [(1, 0.5, [0.375, 0.125, 0.5]), (1, 1, [0.25, 0.25, 0.5])],
)
def test_shares_of_classes_and_bursts(balance: float, burst_balance: float, expected: list) -> None:
    rows = pd.DataFrame({"label": [3, 3, 3, 8], "sequence": ["a", "a", "b", "a"]})
    shares = sampling.draw_shares(rows, np.array([4, 5, 1, 40]), balance, burst_balance)
    found = [shares[:9].sum(), shares[9], shares[10:].sum()]
    np.testing.assert_allclose(found, expected)
    assert np.ptp(shares[:9]) < 1e-12  # all views of a burst are drawn equally often


def test_random_batches() -> None:
    labels = np.repeat([3, 8, 20], [20, 980, 200])
    shares = np.repeat([0.2 / 20, 0.5 / 980, 0.3 / 200], [20, 980, 200])
    examples = Examples(np.arange(1200)[:, np.newaxis], labels, shares, 25)
    drawn = RandomBatches(examples, 64, 6000, seed=0)
    assert [len(drawn[i][0]) for i in range(len(drawn))] == [64] * 93 + [48]
    features, targets, weights = (np.concatenate(part) for part in zip(*drawn, strict=True))
    np.testing.assert_array_equal(targets.argmax(axis=1), labels[features[:, 0]])
    np.testing.assert_allclose(targets.mean(axis=0)[[3, 8, 20]], [0.2, 0.5, 0.3], atol=0.02)
    assert targets.sum() == weights.sum() == 6000
    same, other = RandomBatches(examples, 64, 6000, seed=0), RandomBatches(examples, 64, 6000, 1)
    np.testing.assert_array_equal(drawn[5][0], same[5][0])
    same.draw(epoch=1)
    assert (drawn[5][0] != same[5][0]).any() and (drawn[5][0] != other[5][0]).any()


def test_the_head_learns(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, read = set(), RandomBatches.__getitem__
    monkeypatch.setattr(
        RandomBatches, "__getitem__", lambda self, i: drawn.add(tuple(self.rows)) or read(self, i)
    )
    _, history, _ = fit(tmp_path, epochs=12)
    assert len(drawn) == 12  # every epoch draws its own examples
    assert [record["epoch"] for record in history] == list(range(1, 13))
    assert history[-1]["val_accuracy"] > 0.9
    assert history[-1]["val_loss"] < history[0]["val_loss"] / 2
    assert set(history[0]) == {"stage", "epoch", "loss", "accuracy", "val_loss", "val_accuracy"}
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
    assert 0 < best == len(losses) - 4 and losses[-1] > losses[best] + 0.01
    assert log_loss(stopped[2], validation) == pytest.approx(losses[best], abs=1e-5)
    assert_same(fit(tmp_path, **options), stopped, skipped=30)  # it is not trained again


def test_the_average_of_the_steps_is_kept(tmp_path: Path) -> None:
    class Watch(keras.callbacks.Callback):
        weights = []

        def on_train_batch_end(self, *_: object, **__: object) -> None:
            self.weights.append(self.model.get_weights())

    Watch.weights.clear()
    _, history, weights = fit(tmp_path, Watch(), **AVERAGED)
    best = min(history, key=lambda record: record["val_loss"])
    assert best["val_loss"] == pytest.approx(log_loss(weights, toy(40, seed=9)), abs=1e-5)
    steps = Watch.weights[: 4 * best["epoch"]]
    average = steps[0]
    for step in steps[1:]:
        average = [0.9 * a + 0.1 * b for a, b in zip(average, step, strict=True)]
    for found, expected, last in zip(weights, average, steps[-1], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.abs(found - last).max() > 1e-3


def die_in_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Kill the training in the `number`-th file that it writes, before the file gets its name."""
    left = iter(range(number - 1))

    @contextmanager
    def dying(path: Path, replace_atomically=files.replace_atomically) -> Iterator[Path]:
        with replace_atomically(path) as temporary:
            yield temporary
            if next(left, None) is None:
                raise Killed

    for module in (files, checkpoints):
        monkeypatch.setattr(module, "replace_atomically", dying)


def test_a_training_that_is_killed_again_and_again(uninterrupted, tmp_path, monkeypatch) -> None:
    # An epoch writes its weights, then the record. The n-th run dies in its n-th file.
    for run in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_in_write(patch, run)
            fit(tmp_path, **AVERAGED)
    assert_same(fit(tmp_path, **AVERAGED), uninterrupted, skipped=1)


def test_any_change_starts_a_new_training(cache: Path, uninterrupted) -> None:
    head, kept = prepare(cache, **AVERAGED)
    assert kept.resume(head) == EPOCHS  # no change: nothing is left to do
    changes = [{"epochs": 5}, {"patience": 9}, {"seed": 1}, {"batch_size": 31}, {"hidden": 15}]
    changes += [{"dropout": 0.2}, {"learning_rate": 0.02}, {"weight_decay": 0.01}, {"ema": 0.8}]
    changes += [{"label_smoothing": 0.1}, {"train": toy()._replace(shares=np.eye(120)[0])}]
    for part, row in itertools.product(("features", "labels"), (0, -1)):
        for split, other in (("train", toy()), ("validation", toy(40, seed=9))):
            getattr(other, part)[row] += 1
            changes.append({split: other})
    for changed in changes:
        head, kept = prepare(cache, **(AVERAGED | changed))
        assert (kept.resume(head), kept.history) == (0, []), changed


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    message = r"^The loss of stage head is not finite in epoch 1: lower head_learning_rate\.$"
    with pytest.raises(MarsclfError, match=message):
        fit(tmp_path, learning_rate=1e30)
    assert not list(tmp_path.rglob("*.json"))
