"""A recipe: everything that decides what a network learns, and its steps in order."""

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from marsclf.errors import MarsclfError
from marsclf.evaluation.calibration import pool
from marsclf.images.views import WHOLE_IMAGE, Augmentation, Condition, check_zooms
from marsclf.networks.backbones import build_backbone, split_frozen, unfreeze_blocks
from marsclf.networks.engine import has_gpu
from marsclf.paths import CACHE
from marsclf.training.features import Features, embed_images, embed_views, pass_on, view_counts
from marsclf.training.stages import History, Schedule, build_head, draw_shares, join, train


@dataclass(frozen=True)
class Recipe:
    """The parameters of notebook 02, which explains them."""

    backbone: str
    image_size: int | None
    mixed_precision: bool
    seed: int
    augmentation: dict
    views: int
    views_rare: int
    balance: float
    burst_balance: float
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
    finetune_accumulate: int
    finetune_learning_rate: float
    finetune_patience: int
    finetune_ema: float
    test_zooms: list[float]
    self_training: float

    def __post_init__(self) -> None:
        check_zooms(self.test_zooms)
        if not 0 <= self.self_training <= 1:
            raise MarsclfError(
                f"self_training is {self.self_training}; it is a share of the images, 0 to 1."
            )

    @classmethod
    def of(cls, parameters: dict[str, object]) -> "Recipe":
        """Return the recipe in a run's parameters, which hold others besides."""
        return cls(**{field.name: parameters[field.name] for field in fields(cls)})

    def members(self, changes: list[dict]) -> list["Recipe"]:
        """Return the recipes of an ensemble, each with its changes to this one; or this alone."""
        names = [field.name for field in fields(self)]
        for name in (name for change in changes for name in change if name not in names):
            raise MarsclfError(f"ensemble: no recipe has {name!r}; it has {', '.join(names)}.")
        return [replace(self, **change) for change in changes or [{}]]

    def schedule(self, stage: str, images: int) -> Schedule:
        """Return how the stage "head" or "finetune" learns from so many training images."""
        own = ("epochs", "batch_size", "learning_rate", "patience")
        return Schedule(
            epoch_size=images,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            ema=self.finetune_ema if stage == "finetune" else 0.0,
            accumulate=self.finetune_accumulate if stage == "finetune" else 1,
            **{name: getattr(self, f"{stage}_{name}") for name in own},
        )


def learning_rows(index: pd.DataFrame, splits: list[str]) -> pd.DataFrame:
    """Return the rows of a data set's index to learn from: train, val or both.

    Raises MarsclfError for any other split: nothing may learn from the labels of test.
    """
    if not splits or not set(splits) <= {"train", "val"}:
        raise MarsclfError(f"learn_from is {splits}; it must be ['train'] or ['train', 'val'].")
    return index[index["split"].isin(splits)]


class Network(NamedTuple):
    """A backbone, whole and in two parts that share its weights.

    `frozen` stays as it is; `upper` learns in the second stage, and is None where there is none.
    """

    whole: keras.Model
    frozen: keras.Model
    upper: keras.Model | None


class Seen(NamedTuple):
    """What the frozen part gave for random views, their labels 0-24, and their shares of draws."""

    views: Features | np.ndarray
    labels: np.ndarray
    shares: np.ndarray


class Learnt(NamedTuple):
    """A trained network.

    Attributes:
        recipe: how it learnt.
        network: its backbone.
        head: features (n, width) to probabilities (n, 25).
        classifier: what the frozen part gives to probabilities (n, 25); shares the weights.
        history: a record an epoch, of both stages.
        wall_s: seconds of "features", "head" and "finetune".
    """

    recipe: Recipe
    network: Network
    head: keras.Model
    classifier: keras.Model
    history: History
    wall_s: dict[str, float]


def learn(
    recipe: Recipe,
    root: Path,
    train_rows: pd.DataFrame,
    validation_rows: pd.DataFrame,
    folder: Path,
    cache: Path = CACHE,
) -> Learnt:
    """Train a network by all steps of a recipe; what an equal one did before is not done again.

    Args:
        recipe: what to do.
        root: folder that the paths in the rows count from.
        train_rows, validation_rows: parts of a data set's index, to learn from and to choose the
            best epoch on.
        folder: of the checkpoints.
        cache: of what the frozen part sees.
    """
    times = [time.monotonic()]
    network = build(recipe)
    counts = view_counts(train_rows["label"].to_numpy(), recipe.views, recipe.views_rare)
    train_on = see(recipe, network, root, train_rows, counts, cache)
    once = np.ones(len(validation_rows), int)
    validation = see(recipe, network, root, validation_rows, once, cache)
    times.append(time.monotonic())
    images = len(train_rows)
    head, history = train_head(recipe, network, train_on, validation, images, folder, cache)
    times.append(time.monotonic())
    classifier, more = fine_tune(recipe, network, head, train_on, validation, images, folder)
    times.append(time.monotonic())
    wall_s = dict(zip(("features", "head", "finetune"), np.diff(times).tolist(), strict=True))
    return Learnt(recipe, network, head, classifier, history + more, wall_s)


def learn_all(
    recipes: list[Recipe],
    root: Path,
    train_rows: pd.DataFrame,
    validation_rows: pd.DataFrame,
    unlabelled: pd.DataFrame,
    folder: Path,
    cache: Path = CACHE,
) -> list[Learnt]:
    """Train the networks of an ensemble, each in a folder of its own (see `learn`).

    Where the first recipe says so they then learn again, with pseudo-labels for `unlabelled`: the
    rows to be predicted, whose labels are not looked at.
    """

    def each(rows: pd.DataFrame, within: Path) -> list[Learnt]:
        return [
            learn(how, root, rows, validation_rows, within / str(number), cache)
            for number, how in enumerate(recipes)
        ]

    learnt, share = each(train_rows, folder), recipes[0].self_training
    if not share:
        return learnt
    guessed = pseudo_labels(learnt, root, unlabelled, share, cache)
    return each(pd.concat([train_rows, guessed]), folder / "self_training")


def pseudo_labels(
    members: list[Learnt], root: Path, rows: pd.DataFrame, share: float, cache: Path = CACHE
) -> pd.DataFrame:
    """Return those rows that networks are surest of, labelled with what they say (Lee 2013).

    Args:
        share: how many of the rows, 0 to 1.
    """
    bare = rows.drop(columns=["label", "class_name"])
    probabilities = predict(members, root, bare, cache)
    surest = np.argsort(-probabilities.max(axis=1), kind="stable")[: round(share * len(rows))]
    surest = np.sort(surest)
    return bare.iloc[surest].assign(label=probabilities[surest].argmax(axis=1))


def predict(
    members: list[Learnt],
    root: Path,
    rows: pd.DataFrame,
    cache: Path = CACHE,
    condition: Condition = WHOLE_IMAGE,
) -> np.ndarray:
    """Return the probabilities of images under a condition (rows, 25).

    Pooled over the members of an ensemble and the zooms at which each looks at an image.
    """
    answers = []
    for learnt in members:
        for zoom in learnt.recipe.test_zooms:
            looked = replace(condition, zoom=condition.zoom * zoom)
            seen = embed_images(root, rows, learnt.network.frozen, cache, looked)
            answers.append(pass_on(seen, learnt.classifier, cache).read())
    return pool(np.stack(answers))


def build(recipe: Recipe) -> Network:
    """Build the recipe's backbone and split it before the first block that will learn.

    In mixed precision it computes in bfloat16, which needs no scaling of the loss; its weights, and
    the head, stay float32. That is for a GPU, and left out where there is none.
    """
    policy = keras.config.dtype_policy()
    if recipe.mixed_precision and has_gpu():
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        whole = build_backbone(recipe.backbone, recipe.image_size)
    finally:
        keras.config.set_dtype_policy(policy)
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
    labels = rows["label"].to_numpy().repeat(counts)
    bursts = rows.groupby(["label", "sequence"]).ngroup().to_numpy().repeat(counts)
    return Seen(views, labels, draw_shares(labels, bursts, recipe.balance, recipe.burst_balance))


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
            seen._replace(views=pass_on(seen.views, network.upper, cache))
            for seen in (train_on, validation)
        )
    # One vector a view: few enough to be held at once, which saves opening files for each batch.
    train_on, validation = (
        seen._replace(views=seen.views.read()) for seen in (train_on, validation)
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
