"""What the file name of a Curiosity image tells: sol, camera, sequence, frame and product type."""

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from marsclf.errors import MarsclfError

_PRODUCT_ID = re.compile(
    r"(?P<frame>(?P<sequence>(?P<sol>\d{4})(?P<camera>M[LRH])\d{6})\d{10})"
    r"(?P<product_type>[A-Z])\d\d_[A-Z]{4}\.JPG",
    re.ASCII,
)


class Product(NamedTuple):
    """What the file name of an image tells about it."""

    sol: int
    camera: str
    sequence: str
    frame: str
    product_type: str


def parse_product_id(path: str | Path) -> Product:
    """Read sol, camera and so on from a name like `0830MR0036510000500684E01_DRCL.JPG`.

    That is sol 0830, camera MR (ML and MR: Mastcam left and right, MH: MAHLI), sequence number
    003651, position in the sequence 000, data product 0500684, product type E, version 01,
    processing DRCL. `sequence` joins sol, camera and sequence number, because the numbers are used
    again on other sols; `frame` names one exposure, all of whose product types share it.
    Raises MarsclfError for any other name.
    """
    name = PurePosixPath(path).name
    match = _PRODUCT_ID.fullmatch(name)
    if match is None:
        raise MarsclfError(
            f"{name!r} is not the name of a Curiosity image such as "
            "0830MR0036510000500684E01_DRCL.JPG"
        )
    parts = match.groupdict()
    return Product(sol=int(parts.pop("sol")), **parts)
