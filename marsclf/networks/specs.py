"""What is known of each backbone without building it, or loading Keras."""

from typing import NamedTuple

from marsclf.errors import MarsclfError


class BackboneSpec(NamedTuple):
    """What a backbone is."""

    input_size: int  # side of the images that it was trained on, pixels
    multiplications: float  # for one such image, 10^9 (Tan and Le 2019, table 2; Lite: its README)


SPECS = {
    "EfficientNetB0": BackboneSpec(224, 0.39),
    "EfficientNetB1": BackboneSpec(240, 0.7),
    "EfficientNetB2": BackboneSpec(260, 1.0),
    "EfficientNetB3": BackboneSpec(300, 1.8),
    "EfficientNetB4": BackboneSpec(380, 4.2),
    "EfficientNetB5": BackboneSpec(456, 9.9),
    "EfficientNetB6": BackboneSpec(528, 19),
    "EfficientNetB7": BackboneSpec(600, 37),
    "EfficientNetLite0": BackboneSpec(224, 0.407),
}
BLOCKS = ("stem", *(f"block{i}" for i in range(1, 8)), "top")


def find_spec(name: str) -> BackboneSpec:
    """Return what is known of a backbone; raise MarsclfError for an unknown name."""
    if name not in SPECS:
        raise MarsclfError(f"There is no backbone {name!r}; choose one of {', '.join(SPECS)}.")
    return SPECS[name]
