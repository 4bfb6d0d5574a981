"""The Keras network of a classifier file: built from it, and what it learnt kept in it."""

from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from marsclf.classify import classifier_file
from marsclf.data.msl import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.networks.backbones import BLOCKS, SPECS, build_backbone
from marsclf.training.stages import build_head, join


def build_network(file: Path, weights: dict[str, np.ndarray], metadata: dict) -> keras.Model:
    """Return the network of a classifier file, images to probabilities (see training.join).

    `weights` and `metadata` are what classifier_file.read found in `file`. Raises MarsclfError
    where they do not fit each other.
    """
    name = metadata["backbone"]
    if name not in SPECS:
        raise MarsclfError(f"{file} asks for a backbone {name[:50]!r}; known are {[*SPECS]}.")
    backbone = build_backbone(name, metadata["image_size"])
    model = join(backbone, build_head(SPECS[name].feature_width, metadata["head_hidden"], 0.0))
    places = _places(model)
    missing = [key for key in places if _is_head(key) and key not in weights]
    if missing:
        raise MarsclfError(f"{file} is not a whole classifier file: it lacks {missing[0]}.")
    for key, weight in weights.items():
        place = places.get(key)
        if place is None or tuple(place.shape) != weight.shape:
            raise MarsclfError(
                f"{file} does not fit {name}: it gives {key[:80]!r} with the shape {weight.shape}."
            )
        place.assign(weight)
    return model


def save_classifier(
    model: keras.Model,
    path: Path,
    *,
    backbone: str,
    training: dict,
    zooms: Sequence[float] = (1.0,),
    temperature: float = 1.0,
) -> None:
    """Write the classifier file of a model made by training.join: the weights that it learnt.

    Args:
        model: images to probabilities.
        path: the file; see marsclf.classifier_file.
        backbone: the name of the model's backbone.
        training: where the weights come from: preset, seed, commit, dataset, data_digest.
        zooms: at which it is to look at an image, 0.1 to 10.
        temperature: what calibration divides the logits by.
    """
    size = model.input_shape[1]
    untrained = _places(build_backbone(backbone, size))
    changed = {
        key: value
        for key, weight in _places(model).items()
        if not np.array_equal(value := np.array(weight), untrained.get(key))
    }
    learnt = [block for block in BLOCKS if any(key.startswith(block) for key in changed)]
    hidden = [layer.units for layer in model.layers if layer.name == "head_hidden"]
    metadata = {
        "backbone": backbone,
        "image_size": size,
        "head_hidden": hidden[0] if hidden else 0,
        "first_learning_block": learnt[0] if learnt else None,
        "classes": list(CLASS_NAMES),
        "zooms": list(zooms),
        "calibration": {"kind": "temperature", "temperature": temperature},
        "training": training,
    }
    classifier_file.write(path, changed, metadata)


def _places(model: keras.Model) -> dict[str, keras.Variable]:
    """Return the model's variables by "layer/weight", without the states of dropout."""
    return {
        f"{layer.name}/{weight.name}": weight
        for layer in model.layers
        for weight in layer.weights
        if "seed_generator" not in weight.path
    }


def _is_head(key: str) -> bool:
    return key.startswith(("head_", "probabilities/"))
