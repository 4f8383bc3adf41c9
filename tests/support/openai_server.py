"""A server on loopback that answers chats as vLLM streams them, for tests of what asks it."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

__all__ = ["answering"]


class _Server(ThreadingHTTPServer):
    """Keeps what it was asked; fails as it is told."""

    daemon_threads = True
    asked: list[dict[str, Any]]
    token_seconds: float
    fail: str | None


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        models = (
            [] if self.server.fail == "models" else [{"id": "small", "object": "model", "created": 0, "owned_by": "x"}]
        )
        self._json(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        has_image = not isinstance(asked["messages"][0]["content"], str)
        fail = self.server.fail if has_image else None
        if fail == "refuse":
            self._json(400, {"error": {"message": "image 1 of the prompt could not be encoded", "code": 400}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self._chunk({"role": "assistant", "content": ""})
        if fail == "break off":
            self._event({"error": {"message": "the engine is gone", "code": 500}})
            return
        if fail != "nothing":
            for _ in range(asked["max_tokens"]):
                time.sleep(self.server.token_seconds)
                self._chunk({"content": ""})
        usage = {"prompt_tokens": 5, "completion_tokens": asked["max_tokens"], "total_tokens": 5 + asked["max_tokens"]}
        self._event({**_EMPTY, "choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def _chunk(self, delta: dict[str, str]) -> None:
        self._event({**_EMPTY, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


_EMPTY = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "small"}


@contextmanager
def answering(token_seconds: float = 0.002, fail: str | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server while the context lasts.

    Args:
        token_seconds: Seconds of each token.
        fail: What happens to requests with an image: `refuse`, `break off` or `nothing` (no token); or `models`, for a
            server without a model.

    Yields:
        Its base URL, and the requests it got so far.
    """
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.asked, server.token_seconds, server.fail = [], token_seconds, fail
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", server.asked
        finally:
            server.shutdown()
            thread.join()
