"""Presets, and the notebook parameters that presets and --set may change."""

import ast
import difflib
import json
from contextlib import suppress
from pathlib import Path

import yaml

from marsclf import paths
from marsclf.data.msl import MSL_V1
from marsclf.errors import MarsclfError

NOTEBOOKS = ("01_data_exploration", "02_fine_tuning", "03_error_analysis")
# These presets belong to a notebook of their own.
LADDERS, LADDER_NOTEBOOK = ("ladder", "b7-reference"), "04_reference_reproduction"
DEFAULT_PRESET = "laptop"
# `run` sets these parameters itself; neither a preset nor --set may.
SET_BY_RUN = ("data_dir", "run_dir", "preset", "predictions_file", "dataset", "yes_on_cpu")


def load_preset(name: str, extended_by: tuple[str, ...] = ()) -> dict:
    """Return a preset's description, expected results (a mapping) and parameters (a mapping).

    The parameters include those of the preset that it `extends`. Raises MarsclfError for an
    unknown preset, for a file of another form, and for presets that extend one another in a circle
    (`extended_by` names those that led here).
    """
    path = paths.PRESETS / f"{name}.yaml"
    known = sorted(file.stem for file in paths.PRESETS.glob("*.yaml"))
    if name not in known:
        origin = f", which {extended_by[-1]} extends" if extended_by else ""
        raise MarsclfError(f"There is no preset {name!r}{origin}; there are {', '.join(known)}.")
    if name in extended_by:
        raise MarsclfError(f"{path} extends itself: remove its `extends`.")
    try:
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MarsclfError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    parts = ("expected", "parameters")
    if not isinstance(preset, dict) or not all(isinstance(preset.get(p), dict) for p in parts):
        raise MarsclfError(f"{path} must hold the mappings `expected` and `parameters`.")
    if "extends" in preset:
        base = load_preset(preset["extends"], (*extended_by, name))
        preset["parameters"] = base["parameters"] | preset["parameters"]
    return preset


def data_of(preset: str | None) -> str:
    """Return the name of the published data set that a preset was made for."""
    return load_preset(preset)["expected"].get("data", MSL_V1.name) if preset else MSL_V1.name


def notebook_parameters(path: Path) -> dict[str, object]:
    """Return name and default of each parameter in the notebook's one cell tagged `parameters`.

    Raises MarsclfError for a file that is not a notebook, without exactly one such cell, or with a
    cell that holds anything but `name = value`.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MarsclfError(f"{path} cannot be read as a notebook: {error!r}.") from error
    if len(tagged) != 1:
        raise MarsclfError(f"{path} has {len(tagged)} cells tagged `parameters`; it needs one.")
    try:
        statements = ast.parse("".join(tagged[0]["source"])).body
        return {s.targets[0].id: ast.literal_eval(s.value) for s in statements}
    except (SyntaxError, ValueError, AttributeError) as error:
        reason = "the cell tagged `parameters` may hold only lines like `name = 1`"
        raise MarsclfError(f"{path}: {reason}.") from error


def parse_settings(texts: list[str]) -> dict[str, object]:
    """Return texts like "epochs=3" as a mapping, the values read as YAML, or raise MarsclfError."""
    try:
        pairs = (text.split("=", 1) for text in texts)
        return {name: yaml.safe_load(value) for name, value in pairs}
    except (ValueError, yaml.YAMLError):
        given = " ".join(texts)
        raise MarsclfError(f"A setting is name=value, the value in YAML, not {given!r}.") from None


def parameters_of(preset: str, settings: dict[str, object] | None = None) -> dict[str, object]:
    """Return every notebook parameter with its value: the default, or the preset's, or a setting.

    Raises MarsclfError for a name that no notebook declares and for a value of another type than
    the default's; where the default is None any value is valid.
    """
    layers = {f"presets/{preset}.yaml": load_preset(preset)["parameters"], "--set": settings or {}}
    values: dict[str, object] = {}
    for name in (LADDER_NOTEBOOK,) if preset in LADDERS else NOTEBOOKS:
        values = notebook_parameters(paths.NOTEBOOKS / f"{name}.ipynb") | values
    values = {name: value for name, value in values.items() if name not in SET_BY_RUN}
    defaults = dict(values)
    for origin, layer in layers.items():
        for name, value in layer.items():
            if name not in defaults:
                near = ", ".join(difflib.get_close_matches(str(name), values) or sorted(values))
                raise MarsclfError(
                    f"{origin}: {name!r} is not a parameter that can be set; did you mean {near}? "
                    "(Choose the data with --data-dir and the preset with --preset.)"
                )
            values[name] = _checked(f"{origin}: {name}", value, defaults[name])
    return values


def _checked(name: str, value: object, default: object) -> object:
    """Return the value, as float where the default is one; raise MarsclfError for another type."""
    if isinstance(default, float) and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError):  # YAML reads 1 as an integer and 1e-4 as text
            value = float(value)
    if default is not None and type(value) is not type(default):
        kind = f"of type {type(default).__name__}, like its default {default!r}"
        raise MarsclfError(f"{name} must be {kind}, but is {value!r}.")
    return value
