"""Requests for POST /batch, and their answers."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support.http.in_process import InProcess
from tests.support.http.serving import GATE, rows_of


def infer(number: int, *rows: int, **more: Any) -> dict[str, Any]:
    """Return an infer item for `gate`; its only row is `number` by default."""
    return {"id": f"i{number}", "url": GATE, "method": "POST", "body": rows_of(*rows or (number,)), **more}


def get(url: str, **more: Any) -> dict[str, Any]:
    return {"id": url, "url": url, "method": "GET", **more}


async def ask(running: InProcess, *items: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    """Return the responses of a batch that was accepted as a whole."""
    response = await running.http.post("/batch", json={"requests": items}, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    responses: list[dict[str, Any]] = response.json()["responses"]
    assert [each["id"] for each in responses] == [item["id"] for item in items]
    for each in responses:
        if each["status"] >= 400:
            slug(each)
    return responses


def slug(answer: dict[str, Any] | httpx.Response) -> str:
    """Return the kind of problem of an item's answer or a whole answer."""
    if isinstance(answer, httpx.Response):
        answer = {
            "status": answer.status_code,
            "headers": dict(answer.headers),
            "body": answer.json(),
        }
    assert answer["headers"]["content-type"] == "application/problem+json"
    assert answer["body"]["status"] == answer["status"]
    kind: str = answer["body"]["type"]
    return kind.removeprefix("/problems/")


def data(answer: dict[str, Any]) -> Any:
    assert answer["status"] == 200, answer
    return answer["body"]["outputs"][0]["data"]
