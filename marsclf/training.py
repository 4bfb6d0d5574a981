"""The two stages of transfer learning: a head on cached features, then blocks of the backbone.

Both stages draw their batches class-balanced, stop early on validation, keep the best epoch, and
go on after a kill exactly where the last whole epoch ended. Validation is judged as training is
drawn, on random views with the classes weighted alike: whole images of the commonest two classes
are solved in the first epoch and tell later ones apart by chance.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from marsclf.backbones import split_frozen, unfreeze_blocks
from marsclf.data import NUM_CLASSES
from marsclf.errors import MarsclfError
from marsclf.features import embed_views, view_loader
from marsclf.files import replace_atomically, sha256_of, write_json
from marsclf.images import Augmentation, decode_rgb, random_view
from marsclf.inference import has_gpu, make_predictor, network_digest
from marsclf.paths import CACHE

History = list[dict]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one stage learns.

    Attributes:
        epochs: at most so many; one epoch draws as many examples as the stage has.
        batch_size: examples a step.
        learning_rate: of AdamW at the start; it falls to zero along a cosine.
        weight_decay: of AdamW.
        label_smoothing: share of the probability spread over all classes (0-1).
        balance: classes are drawn in proportion to size**(1 - balance): 0 as they come, 1 equally.
        patience: epochs without a lower validation loss before the stage ends.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    balance: float
    patience: int

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "patience"):
            if getattr(self, name) <= 0:
                raise MarsclfError(f"{name} is {getattr(self, name)}; it must be above 0")


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


def train_head(
    head: keras.Model,
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    schedule: Schedule,
    seed: int,
    folder: Path,
) -> History:
    """Train a head on views' features (n, width) and labels (n,); the best epoch's weights stay."""
    features, labels = train

    def batches(epoch: int) -> keras.utils.PyDataset:
        return BalancedBatches(
            labels, lambda rows, _: features[rows].astype("float32"), schedule, seed, epoch
        )

    seen, val_labels = validation
    evaluation = (seen.astype("float32"), *_targets_and_weights(val_labels, schedule))
    return _fit("head", head, batches, evaluation, schedule, seed, folder)


def fine_tune(
    model: keras.Model,
    root: Path,
    train: pd.DataFrame,
    validation: pd.DataFrame,
    blocks: list[str],
    augmentation: Augmentation,
    schedule: Schedule,
    seed: int,
    folder: Path,
    cache: Path = CACHE,
) -> History:
    """Train the named blocks and the head of a joined model on random views of the images.

    On a processor the blocks before the first that learns run on the inference engine, and only
    what follows them on Keras.

    Args:
        model: images to probabilities, from `join`; it ends with its best epoch's weights.
        root: folder that the paths in `train` and `validation` count from.
        train, validation: parts of a data set's index.
        blocks: names of the backbone's blocks that learn; BatchNorm stays frozen everywhere.
        augmentation: how far the random views differ from the images.
        schedule, seed, folder: as for `train_head`.
        cache: where the frozen part and what it sees in the validation images are kept.
    """
    unfreeze_blocks(model, blocks)
    frozen, learning = (None, model) if has_gpu() else split_frozen(model, blocks)
    see = make_predictor(frozen, cache) if frozen else np.asarray
    size = model.input_shape[1]

    paths = [root / path for path in train["path"]]

    def views(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        images = (decode_rgb(paths[row]) for row in rows)
        return see(np.stack([random_view(image, size, augmentation, rng) for image in images]))

    def batches(epoch: int) -> keras.utils.PyDataset:
        # Never one worker: it is a thread of TensorFlow's, whose small stack the engine overflows.
        return BalancedBatches(train["label"].to_numpy(), views, schedule, seed, epoch, workers=2)

    if frozen:  # then what it sees in the same views need not be computed every epoch
        once = np.ones(len(validation), int)
        seen = embed_views(root, validation, once, frozen, augmentation, seed, cache)
        targets, weights = _targets_and_weights(validation["label"].to_numpy(), schedule)
        evaluation = (seen.astype("float32"), targets, weights)
    else:
        evaluation = FixedViews(root, validation, size, augmentation, schedule, seed)
    return _fit("finetune", learning, batches, evaluation, schedule, seed, folder)


def compile_stage(model: keras.Model, schedule: Schedule, steps: int) -> None:
    """Compile a model for a stage of so many steps."""
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(schedule.learning_rate, steps),
            weight_decay=schedule.weight_decay,
        ),
        keras.losses.CategoricalCrossentropy(label_smoothing=schedule.label_smoothing),
        metrics=["accuracy"],
        # XLA makes TensorFlow's depthwise convolutions twenty times slower on a CPU.
        jit_compile=keras.backend.backend() == "jax",
    )


def _targets_and_weights(labels: np.ndarray, schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """Return targets (n, 25) and weights (n,), 1 on average: classes count as in training."""
    weights = class_weights(labels, schedule.balance)
    return one_hot(labels), weights / weights.mean()


def class_weights(labels: np.ndarray, balance: float) -> np.ndarray:
    """Return a weight an example (n,): the size of its class to the power of -balance."""
    return np.bincount(labels, minlength=NUM_CLASSES)[labels] ** -float(balance)


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Return labels 0-24 (n,) as float32 (n, 25)."""
    return np.eye(NUM_CLASSES, dtype="float32")[labels]


class BalancedBatches(keras.utils.PyDataset):
    """One epoch of batches drawn with replacement, rare classes more often than they come.

    `load(rows, rng)` gives the inputs of the examples with those row numbers. Equal seed and epoch
    give equal batches, in whatever order and by however many threads they are made.
    """

    def __init__(
        self,
        labels: np.ndarray,
        load: Callable[[np.ndarray, np.random.Generator], np.ndarray],
        schedule: Schedule,
        seed: int,
        epoch: int,
        workers: int = 1,
    ) -> None:
        super().__init__(workers=workers)
        self.targets, self.load, self.schedule = one_hot(labels), load, schedule
        self.seed = (seed, epoch)
        weights = class_weights(labels, schedule.balance)
        rng = np.random.default_rng(self.seed)
        self.rows = rng.choice(len(labels), len(labels), p=weights / weights.sum())

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.schedule.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.schedule.batch_size
        rows = self.rows[index * size : (index + 1) * size]
        return self.load(rows, np.random.default_rng((*self.seed, index))), self.targets[rows]


class FixedViews(keras.utils.PyDataset):
    """Batches of one random view an image, in order, with targets and weights: always the same."""

    def __init__(
        self,
        root: Path,
        table: pd.DataFrame,
        size: int,
        augmentation: Augmentation,
        schedule: Schedule,
        seed: int,
    ) -> None:
        super().__init__(workers=2)
        self.views = [
            (root / path, sha, 0) for path, sha in zip(table["path"], table["sha256"], strict=True)
        ]
        self.load, self.batch_size = view_loader(size, augmentation, seed), schedule.batch_size
        self.targets, self.weights = _targets_and_weights(table["label"].to_numpy(), schedule)

    def __len__(self) -> int:
        return math.ceil(len(self.views) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = slice(index * self.batch_size, (index + 1) * self.batch_size)
        views = np.stack([self.load(view) for view in self.views[part]])
        return views, self.targets[part], self.weights[part]


def _fit(
    stage: str,
    model: keras.Model,
    batches: Callable[[int], keras.utils.PyDataset],
    validation: tuple[np.ndarray, np.ndarray] | keras.utils.PyDataset,
    schedule: Schedule,
    seed: int,
    folder: Path,
) -> History:
    """Train epoch by epoch, each ending in a checkpoint; the best epoch's weights stay."""
    first = batches(0)
    keras.utils.set_random_seed(seed)
    compile_stage(model, schedule, schedule.epochs * len(first))
    model.optimizer.build(model.trainable_variables)
    # What the run depends on, as far as a batch of each side shows it: only an equal one goes on.
    recipe = sha256_of(
        network_digest(model).encode(),
        repr((schedule, seed, len(first))).encode(),
        np.ascontiguousarray(first[0][0]),
        np.ascontiguousarray(validation[0][0]),
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
        logs = model.fit(
            batches(epoch),
            validation_data=validation,
            validation_batch_size=schedule.batch_size,
            shuffle=False,
            verbose=0,
        ).history
        numbers = {name: round(values[0], 6) for name, values in logs.items()}
        if not math.isfinite(numbers["val_loss"]):
            raise MarsclfError(
                f"{stage} diverged in epoch {epoch + 1}: lower its learning rate, now "
                f"{schedule.learning_rate}"
            )
        history.append({"stage": stage, "epoch": epoch + 1} | numbers)
        _save_weights(model, latest[len(history) % 2])
        if _best_epoch(history) == epoch:
            _save_weights(model, best)
        write_json(progress, state)
        print(
            f"{stage} epoch {epoch + 1}/{schedule.epochs}: "
            + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()),
            flush=True,
        )
    model.load_weights(best)
    return history


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
