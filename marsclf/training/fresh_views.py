"""Random views that are drawn anew for every epoch: the inputs of a training on a GPU.

The complete network runs on each of them, so nothing is cached, and no epoch repeats another.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from marsclf.files import sha256_of
from marsclf.images.views import VIEWS_VERSION, Augmentation, random_view
from marsclf.training.features import read_image


@dataclass
class FreshViews:
    """Images of which `views[rows]` returns random views, uint8 (rows, size, size, 3).

    Equal seed, epoch and rows give equal views. Raises MarsclfError for an image that cannot be
    read. `images` is a data set's index (columns path, relative to `root`, and sha256).
    """

    root: Path
    images: pd.DataFrame
    size: int
    augmentation: Augmentation
    seed: int
    epoch: int = 0

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.epoch, *rows.tolist()])
        images = (read_image(self.root / path) for path in self.images["path"].iloc[rows])
        return np.stack([random_view(i, self.size, self.augmentation, rng) for i in images])

    def digest(self) -> str:
        """Return a SHA-256 of everything that determines the views."""
        described = [VIEWS_VERSION, self.size, asdict(self.augmentation), self.seed]
        text = json.dumps([described, self.images["sha256"].tolist()])
        return sha256_of(text.encode())
