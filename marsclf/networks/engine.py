"""Running a frozen Keras network quickly: exported once to OpenVINO, checked against Keras.

OpenVINO runs one image a time on each core: a batch of one stays in the core's own cache, and the
answer for an image does not depend on what else is asked. Where OpenVINO is missing, or gives other
numbers, Keras does the work and a warning says so; on a GPU Keras does it anyway.
"""

import itertools
import json
import logging
import re
import shutil
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from marsclf.files import replace_atomically, sha256_of
from marsclf.paths import CACHE
from marsclf.provenance import cores

if TYPE_CHECKING:  # who has an exported network does without Keras, which takes seconds to load
    import keras

LARGEST_DIFFERENCE = 1e-3  # relative to the largest output; float32 engines differ by about 1e-5
CHUNK = 16  # items that one thread loads, then predicts
CHUNKS_AHEAD = 4  # begun or waiting; bounds the memory, whatever the number of images

Predictor = Callable[[np.ndarray], np.ndarray]


def network_digest(model: "keras.Model") -> str:
    """Return a SHA-256 over the model's layers and weights: equal networks, equal digest."""
    import keras

    described = keras.saving.serialize_keras_object(model)
    described.pop("compile_config", None)  # how it is trained is no part of the network
    config = json.dumps(described, sort_keys=True, default=str)
    # Keras numbers the layers that it names itself by what else was built before.
    config = re.sub(
        r'"(input_layer|rescaling|normalization|keras_tensor)_\d+(CLONE)?"', r'"\1"', config
    )
    return sha256_of(config.encode(), *(np.ascontiguousarray(w) for w in model.get_weights()))


def has_gpu() -> bool:
    """Tell whether Keras has a GPU to work on."""
    import keras

    try:
        return bool(keras.distribution.list_devices("gpu"))
    except RuntimeError:  # so JAX says that there is none
        return False


def make_predictor(
    model: "keras.Model",
    cache: Path = CACHE,
    sample: np.ndarray | None = None,
    name: str | None = None,
) -> Predictor:
    """Return a function from images or features (n, ...) to the model's outputs (n, ...).

    Several threads may call it at once. The exported network is kept in `cache` under `name`,
    which must stand for its content, or by a digest of it; so the next call for an equal model only
    loads it. When it is exported, its outputs for `sample`, or for images of noise, must agree with
    Keras's to 1e-3.
    """
    if has_gpu():
        return _keras_predictor(model)
    try:
        return _openvino_predictor(model, cache, sample, name or network_digest(model)[:32])
    except Exception as error:  # OpenVINO's errors have no base of their own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"running on Keras, which is slower: {reason}", stacklevel=2)
        return _keras_predictor(model)


def stored_predictor(
    name: str, input_shape: tuple[int | None, ...], cache: Path = CACHE
) -> Predictor | None:
    """Return what make_predictor exported under `name`, without Keras; None where it is not whole.

    `input_shape` is the model's, such as (None, 224, 224, 3).
    """
    file = _file_of(name, cache)
    if not file.exists():
        return None
    with suppress(Exception):  # damaged: make_predictor exports it anew
        return _compile(file, input_shape)
    return None


def _file_of(name: str, cache: Path) -> Path:
    return cache / "networks" / name / "network.xml"


def _keras_predictor(model: "keras.Model") -> Predictor:
    one_at_a_time = threading.Lock()

    def predict(images: np.ndarray) -> np.ndarray:
        with one_at_a_time:
            return model.predict_on_batch(images)

    return predict


def _openvino_predictor(
    model: "keras.Model", cache: Path, sample: np.ndarray | None, name: str
) -> Predictor:
    openvino, file = _openvino(), _file_of(name, cache)
    predict = stored_predictor(name, model.input_shape, cache)
    if predict is None:  # not there, or damaged
        with replace_atomically(file.parent) as temporary:
            # TensorFlow would log where its copy went, into the notebook.
            logging.getLogger("tensorflow").setLevel(logging.WARNING)
            # Not `format="openvino"`: on Python 3.13 that converter looks in vain for TensorFlow.
            model.export(temporary / "saved_model", format="tf_saved_model", verbose=False)
            converted = openvino.convert_model(temporary / "saved_model")
            openvino.save_model(converted, temporary / file.name, compress_to_fp16=False)
            shutil.rmtree(temporary / "saved_model")
            _check(_compile(temporary / file.name, model.input_shape), model, sample)
        predict = _compile(file, model.input_shape)
    return predict


def _openvino() -> ModuleType:
    # Its converter would tell Intel that it was used; without this package it tells nobody.
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    return openvino


def _compile(file: Path, input_shape: tuple[int | None, ...]) -> Predictor:
    core = _openvino().Core()
    network = core.read_model(file)
    network.reshape([1, *input_shape[1:]])
    compiled = core.compile_model(
        network,
        "CPU",
        {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": cores(),
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    threads = threading.local()

    def predict(inputs: np.ndarray) -> np.ndarray:
        if not hasattr(threads, "request"):
            threads.request = compiled.create_infer_request()
        # Copies, because the request's own output is overwritten by the next image.
        return np.concatenate(
            [threads.request.infer(one[np.newaxis].astype(np.float32))[0].copy() for one in inputs]
        )

    # Two threads that are the first to hand an array to OpenVINO's bindings can wait for each other
    # for ever, one with the lock of a C++ static, one with Python's own. So this one is the first.
    predict(np.zeros((1, *input_shape[1:]), np.float32))
    return predict


def _check(predict: Predictor, model: "keras.Model", sample: np.ndarray | None) -> None:
    if sample is None:
        shape = (4, *model.input_shape[1:])
        sample = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found, expected = predict(sample), model.predict_on_batch(sample)
    difference, cosine = compare(found, expected)
    if not (difference < LARGEST_DIFFERENCE and cosine > 1 - LARGEST_DIFFERENCE**2):
        raise RuntimeError(
            f"OpenVINO's outputs differ from Keras's by {difference:.1e}, cosine {cosine:.6f}"
        )


def compare(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return the largest difference, relative to the largest output, and the smallest cosine."""
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (found, expected))
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(difference), float(cosines.min())


def predict_each(
    items: Iterable, load: Callable[..., np.ndarray], predict: Predictor
) -> Iterator[np.ndarray]:
    """Yield the output for `load(item)` of each item, in order.

    Each thread loads a chunk of items and predicts it, so loading and inference share all cores
    and neither waits for the other; one thread more than there are cores bridges the gaps.
    """
    iterator = iter(items)

    def work(chunk: list) -> np.ndarray:
        return predict(np.stack([load(item) for item in chunk]))

    with ThreadPoolExecutor(cores() + 1) as pool:
        ahead = deque()
        while True:
            while len(ahead) < cores() + CHUNKS_AHEAD:
                chunk = list(itertools.islice(iterator, CHUNK))
                if not chunk:
                    break
                ahead.append(pool.submit(work, chunk))
            if not ahead:
                return
            yield from ahead.popleft().result()
