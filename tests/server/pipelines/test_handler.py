"""Handlers are read by their annotations; requests that are not of their type are refused in words."""

from __future__ import annotations

import asyncio
import encodings
import pkgutil
from typing import Annotated, Any

import msgspec
import numpy as np
import pydantic
import pytest

from cobatch.engines.errors import EngineLoadError
from cobatch.server.http.problem import Problem
from cobatch.server.pipelines.call import Call
from cobatch.server.pipelines.content import check_type
from cobatch.server.pipelines.handler import Handler, Refused, Response, encoded, event_text
from tests.support.pipelines import handlers


class Line(pydantic.BaseModel):
    text: str
    size: int = 12


class Page(msgspec.Struct):
    lines: list[Line] | None = None


def call(data: bytes, content_type: str = "application/json") -> Call:
    return Call(1, content_type, len(data), memoryview(data))


def of(kind: Any, returns: Any = str) -> Handler:
    async def handle(request: Any) -> Any:
        return request

    handle.__annotations__ = {"request": kind, "return": returns}
    return Handler(handle, "handle")


def test_types_of_requests() -> None:
    assert of(str).request(call("grün".encode(), "text/plain")) == "grün"
    assert of(str).request(call("grün".encode("latin-1"), 'text/plain; charset="latin-1"')) == "grün"
    assert of(bytes).request(call(b"\xff", "image/png")) == b"\xff"
    assert of(handlers.Ask).request(call(b'{"text": "a"}')) == handlers.Ask(text="a")
    assert of(Line).request(call(b'{"text": "a"}')) == Line(text="a")
    assert of(dict[str, int]).request(call(b'{"a": 1}')) == {"a": 1}
    assert of(Any).request(call(b"[1, null]")) == [1, None]


@pytest.mark.parametrize(
    ("kind", "data", "slug", "says"),
    [
        (handlers.Ask, b'{"text": 3}', "wrong-body", "$.text"),
        (handlers.Ask, b"{", "not-json", "truncated"),
        (list[Any], b"[" * 100_000, "not-json", "recursion"),
        (Line, b'{"text": "a", "size": "large"}', "wrong-body", "$.size"),
        (Line, b"{", "not-json", "EOF"),
        (Line, b"{}", "wrong-body", "$.text"),
        (str, b"\xff", "wrong-body", "utf-8"),
    ],
)
def test_requests_of_another_shape(kind: Any, data: bytes, slug: str, says: str) -> None:
    with pytest.raises(Refused, match=says.replace("$", r"\$")) as raised:
        of(kind).request(call(data))
    assert raised.value.slug == slug


def test_an_unknown_charset() -> None:
    with pytest.raises(Refused, match="klingon") as raised:
        of(str).request(call(b"", "text/plain; charset=klingon"))
    assert raised.value.slug == "unsupported-media-type"


@pytest.mark.parametrize("charset", ["punycode", "idna", "undefined", "unicode_escape", "hex", "a\0b"])
def test_codecs_of_python_that_are_no_charsets(charset: str) -> None:
    with pytest.raises(Refused, match="is not known") as raised:
        of(str).request(call(b"a-b9", f"text/plain; charset={charset}"))
    assert raised.value.slug == "unsupported-media-type"


def test_every_codec_of_python_decodes_or_is_refused() -> None:
    """Some of them make no text: zlib_codec, rot_13, base64_codec and others."""
    refused = set()
    for one in pkgutil.iter_modules(encodings.__path__):
        try:
            assert isinstance(of(str).request(call(b"ab", f"text/plain; charset={one.name}")), str)
        except Refused as error:
            refused.add((one.name, error.slug))
    names = ("zlib_codec", "rot_13", "hex_codec", "aliases", "punycode")
    assert {(name, "unsupported-media-type") for name in names} < refused
    assert "latin_1" not in dict(refused)
    assert set(dict(refused).values()) <= {"unsupported-media-type", "wrong-body"}


def test_spellings_of_charsets_are_not_kept() -> None:
    kept = len(vars(encodings)["_cache"])
    for number in range(3):
        with pytest.raises(Refused):
            of(str).request(call(b"", f"text/plain; charset=klingon{number}"))
    assert len(vars(encodings)["_cache"]) == kept


@pytest.mark.parametrize("charset", ["UTF-8", "us-ascii", "utf-8-sig", "windows-1252", "Shift_JIS", "koi8-u"])
def test_charsets(charset: str) -> None:
    assert of(str).request(call(b"a", f"text/plain; charset={charset}")) == "a"


@pytest.mark.parametrize("said", ["png", "image/", "*/png", "image/png; q=1", "image/png, image/gif"])
def test_an_annotation_that_is_no_content_type(said: str) -> None:
    with pytest.raises(EngineLoadError, match=r"'request': .* is no content type"):
        of(Annotated[bytes, said])


def test_ranges_of_content_types() -> None:
    pictures = of(Annotated[bytes, "image/*", "application/pdf"]).described.accepts
    check_type(pictures, "image/webp")
    check_type(pictures, "application/pdf")
    with pytest.raises(Problem, match=r"image/\* or application/pdf"):
        check_type(pictures, "imagery/webp")


def test_content_types() -> None:
    assert of(str).described.accepts == ("text/plain",)
    assert of(Annotated[bytes, "Image/PNG"]).described.accepts == ("image/png",)
    assert of(bytes).described.accepts == ()
    check_type((), "anything at all")
    check_type(("application/json",), "application/vnd.api+json; charset=utf-8")
    check_type(("application/json",), "")
    check_type(("application/json",), "application/x-www-form-urlencoded")  # what curl says of --data
    with pytest.raises(Problem, match="image/png or image/jpeg"):
        check_type(("image/png", "image/jpeg"), "")
    with pytest.raises(Problem, match="multipart/form-data"):
        check_type(("application/json",), "multipart/form-data; boundary=x")


def test_descriptions() -> None:
    described = Handler(handlers.Asked(), "Asked").described
    assert (described.returns, described.streamed, described.concurrent) == ("application/json", False, True)
    assert described.summary == "Do what is asked."
    assert described.request_schema is not None
    assert "Ask" in described.request_schema["$defs"]
    assert not Handler(handlers.Backwards(), "Backwards").described.concurrent
    words = Handler(handlers.Words(), "Words").described
    assert (words.returns, words.streamed) == ("text/event-stream", True)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (handlers.TwoArguments(), "the request alone"),
        (object(), "no method `handle`"),
        (handlers.Plain(), r"with `predict` it belongs in \[\[models\]\]"),
    ],
)
def test_what_is_no_handler(found: object, says: str) -> None:
    with pytest.raises(EngineLoadError, match=says):
        Handler(found, "it")


def test_types_that_no_request_has() -> None:
    with pytest.raises(EngineLoadError, match="no request can be of type"):
        of(np.ndarray[Any, Any] | dict[int, object] | complex)


def test_types_of_answers() -> None:
    assert encoded("grün") == ("text/plain; charset=utf-8", "grün".encode())
    assert encoded(b"\xff") == ("application/octet-stream", b"\xff")
    assert encoded(Response(b"\xff", "image/png")) == ("image/png", b"\xff")
    assert encoded(handlers.Told("a", 1)) == ("application/json", b'{"text":"a","process":1}')
    assert encoded([Line(text="a")])[1] == b'[{"text":"a","size":12}]'
    assert encoded(Line(text="a"))[1] == b'{"text":"a","size":12}'
    assert encoded({"a": np.float32(0.5), "b": np.arange(2)})[1] == b'{"a":0.5,"b":[0,1]}'
    with pytest.raises(TypeError, match="object cannot be encoded"):
        encoded(object())
    assert (event_text("a"), event_text({"a": 1})) == (b"a", b'{"a":1}')


async def test_generators() -> None:
    assert [item async for item in Handler(handlers.Count(), "Count").parts(3)] == [0, 1, 2]
    assert [item async for item in Handler(handlers.Words(), "Words").parts("a b")] == ["a", "b"]


async def test_a_cancelled_call_waits_for_its_thread() -> None:
    begun, goes_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def handle(request: int) -> int:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(goes_on.wait(), loop).result()
        return request

    task = asyncio.create_task(Handler(handle, "handle").answer(1))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("kind", ["", "png", "text/plain\r\nx: 1", "text/grün"])
def test_a_response_has_a_content_type(kind: str) -> None:
    with pytest.raises(ValueError, match="must be one"):
        Response(b"", kind)


def test_a_response_has_bytes() -> None:
    with pytest.raises(TypeError, match="must be bytes, got int"):
        Response(5)  # type: ignore[arg-type]
