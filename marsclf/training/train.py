"""Training by a recipe: `train_network` takes the steps that notebook 02 shows one by one."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import tensorflow as tf

from marsclf.errors import MarsclfError
from marsclf.evaluation.calibration import pool
from marsclf.images.views import WHOLE_IMAGE, Augmentation, Condition
from marsclf.networks.backbones import build_backbone, split_frozen, unfreeze_blocks
from marsclf.networks.engine import gpu_capability
from marsclf.networks.pinned import keras
from marsclf.training.batches import Batches, Examples, RandomBatches
from marsclf.training.checkpoints import Checkpoints
from marsclf.training.features import image_features, view_features
from marsclf.training.recipe import Recipe
from marsclf.training.sampling import draw_shares, view_counts
from marsclf.training.stages import build_head, compile_model, join


class TrainedNetwork(NamedTuple):
    """A trained network, and the stages of its training."""

    model: keras.Model  # images (n, height, width, 3), 0-255, to probabilities (n, classes)
    zooms: list[float]  # an image is classified at each of them, and the predictions are pooled
    stages: list[Checkpoints]

    @property
    def history(self) -> list[dict]:
        """One record per epoch, of all stages."""
        return [record for stage in self.stages for record in stage.history]


def load_backbone(
    name: str, image_size: int | None, mixed_precision: bool, weights: str | None = "imagenet"
) -> keras.Model:
    """Return a backbone with ImageNet or, with None, random weights.

    With mixed precision it computes in bfloat16 on a GPU from compute capability 8.0 on, in float16
    on an older one, and in float32 on a CPU. Weights, and the head, stay float32.
    """
    if mixed_precision and (capability := gpu_capability()):
        mixed = "mixed_bfloat16" if capability >= (8, 0) else "mixed_float16"
        keras.config.set_dtype_policy(mixed)
    try:
        return build_backbone(name, image_size, weights)
    finally:
        keras.config.set_dtype_policy("float32")


def make_examples(
    recipe: Recipe, model: keras.Model, root: Path, rows: pd.DataFrame, classes: int, training: bool
) -> Examples:
    """Return the features by `model` of random views of images, with labels and shares of draws.

    For training there are as many views of an image as the recipe says, else one. Without
    augmentation they are the views that are used for prediction.
    """
    augmentation, labels = Augmentation(**recipe.augmentation), rows["label"].to_numpy()
    counts = np.ones(len(rows), int)
    if augmentation == Augmentation():
        conditions = [Condition(zoom=zoom) for zoom in recipe.test_zooms]
        views, counts = image_features(root, rows, model, *conditions), counts * len(conditions)
    else:
        if training:
            counts = view_counts(labels, recipe.views, recipe.views_rare)
        views = view_features(root, rows, counts, model, augmentation, recipe.seed)
    shares = draw_shares(rows, counts, recipe.balance, recipe.burst_balance)
    return Examples(views, labels.repeat(counts), shares, classes)


def train_network(
    recipe: Recipe, root: Path, train: pd.DataFrame, validation: pd.DataFrame | None, classes: int
) -> TrainedNetwork:
    """Train a network by both stages of a recipe; steps that are in the cache are not repeated.

    It learns from the rows `train` of a data set's index, whose paths are relative to `root`, and
    keeps the best epoch on the rows `validation`, without these the last.
    """
    backbone = load_backbone(recipe.backbone, recipe.image_size, recipe.mixed_precision)
    frozen, upper = split_frozen(backbone, recipe.trained_blocks)
    examples = [make_examples(recipe, frozen, root, train, classes, True), None]
    if validation is not None:
        examples[1] = make_examples(recipe, frozen, root, validation, classes, False)
    keras.utils.set_random_seed(recipe.seed)
    head = build_head(backbone.output_shape[1], recipe.head_hidden, recipe.head_dropout, classes)
    vectors = [each and each.after(upper) for each in examples]
    fitted = [fit_stage("head", head, *vectors, recipe, len(train))]
    if upper:
        classifier = join(upper, head)
        unfreeze_blocks(classifier, recipe.trained_blocks)
        fitted.append(fit_stage("finetune", classifier, *examples, recipe, len(train)))
    return TrainedNetwork(join(backbone, head), recipe.test_zooms, fitted)


def train_networks(recipe: Recipe, *data: object) -> list[TrainedNetwork]:
    """Train one network for each seed of the ensemble, or one; `data` are train_network's."""
    seeds = recipe.ensemble or [recipe.seed]
    return [train_network(replace(recipe, seed=seed), *data) for seed in seeds]


def fit_stage(
    stage: str,
    model: keras.Model,
    train: Examples,
    validation: Examples | None,
    recipe: Recipe,
    epoch_size: int,
) -> Checkpoints:
    """Compile and fit one stage ("head" or "finetune") of a recipe.

    Raises MarsclfError if the memory does not suffice for a batch.
    """
    names = ("epochs", "batch_size", "patience", "learning_rate")
    epochs, batch_size, patience, rate = (getattr(recipe, f"{stage}_{name}") for name in names)
    batches = RandomBatches(train, batch_size, epoch_size, recipe.seed)
    check = validation and Batches(validation, batch_size)
    ema = recipe.finetune_ema if stage == "finetune" else 0.0
    regularization = recipe.weight_decay, recipe.label_smoothing, ema
    compile_model(model, rate, epochs * len(batches), *regularization)
    checkpoints = Checkpoints(stage, batches, check, epochs, patience)
    how = {"initial_epoch": checkpoints.resume(model), "epochs": epochs, "shuffle": False}
    try:
        model.fit(batches, validation_data=check, callbacks=[checkpoints], verbose=0, **how)
    except tf.errors.ResourceExhaustedError:
        lack = f"The memory does not suffice for batches of {batch_size} images in stage {stage}"
        raise MarsclfError(f"{lack}: lower {stage}_batch_size or image_size.") from None
    return checkpoints


def predict(
    networks: list[TrainedNetwork], root: Path, rows: pd.DataFrame, view: Condition = WHOLE_IMAGE
) -> np.ndarray:
    """Return probabilities of images in a view (rows, classes), pooled over networks and zooms."""
    probabilities = []
    for network in networks:
        for zoom in network.zooms:
            zoomed = replace(view, zoom=view.zoom * zoom)
            probabilities.append(image_features(root, rows, network.model, zoomed).read())
    return pool(np.stack(probabilities))
