"""Where things lie: every folder of the project as a constant."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
PROJECT_ROOT = _PACKAGE.parent
NOTEBOOKS = PROJECT_ROOT / "notebooks"
PRESETS = PROJECT_ROOT / "presets"
RUNS = PROJECT_ROOT / "runs"
RESULTS = PROJECT_ROOT / "results"
FIGURES = PROJECT_ROOT / "figures"
# The library's own classifiers: parts of the rover (msl-v1), and kinds of content (msl-v2.1).
CLASSIFIERS = {x: _PACKAGE / "classifiers" / f"{x}.safetensors" for x in ("parts", "content")}
JUPYTER = _PACKAGE / "jupyter"  # the kernel of the notebooks
DATA = PROJECT_ROOT / "data" / "msl-images"


def resolve(path: str | Path) -> Path:
    """Return `path` as an absolute path; a relative one counts from the project's root.

    Notebooks start in a folder of their own, so the working directory tells nothing.
    """
    return (PROJECT_ROOT / os.path.expanduser(path)).resolve()  # noqa: PTH111


def from_user(text: str) -> Path:
    """Return a path of the command line with `~` expanded, which the shell may have left."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (pathlib fails for an unknown ~user)


# Where the library alone is installed there is no project's folder to keep a cache in.
_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "marsclf"
_own = "cache" if NOTEBOOKS.is_dir() else _home
CACHE = resolve(os.environ.get("MARSCLF_CACHE_DIR") or _own)
