"""SIGHUP: files of keys and the certificate are read again; the old ones stay where the new are invalid."""

from __future__ import annotations

import asyncio
import signal
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cobatch.server.auth import api_keys
from cobatch.server.settings.auth import Issuer
from tests.support.auth.certificates import Pair
from tests.support.auth.protected import SIGNER, infer, protected
from tests.support.auth.tokens import ISSUER, SECRET, Signer, hs256, jwks, signer
from tests.support.fronts.linked import WAYS, way
from tests.support.http.process import Cobatch
from tests.support.http.serving import DEADLINE_S, Served, data_of, gate, gated
from tests.support.models import models

ALL = pytest.mark.parametrize("path", WAYS)


def hang_up(served: Served) -> None:
    """Act as on SIGHUP."""
    loop = served.inference.loop
    assert loop is not None
    asyncio.run_coroutine_threadsafe(served.server.reload(), loop).result(DEADLINE_S)


def with_key(key: str, row: int = 1) -> bytes:
    return gate(row, headers={"X-API-Key": key})


@ALL
def test_a_new_key_is_known_and_an_old_one_is_not(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        protected(path, tmp_path, keys={"stays": ("infer",), "goes": ("infer",)}) as p,
        p.served.connect() as stays,
        p.served.connect() as goes,
    ):
        file = tmp_path / "api-keys.toml"
        fresh, entry = api_keys.mint("new", ("infer",))
        for client, tenant in ((stays, "stays"), (goes, "goes")):
            for _ in range(3):
                assert client.ask(with_key(p.keys[tenant])).status == 200
        kept, _, _ = file.read_text().partition(f'[[keys]]\nid = "{p.keys["goes"][3:15]}')
        file.write_text(kept + entry)
        hang_up(p.served)
        assert stays.ask(with_key(p.keys["stays"])).status == 200
        answer = goes.ask(with_key(p.keys["goes"]))
        assert (answer.status, answer.slug) == (401, "invalid-credentials")
        assert p.ask(with_key(fresh)).status == 200
        assert caplog.messages == []


@ALL
def test_a_keys_new_rights_hold_at_once(path: str, tmp_path: Path) -> None:
    with protected(path, tmp_path, keys={"team": ("infer",)}) as p, p.served.connect() as client:
        for _ in range(3):
            assert client.ask(with_key(p.keys["team"])).status == 200
        file = tmp_path / "api-keys.toml"
        file.write_text(file.read_text().replace('"infer"', '"metadata"'))
        hang_up(p.served)
        answer = client.ask(with_key(p.keys["team"]))
        assert (answer.status, answer.slug) == (403, "forbidden")


@ALL
@pytest.mark.parametrize("content", [b"[[keys]]\nid = 1\n", b"nonsense", b"\xff\x00", None])
def test_an_invalid_file_of_keys_changes_nothing(
    path: str, content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with protected(path, tmp_path, keys={"team": ("infer",)}) as p, p.served.connect() as client:
        file = tmp_path / "api-keys.toml"
        file.unlink() if content is None else file.write_bytes(content)
        hang_up(p.served)
        assert client.ask(with_key(p.keys["team"])).status == 200
    (message,) = caplog.messages
    assert message.startswith("SIGHUP: kept the old API keys: ")
    assert str(file) in message


@ALL
def test_an_issuers_new_key_is_known_and_an_old_one_is_not(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    goes, new = signer("ES256", "goes"), signer("ES256", "new")
    with protected(path, tmp_path) as p, p.served.connect() as stays, p.served.connect() as leaves:
        (tmp_path / "jwks.json").write_bytes(jwks(SIGNER, goes))
        hang_up(p.served)
        for _ in range(3):
            assert stays.ask(infer(SIGNER.token())).status == 200
            assert leaves.ask(infer(goes.token())).status == 200
        assert p.ask(infer(new.token())).status == 401
        (tmp_path / "jwks.json").write_bytes(jwks(SIGNER, new))
        hang_up(p.served)
        assert stays.ask(infer(SIGNER.token())).status == 200
        answer = leaves.ask(infer(goes.token()))
        assert (answer.status, answer.slug) == (401, "invalid-credentials")
        assert p.ask(infer(new.token())).status == 200
        assert caplog.messages == []


@ALL
def test_another_key_of_the_same_name_counts_at_once(path: str, tmp_path: Path) -> None:
    with protected(path, tmp_path) as p:
        other = Signer(ec.generate_private_key(ec.SECP256R1()), SIGNER.algorithm, SIGNER.kid)
        new, old = infer(other.token()), infer(SIGNER.token())
        assert [p.ask(one).status for one in (new, old)] == [401, 200]
        (tmp_path / "jwks.json").write_bytes(jwks(other))
        hang_up(p.served)
        assert [p.ask(one).status for one in (new, old)] == [200, 401]


@ALL
def test_a_secret_is_read_again(path: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(SECRET)
    file.chmod(0o600)
    issuer = Issuer(issuer=ISSUER, name="test", algorithms=("HS256",), secret_file=str(file))
    with protected(path, tmp_path, issuers=(issuer,)) as p:
        old, new = infer(hs256()), infer(hs256(secret=b"n" * 32))
        assert [p.ask(one).status for one in (old, new)] == [200, 401]
        file.write_bytes(b"n" * 32)
        hang_up(p.served)
        assert [p.ask(one).status for one in (old, new)] == [401, 200]


@ALL
@pytest.mark.parametrize("content", [b"", b"nonsense", SIGNER.private_pem(), None])
def test_an_issuers_invalid_file_changes_nothing_and_others_are_read(
    path: str, content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with protected(path, tmp_path, keys={"team": ("infer",)}) as p:
        file, keys = tmp_path / "jwks.json", tmp_path / "api-keys.toml"
        file.unlink() if content is None else file.write_bytes(content)
        keys.write_text(keys.read_text().replace('"infer"', '"metadata"'))
        hang_up(p.served)
        assert p.ask(infer(SIGNER.token())).status == 200
        assert p.ask(with_key(p.keys["team"])).status == 403
    (message,) = caplog.messages
    assert message.startswith("SIGHUP: kept the old keys of issuer test: ")
    assert str(file) in message


def certificate_of(served: Served) -> bytes | None:
    """Return the certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with served.connect() as client:
        client.socket = wrapped = context.wrap_socket(client.socket)
        assert data_of(client.ask(gate(1))) == [2]
        return wrapped.getpeercert(binary_form=True)


@ALL
def test_the_certificate_is_replaced_for_new_connections(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def write(certificate: bytes, private: bytes) -> None:
        cert.write_bytes(certificate)
        key.write_bytes(private)

    old, new = Pair(), Pair()
    write(old.certificate, old.key())
    shown = {ssl.PEM_cert_to_DER_cert(pair.certificate.decode()): pair for pair in (old, new)}
    with gated(**way(path), tls_cert=str(cert), tls_key=str(key)) as (served, _):
        assert shown[certificate_of(served) or b""] is old
        write(new.certificate, old.key())
        hang_up(served)
        assert "SIGHUP: kept the old certificate: cannot use " in caplog.text
        assert shown[certificate_of(served) or b""] is old
        write(new.certificate, new.key())
        hang_up(served)
        assert shown[certificate_of(served) or b""] is new


@pytest.mark.slow
def test_sighup_does_not_end_the_process(tmp_path: Path) -> None:
    model = models.write(tmp_path, models.negate(), "negate.onnx")
    with Cobatch(tmp_path, model, "--port", "0") as server:
        caller = server.ready().connect()
        server.signal(signal.SIGHUP)
        assert caller.infer("negate", [[1, 2, 3]]).rows == [[-1, -2, -3]]
        assert server.stop() == 0
        assert "SIGHUP: no file of keys and no certificate to read again" in server.stderr
