"""The parser of `cobatch bench` for HTTP answers."""

from __future__ import annotations

import pytest

from cobatch.server.loadtest.answers import Answer, Malformed

HEAD = b"HTTP/1.1 200 OK\r\nServer-Timing: queue;dur=0.1, batch;desc=12\r\n"
WHOLE = HEAD + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
AFTER_NOTICE = b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE


@pytest.mark.parametrize("data", [WHOLE, CHUNKED, AFTER_NOTICE, WHOLE.replace(b"Content-L", b"content-l")])
def test_an_answer_is_parsed_the_same_however_it_is_split(data: bytes) -> None:
    for pieces in [[data], [data[at : at + 1] for at in range(len(data))]] + [
        [data[:at], data[at:]] for at in range(1, len(data))
    ]:
        answer = Answer()
        for _ in range(2):  # a second answer on the same connection
            assert [answer.feed(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
            assert (answer.status, answer.body, answer.batch, answer.keep_alive) == (200, b"hello", 12, True)


def test_an_answer_without_length_ends_with_the_connection() -> None:
    answer = Answer()
    assert not answer.feed(b"HTTP/1.1 500 Oh\r\nConnection: close\r\n\r\nto the ")
    assert not answer.feed(b"end")
    assert answer.end()
    assert (answer.status, answer.body, answer.keep_alive) == (500, b"to the end", False)


def test_a_truncated_answer_is_not_complete() -> None:
    for data in (WHOLE, CHUNKED):
        answer = Answer()
        assert not answer.end()
        assert not answer.feed(data[:-1])
        assert answer.started
        assert not answer.end()


@pytest.mark.parametrize(
    "data", [WHOLE + b"x", CHUNKED + b"HTTP/1.1 200 OK\r\n", b"SSH-2.0-hello\r\n\r\n", b"\x15\x03\x01" * 9]
)
def test_malformed_answers_are_refused(data: bytes) -> None:
    answer = Answer()
    with pytest.raises(Malformed):  # noqa: PT012 - either call may raise
        answer.feed(data)
        answer.feed(b"\r\n\r\n")


def test_error_kinds_and_messages() -> None:
    answer = Answer()
    problem = b'{"type":"https://x.example/problems/queue-full","status":429,"detail":"too  many"}'
    answer.feed(b"HTTP/1.1 429 No\r\nContent-Length: %d\r\n\r\n" % len(problem) + problem)
    assert (answer.error_kind(), answer.error_message()) == ("429 queue-full", "too many")
    answer.feed(b'HTTP/1.1 400 No\r\nContent-Length: 15\r\n\r\n{"error":"what"}'.replace(b": 15", b": 16"))
    assert (answer.error_kind(), answer.error_message()) == ("status 400", "what")
