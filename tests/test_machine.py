"""What is checked before a training: the GPU, the weights, memory and disk."""

import shutil
from types import SimpleNamespace

import pytest

from marsclf.errors import MarsclfError
from marsclf.networks import backbones
from marsclf.pipeline import machine


@pytest.fixture(autouse=True)
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backbones whose weights were asked for, on a computer without a GPU."""
    fetched: list[str] = []
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "hardware", lambda: {"gpu": None})
    monkeypatch.setattr(backbones, "fetch_weights", fetched.append)
    return fetched


def test_a_large_backbone_without_a_gpu_must_be_agreed_to(fetched, capsys, monkeypatch) -> None:
    for backbone in ("EfficientNetB3", "EfficientNetB7"):
        with pytest.raises(MarsclfError, match=f"{backbone} takes many .*laptop.*--yes-on-cpu"):
            machine.check_machine(None, backbone, yes_on_cpu=False)
    monkeypatch.setattr(machine, "hardware", lambda: {"gpu": "Tesla T4"})
    with pytest.raises(MarsclfError, match=r"sees no GPU \(there is Tesla T4; .*and-cuda"):
        machine.check_machine("b7", "EfficientNetB7", yes_on_cpu=False)
    assert fetched == []  # nothing is downloaded before
    machine.check_machine("b7", "EfficientNetB7", yes_on_cpu=True)
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    machine.check_machine("b7", "EfficientNetB7", yes_on_cpu=False)
    assert fetched == ["EfficientNetB7"] * 2
    assert "GB of memory free" in capsys.readouterr().out


@pytest.mark.parametrize("backbone", ["EfficientNetLite0", "EfficientNetB0", "EfficientNetB1"])
def test_a_small_backbone_needs_no_gpu(backbone: str, fetched, monkeypatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: pytest.fail("it takes seconds to look"))
    machine.check_machine(None, backbone, yes_on_cpu=False)
    assert fetched == [backbone] * ("Lite" not in backbone)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_too_little_room(kind: str, fetched, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"memory": 50e9, "disk": 50e9} | {kind: 5e9}
    memory, disk = SimpleNamespace(available=free["memory"]), SimpleNamespace(free=free["disk"])
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    with pytest.raises(MarsclfError, match=rf"b7 needs \d+ GB of {kind}.* 5\.0 GB are free"):
        machine.check_machine("b7", "EfficientNetB7", yes_on_cpu=True)
    assert fetched == []


@pytest.mark.parametrize(("gpu", "preset"), [(True, "b7"), (False, "laptop")])
def test_the_preset_for_a_machine(gpu, preset, capsys, monkeypatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    assert machine.choose_preset() == preset
    assert preset in capsys.readouterr().out
