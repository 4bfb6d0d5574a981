"""The page of `predict --report`, as a person uses it in a browser."""

import os
from pathlib import Path

import pytest
from PIL import Image

from marsclf.classify.report import write_report
from marsclf.classify.table import Row, printable

pytestmark = pytest.mark.browser
SCRIPT = "\"><script>document.title = 'changed'<"
# The text of a figure outside the window is not rendered, so this reads the nodes themselves.
SHOWN = """() => {
  const shown = all => [...all].filter(element => element.checkVisibility());
  return Object.fromEntries(shown(document.querySelectorAll("section")).map(section => [
    section.querySelector("h2").innerText,
    shown(section.querySelectorAll("figcaption")).map(caption => caption.lastChild.textContent),
  ]));
}"""
# Class and confidence; below 0.9 an image is uncertain.
PREDICTIONS = {
    "b.png": ("wheel", 0.91),
    "a.png": ("wheel", 1.0),
    "doubt 1.png": ("sand & 'dust'", 0.3),
    "doubt 2.png": ("wheel", 0.5),
    f"{SCRIPT}.png": ("sand & 'dust'", 0.95),
    os.fsdecode(b"caf\xe9.png"): ("wheel", 0.92),
}


def test_the_page(browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = [("broken.png", Row("broken.png", error="it is <b>empty</b>"))]
    for path, (name, confidence) in PREDICTIONS.items():
        Image.new("RGB", (300, 100), "brown").save(path)
        row = Row(printable(path), name, confidence, "sun", 0.01, confidence < 0.9)
        pairs.append((path, row))
    Path("a.png").unlink()
    write_report(pairs, Path("page.html"), "msl-<v1>", 0.9)

    page, seen = browser.new_page(), []
    page.on("request", lambda request: seen.append(request.url.partition(":")[0]))
    page.on("pageerror", lambda error: seen.append(error))
    page.goto(f"file://{tmp_path}/page.html")

    def shown() -> dict[str, list[str]]:
        """Return the visible file names by the title of their section."""
        return page.evaluate(SHOWN)

    everything = {
        "wheel 3": ["a.png", r"caf\udce9.png", "b.png"],
        "sand & 'dust' 1": [f"{SCRIPT}.png"],
        "uncertain 2": ["doubt 2.png", "doubt 1.png"],
        "unreadable 1": ["broken.png"],
    }
    assert shown() == everything and page.title() == "7 classified images"
    text = page.locator("body").inner_text()
    assert "msl-<v1>" in text and "it is <b>empty</b>" in text and "or sun 1.0%" in text
    widths = page.locator("img").evaluate_all(
        "all => Promise.all(all.map(image => image.decode().then(() => image.naturalWidth)))"
    )
    assert widths == [128] * 5  # not the one that is gone
    assert seen == ["file"]  # no error, and nothing else is loaded

    # All controls, from the keyboard.
    for name, keys, expected in (
        ("class", ["s"], {"sand & 'dust' 1": [f"{SCRIPT}.png"], "uncertain 1": ["doubt 1.png"]}),
        ("kind", ["u", "n", "r"], {"unreadable 1": ["broken.png"]}),
        ("least", ["End"], {"wheel 1": ["a.png"]}),
        ("most", ["Home"], {"unreadable 1": ["broken.png"]}),
        ("text", ["D", "O", "u", "b", "t"], {"uncertain 2": everything["uncertain 2"]}),
    ):
        control = page.locator(f"[name={name}]")
        for key in keys:
            control.press(key)
        assert shown() == expected
        assert f"{sum(map(len, expected.values()))} of 7 shown" in page.inner_text("form")
        page.get_by_role("button", name="show all").press("Enter")
        assert shown() == everything
    page.emulate_media(media="print")
    assert not page.locator("form").is_visible() and shown() == everything
