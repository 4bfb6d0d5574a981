"""The Ray engine of `predict`: many processes, on one machine or a cluster, work on the parts.

Each process loads the network once, then reads and classifies the images of one part after another
and stores the rows. Neither images nor rows pass through the driver; Ray starts the part of a lost
process again. All machines must see the images and the output under the same paths.
"""

import functools
import os
import shutil
from argparse import Namespace
from pathlib import Path

import ray
from filelock import FileLock
from tqdm import tqdm

from marsclf import paths
from marsclf.classify.classifier import Classifier, load_classifier
from marsclf.classify.parts import LIST, read_paths, write_part
from marsclf.errors import MarsclfError
from marsclf.provenance import cores, limit_cores

CLASSIFIER = "classifier.safetensors"


def classify_parts(folder: Path, missing: list[str], options: Namespace) -> None:
    """Make the missing parts on the Ray cluster at `options.address`, or (None) on this machine.

    Raises MarsclfError if Ray cannot be started or reached, or could not make all parts.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    kept = f"; {folder} keeps the finished parts, for --resume"
    # The other machines may have another classifier, or none.
    shutil.copyfile(options.model, folder / LIST / CLASSIFIER)
    address, local = options.address, {}
    if not address:  # almost nothing passes through the object store
        local = {"num_cpus": cores(), "object_store_memory": 10**8, "include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except Exception as error:  # what Ray raises if its processes do not start in time
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        failed = f"No Ray cluster answers at {address!r}" if address else "Ray does not start"
        raise MarsclfError(f"{failed} ({reason}){kept}.") from None
    try:
        task = ray.remote(num_cpus=1)(make_part)  # by default Ray replaces a lost process 3 times
        waiting = [task.remote(folder, name, options.threshold) for name in missing]
        for _ in tqdm(missing, desc="classifying", unit="part", disable=None):
            finished, waiting = ray.wait(waiting)
            ray.get(finished)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(getattr(error, "cause", error)).split())[-300:]
        raise MarsclfError(f"Ray could not make all parts ({reason}){kept}.") from None
    finally:
        ray.shutdown()


def make_part(folder: Path, name: str, threshold: float) -> None:
    """Classify the images of a part and store the rows; runs in a process with one core."""
    rows = _classifier(folder / LIST / CLASSIFIER).rows(read_paths(folder, name), threshold)
    write_part(folder, name, (row for _, row in rows))


@functools.cache
def _classifier(model: Path) -> Classifier:
    limit_cores(1)
    # One at a time, so that the first exports the network for all processes on its machine.
    with FileLock(paths.CACHE / "ray.lock"):
        return load_classifier(model)
