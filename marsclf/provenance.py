"""The code, the machine and the memory behind a result."""

import importlib.metadata
import json
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from marsclf import paths


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def hardware() -> dict[str, object]:
    """Return processor, usable cores, memory (GB), GPU name or None, and the software."""
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return {
        "cpu": _from_proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpus.partition("\n")[0] or None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "keras": importlib.metadata.version("keras"),
        "tensorflow": importlib.metadata.version("tensorflow"),
    }


def peak_rss_mb(pid: int | None = None) -> int:
    """Return the peak resident memory (10^6 bytes) of a process (None: this one), children apart.

    On macOS, which reports no peak, it is the memory now. 0 if the process has ended.
    """
    if peak := _from_proc(f"{pid or 'self'}/status", "VmHWM"):
        return round(int(peak.split()[0]) * 1024 / 1e6)  # "1234 kB"
    with suppress(psutil.Error):
        memory = psutil.Process(pid).memory_info()
        return round(getattr(memory, "peak_wset", memory.rss) / 1e6)
    return 0


def commit() -> str:
    """Return the commit of this code, "-dirty" added if files differ from it, or "unknown"."""
    git = ("git", "-C", str(paths.PROJECT_ROOT))
    # The prefix is empty unless the project lies inside another repository.
    printed = _output(*git, "rev-parse", "--show-prefix", "HEAD")
    prefix, _, head = printed.partition("\n")
    if prefix or not head:
        return "unknown"
    # Only what determines the numbers: figures and tables of an earlier run may differ.
    code = ("marsclf", "notebooks", "presets", "requirements.lock")
    changed = (line[3:] for line in _output(*git, "status", "--porcelain", *code).splitlines())
    return head.strip() + ("-dirty" if any(_has_other_code(git, name) for name in changed) else "")


def _has_other_code(git: tuple[str, ...], name: str) -> bool:
    """Tell whether a changed file differs from its commit in more than a notebook's outputs."""
    try:
        texts = [_output(*git, "show", f"HEAD:{name}"), (paths.PROJECT_ROOT / name).read_text()]
        first, second = ([cell["source"] for cell in json.loads(t)["cells"]] for t in texts)
        return first != second
    except (OSError, ValueError, TypeError, KeyError):
        return True  # not a notebook, or no longer there


def _output(*command: str) -> str:
    """Return what a command prints, or "" if it fails."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True)
    return ""


def _from_proc(file: str, name: str) -> str:
    """Return the first value called `name` in a file of Linux's /proc, or ""."""
    with suppress(OSError):
        lines = Path("/proc", file).read_text(encoding="utf-8").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
    return ""
