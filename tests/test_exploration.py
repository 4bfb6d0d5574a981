"""Near-duplicates of images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_notebooks import execute

from marsclf.data.splits import nearest, normalized, thumbnail


def test_the_product_of_thumbnails_is_their_correlation() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    images = [noise, noise // 2, np.full_like(noise, 90)]
    thumbnails = normalized(np.stack([thumbnail(image) for image in images]))
    small = [image.reshape(16, 4, 16, 4).mean(axis=(1, 3)).ravel() for image in images[:2]]
    assert thumbnails[0] @ thumbnails[1] == pytest.approx(np.corrcoef(small)[0, 1], abs=0.01)
    assert not thumbnails[2].any()  # correlates with nothing


def test_nearest_finds_the_copy_and_never_the_image_itself() -> None:
    thumbnails = np.random.default_rng(0).normal(size=(200, 256)).astype(np.float32)
    thumbnails[150] = thumbnails[3]
    thumbnails /= np.linalg.norm(thumbnails, axis=1, keepdims=True)
    rows = np.arange(200)
    correlation, partner = nearest(thumbnails, rows, rows)
    assert (partner[3], partner[150]) == (150, 3) and (partner != rows).all()
    assert correlation[3] == pytest.approx(1, abs=1e-5) and correlation[:3].max() < 0.5
    assert nearest(thumbnails, rows[:3], rows[100:])[1].min() >= 100


def test_images_without_sols_and_without_a_test_split(project: Path, tmp_path: Path) -> None:
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 256, (90, 300, 3), np.uint8)
        path = tmp_path / "photos" / ("val" if number % 4 else "train") / f"kind {number % 3}"
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path / f"{number}.png")
    data_dir = str(tmp_path / "photos")
    printed, pictures = execute("01_data_exploration", project, tmp_path, data_dir=data_dir)
    assert "Data set: photos, 40 images" in printed and "no sols or cameras" in printed
    assert pictures == 7 and not (tmp_path / "figures" / "01_sols_and_cameras.png").exists()
