"""Presets, and the notebooks' parameters that they and --set may change."""

import ast
import difflib
import json
from contextlib import suppress
from pathlib import Path

import yaml

from marsclf import paths
from marsclf.errors import MarsclfError

NOTEBOOKS = ("01_data_exploration", "02_fine_tuning", "03_error_analysis")
# These presets are of a notebook of their own.
LADDERS, LADDER_NOTEBOOK = ("ladder", "b7-reference"), "04_reference_reproduction"
DEFAULT_PRESET = "laptop"
# The run gives these to the notebooks itself; neither a preset nor --set may.
SET_BY_RUN = ("data_dir", "run_dir", "preset", "predictions_file", "dataset")


def load_preset(name: str) -> dict:
    """Return the preset's description, expected results (a mapping) and parameters (a mapping).

    The parameters of the preset that it `extends`, if it does, are among them. Raises MarsclfError
    where there is no such preset, or its file is none.
    """
    known = sorted(path.stem for path in paths.PRESETS.glob("*.yaml"))
    if name not in known:
        raise MarsclfError(f"There is no preset {name!r}; those here are {', '.join(known)}.")
    path = paths.PRESETS / f"{name}.yaml"
    try:
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MarsclfError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    parts = {"description": str, "expected": dict, "parameters": dict}
    if not isinstance(preset, dict) or any(
        not isinstance(preset.get(part), kind) for part, kind in parts.items()
    ):
        raise MarsclfError(
            f"{path} must hold a text `description` and the mappings `expected` and `parameters`."
        )
    if "extends" in preset:
        preset["parameters"] = load_preset(preset["extends"])["parameters"] | preset["parameters"]
    return preset


def notebook_parameters(path: Path) -> dict[str, object]:
    """Return name and default of each parameter in the notebook's one cell tagged `parameters`.

    Raises MarsclfError for a file that is no notebook, for another number of such cells, and for
    one that holds anything but `name = value`.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MarsclfError(f"{path} cannot be read as a notebook: {error!r}.") from error
    if len(tagged) != 1:
        raise MarsclfError(
            f"{path} has {len(tagged)} cells tagged `parameters`; it needs exactly one, or the "
            "notebook's defaults would overwrite the run's settings."
        )
    try:
        statements = ast.parse("".join(tagged[0]["source"])).body
        return {s.targets[0].id: ast.literal_eval(s.value) for s in statements}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise MarsclfError(
            f"{path}: the cell tagged `parameters` may hold nothing but lines like `name = 1`."
        ) from error


def parse_settings(texts: list[str]) -> dict[str, object]:
    """Turn texts like "epochs=3" into a mapping; the values are read as YAML.

    Raises MarsclfError for a text of another form, and for a value that is not YAML.
    """
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise MarsclfError(f"A setting has the form name=value, unlike {text!r}.")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise MarsclfError(
                f"The value of the setting {text!r} cannot be read as YAML."
            ) from None
    return settings


def parameters_of(preset: str, settings: dict[str, object] | None = None) -> dict[str, object]:
    """Return every notebook parameter with its value: default, overlaid by preset and settings.

    Raises MarsclfError for a name that no notebook declares and for a value of another type than
    the default's; where that is None any value will do.
    """
    layers = {f"presets/{preset}.yaml": load_preset(preset)["parameters"], "--set": settings or {}}
    declared: dict[str, object] = {}
    for name in (LADDER_NOTEBOOK,) if preset in LADDERS else NOTEBOOKS:
        declared = notebook_parameters(paths.NOTEBOOKS / f"{name}.ipynb") | declared
    values = {name: value for name, value in declared.items() if name not in SET_BY_RUN}
    for origin, layer in layers.items():
        for name, value in layer.items():
            values[name] = _checked(origin, name, value, declared)
    return values


def check_is_no_ladder(preset: str) -> None:
    """Raise MarsclfError for a preset of the ladder's notebook, which has several recipes."""
    if preset in LADDERS:
        raise MarsclfError(
            f"The preset {preset} is a ladder of recipes, which `make run PRESET={preset}` runs, "
            "compares and publishes by itself: name another preset."
        )


def _checked(origin: str, name: str, value: object, declared: dict[str, object]) -> object:
    if name in SET_BY_RUN:
        raise MarsclfError(
            f"{origin}: {name} is set by the run itself; choose the data with --data-dir and the "
            "preset with --preset."
        )
    if name not in declared:
        near = difflib.get_close_matches(str(name), declared) or sorted(
            set(declared) - set(SET_BY_RUN)
        )
        raise MarsclfError(
            f"{origin}: no notebook has a parameter {name!r}; did you mean {', '.join(near)}?"
        )
    default = declared[name]
    if isinstance(default, float) and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML reads 1 as an integer and 1e-4 as text.
        with suppress(ValueError):
            value = float(value)
    kind = list if isinstance(default, tuple) else type(default)
    if default is not None and type(value) is not kind:
        raise MarsclfError(
            f"{origin}: {name} must be of type {kind.__name__}, like its default {default!r}, but "
            f"is {value!r}."
        )
    return value
