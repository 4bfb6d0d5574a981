"""The classifier file: the trained weights, and how to use them.

A classifier file is a safetensors file (https://github.com/huggingface/safetensors), which holds
numbers and text but no code. It has a float16 tensor "layer/weight" for each weight of the head and
the trained blocks, except BatchNorm, and of the unit `familiarity` (training.familiarity) if there
is one. Its header holds, under the key "marsclf", a JSON text:

- format, version: "marsclf-classifier", 1;
- backbone: a key of marsclf.networks.specs.INPUT_SIZES; image_size: side of the input, pixels;
- head_hidden: units of the head's hidden layer, 0 for a linear head;
- first_learning_block: the first trained block of the backbone, or null;
- classes: the names of the outputs, in order: 2 to 1,000 different ones;
- zooms: an image is classified at each of them and the predictions are pooled;
- calibration: {"kind": "temperature", "temperature": T}; the logits are divided by T;
- training: where the weights come from (preset, seed, commit, dataset, data_digest).
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from marsclf.errors import MarsclfError
from marsclf.files import regular_file, replace_atomically
from marsclf.images.views import check_zooms
from marsclf.networks.specs import BLOCKS

if TYPE_CHECKING:  # Keras takes seconds to load, and reading a file does not need it
    import keras

    from marsclf.training.familiarity import Familiarity

FORMAT, VERSION, METADATA = "marsclf-classifier", 1, "marsclf"
FAMILIARITY = "familiarity/"


def read(path: Path) -> tuple[dict[str, np.ndarray], dict, str]:
    """Read a classifier file: float32 weights by name, metadata, SHA-256 of the file.

    The file need not be trusted. Raises MarsclfError unless it is a valid classifier file.
    """
    try:
        with regular_file(path).open("rb") as stream:
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


def build_network(
    file: Path, weights: dict[str, np.ndarray], metadata: dict
) -> tuple["keras.Model", "keras.Model"]:
    """Return the network of a classifier file, images to probabilities, and the complete network.

    The latter gives the familiarity in one more column, if the file has it. `weights` and
    `metadata` are what `read` returned for `file`. Raises MarsclfError if they do not fit.
    """
    from marsclf.networks.backbones import build_backbone
    from marsclf.training.familiarity import with_familiarity
    from marsclf.training.stages import build_head, join

    backbone = build_backbone(metadata["backbone"], metadata["image_size"])
    width, classes = backbone.output_shape[1], len(metadata["classes"])
    model = join(backbone, build_head(width, metadata["head_hidden"], 0.0, classes))
    has_unit = any(key.startswith(FAMILIARITY) for key in weights)
    complete = with_familiarity(model) if has_unit else model
    learned = _learned(complete, metadata["first_learning_block"])
    for key in [*learned, *weights]:
        if key not in weights or key not in learned or weights[key].shape != learned[key].shape:
            raise MarsclfError(
                f"{file} is not a valid classifier file: its weights {key[:80]!r} are missing, or "
                f"do not fit {metadata['backbone']}."
            )
        learned[key].assign(weights[key])
    return model, complete


def save_classifier(
    model: "keras.Model",
    path: Path,
    *,
    backbone: str,
    classes: Sequence[str],
    training: dict,
    zooms: Sequence[float] = (1.0,),
    temperature: float = 1.0,
    familiarity: "Familiarity | None" = None,
) -> None:
    """Write the classifier file of a trained model, images to probabilities (training.stages.join).

    `backbone` is the name of the model's backbone; for the others see the module's docstring.
    Raises MarsclfError for weights that float16 cannot hold, and if BatchNorm was trained.
    """
    from marsclf.networks.backbones import build_backbone
    from marsclf.training.familiarity import with_familiarity

    size = model.input_shape[1]
    complete = with_familiarity(model, familiarity) if familiarity else model
    untrained, trained = _variables(build_backbone(backbone, size)), _variables(complete)
    changed = [key for key in trained if not np.array_equal(trained[key], untrained.get(key))]
    first = next((block for block in BLOCKS if any(key.startswith(block) for key in changed)), None)
    weights = {}
    with np.errstate(over="ignore"):
        for key, variable in _learned(complete, first).items():
            weights[key] = np.array(variable).astype(np.float16)
            if not np.isfinite(weights[key]).all():
                raise MarsclfError(f"The weights {key} are too large for float16, or not finite.")
    if lost := {*changed} - {*weights}:
        raise MarsclfError(f"The weights {min(lost)} have changed, but BatchNorm must be frozen.")
    hidden = (layer.units for layer in model.layers if layer.name == "head_hidden")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "backbone": backbone,
        "image_size": size,
        "head_hidden": next(hidden, 0),
        "first_learning_block": first,
        "classes": list(classes),
        "zooms": list(zooms),
        "calibration": {"kind": "temperature", "temperature": temperature},
        "training": training,
    }
    with replace_atomically(path) as temporary:
        save_file(weights, temporary, {METADATA: json.dumps(metadata)})


def _learned(model: "keras.Model", first: str | None) -> dict[str, "keras.Variable"]:
    """Return the weights that a file holds: blocks from `first` up, no BatchNorm, and the rest."""
    blocks = BLOCKS[BLOCKS.index(first) :] if first else ()
    parts = ("head_", "probabilities/", FAMILIARITY, *blocks)
    every = _variables(model).items()
    return {key: weight for key, weight in every if key.startswith(parts) and "bn/" not in key}


def _variables(model: "keras.Model") -> dict[str, "keras.Variable"]:
    """Return the model's weights by "layer/weight", without the states of dropout."""
    # Keras numbers its layer `normalization` by what was built before.
    return {
        f"{re.sub('^normalization_[0-9]+$', 'normalization', layer.name)}/{weight.name}": weight
        for layer in model.layers
        for weight in layer.weights
        if "seed_generator" not in weight.path
    }


def _check(metadata: dict) -> None:
    """Raise an error unless the metadata have the form in the module's docstring."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"its header does not describe a {FORMAT}")
    values = defaultdict(str, metadata | dict(metadata.get("calibration", {})))
    size, units, temperature = map(values.get, ("image_size", "head_hidden", "temperature"))
    classes = values["classes"]
    names = {n for n in classes if isinstance(n, str) and n.strip() and n.isprintable()}
    is_valid = {
        "version": values["version"] == VERSION,
        "backbone": isinstance(values["backbone"], str),
        "image_size": isinstance(size, int) and 32 <= size <= 1024,
        "head_hidden": isinstance(units, int) and 0 <= units <= 8192,
        "first_learning_block": values["first_learning_block"] in (None, *BLOCKS),
        "classes": isinstance(classes, list) and 2 <= len(names) == len(classes) <= 1000,
        "kind": values["kind"] == "temperature",
        "temperature": isinstance(temperature, int | float) and 0.01 <= temperature <= 100,
        "training": isinstance(values["training"], dict),
    }
    for key, valid in is_valid.items():
        if not valid:
            raise ValueError(f"its {key} is {values[key]!r:.150}, which marsclf cannot use")
    check_zooms(values["zooms"])
