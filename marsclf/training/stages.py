"""The parts of both training stages: the head, balanced batches, and checkpoints.

Every epoch draws its batches balanced over classes and bursts. Validation uses random views with
the same weights: complete images of the two most common classes are solved in the first epoch and
would rank later epochs by chance.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from marsclf.data.msl import NUM_CLASSES
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, sha256_of, write_json
from marsclf.networks.engine import network_digest
from marsclf.networks.pinned import keras
from marsclf.paths import CACHE
from marsclf.training.features import Features, apply_network

History = list[dict]


class Examples(NamedTuple):
    """Features (n, ...), their labels 0-24 (n,), and the share of draws of each (n,), sum 1."""

    features: Features | np.ndarray
    labels: np.ndarray
    shares: np.ndarray

    def after(self, network: keras.Model | None, cache: Path = CACHE) -> "Examples":
        """Return these examples with the network's outputs as features, held in memory."""
        features = apply_network(self.features, network, cache) if network else self.features
        return self._replace(features=features.read())


def build_head(width: int, hidden: int, dropout: float, classes: int) -> keras.Model:
    """Return an untrained head: features (n, width) to probabilities (n, classes).

    It has one hidden layer of `hidden` units, or is linear where that is 0.
    """
    layers = keras.layers
    stack = [layers.Input((width,), name="features"), layers.Dropout(dropout, name="head_dropout")]
    if hidden:
        stack.append(layers.Dense(hidden, activation="relu", name="head_hidden"))
        stack.append(layers.Dropout(dropout, name="head_hidden_dropout"))
    stack.append(layers.Dense(classes, activation="softmax", name="probabilities"))
    return keras.Sequential(stack, name="head")


def join(backbone: keras.Model, head: keras.Model) -> keras.Model:
    """Return one flat model, images to probabilities, that shares the weights of both parts."""
    tensor = backbone.output
    for layer in head.layers:
        tensor = layer(tensor)
    return keras.Model(backbone.input, tensor, name=f"{backbone.name}_classifier")


def compile_model(
    model: keras.Model,
    learning_rate: float,
    steps: int,
    weight_decay: float,
    label_smoothing: float,
    ema: float = 0.0,
    accumulate: int = 1,
) -> None:
    """Compile a model for a stage of so many steps, as notebook 02 explains.

    Args:
        model: gives probabilities (n, 25).
        learning_rate, weight_decay: of AdamW; the learning rate falls to 0 along a cosine.
        steps: batches of all epochs together.
        label_smoothing: share of the probability that is spread over all classes (0-1).
        ema: momentum per step of the exponential moving average of the weights; 0 for none.
        accumulate: batches whose mean gradient makes one step.
    """
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(learning_rate, steps),
            weight_decay=weight_decay,
            use_ema=ema > 0,
            # Keras averages after every batch, even where several batches make one step.
            ema_momentum=ema ** (1 / accumulate),
            gradient_accumulation_steps=accumulate if accumulate > 1 else None,
        ),
        keras.losses.CategoricalCrossentropy(label_smoothing=label_smoothing),
        metrics=["accuracy"],
        # XLA makes TensorFlow's depthwise convolutions twenty times slower on a CPU.
        jit_compile=False,
    )


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Return a weight for each example (n,), such that all classes count the same."""
    return np.bincount(labels, minlength=NUM_CLASSES)[labels] ** -1.0


def draw_shares(
    rows: pd.DataFrame, counts: np.ndarray, balance: float, burst_balance: float
) -> np.ndarray:
    """Return how often each view is drawn, as shares that add up to 1.

    Args:
        rows: images, with columns label and sequence. A burst is the images of one class and one
            sequence: they show one scene within minutes, so more of them add little.
        counts: views per image, (rows,).
        balance: a class of n views gets a share of n ** (1 - balance): with 1 all classes are drawn
            equally often, with 0 all views.
        burst_balance: the same for the bursts of a class.
    """
    labels = rows["label"].to_numpy().repeat(counts)
    bursts = rows.groupby(["label", "sequence"]).ngroup().to_numpy().repeat(counts)
    within = np.bincount(bursts)[bursts] ** -float(burst_balance)
    within /= np.bincount(labels, weights=within)[labels]
    shares = within * np.bincount(labels)[labels] ** (1 - float(balance))
    return shares / shares.sum()


class Batches(keras.utils.PyDataset):
    """Batches of features (n, ...), one-hot targets (n, 25) and weights (n,).

    All examples come once, in order, weighted by their share of draws (1 on average).
    """

    def __init__(self, examples: Examples, batch_size: int) -> None:
        super().__init__()
        self.examples, self.batch_size = examples, batch_size
        self.rows = np.arange(len(examples.labels))
        self.weights = examples.shares / examples.shares.mean()

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = self.rows[index * self.batch_size : (index + 1) * self.batch_size]
        targets = np.eye(NUM_CLASSES, dtype="float32")[self.examples.labels[rows]]
        return self.examples.features[rows], targets, self.weights[rows]

    def digest(self) -> str:
        """Return a SHA-256 of the features, labels and shares."""
        features, labels, shares = self.examples
        if isinstance(features, Features):  # its files are named by their content
            content = "".join(file.name for file in features.files).encode()
        else:
            content = np.ascontiguousarray(features)
        return sha256_of(content, np.ascontiguousarray(labels), np.ascontiguousarray(shares))


class RandomBatches(Batches):
    """Batches of examples that are drawn with replacement, by their shares, for every epoch.

    Equal seed and epoch give equal batches.
    """

    def __init__(self, examples: Examples, batch_size: int, epoch_size: int, seed: int) -> None:
        super().__init__(examples, batch_size)
        self.epoch_size, self.seed = epoch_size, seed
        self.weights = np.ones(len(examples.labels))
        self.draw(epoch=0)

    def draw(self, epoch: int) -> None:
        """Draw the examples of an epoch."""
        rng, shares = np.random.default_rng((self.seed, epoch)), self.examples.shares
        self.rows = rng.choice(len(shares), self.epoch_size, p=shares)


class Checkpoints(keras.callbacks.Callback):
    """Keeps the best epoch, stops early, and exactly resumes a training that was killed.

    Keras's own ModelCheckpoint, EarlyStopping and BackupAndRestore forget the best epoch and their
    patience when a run is resumed, and SwapEMAWeights rounds the weights. Pass `resume(model)` to
    `fit` as `initial_epoch`. When `fit` ends, the model has the weights of the epoch with the
    lowest validation loss: their EMA, where the optimizer averages them.

    Attributes:
        history: one record per epoch: stage, epoch, and loss and accuracy on both splits.
    """

    def __init__(
        self,
        stage: str,
        batches: RandomBatches,
        validation: Batches,
        epochs: int,
        patience: int,
        cache: Path = CACHE,
    ) -> None:
        super().__init__()
        self.stage, self.batches, self.validation = stage, batches, validation
        self.epochs, self.patience, self.cache = epochs, patience, cache
        self.history: History = []

    def resume(self, model: keras.Model) -> int:
        """Load the last epoch of an identical training, if any; return the epoch to start with.

        Two trainings are identical if their networks, optimizers, losses, data and seeds are. For
        a training that has ended the result is `epochs`.
        """
        model.optimizer.build(model.trainable_variables)
        drawn = (self.batches.batch_size, self.batches.epoch_size, self.batches.seed)
        compiled = model.get_compile_config()
        compiled["optimizer"]["config"].pop("name")  # numbered by Keras in the order of creation
        described = [self.stage, self.epochs, self.patience, drawn, compiled]
        trained = [variable.path for variable in model.trainable_variables]
        key = sha256_of(
            network_digest(model).encode(),
            json.dumps([described, trained], sort_keys=True, default=str).encode(),
            self.batches.digest().encode(),
            self.validation.digest().encode(),
        )
        self.folder = self.cache / "training" / key[:32]
        progress = self.folder / "progress.json"
        if progress.exists():
            self.history = json.loads(progress.read_text(encoding="utf-8"))
        if self._has_ended():
            return self.epochs
        if self.history:
            model.load_weights(self._weights(len(self.history)))
        return len(self.history)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Draw the epoch's batches and reset dropout, whose state no checkpoint holds."""
        self.batches.draw(epoch)
        states = [v for v in self.model.non_trainable_variables if "seed_generator" in v.path]
        for number, state in enumerate(states):
            state.assign(np.array([hash((self.batches.seed, epoch, number)) % 2**31, 0]))

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Validate the averaged weights if the optimizer averages them."""
        if self.model.optimizer.use_ema:
            self.newest = [variable.numpy() for variable in self.model.trainable_variables]
            self._average()

    def on_test_end(self, logs: dict | None = None) -> None:
        """Restore the weights that were not averaged."""
        if self.model.optimizer.use_ema:
            for variable, value in zip(self.model.trainable_variables, self.newest, strict=True):
                variable.assign(value)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Record the epoch, save its weights, and stop after `patience` epochs without a gain."""
        numbers = {name: round(float(value), 6) for name, value in (logs or {}).items()}
        if not math.isfinite(numbers["val_loss"]):
            fault = f"The loss of stage {self.stage} is not finite in epoch {epoch + 1}"
            raise MarsclfError(f"{fault}: lower {self.stage}_learning_rate.")
        self.history.append({"stage": self.stage, "epoch": epoch + 1} | numbers)
        with replace_atomically(self._weights(epoch + 1)) as temporary:
            self.model.save_weights(temporary)
        write_json(self.folder / "progress.json", self.history)
        for number in range(1, epoch + 1):
            if number != self._best_epoch():
                self._weights(number).unlink(missing_ok=True)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        print(f"{self.stage} epoch {epoch + 1}/{self.epochs}: {shown}", flush=True)
        self.model.stop_training = self._has_ended()

    def on_train_end(self, logs: dict | None = None) -> None:
        """Load the best epoch's weights, and keep only those."""
        best, last = self._weights(self._best_epoch()), self._weights(len(self.history))
        self.model.load_weights(best)
        if last != best:
            last.unlink(missing_ok=True)
        if self.model.optimizer.use_ema:
            self._average()

    def _average(self) -> None:
        self.model.optimizer.finalize_variable_values(self.model.trainable_variables)

    def _weights(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch}.weights.h5"

    def _best_epoch(self) -> int:
        """Return the number of the epoch with the lowest validation loss, from 1 up."""
        return 1 + int(np.argmin([record["val_loss"] for record in self.history]))

    def _has_ended(self) -> bool:
        done = len(self.history)
        return done >= self.epochs or (done > 0 and done - self._best_epoch() >= self.patience)
