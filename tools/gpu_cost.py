"""What EfficientNetB7 costs on a GPU: python -m tools.gpu_cost.

Both parts of the preset `b7` are measured: the frozen blocks, which turn images into features, and
steps of fine-tuning on these. Weights and images are random: the speed does not depend on them.
"""

import gc
import json
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import tensorflow as tf

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.files import write_json
from marsclf.networks.engine import has_gpu
from marsclf.pipeline.machine import no_gpu
from marsclf.pipeline.presets import parameters_of
from marsclf.provenance import commit, hardware
from marsclf.training.recipe import Recipe
from marsclf.training.train import load_backbone
from tools.bench import prepare_training, spread, take_turns, train
from tools.command import make_main
from tools.documents import B7_COST, update_documents, write_documents
from tools.results import read_published

BATCH_SIZES = (8, 16, 32, 64)


def measure_costs() -> dict:
    """Measure time and memory of EfficientNetB7 on the GPU, and store them in results/."""
    if not has_gpu():
        raise MarsclfError(f"TensorFlow {no_gpu()}: measure B7 on a machine with a GPU.")
    recipe = Recipe(**parameters_of("b7"))
    result = {"commit": commit(), "hardware": hardware(), "pixels": recipe.image_size}
    result |= {"blocks": recipe.trained_blocks, "speeds": measure_speeds(recipe)}
    print(json.dumps(result, indent=1))
    write_json(paths.RESULTS / B7_COST, result)
    write_documents(update_documents(read_published()))
    return result


def measure_speeds(recipe: Recipe) -> list[dict]:
    """Return `measure` of both parts, in the recipe's precision and in float32."""
    speeds = []
    for is_mixed in (recipe.mixed_precision, False):
        backbone = load_backbone(recipe.backbone, recipe.image_size, is_mixed, weights=None)
        frozen, model = prepare_training(recipe, backbone, recipe.trained_blocks, is_split=True)
        for batch in BATCH_SIZES:
            images, features = (
                np.random.default_rng(0).uniform(0, 255, (batch, *part.input_shape[1:]))
                for part in (frozen, model)
            )
            of = {"precision": backbone.layers[-1].compute_dtype, "batch": batch}
            for part, step in (
                ("features", partial(frozen.predict_on_batch, images)),
                ("finetune", partial(train, model, features, steps=1)),
            ):
                speeds.append(of | {"part": part} | measure(step, batch))
                print(speeds[-1], file=sys.stderr, flush=True)
    return speeds


def measure(step: Callable[[], object], images: int) -> dict[str, object]:
    """Return images per second and peak GPU memory (10^6 bytes) of a step; None if it lacks any."""
    gc.collect()  # what was measured before holds the GPU's memory in cycles
    try:
        tf.config.experimental.reset_memory_stats("GPU:0")
        rates = spread(images / take_turns({"step": step})["step"])
    except tf.errors.ResourceExhaustedError:
        return {"images_per_s": None, "peak_memory_mb": None}
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return {"images_per_s": rates, "peak_memory_mb": round(peak / 1e6)}


main = make_main(measure_costs)

if __name__ == "__main__":
    sys.exit(main())
