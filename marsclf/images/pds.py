"""PDS3 and PDS4 image products as 8-bit RGB."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from marsclf.errors import MarsclfError
from marsclf.images.scaling import check_file, shrunk, to_8_bit


def read_pds(path: Path) -> np.ndarray:
    """Return the image of a product, uint8 (height, width, 3); `path` is its data or its label.

    Raises MarsclfError with the reason if it cannot be read, and almost any error if it is damaged.
    """
    try:
        import pdr
    except ImportError:
        how = "pip install '.[pds]' in a copy of the repository"
        raise MarsclfError(f"PDS products need the reader pdr: {how}") from None
    # pdr itself looks for X.LBL beside X.IMG only, not for X.IMG.LBL.
    beside = [path.with_name(path.name + suffix) for suffix in (".lbl", ".LBL", ".xml")]
    product = pdr.read(path, label_fn=next(filter(Path.exists, beside), None))
    objects = [name for name in product.keys() if name.upper() != "LABEL"]  # noqa: SIM118
    if not objects:
        places = f"neither in itself nor in {path.stem}.LBL or {path.stem}.xml"
        raise MarsclfError(f"it has no PDS label, {places}")
    # The shortest name is the image itself; longer ones are masks and backplanes.
    name = min((name for name in objects if "IMAGE" in name.upper()), key=len, default=None)
    if name is None:
        raise MarsclfError(f"the product holds no image but {', '.join(objects)}")
    values = _load(product, name)
    if values.ndim == 3:  # PDS puts the bands first
        if len(values) not in (1, 3):
            raise MarsclfError(f"the image has {len(values)} bands instead of 1 or 3")
        values = np.moveaxis(values, 0, 2)
    values = shrunk(values)
    if product.standard == "PDS3":
        constants = product.find_special_constants(name)
    else:
        constants = product.metablock_("Special_Constants") or {}
    # The constants of saturated pixels do not mean that data is missing.
    names = [key for key in constants if not re.search(r"(?i)sat|\bvalid_", key)]
    no_data = pd.Series([constants[key] for key in names], dtype=object)
    no_data = pd.to_numeric(no_data, errors="coerce").astype(np.result_type(values, np.float16))
    return to_8_bit(np.ma.masked_array(values, np.isin(values, no_data)))


def _load(product: Any, name: str) -> np.ndarray:
    """Return the pixels of an object, (height, width) or (bands, height, width)."""
    files = product._target_path(name)
    if not files:
        target = product.metaget_(f"^{name}") or product._pds4_structures[name].parent_filename
        target = Path(target if isinstance(target, str) else target[0]).name
        raise MarsclfError(f"its label names {target!r}, which is not in the same folder")
    for file in map(Path, [files] if isinstance(files, str | Path) else files):
        # Of other suffixes pdr lets Pillow open any format, and it runs Ghostscript for one.
        if file.suffix.lower() not in (".img", ".dat"):
            raise MarsclfError(f"its label names {file.name!r} instead of an .IMG file")
        check_file(file)
    try:
        values = product[name]
        if not isinstance(values, np.ndarray):  # pdr only warns
            values = product.load_from_pointer(name)[name]
    except ValueError as error:
        if not re.search("reshape|buffer", str(error)):
            raise
        raise MarsclfError("its data are cut short: the label describes a larger image") from None
    if not isinstance(values, np.ndarray) or values.ndim not in (2, 3) or not values.size:
        raise MarsclfError(f"pdr cannot read its object {name} as an image")
    return values
