"""A recipe: everything that decides what a network learns, and its steps in order."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from marsclf.backbones import build_backbone, split_frozen, unfreeze_blocks
from marsclf.features import Features, embed_views, pass_on, view_counts
from marsclf.images import Augmentation
from marsclf.paths import CACHE
from marsclf.training import History, Schedule, build_head, join, train


@dataclass(frozen=True)
class Recipe:
    """The parameters of notebook 02, which explains them."""

    backbone: str
    image_size: int | None
    seed: int
    augmentation: dict
    views: int
    views_rare: int
    balance: float
    label_smoothing: float
    weight_decay: float
    head_hidden: int
    head_dropout: float
    head_epochs: int
    head_batch_size: int
    head_learning_rate: float
    head_patience: int
    finetune_blocks: list[str]
    finetune_epochs: int
    finetune_batch_size: int
    finetune_learning_rate: float
    finetune_patience: int

    def schedule(self, stage: str, images: int) -> Schedule:
        """Return how the stage "head" or "finetune" learns from so many training images."""
        own = ("epochs", "batch_size", "learning_rate", "patience")
        return Schedule(
            epoch_size=images,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            balance=self.balance,
            **{name: getattr(self, f"{stage}_{name}") for name in own},
        )


class Network(NamedTuple):
    """A backbone, whole and in two parts that share its weights.

    `frozen` stays as it is; `upper` learns in the second stage, and is None where there is none.
    """

    whole: keras.Model
    frozen: keras.Model
    upper: keras.Model | None


class Seen(NamedTuple):
    """What the frozen part gave for random views, and the label 0-24 of each."""

    views: Features
    labels: np.ndarray


def build(recipe: Recipe) -> Network:
    """Build the recipe's backbone and split it before the first block that will learn."""
    whole = build_backbone(recipe.backbone, recipe.image_size)
    blocks = recipe.finetune_blocks if recipe.finetune_epochs else []
    return Network(whole, *split_frozen(whole, blocks))


def see(
    recipe: Recipe,
    network: Network,
    root: Path,
    rows: pd.DataFrame,
    counts: np.ndarray,
    cache: Path = CACHE,
) -> Seen:
    """Return what the frozen part sees in `counts[i]` random views of each image i of `rows`."""
    views_of = Augmentation(**recipe.augmentation)
    views = embed_views(root, rows, counts, network.frozen, views_of, recipe.seed, cache)
    return Seen(views, rows["label"].to_numpy().repeat(counts))


def training_counts(recipe: Recipe, labels: np.ndarray) -> np.ndarray:
    """Return how many views each training image gets."""
    return view_counts(labels, recipe.views, recipe.views_rare)


def train_head(
    recipe: Recipe,
    network: Network,
    train_on: Seen,
    validation: Seen,
    epoch_size: int,
    folder: Path,
    cache: Path = CACHE,
) -> tuple[keras.Model, History]:
    """Stage 1: train a head on what the whole backbone, still frozen, makes of each view."""
    if network.upper:
        train_on, validation = (
            Seen(pass_on(seen.views, network.upper, cache), seen.labels)
            for seen in (train_on, validation)
        )
    keras.utils.set_random_seed(recipe.seed)
    head = build_head(network.whole.output_shape[1], recipe.head_hidden, recipe.head_dropout)
    schedule = recipe.schedule("head", epoch_size)
    return head, train("head", head, train_on, validation, schedule, recipe.seed, folder)


def fine_tune(
    recipe: Recipe,
    network: Network,
    head: keras.Model,
    train_on: Seen,
    validation: Seen,
    epoch_size: int,
    folder: Path,
) -> tuple[keras.Model, History]:
    """Stage 2, if the recipe has one: train the named blocks and the head together.

    Returns:
        What the frozen part gives to probabilities (n, 25), with the weights of `network` and
        `head`; and the history.
    """
    if network.upper is None:
        return head, []
    classifier = join(network.upper, head)
    unfreeze_blocks(classifier, recipe.finetune_blocks)
    schedule = recipe.schedule("finetune", epoch_size)
    history = train("finetune", classifier, train_on, validation, schedule, recipe.seed, folder)
    return classifier, history
