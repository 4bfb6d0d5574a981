"""Checkpoints: the best epoch, early stopping, and a training that resumes exactly."""

import json
import math
from pathlib import Path

import numpy as np

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, sha256_of, write_json
from marsclf.networks.engine import network_digest
from marsclf.networks.pinned import keras
from marsclf.training.batches import Batches


class Checkpoints(keras.callbacks.Callback):
    """Keeps the best epoch, stops early, and exactly resumes a training that was killed.

    Keras's own ModelCheckpoint, EarlyStopping and BackupAndRestore forget the best epoch and their
    patience when a run is resumed, and SwapEMAWeights rounds the weights. Pass `resume(model)` to
    `fit` as `initial_epoch`. When `fit` ends, the model has the weights of the epoch with the
    lowest validation loss (without validation, of the last): their EMA, where the optimizer
    averages them. `history` has one record per epoch: stage, epoch, and loss and accuracy on both
    splits. Nothing needs the weights in `folder` once the model is saved. `batches` have a seed
    and a method that draws those of an epoch, as RandomBatches have.
    """

    def __init__(
        self, stage: str, batches: Batches, validation: Batches | None, epochs: int, patience: int
    ) -> None:
        super().__init__()
        self.stage, self.batches, self.validation = stage, batches, validation
        self.epochs, self.patience = epochs, patience
        self.history: list[dict] = []

    def resume(self, model: keras.Model) -> int:
        """Load the last epoch of an identical training, if any; return the epoch to start with.

        Two trainings are identical if their networks, optimizers, losses, data and seeds are. For
        a training that has ended the result is `epochs`.
        """
        model.optimizer.build(model.trainable_variables)
        compiled = model.get_compile_config()
        optimizer = compiled["optimizer"]["config"]
        for config in (optimizer, optimizer.get("inner_optimizer", {}).get("config", {})):
            config.pop("name", None)  # numbered by Keras in the order of creation
        trained = [variable.path for variable in model.trainable_variables]
        described = [[self.stage, self.epochs, self.patience, compiled], trained]
        key = sha256_of(
            network_digest(model).encode(),
            json.dumps(described, sort_keys=True, default=str).encode(),
            self.batches.digest().encode(),
            self.validation.digest().encode() if self.validation else b"",
        )
        self.folder = paths.CACHE / "training" / key[:32]
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
        self.newest = [variable.numpy() for variable in self.model.trainable_variables]
        self.model.optimizer.finalize_variable_values(self.model.trainable_variables)

    def on_test_end(self, logs: dict | None = None) -> None:
        """Restore the weights that were not averaged."""
        for variable, value in zip(self.model.trainable_variables, self.newest, strict=True):
            variable.assign(value)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Record the epoch, save its weights, and stop after `patience` epochs without a gain."""
        numbers = {name: round(float(value), 6) for name, value in (logs or {}).items()}
        if not math.isfinite(numbers.get("val_loss", numbers["loss"])):
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
        """Load the best epoch's weights."""
        self.model.load_weights(self._weights(self._best_epoch()))
        self.model.optimizer.finalize_variable_values(self.model.trainable_variables)

    def _weights(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch}.weights.h5"

    def _best_epoch(self) -> int:
        """Return the number of the epoch with the lowest validation loss, or the last, from 1."""
        losses = [record.get("val_loss", -record["epoch"]) for record in self.history]
        return 1 + int(np.argmin(losses))

    def _has_ended(self) -> bool:
        done = len(self.history)
        return done >= self.epochs or (done > 0 and done - self._best_epoch() >= self.patience)
