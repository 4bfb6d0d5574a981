"""A given folder is never replaced; only without any network does the sample data step in."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from marsclf import paths
from marsclf.data import download
from marsclf.data.msl import MSL_V1, PUBLISHED, SAMPLE_NOTICE
from marsclf.data.open import locate, open_dataset
from marsclf.errors import MarsclfError


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No folder is given and nothing is downloaded; new data goes to the returned folder."""
    monkeypatch.delenv("MARSCLF_DATA_DIR", raising=False)
    monkeypatch.setattr(paths, "DATA", tmp_path / "data" / "msl-images")
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path


def test_locate(no_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate() is None
    paths.DATA.mkdir(parents=True)
    monkeypatch.setenv("MARSCLF_DATA_DIR", "")
    assert locate() == paths.DATA
    assert locate(wanted="msl-v2.1") is None
    paths.DATA.with_name("msl-v2.1").mkdir()
    assert locate(wanted="msl-v2.1") == paths.DATA.with_name("msl-v2.1")
    with pytest.raises(MarsclfError, match="no data set 'mars': the names are msl-v1, msl-v2.1"):
        locate(wanted="mars")
    monkeypatch.setenv("MARSCLF_DATA_DIR", str(no_data / "from-environment"))
    assert locate() == no_data / "from-environment"
    assert locate("somewhere") == paths.PROJECT_ROOT / "somewhere"
    assert locate("~/images") == Path.home() / "images"


def test_given_folder_is_never_replaced(no_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = no_data / "missing"
    for given in (missing, None):
        with pytest.raises(MarsclfError, match=f"{missing} is missing or not a folder"):
            open_dataset(given)
        monkeypatch.setenv("MARSCLF_DATA_DIR", str(missing))
    assert list(no_data.iterdir()) == []


def test_without_a_network_the_sample_replaces_the_download(
    no_data: Path,
    sample_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(PUBLISHED, "msl-v1", replace(MSL_V1, url="http://127.0.0.1:1/msl.zip"))
    shutil.copytree(sample_dir, paths.CACHE / "sample")
    dataset = open_dataset()
    assert (dataset.name, dataset.root) == ("sample", paths.CACHE / "sample")
    printed = capsys.readouterr().out
    assert "127.0.0.1:1/msl.zip cannot be reached" in printed and SAMPLE_NOTICE in printed
    assert list(paths.DATA.parent.iterdir()) == []


def test_failed_download_is_an_error(no_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "fetch", Mock(side_effect=MarsclfError("the download failed")))
    with pytest.raises(MarsclfError, match="the download failed"):
        open_dataset()
    assert not paths.CACHE.exists()
