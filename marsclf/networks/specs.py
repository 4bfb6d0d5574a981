"""What is known of each backbone without building it, or loading Keras."""

from marsclf.errors import MarsclfError

# The side of the images on which each was trained, pixels.
INPUT_SIZES = {
    "EfficientNetB0": 224,
    "EfficientNetB1": 240,
    "EfficientNetB2": 260,
    "EfficientNetB3": 300,
    "EfficientNetB4": 380,
    "EfficientNetB5": 456,
    "EfficientNetB6": 528,
    "EfficientNetB7": 600,
    "EfficientNetLite0": 224,
}
BLOCKS = ("stem", *(f"block{i}" for i in range(1, 8)), "top")


def input_size_of(name: str) -> int:
    """Return a backbone's own input size; raise MarsclfError for an unknown name."""
    if name not in INPUT_SIZES:
        known = ", ".join(INPUT_SIZES)
        raise MarsclfError(f"There is no backbone {name!r}; choose one of {known}.")
    return INPUT_SIZES[name]
