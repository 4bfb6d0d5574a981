"""What classifying more and more images takes, seconds and memory, as `predict` does it.

Apart from the other measurements, because these load Keras, and `predict` does without it.
"""

import itertools
import multiprocessing
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from marsclf.classify.classifier import load_classifier
from marsclf.evaluation.metrics import THRESHOLD
from marsclf.images.decode import ignore_decoder_warnings
from marsclf.provenance import peak_rss_mb

GROWTH = (500, 1000, 2000, 4000)


def measure_growth(files: list[Path], cache: Path) -> list[dict]:
    """Return what the classifier of the library takes for more and more images.

    Of each number of images, in a new process: the zooms at which it looks at an image, seconds,
    images a second, and the most memory, MB. What it loads first counts for the memory alone.
    """
    in_new_process(_classify, [], cache)  # exports the network, so that no other has to
    rows = []
    for count in GROWTH:
        chosen = list(itertools.islice(itertools.cycle(files), count))
        zooms, seconds, memory = in_new_process(_classify, chosen, cache)
        rows.append(
            {
                "images": count,
                "zooms": zooms,
                "seconds": round(seconds, 2),
                "images_a_s": round(count / seconds, 1),
                "peak_rss_mb": memory,
            }
        )
    return rows


def in_new_process(work: Callable, *arguments: object) -> object:
    """Return what `work` returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def _classify(files: list[Path], cache: Path) -> tuple[tuple[float, ...], float, int]:
    """Classify the files in this process, as `predict` does.

    Return the zooms at which an image is looked at, the seconds and the peak memory in MB.
    """
    classifier = load_classifier(cache=cache)
    started = time.perf_counter()
    with warnings.catch_warnings():
        ignore_decoder_warnings()
        for _ in classifier.rows(map(str, files), THRESHOLD):
            pass
    return classifier.zooms, time.perf_counter() - started, peak_rss_mb()
