"""What B7 costs: the scale of its random weights, the speed of both stages, the whole recipe.

Measured for real, with a small network on the CPU.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from marsclf import paths
from marsclf.data import msl as data
from marsclf.data.msl import Dataset
from marsclf.networks.backbones import build_backbone, split_frozen
from marsclf.pipeline.presets import parameters_of
from marsclf.training.recipe import Recipe
from tools import b7_cost, bench, publish, stage_speed
from tools.b7_cost import set_scale
from tools.tables import b7_gpu_table

SIDES = (64, 64)
TOO_LARGE, SMALLER = 4, 2


def test_batchnorm_takes_the_statistics_of_the_images() -> None:
    keras.utils.set_random_seed(0)
    network = build_backbone("EfficientNetB0", 64, weights=None)
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3)).astype(np.float32)
    before = network.predict_on_batch(images)
    set_scale(network, images)
    last = keras.Model(network.input, network.get_layer("top_bn").output)
    scaled = last.predict_on_batch(images)
    np.testing.assert_allclose(scaled.mean(axis=(0, 1, 2)), 0, atol=0.05)
    np.testing.assert_allclose(scaled.std(axis=(0, 1, 2)).mean(), 1, atol=0.05)
    assert network.predict_on_batch(images).std() > 10 * before.std()


@pytest.fixture(scope="module")
def small() -> Recipe:
    """The recipe of the preset `b7`, but of a small network that learns its last blocks alone."""
    changes = {"backbone": "EfficientNetB0", "image_size": 64, "finetune_blocks": ["block7", "top"]}
    changes |= {"finetune_batch_size": 2, "finetune_accumulate": 2}
    return replace(Recipe.of(parameters_of("b7")), **changes)


@pytest.fixture(scope="module")
def measured(small: Recipe, sample_dataset: Dataset) -> dict:
    """What is measured, in one precision, where training has no memory for TOO_LARGE images."""
    train = keras.Model.train_on_batch

    def refuse(model: keras.Model, x: np.ndarray, *arguments: object) -> object:
        if len(x) == TOO_LARGE:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return train(model, x, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "train_on_batch", refuse)
        patch.setattr(stage_speed, "TURNS", 2)
        patch.setattr(b7_cost, "PRECISIONS", ("mixed_bfloat16",))
        sizes = (TOO_LARGE, SMALLER)
        return b7_cost.measure_on_gpu(sample_dataset, small, (SIDES,), sizes, matrix=1024)


def test_both_stages_are_measured_and_a_lack_of_memory_is_told(measured: dict) -> None:
    speeds = measured["speeds"]
    assert [(record["stage"], record["batch"], record["outcome"]) for record in speeds] == [
        ("features", TOO_LARGE, "measured"),
        ("features", SMALLER, "measured"),
        ("finetune", TOO_LARGE, "out-of-memory"),
        ("finetune", SMALLER, "measured"),
    ]
    for record in speeds:
        assert (record["sides"], record["precision"]) == ([*SIDES], "mixed_bfloat16")
        if record["outcome"] == "measured":
            rates = record["images_a_s"]
            assert 0 < rates["min"] <= rates["median"] <= rates["max"] < math.inf
            assert 0 < record["share_of_matrix_product"] < 1.5
            assert record["peak_memory_mb"] is None  # no backend tells it of a CPU
    assert all(0 < rate < math.inf for rate in measured["matrix_product_tflop_a_s"].values())
    assert json.loads(json.dumps(measured))["backend"].startswith("tensorflow 2.")


def test_what_each_stage_counts(small: Recipe) -> None:
    keras.utils.set_random_seed(0)
    network = build_backbone("EfficientNetB0", 64, weights=None)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    forward = stage_speed._features(small, network, images)
    training = stage_speed._finetune(small, network, images)
    frozen, upper = split_frozen(network, small.finetune_blocks)
    head = 2 * (1280 * small.head_hidden + small.head_hidden * 25)
    assert forward.flops == bench.count_flops(network)
    assert training.flops == 3 * (bench.count_flops(upper) + head)
    assert training.inputs.shape == (2, *frozen.output_shape[1:])
    before = network.get_weights()
    training.turn(training.inputs)
    changed = {
        weight.path.split("/")[0]
        for weight, old in zip(network.weights, before, strict=True)
        if not np.array_equal(weight, old)
    }
    assert changed and all(name.startswith(("block7", "top_conv")) for name in changed)


@pytest.mark.parametrize(
    ("error", "lack"),
    [
        (tf.errors.ResourceExhaustedError(None, None, "failed to allocate"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), True),
        (tf.errors.InternalError(None, None, "CUDA_ERROR_OUT_OF_MEMORY"), True),
        (MemoryError(), True),
        (ValueError("the shapes of the rooms differ"), False),
    ],
)
def test_what_tells_of_a_lack_of_memory(error: Exception, lack: bool) -> None:
    assert stage_speed.is_out_of_memory(error) is lack


def test_another_error_ends_the_measurement(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("another one")

    weights = build_backbone("EfficientNetB0", 64, weights=None).get_weights()
    monkeypatch.setattr(keras.Model, "predict_on_batch", fail)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="another one"):
        stage_speed.measure_stages(small, weights, images, "float32", [1], 1e12)


def speed(stage: str, batch: int, images_a_s: float, **changes: object) -> dict:
    spread = dict.fromkeys(("median", "min", "max"), images_a_s)
    record = {"stage": stage, "sides": [64, 64], "precision": "mixed_bfloat16", "batch": batch}
    record |= {"outcome": "measured", "images_a_s": spread, "peak_memory_mb": 2340}
    return record | {"share_of_matrix_product": 0.123, "ready_s": 1.0} | changes


@pytest.fixture
def index() -> pd.DataFrame:
    """Of training 8 images of one class and 2 of another, of validation 3 and 1, of test 6."""
    labels = [8] * 8 + [24] * 2 + [8] * 3 + [24] + [8] * 6
    splits = ["train"] * 10 + ["val"] * 4 + ["test"] * 6
    paths = [f"{number}.JPG" for number in range(20)]
    return pd.DataFrame({"path": paths, "label": labels, "split": splits, "sol": range(20)})


def test_the_whole_recipe_by_hand(small: Recipe, index: pd.DataFrame) -> None:
    recipe = replace(small, test_zooms=[1.0, 0.5], finetune_epochs=5, views=1, views_rare=24)
    speeds = [
        speed("features", 16, 0.5),
        speed("finetune", 2, 0.25),
        # None of these is what the recipe does.
        speed("features", 32, 50.0),
        speed("features", 16, 50.0, sides=[48, 64]),
        speed("finetune", 2, 50.0, precision="float32"),
    ]
    whole = b7_cost.whole_recipe(recipe, index, speeds)
    # Views: 8 of the common class, 2 x sqrt(8 / 2) of the rare one; validation 4; at two zooms all
    # 20 images and, under 8 conditions, the 4 of validation.
    assert whole["features_images"] == 8 + 2 * 2 + 4 + 2 * (20 + 8 * 4) == 120
    assert whole["finetune_images"] == 5 * (10 + 4) == 70
    assert whole["minutes"] == round((120 / 0.5 + 70 / 0.25) / 60, 1) == 8.7
    assert whole["dollars"] == round(520 / 3600 * b7_cost.DOLLARS_A_GPU_HOUR, 2)


def test_a_recipe_that_does_not_fit_has_no_time(small: Recipe, index: pd.DataFrame) -> None:
    speeds = [speed("features", 16, 0.5), speed("finetune", 2, 1.0, outcome="out-of-memory")]
    whole = b7_cost.whole_recipe(small, index, speeds)
    assert whole["minutes"] is None and whole["dollars"] is None


def test_b7_learns_from_its_own_600_pixels() -> None:
    assert b7_cost.own_sides(Recipe.of(parameters_of("b7"))) == (600, 600)


def test_the_table_says_that_nothing_was_measured() -> None:
    text = b7_gpu_table(None)
    assert text.startswith("On a GPU: **not measured**; `.venv/bin/python -m marsclf b7-cost` on a")


def test_the_table_of_a_result(small: Recipe, measured: dict) -> None:
    about = {"commit": "0123456789abcdef", "hardware": {"gpu": "Some GPU"}}
    whole = {"features_images": 12345, "finetune_images": 6789, "features_batch": 16}
    whole |= {"finetune_batch": 2, "minutes": 91.4, "dollars": 4.5, "dollars_an_hour": 3.0}
    lack = speed("features", 2, 1.0, outcome="out-of-memory")
    speeds = [speed("features", 16, 123.45), lack, speed("finetune", 16, 7.0, peak_memory_mb=None)]
    text = b7_gpu_table(measured | about | {"recipe": whole, "speeds": speeds})
    lines = text.splitlines()
    assert lines[0] == "| Stage | Pixels | Precision | Batch of 16 | Batch of 2 |"
    assert lines[2] == (
        "| features | 64 × 64 | mixed_bfloat16 | 123.5, 2.3 GB, 12% | out-of-memory |"
    )
    assert lines[3].startswith("| training step | 64 × 64 | mixed_bfloat16 | 7, –, 12% |")
    assert "`b7` takes 91 minutes at most and 4.50 dollars, at an assumed 3 dollars" in text
    assert "12,345 images through the frozen network in batches of 16" in text
    assert "TFLOP/s in mixed_bfloat16" in text and "on Some GPU; " in text
    whole |= {"minutes": None, "dollars": None}
    text = b7_gpu_table(measured | about | {"recipe": whole, "speeds": speeds})
    assert "is not known, because its batches do not fit in memory" in text


@pytest.mark.parametrize(("name", "stored"), [("msl-v1", True), ("sample", False)])
def test_only_what_the_real_images_gave_is_stored(
    measured: dict,
    sample_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stored: bool,
) -> None:
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    paths.RESULTS.mkdir()
    (paths.RESULTS / "published.json").write_text("[]")
    markers = [
        f"<!-- {what}:{end} -->" for what in ("results", "b7-gpu") for end in ("begin", "end")
    ]
    (tmp_path / "README.md").write_text("\n".join(markers) + "\n")
    publish.rewrite_tables()
    assert "On a GPU: **not measured**" in (tmp_path / "README.md").read_text()
    publish.verify()
    monkeypatch.setattr(data, "open_dataset", lambda _: replace(sample_dataset, name=name))
    monkeypatch.setattr(b7_cost, "has_gpu", lambda: True)
    # Measured before, for real; what is asked for here would take B7 hours on a processor.
    monkeypatch.setattr(b7_cost, "measure_on_gpu", lambda *_: measured)
    result = b7_cost.measure_b7(None)
    path = paths.RESULTS / "b7_gpu_cost.json"
    assert path.exists() is stored
    assert ("not measured" in (tmp_path / "README.md").read_text()) is not stored
    if stored:
        assert json.loads(path.read_text()) == json.loads(json.dumps(result))
        assert {"time", "commit", "dataset", "weights", "backend", "hardware"} <= result.keys()
        assert b7_gpu_table(result) in (tmp_path / "README.md").read_text()
    publish.verify()
