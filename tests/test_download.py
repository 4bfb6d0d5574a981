"""The download, against a server on this machine that fails in the ways a file server can."""

import gc
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

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
    """Answers GET requests with one (status, body, announced length) after the other."""

    head_status = 405  # many file servers refuse HEAD requests
    replies: list[tuple[int, bytes, int]]
    pauses: list[float]  # seconds that pooch would have paused
    published: PublishedDataSet  # what it offers


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(self.server.head_status)
        self.end_headers()

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
        server.pauses = []
        url = f"http://127.0.0.1:{server.server_port}/msl-images.zip?download=1"
        server.published = replace(MSL_V1, url=url, digest=sample_dataset.digest)
        monkeypatch.setattr(pooch.core, "time", SimpleNamespace(sleep=server.pauses.append))
        yield server
        server.shutdown()
    gc.collect()  # while the warning about connections is ignored


def publish(server: Server, content: bytes, **about: object) -> PublishedDataSet:
    server.replies = [(200, content, len(content))]
    return replace(server.published, **about)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data" / "msl-images"


def assert_nothing_left(target: Path) -> None:
    assert list(target.parent.parent.rglob("*")) == [target.parent]


@pytest.mark.parametrize("statuses", [[], [429, 503], [200, 500, 200]])
def test_download_is_retried_until_complete(server, archive, target, statuses) -> None:
    published = publish(server, archive)
    # A failure of status 200 ends the connection after a third of the archive.
    part = archive[: len(archive) // 3]
    server.replies = [*((status, part, len(archive)) for status in statuses), *server.replies]
    for _ in range(2):  # the second call sends no request
        assert download.fetch(published, target) == target
    assert load_dataset(target).digest == published.digest
    assert (server.pauses, server.replies) == ([1, 2, 3][: len(statuses)], [])
    assert list(target.parent.parent.rglob("*outside")) == []
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("reply", "head_status", "requests", "message"),
    [
        ((429, b"oops", 4), 200, 9, "127.0.0.1 failed 9 times (status 429)"),
        ((404, b"gone", 4), 404, 0, "(status 404)"),
    ],
)
def test_server_that_never_delivers(server, target, reply, head_status, requests, message) -> None:
    server.replies, server.head_status = [reply] * 9, head_status
    with pytest.raises(MarsclfError) as raised:
        download.fetch(server.published, target)
    assert message in str(raised.value) and raised.type is MarsclfError
    assert len(server.replies) == 9 - requests
    assert_nothing_left(target)


@pytest.mark.parametrize(
    ("change", "expected", "message"),
    [
        (bytes, {"digest": "0" * 64}, "not those of the published data set"),
        (lambda archive: b"<html>".ljust(len(archive)), {}, "File is not a zip file"),
        (lambda archive: archive.replace(b"JFIF", b"jfif"), {}, "Bad CRC-32"),
        (lambda _: b"PK\x05\x06" + bytes(18), {}, "holds no train-calibrated"),  # an empty zip
    ],
)
def test_unusable_archive_is_downloaded_again(
    server, archive, target, change: Callable[[bytes], bytes], expected: dict, message: str
) -> None:
    published = publish(server, change(archive), **expected)
    with pytest.raises(MarsclfError, match=f"is unusable: .*{message}.* try again later"):
        download.fetch(published, target)
    assert_nothing_left(target)
    assert download.fetch(publish(server, archive), target).is_dir()


def test_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MarsclfError, match="cannot be written"):
        download.fetch(MSL_V1, tmp_path / "file" / "msl-images")
