"""Classification of images taken by NASA's Curiosity rover."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import load_classifier on first use, so that `import marsclf` stays fast."""
    if name == "load_classifier":
        from marsclf.classify.classifier import load_classifier

        return load_classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
