"""An OpenAI-compatible server on 127.0.0.1 for the tests: answers are made up from what is asked, and it can misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatStub

    def log_message(self, *args: Any) -> None:
        pass

    def send(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.send({"data": [{"id": "the-target"}]} if self.path == "/v1/models" else {}, 200)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub, question = self.server, body["messages"][-1]["content"]
        with stub.lock:
            stub.requests.append({**body, "key": self.headers.get("Authorization")})
            stub.running += 1
            stub.most = max(stub.most, stub.running)
            status = stub.failures.pop(0) if stub.failures else 200
        time.sleep(stub.seconds)
        with stub.lock:
            stub.running -= 1
        if len(question) > stub.longest:
            status = 400
        if status != 200:
            self.send({"error": {"message": "no"}}, status)
            return
        finished = "ten" not in question
        message = {
            "role": "assistant",
            "content": f"{body['temperature']}: {question}" + ("" if finished else "\ufffd"),
        }
        usage = {"prompt_tokens": len(question), "completion_tokens": 7}
        choice = {"index": 0, "message": message, "finish_reason": "stop" if finished else "length"}
        self.send({"object": "chat.completion", "choices": [choice], "usage": usage})


class ChatStub(ThreadingHTTPServer):
    """The server.

    Attributes:
        requests: bodies of all requests, and the Authorization header as `key`.
        failures: statuses that the next requests are answered with.
        seconds: how long an answer takes.
        longest: characters of a question; longer ones are rejected.
        most: the most requests that were on their way at once.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.requests, self.failures = threading.Lock(), [], []
        self.seconds, self.longest, self.running, self.most = 0.0, 10_000, 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def running_chat() -> Iterator[ChatStub]:
    """A server that answers while the block runs."""
    server = ChatStub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
