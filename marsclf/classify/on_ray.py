"""The Ray engine of `predict`: many processes, on one machine or a cluster, work on the parts.

Each actor loads the network once, then reads and classifies the images of one part after another
and stores the rows. Neither images nor rows pass through the driver, and the part of a lost worker
is simply started again. All machines must see the images and the output under the same paths.
"""

import logging
import os
import shutil
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from marsclf import paths
from marsclf.classify.parts import LIST, read_paths, write_part
from marsclf.errors import MarsclfError
from marsclf.images.decode import ignore_decoder_warnings
from marsclf.provenance import cores, limit_cores

IMAGES_PER_PART = 4096  # about half a minute of one core, which a lost worker's successor repeats
CORES_PER_WORKER = 4  # they share the memory of one network
CLASSIFIER = "classifier.safetensors"
OBJECT_STORE_BYTES = 200_000_000  # of a local Ray; almost nothing passes through it


def import_ray() -> ModuleType:
    """Return Ray. Raises MarsclfError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise MarsclfError(
            "Ray is not installed: pip install '.[ray]' in a copy of the repository."
        ) from None
    return ray


def classify_parts(
    folder: Path, missing: list[str], threshold: float, model: Path, address: str | None
) -> None:
    """Make the missing parts on the Ray cluster at `address`, or (None) on this machine.

    Raises MarsclfError if Ray cannot be started or reached, or could not make all parts.
    """
    ray = import_ray()
    kept = f"; {folder} keeps the finished parts, for --resume"
    # The other machines may have another classifier, or none.
    shutil.copyfile(model, folder / LIST / CLASSIFIER)
    local = {
        "num_cpus": cores(),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else local),
        )
    except Exception as error:  # Ray raises a bare one if its processes do not start in time
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        failed = f"No Ray cluster answers at {address!r}" if address else "Ray does not start"
        raise MarsclfError(f"{failed} ({reason}){kept}.") from None
    try:
        items = [{"part": name} for name in missing]
        total = int(ray.cluster_resources().get("CPU", 1))
        workers = min(max(1, total // CORES_PER_WORKER), len(items))
        cores_each = max(1, min(CORES_PER_WORKER, total // workers))
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        finished = (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(
                Worker,
                batch_size=1,
                num_cpus=cores_each,
                compute=ray.data.ActorPoolStrategy(size=workers),
                fn_constructor_args=(folder, threshold, cores_each),
            )
            .iter_batches(batch_size=1)
        )
        for _ in tqdm(finished, total=len(items), desc="classifying", unit="part", disable=None):
            pass
    except ray.exceptions.RayError as error:
        reason = " ".join(str(getattr(error, "cause", error)).split())[-300:]
        raise MarsclfError(f"Ray could not make all parts ({reason}){kept}.") from None
    finally:
        ray.shutdown()


class Worker:
    """A process that classifies: it loads the network once and makes part after part."""

    def __init__(self, folder: Path, threshold: float, cores_each: int) -> None:
        from marsclf.classify.classifier import load_classifier

        limit_cores(cores_each)
        self.folder, self.threshold = folder, threshold
        paths.CACHE.mkdir(parents=True, exist_ok=True)
        # One at a time, so that the first exports the network for all workers on its machine.
        with FileLock(paths.CACHE / "ray.lock"):
            self.classifier = load_classifier(folder / LIST / CLASSIFIER)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make the parts named in the column "part"."""
        for name in map(str, batch["part"]):
            if (self.folder / name).exists():
                continue  # made by a worker that was lost before it could report
            with warnings.catch_warnings():
                ignore_decoder_warnings()
                pairs = self.classifier.rows(read_paths(self.folder, name), self.threshold)
                write_part(self.folder, name, (row for _, row in pairs))
        return batch
