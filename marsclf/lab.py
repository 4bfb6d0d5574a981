"""JupyterLab on the project's notebooks, with kernels set up as in a run."""

import os
import sys

from marsclf import paths
from marsclf.run import KERNEL_ENVIRONMENT


def open_lab(options: list[str]) -> None:
    """Become JupyterLab with these options of its own, such as --no-browser; does not return."""
    for variable, value in KERNEL_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={paths.PROJECT_ROOT}"]
    command += ["--LabApp.default_url=/lab/tree/notebooks", *options]
    os.execv(sys.executable, command)
