"""Asks an OpenAI-compatible server (vLLM, SGLang, llama.cpp) for answers, many requests in flight.

A request that fails for reasons that pass (no connection, a busy server) is tried again after a while; one that the server
rejects is handed back as rejected. What is asked, and what becomes of the answers, is `regenerate.py`'s.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from confu_hf.errors import refusal

PASSING = {408, 425, 429, 500, 502, 503, 504}
TRIES = 6


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to answer; `key` comes back with the answer. A temperature of 0 is greedy."""

    key: int
    messages: list[dict[str, str]]
    temperature: float
    seed: int


@dataclass(frozen=True)
class ChatAnswer:
    """`text` is None where the server rejected the request, for `reason`; `finished` says that it was not cut off."""

    key: int
    text: str | None
    finished: bool = False
    prompt_tokens: int | None = None
    new_tokens: int = 0
    reason: str = ""


class ChatServer:
    """A server's chat completions.

    Args:
        url: up to `/v1`.
        model: a name that it serves; None = the first one.
        max_new_tokens, top_k: of every answer; `top_k=0` means all tokens.
        api_key: sent as the bearer token.
        first_wait: seconds before a failed request is tried again; doubled from then on.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        max_new_tokens: int = 192,
        top_k: int = 0,
        api_key: str | None = None,
        timeout: float = 600.0,
        first_wait: float = 1.0,
    ) -> None:
        self.url, self.timeout, self.first_wait = url.rstrip("/"), timeout, first_wait
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.settings: dict[str, Any] = {"max_tokens": max_new_tokens} | ({"top_k": top_k} if top_k else {})
        self.model = model or self._call("/models")["data"][0]["id"]

    def answers(self, requests: Iterable[ChatRequest], in_flight: int) -> Iterator[ChatAnswer]:
        """Answers as they come, never more than `in_flight` requests on their way."""
        requests = iter(requests)
        pool = ThreadPoolExecutor(in_flight)
        try:
            running: set[Future[ChatAnswer]] = set()
            while True:
                for request in requests:
                    running.add(pool.submit(self.answer, request))
                    if len(running) == in_flight:
                        break
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def answer(self, request: ChatRequest) -> ChatAnswer:
        """The answer to one request."""
        body = {"model": self.model, "messages": request.messages, "temperature": request.temperature}
        try:
            result = self._call("/chat/completions", {**body, "seed": request.seed, **self.settings})
        except urllib.error.HTTPError as error:
            if error.code not in (400, 413, 422):
                raise self._failure(error) from error
            return ChatAnswer(request.key, None, reason=f"HTTP {error.code}")
        choice, usage = result["choices"][0], result.get("usage") or {}
        return ChatAnswer(
            request.key,
            choice["message"]["content"] or "",
            finished=choice.get("finish_reason") == "stop",
            prompt_tokens=usage.get("prompt_tokens"),
            new_tokens=usage.get("completion_tokens") or 0,
        )

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(TRIES):
            try:
                call = urllib.request.Request(self.url + path, data, self.headers)
                with urllib.request.urlopen(call, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code not in PASSING or attempt == TRIES - 1:
                    raise
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                if attempt == TRIES - 1:
                    raise self._failure(error) from error
            time.sleep(self.first_wait * 2**attempt)
        raise AssertionError("the last try returned or raised")

    def _failure(self, error: Exception) -> ConnectionError:
        return refusal(
            f"The server {self.url}",
            got=f"{type(error).__name__}: {error}",
            expected="answers of /chat/completions",
            fix="See that it runs and that --server ends with /v1; then start the same command again.",
            error=ConnectionError,
        )
