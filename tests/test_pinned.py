"""Keras's settings: those of the user change no number."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from tiny_project import environment_of

from marsclf import paths
from marsclf.errors import MarsclfError
from marsclf.networks import pinned

SHOW = """
from marsclf.networks.pinned import keras
config = keras.config
print(config.backend(), config.floatx(), config.dtype_policy().name, config.image_data_format(),
      config.epsilon())
"""


def run_python(code: str, home: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run code where keras.json has these settings, and the variable KERAS_BACKEND another one."""
    (home / "keras.json").write_text(json.dumps(settings))
    environment = environment_of(paths.PROJECT_ROOT)
    environment |= {"KERAS_HOME": str(home), "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_personal_settings_are_overridden(tmp_path: Path) -> None:
    settings = {"floatx": "float16", "image_data_format": "channels_first", "epsilon": 0.1}
    settings["backend"] = "nonsense"
    ended = run_python(SHOW, tmp_path, **settings)
    expected = ["tensorflow", "float32", "float32", "channels_last", "1e-07"]
    assert ended.stdout.split() == expected, ended.stderr
    assert json.loads((tmp_path / "keras.json").read_text()) == settings


def test_an_unusable_keras_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = run_python("import marsclf.networks.backbones", tmp_path, floatx="float8")
    assert "MarsclfError: Keras does not start: correct its keras.json" in ended.stderr
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(MarsclfError, match="Keras runs on torch in this process"):
        importlib.reload(pinned)
