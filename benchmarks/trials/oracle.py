"""Answers of a busy server, each compared with the model run alone in this process.

`python -m benchmarks.trials.oracle [--count 20000] [--seed 1]`: many callers send requests to models of all
datatypes, with and without a batch axis, in every form, pipelined, with random outputs, timeouts, priorities
and tenants, half of them to the fast path, half to ASGI. Among them are cancelled, malformed and poisoned
ones. An answer with another caller's data, an answer too many, or one that is missing is a finding, as is any
wrong one.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common.wire import Array
from benchmarks.trials import forms
from benchmarks.trials.client import Answer, Client, LostError, post
from benchmarks.trials.forms import Outputs, Wish
from benchmarks.trials.models import MAX_BATCH_SIZE, Case, cases
from benchmarks.trials.trial import Report, command, served

COUNT = 20_000
_CALLERS = 48
_BURSTS = 20  # of requests on one connection
_TENANTS = {name: ["infer"] for name in ("gold", "silver", "bronze")}
_WEIGHTS = (
    '[[auth.tenants]]\ntenant = "gold"\nweight = 4\n[[auth.tenants]]\ntenant = "bronze"\nweight = 0.25\n'
)
_REMEMBERED = 4096
_SHORT_US = 20_000
_LATE = (429, 504)  # foreseen to expire, or expired
_HOT_REQUESTS = 200
_RTOL = {np.dtype(np.float16): 1e-2, np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-10}
# A request as sent: the bytes, and the check of its answer.
Sent = tuple[bytes, Callable[[Answer], None]]


def same(one: Array, other: Array) -> bool:
    """Return True if two tensors agree, within rounding if they are floats."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype in _RTOL:
        rtol = _RTOL[one.dtype]
        return bool(np.allclose(one, other, rtol, rtol, equal_nan=True))
    return bool(np.array_equal(one, other))


class Oracle:
    """Makes requests and judges their answers."""

    def __init__(self, report: Report, seed: int) -> None:
        self.report = report
        self.rng = np.random.default_rng(seed)
        self._number = 0
        self._recent: dict[str, deque[Outputs]] = {case.name: deque(maxlen=_REMEMBERED) for case in cases()}

    def wish(self) -> Wish:
        """Return a random request."""
        rng = self.rng
        # Half of the requests of a time are for one model, so that they share its batches.
        hot = self._number // _HOT_REQUESTS if rng.random() < 0.5 else rng.integers(len(cases()))
        case = cases()[hot % len(cases())]
        wanted = None
        if rng.random() < 0.5:
            wanted = tuple(rng.permutation(case.outputs)[: rng.integers(1, len(case.outputs) + 1)].tolist())
        timeout_us = int(rng.integers(1, _SHORT_US)) if rng.random() < 0.1 else 0
        self._number += 1
        number = f"{self._number}-{rng.integers(1 << 30)}"
        return Wish(number, case, case.feed(rng), wanted, timeout_us, int(rng.integers(0, 4)))

    def request(self, key: str, closing: bool) -> Sent:
        """Return a random request of a tenant, and the check of its answer."""
        rng, fields = self.rng, [f"X-API-Key: {key}"]
        if closing:
            fields.append("Connection: close")
        kind = rng.random()
        wish = self.wish()
        if kind < 0.03:
            return self._malformed(wish, fields)
        if kind < 0.15:
            wishes = [wish, *[self.wish() for _ in range(rng.integers(0, 12))]]
            check = self._batch_check(wishes)
            return forms.batch_request(wishes, rng, *fields), check
        if kind < 0.35:
            return forms.v1_request(wish, rng, *fields), self._v1_check(wish)
        if kind < 0.45 and forms.can_be_raw(wish):
            raw = Wish(wish.id, wish.case, wish.feed, None)
            return forms.raw_request(raw, *fields), self._v2_check(raw, raw=True)
        return forms.v2_request(wish, rng, *fields), self._v2_check(wish)

    def _malformed(self, wish: Wish, fields: list[str]) -> Sent:
        message, _ = forms.v2(wish, self.rng, json_only=True)
        match self.rng.integers(4):
            case 0:
                message["inputs"][0]["shape"] = [1, 2, 3, 4, 5]
            case 1:
                message["inputs"][0]["name"] = "nobody"
            case 2:
                message["inputs"][0]["data"] = [{}]
            case _:
                del message["inputs"]
        body = json.dumps(message).encode()

        def check(answer: Answer) -> None:
            self.report.counts["malformed ones refused"] += 1
            if answer.status not in (400, 422):
                self.report.find("a malformed request is not refused", f"{body!r}: {answer}")

        return post(f"/v2/models/{wish.case.name}/infer", body, *fields), check

    def _v2_check(self, wish: Wish, raw: bool = False) -> Callable[[Answer], None]:
        expected = self._expect(wish)

        def check(answer: Answer) -> None:
            if answer.status != 200:
                self._judge(wish, expected, answer.status, answer.body)
                return
            id_, outputs = forms.v2_answer(answer)
            self._judge(wish, expected, 200, outputs, wish.id if raw else id_)

        return check

    def _v1_check(self, wish: Wish) -> Callable[[Answer], None]:
        expected = self._expect(wish)

        def check(answer: Answer) -> None:
            message = json.loads(answer.body)
            if message["status"] == "incomplete" and (expected is None or wish.timeout_us):
                self.report.counts["poisoned or expired in part"] += 1
            elif answer.status == 200:
                self._judge(wish, expected, 200, forms.v1_outputs(message), wish.id)
            else:
                self._judge(wish, expected, answer.status, answer.body)

        return check

    def _batch_check(self, wishes: list[Wish]) -> Callable[[Answer], None]:
        expected = [self._expect(wish) for wish in wishes]

        def check(answer: Answer) -> None:
            self.report.counts["calls of /batch"] += 1
            items: list[Any] = json.loads(answer.body)["responses"] if answer.status == 200 else []
            if [item["id"] for item in items] != [wish.id for wish in wishes]:
                self.report.find("a wrong answer of /batch", answer)
                return
            for wish, outputs, item in zip(wishes, expected, items, strict=True):
                body, status = item["body"], item["status"]
                if status == 200:
                    self._judge(wish, outputs, 200, forms.v2_outputs(body), body.get("id"))
                else:
                    self._judge(wish, outputs, status, body)

        return check

    def _expect(self, wish: Wish) -> Outputs | None:
        outputs = wish.case.alone(wish.feed)
        if outputs is None:
            return None
        self._recent[wish.case.name].append(outputs)
        return {name: outputs[name] for name in wish.wanted or wish.case.outputs}

    def _judge(
        self, wish: Wish, expected: Outputs | None, status: int, got: Any, id_: str | None = None
    ) -> None:
        report, about = self.report, f"{wish}: expected {expected}, got {status} {got}"
        if status in _LATE and wish.timeout_us:
            report.counts["expired ones"] += 1
        elif expected is None and status in (422, 500):
            report.counts["poisoned ones refused"] += 1
        elif status != 200 or expected is None:
            report.find("an unexpected status", about)
        elif id_ != wish.id:
            report.find("an answer with another's id", about)
        elif list(got) == list(expected) and all(same(got[name], expected[name]) for name in got):
            report.counts["right answers"] += 1
        elif any(self._is(got, other) for other in self._recent[wish.case.name]):
            report.find("a crossed answer", about)
        else:
            report.find("a wrong answer", about)

    @staticmethod
    def _is(got: Outputs, other: Outputs) -> bool:
        return all(value.size and same(value, other[name]) for name, value in got.items())


async def caller(address: str, keys: list[str], oracle: Oracle, count: int) -> None:
    """Send requests until the report has `count` answers."""
    report, rng = oracle.report, oracle.rng
    while report.counts["requests"] < count:
        client = await Client.connect(address)
        key = keys[rng.integers(len(keys))]
        for left in range(int(rng.integers(1, _BURSTS)), -1, -1):
            burst = [oracle.request(key, False) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
            if not left:
                burst.append(oracle.request(key, closing=True))
            report.counts["requests"] += len(burst)
            data = b"".join(request for request, _ in burst)
            if left and rng.random() < 0.03:
                client.send(data[: rng.integers(1, len(data) + 1)])
                await asyncio.sleep(float(rng.random()) * 0.003)
                report.counts["cancelled ones"] += len(burst)
                break
            client.send(data)
            try:
                for _, check in burst:
                    check(await client.answer())
                if not left and (more := await client.rest()):
                    report.find("an answer too many", more)
            except LostError as error:
                report.find("a lost answer", f"{error}: {data!r}")
                break
        client.leave(reset=bool(rng.random() < 0.5))


def trial(count: int, seed: int) -> Report:
    """Run the trial with `count` requests."""
    report = Report()

    def settings(case: Case) -> str:
        return f"max_batch_size = {MAX_BATCH_SIZE}\n{case.settings}"

    models = {case.name: (case.content, settings(case)) for case in cases()}
    for part, on in enumerate(("true", "false"), 1):
        setting = f"fast_path = {on}"
        with served(f"oracle-{on}", models, server=setting, auth=_WEIGHTS, tenants=_TENANTS) as (
            server,
            keys,
        ):
            oracle = Oracle(report, seed * part)
            asyncio.run(_call(oracle, server.address, list(keys.values()), count * part // 2))
            report.check_log(server)
    return report


async def _call(oracle: Oracle, address: str, keys: list[str], count: int) -> None:
    callers = min(_CALLERS, max(1, count // 20))
    await asyncio.gather(*[caller(address, keys, oracle, count) for _ in range(callers)])


if __name__ == "__main__":
    sys.exit(command("oracle", __doc__, COUNT, trial, "requests", sys.argv[1:]))
