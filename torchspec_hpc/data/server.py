"""Answers of a server that speaks OpenAI's protocol."""

from __future__ import annotations

import http.client
import json
import queue
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torchspec_hpc.data.answerers import Answer, AnswerSettings, Tools
from torchspec_hpc.data.messages import REASONING_KEYS, Message

#: Of a request; the wait doubles with each.
_TRIES, _RETRY_S = 4, 2.0
#: Statuses below 500 that a later try may not get: too slow, too many requests.
_TRY_AGAIN = (408, 429)


class Server:
    """A server with ``/v1/chat/completions``.

    Args:
        url: Of the server, e.g. ``http://node:8000``.
        settings: Of the answers.
        api_key: Sent as a bearer token; empty: none.
        timeout_s: A try without an answer for so long has failed.
    """

    def __init__(
        self, url: str, settings: AnswerSettings, api_key: str = "", timeout_s: float = 600.0
    ) -> None:
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        self._settings, self._api_key, self._timeout_s = settings, api_key, timeout_s
        self._pool = ThreadPoolExecutor(settings.concurrency, "ask")
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._num_tokens = 0

    def submit(self, request: str, messages: list[Message], tools: Tools) -> bool:
        """Asks; a prompt without room comes back as an error of the server."""
        body: dict[str, Any] = self._settings.provenance() | {"messages": list(messages)}
        del body["keep_loops"]
        if not body["chat_template_kwargs"]:  # vLLM and SGLang know them, others may not
            del body["chat_template_kwargs"]
        body |= {"tools": tools} if tools else {}
        self._pool.submit(self._ask, request, body)
        return True

    def collect(self) -> list[Answer]:
        """Waits for one answer and takes all that are there."""
        answers = [self._answers.get()]
        while not self._answers.empty():
            answers.append(self._answers.get())
        return answers

    def speed(self, seconds: float) -> str:
        """Tokens/s, for the log."""
        return f"{self._num_tokens / seconds:.0f} tokens/s"

    def _ask(self, request: str, body: dict[str, Any]) -> None:
        try:
            answer = self._received(request, self._post(body))
        # whatever a server sends must end this request, not hang the wait for its answer
        except Exception as error:  # noqa: BLE001
            answer = Answer(request, "", (), "failed", error=f"{type(error).__name__}: {error}")
        self._answers.put(answer)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        data = json.dumps(body).encode()
        for number in range(_TRIES):
            try:
                request = urllib.request.Request(self._url, data, headers)  # noqa: S310
                with urllib.request.urlopen(request, timeout=self._timeout_s) as response:  # noqa: S310
                    answer: dict[str, Any] = json.load(response)
                    return answer
            except (OSError, http.client.HTTPException) as error:  # noqa: PERF203
                status = error.code if isinstance(error, urllib.error.HTTPError) else 500
                if number == _TRIES - 1 or (status < 500 and status not in _TRY_AGAIN):
                    raise
                time.sleep(_RETRY_S * 2**number)
        raise AssertionError

    def _received(self, request: str, body: dict[str, Any]) -> Answer:
        choice = body["choices"][0]
        message = choice["message"]
        self._num_tokens += body.get("usage", {}).get("completion_tokens", 0)
        text = _with_opened_thought(message.get("content") or "")
        thoughts = [message[key] for key in REASONING_KEYS if message.get(key)]
        reason = "stop" if message.get("tool_calls") else choice["finish_reason"]
        calls = message.get("tool_calls") or ()
        return Answer(request, text, text.split(), reason, "".join(thoughts[:1]), calls)


def _with_opened_thought(text: str) -> str:
    """Where the prompt opens thinking (DeepSeek R1), only its end is in the answer."""
    return f"<think>{text}" if "</think>" in text and "<think>" not in text else text
