"""What B7 costs: both stages and the complete recipe, measured with a small network on the CPU."""

import json
import math
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from tiny_project import enter_project

from marsclf import paths
from marsclf.data.dataset import Dataset
from marsclf.pipeline.presets import parameters_of
from marsclf.training.recipe import Recipe
from tools import gpu_cost


def load_backbone(_: str, size: int, mixed_precision: bool, weights: None) -> keras.Model:
    """Return two blocks, stem and top, in the precision of a new GPU."""
    policy = "mixed_bfloat16" if mixed_precision else "float32"
    pixels = keras.Input((size, size, 3))
    x = keras.layers.Conv2D(8, 3, strides=4, dtype=policy, name="stem_conv")(pixels)
    x = keras.layers.Conv2D(16, 3, strides=4, dtype=policy, name="top_conv")(x)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D(dtype=policy)(x))


def test_both_stages_are_measured_and_a_lack_of_memory_is_told(monkeypatch) -> None:
    train, trained = keras.Model.train_on_batch, set()

    def train_on_batch(model: keras.Model, x: np.ndarray, *arguments: object) -> object:
        trained.add(len(model.trainable_weights))
        if len(x) == 4:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return train(model, x, *arguments)

    monkeypatch.setattr(keras.Model, "train_on_batch", train_on_batch)
    monkeypatch.setattr(gpu_cost, "BATCH_SIZES", (2, 4))
    monkeypatch.setattr(gpu_cost, "REPEATS", 2)
    monkeypatch.setattr(gpu_cost, "load_backbone", load_backbone)
    speeds = gpu_cost.measure_on_gpu(Recipe(**parameters_of("b7")), [64])
    assert [(r["precision"], r["stage"], r["batch"], r["outcome"]) for r in speeds] == [
        (precision, stage, batch, outcome)
        for precision in ("bfloat16", "float32")
        for stage in ("head", "finetune")
        for batch, outcome in ((2, "measured"), (4, "out of memory"))
    ]
    for rates in (record["images_per_s"] for record in speeds if record["batch"] == 2):
        assert 0 < rates["min"] <= rates["median"] <= rates["max"] < math.inf
    assert trained == {4, 6}  # weights of two layers of the head; with those of block `top`


def speed(stage: str, batch: int, rate: float, **changes: object) -> dict:
    record = {"stage": stage, "pixels": 64, "mixed_precision": True, "batch": batch}
    record |= {"precision": "bfloat16", "outcome": "measured", "peak_memory_mb": 2340}
    return record | {"images_per_s": dict.fromkeys(("median", "min", "max"), rate)} | changes


def test_the_complete_recipe_by_hand() -> None:
    index = pd.DataFrame({"split": np.repeat(["train", "val", "test"], [10, 4, 6]), "label": 8})
    index = index.assign(path=[f"{number}.JPG" for number in range(20)], group=range(20))
    epochs = {"head_epochs": 3, "finetune_epochs": 5, "test_zooms": [1.0, 0.5]}
    parameters = parameters_of("b7", epochs | {"image_size": 64, "finetune_batch_size": 20})
    rates = [
        speed("head", 16, 0.5),
        speed("finetune", 8, 0.25),
        # None of these is what the recipe does.
        speed("head", 8, 50.0),
        speed("head", 32, 50.0),
        speed("head", 16, 50.0, pixels=96),
        speed("finetune", 16, 50.0, mixed_precision=False),
        speed("finetune", 16, 50.0, outcome="out of memory"),
    ]
    # The head: 3 epochs of 10 and 4, and at two zooms all 20 and, under 8 conditions, the 4 of
    # validation. Then 5 epochs of 10 and 4. So 146 / 0.5 and 70 / 0.25 seconds.
    assert gpu_cost.estimate_recipe(parameters, index, rates) == {
        "images": {"head": 146, "finetune": 70},
        "batches": {"head": 16, "finetune": 8},
        "minutes": 9.5,
    }
    assert gpu_cost.estimate_recipe(parameters, index, rates[:1])["minutes"] is None


@pytest.mark.parametrize("name", ["sample", "msl-v1"])
def test_what_the_real_images_give_is_stored_and_shown(
    name: str, sample_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = parameters_of("b7")
    enter_project(monkeypatch, tmp_path)
    (tmp_path / "README.md").write_text("<!-- b7-gpu:begin -->\nold\n<!-- b7-gpu:end -->\n")
    rates = [speed("head", 16, 123.45, pixels=380)]
    rates.append(rates[0] | {"stage": "finetune", "outcome": "out of memory"})
    if name == "msl-v1":
        rates[1] |= {"outcome": "measured", "batch": 16}
    dataset = replace(sample_dataset, name=name)
    monkeypatch.setattr(gpu_cost, "open_dataset", lambda _: dataset)
    monkeypatch.setattr(gpu_cost, "parameters_of", lambda _: parameters)
    monkeypatch.setattr(gpu_cost, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_cost, "measure_on_gpu", lambda *_: rates)
    result = gpu_cost.measure_costs(None)
    file, text = paths.RESULTS / "b7_gpu_cost.json", (tmp_path / "README.md").read_text()
    if name == "msl-v1":
        assert json.loads(file.read_text()) == result
        assert "| head | 380 | bfloat16 | 123.5, 2.3 GB |" in text
        minutes = sum(result["recipe"]["images"].values()) / 123.45 / 60
        assert f"`b7` takes at most {minutes:.0f} minutes and {minutes / 20:.2f} dollars" in text
    else:
        assert not file.exists() and "old" in text
