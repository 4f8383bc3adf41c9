"""An OpenAI-compatible router: sends images and videos to encoder instances, then the request to a language model.

Run `python router.py --encoder URL --language-model URL`, with each option once per instance and URLs without `/v1`.
"""

import asyncio
import hashlib
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

import httpx
import typer
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TEXT = frozenset({"text", "input_text", "output_text", "refusal", "thinking", "tool_reference"})
MEDIA = {"image_url": "image", "input_image": "image", "video_url": "video"}
SHAPING = ("mm_processor_kwargs", "media_io_kwargs")
"""Fields of a request that change an item's embedding, and so its identifier, which both sides must agree on."""
INTERNAL = ("ec_transfer_params", "kv_transfer_params")
"""Fields that tell vLLM instances with whom they exchange tensors. Clients must not set them."""
PASSED_ON = ("authorization", "traceparent", "x-request-id")
JSON = {"content-type": "application/json"}
UNAVAILABLE = (502, 503, 504)
CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"

T = TypeVar("T")
log = logging.getLogger("uvicorn.error")


class RefusedError(Exception):
    """Ends a request with a status and a message for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Pool:
    """Instances of one kind, tried in turn. One that could not be reached is tried last for a while."""

    def __init__(self, kind: str, urls: Sequence[str], pause: float = 5.0) -> None:
        self.kind, self.urls, self.pause = kind, [url.rstrip("/") for url in urls], pause
        self._turns = itertools.count()
        self._rests_until: dict[str, float] = {}

    def order(self, content: str | None = None) -> list[str]:
        """Return all instances in the order to try them. The same `content` always gets the same order."""
        if content is None:
            first = next(self._turns) % len(self.urls)
            order = self.urls[first:] + self.urls[:first]
        else:
            order = sorted(self.urls, key=lambda url: hashlib.sha256(f"{url} {content}".encode()).digest())
        now = time.monotonic()
        return sorted(order, key=lambda url: self._rests_until.get(url, now) > now)

    def unreachable(self, url: str, reason: object) -> None:
        log.warning("%s: %s cannot be reached: %s", self.kind, url, reason)
        self._rests_until[url] = time.monotonic() + self.pause


class Router:
    """Answers clients. Its only state is whose turn it is and which instances are unreachable."""

    def __init__(self, encoders: Pool, language_models: Pool, client: httpx.AsyncClient, *, affinity: bool) -> None:
        self.encoders, self.language_models, self.client, self.affinity = encoders, language_models, client, affinity

    async def chat(self, request: Request) -> Response:
        """Encode each item of the request, then forward it to a language model. The answer may be streamed."""
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        try:
            body = _parse(await request.body())
            items = _media(body)
            where = await _while_connected(request, self._encode_all(items, body, headers))
            # Serialised again, so that instances read exactly what was checked here.
            content = json.dumps(body | ({"ec_transfer_params": where} if where else {})).encode()
            return await _while_connected(request, self._forward("POST", CHAT, content, headers))
        except RefusedError as refusal:
            error = {"message": str(refusal), "type": "router_error", "param": None, "code": refusal.status}
            return JSONResponse({"error": error}, refusal.status)

    async def models(self, request: Request) -> Response:
        """Return the models of the first language-model instance that answers."""
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        try:
            return await self._forward("GET", MODELS, b"", headers)
        except RefusedError as refusal:
            return JSONResponse({"error": {"message": str(refusal), "code": refusal.status}}, refusal.status)

    async def health(self, _: Request) -> Response:
        """Return status 200 while at least one instance of each kind is healthy."""
        found = {}
        for pool in (self.encoders, self.language_models):
            healthy = sum(await asyncio.gather(*map(self._is_healthy, pool.urls)))
            found[pool.kind] = {"healthy": healthy, "of": len(pool.urls)}
        return JSONResponse(found, 200 if all(counts["healthy"] for counts in found.values()) else 503)

    async def _is_healthy(self, url: str) -> bool:
        try:
            return (await self.client.get(url + HEALTH, timeout=5)).status_code == 200
        except httpx.TransportError:
            return False

    async def _encode_all(
        self, items: list[dict[str, Any]], body: dict[str, Any], headers: dict[str, str]
    ) -> dict[str, Any]:
        """Have all items encoded. Return where the embeddings are, if a consumer needs to know."""
        different: dict[str, int] = {}
        for number, item in enumerate(items):
            different.setdefault(json.dumps(item, sort_keys=True), number)
        tasks = []
        for content, number in different.items():
            name = f"{MEDIA[items[number]['type']]} {number + 1} of {len(items)}"
            own = {key: f"{value}-{number}" if key == "x-request-id" else value for key, value in headers.items()}
            tasks.append(asyncio.ensure_future(self._encode(items[number], content, name, body, own)))
        try:
            answers = await asyncio.gather(*tasks)
        finally:  # the first error ends the request, so cancel what still runs
            for task in tasks:
                task.cancel()
        # Connectors that fetch from the encoder return its address; those with shared storage need none.
        return {name: place for answer in answers for name, place in answer.items() if "peer_host" in place}

    async def _encode(
        self, item: dict[str, Any], content: str, name: str, body: dict[str, Any], headers: dict[str, str]
    ) -> dict[str, Any]:
        """Have one item encoded; if an instance cannot be reached, try the next."""
        wanted = {field: body[field] for field in ("model", *SHAPING) if field in body}
        question = {"messages": [{"role": "user", "content": [item]}], "max_tokens": 1, "stream": False, **wanted}
        broken = False
        for url in self.encoders.order(content if self.affinity else None):
            try:
                answer = await self.client.post(url + CHAT, json=question, headers=headers)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                self.encoders.unreachable(url, repr(error))
            except httpx.TransportError as error:
                self.encoders.unreachable(url, repr(error))
                if broken:  # do not try an item that may have crashed two instances on a third
                    raise RefusedError(502, f"{name}: two encoder instances broke off while encoding it.") from error
                broken = True
            else:
                if answer.status_code == 200:
                    return answer.json().get("ec_transfer_params") or {}
                if answer.status_code not in UNAVAILABLE:
                    raise RefusedError(answer.status_code, f"{name} could not be encoded: {_message(answer)}")
                self.encoders.unreachable(url, f"status {answer.status_code}")
        raise RefusedError(503, f"{name}: no encoder instance can be reached; try again later.")

    async def _forward(self, method: str, path: str, content: bytes, headers: dict[str, str]) -> Response:
        """Forward a request to a language-model instance and stream its answer with any status."""
        for url in self.language_models.order():
            try:
                sent = self.client.build_request(method, url + path, content=content, headers=JSON | headers)
                answer = await self.client.send(sent, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                self.language_models.unreachable(url, repr(error))
            except httpx.TransportError as error:
                self.language_models.unreachable(url, repr(error))
                raise RefusedError(502, "the language-model instance broke off before it answered.") from error
            else:
                kind = answer.headers.get("content-type", "application/json")
                return StreamingResponse(_relay(answer), answer.status_code, {"content-type": kind})
        raise RefusedError(503, "no language-model instance can be reached; try again later.")


def _parse(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError as error:
        raise RefusedError(400, f"the request is not JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise RefusedError(400, "the request must be a JSON object with a list of messages.")
    for field in INTERNAL:
        if body.get(field) is not None:
            raise RefusedError(400, f"{field} is reserved for the instances; clients must not set it.")
    return body


def _media(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the images and videos of a request. Refuse kinds of content that are not known to be harmless.

    Embeddings would reach the language model unchecked. A `uuid` would become the item's identifier, under which a
    different client's item may be stored, and part of a path in a shared folder. Also, vLLM reads a part that has a
    `uuid` by its keys and not by its type.
    """
    items = []
    for message in body["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        if content is not None and not isinstance(content, str | list):
            raise RefusedError(400, "the content of a message must be text or a list of parts.")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, str):
                continue
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str) or kind not in TEXT | MEDIA.keys():
                raise RefusedError(400, f"content of type {kind!r} is not accepted; text, image_url and video_url are.")
            if part.get("uuid") is not None:
                raise RefusedError(400, "content with a uuid is not accepted.")
            if kind in MEDIA:
                items.append(part)
    return items


def _message(answer: httpx.Response) -> str:
    """Return the message of an instance's error."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


async def _relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_bytes():
            yield chunk
    finally:
        await answer.aclose()


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`. If the client disconnects, cancel it and the requests that it made."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RefusedError(499, "the client closed the connection.")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def make_app(
    encoders: Sequence[str],
    language_models: Sequence[str],
    *,
    affinity: bool = False,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Starlette:
    """Make the router as an ASGI application.

    Args:
        encoders: Base URLs of encoder instances, without `/v1`.
        language_models: Base URLs of language-model instances.
        affinity: Always send the same image to the same encoder, instead of to each in turn.
        transport: How instances are reached; for tests.
    """
    # Instances limit concurrency and duration themselves. Idle connections close before vLLM closes them (5 s).
    limits, timeout = httpx.Limits(max_connections=None, keepalive_expiry=2.0), httpx.Timeout(None, connect=3.0)
    client = httpx.AsyncClient(transport=transport, limits=limits, timeout=timeout, trust_env=False)
    router = Router(Pool("encoders", encoders), Pool("language_models", language_models), client, affinity=affinity)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    routes = [
        Route(CHAT, router.chat, methods=["POST"]),
        Route(MODELS, router.models),
        Route(HEALTH, router.health),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def main(
    encoder: Annotated[list[str], typer.Option(help="URL of an encoder instance; repeat for more.")],
    language_model: Annotated[list[str], typer.Option(help="URL of a language-model instance; repeat for more.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    affinity: Annotated[bool, typer.Option(help="Always send the same image to the same encoder.")] = False,
) -> None:
    """Route chat completions between encoder and language-model instances of vLLM."""
    uvicorn.run(make_app(encoder, language_model, affinity=affinity), host=host, port=port)


if __name__ == "__main__":
    typer.run(main)
