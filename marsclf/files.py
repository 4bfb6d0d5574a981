"""Atomic writes (a killed program leaves the old file or the new one), and digests."""

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success rename it to `path`, else remove it.

    The caller writes a file or a folder to it. An existing file or folder at `path` is replaced.
    The temporary path has the same name as `path`, because Keras and NumPy look at the suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(".marsclf-tmp", f".{path.name}.", path.parent))
    temporary = scratch / path.name
    try:
        yield temporary
        if path.is_dir() and not path.is_symlink():
            path.rename(scratch / "replaced")
        temporary.replace(path)
    except OSError as error:  # NumPy's and HDF5's errors have neither a number nor a file
        reason = error.strerror or f"{error}; the disk may be full"
        number, file = error.errno or errno.EIO, error.filename or str(path)
        raise OSError(number, reason, file) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def regular_file(path: Path) -> Path:
    """Return `path`; raise OSError for a folder, or a named pipe, which could block its reader."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON with a final newline."""
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def sha256_of(*parts: bytes) -> str:
    """Return the SHA-256 of the concatenated parts as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
