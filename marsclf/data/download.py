"""The download of a published data set from Zenodo."""

import sys
import zipfile
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import pooch
import requests

from marsclf.data import msl
from marsclf.data.msl import PublishedDataSet
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

RETRIES = 8  # pooch waits 1, 2, 3 ... seconds before each
TIMEOUT = (5, 30)  # seconds to connect, and to wait for the next bytes
BY_HAND = "try again later, or download and unpack it yourself and set MARSCLF_DATA_DIR"


class NetworkUnreachable(MarsclfError):
    """No server answered at all."""


def fetch(published: PublishedDataSet, target: Path) -> Path:
    """Download a data set's archive, unpack it as the folder `target`, and return that folder.

    `target` appears only when it is complete; an existing one stays unchanged. Raises
    NetworkUnreachable if no server answers, and MarsclfError if the archive cannot be downloaded,
    is not the published one, or cannot be stored.
    """
    if target.exists():
        return target
    try:
        with replace_atomically(target) as folder:
            archive = folder.with_name(f"{target.name}.zip")
            _download(published.url, archive)
            try:
                _unpack(published, archive, folder.with_name("unpacked")).rename(folder)
            except (MarsclfError, zipfile.BadZipFile, zlib.error, EOFError) as error:
                reason = f"The archive from {published.url} is unusable: {str(error).rstrip('.')}"
                raise MarsclfError(f"{reason}; {BY_HAND}.") from error
    except OSError as error:
        reason = f"{target} cannot be written ({error})"
        raise MarsclfError(f"{reason}; check the free disk space and permissions.") from error
    return target


def _download(url: str, archive: Path) -> None:
    """Download `url` as the file `archive`, with retries."""
    host = urlsplit(url).hostname
    try:  # once, because pooch would retry for half a minute
        answer = requests.head(url, timeout=TIMEOUT, allow_redirects=True)
    except requests.RequestException as error:
        raise NetworkUnreachable(f"{host} cannot be reached ({type(error).__name__}).") from error
    if answer.status_code == 404:
        raise MarsclfError(f"{host} does not have {url} (status 404); {BY_HAND}.")
    # Zenodo limits the default user agent of requests more strictly.
    options = {"timeout": TIMEOUT, "headers": {"User-Agent": "marsclf"}}
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), **options)
    files, urls = {archive.name: None}, {archive.name: url}
    storage = pooch.create(archive.parent, "", registry=files, urls=urls, retry_if_failed=RETRIES)
    try:
        storage.fetch(archive.name, downloader=downloader)
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        reason = f"{RETRIES + 1} times ({f'status {status}' if status else type(error).__name__})"
        raise MarsclfError(f"The download from {host} failed {reason}; {BY_HAND}.") from error


def _unpack(published: PublishedDataSet, archive: Path, folder: Path) -> Path:
    """Unpack and check the archive; return the folder in `folder` that holds the split files."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)  # never writes outside the folder
    found = next(folder.rglob(published.lists["train"]), None)
    if found is None:
        raise MarsclfError(f"it holds no {published.lists['train']}")
    faults, dataset = msl.scan(found.parent, published)
    if faults:
        raise MarsclfError(faults[0])
    if dataset.digest != published.digest:
        raise MarsclfError("its images are not those of the published data set")
    return found.parent
