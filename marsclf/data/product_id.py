"""The parts of a Curiosity image's file name: sol, camera, sequence, frame and product type."""

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from marsclf.errors import MarsclfError

EXAMPLE = "0830MR0036510000500684E01_DRCL.JPG"
_PRODUCT_ID = re.compile(
    r"(?P<frame>(?P<sequence>(?P<sol>\d{4})(?P<camera>M[LRH])\d{6})\d{10})"
    r"(?P<product_type>[A-Z])\d\d_[A-Z]{4}\.JPE?G",
    re.ASCII | re.IGNORECASE,
)


class Product(NamedTuple):
    """The parts of a file name, as described at `parse_product_id`."""

    sol: int
    camera: str
    sequence: str
    frame: str
    product_type: str


def parse_product_id(path: str | Path) -> Product:
    """Parse a file name such as `0830MR0036510000500684E01_DRCL.JPG`.

    It consists of sol 0830, camera MR (ML and MR: Mastcam left and right, MH: MAHLI), sequence
    number 003651, position in the sequence 000, data product 0500684, product type E, version 01
    and processing code DRCL. Numbers repeat on other sols, so `sequence` is sol, camera and number;
    `frame` is one exposure, shared by its product types. Raises MarsclfError for any other name.
    """
    name = PurePosixPath(path).name
    if (match := _PRODUCT_ID.fullmatch(name)) is None:
        raise MarsclfError(f"{name!r} is not the name of a Curiosity image such as {EXAMPLE}")
    parts = {key: part.upper() for key, part in match.groupdict().items()}
    return Product(sol=int(parts.pop("sol")), **parts)
