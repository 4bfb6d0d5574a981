"""Training batches, drawn balanced over classes and bursts.

Validation has the same weights and random views, too: complete images of the two most common
classes are solved in the first epoch and would rank later epochs by chance.
"""

import json
import math
from typing import NamedTuple

import numpy as np

from marsclf.files import sha256_of
from marsclf.networks.pinned import keras
from marsclf.training.features import Features, apply_network


class Examples(NamedTuple):
    """Features, with what a training needs of them."""

    features: Features | np.ndarray  # [rows] gives a network's inputs (rows, ...)
    labels: np.ndarray  # class ids (n,), from 0 to classes - 1
    shares: np.ndarray  # how often each is drawn (n,), sum 1
    classes: int  # how many there are

    def after(self, network: keras.Model | None) -> "Examples":
        """Return these examples with the network's outputs as features, held in memory."""
        features = apply_network(self.features, network) if network else self.features
        return self._replace(features=features.read())


class Batches(keras.utils.PyDataset):
    """Batches of features (n, ...), one-hot targets (n, classes) and weights (n,).

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
        targets = np.eye(self.examples.classes, dtype="float32")[self.examples.labels[rows]]
        return self.examples.features[rows], targets, self.weights[rows]

    def digest(self) -> str:
        """Return a SHA-256 of the features, labels and shares."""
        features, labels, shares, _ = self.examples
        is_array = isinstance(features, np.ndarray)
        content = np.ascontiguousarray(features) if is_array else features.digest().encode()
        return sha256_of(content, np.ascontiguousarray(labels), np.ascontiguousarray(shares))


class RandomBatches(Batches):
    """Batches drawn by shares, with replacement; equal seed and epoch give equal batches."""

    def __init__(self, examples: Examples, batch_size: int, epoch_size: int, seed: int) -> None:
        super().__init__(examples, batch_size)
        self.epoch_size, self.seed = epoch_size, seed
        self.weights = np.ones(len(examples.labels))
        self.draw(epoch=0)

    def draw(self, epoch: int) -> None:
        """Draw the examples of an epoch."""
        rng, shares = np.random.default_rng((self.seed, epoch)), self.examples.shares
        self.rows = rng.choice(len(shares), self.epoch_size, p=shares)

    def digest(self) -> str:
        """Return a SHA-256 of the examples and of how they are drawn."""
        drawn = json.dumps([self.batch_size, self.epoch_size, self.seed])
        return sha256_of(super().digest().encode(), drawn.encode())
