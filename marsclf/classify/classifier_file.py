"""The classifier file: the weights that training changed, and how to use them.

A classifier file is a safetensors file (https://github.com/huggingface/safetensors), which holds
numbers and text but no code. It has one float16 tensor named "layer/weight" for each weight that
differs from the ImageNet backbone's. Its header holds, under the key "marsclf", a JSON text:

- format, version: "marsclf-classifier", 1;
- backbone: a key of marsclf.networks.backbones.SPECS; image_size: side of the input, pixels;
- head_hidden: units of the head's hidden layer, 0 for a linear head;
- first_learning_block: the first block of the backbone with weights in the file, or null;
- classes: the names of the outputs, in order;
- zooms: an image is classified at each of them and the predictions are pooled;
- calibration: {"kind": "temperature", "temperature": T}; the logits are divided by T;
- training: where the weights come from (preset, seed, commit, dataset, data_digest).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from marsclf.data.msl import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, sha256_of
from marsclf.images.views import check_zooms

if TYPE_CHECKING:  # Keras takes seconds to load, and reading a file does not need it
    import keras

FORMAT, VERSION = "marsclf-classifier", 1
METADATA = "marsclf"
MAX_BYTES = 300_000_000  # EfficientNetB7, completely fine-tuned, takes 130 MB
MAX_HEADER_BYTES = 1_000_000


def write(path: Path, weights: dict[str, np.ndarray], metadata: dict) -> None:
    """Write a classifier file. Raises MarsclfError for weights that float16 cannot hold."""
    with np.errstate(over="ignore"):
        tensors = {name: weight.astype(np.float16) for name, weight in weights.items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise MarsclfError(f"The weights {name} are too large for float16, or not finite.")
    text = json.dumps({"format": FORMAT, "version": VERSION} | metadata)
    with replace_atomically(path) as temporary:
        save_file(tensors, temporary, {METADATA: text})


def read(path: Path) -> tuple[dict[str, np.ndarray], dict, str]:
    """Read a classifier file: float32 weights by name, metadata, SHA-256 of the file.

    The file need not be trusted. Raises MarsclfError unless it is a valid classifier file.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        content = path.read_bytes()
        if int.from_bytes(content[:8], "little") > MAX_HEADER_BYTES:
            raise ValueError(f"it has no safetensors header of at most {MAX_HEADER_BYTES:,} bytes")
        with safe_open(path, framework="numpy") as file:
            metadata = _checked(json.loads((file.metadata() or {}).get(METADATA, "null")))
            weights = {}
            for name in file.keys():  # noqa: SIM118
                if file.get_slice(name).get_dtype() != "F16":
                    raise ValueError(f"the tensor {name!r} is not float16")
                weights[name] = file.get_tensor(name).astype(np.float32)
                if not np.isfinite(weights[name]).all():
                    raise ValueError(f"the tensor {name!r} holds numbers that are not finite")
    except OSError as error:
        raise MarsclfError(f"The classifier {path} cannot be read ({error.strerror}).") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise MarsclfError(
            f"{path} is not a classifier file of marsclf ({reason}): name the "
            "classifier.safetensors that a run wrote."
        ) from None
    return weights, metadata, sha256_of(content)


def build_network(file: Path, weights: dict[str, np.ndarray], metadata: dict) -> "keras.Model":
    """Return the network of a classifier file, images to probabilities.

    `weights` and `metadata` are what `read` returned for `file`. Raises MarsclfError if they do not
    fit each other.
    """
    from marsclf.networks.backbones import SPECS, build_backbone
    from marsclf.training.stages import build_head, join

    name = metadata["backbone"]
    if name not in SPECS:
        raise MarsclfError(f"{file} needs a backbone {name[:50]!r}; marsclf knows {[*SPECS]}.")
    backbone = build_backbone(name, metadata["image_size"])
    model = join(backbone, build_head(SPECS[name].feature_width, metadata["head_hidden"], 0.0))
    variables = _variables(model)
    for key in variables.keys() - weights.keys():
        if key.startswith(("head_", "probabilities/")):
            raise MarsclfError(f"{file} is not a complete classifier file: it lacks {key}.")
    for key, weight in weights.items():
        if key not in variables or tuple(variables[key].shape) != weight.shape:
            raise MarsclfError(
                f"{file} does not fit {name}: it has weights {key[:80]!r} of shape {weight.shape}."
            )
        variables[key].assign(weight)
    return model


def save_classifier(
    model: "keras.Model",
    path: Path,
    *,
    backbone: str,
    training: dict,
    zooms: Sequence[float] = (1.0,),
    temperature: float = 1.0,
) -> None:
    """Write the classifier file of a trained model.

    Args:
        model: images to probabilities, as training.stages.join returns it.
        path: the file to write.
        backbone: name of the model's backbone.
        training: where the weights come from: preset, seed, commit, dataset, data_digest.
        zooms: enlargements at which to classify an image.
        temperature: the logits are divided by it, for calibration.

    Raises MarsclfError for weights that float16 cannot hold.
    """
    from marsclf.networks.backbones import BLOCKS, build_backbone

    size = model.input_shape[1]
    untrained = _variables(build_backbone(backbone, size))
    changed = {
        key: value
        for key, variable in _variables(model).items()
        if not np.array_equal(value := np.array(variable), untrained.get(key))
    }
    learned = [block for block in BLOCKS if any(key.startswith(block) for key in changed)]
    hidden = [layer.units for layer in model.layers if layer.name == "head_hidden"]
    metadata = {
        "backbone": backbone,
        "image_size": size,
        "head_hidden": hidden[0] if hidden else 0,
        "first_learning_block": learned[0] if learned else None,
        "classes": list(CLASS_NAMES),
        "zooms": list(zooms),
        "calibration": {"kind": "temperature", "temperature": temperature},
        "training": training,
    }
    write(path, changed, metadata)


def _variables(model: "keras.Model") -> dict[str, "keras.Variable"]:
    """Return the model's weights by "layer/weight", without the states of dropout."""
    return {
        f"{layer.name}/{weight.name}": weight
        for layer in model.layers
        for weight in layer.weights
        if "seed_generator" not in weight.path
    }


def _checked(metadata: object) -> dict:
    """Return the metadata if they have the form in the module's docstring; raise ValueError."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"its header does not describe a {FORMAT}")
    calibration = metadata.get("calibration")
    calibration = calibration if isinstance(calibration, dict) else {}
    values = metadata | {key: calibration.get(key) for key in ("kind", "temperature")}
    is_valid: dict[str, Callable[[Any], bool]] = {
        "version": lambda version: version == VERSION,
        "backbone": lambda name: isinstance(name, str),
        "image_size": lambda size: type(size) is int and 32 <= size <= 1024,
        "head_hidden": lambda units: type(units) is int and 0 <= units <= 8192,
        "classes": lambda names: names == list(CLASS_NAMES),
        "kind": lambda kind: kind == "temperature",
        "temperature": lambda value: type(value) in (int, float) and 0.01 <= value <= 100,
        "training": lambda training: isinstance(training, dict),
    }
    for key, valid in is_valid.items():
        if not valid(values.get(key)):
            raise ValueError(f"its {key} is {values.get(key)!r:.150}, which marsclf cannot use")
    check_zooms(metadata.get("zooms"))
    return metadata
