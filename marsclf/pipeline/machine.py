"""What a training needs, and whether this machine has it: checked before any work."""

import shutil

import psutil

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.networks.engine import has_gpu
from marsclf.networks.specs import input_size_of
from marsclf.pipeline.presets import load_preset
from marsclf.provenance import hardware

LARGE = 300  # pixels: input size of B3; from it up, training without a GPU takes many hours


def choose_preset() -> str:
    """Return the preset for this machine, "b7" with a GPU and else "laptop", and say so."""
    preset, reason = ("b7", "sees a GPU") if has_gpu() else ("laptop", no_gpu())
    print(f"TensorFlow {reason}, so this is the preset {preset}.")
    return preset


def check_machine(preset: str | None, backbone: str, yes_on_cpu: bool) -> None:
    """Print how much memory and disk are free, and fetch the backbone's ImageNet weights.

    Args:
        preset: whose description says how much memory and disk a run needs (None: not checked).
        backbone: the network to train.
        yes_on_cpu: go on without a GPU even if the backbone is large.

    Raises MarsclfError if weights, memory or disk are missing, or a GPU without `yes_on_cpu`.
    """
    if input_size_of(backbone) >= LARGE and not yes_on_cpu and not has_gpu():
        raise MarsclfError(
            f"TensorFlow {no_gpu()}, and {backbone} takes many hours without one: use the preset "
            "laptop, which takes minutes, or agree with --yes-on-cpu (YES_ON_CPU=1 for make, "
            "yes_on_cpu = True in a notebook)."
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
    print(", ".join(f"{found / 1e9:.0f} GB of {kind} free" for kind, found in has.items()))


def no_gpu() -> str:
    """Return that TensorFlow sees no GPU, and how it would, if there is one."""
    fix = "; for CUDA, .venv/bin/pip install 'tensorflow[and-cuda]>=2.21,<2.22'"
    return "sees no GPU" + (f" (there is {gpu}{fix})" if (gpu := hardware()["gpu"]) else "")
