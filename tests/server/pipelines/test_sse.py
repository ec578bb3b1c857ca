"""Events are framed as browsers and clients of OpenAI's API read them."""

from cobatch.server.pipelines import sse


def test_an_item() -> None:
    assert sse.event(b"a") == b"data: a\n\n"


def test_lines_of_an_item() -> None:
    assert sse.event(b"a\r\nb\rc\n") == b"data: a\ndata: b\ndata: c\ndata: \n\n"


def test_the_end() -> None:
    assert sse.completed() == b"event: completed\ndata: {}\n\n"
    assert sse.failed(b'{"status":500}') == b'event: error\ndata: {"status":500}\n\n'
