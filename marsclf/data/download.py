"""Fetch the real images from Zenodo, so that the target folder is there whole or not at all."""

import shutil
import stat
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from marsclf.data import msl as data
from marsclf.errors import MarsclfError
from marsclf.files import replace_atomically

ZENODO_URL = "https://zenodo.org/records/1049137/files/msl-images.zip?download=1"
ZENODO_BYTES = 60_635_475
MAX_UNPACKED_BYTES = 500_000_000
TRIES = 8
PAUSE = 1.0  # seconds before the second try; each further pause is twice as long
LONGEST_PAUSE = 30.0  # seconds, also where the server asks for more
BY_HAND = "Try later, or download it by hand, unpack it, and set MARSCLF_DATA_DIR to its folder."


class NetworkUnreachable(MarsclfError):
    """No server answered at all."""


def fetch_msl_images(
    target: Path,
    url: str = ZENODO_URL,
    size: int = ZENODO_BYTES,
    digest: str = data.MSL_V1_DIGEST,
) -> Path:
    """Download the archive at `url`, unpack it as the folder `target`, and return that.

    The archive has `size` bytes and the data set within it `digest`. A download that breaks off
    goes on from where it stopped, in this run or the next. Raises NetworkUnreachable if nobody
    answers, and MarsclfError if what arrives is not that archive or cannot be stored.
    """
    if target.exists():
        return target
    part = target.with_name(f"{target.name}.zip.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _download(url, part, size)
        try:
            with replace_atomically(target) as folder:
                _unpack(part, folder)
                if data.load_dataset(folder).digest != digest:
                    raise MarsclfError("its images are not those of the published data set")
        except (
            MarsclfError,
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
            ValueError,
        ) as error:
            part.unlink()  # it is complete, so going on with it would never mend it
            reason = str(error).rstrip(".")
            raise MarsclfError(
                f"The archive from {url} is of no use: {reason}. {BY_HAND}"
            ) from error
        part.unlink()
    except OSError as error:
        raise MarsclfError(f"{target} cannot be made ({error}): free space or rights.") from error
    return target


def _download(url: str, part: Path, size: int) -> None:
    """Bring `part` to `size` bytes."""
    retry = Retry(
        total=4,
        connect=0,
        read=0,
        status_forcelist=(429, 500, 502, 503, 504),
        backoff_factor=PAUSE,
        backoff_max=LONGEST_PAUSE,
        retry_after_max=LONGEST_PAUSE,
        raise_on_status=False,
    )
    host = urlsplit(url).hostname
    answered, reason = False, ""
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        for attempt in range(TRIES):
            offset = part.stat().st_size if part.exists() else 0
            if offset == size:
                return
            if attempt:
                time.sleep(min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
            # Compressed transfer would make byte positions mean something else.
            headers = {"Accept-Encoding": "identity"}
            if 0 < offset < size:
                headers["Range"] = f"bytes={offset}-"
            try:
                with session.get(url, headers=headers, stream=True, timeout=(5, 30)) as response:
                    answered = True
                    _store(response, part, size)
            except requests.RequestException as error:
                reason = type(error).__name__
                if not answered and attempt:
                    raise NetworkUnreachable(f"{host} cannot be reached ({reason}).") from error
    if not part.exists() or part.stat().st_size != size:
        raise MarsclfError(
            f"The download from {host} broke off {TRIES} times {reason and f'({reason})'}: run "
            f"again, and it goes on from where it stopped. {BY_HAND}"
        )


def _store(response: requests.Response, part: Path, size: int) -> None:
    """Write what the server sends to `part`, after what is there or from the start."""
    offset = 0
    if response.status_code == 206:
        offset = part.stat().st_size
        if response.headers.get("Content-Range") != f"bytes {offset}-{size - 1}/{size}":
            part.unlink()  # not the piece asked for: begin anew
            return
    elif response.status_code == 416:
        part.unlink()
        return
    elif response.status_code != 200:
        raise MarsclfError(f"{response.url} answers with {response.status_code}. {BY_HAND}")
    if response.headers.get("Content-Type", "").startswith("text/"):
        raise MarsclfError(f"{response.url} sends a web page, not the archive. {BY_HAND}")
    announced = offset + int(response.headers.get("Content-Length", size - offset))
    if announced != size:
        raise MarsclfError(f"{response.url} has {announced:,} bytes instead of {size:,}. {BY_HAND}")
    with (
        part.open("ab" if offset else "wb") as file,
        tqdm(total=size, initial=offset, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for chunk in response.iter_content(1 << 16):
            if file.tell() + len(chunk) > size:
                raise MarsclfError(f"{response.url} has more than {size:,} bytes. {BY_HAND}")
            bar.update(file.write(chunk))


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the folder of `archive` that holds the split files as `folder`."""
    with zipfile.ZipFile(archive) as opened:
        members = {PurePosixPath(member.filename): member for member in opened.infolist()}
        for name, member in members.items():
            climbs = name.is_absolute() or ".." in name.parts or set("\\:") & set(str(name))
            if climbs or stat.S_ISLNK(member.external_attr >> 16):
                raise MarsclfError(f"its member {member.filename!r} leads out of the folder")
        if sum(member.file_size for member in members.values()) > MAX_UNPACKED_BYTES:
            raise MarsclfError(f"it unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
        wanted = data.split_file("train")
        tops = [n.parent for n in members if n.name == wanted and "__MACOSX" not in n.parts]
        if not tops:
            raise MarsclfError(f"it holds no {wanted}")
        for name, member in members.items():
            if member.is_dir() or not name.is_relative_to(tops[0]):
                continue
            path = folder / name.relative_to(tops[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(member) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
