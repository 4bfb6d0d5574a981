"""The download of a published data set from Zenodo."""

import sys
import zipfile
import zlib
from pathlib import Path

import pooch
import requests

from marsclf.data import msl
from marsclf.data.msl import PublishedDataSet
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

RETRIES = 2  # pooch waits 1 and 2 seconds before them
TIMEOUT = (5, 30)  # seconds to connect, and to wait for the next bytes
BY_HAND = "try again later, or download and unpack it yourself and set MARSCLF_DATA_DIR"


class NetworkUnreachable(MarsclfError):
    """The server cannot be reached."""


def fetch(published: PublishedDataSet, target: Path) -> Path:
    """Download a data set's archive, unpack it as the folder `target`, and return that folder.

    `target` appears only when it is complete; an existing one stays unchanged. Raises
    NetworkUnreachable if the server cannot be reached, and MarsclfError if the archive cannot be
    downloaded, is not the published one, or cannot be stored.
    """
    if target.exists():
        return target
    try:
        with replace_atomically(target) as folder:
            archive = folder.with_name(f"{target.name}.zip")
            _download(published.url, archive)
            unpacked = _unpack(published, archive, folder.with_name("unpacked"))
            if unpacked is None:
                raise MarsclfError(f"{published.url} is not {published.name}; {BY_HAND}.")
            unpacked.rename(folder)
    except OSError as error:
        reason = f"{target} cannot be written ({error})"
        raise MarsclfError(f"{reason}; check the free disk space and permissions.") from error
    return target


def _download(url: str, archive: Path) -> None:
    """Download `url` as the file `archive`, with retries."""
    # Zenodo limits the default user agent of requests more strictly.
    options = {"timeout": TIMEOUT, "headers": {"User-Agent": "marsclf"}}
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), **options)
    files, urls = {archive.name: None}, {archive.name: url}
    storage = pooch.create(archive.parent, "", registry=files, urls=urls, retry_if_failed=RETRIES)
    try:
        storage.fetch(archive.name, downloader=downloader)
    except requests.ConnectionError as error:
        raise NetworkUnreachable(f"{url} cannot be reached ({type(error).__name__}).") from error
    except requests.RequestException as error:
        raise MarsclfError(f"The download failed ({error}); {BY_HAND}.") from error


def _unpack(published: PublishedDataSet, archive: Path, folder: Path) -> Path | None:
    """Unpack the archive in `folder`; return the folder of the data set, None if it is another."""
    try:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)  # never writes outside the folder
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return None
    for found in folder.rglob(published.lists["train"]):
        _, dataset = msl.scan(found.parent, published)
        if dataset and dataset.digest == published.digest:
            return found.parent
    return None
