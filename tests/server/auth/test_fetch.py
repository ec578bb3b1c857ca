"""Fetching an issuer's JWK set: allowed sources, limits of size and time, and discovery."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.server
import ipaddress
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from cobatch.server.auth import fetch
from cobatch.server.auth.fetch import MAX_BYTES, Fetched, fetch_keys, fetch_url
from cobatch.server.settings.auth import Issuer
from tests.support.auth.tokens import Signer, rsa_key

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Site:
    """An HTTP server on loopback. `requested` lists the paths of its requests, `answer` handles a GET."""

    def __init__(self, answer: Answer) -> None:
        self.requested: list[str] = []
        self.answer = answer
        self.ends = threading.Event()
        self.url = ""


@contextlib.contextmanager
def site(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    started = Site(answer)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            started.requested.append(self.path)
            with contextlib.suppress(OSError):
                started.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Ignore clients that refuse the certificate, as some tests expect."""

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        if tls is not None:
            listening.socket = tls.wrap_socket(listening.socket, server_side=True)
        started.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{listening.server_port}"
        serving = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            yield started
        finally:
            started.ends.set()
            listening.shutdown()
            serving.join()


def sends(body: bytes = b"{}", status: int = 200, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


async def test_a_document_is_fetched() -> None:
    with site(sends(b'{"keys": []}')) as there:
        assert await fetch_url(f"{there.url}/jwks?a=b") == Fetched(b'{"keys": []}', None)
        assert there.requested == ["/jwks?a=b"]


@pytest.mark.parametrize(
    ("cache_control", "max_age_s"),
    [
        ("max-age=60", 60.0), ("public, max-age=60, must-revalidate", 60.0), ("MAX-AGE=60", 60.0),
        ('max-age="60"', 60.0), ("s-maxage=5", None), ("max-age=", None), ("max-age=-1", None),
        ("max-age=x", None), ("", None),
        ("public", None), ("no-store", 0.0), ("no-cache, max-age=60", 0.0), ("x-no-store-y", None),
        ("max-age=" + "9" * 400, None),
    ],
)  # fmt: skip
async def test_max_age_comes_from_cache_control(cache_control: str, max_age_s: float | None) -> None:
    with site(sends(cache_control=cache_control)) as there:
        assert (await fetch_url(there.url)).max_age_s == max_age_s


@pytest.mark.parametrize("status", [201, 204, 206, 400, 401, 404, 429, 500, 503])
async def test_any_status_but_200_is_an_error(status: int) -> None:
    with (
        site(sends(b"" if status == 204 else b"{}", status)) as there,
        pytest.raises(ValueError, match=f"status is {status}"),
    ):
        await fetch_url(there.url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_rfc7517_redirects_are_not_followed(status: int) -> None:
    with (
        site(sends()) as elsewhere,
        site(sends(b"", status, location=f"{elsewhere.url}/keys")) as there,
        pytest.raises(ValueError, match=f"status is {status}"),
    ):
        await fetch_url(there.url)
    assert elsewhere.requested == []


@pytest.mark.parametrize(
    "url",
    [
        "http://issuer.test/jwks", "http://10.0.0.1/jwks", "http://169.254.169.254/latest",
        "ftp://127.0.0.1/jwks",
        "file:///etc/passwd", "data:application/json,{}", "", "jwks", "//127.0.0.1/jwks", "https://",
        "https://a:b@c/",
        "http://127.0.0.1@evil.test/", "http://127.0.0.1.evil.test/", "http://0.0.0.0/", "https://a:99999/",
    ],
)  # fmt: skip
async def test_rfc7517_https_only_except_loopback(url: str) -> None:
    with pytest.raises(ValueError, match="neither https"):
        await fetch_url(url)


async def test_size_is_limited() -> None:
    with site(sends(b" " * MAX_BYTES)) as there:
        assert len((await fetch_url(there.url)).body) == MAX_BYTES
    with (
        site(sends(b" " * (MAX_BYTES + 1))) as there,
        pytest.raises(ValueError, match="more than 1048576 bytes"),
    ):
        await fetch_url(there.url)


async def test_an_endless_body_is_cut_off() -> None:
    def forever(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" " * 65536)

    with site(forever) as there, pytest.raises(ValueError, match="more than"):
        await fetch_url(there.url)


async def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.05)
    with site(lambda handler: None) as there:

        def never(handler: http.server.BaseHTTPRequestHandler) -> None:
            there.ends.wait()

        there.answer = never
        with pytest.raises(TimeoutError):
            await fetch_url(there.url)


async def test_a_truncated_or_malformed_response_is_an_error() -> None:
    def short(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"keys":[]}')

    def noise(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"SSH-2.0-x\r\n\r\n")

    for answer in (short, noise, lambda handler: None):
        with site(answer) as there, pytest.raises((OSError, ValueError)):
            await fetch_url(there.url)


async def test_a_refused_connection_is_an_error() -> None:
    with site(sends()) as there:
        pass
    with pytest.raises(OSError, match="cannot reach it"):
        await fetch_url(there.url)


async def test_loopback_is_not_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with site(sends(b"proxy")) as proxy, site(sends(b"itself")) as there:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert (await fetch_url(there.url)).body == b"itself"
        assert proxy.requested == []


# TLS


def write_certificate(folder: Path) -> Path:
    """Write a self-signed certificate for 127.0.0.1 and its key into one file."""
    key = rsa_key("tls")
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "issuer")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "tls.pem"
    path.write_bytes(certificate.public_bytes(Encoding.PEM) + Signer(key, "RS256").private_pem())
    return path


@pytest.fixture
def _authorities() -> Iterator[None]:
    """Forget the cached TLS context, so that each test has its own authorities."""
    fetch._tls.cache_clear()
    yield
    fetch._tls.cache_clear()


@pytest.mark.usefixtures("_authorities")
async def test_rfc7517_the_certificate_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path)
    with site(sends(b"tls"), tls) as there:
        with pytest.raises(OSError, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
            await fetch_url(there.url)
        assert there.requested == []
        fetch._tls.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        assert (await fetch_url(there.url)).body == b"tls"
        # A trusted certificate, but for another name.
        with pytest.raises(OSError, match="cannot reach it"):
            await fetch_url(there.url.replace("127.0.0.1", "localhost"))
        assert len(there.requested) == 1


# Discovery


class Web:
    """Serves documents by URL; every other URL is 404."""

    def __init__(self, documents: dict[str, object]) -> None:
        self.documents = documents
        self.requested: list[str] = []

    async def fetch(self, url: str) -> Fetched:
        self.requested.append(url)
        if url not in self.documents:
            raise ValueError("the response's status is 404, not 200")
        found = self.documents[url]
        return Fetched(found if isinstance(found, bytes) else json.dumps(found).encode())


JWKS: dict[str, object] = {"keys": []}
OPENID = "/.well-known/openid-configuration"
OAUTH = "/.well-known/oauth-authorization-server"


@pytest.mark.parametrize(
    ("issuer", "where"),
    [
        ("https://a.test", f"https://a.test{OPENID}"), ("https://a.test/", f"https://a.test{OPENID}"),
        ("https://a.test:8443/realms/x", f"https://a.test:8443/realms/x{OPENID}"),
        ("https://a.test/realms/x/", f"https://a.test/realms/x{OPENID}"),
        ("https://a.test", f"https://a.test{OAUTH}"), ("https://a.test/", f"https://a.test{OAUTH}"),
        ("https://a.test/realms/x", f"https://a.test{OAUTH}/realms/x"),
    ],
)  # fmt: skip
async def test_rfc8414_3_1_location_of_the_metadata(issuer: str, where: str) -> None:
    metadata = {"issuer": issuer, "jwks_uri": "https://keys.test/jwks"}
    web = Web({where: metadata, "https://keys.test/jwks": JWKS})
    assert json.loads((await fetch_keys(Issuer(issuer=issuer), web.fetch)).body) == JWKS
    assert web.requested[-1] == "https://keys.test/jwks"


async def test_a_configured_jwks_url_needs_no_metadata() -> None:
    web = Web({"https://a.test/keys": JWKS})
    await fetch_keys(Issuer(issuer="anything", jwks_url="https://a.test/keys"), web.fetch)
    assert web.requested == ["https://a.test/keys"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"issuer": "https://a.test/", "jwks_uri": "https://a.test/jwks"},
        {"issuer": "https://A.test", "jwks_uri": "https://a.test/jwks"},
        {"issuer": ["https://a.test"], "jwks_uri": "https://a.test/jwks"},
        {"jwks_uri": "https://a.test/jwks"},
        {"issuer": "https://a.test"},
        {"issuer": "https://a.test", "jwks_uri": "http://a.test/jwks"},
        {"issuer": "https://a.test", "jwks_uri": "http://127.0.0.1/jwks"},
        {"issuer": "https://a.test", "jwks_uri": "file:///jwks"},
        {"issuer": "https://a.test", "jwks_uri": "/jwks"},
        {"issuer": "https://a.test", "jwks_uri": ["https://a.test/jwks"]},
        {"issuer": "https://a.test", "jwks_uri": None},
        [],
        b"<html>",
        b"\xff",
        b"[" * 100_000,
    ],
)
async def test_rfc8414_3_3_metadata_of_another_issuer_is_refused(metadata: object) -> None:
    found = {f"https://a.test{OPENID}": metadata, "https://a.test/jwks": JWKS, "http://127.0.0.1/jwks": JWKS}
    web = Web(found)
    with pytest.raises(ValueError, match="no metadata of the issuer"):
        await fetch_keys(Issuer(issuer="https://a.test"), web.fetch)
    assert web.requested == [f"https://a.test{OPENID}", f"https://a.test{OAUTH}"]


async def test_an_issuer_on_loopback_may_use_http() -> None:
    issuer = "http://127.0.0.1:3000"
    metadata = {"issuer": issuer, "jwks_uri": f"{issuer}/jwks"}
    web = Web({f"{issuer}{OPENID}": metadata, f"{issuer}/jwks": JWKS})
    assert await fetch_keys(Issuer(issuer=issuer), web.fetch)
