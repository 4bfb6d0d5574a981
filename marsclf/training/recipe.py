"""A recipe: the parameters that determine a trained network, and the steps of training.

Notebook 02 shows the steps of `train_network` one by one.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from marsclf.data.msl import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.evaluation.calibration import pool
from marsclf.images.views import WHOLE_IMAGE, Augmentation, Condition, check_zooms
from marsclf.networks.backbones import BLOCKS, build_backbone, split_frozen, unfreeze_blocks
from marsclf.networks.engine import has_gpu
from marsclf.networks.pinned import keras
from marsclf.paths import CACHE
from marsclf.training import stages
from marsclf.training.features import apply_network, image_features, view_counts, view_features
from marsclf.training.stages import Examples, History, join


@dataclass(frozen=True)
class Recipe:
    """The parameters of notebook 02, which explains them. Raises MarsclfError for unusable ones."""

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
    ensemble: list[int]
    test_zooms: list[float]
    self_training: float
    learn_from: list[str]
    temperature: float | None

    def __post_init__(self) -> None:
        trained = ("head", "finetune") if self.finetune_epochs else ("head",)
        settings = ("epochs", "batch_size", "learning_rate", "patience")
        positive = [f"{stage}_{name}" for stage in trained for name in settings]
        splits = "['train'] or ['train', 'val']"
        known = [field.name for field in fields(Augmentation)]
        for names, is_usable, rule in (
            (["seed", "head_hidden", "weight_decay"], lambda x: x >= 0, "0 or more"),
            ([*positive, "finetune_accumulate"], lambda x: x > 0, "above 0"),
            (["head_dropout", "finetune_ema"], lambda x: 0 <= x < 1, "at least 0 and below 1"),
            (["label_smoothing", "self_training"], lambda x: 0 <= x <= 1, "from 0 to 1"),
            (["temperature"], lambda x: x is None or x > 0, "None or above 0"),
            (["ensemble"], lambda x: all(type(seed) is int for seed in x), "a list of seeds"),
            (["learn_from"], lambda x: {"train"} <= set(x) <= {"train", "val"}, splits),
            (["finetune_blocks"], set(BLOCKS).issuperset, f"a list of {', '.join(BLOCKS)}"),
            (["augmentation"], set(known).issuperset, f"a mapping of {', '.join(known)}"),
        ):
            for name in names:
                if not is_usable(getattr(self, name)):
                    raise MarsclfError(f"{name} is {getattr(self, name)}; it must be {rule}.")
        check_zooms(self.test_zooms)
        Augmentation(**self.augmentation)


class TrainedNetwork(NamedTuple):
    """A trained network in two parts.

    Attributes:
        frozen: images (n, height, width, 3), 0-255, to features: the part that was not trained.
        classifier: features to probabilities (n, 25).
        complete: both in one, images to probabilities.
        zooms: at which it classifies an image; the predictions are pooled.
        history: one record per epoch, of both stages.
    """

    frozen: keras.Model
    classifier: keras.Model
    complete: keras.Model
    zooms: list[float]
    history: History


def load_backbone(name: str, image_size: int | None, mixed_precision: bool) -> keras.Model:
    """Return a backbone with ImageNet weights; with mixed precision on a GPU it uses bfloat16.

    bfloat16 needs no loss scaling. Weights, and the head, stay float32.
    """
    policy = keras.config.dtype_policy()
    if mixed_precision and has_gpu():
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        return build_backbone(name, image_size)
    finally:
        keras.config.set_dtype_policy(policy)


def train_network(
    recipe: Recipe,
    root: Path,
    train_rows: pd.DataFrame,
    validation_rows: pd.DataFrame,
    cache: Path = CACHE,
) -> TrainedNetwork:
    """Train a network by both stages of a recipe; steps that are in the cache are not repeated.

    Args:
        recipe: the parameters.
        root: folder that the paths in the rows are relative to.
        train_rows, validation_rows: rows of a data set's index, to learn from and to choose the
            best epoch on.
        cache: of features, exported networks and checkpoints.
    """
    backbone = load_backbone(recipe.backbone, recipe.image_size, recipe.mixed_precision)
    blocks = recipe.finetune_blocks if recipe.finetune_epochs else []
    frozen, upper = split_frozen(backbone, blocks)

    def examples(rows: pd.DataFrame, counts: np.ndarray) -> Examples:
        views_of = Augmentation(**recipe.augmentation)
        views = view_features(root, rows, counts, frozen, views_of, recipe.seed, cache)
        labels = rows["label"].to_numpy().repeat(counts)
        shares = stages.draw_shares(rows, counts, recipe.balance, recipe.burst_balance)
        return Examples(views, labels, shares)

    counts = view_counts(train_rows["label"], recipe.views, recipe.views_rare)
    train = examples(train_rows, counts)
    validation = examples(validation_rows, np.ones(len(validation_rows), int))
    images = len(train_rows)

    keras.utils.set_random_seed(recipe.seed)
    width = backbone.output_shape[1]
    head = stages.build_head(width, recipe.head_hidden, recipe.head_dropout, len(CLASS_NAMES))
    vectors = train.after(upper, cache), validation.after(upper, cache)
    history = fit_stage("head", head, *vectors, images, recipe, cache)
    classifier = head
    if upper:
        classifier = join(upper, head)
        unfreeze_blocks(classifier, blocks)
        history += fit_stage("finetune", classifier, train, validation, images, recipe, cache)
    return TrainedNetwork(frozen, classifier, join(backbone, head), recipe.test_zooms, history)


def train_networks(
    recipe: Recipe,
    root: Path,
    train_rows: pd.DataFrame,
    validation_rows: pd.DataFrame,
    cache: Path = CACHE,
) -> list[TrainedNetwork]:
    """Train one network for each seed of the recipe's ensemble, or one (see `train_network`)."""
    recipes = [replace(recipe, seed=seed) for seed in recipe.ensemble or [recipe.seed]]
    return [train_network(each, root, train_rows, validation_rows, cache) for each in recipes]


def fit_stage(
    stage: str,
    model: keras.Model,
    train: Examples,
    validation: Examples,
    epoch_size: int,
    recipe: Recipe,
    cache: Path = CACHE,
) -> History:
    """Compile and fit one stage ("head" or "finetune"); return its history."""
    epochs, batch_size, patience, learning_rate = (
        getattr(recipe, f"{stage}_{name}")
        for name in ("epochs", "batch_size", "patience", "learning_rate")
    )
    batches = stages.RandomBatches(train, batch_size, epoch_size, recipe.seed)
    check = stages.Batches(validation, batch_size)
    how = {"weight_decay": recipe.weight_decay, "label_smoothing": recipe.label_smoothing}
    if stage == "finetune":
        how |= {"ema": recipe.finetune_ema, "accumulate": recipe.finetune_accumulate}
    stages.compile_model(model, learning_rate, epochs * len(batches), **how)
    checkpoints = stages.Checkpoints(stage, batches, check, epochs, patience, cache)
    how = {"initial_epoch": checkpoints.resume(model), "epochs": epochs, "callbacks": [checkpoints]}
    model.fit(batches, validation_data=check, shuffle=False, verbose=0, **how)
    return checkpoints.history


def pseudo_labels(
    networks: list[TrainedNetwork],
    root: Path,
    rows: pd.DataFrame,
    share: float,
    cache: Path = CACHE,
) -> pd.DataFrame:
    """Return the rows that the networks are most confident of, labeled by them (Lee 2013).

    Labels in `rows` are not used. `share` is the part of the rows to return, 0 to 1.
    """
    unlabeled = rows.drop(columns=["label", "class_name"])
    probabilities = predict(networks, root, unlabeled, cache=cache)
    order = np.argsort(-probabilities.max(axis=1), kind="stable")
    chosen = np.sort(order[: round(share * len(rows))])
    return unlabeled.iloc[chosen].assign(label=probabilities[chosen].argmax(axis=1))


def predict(
    networks: list[TrainedNetwork],
    root: Path,
    rows: pd.DataFrame,
    condition: Condition = WHOLE_IMAGE,
    cache: Path = CACHE,
) -> np.ndarray:
    """Return the probabilities of images under a condition (rows, 25).

    Predictions are pooled over the networks of an ensemble and over the zooms of each.
    """
    probabilities = []
    for network in networks:
        for zoom in network.zooms:
            view = replace(condition, zoom=condition.zoom * zoom)
            features = image_features(root, rows, network.frozen, view, cache)
            probabilities.append(apply_network(features, network.classifier, cache).read())
    return pool(np.stack(probabilities))
