"""Downloads for images: limited in bytes, time, redirects and addresses."""

import base64
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from concurrent.futures import Future, wait
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from typing_extensions import override

from bsjax.checks import argument
from bsjax.prompts.sources import ImageSources

_CHUNK = 64 * 1024
_LOOK_AGAIN = 0.05
_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
# IPv6 addresses that contain an IPv4 address, to which a translator (NAT64) forwards.
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
# All that has been allotted to the public: the rest is reserved, local or an IPv4 address inside.
_PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")


def download(url: str, sources: ImageSources) -> bytes:
    """Downloads the file at a URL.

    The download runs in another thread. This one stops waiting after `max_seconds`, even if it is
    resolving the name or connecting that takes so long.

    Args:
      url: starts with `http://` or `https://`, in any case.
      sources: the limits.

    Raises:
      ValueError: a limit is exceeded, an address is private, or the answer is not a file. The
        message says which.
      OSError: the connection fails.
      http.client.HTTPException: the answer is not valid HTTP.
    """
    work = Download(url, sources)
    result: Future[bytes] = Future()

    def run() -> None:
        try:
            result.set_result(work.run())
        except BaseException as error:  # Raised again in the thread that waits.
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="bsjax-download").start()
    try:
        return _waited_for(result, sources.max_seconds)
    except TimeoutError as error:
        # The socket's limit is as long, and may end first. A limit of the system has a number.
        if error.errno is not None:
            raise
        raise ValueError(
            f"the download took longer than {sources.max_seconds:g} s (max_seconds)."
        ) from error
    finally:
        work.close()


_thread = threading.local()


def stopping(event: threading.Event) -> None:
    """Makes downloads that this thread waits for end when `event` is set."""
    _thread.stopped = event


def _waited_for(result: "Future[bytes]", seconds: float) -> bytes:
    stopped = getattr(_thread, "stopped", None)
    end = time.monotonic() + seconds
    while stopped is not None and (left := end - time.monotonic()) > _LOOK_AGAIN:
        if stopped.is_set():
            raise ValueError("the call has ended.")
        if result in wait([result], min(left, _LOOK_AGAIN)).done:
            break
    return result.result(max(end - time.monotonic(), 0))


class Download:
    """One download; `close` ends it from another thread."""

    def __init__(self, url: str, sources: ImageSources) -> None:
        self._url = url
        self._sources = sources
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._closed = False

    def run(self) -> bytes:
        """What is downloaded.

        Raises:
          MessageError: it exceeds a limit, or an address is not allowed.
          Exception: connections fail in many ways.
        """
        url = self._url
        for _ in range(self._sources.max_redirects + 1):
            self._connection, target, headers = _connection(url, self._sources)
            if self._closed:
                break
            try:
                self._connection.request("GET", target, headers=headers)
                # The connection drops its socket if the server announces that it will close it.
                self._socket = self._connection.sock
                with self._connection.getresponse() as response:
                    location = response.getheader("Location")
                    if response.status not in _REDIRECTS or location is None:
                        return self._body(response)
            finally:
                self._connection.close()
            url = urljoin(url, location)
        raise ValueError(
            f"the URL is redirected more than {self._sources.max_redirects} times (max_redirects)."
        )

    def close(self) -> None:
        """Ends the download, in whatever thread it runs."""
        self._closed = True
        for sock in (self._socket, self._connection and self._connection.sock):
            if sock is not None:
                # Unlike `close`, this ends a read that is waiting in the other thread.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != HTTPStatus.OK:
            raise ValueError(f"the server answers {response.status} {response.reason}.")
        encoding = response.getheader("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise ValueError(
                f"the server sends the file compressed ({encoding}), which was not asked for."
            )
        limit = self._sources.max_bytes
        chunks: list[bytes] = []
        size = 0
        while max(size, response.length or 0) <= limit:
            chunk = response.read1(_CHUNK)
            if not chunk:
                if response.length:
                    raise ValueError(f"the download broke off {response.length:,} bytes early.")
                return b"".join(chunks)
            chunks.append(chunk)
            size += len(chunk)
        raise ValueError(f"the file has more than {limit:,} bytes (max_bytes).")


class _Checked(http.client.HTTPConnection):
    """Connects to addresses that were checked; resolving the name again may give others."""

    addresses: list[Any]

    @override
    def connect(self) -> None:
        failure: OSError = OSError("the name has no address.")
        for family, kind, protocol, _, address in self.addresses:
            self.sock = socket.socket(family, kind, protocol)
            try:
                self.sock.settimeout(self.timeout)
                self.sock.connect(address)
                return
            except OSError as error:
                self.sock.close()
                failure = error
        raise failure


class _CheckedSecure(http.client.HTTPSConnection, _Checked):
    """The same over TLS. The certificate must be for the host name."""


def _connection(
    url: str, sources: ImageSources
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection that is not open yet, and the target and headers of the request."""
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError(f"a redirect leads to {parts.scheme}:, which is neither http nor https.")
    host = parts.hostname
    if not host:
        raise ValueError("the URL names no host.")
    port = parts.port or _DEFAULT_PORTS[parts.scheme]
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    target = path + (f"?{quote(parts.query, safe='/%:@!$&()*+,;=~-._?')}" if parts.query else "")
    # Without compression, `max_bytes` limits what arrives and the file alike.
    headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "bsjax"}
    proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
    if proxy:
        return _by_proxy(proxy, parts, (host, port, target), headers, sources)
    addresses = _resolved(host, port)
    _refuse_private(host, addresses, sources)
    connection: _Checked
    if parts.scheme == "https":
        connection = _CheckedSecure(
            host, port, timeout=sources.max_seconds, context=ssl.create_default_context()
        )
    else:
        connection = _Checked(host, port, timeout=sources.max_seconds)
    connection.addresses = addresses
    return connection, target, headers


def _by_proxy(
    proxy: str,
    parts: SplitResult,
    asked: tuple[str, int, str],
    headers: dict[str, str],
    sources: ImageSources,
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """The same through the environment's proxy, which resolves the name itself."""
    host, port, target = asked
    try:
        addresses = _resolved(host, port)
    except OSError:  # Behind a proxy, this machine often cannot resolve external names.
        addresses = []
    _refuse_private(host, addresses, sources)
    via = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    authorization = {}
    if via.username is not None:
        user = f"{unquote(via.username)}:{unquote(via.password or '')}"
        encoded = base64.b64encode(user.encode()).decode()
        authorization = {"Proxy-Authorization": f"Basic {encoded}"}
    where = (via.hostname or "", via.port or 80)
    if parts.scheme == "https":
        secure = http.client.HTTPSConnection(
            *where, timeout=sources.max_seconds, context=ssl.create_default_context()
        )
        secure.set_tunnel(host, port, authorization)
        return secure, target, headers
    plain = http.client.HTTPConnection(*where, timeout=sources.max_seconds)
    return plain, f"http://{parts.netloc.rpartition('@')[2]}{target}", {**headers, **authorization}


def _resolved(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # A label that no host name can have.
        raise OSError(f"{host!r} is not the name of a host.") from error


def _refuse_private(host: str, addresses: list[Any], sources: ImageSources) -> None:
    if sources.allow_private_addresses:
        return
    for *_, address in addresses:
        if not is_public(ipaddress.ip_address(address[0].partition("%")[0])):
            raise ValueError(
                f"{host} is {address[0]}, an address of this machine or of its own network. The "
                f"setting {argument('allow_private_addresses')} allows it."
            )


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is public, also if it is an IPv4 address inside an IPv6 one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _PUBLIC_IPV6 or address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast
