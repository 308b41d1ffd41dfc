"""A server on a free port in a thread, over a tiny random model that is made on the spot."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finback.data.chat import published_template
from finback.data.tokenizer import Tokenizer, save_tokenizer, train_tokenizer
from finback.engine.llm import LLM
from finback.model.checkpoint import save
from finback.model.transformer import Transformer, init_weights
from finback.server.config import ServeConfig
from finback.server.keys import KeyStore, prices
from finback.server.metrics import Metrics
from finback.server.prefixes import restore_prefixes
from finback.server.run import Server
from finback.server.service import Service
from finback.server.worker import EngineWorker
from tests.model.oracle import BASE

TEXTS = ["One day a whale swam to the north; it was the second largest of all. 鲸鱼向北游去。"] * 40


def tiny_model(template: str = "deepseek_r1") -> tuple[Transformer, Tokenizer]:
    tokenizer = train_tokenizer(TEXTS, 330, chat_template=published_template(template))
    config = replace(
        BASE,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Transformer(config, dtype=torch.float32)
    init_weights(model, 0)
    return model, tokenizer


def write_model(directory: Path) -> Path:
    """The same as a directory."""
    model, tokenizer = tiny_model()
    save(model, directory)
    save_tokenizer(tokenizer, directory)
    return directory


@dataclass
class Served:
    url: str
    service: Service
    llm: LLM

    def slow_down(self, seconds: float = 0.01) -> None:
        """Let each step take so long: an answer of 900 tokens then runs as long as a test needs it."""
        forward = self.llm._runner.forward

        def slow(*arguments: Any) -> Any:
            time.sleep(seconds)
            return forward(*arguments)

        self.llm._runner.forward = slow  # type: ignore[method-assign]

    def is_idle(self) -> bool:
        """Whether, within a while, no request holds a block any more."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self.service.worker.open == 0 and self.llm.num_free_blocks == self.llm.num_blocks:
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def serving(
    keys: Path | None = None, *, template: str = "deepseek_r1", llm: dict[str, Any] | None = None, **fields: Any
) -> Iterator[Served]:
    """Serve until the block ends."""
    model, tokenizer = tiny_model(template)
    engine = LLM(
        model=model, tokenizer=tokenizer, **({"max_num_seqs": 8, "num_blocks": 200, "return_experts": True} | (llm or {}))
    )
    config = ServeConfig(Path("tiny"), keys=keys, **({"max_num_seqs": 8} | fields))
    if config.cache_dir is not None:
        restore_prefixes(engine, config.cache_dir)
    service = Service(
        config=config,
        name="tiny",
        worker=EngineWorker(engine),
        tokenizer=tokenizer,
        metrics=Metrics(engine, "tiny"),
        store=None,
        version="0",
        prices=None
        if keys is None
        else prices(*map(_decimal, ("1", "4", "16")), config.off_peak_minutes, _decimal(config.off_peak_discount)),
    )
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = Server(service)

    def run() -> None:
        if keys is not None:
            service.store = KeyStore(keys)  # SQLite's connections belong to a thread
        server.run(sockets=[listening])
        if service.store is not None:
            service.store.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service, engine)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def _decimal(text: str) -> Any:
    from decimal import Decimal

    return Decimal(text)
