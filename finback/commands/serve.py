"""`finback serve`: a DeepSeek-compatible API over a model directory, and a page to chat on."""

import logging
import socket
import sys

import finback
from finback.commands.parse import parse_arguments
from finback.config import InputError, ModelConfig
from finback.server.config import ServeConfig, decimal


def main(argv: list[str]) -> int:
    """`finback serve DIRECTORY [--host --port --keys FILE ...]`."""
    config = parse_arguments(
        ServeConfig,
        argv,
        verb="serve",
        description="Serve a model: DeepSeek's and OpenAI's API, Anthropic's and Ollama's beside it, metrics, and a page to chat on.",
    )
    model = ModelConfig.from_hf(config.directory)
    listening = _listen(config)
    with listening:
        return _serve(config, model, listening)


def _listen(config: ServeConfig) -> socket.socket:
    """A socket on the address; before the model is loaded, so that a mistake is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host is {config.host!r}, which is no address of this machine: {error.strerror or error}") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        reason = error.strerror or error
        raise InputError(
            f"cannot listen on {config.host} port {config.port}: {reason}; give another --port, or 0 for a free one"
        ) from None
    return listening


def _serve(config: ServeConfig, model: ModelConfig, listening: socket.socket) -> int:
    import torch

    from finback.data.tokenizer import load_tokenizer
    from finback.engine.llm import LLM
    from finback.server.keys import KeyStore, prices
    from finback.server.metrics import Metrics
    from finback.server.prefixes import restore_prefixes
    from finback.server.run import Server, stopped_by_signals
    from finback.server.service import Service
    from finback.server.worker import EngineWorker, made_apart

    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but torch finds no such device; leave it out to run on the CPU")
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    store = None if config.keys is None else KeyStore(config.keys)
    tokenizer = load_tokenizer(config.directory)
    if tokenizer.chat_template is None:
        raise InputError(
            f"{config.directory} has no chat template, so it is no model to chat with; put a chat_template.jinja into the directory"
        )

    def load() -> LLM:
        llm = LLM(
            config.directory,
            tokenizer=tokenizer,
            dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
            device=config.device,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            num_blocks=config.num_blocks,
            num_speculative_tokens=config.num_speculative_tokens,
            return_experts=model.num_moe_layers > 0,  # for /metrics
        )
        if config.cache_dir is not None:
            restore_prefixes(llm, config.cache_dir)
        return llm

    llm = made_apart(load)
    name = config.name or config.directory.resolve().name
    hit, miss, output, discount = (
        decimal(field, getattr(config, field)) for field in ("price_hit", "price_miss", "price_output", "off_peak_discount")
    )
    service = Service(
        config=config,
        name=name,
        worker=EngineWorker(llm),
        tokenizer=tokenizer,
        metrics=Metrics(llm, name),
        store=store,
        version=finback.__version__,
        prices=None if store is None else prices(hit, miss, output, config.off_peak_minutes, discount),
    )
    listening.listen(128)  # whoever reads the address below and asks at once waits a moment, and is not refused
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    server = Server(service)
    with stopped_by_signals(server):
        print(f"{name} is served at {address} (API: {address}/v1, chat page: {address}/, Ctrl-C stops it)", flush=True)
        server.run(sockets=[listening])
    behind = "\n" if sys.stderr.isatty() else ""  # the terminal's ^C
    print(f"{behind}{name} is served no more", file=sys.stderr)  # whoever read the address may have closed stdout since
    return 0
