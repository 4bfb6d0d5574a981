"""Presets and settings: what they give the notebooks, and what is wrong with faulty ones."""

import json
from pathlib import Path

import pytest
from tiny_project import enter_project, make_project, write_notebook, write_preset

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.pipeline import presets


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_project(monkeypatch, make_project(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "text", ["- a list", "expected: {}", "a: [", "\0", "expected: {}\nparameters: {epoch: 3}"]
)
def test_a_faulty_preset(project: Path, text: str) -> None:
    (paths.PRESETS / "odd.yaml").write_text(text)
    with pytest.raises(MarsclfError, match=r"odd\.yaml"):
        presets.parameters_of("odd")


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("a", "a.yaml extends itself"),
        ("b", "a.yaml extends itself"),
        ("gone", "no preset 'gone', which a extends; there are a, b, ladder, laptop"),
        ("[b]", r"no preset \['b'\], which a extends"),
    ],
)
def test_a_preset_that_cannot_be_extended(project: Path, base: str, reason: str) -> None:
    write_preset(paths.PRESETS / "a.yaml", f"extends: {base}\nparameters: {{}}")
    write_preset(paths.PRESETS / "b.yaml", "extends: a\nparameters: {}")
    with pytest.raises(MarsclfError, match=reason):
        presets.load_preset("a")


def test_a_preset_extends_another_and_settings_both(project: Path) -> None:
    write_preset(paths.PRESETS / "more.yaml", "extends: laptop\nparameters: {epochs: 7, seed: 7}")
    settings = presets.parse_settings(["seed=5", "blocks=[a, b]", "backbone=B0", "size=64"])
    expected = {"rate": 0.001, "epochs": 7, "seed": 5, "blocks": ["a", "b"], "backbone": "B0"}
    assert presets.parameters_of("more", settings).items() >= (expected | {"size": 64}).items()
    assert presets.parameters_of("laptop")["epochs"] == 1


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("epoch=3", r"^--set: 'epoch' is not a parameter .* did you mean epochs, head_epochs\?"),
        ("zzz=3", r"did you mean augmentation, backbone, .*, size, .*, weight_decay\?"),
        ("data_dir=x", "not a parameter that can be set; .* the data with --data-dir"),
        ("preset=x", "the preset with --preset"),
        ("epochs=ten", "--set: epochs must be of type int, like its default 1, but is 'ten'"),
        ("epochs=true", "must be of type int"),
        ("rate=high", "must be of type float"),
        ("blocks=a", "must be of type list"),
        ("seed=", "must be of type int"),
        ("seed", "A setting is name=value, .* not 'seed'"),
        ("seed=[", r"A setting is name=value, .* not 'seed=\['"),
    ],
)
def test_a_wrong_setting(project: Path, setting: str, reason: str) -> None:
    with pytest.raises(MarsclfError, match=reason):
        presets.parameters_of("laptop", presets.parse_settings([setting]))


@pytest.mark.parametrize(
    ("parameters", "tagged", "reason"),
    [
        ("seed = 0", 0, "has 0 cells tagged"),
        ("seed = 0", 2, "has 2 cells tagged"),
        ("import os", 1, "only lines like"),
        ("seed = int('3')", 1, "only lines like"),
    ],
)
def test_a_faulty_notebook(project: Path, parameters: str, tagged: int, reason: str) -> None:
    write_notebook(paths.NOTEBOOKS, "02_fine_tuning", parameters, "pass", tagged)
    with pytest.raises(MarsclfError, match=rf"02_fine_tuning\.ipynb.*{reason}"):
        presets.parameters_of("laptop")
    (paths.NOTEBOOKS / "02_fine_tuning.ipynb").write_text("{}")
    with pytest.raises(MarsclfError, match="cannot be read as a notebook"):
        presets.parameters_of("laptop")


# The pipeline's notebooks, that of the ladders, and one that is not part of any run.
NOTEBOOKS = (*presets.NOTEBOOKS, presets.LADDER_NOTEBOOK, "05_classify_new_images")


def test_notebooks_are_stored_without_outputs() -> None:
    assert sorted(path.stem for path in paths.NOTEBOOKS.glob("*.ipynb")) == [*NOTEBOOKS]
    for name in NOTEBOOKS:
        notebook = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert notebook["cells"][0]["cell_type"] == "markdown"
        for part in (notebook, *notebook["cells"]):
            assert "papermill" not in part["metadata"]
        for cell in notebook["cells"]:
            assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


def test_notebooks_share_the_defaults_of_shared_parameters() -> None:
    defaults: dict[str, object] = {}
    for name in presets.NOTEBOOKS:
        declared = presets.notebook_parameters(paths.NOTEBOOKS / f"{name}.ipynb")
        assert {"data_dir": None, "run_dir": "runs/by-hand"}.items() <= declared.items()
        for parameter, default in declared.items():
            assert defaults.setdefault(parameter, default) == default, parameter


def test_presets_of_the_project_are_valid_and_expect_the_published_accuracy() -> None:
    names = [path.stem for path in paths.PRESETS.iterdir()]
    assert {presets.DEFAULT_PRESET, "smoke", *presets.LADDERS} <= set(names)
    for name in names:
        presets.parameters_of(name)
    published = [path.parent.name for path in paths.RESULTS.glob("*/metrics.json")]
    assert presets.DEFAULT_PRESET in published
    for name in published:
        result = json.loads((paths.RESULTS / name / "metrics.json").read_text())
        expected = presets.load_preset(name)["expected"]
        for split, numbers in result["splits"].items():
            promised = expected.get(f"{split}_accuracy", "not measured")
            assert promised in ("not measured", round(numbers["accuracy"], 3)), (name, split)
