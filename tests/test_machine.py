"""What is checked before a training: the GPU, the weights, memory, disk and time."""

import shutil

import pandas as pd
import pytest

from marsclf.errors import MarsclfError
from marsclf.networks import backbones
from marsclf.pipeline import machine
from marsclf.pipeline.presets import parameters_of


@pytest.fixture
def index() -> pd.DataFrame:
    """As many images as the real data set has, in two classes; each is a sol of its own."""
    splits = ["train"] * 3746 + ["val"] * 1640 + ["test"] * 1305
    table = pd.DataFrame({"split": splits, "label": [0, 1, 1] * 2230 + [1]})
    names = table.index.map("{:04d}".format)
    return table.assign(group=names, path=names)


@pytest.fixture(autouse=True)
def computer(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two cores without a GPU; the list has the backbones whose weights were asked for."""
    fetched: list[str] = []
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "hardware", lambda: {"gpu": None})
    monkeypatch.setattr(backbones, "fetch_weights", fetched.append)
    return fetched


def test_a_long_training_without_a_gpu_must_be_agreed_to(
    index: pd.DataFrame, computer: list[str], capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = parameters_of("b7")
    message = r"EfficientNetB7 takes about \d+ hours on 2 cores .*laptop.*--yes-on-cpu"
    with pytest.raises(MarsclfError, match=message):
        machine.check_machine("b7", parameters, index, yes_on_cpu=False)
    monkeypatch.setattr(machine, "hardware", lambda: {"gpu": "Tesla T4"})
    with pytest.raises(MarsclfError, match=r"sees no GPU \(there is Tesla T4; .*and-cuda"):
        machine.check_machine("b7", parameters, index, yes_on_cpu=False)
    assert computer == []  # nothing is downloaded before
    machine.check_machine("b7", parameters, index, yes_on_cpu=True)
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    machine.check_machine("b7", parameters, index, yes_on_cpu=False)
    assert computer == ["EfficientNetB7"] * 2
    on_cores, on_gpu = capsys.readouterr().out.splitlines()
    assert "hours on 2 cores" in on_cores and "min on a T4" in on_gpu


def test_a_short_training_needs_neither_gpu_nor_download(
    index: pd.DataFrame, computer: list[str], capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: pytest.fail("it takes seconds to look"))
    machine.check_machine("laptop", parameters_of("laptop"), index, yes_on_cpu=False)
    assert computer == [] and "min on 2 cores (computed, not measured)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_too_little_room(index: pd.DataFrame, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"memory": 50e9, "disk": 50e9} | {kind: 5e9}
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: Space(free["memory"]))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Space(free["disk"]))
    with pytest.raises(MarsclfError, match=rf"b7 needs \d+ GB of {kind}.* 5\.0 GB are free"):
        machine.check_machine("b7", parameters_of("b7"), index, yes_on_cpu=True)


class Space:
    def __init__(self, free: float) -> None:
        self.free = self.available = free


def test_the_work_by_hand(index: pd.DataFrame) -> None:
    """With fresh views every epoch passes all images of train and validation."""
    parameters = parameters_of("b7")
    judged = 8 * 2 * 40  # conditions, classes and images
    forward = 12 * (3746 + 1640) + 2 * (6691 + judged)
    assert machine.count_images(parameters, index) == (forward, 10 * (3746 + 1640))
    work = 37 * (380 / 600) ** 2 * (forward + 3 * 10 * (3746 + 1640))
    assert machine.multiplications(parameters, index) == pytest.approx(work)
    # Six recipes; two of them with three views of each training image.
    forward = 6 * 6691 + 2 * 3 * 3746
    work = 37 * 193 * 256 / 600**2 * (forward + 3 * 6 * 32 * 3746)
    assert machine.multiplications(parameters_of("b7-reference"), index) == pytest.approx(work)


@pytest.mark.parametrize(("gpu", "preset"), [(True, "b7"), (False, "laptop")])
def test_the_preset_for_a_machine(gpu, preset, capsys, monkeypatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    assert machine.choose_preset() == preset
    assert preset in capsys.readouterr().out
