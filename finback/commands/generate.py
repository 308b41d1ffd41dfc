"""`finback generate`: continue a prompt with a trained model, the text streamed to stdout."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from finback.commands.parse import parse_arguments
from finback.config import InputError, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from finback.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateFields:
    """What `finback generate` takes."""

    directory: Positional[Path]
    """Hugging Face directory with weights and tokenizer."""
    prompt: str
    """Text to continue; - reads it from standard input."""
    max_tokens: int = 256
    """Most tokens to generate; an end-of-sentence token ends it before."""
    temperature: float = 0.6
    """0 always takes the likeliest token; 0.6 is what DeepSeek advises for R1."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that together reach this probability; 1 is all of them."""
    seed: int = 0
    """The same seed gives the same text."""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Send the prompt as a user's message, in the model's chat template."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in memory."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""


def main(argv: list[str]) -> int:
    """`finback generate DIRECTORY --prompt TEXT [--max-tokens N --temperature T --top-p P --seed S --chat]`."""
    fields = parse_arguments(
        GenerateFields,
        argv,
        verb="generate",
        description="Continue a prompt with a trained model; the new text goes to standard output as it comes.",
    )
    _check(fields)
    config = ModelConfig.from_hf(fields.directory)

    import torch

    from finback.data.detokenizer import IncrementalDetokenizer
    from finback.data.tokenizer import load_tokenizer
    from finback.model.checkpoint import load
    from finback.model.generate import generate

    if fields.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but torch finds no such device; leave it out to run on the CPU")
    tokenizer = load_tokenizer(fields.directory)
    ids = _prompt_ids(fields, tokenizer)
    if len(ids) + fields.max_tokens > config.max_position_embeddings:
        context = f"{len(ids)} tokens and --max-tokens {fields.max_tokens}"
        raise InputError(f"the prompt has {context}, the model's context is {config.max_position_embeddings}; lower one")
    model = load(fields.directory, dtype=getattr(torch, fields.dtype), device=fields.device)
    detokenizer = IncrementalDetokenizer(tokenizer)

    def show(token: "Tensor") -> None:
        print(detokenizer.feed(int(token)), end="", flush=True)

    generate(
        model,
        torch.tensor([ids], device=fields.device),
        fields.max_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        seed=fields.seed,
        eos_token_id=tokenizer.eos_token_id,
        on_token=show,
    )
    print(detokenizer.flush())
    return 0


def _check(fields: GenerateFields) -> None:
    if fields.max_tokens < 1:
        raise InputError(f"--max-tokens is {fields.max_tokens}, it must be at least 1")
    if not 0 <= fields.temperature < float("inf"):
        raise InputError(f"--temperature is {fields.temperature}, it must be 0 or more")
    if not 0 < fields.top_p <= 1:
        raise InputError(f"--top-p is {fields.top_p}, it must be above 0 and at most 1")
    if not 0 <= fields.seed < 2**63:
        raise InputError(f"--seed is {fields.seed}, it must be at least 0 and below 2^63")


def _prompt_ids(fields: GenerateFields, tokenizer: "Tokenizer") -> list[int]:
    try:
        prompt = sys.stdin.buffer.read().decode() if fields.prompt == "-" else fields.prompt
        prompt.encode()  # an argument that is no UTF-8 comes with surrogates
    except UnicodeError:
        raise InputError("the prompt is not UTF-8 text; convert it first") from None
    if fields.chat:
        message = {"role": "user", "content": prompt}
        return tokenizer.encode(tokenizer.apply_chat_template([message], add_generation_prompt=True))
    ids = tokenizer.encode(prompt, add_bos=tokenizer.add_bos_token)
    if not ids:
        raise InputError("the prompt is empty, and this tokenizer starts with no token of its own; give some text")
    return ids
