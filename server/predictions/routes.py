"""The native resource: POST /v1/models/NAME/predictions, and the predictions themselves.

A request that waits for its prediction gets the object, or else its problem, with the object as the member
`prediction`. GET and DELETE of a prediction answer 200 with the object in any state.

A client that disconnects cancels the prediction that it waits for, unless it is kept: a client that sent an
Idempotency-Key is about to ask again.
"""

import asyncio
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch.batcher.errors import BatcherError
from cobatch.server.api.routing import as_response, compressed_response, find, guarded
from cobatch.server.auth.principal import principal_in, subject_in
from cobatch.server.edge.exchange import EXCHANGE, client_in, record_in
from cobatch.server.http.asgi import read_body
from cobatch.server.http.body import Body
from cobatch.server.http.problem import Problem, from_error
from cobatch.server.http.reply import JSON, Reply
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
from cobatch.server.predictions.content import check_json, fingerprint, is_binary, read_content
from cobatch.server.predictions.decode import Decoded, decode
from cobatch.server.predictions.encode import Answer
from cobatch.server.predictions.store import Prediction, PredictionStore
from cobatch.server.v2.pieces import in_pieces

# Longer bodies are decoded in a thread.
_SHORT_BYTES = 1 << 14
_MAX_KEY_LENGTH = 255
_KEY = re.compile(rf"[ -~]{{1,{_MAX_KEY_LENGTH}}}")
Header = tuple[bytes, bytes]
# An Idempotency-Key and the digest of its request.
Idempotency = tuple[str, bytes]
_T = TypeVar("_T")


class Preferences(NamedTuple):
    """The header Prefer (RFC 7240): a response before the result, and seconds to wait for the result."""

    respond_async: bool
    wait_s: float | None


def preferences(request: Request, max_wait_s: float) -> Preferences:
    """Unknown and malformed preferences are ignored, as the RFC asks; of two equal ones the first counts."""
    given: dict[str, str] = {}
    for header in request.headers.getlist("prefer"):
        # No preference that is known here has a comma or a semicolon in its value.
        for item in header.split(","):
            name, _, value = item.partition(";")[0].partition("=")
            given.setdefault(name.strip().lower(), value.strip().strip('"'))
    wait = given.get("wait", "")
    wait_s = min(int(wait), max_wait_s) if wait.isascii() and wait.isdigit() and len(wait) < 10 else None
    return Preferences("respond-async" in given, wait_s)


def idempotency_key(request: Request) -> str | None:
    """The key, as opaque text, or None. Raises Problem for an invalid one."""
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
        detail = f"Idempotency-Key must be one value of 1 to {_MAX_KEY_LENGTH} printable ASCII characters"
        raise Problem("bad-parameter", detail, parameter="Idempotency-Key")
    return keys[0]


def v1_routes(inference: Inference) -> list[Route]:
    """All of them, for Starlette."""
    resource = _Resource(inference)

    # One route for both methods, so that the 405 for others names both.
    return [
        Route("/v1/models/{name}/predictions", guarded(inference, "infer", resource.post), methods=["POST"]),
        Route("/v1/predictions/{id}", guarded(inference, "known", resource.one), methods=["GET", "DELETE"]),
    ]


class _Resource:
    """The endpoints, and the predictions that they keep."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._settings = inference.settings.server
        self._kept = PredictionStore(inference.settings.server)

    async def post(self, request: Request) -> Response:
        """Make a prediction, or join the one that the same Idempotency-Key has made."""
        model = find(self._inference, request)
        principal = principal_in(request.scope)
        subject = subject_in(request.scope)
        prefers = preferences(request, self._settings.max_wait_s)
        key = idempotency_key(request)
        keep = prefers.respond_async or key is not None
        if key is None or not self._kept.has_key(subject, key):
            self._inference.check(model, principal)
            if keep:
                self._kept.check_room(0)
        headers = dict(request.headers.raw)
        limit = self._settings.max_body_bytes if is_binary(request) else self._inference.max_json_bytes
        body = await read_body(headers, request.receive, limit, request.scope[EXCHANGE])
        content = await self._decode(body, partial(read_content, request, body))
        idempotency = None if key is None else (key, await fingerprint(request.url.path, content))
        prediction = None if idempotency is None else self._kept.join(subject, *idempotency)
        if prediction is None:
            # Asked again: other requests came while the body did.
            self._inference.check(model, principal)
            check_json(content, self._inference.max_json_bytes)
            decoded = await self._decode(body, partial(decode, content, model.decoder))
            # No await until the prediction is kept: of two requests with one key, only one may start.
            prediction = None if idempotency is None else self._kept.join(subject, *idempotency)
        if prediction is None:
            prediction = self._start(request, model, decoded, idempotency, keep=keep)
        if prefers.respond_async:
            return await self._respond_later(request, prediction, prefers.wait_s)
        try:
            answer = await _answer(request, prediction)
        except (ClientDisconnect, asyncio.CancelledError):
            # The latter where the server ends this request.
            if not prediction.kept:
                prediction.cancel()
            raise
        assert answer is not None
        return await self._final(request, answer)

    async def one(self, request: Request) -> Response:
        """GET: return the prediction now, or when it is finished or the wait is over. DELETE: cancel it."""
        prediction = self._kept.find(request.path_params["id"], subject_in(request.scope))
        # Caches must not store the object: it changes, and is one subject's.
        headers: tuple[Header, ...] = ((b"cache-control", b"no-store"),)
        if request.method == "DELETE":
            prediction.cancel()
        elif (wait_s := preferences(request, self._settings.max_wait_s).wait_s) is not None:
            await _answer(request, prediction, wait_s)
            headers = (_applied(f"wait={wait_s:g}"), *headers)
        reply = Reply(200, JSON, prediction.pieces, headers=headers)
        return await compressed_response(self._inference, request, reply)

    async def _decode(self, body: Body, decode: Callable[[], _T]) -> _T:
        """Decode in a thread if the body is long."""
        return await in_pieces(decode) if len(body) > _SHORT_BYTES else decode()

    def _start(
        self, request: Request, model: Model, decoded: Decoded, idempotency: Idempotency | None, *, keep: bool
    ) -> Prediction:
        """Submit a prediction. If that fails, nothing is kept, nor is the key."""
        principal = principal_in(request.scope)
        tenant = None if principal is None else principal.tenant
        tensor_bytes = decoded.bytes
        if keep:
            self._kept.check_room(tensor_bytes)
        scope = request.scope
        prediction = Prediction(subject_in(scope), model, decoded, tenant, record_in(scope), client_in(scope))
        try:
            prediction.submit()
        except BatcherError as error:
            raise from_error(error) from None
        if keep:
            self._kept.keep(prediction, tensor_bytes, idempotency)
        return prediction

    async def _respond_later(
        self, request: Request, prediction: Prediction, wait_s: float | None
    ) -> Response:
        """202 and the object's location; or the answer, where it came within the client's wait."""
        if wait_s is not None:
            answer = await _answer(request, prediction, wait_s)
            if answer is not None:
                return await self._final(request, answer, _applied(f"wait={wait_s:g}"))
        location = f"{request.scope.get('root_path', '')}/v1/predictions/{prediction.id}"
        headers = ((b"location", location.encode()), _applied("respond-async"))
        return as_response(Reply(202, JSON, prediction.pieces, headers=headers))

    async def _final(self, request: Request, answer: Answer, *headers: Header) -> Response:
        if answer.problem is not None:
            return as_response(answer.problem.reply(*headers, instance=request.url.path))
        reply = Reply(200, JSON, answer.pieces, timing=answer.timing, headers=headers)
        return await compressed_response(self._inference, request, reply)


async def _answer(request: Request, prediction: Prediction, timeout_s: float | None = None) -> Answer | None:
    """The prediction's answer, or None after the timeout. Raises ClientDisconnect."""
    answered = prediction.answered
    if answered is None:
        return prediction.answer
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answered, disconnected), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if answered.done():
            return answered.result()
        if disconnected.done():
            raise ClientDisconnect
        return None
    finally:
        disconnected.cancel()


async def _disconnected(request: Request) -> None:
    """Wait for the client to disconnect: the only message after the body."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _applied(preference: str) -> Header:
    return b"preference-applied", preference.encode()
