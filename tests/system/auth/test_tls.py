"""TLS with --tls-cert and --tls-key, and trusted proxies."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption
from typer.testing import CliRunner

from cobatch.server.cli import app
from tests.support.auth.certificates import Pair
from tests.support.auth.protected import SIGNER, Protected, infer, protected, token
from tests.support.auth.tokens import Signer
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import Served, data_of, gate, gated, get


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@pytest.fixture
def files(pair: Pair, tmp_path: Path) -> tuple[str, str]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(pair.certificate)
    key.write_bytes(pair.key())
    return str(cert), str(key)


@pytest.fixture(params=["fast", "asgi"])
def fast(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "fast")


def ask_over_tls(served: Served, certificate: str) -> None:
    """Send two requests on one connection that verifies the certificate."""
    context = ssl.create_default_context(cafile=certificate)
    with served.connect() as client:
        client.socket = context.wrap_socket(client.socket, server_hostname="127.0.0.1")
        assert client.socket.version() in ("TLSv1.2", "TLSv1.3")
        for n in (1, 2):
            assert data_of(client.ask(gate(n))) == [2 * n]
            assert client.ask(get("/v2/models/gate")).status == 200
        client.send(gate(3) + get("/v2/models/gate") + gate(4))
        assert data_of(client.answer()) == [6]
        assert client.answer().status == 200
        assert data_of(client.answer()) == [8]
        client.socket.unwrap()


@pytest.mark.parametrize("path", WAYS)
def test_infer_over_tls(path: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with gated(**way(path), tls_cert=files[0], tls_key=files[1]) as (served, _):
        ask_over_tls(served, files[0])
        with served.connect() as client:
            # Without TLS the connection is closed.
            client.send(gate(1))
            assert client.closed()
    assert "cobatch: listening on https://127.0.0.1:" in capsys.readouterr().out


def test_the_key_may_be_in_the_certificates_file(fast: bool, pair: Pair, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(pair.key() + pair.certificate)
    with gated(fast, tls_cert=str(both)) as (served, _):
        ask_over_tls(served, str(both))


def test_bench_over_tls(files: tuple[str, str]) -> None:
    """`cobatch bench` verifies the certificate unless told otherwise."""
    with gated(True, tls_cert=files[0], tls_key=files[1]) as (served, _):
        command = ["bench", f"https://127.0.0.1:{served.server.port}", "--shape", "x=1", "--quiet"]
        command += ["--seconds", "0.2", "--warmup-s", "0"]
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 1
        assert "certificate" in refused.stderr
        for more in (["--ca-file", files[0]], ["--insecure"]):
            done = CliRunner().invoke(app, [*command, *more])
            assert done.exit_code == 0, done.output
            assert "16 connections" in done.stdout
        assert "No such file" in CliRunner().invoke(app, [*command, "--ca-file", "gone.pem"]).stderr


def refusal(folder: Path, *flags: str) -> str:
    """Return the error line of `cobatch serve`, without the folder's name."""
    model = folder / "model.onnx"
    model.write_bytes(b"")
    result = CliRunner().invoke(app, ["serve", str(model), "--port", "0", *flags])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("cobatch: server.tls_")
    assert result.stderr.count("\n") == 1
    return result.stderr.replace(f"{folder}/", "")


def test_unusable_files_are_refused(pair: Pair, files: tuple[str, str], tmp_path: Path) -> None:
    cert, key = files
    others = tmp_path / "others.pem"
    others.write_bytes(Pair().key())
    locked = tmp_path / "locked.pem"
    locked.write_bytes(pair.key(BestAvailableEncryption(b"password")))
    gone = refusal(tmp_path, "--tls-cert", str(tmp_path / "gone.pem"))
    assert gone.endswith("cannot use gone.pem: No such file or directory (flag --tls-cert)\n")
    gone_key = refusal(tmp_path, "--tls-cert", cert, "--tls-key", str(tmp_path / "gone.pem"))
    assert "cannot use cert.pem with gone.pem: No such file" in gone_key
    assert "cannot use cert.pem: " in refusal(tmp_path, "--tls-cert", cert)  # no key in it
    assert "cannot use key.pem: " in refusal(tmp_path, "--tls-cert", key)
    message = refusal(tmp_path, "--tls-cert", cert, "--tls-key", str(others))
    assert "cannot use cert.pem with others.pem: " in message
    assert "mismatch" in message.lower()
    assert "the key is encrypted" in refusal(tmp_path, "--tls-cert", cert, "--tls-key", str(locked))
    assert "needs tls_cert" in refusal(tmp_path, "--tls-key", key)


# Proxies


@pytest.fixture
def charged() -> Iterator[list[str]]:
    """Collect the addresses charged for forged tokens."""
    addresses: list[str] = []
    with mock.patch(
        "cobatch.server.auth.throttle.SignatureThrottle.charge", lambda _, address: addresses.append(address)
    ):
        yield addresses


def forge(running: Protected, number: int, **headers: str) -> int:
    """Send a token with a wrong signature, a different one for each number; return the status."""
    forged = Signer(ec.generate_private_key(ec.SECP256R1()), "ES256", SIGNER.kid)
    answer = running.infer(forged.token({"jti": str(number)}), **headers)
    assert answer.status in (401, 429)
    return answer.status


@pytest.mark.parametrize(
    ("trusted", "forwarded", "address"),
    [
        (None, "203.0.113.7", "127.0.0.1"),
        ("10.0.0.0/8, 192.0.2.1", "203.0.113.7", "127.0.0.1"),
        ("127.0.0.1", "203.0.113.7", "203.0.113.7"),
        ("127.0.0.0/8", "198.51.100.1, 203.0.113.7", "203.0.113.7"),
        ("127.0.0.1,10.0.0.0/8", "203.0.113.7, 10.1.2.3", "203.0.113.7"),
        ("127.0.0.1", "2001:db8::1", "2001:db8::1"),
        ("127.0.0.1", "", "127.0.0.1"),
    ],
)
def test_forwarded_headers_are_accepted_from_trusted_proxies_only(
    fast: bool, tmp_path: Path, charged: list[str], trusted: str | None, forwarded: str, address: str
) -> None:
    with protected(fast, tmp_path, server={"trusted_proxies": trusted}) as running:
        forge(running, 1, **{"X-Forwarded-For": forwarded})
        assert charged == [address]


def test_forged_tokens_throttle_their_own_address(fast: bool, tmp_path: Path) -> None:
    first, second = ({"X-Forwarded-For": address} for address in ("203.0.113.7", "203.0.113.8"))
    with protected(fast, tmp_path, server={"trusted_proxies": "127.0.0.1"}) as running:
        known = infer(token(), **first)
        assert running.ask(known).status == 200
        now_s = running.clock.monotonic()
        with mock.patch.object(running.auth.throttle, "_clock") as clock:
            clock.return_value = now_s
            assert [forge(running, n, **first) for n in range(102)] == [401] * 100 + [429] * 2
            answer = running.infer(token(jti="new"), **first)
            assert (answer.status, answer.slug) == (429, "too-many-bad-tokens")
            assert answer.headers["retry-after"] == "1"
            assert running.infer("x", **first).status == 401  # refused without a signature check
            # Cached tokens and new tokens from other addresses are not affected.
            assert running.ask(known).status == 200
            elsewhere = token(jti="new")
            assert running.infer(elsewhere, **second).status == 200
            assert running.infer(elsewhere, **first).status == 200
            clock.return_value = now_s + 0.05
            assert running.infer(token(jti="newer"), **first).status == 200
