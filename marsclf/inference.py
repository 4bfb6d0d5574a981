"""Running a frozen Keras network quickly: exported once to OpenVINO, checked against Keras.

On two cores OpenVINO with a fixed batch shape does the same sums several times as fast as
`model.predict`. Where it is missing, or gives other numbers, Keras does the work and a warning
says so.
"""

import itertools
import json
import logging
import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np

from marsclf.files import replace_atomically, sha256_of
from marsclf.paths import CACHE

BATCH_SIZE = 32
LARGEST_DIFFERENCE = 1e-3  # relative to the largest output; float32 engines differ by about 1e-5
DECODING_THREADS = 2
BATCHES_AHEAD = 4  # decoded and waiting; bounds the memory, whatever the number of images

Predictor = Callable[[np.ndarray], np.ndarray]


def network_digest(model: keras.Model) -> str:
    """Return a SHA-256 over the model's layers and weights: equal networks, equal digest."""
    described = keras.saving.serialize_keras_object(model)
    described.pop("compile_config", None)  # how it is trained is no part of the network
    config = json.dumps(described, sort_keys=True, default=str)
    # Keras numbers the layers that it names itself by what else was built before.
    config = re.sub(r'"(input_layer|rescaling|normalization)_\d+"', r'"\1"', config)
    return sha256_of(config.encode(), *(np.ascontiguousarray(w) for w in model.get_weights()))


def make_predictor(model: keras.Model, cache: Path = CACHE) -> Predictor:
    """Return a function from uint8 images (n, height, width, 3), n <= 32, to the model's outputs.

    The exported network is kept in `cache` by content, so the next call for an equal model only
    loads it. The first batch of noise through both networks must agree to 1e-3.
    """
    try:
        return _openvino_predictor(model, cache)
    except Exception as error:  # OpenVINO's errors have no base of their own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"running on Keras, several times slower: {reason}", stacklevel=2)
        return lambda images: model.predict_on_batch(images)


def _openvino_predictor(model: keras.Model, cache: Path) -> Predictor:
    import openvino

    folder = cache / "networks" / network_digest(model)[:32]
    if not folder.exists():
        with replace_atomically(folder) as temporary:
            # TensorFlow would log where its copy went, into the notebook.
            logging.getLogger("tensorflow").setLevel(logging.WARNING)
            # Not `format="openvino"`: on Python 3.13 that converter looks in vain for TensorFlow.
            model.export(temporary / "saved_model", format="tf_saved_model", verbose=False)
            converted = openvino.convert_model(temporary / "saved_model")
            openvino.save_model(converted, temporary / "network.xml", compress_to_fp16=False)
            shutil.rmtree(temporary / "saved_model")
            _check(_compile(temporary / "network.xml", model.input_shape), model)
    return _compile(folder / "network.xml", model.input_shape)


def _compile(file: Path, input_shape: tuple) -> Predictor:
    import openvino

    core = openvino.Core()
    network = core.read_model(file)
    network.reshape([BATCH_SIZE, *input_shape[1:]])
    preprocessing = openvino.preprocess.PrePostProcessor(network)
    preprocessing.input().tensor().set_element_type(openvino.Type.u8)
    compiled = core.compile_model(
        preprocessing.build(),
        "CPU",
        {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"},
    )

    def predict(images: np.ndarray) -> np.ndarray:
        batch = np.zeros((BATCH_SIZE, *images.shape[1:]), np.uint8)
        batch[: len(images)] = images
        return compiled(batch)[0][: len(images)].copy()

    return predict


def _check(predict: Predictor, model: keras.Model) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, *model.input_shape[1:]), np.uint8)
    expected = model.predict_on_batch(noise)
    difference = np.abs(predict(noise) - expected).max() / np.abs(expected).max()
    if not difference < LARGEST_DIFFERENCE:
        raise RuntimeError(f"OpenVINO's outputs differ from Keras's by {difference:.1e}")


def load_in_batches(
    items: Iterable, load: Callable[..., np.ndarray], batch_size: int = BATCH_SIZE
) -> Iterator[np.ndarray]:
    """Yield `load(item)` of each item stacked into batches, in order; threads load ahead."""
    iterator = iter(items)
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        ahead = deque()
        while True:
            for item in itertools.islice(iterator, BATCHES_AHEAD * batch_size - len(ahead)):
                ahead.append(pool.submit(load, item))
            if not ahead:
                return
            count = min(batch_size, len(ahead))
            yield np.stack([ahead.popleft().result() for _ in range(count)])
