"""What EfficientNetB7 costs on a GPU: python -m tools.gpu_cost.

Both parts of the preset `b7` are measured: the frozen blocks, which turn images into features, and
steps of fine-tuning on these. Weights and images are random: the speed does not depend on them.
"""

import sys
from functools import partial

import numpy as np
import tensorflow as tf

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.files import write_json
from marsclf.networks.backbones import split_frozen, unfreeze_blocks
from marsclf.networks.engine import has_gpu
from marsclf.networks.pinned import keras
from marsclf.pipeline.machine import no_gpu
from marsclf.pipeline.presets import parameters_of
from marsclf.provenance import commit, hardware
from marsclf.training.recipe import Recipe
from marsclf.training.stages import build_head, compile_model, join
from marsclf.training.train import load_backbone
from tools.bench import spread, take_turns
from tools.command import make_main
from tools.documents import B7_COST, update_documents, write_documents
from tools.results import read_published

CLASSES = 25  # of the head


def measure_costs() -> dict:
    """Measure time and memory of EfficientNetB7 on the GPU, and store them in results/."""
    if not has_gpu():
        raise MarsclfError(f"TensorFlow {no_gpu()}: measure B7 on a machine with a GPU.")
    recipe = Recipe(**parameters_of("b7"))
    names = ("image_size", "mixed_precision", "finetune_batch_size", "finetune_blocks")
    result = {"commit": commit(), "hardware": hardware()}
    result |= {name: getattr(recipe, name) for name in names}
    result["parts"] = measure_parts(recipe)
    write_json(paths.RESULTS / B7_COST, result)
    write_documents(update_documents(read_published()))
    print(f"Stored in {paths.RESULTS / B7_COST} and in the documents.")
    return result


def measure_parts(recipe: Recipe) -> dict[str, dict]:
    """Return images per second and peak GPU memory (10^6 bytes) of both parts, in batches."""
    size, blocks, batch = recipe.image_size, recipe.finetune_blocks, recipe.finetune_batch_size
    backbone = load_backbone(recipe.backbone, size, recipe.mixed_precision, weights=None)
    frozen, model = prepare_training(recipe, backbone, blocks, is_split=True)
    rng, parts = np.random.default_rng(0), {}
    images, features = (
        rng.uniform(0, 255, (batch, *part.input_shape[1:])) for part in (frozen, model)
    )
    for name, step in (
        ("features", partial(frozen.predict_on_batch, images)),
        ("finetune", partial(train, model, features, steps=1)),
    ):
        tf.config.experimental.reset_memory_stats("GPU:0")
        rates = spread(batch / take_turns({name: step})[name])
        peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
        parts[name] = {"images_per_s": rates, "peak_memory_mb": round(peak / 1e6)}
    return parts


def prepare_training(
    recipe: Recipe, backbone: keras.Model, blocks: list[str], is_split: bool
) -> tuple[keras.Model | None, keras.Model]:
    """Return the frozen and the trainable part, compiled for the second stage of a recipe.

    Unless `is_split`, the frozen part is None and the other is the complete classifier.
    """
    head = build_head(backbone.output_shape[1], recipe.head_hidden, recipe.head_dropout, CLASSES)
    model = join(backbone, head)
    unfreeze_blocks(model, blocks)
    frozen, model = split_frozen(model, blocks) if is_split else (None, model)
    how = recipe.weight_decay, recipe.label_smoothing, recipe.finetune_ema
    compile_model(model, recipe.finetune_learning_rate, 1000, *how)
    return frozen, model


def train(model: keras.Model, inputs: np.ndarray, steps: int) -> None:
    """Train on `steps` equal batches of the inputs (n, ...); the labels are arbitrary."""
    for batch in np.array_split(inputs, steps):
        model.train_on_batch(batch, np.eye(CLASSES)[np.arange(len(batch)) % CLASSES])


main = make_main(measure_costs)

if __name__ == "__main__":
    sys.exit(main())
