"""The download of the real images from Zenodo."""

import stat
import sys
import zipfile
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import pooch
import requests

from marsclf.data.msl import MSL_V1_DIGEST, leaves_folder, load_dataset, split_file
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

ZENODO_URL = "https://zenodo.org/records/1049137/files/msl-images.zip?download=1"
ZENODO_BYTES = 60_635_475
MAX_UNPACKED_BYTES = 500_000_000
RETRIES = 8  # pooch waits 1, 2, 3 ... seconds before each
TIMEOUT = (5, 30)  # seconds to connect, and to wait for the next bytes
BY_HAND = "try again later, or download and unpack it yourself and set MARSCLF_DATA_DIR"
# What zipfile raises for a damaged archive; RuntimeError for an encrypted one.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)


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
            _download(ZENODO_URL, archive)
            try:
                root = _unpack(archive, folder.with_name("unpacked"))
                if load_dataset(root).digest != MSL_V1_DIGEST:
                    raise MarsclfError("its images are not those of the published data set")
            except (MarsclfError, *ZIP_ERRORS) as error:
                reason = f"The archive from {ZENODO_URL} is unusable: {str(error).rstrip('.')}"
                raise MarsclfError(f"{reason}; {BY_HAND}.") from error
            root.rename(folder)
    except OSError as error:
        reason = f"{target} cannot be written ({error})"
        raise MarsclfError(f"{reason}; check the free disk space and permissions.") from error
    return target


def _download(url: str, archive: Path) -> None:
    """Download `url` as the file `archive`, with retries."""
    host = urlsplit(url).hostname
    try:
        answer = requests.head(url, timeout=TIMEOUT, allow_redirects=True)
    except requests.RequestException as error:
        raise NetworkUnreachable(f"{host} cannot be reached ({type(error).__name__}).") from error
    if answer.status_code == 404:
        raise MarsclfError(f"{host} does not have {url} (status 404); {BY_HAND}.")
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=1 << 16,
        timeout=TIMEOUT,
        # Zenodo limits the default user agent of requests more strictly.
        headers={"User-Agent": "marsclf"},
    )
    files, urls = {archive.name: None}, {archive.name: url}
    storage = pooch.create(archive.parent, "", registry=files, urls=urls, retry_if_failed=RETRIES)
    try:
        storage.fetch(archive.name, downloader=downloader)
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        reason = f"{RETRIES + 1} times ({f'status {status}' if status else type(error).__name__})"
        raise MarsclfError(f"The download from {host} failed {reason}; {BY_HAND}.") from error


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack `archive` into `folder` and return the folder in it that holds the split files."""
    size = archive.stat().st_size
    if size != ZENODO_BYTES:
        raise MarsclfError(f"it has {size:,} bytes instead of {ZENODO_BYTES:,}")
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if leaves_folder(member.filename) or stat.S_ISLNK(member.external_attr >> 16):
                raise MarsclfError(f"its member {member.filename!r} leads out of the folder")
        if sum(member.file_size for member in opened.infolist()) > MAX_UNPACKED_BYTES:
            raise MarsclfError(f"it unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
        opened.extractall(folder)
    wanted = split_file("train")
    roots = [path.parent for path in folder.rglob(wanted) if "__MACOSX" not in path.parts]
    if not roots:
        raise MarsclfError(f"it holds no {wanted}")
    return min(roots)
