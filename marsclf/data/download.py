"""The download of the real images from Zenodo."""

import sys
import zipfile
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import pooch
import requests

from marsclf.data.msl import MSL_V1_DIGEST, load_dataset, split_file
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

ZENODO_URL = "https://zenodo.org/records/1049137/files/msl-images.zip?download=1"
ZENODO_BYTES = 60_635_475
RETRIES = 8  # pooch waits 1, 2, 3 ... seconds before each
TIMEOUT = (5, 30)  # seconds to connect, and to wait for the next bytes
BY_HAND = "try again later, or download and unpack it yourself and set MARSCLF_DATA_DIR"


class NetworkUnreachable(MarsclfError):
    """No server answered at all."""


def fetch_msl_images(target: Path) -> Path:
    """Download the archive, unpack it as the folder `target`, and return that folder.

    `target` appears only when it is complete; an existing one stays unchanged. Raises
    NetworkUnreachable if no server answers, and MarsclfError if the archive cannot be downloaded,
    is not the published one, or cannot be stored.
    """
    if target.exists():
        return target
    try:
        with replace_atomically(target) as folder:
            archive = folder.with_name(f"{target.name}.zip")
            _download(archive)
            try:
                _unpack(archive, folder.with_name("unpacked")).rename(folder)
            except (MarsclfError, zipfile.BadZipFile, zlib.error, EOFError) as error:
                reason = f"The archive from {ZENODO_URL} is unusable: {str(error).rstrip('.')}"
                raise MarsclfError(f"{reason}; {BY_HAND}.") from error
    except OSError as error:
        reason = f"{target} cannot be written ({error})"
        raise MarsclfError(f"{reason}; check the free disk space and permissions.") from error
    return target


def _download(archive: Path) -> None:
    """Download ZENODO_URL as the file `archive`, with retries."""
    host = urlsplit(ZENODO_URL).hostname
    try:  # once, because pooch would retry for half a minute
        answer = requests.head(ZENODO_URL, timeout=TIMEOUT, allow_redirects=True)
    except requests.RequestException as error:
        raise NetworkUnreachable(f"{host} cannot be reached ({type(error).__name__}).") from error
    if answer.status_code == 404:
        raise MarsclfError(f"{host} does not have {ZENODO_URL} (status 404); {BY_HAND}.")
    # Zenodo limits the default user agent of requests more strictly.
    options = {"timeout": TIMEOUT, "headers": {"User-Agent": "marsclf"}}
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), **options)
    files, urls = {archive.name: None}, {archive.name: ZENODO_URL}
    storage = pooch.create(archive.parent, "", registry=files, urls=urls, retry_if_failed=RETRIES)
    try:
        storage.fetch(archive.name, downloader=downloader)
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        reason = f"{RETRIES + 1} times ({f'status {status}' if status else type(error).__name__})"
        raise MarsclfError(f"The download from {host} failed {reason}; {BY_HAND}.") from error


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack and check the archive; return the folder in `folder` that holds the split files."""
    if (size := archive.stat().st_size) != ZENODO_BYTES:
        raise MarsclfError(f"it has {size:,} bytes instead of {ZENODO_BYTES:,}")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)  # never writes outside the folder
    found = next(folder.rglob(split_file("train")), None)
    if found is None:
        raise MarsclfError(f"it holds no {split_file('train')}")
    if load_dataset(found.parent).digest != MSL_V1_DIGEST:
        raise MarsclfError("its images are not those of the published data set")
    return found.parent
