"""The stages of transfer learning: a head on a frozen network's features, then blocks of it too.

Each stage draws its batches balanced over classes and bursts, stops early on validation, keeps the
best epoch, and goes on after a kill exactly where the last whole epoch ended. Validation is judged
as training is drawn, on random views weighted alike: whole images of the commonest two classes are
solved in the first epoch and tell later ones apart by chance.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from marsclf.data.msl import NUM_CLASSES
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, sha256_of, write_json
from marsclf.networks.engine import network_digest
from marsclf.training.features import Features

History = list[dict]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one stage learns.

    Attributes:
        epochs: at most so many.
        epoch_size: views drawn an epoch.
        batch_size: examples a step.
        learning_rate: of AdamW at the start; it falls to zero along a cosine.
        weight_decay: of AdamW.
        label_smoothing: share of the probability spread over all classes (0-1).
        ema: what is judged and kept are weights averaged over the steps, the average before
            counting by this, the newest weights by the rest (Polyak and Juditsky 1992); 0 not
            averaged.
        patience: epochs without a lower validation loss before the stage ends.
        accumulate: batches whose mean gradient makes one step; several where memory has no room
            for one large batch.
    """

    epochs: int
    epoch_size: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    ema: float
    patience: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        positive = ("epochs", "epoch_size", "batch_size", "learning_rate", "patience", "accumulate")
        for name in positive:
            if getattr(self, name) <= 0:
                raise MarsclfError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.ema < 1:
            raise MarsclfError(f"finetune_ema is {self.ema}; it must be from 0 to below 1")


def build_head(width: int, hidden: int, dropout: float) -> keras.Model:
    """Return an untrained head: features (n, width) to probabilities (n, 25).

    With `hidden` = 0 it is linear, else it has one hidden layer of that many units.
    """
    layers = keras.layers
    stack = [layers.Input((width,), name="features"), layers.Dropout(dropout, name="head_dropout")]
    if hidden:
        stack += [
            layers.Dense(hidden, activation="relu", name="head_hidden"),
            layers.Dropout(dropout, name="head_hidden_dropout"),
        ]
    stack.append(layers.Dense(NUM_CLASSES, activation="softmax", name="probabilities"))
    return keras.Sequential(stack, name="head")


def join(backbone: keras.Model, head: keras.Model) -> keras.Model:
    """Return one flat model, images to probabilities, that shares both parts' weights."""
    tensor = backbone.output
    for layer in head.layers:
        tensor = layer(tensor)
    return keras.Model(backbone.input, tensor, name=f"{backbone.name}_classifier")


def train(
    stage: str,
    model: keras.Model,
    seen: tuple[Features, np.ndarray, np.ndarray],
    validation: tuple[Features, np.ndarray, np.ndarray],
    schedule: Schedule,
    seed: int,
    folder: Path,
) -> History:
    """Train epoch by epoch, each ending in a checkpoint; the best epoch's weights stay.

    Args:
        stage: its name, in the history and the checkpoints' names.
        model: features (n, ...) to probabilities (n, 25); what of it may learn is trainable.
        seen, validation: features of views (n, ...), their labels 0-24 (n,), and how often each
            is to be drawn, or how much it counts (n,), as from `draw_shares`.
        schedule: how long and how fast.
        seed: of what is drawn, and of dropout.
        folder: of the checkpoints; an equal stage that was killed goes on from them.

    Returns:
        A record an epoch: stage, epoch, and loss and accuracy of both sides.
    """
    evaluation = Batches.in_order(*validation, schedule)
    first = Batches.drawn(*seen, schedule, seed, epoch=0)
    keras.utils.set_random_seed(seed)
    compile_stage(model, schedule, schedule.epochs * len(first))
    model.optimizer.build(model.trainable_variables)
    # What the run depends on, as far as a batch of each side shows it: only an equal one goes on.
    recipe = sha256_of(
        network_digest(model).encode(),
        repr((schedule, seed, len(first))).encode(),
        *(shares.tobytes() for _, _, shares in (seen, validation)),
        np.ascontiguousarray(first[0][0]),
        np.ascontiguousarray(evaluation[0][0]),
    )
    progress, best = folder / f"{stage}.json", folder / f"{stage}.best.weights.h5"
    # Two names in turn: the record in `progress` never points to a file that is being replaced.
    latest = [folder / f"{stage}.{turn}.weights.h5" for turn in ("even", "odd")]
    state = json.loads(progress.read_text()) if progress.exists() else {}
    if state.get("recipe") == recipe:
        model.load_weights(latest[len(state["history"]) % 2])
    else:
        state = {"recipe": recipe, "history": []}
    history = state["history"]
    while len(history) < schedule.epochs and not _is_stale(history, schedule.patience):
        epoch = len(history)
        _reseed_dropout(model, seed, epoch)
        now = latest[(epoch + 1) % 2]
        keep = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda *_, path=now: _save_weights(model, path)
        )
        batches = Batches.drawn(*seen, schedule, seed, epoch)
        logs = model.fit(batches, shuffle=False, verbose=0, callbacks=[keep]).history
        # Where weights are averaged, `fit` has by now put the averages in the place of those in
        # `now`, from which training goes on.
        judged = model.evaluate(evaluation, verbose=0, return_dict=True)
        logs |= {f"val_{name}": [value] for name, value in judged.items()}
        numbers = {name: round(values[0], 6) for name, values in logs.items()}
        if not math.isfinite(numbers["val_loss"]):
            raise MarsclfError(
                f"{stage} diverged in epoch {epoch + 1}: lower its learning rate, now "
                f"{schedule.learning_rate}"
            )
        history.append({"stage": stage, "epoch": epoch + 1} | numbers)
        if _best_epoch(history) == epoch:
            _save_weights(model, best)
        if schedule.ema:
            model.load_weights(now)
        write_json(progress, state)
        print(
            f"{stage} epoch {epoch + 1}/{schedule.epochs}: "
            + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()),
            flush=True,
        )
    model.load_weights(best)
    return history


def compile_stage(model: keras.Model, schedule: Schedule, steps: int) -> None:
    """Compile a model for a stage of so many steps."""
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(schedule.learning_rate, steps),
            weight_decay=schedule.weight_decay,
            use_ema=schedule.ema > 0,
            # Keras averages after every batch, also where several make one step.
            ema_momentum=schedule.ema ** (1 / schedule.accumulate),
            gradient_accumulation_steps=schedule.accumulate if schedule.accumulate > 1 else None,
        ),
        keras.losses.CategoricalCrossentropy(label_smoothing=schedule.label_smoothing),
        metrics=["accuracy"],
        # XLA makes TensorFlow's depthwise convolutions twenty times slower on a CPU.
        jit_compile=keras.backend.backend() == "jax",
    )


def class_weights(labels: np.ndarray, balance: float) -> np.ndarray:
    """Return a weight an example (n,): the size of its class to the power of -balance."""
    return np.bincount(labels, minlength=NUM_CLASSES)[labels] ** -float(balance)


def draw_shares(
    labels: np.ndarray, bursts: np.ndarray, balance: float, burst_balance: float
) -> np.ndarray:
    """Return how often each example is to be drawn (n,), as shares that add up to 1.

    Args:
        labels: 0-24 (n,).
        bursts: numbers of the bursts that the examples come from (n,): images of one thing within
            minutes, of which many tell little more than one. Examples of two classes are of two
            bursts.
        balance: a class of so many examples gets a share of size**(1 - balance): 0 as they come,
            1 all classes alike.
        burst_balance: likewise for the bursts of a class.
    """
    within = np.bincount(bursts)[bursts] ** -float(burst_balance)
    within /= np.bincount(labels, weights=within)[labels]
    shares = within * np.bincount(labels)[labels] ** (1 - float(balance))
    return shares / shares.sum()


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Return labels 0-24 (n,) as float32 (n, 25)."""
    return np.eye(NUM_CLASSES, dtype="float32")[labels]


class Batches(keras.utils.PyDataset):
    """Batches of features (n, ...), targets (n, 25) and weights (n,), read when asked for."""

    def __init__(
        self,
        features: Features,
        labels: np.ndarray,
        rows: np.ndarray,
        weights: np.ndarray,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.features, self.labels, self.batch_size = features, labels, batch_size
        self.rows, self.weights = rows, weights

    @classmethod
    def drawn(
        cls,
        features: Features,
        labels: np.ndarray,
        shares: np.ndarray,
        schedule: Schedule,
        seed: int,
        epoch: int,
    ) -> "Batches":
        """One epoch, drawn with replacement by shares that add up to 1.

        Equal seed and epoch give equal batches.
        """
        rng = np.random.default_rng((seed, epoch))
        rows = rng.choice(len(labels), schedule.epoch_size, p=shares)
        return cls(features, labels, rows, np.ones(len(labels)), schedule.batch_size)

    @classmethod
    def in_order(
        cls, features: Features, labels: np.ndarray, shares: np.ndarray, schedule: Schedule
    ) -> "Batches":
        """All views once, each weighing what it is drawn in `drawn`: 1 on average."""
        rows = np.arange(len(labels))
        return cls(features, labels, rows, shares / shares.mean(), schedule.batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = self.rows[index * self.batch_size : (index + 1) * self.batch_size]
        return self.features[rows], one_hot(self.labels[rows]), self.weights[rows]


def _reseed_dropout(model: keras.Model, seed: int, epoch: int) -> None:
    """Checkpoints do not hold the state of dropout, so every epoch starts it anew."""
    states = [v for v in model.non_trainable_variables if "seed_generator" in v.path]
    for number, state in enumerate(states):
        state.assign(np.array([hash((seed, epoch, number)) % 2**31, 0]))


def _best_epoch(history: History) -> int:
    return int(np.argmin([record["val_loss"] for record in history]))


def _is_stale(history: History, patience: int) -> bool:
    return bool(history) and len(history) - 1 - _best_epoch(history) >= patience


def _save_weights(model: keras.Model, path: Path) -> None:
    with replace_atomically(path) as temporary:
        model.save_weights(temporary)
