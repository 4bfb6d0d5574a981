"""Fast prediction with a frozen Keras network: exported once to OpenVINO, checked against Keras.

OpenVINO predicts one image at a time on each core: a batch of one fits into the core's cache, and
the output for an image does not depend on the other images. If OpenVINO is missing or its outputs
differ from Keras's, Keras predicts, with a warning; on a GPU Keras always predicts.
"""

import json
import re
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, sha256_of
from marsclf.provenance import cores

if TYPE_CHECKING:  # Keras takes seconds to load, and an exported network does not need it
    from marsclf.networks.pinned import keras

LARGEST_DIFFERENCE = 1e-3  # relative to the largest output; float32 engines differ by about 1e-5
NETWORK = "network.xml"  # file in the folder of an exported network
CHUNK = 16  # items that one thread loads, then predicts
CHUNKS_AHEAD = 4  # in progress or waiting, beyond one per core; bounds the memory

Predictor = Callable[[np.ndarray], np.ndarray]

# OpenVINO's converter reports its use to Intel, unless this package is missing.
sys.modules.setdefault("openvino_telemetry", None)


def network_digest(model: "keras.Model") -> str:
    """Return a SHA-256 over the model's layers and weights: equal networks, equal digest."""
    from marsclf.networks.pinned import keras

    described = keras.saving.serialize_keras_object(model)
    described.pop("compile_config", None)  # the training settings are not part of the network
    config = json.dumps(described, sort_keys=True, default=str)
    # Keras numbers the layers that it names itself by what was built before.
    numbered = r'"(input_layer|rescaling|normalization|keras_tensor)_\d+(CLONE)?"'
    config = re.sub(numbered, r'"\1"', config)
    return sha256_of(config.encode(), *(np.ascontiguousarray(w) for w in model.get_weights()))


def has_gpu() -> bool:
    """Tell whether TensorFlow has a GPU to work on."""
    return gpu_capability() is not None


def gpu_capability() -> tuple[int, int] | None:
    """Return the compute capability of the first GPU, such as (7, 5); None without a GPU."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return None
    return tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))


def make_predictor(
    model: "keras.Model", cache: Path, sample: np.ndarray | None = None, name: str | None = None
) -> Predictor:
    """Return a function from images or features (n, ...) to the model's outputs (n, ...).

    Several threads may call it at once. The exported network is kept in `cache` under `name`, which
    must identify its content, or under its digest; the next call for an equal model only loads it.
    Upon export, its outputs for `sample`, or for images of noise, must equal Keras's to 1e-3.
    """
    if not has_gpu():
        name = name or network_digest(model)[:32]
        try:
            predict = stored_predictor(name, cache)
            if predict is None:  # missing or damaged
                with replace_atomically(cache / "networks" / name) as folder:
                    _save_openvino(model, folder / NETWORK)
                    _check_export(folder / NETWORK, model, sample)
                predict = _compile(cache / "networks" / name / NETWORK)
            return predict
        except Exception as error:  # OpenVINO's errors have no common base class
            if predict := stored_predictor(name, cache):  # another process was faster
                return predict
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"predicting with Keras, which is slower: {reason}", stacklevel=2)
    one_at_a_time = threading.Lock()

    def predict_with_keras(images: np.ndarray) -> np.ndarray:
        with one_at_a_time:
            return model.predict_on_batch(images)

    return predict_with_keras


def stored_predictor(name: str, cache: Path) -> Predictor | None:
    """Return the predictor that make_predictor exported under `name`; None if it is not usable.

    Does not load Keras.
    """
    with suppress(Exception):
        return _compile(cache / "networks" / name / NETWORK)
    return None


def predict_each(
    items: Iterable, load: Callable[..., np.ndarray], predict: Predictor
) -> Iterator[np.ndarray]:
    """Yield the output for `load(item)` of each item, in order.

    Each thread loads a chunk of items and then predicts it, so that loading and inference share all
    cores without waiting for each other; one thread more than cores fills the gaps.
    """
    iterator = iter(items)
    chunks = iter(lambda: list(islice(iterator, CHUNK)), [])

    def work(chunk: list) -> np.ndarray:
        return predict(np.stack([load(item) for item in chunk]))

    with ThreadPoolExecutor(cores() + 1) as pool:
        ahead = deque(pool.submit(work, chunk) for chunk in islice(chunks, cores() + CHUNKS_AHEAD))
        while ahead:
            yield from ahead.popleft().result()
            ahead.extend(pool.submit(work, chunk) for chunk in islice(chunks, 1))


def _save_openvino(model: "keras.Model", file: Path) -> None:
    """Write a Keras model as `file`, an .xml, with the weights in a .bin beside it."""
    import openvino
    import tensorflow as tf
    from tensorflow.python.framework import convert_to_constants

    # Not Keras's own export, which takes four times as long. The converter gets a file, as on
    # Python 3.13 it does not find TensorFlow and takes no function.
    pixels = tf.TensorSpec((1, *model.input_shape[1:]), tf.float32)
    traced = tf.function(lambda x: model(x, training=False)).get_concrete_function(pixels)
    frozen = convert_to_constants.convert_variables_to_constants_v2(traced)
    graph = file.with_suffix(".pb")
    graph.parent.mkdir(exist_ok=True)
    graph.write_bytes(frozen.graph.as_graph_def().SerializeToString())
    openvino.save_model(openvino.convert_model(graph), file, compress_to_fp16=False)
    graph.unlink()


def _check_export(file: Path, model: "keras.Model", sample: np.ndarray | None) -> None:
    """Raise MarsclfError if OpenVINO and Keras differ for `sample`, or (None) for noise."""
    if sample is None:
        shape = (4, *model.input_shape[1:])
        sample = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = _compile(file)(sample)
    expected = np.asarray(model(sample, training=False))
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    if not difference < LARGEST_DIFFERENCE:
        raise MarsclfError(f"OpenVINO's outputs differ from Keras's by {difference:.1e}.")


def _compile(file: Path) -> Predictor:
    import openvino

    core = openvino.Core()
    network = core.read_model(file)
    shape = [1, *network.input().partial_shape.get_max_shape()[1:]]
    network.reshape(shape)
    options = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(network, "CPU", options | {"NUM_STREAMS": cores()})
    threads = threading.local()

    def predict(inputs: np.ndarray) -> np.ndarray:
        if not hasattr(threads, "request"):
            threads.request = compiled.create_infer_request()
        images = (one[np.newaxis].astype(np.float32) for one in inputs)
        return np.concatenate([threads.request.infer(image)[0] for image in images])

    # Two threads that are the first to hand an array to OpenVINO's bindings can deadlock, one with
    # the lock of a C++ static, the other with Python's. So this thread is the first.
    predict(np.zeros(shape, np.float32))
    return predict
