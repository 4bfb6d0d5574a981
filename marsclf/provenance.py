"""What machine this is, and how much memory was used on it."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from marsclf import paths

_limit: int | None = None


def limit_cores(number: int) -> None:
    """Let this process use no more than so many cores, because others share the machine."""
    global _limit
    _limit = number


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        there = len(os.sched_getaffinity(0))
    else:
        there = os.cpu_count() or 1
    return min(there, _limit or there)


def hardware() -> dict[str, object]:
    """Return processor, usable cores, memory (GB), GPU name or None, and software versions."""
    cpu, gpu = platform.processor() or platform.machine(), None
    with suppress(OSError, StopIteration):  # Linux tells the processor's name here alone
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        line = next(line for line in lines if line.startswith("model name"))
        cpu = line.partition(":")[2].strip()
    with suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        gpu = output.partition("\n")[0] or None
    return {
        "cpu": cpu,
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "keras": importlib.metadata.version("keras"),
        "tensorflow": importlib.metadata.version("tensorflow"),
    }


def peak_rss_mb() -> int:
    """Return the most memory (10^6 bytes) that this process or one of its kernels held."""
    unit = 1 if sys.platform == "darwin" else 1024
    own, kernels = (
        resource.getrusage(user).ru_maxrss
        for user in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    # What getrusage says of a process begins with what the one that started it held.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return round(max(own, kernels) * unit / 1e6)


def commit() -> str:
    """Return the commit of the code that runs, with "-dirty" where files differ, or "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.PROJECT_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != paths.PROJECT_ROOT.resolve():
            return "unknown"
        # Only what decides the numbers: the figures and tables of an earlier run may differ.
        changed = git(
            "status", "--porcelain", "marsclf", "notebooks", "presets", "requirements.lock"
        )
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
