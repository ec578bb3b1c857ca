"""The cost of authentication: per request, and under a flood of forged tokens.

`python -m benchmarks.request_cost.auth [--rounds N] [--seconds N] [--json FILE] [--check]`

Cost: tiny, JSON, 64 connections on the fast path; CPU per request without authentication, with RS256 and the
same token in each request, and with 10,000 tokens in turn. A round is plain, same, many, plain; the ratios
compare with the mean of the two plain turns; the median of the rounds is reported.

Flood: good requests at a constant rate, alone and beside five times as many with forged tokens. These are all
different, so that only a signature check can reject them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from rich.console import Console
from rich.table import Table

from benchmarks.common import wire
from benchmarks.common.models import OUT, model_path
from benchmarks.common.open_loop import Load, constant, drive
from benchmarks.common.processes import cobatch
from benchmarks.common.turns import Turn, serve_turn, wait_until_idle
from cobatch.server.loadtest.statistics import Counts

_TOKENS = 10_000
_ISSUER, _AUDIENCE, _KID = "https://issuer.bench.invalid", "https://cobatch.bench.invalid", "bench"
_PATH = "/v2/models/tiny/infer"
_CONNECTIONS = 64
_GOOD_PER_S = 500
_MOST = 1.10


class Tokens:
    """A key pair, a configuration that trusts it, and tokens."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        jwk: dict[str, Any] = jwt.algorithms.RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        jwk |= {"kid": _KID, "use": "sig", "alg": "RS256"}
        (folder / "jwks.json").write_text(json.dumps({"keys": [jwk]}))
        self.config = folder / "cobatch.toml"
        self.config.write_text(
            f'[auth]\naudience = "{_AUDIENCE}"\n[[auth.issuers]]\nissuer = "{_ISSUER}"\n'
            'key_files = ["jwks.json"]\nalgorithms = ["RS256"]\n'
        )

    def token(self, number: int, *, forged: bool = False) -> str:
        """Return a valid token, or one with a forged signature."""
        now = int(time.time())
        claims = {
            "iss": _ISSUER, "aud": _AUDIENCE, "sub": f"caller-{number % 100}", "client_id": "bench",
            "iat": now, "exp": now + 86_400, "jti": str(number), "scope": "infer metadata",
        }  # fmt: skip
        if forged:
            # Signing is slow; a forged signature only needs the right length.
            token = jwt.encode(claims, "x" * 32, "HS256", {"typ": "at+jwt", "kid": _KID})
            head = jwt.utils.base64url_encode(
                json.dumps({"alg": "RS256", "typ": "at+jwt", "kid": _KID}).encode()
            )
            signature = jwt.utils.base64url_encode(bytes([number % 251 + 1]) * 255 + b"1")
            return f"{head.decode()}.{token.split('.')[1]}.{signature.decode()}"
        return jwt.encode(claims, self._key, "RS256", {"typ": "at+jwt", "kid": _KID})


def cost(rounds: int, seconds: int, tokens: Tokens, console: Console) -> dict[str, list[Turn]]:
    """Return the turns of each kind: plain, same, many."""
    request = wire.encode("tiny", wire.rows_of("tiny", 1, 0), False)
    signed = wire.Message(request.body, request.headers | {"Authorization": f"Bearer {tokens.token(0)}"})
    many = ("Authorization", [f"Bearer {tokens.token(number)}" for number in range(_TOKENS)])
    turns: dict[str, list[Turn]] = {"plain": [], "same": [], "many": []}
    with ExitStack() as stack:
        file = model_path("tiny")
        plain = stack.enter_context(cobatch(file, "tiny", True))
        protected = stack.enter_context(cobatch(file, "tiny", True, tokens.config))

        def turn(who: str, length_s: int) -> Turn:
            server = plain if who == "plain" else protected
            message = request if who == "plain" else signed
            rotating = many if who == "many" else None
            return serve_turn(who, server, _PATH, message, _CONNECTIONS, length_s, False, rotating)

        for who in turns:
            turn(who, 1 if who != "many" else 3)  # long enough to send each token
        for number in range(rounds):
            around = [turn("plain", seconds)]
            turns["same"].append(turn("same", seconds))
            turns["many"].append(turn("many", seconds))
            around.append(turn("plain", seconds))
            turns["plain"].append(
                Turn("plain", fmean(t.per_s for t in around), fmean(t.p50_us for t in around),
                     cpu_us=fmean(t.cpu_us for t in around))
            )  # fmt: skip
            console.print(f"  round {number + 1} of {rounds}", style="dim")
    return turns


@dataclass(frozen=True, slots=True)
class Measurement:
    """The latencies of successful answers in microseconds (0 without any), and the answers by status."""

    p50_us: float
    p99_us: float
    max_us: float
    answers: dict[str, int]


def flood(
    rounds: int, seconds: int, tokens: Tokens, console: Console
) -> list[tuple[Measurement, Measurement, Measurement]]:
    """Return for each round: good requests alone, good ones beside the flood, the forged ones."""
    bad_per_s = 5 * _GOOD_PER_S
    good = Load([_raw(tokens.token(number)) for number in range(16)], constant(_GOOD_PER_S, seconds))
    results = []
    with cobatch(model_path("tiny"), "tiny", True, tokens.config) as server:
        drive(server.address, good)
        for number in range(rounds):
            bad = [_raw(tokens.token(n, forged=True)) for n in range(bad_per_s * seconds)]
            wait_until_idle(server.pid)
            (alone,) = drive(server.address, good)
            beside, attack = drive(server.address, good, Load(bad, constant(bad_per_s, seconds)))
            results.append((_measurement(alone), _measurement(beside), _measurement(attack)))
            console.print(f"  flood {number + 1} of {rounds}", style="dim")
    return results


def _measurement(of: Counts) -> Measurement:
    latency = of.latency
    answers = {"200": latency.count, **of.errors} if latency.count else dict(of.errors)
    return Measurement(latency.quantile_us(0.5), latency.quantile_us(0.99), latency.max_us, answers)


def _raw(token: str) -> bytes:
    request = wire.encode("tiny", wire.rows_of("tiny", 1, 0), False)
    headers = request.headers | {"Authorization": f"Bearer {token}"}
    return wire.raw_request(wire.Message(request.body, headers), "bench", _PATH)


def main() -> int:
    """Return 0; with --check 1 if requests with the same token cost more than 10 % more."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request_cost.auth", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    progress = Console(stderr=True)
    tokens = Tokens(OUT / "auth")
    turns = cost(options.rounds, options.seconds, tokens, progress)
    floods = flood(options.rounds, options.seconds, tokens, progress)
    ratios = {
        who: median(
            mine.cpu_us / plain.cpu_us for mine, plain in zip(turns[who], turns["plain"], strict=True)
        )
        for who in turns
    }
    table = Table("CPU per request, fast path, JSON, 64 connections", "us", "ratio")
    names = {"plain": "no auth", "same": "RS256, one token", "many": f"RS256, {_TOKENS:,} tokens in turn"}
    for who, name in names.items():
        table.add_row(name, f"{median(turn.cpu_us for turn in turns[who]):.1f}", f"{ratios[who]:.3f}")
    Console().print(table)
    table = Table(f"good requests, {_GOOD_PER_S}/s", "p50 us", "p99 us", "max us", "answers")
    for column, name in enumerate(("alone", f"beside {5 * _GOOD_PER_S}/s forged", "the forged ones")):
        runs = [each[column] for each in floods]
        answers: Counter[str] = Counter()
        for run in runs:
            answers.update(run.answers)
        table.add_row(name, *[f"{median(getattr(run, key) for run in runs):.0f}" for key in
                              ("p50_us", "p99_us", "max_us")], str(dict(answers)))  # fmt: skip
    Console().print(table)
    if options.json:
        flooded = [[asdict(run) for run in each] for each in floods]
        options.json.write_text(json.dumps({"ratios": ratios, "flood": flooded}, indent=2))
    return 1 if options.check and ratios["same"] > _MOST else 0


if __name__ == "__main__":
    sys.exit(main())
