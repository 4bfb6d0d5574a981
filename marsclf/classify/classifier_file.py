"""The classifier file: the weights that training changed, and how to use them.

A classifier file is a safetensors file (https://github.com/huggingface/safetensors), which holds
numbers and text but no code. It has one float16 tensor named "layer/weight" for each weight that
differs from the ImageNet backbone's. Its header holds, under the key "marsclf", a JSON text:

- format, version: "marsclf-classifier", 1;
- backbone: a key of marsclf.networks.backbones.SPECS; image_size: side of the input, pixels;
- head_hidden: units of the head's hidden layer, 0 for a linear head;
- classes: the names of the outputs, in order;
- zooms: an image is classified at each of them and the predictions are pooled;
- calibration: {"kind": "temperature", "temperature": T}; the logits are divided by T;
- training: where the weights come from (preset, seed, commit, dataset, data_digest).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from marsclf.data.msl import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically
from marsclf.images.views import check_zooms

if TYPE_CHECKING:  # Keras takes seconds to load, and reading a file does not need it
    import keras

FORMAT, VERSION = "marsclf-classifier", 1
METADATA = "marsclf"


def read(path: Path) -> tuple[dict[str, np.ndarray], dict, str]:
    """Read a classifier file: float32 weights by name, metadata, SHA-256 of the file.

    The file need not be trusted. Raises MarsclfError unless it is a valid classifier file.
    """
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            _check(metadata)
            names = file.keys()
            weights = {name: file.get_tensor(name).astype(np.float32) for name in names}
        if not all(np.isfinite(weight).all() for weight in weights.values()):
            raise ValueError("it holds weights that are not finite")
    except OSError as error:
        raise MarsclfError(f"The classifier {path} cannot be read ({error.strerror}).") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise MarsclfError(
            f"{path} is not a classifier file of marsclf ({reason}): name the "
            "classifier.safetensors that a run wrote."
        ) from None
    return weights, metadata, digest


def build_network(file: Path, weights: dict[str, np.ndarray], metadata: dict) -> "keras.Model":
    """Return the network of a classifier file, images to probabilities.

    `weights` and `metadata` are what `read` returned for `file`. Raises MarsclfError if they do not
    fit each other.
    """
    from marsclf.networks.backbones import build_backbone
    from marsclf.training.stages import build_head, join

    backbone = build_backbone(metadata["backbone"], metadata["image_size"])
    model = join(backbone, build_head(backbone.output_shape[1], metadata["head_hidden"], 0.0))
    variables = _variables(model)
    head = [key for key in variables if key.startswith(("head_", "probabilities/"))]
    for key in [*head, *weights]:
        if key not in weights or key not in variables or weights[key].shape != variables[key].shape:
            raise MarsclfError(
                f"{file} is not a valid classifier file: its weights {key[:80]!r} are missing, or "
                f"do not fit {metadata['backbone']}."
            )
        variables[key].assign(weights[key])
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
    """Write the classifier file of a trained model, images to probabilities (training.stages.join).

    `backbone` is the name of the model's backbone; for the others see the module's docstring.
    Raises MarsclfError for weights that float16 cannot hold.
    """
    from marsclf.networks.backbones import build_backbone

    size = model.input_shape[1]
    untrained = _variables(build_backbone(backbone, size))
    changed = {}
    for key, variable in _variables(model).items():
        weight = np.array(variable)
        if not np.array_equal(weight, untrained.get(key)):
            with np.errstate(over="ignore"):
                changed[key] = weight.astype(np.float16)
            if not np.isfinite(changed[key]).all():
                raise MarsclfError(f"The weights {key} are too large for float16, or not finite.")
    hidden = [layer.units for layer in model.layers if layer.name == "head_hidden"]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "backbone": backbone,
        "image_size": size,
        "head_hidden": hidden[0] if hidden else 0,
        "classes": list(CLASS_NAMES),
        "zooms": list(zooms),
        "calibration": {"kind": "temperature", "temperature": temperature},
        "training": training,
    }
    with replace_atomically(path) as temporary:
        save_file(changed, temporary, {METADATA: json.dumps(metadata)})


def _variables(model: "keras.Model") -> dict[str, "keras.Variable"]:
    """Return the model's weights by "layer/weight", without the states of dropout."""
    return {
        f"{layer.name}/{weight.name}": weight
        for layer in model.layers
        for weight in layer.weights
        if "seed_generator" not in weight.path
    }


def _check(metadata: dict) -> None:
    """Raise an error unless the metadata have the form in the module's docstring."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its header does not describe a {FORMAT}")
    values = metadata | metadata["calibration"]
    size, units = values["image_size"], values["head_hidden"]
    is_valid = {
        "version": values["version"] == VERSION,
        "backbone": isinstance(values["backbone"], str),
        "image_size": isinstance(size, int) and 32 <= size <= 1024,
        "head_hidden": isinstance(units, int) and 0 <= units <= 8192,
        "classes": values["classes"] == list(CLASS_NAMES),
        "kind": values["kind"] == "temperature",
        "temperature": 0.01 <= values["temperature"] <= 100,
        "training": isinstance(values["training"], dict),
    }
    for key, valid in is_valid.items():
        if not valid:
            raise ValueError(f"its {key} is {values[key]!r:.150}, which marsclf cannot use")
    check_zooms(metadata["zooms"])
