"""Keras's settings: those of the user change no number."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import environment_of

from marsclf import paths
from marsclf.networks.backbones import build_backbone
from marsclf.networks.engine import network_digest

DIGEST = """
from marsclf.training import train
from marsclf.networks import backbones, engine
import keras
model = backbones.build_backbone("EfficientNetLite0", 32)
print(engine.network_digest(model), keras.config.backend(), keras.config.floatx(),
      model.predict(__import__("numpy").full((1, 32, 32, 3), 99.0), verbose=0).dtype,
      keras.config.image_data_format(), keras.config.epsilon())
"""


def run_python(code: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = environment_of(paths.PROJECT_ROOT) | {"KERAS_HOME": str(home)} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_personal_settings_are_overridden(tmp_path: Path) -> None:
    settings = {"floatx": "float16", "image_data_format": "channels_first", "epsilon": 0.1}
    file = tmp_path / "keras.json"
    file.write_text(json.dumps(settings | {"backend": "nonsense"}))
    ended = run_python(DIGEST, tmp_path, KERAS_BACKEND="torch")
    digest = network_digest(build_backbone("EfficientNetLite0", 32))
    expected = [digest, "tensorflow", "float32", "float32", "channels_last", "1e-07"]
    assert ended.stdout.split() == expected, ended.stderr
    assert json.loads(file.read_text()) == settings | {"backend": "nonsense"}


@pytest.mark.parametrize(
    ("code", "settings", "reason"),
    [
        ("import keras; keras.config.backend = lambda: 'torch'; ", {}, "Keras runs on torch"),
        ("", {"floatx": "float8"}, "correct its keras.json"),
    ],
)
def test_an_unusable_keras_is_refused(tmp_path, code, settings, reason) -> None:
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    ended = run_python(f"{code}import marsclf.networks.backbones", tmp_path)
    assert "MarsclfError: " in ended.stderr and reason in ended.stderr.splitlines()[-1]
