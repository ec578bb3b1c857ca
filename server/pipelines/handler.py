"""A handler: the user's `handle`, read by its annotations. Decodes requests, calls it, encodes answers.

    class Ocr:
        def load(self) -> None: ...  # once in each process
        async def handle(self, page: Annotated[bytes, "image/png", "image/jpeg"]) -> list[Line]: ...

A request is `str` (text), `bytes` (any content type, or those of the annotation), or JSON: of a msgspec
struct, a pydantic model, or any type that msgspec takes; without an annotation any JSON. An answer is encoded
by its type: `str` as text, `bytes` as octets, a `Response` as it says, all else as JSON. The items of a
generator are the events of a stream.
"""

import inspect
import re
from collections import abc
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from cobatch.engines.errors import EngineLoadError
from cobatch.engines.python.model import described
from cobatch.server.pipelines.call import Call, Described
from cobatch.server.pipelines.content import JSON, codec_of, parameter
from cobatch.server.pipelines.thread import CallThread

TEXT = "text/plain"
OCTETS = "application/octet-stream"
_STREAMS = (
    abc.AsyncIterator, abc.AsyncGenerator, abc.AsyncIterable, abc.Iterator, abc.Generator, abc.Iterable,
)  # fmt: skip
_REFERENCE = "#/components/schemas/{name}"
_PYDANTIC_REFERENCE = "#/components/schemas/{model}"
Schema = dict[str, Any]
_Decode = Callable[[Call], object]
_END = object()
_CONTENT_TYPE = re.compile(r"[\w!#$&^.+-]+/(\*|[\w!#$&^.+-]+)", re.ASCII)
# Of what a client sent, in a message.
_QUOTED = 100


@dataclass(frozen=True)
class Response:
    """An answer with a content type of its own, as a picture. Raises TypeError, ValueError."""

    data: bytes
    content_type: str = OCTETS

    def __post_init__(self) -> None:
        """Check the values, where the traceback has the handler's line."""
        if not isinstance(self.data, bytes | bytearray | memoryview):
            raise TypeError(f"the data of a Response must be bytes, got {type(self.data).__name__}")
        kind = self.content_type
        if "/" not in kind or not kind.isascii() or not kind.isprintable():
            raise ValueError(f"the content type of a Response must be one, got {kind!r}")


class Refused(Exception):
    """A request that is not of the handler's type: the kind of problem, and its text."""

    def __init__(self, slug: str, text: str) -> None:
        super().__init__(text)
        self.slug = slug


class Handler:
    """A loaded object's `handle`. Calls of one that is no coroutine run in a thread, one at a time."""

    def __init__(self, found: object, source: str) -> None:
        handle = getattr(found, "handle", found)
        if not callable(handle):
            hint = "; with `predict` it belongs in [[models]]" if hasattr(found, "predict") else ""
            raise EngineLoadError(f"{source} has no method `handle`, and is no function{hint}")
        self._handle: Callable[..., Any] = handle
        name, takes, returns = _read(handle, source)
        self._decode, request_schema, accepts = _request_codec(takes, f"{source}: parameter {name!r}")
        self._is_async = inspect.iscoroutinefunction(handle)
        self._is_async_stream = inspect.isasyncgenfunction(handle)
        self.streamed = self._is_async_stream or inspect.isgeneratorfunction(handle)
        if self.streamed and returns is not Any and get_origin(returns) not in _STREAMS:
            raise EngineLoadError(f"{source}: it yields, so it returns an AsyncIterator[...], not {returns}")
        item = (get_args(returns) or (Any,))[0] if self.streamed else returns
        answer_schema, content_type = _answer_type(item)
        self.described = Described(
            accepts=accepts,
            returns="text/event-stream" if self.streamed else content_type,
            streamed=self.streamed,
            concurrent=self._is_async or self._is_async_stream,
            summary=(inspect.getdoc(handle) or "").partition("\n")[0],
            request_schema=request_schema,
            answer_schema=answer_schema,
        )
        self._thread = CallThread()

    def request(self, call: Call) -> object:
        """Return the argument for a call. Raises Refused."""
        return self._decode(call)

    async def answer(self, request: object) -> object:
        """Return the answer of a handler that has no parts."""
        if self._is_async:
            return await self._handle(request)
        return await self._thread.run(self._handle, request)

    async def parts(self, request: object) -> AsyncGenerator[object]:
        """Yield the items of a generator, which is closed at the end."""
        items = self._handle(request)
        if self._is_async_stream:
            async with aclosing(items):
                async for item in items:
                    yield item
            return
        try:
            while (item := await self._thread.run(next, items, _END)) is not _END:
                yield item
        finally:
            await self._thread.run(items.close)


def _read(handle: Callable[..., Any], source: str) -> tuple[str, Any, Any]:
    """Return the name and type of the only parameter, and the type of the result. Raises EngineLoadError."""
    parameters = list(inspect.signature(handle).parameters)
    if len(parameters) != 1:
        raise EngineLoadError(f"{source}: `handle` takes the request alone, got {parameters or 'nothing'}")
    try:
        hints = get_type_hints(handle, include_extras=True)
    except Exception as error:
        raise EngineLoadError(f"{source}: the annotations cannot be read: {described(error)}") from error
    returns = hints.get("return", Any)
    return parameters[0], hints.get(parameters[0], Any), _plain(returns)


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


# Requests


def _request_codec(kind: Any, where: str) -> tuple[_Decode, Schema | None, tuple[str, ...]]:
    """Return the decoder of a parameter's type, its JSON schema if it has one, and its content types."""
    named = tuple(one.lower() for one in getattr(kind, "__metadata__", ()) if isinstance(one, str))
    plain = _plain(kind)
    for one in named:
        if not _CONTENT_TYPE.fullmatch(one):
            raise EngineLoadError(f"{where}: {one!r} is no content type, as 'image/png' or 'image/*' are")
    if plain is bytes:
        return _octets, None, named
    if plain is str:
        return _text, None, named or (TEXT,)
    validate = getattr(plain, "model_validate_json", None)  # of pydantic
    if validate is not None:
        return (
            _pydantic(validate),
            plain.model_json_schema(ref_template=_PYDANTIC_REFERENCE),
            named or (JSON,),
        )
    try:
        decoder = msgspec.json.Decoder(kind)
        schema = msgspec.json.schema(kind, ref_template=_REFERENCE)
    except TypeError as error:
        raise EngineLoadError(f"{where}: no request can be of type {plain}: {error}") from error
    return _json_decoder(decoder), schema, named or (JSON,)


def _octets(call: Call) -> object:
    return bytes(call.data)


def _text(call: Call) -> object:
    charset = parameter(call.content_type, "charset") or "utf-8"
    try:
        return str(call.data, codec_of(charset))
    except LookupError:
        raise Refused("unsupported-media-type", f"the charset {charset[:_QUOTED]!r} is not known") from None
    except UnicodeDecodeError as error:
        raise Refused("wrong-body", f"the body is not text in {charset}: {error.reason}") from None


def _json_decoder(decoder: msgspec.json.Decoder[Any]) -> Callable[[Call], object]:
    def decode(call: Call) -> object:
        try:
            return decoder.decode(call.data)
        except msgspec.ValidationError as error:
            raise Refused("wrong-body", str(error)) from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise Refused("not-json", f"the body is not valid JSON: {error}") from None

    return decode


def _pydantic(validate: Callable[[bytes], object]) -> Callable[[Call], object]:
    def decode(call: Call) -> object:
        try:
            return validate(bytes(call.data))
        except ValueError as error:  # pydantic's is one
            errors: list[Any] = getattr(error, "errors", list)()
            if not errors:
                raise
            first = errors[0]
            if first["type"] == "json_invalid":
                raise Refused("not-json", f"the body is not valid JSON: {first['msg']}") from None
            place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
            raise Refused("wrong-body", f"{first['msg']} - at `${place}`") from None

    return decode


# Answers


def _answer_type(kind: Any) -> tuple[dict[str, Any] | None, str]:
    """Return the JSON schema of an answer's type if it has one, and its content type, "" if it varies."""
    if kind is str:
        return None, TEXT
    if kind is bytes:
        return None, OCTETS
    if kind is Response:
        return None, ""
    schema = getattr(kind, "model_json_schema", None)
    if schema is not None:
        return schema(ref_template=_PYDANTIC_REFERENCE), JSON
    try:
        return msgspec.json.schema(kind, ref_template=_REFERENCE), "" if kind is Any else JSON
    except TypeError:  # of other types it is known when they are encoded
        return None, ""


def encoded(answer: object) -> tuple[str, bytes]:
    """Return the content type and the bytes of an answer. Raises TypeError if it cannot be encoded."""
    match answer:
        case Response():
            return answer.content_type, bytes(answer.data)
        case str():
            return f"{TEXT}; charset=utf-8", answer.encode()
        case bytes() | bytearray() | memoryview():
            return OCTETS, bytes(answer)
    return JSON, _json(answer)


def event_text(item: object) -> bytes:
    """Return an item of a stream: text as it is, all else as JSON."""
    return item.encode() if isinstance(item, str) else _json(item)


def _json(value: object) -> bytes:
    dump = getattr(value, "model_dump_json", None)  # of pydantic
    if dump is not None:
        text = dump()
        return text.encode() if isinstance(text, str) else b""
    return msgspec.json.encode(value, enc_hook=_enc_hook)


def _enc_hook(value: object) -> object:
    """Encode pydantic models inside of others, and NumPy's arrays and numbers."""
    for name in ("model_dump", "tolist"):
        dump = getattr(value, name, None)
        if dump is not None:
            return dump()
    raise TypeError(f"{type(value).__name__} cannot be encoded as JSON")
