"""The networks that turn images into features: EfficientNetB0-B7 and EfficientNet-Lite0."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pooch

from marsclf.errors import MarsclfError
from marsclf.files import regular_file
from marsclf.networks.efficientnet_lite import build_efficientnet_lite
from marsclf.networks.pinned import keras
from marsclf.networks.specs import BLOCKS, input_size_of

keras_efficientnet = keras.src.applications.efficientnet
TIMEOUT = (5, 30)  # seconds to connect to a server, and to wait for its next bytes


def build_backbone(
    name: str, image_size: int | tuple[int, int] | None = None, weights: str | None = "imagenet"
) -> keras.Model:
    """Build the backbone `name` (a key of INPUT_SIZES) with ImageNet or, with None, random weights.

    Input: RGB (n, height, width, 3), 0 to 255, any number type; the model scales them itself.
    Output: (n, feature_width), globally average-pooled. `image_size` is the side of a square or
    (height, width), pixels; by default the backbone's own input size. Raises MarsclfError for an
    unknown name, a side below 32, and weights that are not available.
    """
    size = image_size or input_size_of(name)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 32:
        raise MarsclfError(f"An image side must be at least 32 pixels, not {min(height, width)}.")
    if "Lite" in name:
        return build_efficientnet_lite((height, width), weights == "imagenet")
    if weights == "imagenet":
        fetch_weights(name)
    return getattr(keras.applications, name)(
        include_top=False, pooling="avg", weights=weights, input_shape=(height, width, 3)
    )


def unfreeze_blocks(model: keras.Model, blocks: Sequence[str]) -> None:
    """Freeze the backbone in `model` except for the named blocks; all its BatchNorm stays frozen.

    `model` is a backbone or a flat model that contains one, `blocks` are members of BLOCKS. Layers
    outside every block (a head, whose layer names must not start with `stem_`, `block` and a digit,
    or `top_`) become trainable. Compile the model again before training.
    """
    model.trainable = True
    for layer in model.layers:
        block = re.match(r"stem(?=_)|block\d(?=[a-z]+_)|top(?=_)", layer.name)
        if block:
            # A trainable BatchNorm would learn its statistics again, from small batches.
            is_norm = isinstance(layer, keras.layers.BatchNormalization)
            layer.trainable = block[0] in blocks and not is_norm


def split_frozen(
    model: keras.Model, blocks: Sequence[str]
) -> tuple[keras.Model, keras.Model | None]:
    """Split a flat model before the first of the named blocks: the frozen and the trained part.

    Both parts share the model's weights. If the blocks include the stem, the first part only scales
    the pixels. Without blocks it is the complete model, and there is no second part.
    """
    if not blocks:
        return model, None
    first = BLOCKS.index(min(blocks, key=BLOCKS.index))
    # The layers are in the order of the blocks, and no shortcut crosses the start of a block.
    start = next(i for i, la in enumerate(model.layers) if la.name.startswith(BLOCKS[first:]))
    boundary = model.layers[start - 1].output
    return (
        keras.Model(model.input, boundary, name=f"{model.name}_frozen"),
        keras.Model(boundary, model.output, name=f"{model.name}_learning"),
    )


def fetch_weights(name: str, file: Path | None = None) -> None:
    """Download a backbone's ImageNet weights into Keras's cache, or copy `file` to there.

    Does nothing if they are there. Keras could load `file` directly, but would then omit a scaling
    of the pixels that these weights expect. Raises MarsclfError if the weights cannot be had, and
    for a file that does not hold them.
    """
    input_size_of(name)
    if "Lite" in name:
        raise MarsclfError(f"{name} takes no file of weights: leave out --weights.")

    def copy(source: str, target: Path, _: object) -> None:
        shutil.copyfile(regular_file(Path(source)), target)

    home = Path(keras.src.backend.config.keras_home()).expanduser()
    if not os.access(home, os.W_OK):
        home = Path("/tmp/.keras")  # as keras.utils.get_file does
    md5 = keras_efficientnet.WEIGHTS_HASHES[name[-2:].lower()][1]
    path = home / "models" / f"{name.lower()}_notop.h5"
    source = str(file or keras_efficientnet.BASE_WEIGHTS_PATH + path.name)
    get = copy if file else pooch.HTTPDownloader(timeout=TIMEOUT)
    try:
        pooch.retrieve(source, f"md5:{md5}", path.name, path.parent, downloader=get)
    except Exception as error:  # the network's, the disk's, or a wrong hash
        raise MarsclfError(
            f"The ImageNet weights of {name} cannot be read or downloaded ({error}); get "
            f"{path.name} (md5 {md5}) where there is a network and name it with --weights "
            f"(WEIGHTS= for make), or put it at {path}. EfficientNetLite0, the backbone of laptop, "
            "needs no download."
        ) from error
