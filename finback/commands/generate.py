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
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 is all of them."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, at most 16; they are not part of it."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Answer with one JSON object and nothing else; with --chat, a thought may come before it."""
    seed: int = 0
    """The same seed gives the same text."""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Send the prompt as a user's message, in the model's chat template."""
    num_speculative_tokens: int = 0
    """Tokens that the model's MTP module drafts ahead at each step; 0 is none. The text is the same. It comes faster where a step waits
    for memory and the module is small beside the model; small models on a CPU are slower with drafts."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in memory; auto is that of the files."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""


def main(argv: list[str]) -> int:
    """`finback generate DIRECTORY --prompt TEXT [--max-tokens N --temperature T --top-p P --seed S --stop TEXT --chat ...]`."""
    fields = parse_arguments(
        GenerateFields,
        argv,
        verb="generate",
        description="Continue a prompt with a trained model; the new text goes to standard output as it comes.",
    )
    _check(fields)
    config = ModelConfig.from_hf(fields.directory)

    import torch

    from finback.data.reasoning import opens_thought
    from finback.data.tokenizer import load_tokenizer
    from finback.engine.config import SamplingParams
    from finback.engine.grammar_config import Grammar
    from finback.engine.llm import LLM

    if fields.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but torch finds no such device; leave it out to run on the CPU")
    tokenizer = load_tokenizer(fields.directory)
    prompt = _prompt(fields, tokenizer)
    params = SamplingParams(
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=fields.top_k,
        max_tokens=fields.max_tokens,
        stop=fields.stop,
        seed=fields.seed,
        grammar=Grammar.json_object(after_think=fields.chat and opens_thought(prompt)) if fields.json else None,
    )
    ids = _prompt_ids(fields, prompt, tokenizer)
    if len(ids) + fields.max_tokens > config.max_position_embeddings:
        context = f"{len(ids)} tokens and --max-tokens {fields.max_tokens}"
        raise InputError(f"the prompt has {context}, the model's context is {config.max_position_embeddings}; lower one")
    engine = LLM(
        fields.directory,
        tokenizer=tokenizer,
        dtype="auto" if fields.dtype == "auto" else getattr(torch, fields.dtype),
        device=fields.device,
        max_num_seqs=1,
        num_speculative_tokens=fields.num_speculative_tokens,
    )
    for part in engine.stream(ids, params):
        print(part.text, end="", flush=True)
    print()
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


def _prompt(fields: GenerateFields, tokenizer: "Tokenizer") -> str:
    """The text to continue."""
    try:
        prompt = sys.stdin.buffer.read().decode() if fields.prompt == "-" else fields.prompt
        prompt.encode()  # an argument that is no UTF-8 comes with surrogates
    except UnicodeError:
        raise InputError("the prompt is not UTF-8 text; convert it first") from None
    if not fields.chat:
        return prompt
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)


def _prompt_ids(fields: GenerateFields, prompt: str, tokenizer: "Tokenizer") -> list[int]:
    ids = tokenizer.encode(prompt, add_bos=tokenizer.add_bos_token and not fields.chat)  # a template begins the text itself
    if not ids:
        raise InputError("the prompt is empty, and this tokenizer starts with no token of its own; give some text")
    return ids
