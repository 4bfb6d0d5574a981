"""`make lab` as a person uses it: notebooks with controls opened in a browser, all cells run.

The tests of the notebooks execute them with papermill.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_project import environment_of, stamp_environment

from marsclf import paths
from marsclf.data.open import load_dataset
from marsclf.evaluation.predictions import write_predictions

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.browser
TOKEN = "of-this-test-alone"
PICTURES = {"03_error_analysis": 7, "05_classify_new_images": 3}
SETTINGS = {
    # All cells on the page, even those far below its edge; and no question about news.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false"},
}


@pytest.fixture(scope="module")
def copy(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with predictions for one's own images, which have no test split."""
    root = tmp_path_factory.mktemp("lab") / "project"
    shutil.copytree(project, root, ignore=shutil.ignore_patterns("runs", "cache"))
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(paths.PROJECT_ROOT / name, root)
    # This environment stands for the one that `make` would make.
    (root / ".venv").mkdir()
    (root / ".venv" / "bin").symlink_to(Path(sys.prefix) / "bin")
    stamp_environment(root)
    random, images = np.random.default_rng(0), root / "my images"
    for number in range(40):
        path = images / ("val", "train")[number % 2] / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    dataset, run = load_dataset(images), root / "runs" / "mine"
    guesses = random.dirichlet([1, 1, 1], len(dataset.index))
    write_predictions(run / "predictions.csv", dataset.index, guesses)
    record = {"dataset": dataset.name, "classes": dataset.classes}
    (run / "training.json").write_text(json.dumps(record))
    return root


@pytest.fixture(scope="module")
def page(copy, browser, prepared, tmp_path_factory) -> Iterator["playwright.Page"]:
    """The first page of a JupyterLab that `make lab` started."""
    folder = tmp_path_factory.mktemp("jupyter")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, values in SETTINGS.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    options = f"--no-browser --allow-root --port={port} --ServerApp.port_retries=0"
    environment = environment_of(copy) | {"MARSCLF_DATA_DIR": str(copy / "my images")}
    environment |= {"JUPYTER_TOKEN": TOKEN, "JUPYTERLAB_SETTINGS_DIR": str(folder)}
    environment |= {"JUPYTER_CONFIG_DIR": str(folder), "MARSCLF_CACHE_DIR": str(prepared)}
    with (folder / "log").open("w") as output:
        command = ["make", "lab", f"LAB_OPTIONS={options}"]
        how = {"stdout": output, "stderr": output, "start_new_session": True}
        process = subprocess.Popen(command, cwd=copy, env=environment, **how)
    try:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        for _ in range(120):
            try:
                page.goto(f"http://127.0.0.1:{port}/lab?token={TOKEN}")
                break
            except playwright.Error:  # the server is still starting
                page.wait_for_timeout(250)
        yield page
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.parametrize("name", PICTURES)
def test_run_all_cells(name: str, copy: Path, page: "playwright.Page") -> None:
    cells = json.loads((copy / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    page.goto(page.url.partition("/lab")[0] + f"/lab/tree/notebooks/{name}.ipynb?reset")
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell")
    # JupyterLab skips cells that are run before the kernel is ready.
    page.wait_for_selector("#jp-main-statusbar :text('Python 3 (ipykernel) | Idle')")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    code = sum(cell["cell_type"] == "code" for cell in cells)
    done = page.locator(".jp-CodeCell .jp-InputArea-prompt").filter(has_text=re.compile(r"\[\d+\]"))
    playwright.expect(done).to_have_count(code, timeout=300_000)
    outputs = page.locator(".jp-CodeCell .jp-OutputArea-output")
    kinds = outputs.evaluate_all("all => all.map(one => one.dataset.mimeType)")
    texts = outputs.all_inner_texts()
    bad = {"application/vnd.jupyter.error", "application/vnd.jupyter.stderr"}
    assert bad.isdisjoint(kinds), texts
    is_own = name == "03_error_analysis"  # 05 shows the real images of examples/
    assert ("Run mine, data set my images" in "\n".join(texts)) is is_own
    widths = page.locator(".jp-OutputArea img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert len(widths) == PICTURES[name] and min(widths) >= 1000
    # Another choice gives another picture.
    menu = page.locator(".widget-dropdown select").first
    change(page, menu, lambda: menu.select_option(index=1))
    if is_own:
        slider = page.locator(".widget-hslider [role=slider]")
        change(page, slider, lambda: slider.press("ArrowLeft"))


def change(page: "playwright.Page", control, act) -> None:
    picture = page.locator(".widget-vbox").filter(has=control).locator("img")
    before = picture.get_attribute("src")
    act()
    playwright.expect(picture).not_to_have_attribute("src", before)
