"""The download against a server on this machine that misbehaves in every way known."""

import io
import re
import socket
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from marsclf.data import download
from marsclf.data import msl as data
from marsclf.errors import MarsclfError

Reply = Callable[[BaseHTTPRequestHandler, bytes], None]


class Server(ThreadingHTTPServer):
    """Answers the n-th request with the n-th of `replies`, all further ones with the last."""

    def __init__(self, content: bytes, *replies: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.replies = content, replies
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/msl-images.zip?download=1"

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that go away, as some of these tests let them."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers["Range"])
        number = min(len(self.server.ranges), len(self.server.replies))
        self.server.replies[number - 1](self, self.server.content)

    def log_message(self, *_: object) -> None:
        pass


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    request.send_response(status)
    headers = {"Content_Type": "application/zip", "Content_Length": str(len(body))} | headers
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(body)


def whole(request: BaseHTTPRequestHandler, content: bytes) -> None:
    send(request, 200, content)


def piece(request: BaseHTTPRequestHandler, content: bytes) -> None:
    """Honour the Range header, as Zenodo does."""
    wanted = re.fullmatch(r"bytes=(\d+)-", request.headers["Range"] or "bytes=0-")
    start = int(wanted[1])
    if start == 0:
        whole(request, content)
    else:
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        send(request, 206, content[start:], Content_Range=span)


def cut_off(request: BaseHTTPRequestHandler, content: bytes) -> None:
    """Promise all, send the first third of what was asked for, and hang up."""
    start = int((request.headers["Range"] or "bytes=0-")[6:-1])
    rest = content[start:]
    span = f"bytes {start}-{len(content) - 1}/{len(content)}"
    third = rest[: len(rest) // 3]
    length = str(len(rest))
    send(request, 206 if start else 200, third, Content_Length=length, Content_Range=span)


def wrong_piece(request: BaseHTTPRequestHandler, content: bytes) -> None:
    span = f"bytes 0-{len(content) - 1}/{len(content)}"
    send(request, 206, content, Content_Range=span)


def beyond(request: BaseHTTPRequestHandler, _: bytes) -> None:
    send(request, 416, b"")


def too_many(request: BaseHTTPRequestHandler, _: bytes) -> None:
    send(request, 429, b"slow down", Retry_After="1")


def far_too_many(request: BaseHTTPRequestHandler, _: bytes) -> None:
    send(request, 429, b"slow down", Retry_After="86400")


def broken(request: BaseHTTPRequestHandler, _: bytes) -> None:
    send(request, 503, b"")


def missing(request: BaseHTTPRequestHandler, _: bytes) -> None:
    send(request, 404, b"gone")


def page(request: BaseHTTPRequestHandler, content: bytes) -> None:
    send(request, 200, b"<html>".ljust(len(content)), Content_Type="text/html; charset=utf-8")


def page_in_disguise(request: BaseHTTPRequestHandler, content: bytes) -> None:
    send(request, 200, b"<html>".ljust(len(content)))


def short(request: BaseHTTPRequestHandler, content: bytes) -> None:
    send(request, 200, content[:-1])


def endless(request: BaseHTTPRequestHandler, content: bytes) -> None:
    """Send more than the archive, of a length not announced."""
    request.send_response(200)
    request.end_headers()
    request.wfile.write(content + b"more")


def zip_of(*folders: tuple[str, Path], **extra: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for top, folder in folders:
            for path in sorted(folder.rglob("*.*")):
                archive.write(path, f"{top}{path.relative_to(folder)}")
        for name, content in extra.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archive(sample_dir: Path) -> bytes:
    return zip_of(("msl-images/", sample_dir))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(download, "LONGEST_PAUSE", 0.05)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(content: bytes, *replies: Reply) -> Server:
        server = Server(content, *replies)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data" / "msl-images"


def assert_nothing_looks_complete(target: Path) -> None:
    assert not target.exists()
    assert {path.name for path in target.parent.iterdir()} <= {"msl-images.zip.part"}


def assert_goes_on(asked: str | None, sent: int) -> None:
    """The range asked for begins where the last piece of 64 KiB that arrived whole ended."""
    assert asked == f"bytes={sent // 65536 * 65536}-"


@pytest.mark.parametrize(
    ("replies", "requests"),
    [
        ([piece], 1),
        ([too_many, piece], 2),
        ([far_too_many, piece], 2),
        ([broken, broken, piece], 3),
        ([cut_off, piece], 2),
        ([cut_off, cut_off, cut_off, piece], 4),
        ([cut_off, whole], 2),
        ([cut_off, wrong_piece, piece], 3),
        ([cut_off, beyond, piece], 3),
    ],
    ids=lambda value: (
        "-".join(reply.__name__ for reply in value) if isinstance(value, list) else ""
    ),
)
def test_arrives_whole(
    serve: Callable[..., Server],
    archive: bytes,
    target: Path,
    sample_dataset: data.Dataset,
    replies: list[Reply],
    requests: int,
) -> None:
    server = serve(archive, *replies)
    digest = sample_dataset.digest
    assert download.fetch_msl_images(target, server.url, len(archive), digest) == target
    assert data.load_dataset(target).digest == digest
    assert len(server.ranges) == requests
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    if cut_off in replies:
        assert_goes_on(server.ranges[1], len(archive) // 3)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (page, "sends a web page"),
        (page_in_disguise, "is of no use: File is not a zip file"),
        (short, "bytes instead of"),
        (endless, "has more than"),
        (missing, "answers with 404"),
        (broken, "answers with 503"),
        (too_many, "answers with 429"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_answer(
    serve: Callable[..., Server], archive: bytes, target: Path, reply: Reply, message: str
) -> None:
    server = serve(archive, reply)
    with pytest.raises(MarsclfError, match=message) as raised:
        download.fetch_msl_images(target, server.url, len(archive))
    assert not isinstance(raised.value, download.NetworkUnreachable)
    assert_nothing_looks_complete(target)


def test_next_run_goes_on_where_this_one_stopped(
    serve: Callable[..., Server],
    archive: bytes,
    target: Path,
    sample_dataset: data.Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "TRIES", 1)
    server = serve(archive, cut_off, piece)
    arguments = (target, server.url, len(archive), sample_dataset.digest)
    with pytest.raises(MarsclfError, match="run again, and it goes on"):
        download.fetch_msl_images(*arguments)
    assert_nothing_looks_complete(target)
    download.fetch_msl_images(*arguments)
    assert server.ranges[0] is None
    assert_goes_on(server.ranges[1], len(archive) // 3)


def test_what_is_there_is_not_fetched_again(target: Path) -> None:
    target.mkdir(parents=True)
    assert download.fetch_msl_images(target, "http://127.0.0.1:1/") == target


def test_nobody_answers(target: Path) -> None:
    with socket.socket() as taken:  # bound but not listening: refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        with pytest.raises(download.NetworkUnreachable, match="127.0.0.1 cannot be reached"):
            download.fetch_msl_images(target, url)
    assert_nothing_looks_complete(target)


def link_out(sample_dir: Path) -> bytes:
    buffer = io.BytesIO(zip_of(("", sample_dir)))
    with zipfile.ZipFile(buffer, "a") as archive:
        link = zipfile.ZipInfo("calibrated/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name", ["../out", "msl-images/../../out", "/tmp/marsclf-out", "C:/out", "..\\out", "link"]
)
def test_archive_that_climbs_out(
    serve: Callable[..., Server], sample_dir: Path, target: Path, name: str
) -> None:
    content = link_out(sample_dir) if name == "link" else zip_of(("", sample_dir), **{name: b"x"})
    server = serve(content, piece)
    with pytest.raises(MarsclfError, match="leads out of the folder"):
        download.fetch_msl_images(target, server.url, len(content))
    assert list(target.parent.iterdir()) == [] and not Path("/tmp/marsclf-out").exists()
    assert list(target.parent.parent.iterdir()) == [target.parent]


def test_archive_that_unpacks_to_too_much(
    serve: Callable[..., Server],
    archive: bytes,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(MarsclfError, match="unpacks to more than 1,000 bytes"):
        download.fetch_msl_images(target, serve(archive, piece).url, len(archive))
    assert list(target.parent.iterdir()) == []


def damaged(archive: bytes) -> bytes:
    """Change one byte within an image: its checksum in the zip no longer fits."""
    at = len(archive) // 2
    return archive[:at] + bytes([archive[at] ^ 1]) + archive[at + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "is of no use: Bad CRC-32"),
        (lambda archive: archive, "not those of the published data set"),
        (lambda archive: zip_of(unrelated=b"x"), "holds no train-calibrated"),
    ],
    ids=["damaged", "other images", "something else"],
)
def test_contents_are_checked(
    serve: Callable[..., Server],
    archive: bytes,
    target: Path,
    change: Callable[[bytes], bytes],
    message: str,
) -> None:
    content = change(archive)
    with pytest.raises(MarsclfError, match=message):
        download.fetch_msl_images(target, serve(content, piece).url, len(content))
    assert list(target.parent.iterdir()) == []  # the useless archive is not kept either


@pytest.mark.parametrize("top", ["", "a/b/"])
def test_folder_is_found_within_the_archive(
    serve: Callable[..., Server],
    sample_dir: Path,
    target: Path,
    sample_dataset: data.Dataset,
    top: str,
) -> None:
    junk = f"__MACOSX/{data.split_file('train')}"
    content = zip_of((top, sample_dir), **{junk: b"junk"})
    server = serve(content, piece)
    download.fetch_msl_images(target, server.url, len(content), sample_dataset.digest)
    assert data.load_dataset(target).digest == sample_dataset.digest


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MarsclfError, match="cannot be made"):
        download.fetch_msl_images(tmp_path / "file" / "msl-images", "http://127.0.0.1:1/")
