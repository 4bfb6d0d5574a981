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
from marsclf.data.msl import Dataset
from marsclf.pipeline.presets import parameters_of
from marsclf.training.recipe import Recipe
from tools import gpu_cost

TOO_LARGE, SMALLER = 4, 2


@pytest.fixture(scope="module")
def small() -> Recipe:
    """The recipe of the preset `b7`, but of a small network that trains its last blocks alone."""
    changes = {"backbone": "EfficientNetB0", "image_size": 64, "finetune_blocks": ["block7", "top"]}
    changes |= {"finetune_batch_size": SMALLER, "finetune_accumulate": 2}
    return replace(Recipe(**parameters_of("b7")), **changes)


@pytest.fixture(scope="module")
def speeds(small: Recipe) -> list[dict]:
    """What is measured in one precision, where training has no memory for TOO_LARGE images."""
    train = keras.Model.train_on_batch

    def refuse(model: keras.Model, x: np.ndarray, *arguments: object) -> object:
        if len(x) == TOO_LARGE:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return train(model, x, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "train_on_batch", refuse)
        patch.setattr(gpu_cost, "REPEATS", 2)
        patch.setattr(gpu_cost, "PRECISIONS", ("mixed_bfloat16",))
        return gpu_cost.measure_on_gpu(small, [(64, 64)], (TOO_LARGE, SMALLER))


def test_both_stages_are_measured_and_a_lack_of_memory_is_told(speeds: list[dict]) -> None:
    assert [(record["stage"], record["batch"], record["outcome"]) for record in speeds] == [
        ("features", TOO_LARGE, "measured"),
        ("features", SMALLER, "measured"),
        ("finetune", TOO_LARGE, "out of memory"),
        ("finetune", SMALLER, "measured"),
    ]
    for record in speeds:
        assert (record["sides"], record["precision"]) == ([64, 64], "mixed_bfloat16")
        if record["outcome"] == "measured":
            rates = record["images_per_s"]
            assert 0 < rates["min"] <= rates["median"] <= rates["max"] < math.inf


def test_another_error_ends_the_measurement(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("another one")

    monkeypatch.setattr(gpu_cost, "take_turns", fail)
    with pytest.raises(ValueError, match="another one"):
        gpu_cost.measure_stage("features", small, (32, 32), "float32", 1)


def speed(stage: str, batch: int, images_per_s: float, **changes: object) -> dict:
    spread = dict.fromkeys(("median", "min", "max"), images_per_s)
    record = {"stage": stage, "sides": [64, 64], "precision": "mixed_bfloat16", "batch": batch}
    record |= {"outcome": "measured", "images_per_s": spread, "peak_memory_mb": 2340}
    return record | changes


def test_the_complete_recipe_by_hand(small: Recipe) -> None:
    # In training 8 images of one class and 2 of another, in validation 3 and 1, in test 6.
    labels, splits = [8] * 8 + [24] * 2 + [8] * 3 + [24] + [8] * 6, {"train": 10, "val": 4}
    index = pd.DataFrame({"label": labels, "split": np.repeat([*splits, "test"], [10, 4, 6])})
    index = index.assign(path=[f"{number}.JPG" for number in range(20)], sol=range(20))
    recipe = replace(small, test_zooms=[1.0, 0.5], finetune_epochs=5, views=1, views_rare=24)
    rates = [
        speed("features", 16, 0.5),
        speed("finetune", 2, 0.25),
        # None of these is what the recipe does.
        speed("features", 32, 50.0),
        speed("features", 16, 50.0, sides=[48, 64]),
        speed("finetune", 2, 50.0, precision="float32"),
    ]
    # Views: 8 of the common class, 2 x sqrt(8 / 2) of the rare one; validation 4; at two zooms all
    # 20 images and, under 8 conditions, the 4 of validation. Training: 5 epochs of 10 and 4.
    assert gpu_cost.estimate_recipe(recipe, index, rates) == {
        "images": {"features": 8 + 2 * 2 + 4 + 2 * (20 + 8 * 4), "finetune": 5 * (10 + 4)},
        "batches": {"features": 16, "finetune": 2},
        "minutes": round((120 / 0.5 + 70 / 0.25) / 60, 1),
    }
    rates[1]["outcome"] = "out of memory"
    assert gpu_cost.estimate_recipe(recipe, index, rates)["minutes"] is None


@pytest.mark.parametrize("name", ["sample", "other", "msl-v1"])
def test_what_the_real_images_give_is_stored_and_shown(
    name: str,
    sample_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = parameters_of("b7")
    enter_project(monkeypatch, tmp_path)
    (tmp_path / "README.md").write_text("<!-- b7-gpu:begin -->\nold\n<!-- b7-gpu:end -->\n")
    complete = {"images": {"features": 12345, "finetune": 6789}, "minutes": 91.4}
    complete |= {"batches": {"features": 16, "finetune": 2}}
    dataset = replace(sample_dataset, name=name)
    monkeypatch.setattr(gpu_cost, "open_dataset", lambda _: dataset)
    monkeypatch.setattr(gpu_cost, "parameters_of", lambda _: parameters)
    monkeypatch.setattr(gpu_cost, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_cost, "measure_on_gpu", lambda *_: [speed("features", 16, 123.45)])
    monkeypatch.setattr(gpu_cost, "estimate_recipe", lambda *_: complete)
    result = gpu_cost.measure_costs(None)
    file = paths.RESULTS / "b7_gpu_cost.json"
    text = (tmp_path / "README.md").read_text()
    if name == "msl-v1":
        assert json.loads(file.read_text()) == json.loads(json.dumps(result))
        assert "| features | 64 × 64 | mixed_bfloat16 | 123.5, 2.3 GB |" in text
        assert "`b7` takes at most 91 minutes and 4.57 dollars, at an assumed 3 dollars" in text
    else:
        assert not file.exists() and "old" in text
