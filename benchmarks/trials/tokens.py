"""Forged tokens to a protected server: all are refused, and no address that they name is asked.

`python -m benchmarks.trials.tokens [--count 20000] [--seed 1]`: forgeries on the fast path and through ASGI,
from many addresses, since each has a budget of forged tokens. Among them are good ones, which must be
accepted. A server of the trial publishes the keys of one issuer, another one waits at the addresses that
tokens name.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.trials.client import Answer, LostError, ask, get, post
from benchmarks.trials.forgeries import (
    AUDIENCE,
    FETCHED,
    FORGERIES,
    ISSUER,
    SECRET,
    SYMMETRIC,
    Forger,
    signers,
)
from benchmarks.trials.models import cases
from benchmarks.trials.trial import Report, command, served

COUNT = 20_000
_AT_ONCE = 16
_GOOD = 0.05
_ADDRESSES = 5  # to try from, while the answer is 429
_REFUSED = (400, 401, 403, 431)
_BODY = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}]}'
_AUTH = """
[auth]
audience = ["{audience}"]
[[auth.issuers]]
issuer = "{issuer}"
name = "files"
key_files = ["{folder}/jwks.json"]
[[auth.issuers]]
issuer = "{fetched}"
name = "fetched"
jwks_url = "{keys}/jwks"
[[auth.issuers]]
issuer = "{symmetric}"
name = "symmetric"
algorithms = ["HS256"]
secret_file = "{folder}/secret"
"""


class Site:
    """An HTTP server on loopback that counts requests by path, and has one document."""

    def __init__(self, document: bytes = b"") -> None:
        self.asked: list[str] = []
        self.url = ""
        self._document = document

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head.split(b" ")[1].decode())
        start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
        writer.write(start + self._document)
        writer.close()


def request(token: str, rng: random.Random) -> bytes:
    """Return a request with this token."""
    field = f"Authorization: Bearer {token}"
    if rng.random() < 0.3:
        return get("/v2/models/m", field)
    return post("/v2/models/m/infer", _BODY, field)


async def send(address: str, data: bytes, rng: random.Random) -> Answer:
    """Send from a random address, and from others while that one has sent too many forged tokens."""
    for _ in range(_ADDRESSES):
        source = f"127.{rng.randrange(1, 255)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"
        answer = await ask(address, data, source)
        if answer.status != 429:
            break
    return answer


async def _try(report: Report, rng: random.Random, count: int, address: str, trap: str) -> None:
    left = count

    async def sender() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            kind = "good" if rng.random() < _GOOD else rng.choice(list(FORGERIES))
            signer = rng.choice(signers())
            token = signer.token() if kind == "good" else FORGERIES[kind](Forger(signer, rng, trap))
            about = f"{kind}, key {signer.kid}: {token!r}"
            try:
                answer = await send(address, request(token, rng), rng)
            except LostError as error:
                report.find("no answer", f"{about}: {error}")
                continue
            report.counts[f"{kind}: {answer.status}"] += 1
            if kind == "good" and answer.status != 200:
                report.find("a good token is refused", f"{about}: {answer}")
            elif kind != "good" and answer.status not in _REFUSED:
                report.find("a forged token is not refused", f"{about}: {answer}")

    await asyncio.gather(*[sender() for _ in range(_AT_ONCE)])


def trial(count: int, seed: int) -> Report:
    """Run the trial with `count` tokens."""
    report, rng = Report(), random.Random(seed)
    (case,) = [case for case in cases() if case.name == "same-FP32"]
    keys = {
        issuer: json.dumps({"keys": [one.jwk() for one in signers() if one.issuer == issuer]}).encode()
        for issuer in (ISSUER, FETCHED)
    }
    with tempfile.TemporaryDirectory(prefix="cobatch-tokens-") as folder:
        Path(folder, "jwks.json").write_bytes(keys[ISSUER])
        Path(folder, "secret").write_bytes(SECRET)

        async def main() -> None:
            trap, issuer = Site(), Site(keys[FETCHED])
            await trap.start()
            await issuer.start()
            auth = _AUTH.format(
                audience=AUDIENCE,
                issuer=ISSUER,
                fetched=FETCHED,
                symmetric=SYMMETRIC,
                folder=folder,
                keys=issuer.url,
            )
            for on in ("true", "false"):
                with ExitStack() as stack:
                    started = served(
                        f"tokens-{on}", {"m": (case.content, "")}, server=f"fast_path = {on}", auth=auth
                    )
                    # In a thread: it fetches the issuer's keys from here before it is ready.
                    server, _ = await asyncio.to_thread(stack.enter_context, started)
                    await _try(report, rng, count // 2, server.address, trap.url)
                    report.check_log(server)
            report.counts["fetches of the issuer's keys"] = len(issuer.asked)
            report.counts["requests to addresses in tokens"] = len(trap.asked)
            for path in [*trap.asked, *(path for path in issuer.asked if path != "/jwks")]:
                report.find("an address is asked that a token names", path)

        asyncio.run(main())
    report.counts = type(report.counts)(dict(sorted(report.counts.items())))
    return report


if __name__ == "__main__":
    sys.exit(command("tokens", __doc__, COUNT, trial, "tokens", sys.argv[1:]))
