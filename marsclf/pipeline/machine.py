"""What a training needs, and whether this machine has it: checked before any work."""

import shutil
from collections.abc import Mapping

import pandas as pd
import psutil

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.networks.engine import has_gpu
from marsclf.networks.specs import find_spec
from marsclf.pipeline.presets import load_preset
from marsclf.provenance import cores, hardware
from marsclf.training.later_sols import CONDITIONS
from marsclf.training.sampling import spread_over_groups, view_counts

# Multiplications per second, 10^9. A core of an AMD EPYC reaches 37 with B7's features (see
# results/b7_cost.json). For a T4 this is 5% of the peak of its data sheet, 65 TFLOPS in float16,
# because the many small layers of an EfficientNet are limited by its memory.
CORE_SPEED, T4_SPEED = 37, 1_600
LONG_HOURS = 2  # on a CPU; beyond that, the user must agree


def choose_preset() -> str:
    """Return the preset for this machine, "b7" with a GPU and else "laptop", and say so."""
    preset, reason = ("b7", "sees a GPU") if has_gpu() else ("laptop", _no_gpu())
    print(f"TensorFlow {reason}, so this is the preset {preset}.")
    return preset


def check_machine(
    preset: str | None, parameters: Mapping, index: pd.DataFrame, yes_on_cpu: bool
) -> None:
    """Print what this machine has and how long a training will take; fetch ImageNet weights.

    Args:
        preset: whose description says how much memory and disk a run needs (None: not checked).
        parameters: of notebook 02 or 04.
        index: of the data set; has the columns split, label, group and path.
        yes_on_cpu: go on without a GPU even if that takes more than LONG_HOURS.

    Raises MarsclfError if weights, memory or disk are missing, or a GPU without `yes_on_cpu`.
    """
    work, backbone = multiplications(parameters, index), parameters["backbone"]
    hours = work / (CORE_SPEED * cores()) / 3600
    device = f"{cores()} cores"
    if hours > LONG_HOURS:  # only then: TensorFlow takes seconds to look for a GPU
        if has_gpu():
            hours, device = work / T4_SPEED / 3600, "a T4; this GPU was not measured"
        elif not yes_on_cpu:
            raise MarsclfError(
                f"TensorFlow {_no_gpu()}, and {backbone} takes about {hours:.0f} hours on {device}"
                " (computed): use the preset laptop, which takes minutes, or agree with "
                "--yes-on-cpu (YES_ON_CPU=1 for make, yes_on_cpu = True in a notebook)."
            )
    for folder in (paths.CACHE, paths.RUNS):
        folder.mkdir(parents=True, exist_ok=True)
    has = {
        "memory": psutil.virtual_memory().available,
        "disk": min(shutil.disk_usage(folder).free for folder in (paths.CACHE, paths.RUNS)),
    }
    needs = load_preset(preset)["expected"] if preset else {}
    for kind, found in has.items():
        need = needs.get(f"{kind}_gb", 0)
        if found < need * 1e9:
            place = f" at {paths.CACHE} (MARSCLF_CACHE_DIR moves it)" if kind == "disk" else ""
            lack = f"The preset {preset} needs {need} GB of {kind}{place}"
            raise MarsclfError(f"{lack}, and {found / 1e9:.1f} GB are free: make room for it.")
    if "Lite" not in backbone:  # whose weights are installed already
        from marsclf.networks.backbones import fetch_weights

        fetch_weights(backbone)
    free = ", ".join(f"{found / 1e9:.0f} GB of {kind} free" for kind, found in has.items())
    long = f"{hours:.1f} hours" if hours > 1 else f"{60 * hours:.0f} min"
    print(f"{free}; training takes about {long} on {device} (computed, not measured)")


def multiplications(parameters: Mapping, index: pd.DataFrame) -> float:
    """Return the multiplications of a training by notebook 02 or 04, in 10^9.

    A training step counts as three passes forward, though blocks that are not trained cost less.
    """
    spec = find_spec(parameters["backbone"])
    height, width = parameters.get("sides") or [parameters["image_size"] or spec.input_size] * 2
    forward, trained = count_images(parameters, index)
    scale = height * width / spec.input_size**2
    return spec.multiplications * scale * (forward + 3 * trained)


def count_images(parameters: Mapping, index: pd.DataFrame) -> tuple[int, int]:
    """Return how many images pass the network forward, and how many train it, in notebook 02 or 04.

    Images that only train the head count as forward, those that validate fine-tuning as training.
    """
    train, validation = (index[index["split"] == split] for split in ("train", "val"))
    learning, get = len(train) + len(validation), parameters.get
    if "steps" in parameters:  # notebook 04
        recipes = len(parameters["steps"]) + 1
        forward = recipes * len(index) + 2 * parameters["views"] * len(train)
        return forward, recipes * parameters["upper_epochs"] * len(train)
    forward = parameters["head_epochs"] * learning
    if get("views"):
        views = view_counts(train["label"], parameters["views"], parameters["views_rare"])
        forward = int(views.sum()) + len(validation)
    judged = len(CONDITIONS) * len(spread_over_groups(validation))
    forward += len(parameters["test_zooms"]) * (len(index) + judged)
    networks = len(parameters["ensemble"]) or 1
    return networks * forward, networks * parameters["finetune_epochs"] * learning


def _no_gpu() -> str:
    """Return that TensorFlow sees no GPU, and how it would, if there is one."""
    fix = "; for CUDA, .venv/bin/pip install 'tensorflow[and-cuda]>=2.21,<2.22'"
    return "sees no GPU" + (f" (there is {gpu}{fix})" if (gpu := hardware()["gpu"]) else "")
