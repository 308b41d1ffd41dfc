"""How often the server writes: once for each step of the engine and request, whatever the step has added (counted at ASGI's `send`)."""

import asyncio
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.engine.llm import LLM
from finback.model.transformer import Transformer, init_weights
from finback.server.app import create_app
from finback.server.config import ServeConfig
from finback.server.metrics import Metrics
from finback.server.service import Service
from finback.server.worker import EngineWorker
from tests.server.serving import tiny_model

MESSAGES = [{"role": "user", "content": "Where does the whale swim?"}]
DOORS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "n": 3, "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": "One day", "n": 3},
    "/v1/messages": {"messages": MESSAGES},
    "/api/chat": {"messages": MESSAGES, "options": {"num_predict": 13, "temperature": 0}},
}


def service_of(num_speculative_tokens: int) -> Service:
    _, tokenizer = tiny_model()
    small, _ = tiny_model()
    model = Transformer(replace(small.config, num_nextn_predict_layers=1), dtype=torch.float32)
    init_weights(model, 0)
    llm = LLM(model=model, tokenizer=tokenizer, num_blocks=60, num_speculative_tokens=num_speculative_tokens)
    config = ServeConfig(Path("tiny"), keep_alive_seconds=600.0)
    return Service(config, "tiny", EngineWorker(llm), tokenizer, Metrics(llm, "tiny"), None, None, "0")


async def pieces_of(service: Service, path: str, body: dict[str, Any]) -> tuple[list[bytes], list[int]]:
    """The pieces that one request was answered in, and the tokens of each step that has something to tell. A step waits until the one
    before it has been sent, so that each is seen to have its own piece."""
    sent, written, tokens = list[bytes](), threading.Semaphore(0), list[int]()
    step, waits = service.worker.llm.step, False

    def watched() -> Any:
        nonlocal waits
        assert not waits or written.acquire(timeout=60), "a step of the engine was not sent"
        increments = step()
        waits = any(each.text or each.finish_reason for each in increments)
        if waits:
            tokens.append(sum(len(each.token_ids) for each in increments))
        return increments

    service.worker.llm.step = watched  # type: ignore[method-assign]
    add, others = service.worker.llm.add, body.get("n", 1) - 1

    def together(*arguments: Any) -> int:
        """The first of several answers to one prompt is taken when the others have come: a fast engine would begin without them."""
        nonlocal others
        deadline = time.monotonic() + 60
        while service.worker._inbox.qsize() < others and time.monotonic() < deadline:
            time.sleep(0.001)
        others = 0
        return add(*arguments)

    service.worker.llm.add = together  # type: ignore[method-assign]
    app = create_app(service)
    content = json.dumps(body).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers, "client": None, "server": None,
    }  # fmt: skip
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.sleep(3600)
        asked = True
        return {"type": "http.request", "body": content}

    async def send(message: Any) -> None:
        if message.get("body"):
            sent.append(message["body"])
            written.release()

    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
    return sent, tokens


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("path", DOORS)
def test_a_step_of_the_engine_is_one_write(path: str, drafts: int) -> None:
    service = service_of(drafts)
    letter = service.tokenizer.encode("w")
    assert len(letter) == 1
    # One token that the model and its drafts cannot but choose: every draft is accepted, and every step has text.
    body = {"model": "deepseek-chat", "stream": True, "max_tokens": 13, "temperature": 0, "ignore_eos": True}
    body["logit_bias"] = {str(letter[0]): 100}
    sent, tokens = asyncio.run(pieces_of(service, path, body | DOORS[path]))
    assert len(sent) == len(tokens)
    answers = DOORS[path].get("n", 1)
    if path.startswith("/v1/c"):  # the others have no bias to choose with
        assert sum(tokens) == 13 * answers
        assert len(tokens) == (1 + 12 // (1 + drafts) if drafts else 13)
        assert sent[-1].endswith(b"data: [DONE]\n\n")
