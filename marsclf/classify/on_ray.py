"""Classifying an archive on Ray: many processes, on one machine or a cluster, one table in parts.

The images' paths are first listed in parts of some thousand, as Parquet files in OUTPUT.partial.
Ray Data hands the parts out to actors, each of which loads the network once, reads the images of a
part while it classifies, and writes the part's rows as one Parquet file that appears whole. So
neither images nor rows pass through the driver, a part that a lost worker had begun is simply begun
again, and a run that was stopped goes on with the parts that are missing. OUTPUT.partial is renamed
to OUTPUT when all are there. All machines must see the images and the output under the same paths.
"""

import fcntl
import itertools
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow
from pyarrow import parquet
from tqdm import tqdm

from marsclf import paths
from marsclf.classify import classifier_file
from marsclf.classify.local import (
    arrow_table,
    exit_status,
    interrupted,
    named_images,
    nothing_found,
    partial_of,
    quiet_libraries,
    report,
    settings_of,
)
from marsclf.classify.table import Row, check_threshold, count
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically, write_json
from marsclf.provenance import cores, limit_cores

IMAGES_A_PART = 4096  # about half a minute of one core
CORES_A_WORKER = 4  # that share the memory of one network
LIST = "_list"  # hidden from those who read the output as one table
CLASSIFIER = "classifier.npz"
OBJECT_STORE_BYTES = 200_000_000  # of a local Ray; hardly anything passes through it


def predict_on_ray(
    sources: list[str],
    output: Path | None,
    threshold: float,
    model: Path | None,
    address: str | None,
    resume: bool,
    images_a_part: int = IMAGES_A_PART,
) -> int:
    """Classify the images that `sources` name into the folder `output`, in Parquet parts.

    Args:
        sources, threshold, model, resume: as for marsclf.predict.predict, whose rows these are.
        output: a folder that does not exist yet.
        address: of a Ray cluster, such as "auto"; None starts Ray on this machine alone.
        images_a_part: images in one file, which is what a lost worker begins again.

    Returns 0, or 3 if some files could not be read, or 130 after Ctrl-C. Raises MarsclfError where
    there is nothing to do, where Ray is missing or not reached, and where parts could not be made.
    """
    ray = _ray()
    check_threshold(threshold)
    if output is None:
        raise MarsclfError("--engine ray writes a folder of parts: name one with --output.")
    if output.suffix:
        raise MarsclfError(
            f"--engine ray writes a folder of parts, not a file, and {output.name!r} looks like "
            "one: name a folder without a dot."
        )
    output = output.absolute()
    if os.path.exists(output):
        if resume and os.path.isdir(output):
            print(f"{output} is whole already: there is nothing to go on with.", file=sys.stderr)
            return 0
        raise MarsclfError(f"{output} is there already: name another folder, or remove it.")
    classifier, partial = model or paths.CLASSIFIER, partial_of(output)
    made_by = settings_of(classifier_file.read(classifier)[2], threshold, sources)
    try:
        _list_parts(sources, partial, classifier, made_by, images_a_part, resume)
    except OSError as error:
        raise MarsclfError(f"{partial} cannot be written ({error.strerror or error}).") from None
    parts = sorted(path.name for path in (partial / LIST).glob("*.parquet"))
    new = {part for part in parts if not (partial / part).exists()}
    started = time.monotonic()
    if new:
        try:
            with quiet_libraries():
                _work(ray, address, sorted(new), partial, threshold)
        except KeyboardInterrupt:
            return interrupted(output)
    counts, done = Counter(), 0
    try:
        for part in parts:
            table = parquet.read_table(partial / part)
            counts += count(Row(**row) for row in table.to_pylist())
            done += table.num_rows if part in new else 0
        partial.rename(output)
        shutil.rmtree(output / LIST)
    except OSError as error:
        raise MarsclfError(f"{output} cannot be made of its parts ({error}).") from None
    print(report(counts, done, time.monotonic() - started), file=sys.stderr)
    print(f"Table: {len(parts):,} parts in {output}", file=sys.stderr)
    return exit_status(counts)


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise MarsclfError(
            "Ray is not installed: pip install '.[ray]' in a copy of the repository."
        ) from None
    return ray


def _list_parts(
    sources: list[str], partial: Path, classifier: Path, made_by: dict, size: int, resume: bool
) -> None:
    """List the images in parts, and last how they are to be classified; or find that it is done."""
    head = partial / LIST / "made_by.json"
    if head.exists():
        if not resume:
            raise MarsclfError(
                f"{partial} is left from a run that was stopped: go on with it by --resume, or "
                "remove it."
            )
        if json.loads(head.read_text(encoding="utf-8")) != made_by:
            raise MarsclfError(
                f"{partial} is of other images, or of another classifier or threshold: remove "
                "it, or give the same paths, --model and --threshold as before."
            )
        return
    shutil.rmtree(partial / LIST, ignore_errors=True)  # a list that was not finished
    # Absolute, because the workers have another working directory.
    images = map(os.path.abspath, named_images(sources))
    for number in itertools.count():
        listed = list(itertools.islice(images, size))
        if not listed:
            break
        (partial / LIST).mkdir(parents=True, exist_ok=True)
        # As bytes: not every name is UTF-8.
        _write_paths(listed, partial / LIST / f"part-{number:06d}.parquet")
    if number == 0:
        raise nothing_found(sources)
    # The workers' machines may have another one, or none.
    shutil.copyfile(classifier, partial / LIST / CLASSIFIER)
    write_json(head, made_by)


def _write_paths(listed: Iterable[str], path: Path) -> None:
    column = pyarrow.array([os.fsencode(name) for name in listed], pyarrow.binary())
    parquet.write_table(pyarrow.table({"path": column}), path)


def _work(
    ray: ModuleType,
    address: str | None,
    parts: list[str],
    partial: Path,
    threshold: float,
) -> None:
    """Let actors make the parts that are missing."""
    alone = {
        "num_cpus": cores(),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else alone),
        )
    except Exception as error:  # Ray raises a bare one where its processes do not start in time
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        failed = f"No Ray cluster answers at {address!r}" if address else "Ray does not start here"
        raise MarsclfError(
            f"{failed} ({reason}); {partial} keeps the list of images, for --resume."
        ) from None
    try:
        total = int(ray.cluster_resources().get("CPU", 1))
        workers = min(max(1, total // CORES_A_WORKER), len(parts))
        cores_each = max(1, min(CORES_A_WORKER, total // workers))
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        made = (
            ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
            .map_batches(
                Worker,
                batch_size=1,
                num_cpus=cores_each,
                compute=ray.data.ActorPoolStrategy(size=workers),
                fn_constructor_args=(partial, threshold, cores_each),
            )
            .iter_batches(batch_size=1)
        )
        for _ in tqdm(made, total=len(parts), desc="classifying", unit="part", disable=None):
            pass
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error.cause if hasattr(error, "cause") else error).split())[-300:]
        raise MarsclfError(
            f"Ray could not make all parts ({reason}); {partial} keeps those that are done, for "
            "--resume."
        ) from None
    finally:
        ray.shutdown()


class Worker:
    """One process that classifies: it loads the network once and makes part after part."""

    def __init__(self, folder: Path, threshold: float, cores_each: int) -> None:
        from marsclf.classify.classifier import load_classifier

        limit_cores(cores_each)
        self.threshold, self.folder = threshold, folder
        paths.CACHE.mkdir(parents=True, exist_ok=True)
        # One after the other, so that the first prepares the network for all of its machine.
        with _lock(paths.CACHE / "ray.lock"):
            self.classifier = load_classifier(folder / LIST / CLASSIFIER)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make the parts that are named in the column "part"."""
        from marsclf.images.decode import ignore_decoder_warnings

        for part in batch["part"]:
            target = self.folder / str(part)
            if target.exists():  # made by a worker that was lost before it could say so
                continue
            listed = parquet.read_table(self.folder / LIST / str(part))["path"].to_pylist()
            with warnings.catch_warnings():
                ignore_decoder_warnings()
                pairs = self.classifier.rows(map(os.fsdecode, listed), self.threshold)
                table = arrow_table([row for _, row in pairs])
            with replace_atomically(target) as temporary:
                parquet.write_table(table, temporary)
        return batch


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file's lock; others on the machine wait."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
