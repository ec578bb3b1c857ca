"""Damaged models, settings and keys: each is used or refused in words, and nothing else happens."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path

from benchmarks.common.processes import ROOT
from benchmarks.trials.models import cases
from benchmarks.trials.trial import Report
from cobatch.engines.errors import EngineError
from cobatch.engines.loader import load_engine
from cobatch.server.app import create_app
from cobatch.server.settings.load import load_settings
from cobatch.server.settings.values import SettingsError

_MEMORY_BYTES = 6 << 30
_TIMEOUT_S = 60
_TOML = """
[server]
port = 0
keep_alive_s = 5.0
max_body_bytes = 1_000_000
access_log = "json"
[auth]
audience = ["https://trial.test"]
api_keys_file = "keys.toml"
[[auth.issuers]]
issuer = "https://issuer.test"
key_files = ["jwks.json"]
[[auth.tenants]]
tenant = "gold"
requests_per_s = 10.5
[[models]]
path = "m.onnx"
max_batch_size = 8
batching = "auto"
[[models.pad]]
input = "ids"
buckets = [2, 4, 8]
outputs = { tokens = 0 }
"""
_KEYS = """
[[keys]]
id = "ab2cd3ef4gh5"
sha256 = "5092fcf84cfb72ef5dbb7966dd6e9e19738ddaeefba1c86154df69a9b329b082"
tenant = "gold"
scopes = ["infer"]
expires = 2099-02-22T17:00:00Z
"""
_JWKS = (
    '{"keys": [{"kty": "EC", "crv": "P-256", "kid": "a", "alg": "ES256", "use": "sig", '
    '"x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", '
    '"y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}'
)
_INSERTS = (b"\0", b"\n", b'"', b"[", b"-", b"9" * 30, b"\xff\xff", b"nan", b"]]")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the content with some bytes changed, missing, repeated, or cut at the end."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) or 1)
        match rng.randrange(6):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + rng.choice([1, 2, 16])]
            case 2:
                data[at:at] = data[at : at + rng.choice([1, 8, 64])]
            case 3:
                data[at:at] = rng.choice(
                    [b"\0", b"\n", b'"', b"[", b"-", b"9" * 30, b"\xff\xff", b"nan", b"]]"]
                )
            case _:
                if data:
                    data[at] = rng.randrange(256)
    return bytes(data)


def _prepare() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # ONNX Runtime prints there, too
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def open_damaged(content: bytes) -> str:
    """Open a model in this process; return "opened", "refused", or an error that no caller expects."""
    with tempfile.TemporaryDirectory(prefix="cobatch-damaged-") as folder:
        path = Path(folder, "m.onnx")
        path.write_bytes(content)
        try:
            with closing(load_engine("onnxruntime", str(path), 4)) as engine:
                engine.open()
        except EngineError:
            return "refused"
        except Exception as error:  # noqa: BLE001 - the trial looks for any
            return repr(error)
    return "opened"


def try_models(report: Report, rng: random.Random, count: int) -> None:
    """Open damaged ONNX files in a process of their own, which must not die of one."""
    make = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), _prepare)
    pool = make()
    for _ in range(count):
        content = damaged(rng.choice(cases()).content, rng)
        try:
            result = pool.submit(open_damaged, content).result(_TIMEOUT_S)
        except (BrokenProcessPool, TimeoutError) as error:
            report.find("a damaged model ends the process or hangs it", f"{error!r}: {content.hex()}")
            pool.shutdown(wait=False)
            pool = make()
            continue
        if result in ("opened", "refused"):
            report.counts[f"damaged models {result}"] += 1
        else:
            report.find("a damaged model is not refused in words", f"{result}: {content.hex()}")
    pool.shutdown()


def try_settings(report: Report, rng: random.Random, count: int) -> None:
    """Load damaged settings, API keys and signing keys as the server does."""
    files = {"cobatch.toml": _TOML, "keys.toml": _KEYS, "jwks.json": _JWKS}
    with tempfile.TemporaryDirectory(prefix="cobatch-damaged-") as text:
        folder = Path(text)
        (folder / "m.onnx").write_bytes(next(case.content for case in cases() if case.name == "padded"))
        for number in range(-1, count):
            for name, content in files.items():
                (folder / name).write_text(content)
            name = rng.choice(["cobatch.toml", "cobatch.toml", "keys.toml", "jwks.json"])
            if number >= 0:  # the first ones are sound
                (folder / name).write_bytes(damaged(files[name].encode(), rng))
            try:
                create_app(load_settings(folder / "cobatch.toml", {}, {}))
                result = "taken"
            except SettingsError:
                result = "refused"
            except Exception as error:  # noqa: BLE001 - the trial looks for any
                report.find(
                    "damaged settings are not refused in words",
                    f"{error!r}: {(folder / name).read_bytes()!r}",
                )
                continue
            report.counts[f"damaged settings {result}"] += 1
            if number < 0 and result == "refused":
                report.find("sound settings are refused", "")


def try_commands(report: Report, rng: random.Random, count: int) -> None:
    """Serve damaged files by the command: it ends with a line that says why, or is ready."""
    with tempfile.TemporaryDirectory(prefix="cobatch-damaged-") as folder:
        for number in range(count):
            plan = number % 4 == 3
            path = Path(folder, f"m{number}.{'plan' if plan else 'onnx'}")
            path.write_bytes(damaged(cases()[number % len(cases())].content, rng)[: rng.randrange(0, 200)])
            command = [sys.executable, "-m", "cobatch", "serve", str(path), "--port", "0"]
            with subprocess.Popen(
                command, cwd=ROOT, stdout=-1, stderr=subprocess.STDOUT, text=True
            ) as server:
                assert server.stdout is not None
                lines: list[str] = []
                for line in server.stdout:
                    lines.append(line)
                    if "cobatch: ready" in line:
                        server.terminate()
                status = server.wait(_TIMEOUT_S)
            report.counts[f"cobatch serve, damaged file: status {status}"] += 1
            if status not in (0, 1, 2) or any("Traceback" in line for line in lines):
                report.find("cobatch serve fails without a word", f"{status} {lines}: {path.read_bytes()!r}")
