"""What B7's features cost where there is no GPU: time and memory at the reference's input size.

Measured with weights drawn at random, because speed does not depend on what they are, as long as
what flows is of a usual size: freshly drawn they make numbers so small that processors are slow
with them. So each BatchNorm takes the statistics of real images first.
"""

import time
from datetime import UTC, datetime
from pathlib import Path

import keras
import numpy as np

from marsclf import data, paths
from marsclf.backbones import build_backbone
from marsclf.files import write_json
from marsclf.hardware import cores, hardware, peak_rss_mb
from marsclf.images import AsRead, decode_rgb, read_view
from marsclf.inference import make_predictor, predict_each
from marsclf.publish import rewrite_tables
from marsclf.run import commit

NAME = "b7_cost.json"
SIDES = (193, 256)  # height and width, pixels
SEEN, TIMED = 16, 96  # images that set the scale, and that are timed


def set_scale(network: keras.Model, images: np.ndarray) -> None:
    """Give every BatchNorm of a network the statistics of images (n, height, width, 3), 0-255."""
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # the new statistics alone count
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    network(images, training=True)


def measure_b7(data_dir: str | Path | None) -> dict:
    """Time B7's features on some images of the data, print and, for the real ones, store it."""
    dataset = data.open_dataset(data_dir)
    rng = np.random.default_rng(0)
    chosen = rng.choice(dataset.index["path"], SEEN + TIMED, replace=False)
    reading = AsRead(squashed=True, bgr=False)

    def load(path: str) -> np.ndarray:
        return read_view(decode_rgb(dataset.root / path), SIDES, reading, rng)

    started = time.monotonic()
    keras.utils.set_random_seed(0)
    network = build_backbone("EfficientNetB7", SIDES, weights=None)
    images = np.stack([load(path) for path in chosen[:SEEN]])
    set_scale(network, images)
    predict = make_predictor(network, paths.CACHE, images[:2])
    predict(images[: cores()])
    ready = time.monotonic()
    features = np.stack(list(predict_each(chosen[SEEN:], load, predict)))
    seconds = time.monotonic() - ready
    result = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "dataset": dataset.name,
        "sides": SIDES,
        "weights": "random, BatchNorm scaled on real images",
        "images": TIMED,
        "features_std": round(float(features.std()), 3),
        "ready_s": round(ready - started, 1),
        "ms_an_image": round(1000 * seconds / TIMED, 1),
        "minutes_for_all": round(seconds / TIMED * len(dataset.index) / 60, 1),
        "peak_rss_mb": peak_rss_mb(),
        "hardware": hardware(),
    }
    print(f"{result['ms_an_image']} ms an image, {result['peak_rss_mb'] / 1000:.1f} GB at most")
    if dataset.name == "msl-v1":
        write_json(paths.RESULTS / NAME, result)
        rewrite_tables()
    return result
