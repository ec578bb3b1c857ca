"""A hundredth of the trials: they start real servers and find nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks.trials import damaged_files, oracle, paths, streams
from benchmarks.trials.client import Answer
from benchmarks.trials.forgeries import FORGERIES, Forger, signers
from benchmarks.trials.http_streams import stream
from benchmarks.trials.models import cases
from benchmarks.trials.trial import Report, command


@pytest.mark.slow
def test_every_answer_is_right() -> None:
    report = oracle.trial(oracle.COUNT // 100, 1)
    assert report.findings == {}
    assert report.counts["right answers"] > 100


@pytest.mark.slow
def test_the_fast_path_answers_streams_as_asgi_does() -> None:
    report = streams.trial(streams.COUNT // 100, 1)
    assert report.findings == {}
    assert report.counts["answers 200"] > 20
    assert report.counts["answers 400"] > 20


def test_a_finding_is_printed_and_fails_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def trial(count: int, seed: int) -> Report:
        report = Report()
        report.counts["requests"] = count
        if seed == 2:
            report.find("a wrong answer", "42")
        return report

    assert command("oracle", None, 5, trial, "requests", []) == 0
    assert "| requests | 5 |" in capsys.readouterr().out
    assert command("oracle", None, 5, trial, "requests", ["--seed", "2"]) == 1
    assert "a wrong answer:\n  42\n" in capsys.readouterr().out


def test_a_wrong_and_a_crossed_answer_are_told_apart() -> None:
    report = Report()
    judge = oracle.Oracle(report, 1)
    wishes = [judge.wish() for _ in range(40)]
    expected = [judge._expect(wish) for wish in wishes]
    wish, right = next((w, e) for w, e in zip(wishes, expected, strict=True) if w.case.name == "mlp" and e)
    other = wish.case.alone(wish.case.feed(judge.rng))
    assert other is not None
    judge._judge(wish, right, 200, right, wish.id)
    assert report.findings == {}
    judge._judge(wish, right, 200, {"y": right["y"] + 1}, wish.id)
    judge._judge(wish, right, 200, right, "another")
    judge._recent["mlp"].append(other)
    judge._judge(wish, right, 200, other, wish.id)
    kinds = ["a wrong answer", "an answer with another's id", "a crossed answer"]
    assert list(report.findings) == kinds


def test_the_same_seed_makes_the_same_streams() -> None:
    first, second = (random.Random(7), random.Random(7))
    assert [stream(first) for _ in range(50)] == [stream(second) for _ in range(50)]


def test_what_varies_is_taken_out_of_answers() -> None:
    answers = [
        b"HTTP/1.1 200 OK\r\ndate: %b\r\nx-request-id: %b\r\na: b\r\ncontent-length: 2\r\n\r\nhi" % values
        for values in [(b"Mon", b"1"), (b"Tue", b"2")]
    ]
    assert streams.plain(answers[0]) == streams.plain(answers[1])
    assert streams.plain(answers[0]) != streams.plain(answers[0].replace(b"hi", b"ho"))
    assert streams.plain(answers[0]) != streams.plain(answers[0].replace(b"a: b", b"a: c"))


def test_every_model_of_the_oracle_answers_its_own_inputs() -> None:
    rng = np.random.default_rng(3)
    for case in cases():
        answers = [case.alone(case.feed(rng)) for _ in range(20)]
        assert sum(answer is not None for answer in answers) >= 5, case.name


def test_a_path_that_leads_to_the_secret_model_is_a_finding() -> None:
    def findings(target: str, key: str, status: int, body: bytes = b"{}") -> list[str]:
        report = Report()
        paths.judge(report, target, b"", key, Answer(status, {}, body))
        return list(report.findings)

    assert findings("/v2/models/secret/infer", "no key", 401) == []
    assert findings("/v2/models/secret/infer", "other", 403) == []
    assert findings("/v2/models/secret/ready", "no key", 200) == []
    assert findings("/v2/health/live?x", "no key", 200) == []
    assert findings("/v2/models/secret", "no key", 404) != []
    assert findings("http://trial/v2//models/secret", "no key", 200) != []
    assert findings("/v2/models/secret/infer", "other", 500) != []
    assert findings("/v2/models/secret/infer", "other", 200, b'{"name":"pooled"}') != []


def test_paths_are_disguised_in_many_ways() -> None:
    rng = random.Random(1)
    targets = {paths.trick(rng)[0] for _ in range(1000)}
    assert len(targets) > 500


@pytest.mark.parametrize("kind", FORGERIES)
def test_no_forgery_is_a_good_token(kind: str) -> None:
    rng = random.Random(1)
    for signer in signers():
        tokens = [FORGERIES[kind](Forger(signer, rng, "http://127.0.0.1:1")) for _ in range(10)]
        assert signer.token() not in tokens
        assert len(set(tokens)) > 1


def test_damaged_settings_are_refused_in_words() -> None:
    report = Report()
    damaged_files.try_settings(report, random.Random(5), 20)
    assert report.findings == {}
    assert report.counts["damaged settings refused"] > 10
    assert report.counts["damaged settings taken"] > 0


def test_damaged_models_are_refused_in_words() -> None:
    rng = random.Random(4)
    results = [damaged_files.open_damaged(damaged_files.damaged(case.content, rng)) for case in cases()]
    assert set(results) == {"opened", "refused"}
