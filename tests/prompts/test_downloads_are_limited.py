"""Downloads stay within limits, and reach only public addresses unless a setting allows more."""

import errno
import gzip
import http.server
import io
import ipaddress
import socket
import threading
import time

import pytest
from PIL import Image

from bsjax.prompts.downloads import download, is_public
from bsjax.prompts.sources import ImageSources

HERE = ImageSources(
    allow_private_addresses=True, max_bytes=100_000, max_seconds=0.6, max_redirects=3
)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name.startswith("hops-"):
            left = int(name.removeprefix("hops-"))
            return self.answer(302, Location=f"/hops-{left - 1}" if left else "/good.png")
        if name in REDIRECTS:
            return self.answer(302, Location=REDIRECTS[name])
        if name == "good.png" or name == "a%20%C3%BC.png?x=%22":
            return self.answer(200, picture())
        if name == "status":
            return self.answer(404, picture())
        if name == "large":
            return self.answer(200, **{"Content-Length": "700000000"})
        if name == "short":
            return self.answer(200, b"abc", **{"Content-Length": "99"})
        if name == "gzip":
            data = gzip.compress(bytes(10**6))
            return self.answer(200, data, **{"Content-Encoding": "gzip"})
        self.answer(200)
        pieces = {"drip": (b"x", 0.05), "endless": (bytes(10_000), 0), "silent": (b"", 0.05)}
        piece, pause = pieces[name]
        try:
            for _ in range(200):
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            return None

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


REDIRECTS = {
    "to-file": "file:///etc/hostname",
    "to-ftp": "ftp://example.com/a",
    "to-itself": "/to-itself",
}


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture(scope="module")
def dripping_headers():
    """A server that sends endless headers, one byte at a time."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            try:
                connection, _ = listening.accept()
                with connection:
                    while True:
                        connection.send(b"H")
                        time.sleep(0.05)
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"


@pytest.mark.parametrize("path", ["/good.png", "/hops-2", '/a \u00fc.png?x="', "/good.png#part"])
def test_a_file_is_downloaded(server, path):
    assert download(server + path, HERE) == picture()
    assert download(server.replace("http", "HTTP") + path, HERE) == picture()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/status", "the server answers 404 Not Found"),
        ("/large", r"100,000 bytes \(max_bytes\)"),
        ("/endless", r"100,000 bytes \(max_bytes\)"),
        ("/drip", r"longer than 0.6 s \(max_seconds\)"),
        ("/silent", r"longer than 0.6 s \(max_seconds\)"),
        ("/short", "broke off 96 bytes early"),
        ("/gzip", r"compressed \(gzip\)"),
        ("/hops-3", r"more than 3 times \(max_redirects\)"),
        ("/to-itself", r"more than 3 times \(max_redirects\)"),
        ("/to-file", "neither http nor https"),
        ("/to-ftp", "neither http nor https"),
    ],
)
def test_a_limit_ends_a_download(server, path, reason):
    start = time.monotonic()
    with pytest.raises(ValueError, match=reason):
        download(server + path, HERE)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("error", "raised", "reason"),
    [
        (TimeoutError("timed out"), ValueError, r"longer than 30 s \(max_seconds\)"),
        (TimeoutError(errno.ETIMEDOUT, "no answer"), TimeoutError, "no answer"),
    ],
    ids=["of the socket", "of the system"],
)
def test_whichever_limit_ends_first_is_named(monkeypatch, error, raised, reason):
    def run(self):
        raise error

    monkeypatch.setattr("bsjax.prompts.downloads.Download.run", run)
    with pytest.raises(raised, match=reason):
        download("http://127.0.0.1/", ImageSources())


def test_headers_that_drip_end(dripping_headers):
    start = time.monotonic()
    with pytest.raises(ValueError, match="max_seconds"):
        download(dripping_headers, HERE)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "localhost",
        "0.0.0.0",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[fe80::1]",
        "[fc00::1]",
        "[fec0::1]",
        "[::127.0.0.1]",
        "[::ffff:0:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b:1::7f00:1]",
        "[2002:7f00:1::]",
    ],
)
def test_addresses_that_are_not_public_are_refused(host):
    with pytest.raises(ValueError, match="allow_private_addresses"):
        download(f"http://{host}:9/", ImageSources())


def test_each_hop_is_checked(server, monkeypatch):
    """A public name redirects to this machine."""
    port = int(server.rpartition(":")[2])
    real = socket.getaddrinfo

    def resolve(host, *arguments, **options):
        found = real("127.0.0.1" if host == "public.example" else host, *arguments, **options)
        return found

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setitem(REDIRECTS, "home", "http://127.0.0.1/")
    asked = []
    monkeypatch.setattr(
        "bsjax.prompts.downloads.is_public",
        lambda address: asked.append(str(address)) or len(asked) == 1,
    )
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 is .*allow_private_addresses"):
        download(f"http://public.example:{port}/home", ImageSources())
    assert asked == ["127.0.0.1", "127.0.0.1"]


def test_it_connects_to_the_address_that_was_checked(server, monkeypatch):
    """A host name that resolves to a different address each time is resolved only once."""
    port = int(server.rpartition(":")[2])
    real = socket.getaddrinfo
    questions = []

    def resolve(host, *arguments, **options):
        questions.append(host)
        return real("127.0.0.1" if len(questions) == 1 else "192.0.2.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert download(f"http://public.example:{port}/good.png", HERE) == picture()
    assert questions == ["public.example"]


def test_a_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ValueError, match="allow_private_addresses"):
        download("http://127.0.0.1:1/good.png", ImageSources())


def test_a_refused_connection_is_a_connection_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectionError):
        download(f"http://127.0.0.1:{port}/", HERE)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"],
)
def test_addresses_that_are_public(address):
    assert is_public(ipaddress.ip_address(address))
