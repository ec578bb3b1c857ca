"""The request headers of the native resource: Prefer (RFC 7240) and Idempotency-Key.

The native resource: POST /v1/models/NAME/predictions, and the predictions themselves.

A request that waits for its prediction gets the object, or the problem that came of it with the object as
its member `prediction`. GET and DELETE of a prediction answer 200 with the object whatever is in it.

A client that leaves cancels what it waited for, unless that is kept: one that sent an Idempotency-Key
is about to ask again.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch.batcher.errors import BatcherError
from cobatch.batcher.tenant import Tenant
from cobatch.server.api.routing import as_response, find, guarded
from cobatch.server.auth.principal import principal_in, subject_in
from cobatch.server.edge.exchange import record_in
from cobatch.server.http.body import BodyError, read_body
from cobatch.server.http.compression import compressed
from cobatch.server.http.problem import Problem, from_error, stopping
from cobatch.server.http.reply import JSON, Reply
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
from cobatch.server.predictions import decode as v1_decode
from cobatch.server.predictions.content import fingerprint, read_content
from cobatch.server.predictions.encode import Answer
from cobatch.server.predictions.store import Prediction, Predictions

_MOST_KEY = 255


class Preferences(NamedTuple):
    """What the client would like: an answer at once and the result later; seconds to wait for it."""

    respond_async: bool
    wait_s: int | None


def preferences(request: Request) -> Preferences:
    """Preferences that are unknown or malformed are passed over, as the RFC asks; of two, the first holds."""
    found: dict[str, str] = {}
    for header in request.headers.getlist("prefer"):
        # No preference that is known here has a comma or a semicolon in its value.
        for item in header.split(","):
            name, _, value = item.partition(";")[0].partition("=")
            found.setdefault(name.strip().lower(), value.strip().strip('"'))
    wait = found.get("wait", "")
    wait_s = int(wait) if wait.isascii() and wait.isdigit() and len(wait) < 10 else None
    return Preferences("respond-async" in found, wait_s)


def idempotency_key(request: Request) -> str | None:
    """The key, as opaque text, or None. Raises Problem where it is none."""
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    key = keys[0]
    if len(keys) > 1 or not 1 <= len(key) <= _MOST_KEY or not all(" " <= char <= "~" for char in key):
        raise Problem(
            "bad-parameter",
            f"Idempotency-Key must be one value of 1 to {_MOST_KEY} printable ASCII characters",
            parameter="Idempotency-Key",
        )
    return key


class _LeftError(Exception):
    """The client has left; nobody reads what is answered."""


def v1_routes(core: Inference) -> list[Route]:
    """All of them, for Starlette."""
    resource = _Resource(core)

    async def one(request: Request) -> Response:
        return await (resource.delete if request.method == "DELETE" else resource.get)(request)

    # One route for both methods, so that the 405 for others names both.
    return [
        Route("/v1/models/{name}/predictions", guarded(core, "infer", resource.post), methods=["POST"]),
        Route("/v1/predictions/{id}", guarded(core, "known", one), methods=["GET", "DELETE"]),
    ]


class _Resource:
    """The endpoints, and the predictions that they keep."""

    def __init__(self, core: Inference) -> None:
        self._core = core
        self._settings = core.settings.server
        self._kept = Predictions(core.settings.server)

    async def post(self, request: Request) -> Response:
        """Make a prediction, or join the one that the same Idempotency-Key has made."""
        model = find(self._core, request)
        subject = subject_in(request.scope)
        principal = principal_in(request.scope)
        tenant = None if principal is None else principal.tenant
        prefers = preferences(request)
        key = idempotency_key(request)
        if key is None or not self._kept.has_key(subject, key):
            self._check_open(model, tenant)
            if key is not None or prefers.respond_async:
                self._kept.check_room(0)
        try:
            headers = dict(request.headers.raw)
            body = await read_body(headers, request.receive, self._settings.max_body_bytes)
        except BodyError as error:
            if error.problem is None:
                return _nobody_reads_this()
            raise error.problem from None
        content = read_content(request, body)
        idempotency = None
        if key is not None:
            idempotency = key, await fingerprint(request.url.path, content)
        # No await from here until the prediction is kept: two requests with one key must not both start.
        prediction = None
        if idempotency is not None:
            prediction = self._kept.join(subject, *idempotency)
        if prediction is None:
            # Asked again: while the body came others may have come too, or the end.
            self._check_open(model, tenant)
            decoded = v1_decode.decode(content, model.decoder)
            prediction = Prediction(subject, model, decoded, tenant, record_in(request.scope))
            self._start(prediction, decoded.bytes, idempotency, keep=prefers.respond_async or key is not None)
        if prefers.respond_async:
            return await self._respond_later(request, prediction, prefers)
        return await self._respond(request, prediction)

    async def get(self, request: Request) -> Response:
        """The prediction as it is now, or as it is once it is finished or the wait is over."""
        prediction = self._find(request)
        prefers = preferences(request)
        if prefers.wait_s is None:
            return await self._object(request, prediction)
        wait_s = min(prefers.wait_s, self._settings.max_wait_s)
        try:
            await _answer(request, prediction, wait_s)
        except _LeftError:
            return _nobody_reads_this()
        return await self._object(request, prediction, _applied(f"wait={wait_s:g}"))

    async def delete(self, request: Request) -> Response:
        """Cancel it, if it is not finished."""
        prediction = self._find(request)
        prediction.cancel()
        return await self._object(request, prediction)

    def _find(self, request: Request) -> Prediction:
        return self._kept.find(request.path_params["id"], subject_in(request.scope))

    def _check_open(self, model: Model, tenant: Tenant | None) -> None:
        if self._core.draining:
            raise stopping()
        problem = model.refusal(tenant)
        if problem is not None:
            raise problem

    def _start(
        self, prediction: Prediction, tensor_bytes: int, idempotency: tuple[str, bytes] | None, *, keep: bool
    ) -> None:
        """Submit it. Where that fails nothing is kept, the key neither."""
        if keep:
            self._kept.check_room(tensor_bytes)
        try:
            prediction.submit()
        except BatcherError as error:
            raise from_error(error) from None
        if keep:
            self._kept.keep(prediction, tensor_bytes, idempotency)

    async def _respond(self, request: Request, prediction: Prediction) -> Response:
        """The answer to a request that waits for it."""
        try:
            answer = await _answer(request, prediction, None)
        except _LeftError:
            self._leave(prediction)
            return _nobody_reads_this()
        except asyncio.CancelledError:
            # The server ends this request.
            self._leave(prediction)
            raise
        assert answer is not None
        return await self._final(request, answer)

    async def _respond_later(
        self, request: Request, prediction: Prediction, prefers: Preferences
    ) -> Response:
        """202 and where to look; or the answer, where it came within the time that the client gave."""
        if prefers.wait_s is not None:
            wait_s = min(prefers.wait_s, self._settings.max_wait_s)
            try:
                answer = await _answer(request, prediction, wait_s)
            except _LeftError:
                return _nobody_reads_this()
            if answer is not None:
                return await self._final(request, answer, _applied(f"wait={wait_s:g}"))
        location = f"{request.scope.get('root_path', '')}/v1/predictions/{prediction.id}"
        headers = ((b"location", location.encode()), _applied("respond-async"))
        return as_response(Reply(202, JSON, (prediction.text,), headers=headers))

    def _leave(self, prediction: Prediction) -> None:
        if prediction.on_answer is None:
            prediction.cancel()

    async def _final(self, request: Request, answer: Answer, *headers: tuple[bytes, bytes]) -> Response:
        if answer.problem is not None:
            return as_response(answer.problem.reply(*headers, instance=request.url.path))
        return await self._send(
            request, Reply(200, JSON, (answer.text,), timing=answer.timing, headers=headers)
        )

    async def _object(
        self, request: Request, prediction: Prediction, *headers: tuple[bytes, bytes]
    ) -> Response:
        """The object as it is now. It moves on, and it is one subject's: nobody may store it."""
        headers += ((b"cache-control", b"no-store"),)
        return await self._send(request, Reply(200, JSON, (prediction.text,), headers=headers))

    async def _send(self, request: Request, reply: Reply) -> Response:
        accept = request.headers.get("accept-encoding", "").encode("latin-1")
        return as_response(await compressed(reply, accept, self._settings.compress_min_bytes))


async def _answer(request: Request, prediction: Prediction, timeout_s: float | None) -> Answer | None:
    """The answer once it is there, None if the time is over before. Raises _LeftError."""
    answered = prediction.answered
    if answered is None:
        return prediction.answer
    # After the body, all that `receive` has to say is that the client left.
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((answered, left), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if answered.done():
            return answered.result()
        if left.done():
            raise _LeftError
        return None
    finally:
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _applied(preference: str) -> tuple[bytes, bytes]:
    return b"preference-applied", preference.encode()


def _nobody_reads_this() -> Response:
    return Response()
