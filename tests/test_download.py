"""The download, against a server on this machine that fails in the ways a file server can."""

import errno
import gc
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pooch
import pytest

from marsclf.data import download
from marsclf.data.dataset import Dataset
from marsclf.data.msl import MSL_V1, PublishedDataSet
from marsclf.data.open import load_dataset
from marsclf.errors import MarsclfError

# pooch leaves the connection of a failed attempt to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket")


class Server(ThreadingHTTPServer):
    """Answers requests with one (status, body, announced length) after the other."""

    replies: list[tuple[int, bytes, int]]
    published: PublishedDataSet  # what it offers


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body, length = self.server.replies.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def archive(sample_dir: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("../outside", "/outside", "a/../../outside"):
            archive.writestr(name, b"unwanted")
        for path in sample_dir.rglob("*.*"):
            archive.write(path, f"a/msl-images/{path.relative_to(sample_dir)}")
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, sample_dataset: Dataset) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/msl-images.zip?download=1"
        server.published = replace(MSL_V1, url=url, digest=sample_dataset.digest)
        monkeypatch.setattr(pooch.core, "time", SimpleNamespace(sleep=lambda _: None))
        yield server
        server.shutdown()
    gc.collect()  # while the warning about connections is ignored


def publish(server: Server, content: bytes) -> PublishedDataSet:
    server.replies = [(200, content, len(content))]
    return server.published


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data" / "msl-images"


def assert_nothing_left(target: Path) -> None:
    assert list(target.parent.parent.rglob("*")) == [target.parent]


@pytest.mark.parametrize("statuses", [[], [429, 200]])
def test_download_is_retried_until_complete(server, archive, target, statuses) -> None:
    published = publish(server, archive)
    # A failure of status 200 ends the connection after a third of the archive.
    part = archive[: len(archive) // 3]
    server.replies = [*((status, part, len(archive)) for status in statuses), *server.replies]
    for _ in range(2):  # the second call sends no request
        assert download.fetch(published, target) == target
    assert load_dataset(target).digest == published.digest
    assert server.replies == []
    assert list(target.parent.parent.rglob("*outside")) == []
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, b"gone", 4), "The download failed .404 .* try again later, or download"),
        ((200, b"part", 9), "The download failed .*IncompleteRead"),
    ],
)
def test_server_that_never_delivers(server, target, reply, message) -> None:
    server.replies = [reply] * 3
    with pytest.raises(MarsclfError, match=message) as raised:
        download.fetch(server.published, target)
    assert raised.type is MarsclfError and server.replies == []
    assert_nothing_left(target)


@pytest.mark.parametrize(
    ("change", "digest"),
    [
        (bytes, "0" * 64),
        (lambda _: b"<html>", None),
        (lambda archive: archive.replace(b"JFIF", b"jfif"), None),  # its checksums differ
        (lambda _: b"PK\x05\x06" + bytes(18), None),  # an empty zip
    ],
)
def test_wrong_archive_is_downloaded_again(
    server, archive, target, change: Callable[[bytes], bytes], digest: str | None
) -> None:
    published = publish(server, change(archive))
    published = replace(published, digest=digest or published.digest)
    with pytest.raises(MarsclfError, match="msl-images.zip.* is not msl-v1; try again later"):
        download.fetch(published, target)
    assert_nothing_left(target)
    assert download.fetch(publish(server, archive), target).is_dir()


def test_full_disk(server, archive, target, monkeypatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(zipfile.ZipFile, "extractall", Mock(side_effect=full))
    with pytest.raises(MarsclfError, match="cannot be written .* check the free disk space"):
        download.fetch(publish(server, archive), target)
    assert_nothing_left(target)
