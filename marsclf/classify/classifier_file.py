"""The classifier file: what training changed of a network, as numbers and a JSON text, no code.

A classifier file is a ZIP archive like NumPy's .npz. It holds one float16 array for each weight
that differs from the ImageNet backbone's, named "layer/weight", and `metadata.json`:

- format, version: "marsclf-classifier", 1;
- backbone: a name of marsclf.backbones.SPECS; image_size: side of the input, pixels;
- head_hidden: units of the head's hidden layer, 0 for a linear head;
- first_learning_block: the first block of the backbone whose weights are here, or null;
- classes: the names of the outputs, in order;
- zooms: at which an image is looked at, the answers pooled; at most 16, each 0.1 to 10;
- calibration: {"kind": "temperature", "temperature": T}, see marsclf.classifier;
- training: where the weights come from (preset, seed, commit, dataset, data_digest).

Nothing in the file is ever executed: arrays of Python objects are refused, and what the header of
an array promises is checked before memory is taken for it.
"""

import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np

from marsclf.data.msl import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, sha256_of
from marsclf.images.views import check_zooms

FORMAT, VERSION = "marsclf-classifier", 1
METADATA = "metadata.json"
# EfficientNetB7, all of it fine-tuned, takes 130 MB.
MAX_BYTES = 300_000_000
MAX_METADATA_BYTES = 100_000
# Equal content gives an equal file, whenever it is written.
TIME = (1980, 1, 1, 0, 0, 0)


def write(path: Path, weights: dict[str, np.ndarray], metadata: dict) -> None:
    """Write a classifier file. Raises MarsclfError for weights that half precision cannot hold."""
    with replace_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:

        def add(name: str, content: bytes) -> None:
            entry = zipfile.ZipInfo(name, TIME)
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)

        described = {"format": FORMAT, "version": VERSION} | metadata
        add(METADATA, json.dumps(described, indent=1).encode())
        for name, weight in weights.items():
            with np.errstate(over="ignore"):
                half = weight.astype(np.float16)
            if not np.isfinite(half).all():
                raise MarsclfError(f"The weights {name} do not fit half precision.")
            stream = io.BytesIO()
            np.lib.format.write_array(stream, half, allow_pickle=False)
            add(f"{name}.npy", stream.getvalue())


def read(path: Path) -> tuple[dict[str, np.ndarray], dict, str]:
    """Read a classifier file: float32 weights by name, metadata, SHA-256 of the file.

    Raises MarsclfError, whatever the file holds, if it is not a whole classifier file.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise MarsclfError(f"The classifier {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise _refusal(path, str(error)) from None
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise _refusal(path, "it is of another kind, and is not opened")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if METADATA not in names:
                raise ValueError(f"it holds no {METADATA}")
            if len(set(names)) < len(names):
                raise ValueError("two of its parts have one name")
            if archive.getinfo(METADATA).file_size > MAX_METADATA_BYTES:
                raise ValueError(f"its {METADATA} is enormous")
            if sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise ValueError(f"unpacked it has more than {MAX_BYTES:,} bytes")
            metadata = _checked(json.loads(archive.read(METADATA)))
            weights = {
                name.removesuffix(".npy"): _array(name, archive.read(name))
                for name in names
                if name != METADATA
            }
    # A damaged archive can raise nearly anything; whatever it is, the file is what is wrong.
    except Exception as error:
        raise _refusal(path, str(error) or type(error).__name__) from None
    return weights, metadata, sha256_of(content)


def _refusal(path: Path, reason: str) -> MarsclfError:
    return MarsclfError(
        f"{path} is not a classifier file of marsclf ({' '.join(reason.split())[:200]}); name the "
        "classifier.npz that a run wrote."
    )


def _array(name: str, content: bytes) -> np.ndarray:
    if not name.endswith(".npy"):
        raise ValueError(f"it holds {name!r}, which is no array")
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"the array {name!r} is of an unknown version")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype != np.float16 or fortran_order:
        raise ValueError(f"the array {name!r} does not hold half-precision numbers")
    if min(shape, default=1) < 1 or math.prod(shape) * 2 != len(content) - stream.tell():
        raise ValueError(f"the array {name!r} is not as large as it says")
    weight = np.frombuffer(content, np.float16, offset=stream.tell()).reshape(shape)
    if not np.isfinite(weight).all():
        raise ValueError(f"the array {name!r} holds numbers that are not finite")
    return weight.astype(np.float32)


def _checked(metadata: object) -> dict:
    """Return the metadata if all of it has the form that the module's docstring gives."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"its {METADATA} describes something else")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"it has version {metadata.get('version')!r} of the format, and this marsclf reads "
            f"version {VERSION}"
        )
    size, hidden = metadata.get("image_size"), metadata.get("head_hidden")
    if type(size) is not int or not 32 <= size <= 1024:
        raise ValueError(f"its image_size is {size!r}")
    if type(hidden) is not int or not 0 <= hidden <= 8192:
        raise ValueError(f"its head_hidden is {hidden!r}")
    if metadata.get("classes") != list(CLASS_NAMES):
        raise ValueError("its classes are not those of the MSL data set")
    zooms = metadata.get("zooms")
    try:
        check_zooms(zooms)
    except MarsclfError as error:
        raise ValueError(f"its {error}") from None
    calibration = metadata.get("calibration")
    if not isinstance(calibration, dict) or calibration.get("kind") != "temperature":
        raise ValueError(f"its calibration is {calibration!r}, which this marsclf does not know")
    temperature = calibration.get("temperature")
    if type(temperature) not in (int, float) or not 0.01 <= temperature <= 100:
        raise ValueError(f"its temperature is {temperature!r}")
    if not isinstance(metadata.get("backbone"), str):
        raise ValueError(f"its backbone is {metadata.get('backbone')!r}")
    if not isinstance(metadata.get("training"), dict):
        raise ValueError("it does not tell what it was trained on")
    return metadata
