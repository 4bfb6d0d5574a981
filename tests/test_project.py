"""The files around the code: versions, Makefile, license, citation, links."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tiny_project import stamp_environment

from marsclf import paths
from marsclf.pipeline.run import KERNEL_ENVIRONMENT

ROOT = paths.PROJECT_ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# An interpreter that only pretends, so that making the environment takes no time.
FAKE_PYTHON = """#!/bin/sh
case "$1" in
    -c) exit 0 ;;
esac
echo made >> log
mkdir -p .venv/bin
printf '#!/bin/sh\\nexit %s\\n' "$PIP_STATUS" > .venv/bin/python
chmod +x .venv/bin/python
"""


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without the variables of the make, or the kernel, that may run these tests.
    own = ("MAKE", "JUPYTER_PATH", *KERNEL_ENVIRONMENT)
    outer = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=folder, env=outer | environment, capture_output=True, text=True
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").write_text("first")
    write_program(tmp_path / "python", FAKE_PYTHON)
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make_environment(checkout: Path) -> Path:
    """Let `make` take the environment for complete; return its folder of programs."""
    programs = checkout / ".venv" / "bin"
    programs.mkdir(parents=True)
    stamp_environment(checkout)
    return programs


def test_environment_yml_has_every_direct_dependency_at_the_locked_version() -> None:
    pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert pip[-1] == "-e ."
    pinned = dict(line.split("==") for line in pip[:-1])
    direct = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    assert set(pinned) == {re.match(r"[A-Za-z0-9._-]+", name)[0].lower() for name in direct}
    lock = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", lock, flags=re.MULTILINE))
    assert pinned == {name: locked.get(name) for name in pinned}


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split()
    listed = [line.split()[1] for line in make(ROOT, "help").stdout.splitlines()]
    assert sorted(listed) == sorted(set(targets) - {"environment"})
    assert make(ROOT).stdout == make(ROOT, "help").stdout


def test_make_passes_the_settings_on() -> None:
    arguments = ["run", "PRESET=p", "DATA_DIR=a b's", "SET=seed=1 epochs=3", "--dry-run"]
    command = shlex.split(make(ROOT, *arguments).stdout.splitlines()[-1])
    settings = ["--set", "seed=1", "--set", "epochs=3"]
    assert command[3:] == ["run", "--preset", "p", "--data-dir", "a b's", *settings]


def test_jupyterlab_gets_the_environment_of_a_run_and_its_options(checkout: Path) -> None:
    write_program(make_environment(checkout) / "jupyter", '#!/bin/sh\necho "$@"\nenv\n')
    personal = {"MALLOC_TOP_PAD_": "7", "JUPYTER_PATH": "/home/me", "KERAS_BACKEND": "torch"}
    ended = make(checkout, "lab", "LAB_OPTIONS=--allow-root --port=9000", **personal)
    expected = KERNEL_ENVIRONMENT | {"MALLOC_TOP_PAD_": "7"}  # the user's own takes precedence
    # But not over what the notebooks depend on.
    expected |= {"JUPYTER_PATH": f"{checkout / 'marsclf' / 'jupyter'}:/home/me"}
    expected |= {"KERAS_BACKEND": "tensorflow"}
    assert "--allow-root --port=9000" in ended.stdout
    refused = make(checkout, "lab")
    assert ("make lab LAB_OPTIONS=--allow-root" in refused.stderr) is (os.geteuid() == 0)
    assert {f"{name}={value}" for name, value in expected.items()} <= {*ended.stdout.splitlines()}


def test_make_html_without_a_run(checkout: Path) -> None:
    make_environment(checkout)
    ended = make(checkout, "html", "PRESET=tiny")
    assert ended.returncode != 0
    assert "error: There are no executed notebooks in runs/tiny: run `make run" in ended.stderr


def test_make_needs_a_suitable_python(checkout: Path) -> None:
    ended = make(checkout, "environment", "PYTHON=false no-such-python")
    assert ended.returncode != 0
    assert "error: marsclf needs Python 3.11, 3.12 or 3.13" in ended.stderr
    assert not (checkout / ".venv").exists()


def test_an_incomplete_environment_is_made_again(checkout: Path) -> None:
    arguments = ["environment", f"PYTHON=false {checkout / 'python'}"]
    lock, log = checkout / "requirements.lock", checkout / "log"
    assert make(checkout, *arguments, PIP_STATUS="1").returncode != 0
    # Complete after the second time; then only another lock file is a reason to make it again.
    for text, modified, times in (("first", 1e9, 2), ("first", 2e9, 2), ("second", 3e9, 3)):
        lock.write_text(text)
        os.utime(lock, (modified, modified))
        assert make(checkout, *arguments, PIP_STATUS="0").returncode == 0
        assert log.read_text() == "made\n" * times


def test_the_citation_has_the_version_and_the_license() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert "marsclf/classifiers/ hold weights" in (ROOT / "NOTICE").read_text()


DOCUMENTS = ["README.md", "RESULTS.md", "MODEL_CARD.md", "CONTRIBUTING.md", "docs/archive-scale.md"]
DOCUMENTS += ["examples/README.md"]


def test_the_readme_shows_what_predict_prints_for_the_examples(prepared: Path) -> None:
    text = re.search(r"```csv\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    command = [sys.executable, "-m", "marsclf", "predict", "examples/"]
    environment = os.environ | {"MARSCLF_CACHE_DIR": str(prepared)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    shown, printed = (pd.read_csv(io.BytesIO(part)) for part in (text.encode(), done.stdout))
    # Another kind of processor may change the last digits.
    pd.testing.assert_frame_equal(shown, printed, atol=2e-3, rtol=0)
    assert printed["predicted"].nunique() > 4 and printed["uncertain"].any()
    assert printed["unfamiliar"].tolist() == [name == "1290" for name in printed["path"].str[9:13]]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_link_to_files_and_call_what_a_newcomer_has(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []
    # The system's Python lacks the packages, and no registry has marsclf.
    assert re.findall(r"^python .*|pip install '?marsclf.*", text, flags=re.MULTILINE) == []
