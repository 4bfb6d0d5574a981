"""The code, the machine and the memory behind a result."""

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from marsclf import paths

_limit: int | None = None


def limit_cores(number: int) -> None:
    """Make `cores` return at most `number` in this process, which shares its machine."""
    global _limit
    _limit = number


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    available = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(available, _limit or available)


def hardware() -> dict[str, object]:
    """Return processor, usable cores, memory (GB), GPU name or None, and software versions."""
    cpu, gpu = platform.processor() or platform.machine(), None
    with suppress(OSError, StopIteration):  # platform does not know the name on Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
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


def peak_rss_mb(pid: int | None = None) -> int:
    """Return the peak resident memory (10^6 bytes) of a process (None: this one), children apart.

    On Linux it is VmHWM, on Windows the peak working set. macOS reports no peak for another
    process, so there it is the memory at the time of the call. 0 if the process has ended.
    """
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8").splitlines()
        kibibytes = next(line for line in lines if line.startswith("VmHWM:")).split()[1]
        return round(int(kibibytes) * 1024 / 1e6)
    with suppress(psutil.Error):
        memory = psutil.Process(pid).memory_info()
        return round(getattr(memory, "peak_wset", memory.rss) / 1e6)
    return 0


def commit() -> str:
    """Return the commit of this code, with "-dirty" if files differ from it, or "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.PROJECT_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != paths.PROJECT_ROOT.resolve():
            return "unknown"
        # Only what determines the numbers: figures and tables of an earlier run may differ.
        code = ("marsclf", "notebooks", "presets", "requirements.lock")
        changed = git("status", "--porcelain", *code)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
