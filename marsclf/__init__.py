"""Sorting what NASA's Curiosity rover photographs."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Offer load_classifier here, without loading its packages for those who do not ask for it."""
    if name == "load_classifier":
        from marsclf.classify.classifier import load_classifier

        return load_classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
