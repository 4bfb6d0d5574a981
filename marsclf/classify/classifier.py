"""The classifier that comes with the library, or one that a run wrote: images in, a table out."""

import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.classify import classifier_file
from marsclf.classify.find import find_images
from marsclf.classify.table import Row, check_threshold, error_row, image_row, table
from marsclf.errors import MarsclfError
from marsclf.evaluation.calibration import pool, with_temperature
from marsclf.evaluation.metrics import THRESHOLD
from marsclf.images.decode import ignore_decoder_warnings, read_rgb, to_8_bit
from marsclf.images.views import Condition, fit_view
from marsclf.networks.engine import Predictor, make_predictor, predict_each, stored_predictor

if TYPE_CHECKING:
    import keras

# Of what is made of a file; raised where an equal file would give another network.
NETWORK_VERSION = 1


@dataclass(frozen=True)
class Classifier:
    """A network with its weights, ready to classify.

    Attributes:
        image_size: side of the network's input, pixels.
        zooms: at which it looks at an image; its answers are pooled.
        temperature: the logits are divided by it (Guo et al. 2017).
        digest: SHA-256 of the file it was read from.
        training: where its weights come from.
        engine: RGB pixels 0-255 (n, size, size, 3) to probabilities (n, 25), not calibrated.
        network: returns the Keras model that does the same, built the first time it is called.
    """

    image_size: int
    zooms: tuple[float, ...]
    temperature: float
    digest: str
    training: dict
    engine: Predictor = field(repr=False)
    network: Callable[[], "keras.Model"] = field(repr=False)

    def predict(
        self,
        images: str | Path | np.ndarray | Iterable[str | Path | np.ndarray],
        threshold: float = THRESHOLD,
    ) -> pd.DataFrame:
        """Classify images and return a table with a row for each, in order; columns as in Row.

        Args:
            images: one or more paths of files, folders (all images beneath them) or patterns such
                as `*.jpg`, or uint8 arrays (height, width) or (height, width, 3), RGB.
            threshold: confidence, 0 to 1, beneath which a row is marked as uncertain.

        Raises MarsclfError for arrays of another form; a file that cannot be read has its reason
        in the column `error`.
        """
        check_threshold(threshold)
        if isinstance(images, str | Path):
            images = [images]
        items = iter(images[np.newaxis] if _is_one_image(images) else images)
        found: Iterable[str | np.ndarray] = (
            path
            for item in items
            for path in ([_checked(item)] if isinstance(item, np.ndarray) else find_images([item]))
        )
        with warnings.catch_warnings():
            ignore_decoder_warnings()
            return table(row for _, row in self.rows(found, threshold))

    def rows(
        self, items: Iterable[str | np.ndarray], threshold: float
    ) -> Iterator[tuple[str | np.ndarray, Row]]:
        """Yield each item, a path or a uint8 array (height, width, 3), with its Row, in order.

        Items are taken as they are needed, about a hundred ahead. What is said of one does not
        depend on the others.
        """
        ahead: deque[_Item] = deque()

        def taken() -> Iterator[_Item]:
            for source in items:
                ahead.append(_Item(source))
                yield ahead[-1]

        outputs = predict_each(taken(), self._load, self._look)
        for probabilities in outputs:
            item = ahead.popleft()
            path = item.source if isinstance(item.source, str) else None
            if item.error is None:
                yield item.source, image_row(path, self.calibrate(probabilities), threshold)
            else:
                yield item.source, error_row(path, item.error)

    def calibrate(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the network's probabilities (..., 25) with its temperature, float64."""
        return with_temperature(probabilities.astype(np.float64), self.temperature)

    def views(self, source: str | np.ndarray) -> np.ndarray:
        """Return what the network sees of an image, once a zoom: uint8 (zooms, size, size, 3)."""
        image = source if isinstance(source, np.ndarray) else read_rgb(source)
        looks = [fit_view(image, self.image_size, Condition(zoom=zoom)) for zoom in self.zooms]
        return np.stack(looks)

    def _look(self, views: np.ndarray) -> np.ndarray:
        """Return the pooled answers (n, 25) to the views (n, zooms, size, size, 3) of n images."""
        answers = self.engine(views.reshape(-1, *views.shape[2:]))
        return pool(answers.reshape(*views.shape[:2], -1), axis=1)

    def _load(self, item: "_Item") -> np.ndarray:
        try:
            return self.views(item.source)
        except MarsclfError as error:
            item.error = str(error)
        except Exception as error:  # one file must not stop the others
            item.error = f"the image cannot be used: {error or type(error).__name__}"
        return np.zeros((len(self.zooms), self.image_size, self.image_size, 3), np.uint8)


@dataclass
class _Item:
    source: str | np.ndarray
    error: str | None = None


def load_classifier(path: str | Path | None = None, cache: Path = paths.CACHE) -> Classifier:
    """Return the classifier that comes with the library, or that of a classifier file.

    The file gives the weights that training changed; the others are the backbone's own. The first
    call for a classifier takes some seconds more, to export its network into `cache` for the fast
    engine; later ones find it there and load no Keras, nor ask whether there is a GPU now.
    Raises MarsclfError for a file that is missing or no classifier file; nothing in it is executed.
    """
    file = Path(path or paths.CLASSIFIER)
    weights, metadata, digest = classifier_file.read(file)

    @functools.cache
    def network() -> "keras.Model":
        # Only now, because it loads Keras, which takes seconds and half a gigabyte.
        from marsclf.classify.classifier_network import build_network

        return build_network(file, weights, metadata)

    name, size = f"classifier-{digest[:32]}-{NETWORK_VERSION}", metadata["image_size"]
    engine = stored_predictor(name, (None, size, size, 3), cache)
    return Classifier(
        image_size=size,
        zooms=tuple(metadata["zooms"]),
        temperature=metadata["calibration"]["temperature"],
        digest=digest,
        training=metadata["training"],
        engine=engine or make_predictor(network(), cache, name=name),
        network=network,
    )


def _is_one_image(images: object) -> bool:
    """Tell (height, width) and (height, width, 3) from (n, height, width, 3)."""
    return isinstance(images, np.ndarray) and images.ndim in (2, 3)


def _checked(image: np.ndarray) -> np.ndarray:
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if image.dtype != np.uint8 or not fits or not image.size:
        raise MarsclfError(
            "An image must be a uint8 array (height, width) or (height, width, 3), not "
            f"{image.dtype} {image.shape}."
        )
    return to_8_bit(image)
