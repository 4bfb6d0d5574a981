"""Counts, filters and thumbnails of a classifier's table."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from marsclf.data.msl import CLASS_NAMES
from marsclf.errors import MarsclfError
from marsclf.evaluation.predictions import as_predictions
from marsclf.figures import widgets as browse


def test_counts(classified: pd.DataFrame) -> None:
    found = browse.counts(classified)
    assert found.index.tolist() == ["wheel", "ground"]
    assert found["images"].tolist() == [2, 1] and found["uncertain"].tolist() == [1, 1]
    assert found["median_confidence"].tolist() == pytest.approx([0.65, 0.6])


def test_select(classified: pd.DataFrame) -> None:
    assert browse.select(classified)["confidence"].tolist() == [0.35, 0.6, 0.95]
    assert browse.select(classified, "wheel", least=0.5)["confidence"].tolist() == [0.95]
    assert browse.select(classified, most=0.6)["predicted"].tolist() == ["wheel", "ground"]
    with pytest.raises(MarsclfError, match="no class 'Wheel'"):
        browse.select(classified, "Wheel")


def test_thumbnails(classified: pd.DataFrame) -> None:
    figure = browse.thumbnails(browse.select(classified))
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["wheel\n0.35", "ground\n0.60", "wheel\n0.95"]
    with pytest.raises(MarsclfError, match="No image is chosen"):
        browse.thumbnails(classified[:0])


def test_mistakes_by_class_pair(tmp_path: Path) -> None:
    names = [f"{sol:04d}MR0036510000500684E01_DRCL.JPG" for sol in range(565, 598)]
    for name in names[:30]:
        Image.new("RGB", (64, 48), "brown").save(tmp_path / name)
    wheel, ground, horizon = (CLASS_NAMES.index(name) for name in ("wheel", "ground", "horizon"))
    labels = [ground] * 26 + [wheel] * 5 + [wheel] * 2
    said = [horizon] * 26 + [ground] * 5 + [wheel] * 2
    probabilities = np.zeros((len(names), 25))
    sure = np.linspace(0.6, 0.9, len(names))
    probabilities[:, 0] = 1 - sure
    probabilities[np.arange(len(names)), said] = sure
    index = pd.DataFrame({"split": "test", "path": names, "label": labels})
    predictions = as_predictions(index, probabilities)
    pairs = browse.mistaken_pairs(predictions)
    assert pairs == {
        "ground → horizon (26)": ("ground", "horizon"),
        "wheel → ground (5)": ("wheel", "ground"),
    }
    figure = browse.mistakes(predictions, tmp_path, ("ground", "horizon"))
    assert figure.get_suptitle() == "ground, taken for horizon: 24 of 26 images"
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words[0] == f"sol 590, {sure[25]:.2f}" and len(words) == 24
    # An image that is gone leaves its tile empty.
    assert len(browse.mistakes(predictions, tmp_path, ("wheel", "ground")).axes[0].texts) == 5
