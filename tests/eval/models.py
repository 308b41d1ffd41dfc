"""A small random model with a tokenizer, and engines for it."""

from dataclasses import replace

from finback.data.problems import generate_problems
from finback.data.tokenizer import Tokenizer, train_tokenizer
from finback.engine.llm import LLM
from finback.model.transformer import Transformer
from tests.checkpoint_samples import BASE, build


def small_tokenizer() -> Tokenizer:
    return train_tokenizer((problem.text for problem in generate_problems(300)), 400)


def small_model(tokenizer: Tokenizer, context: int = 512) -> Transformer:
    return build(replace(BASE, vocab_size=tokenizer.vocab_size, max_position_embeddings=context, rope_scaling=None))


def engine(model: Transformer, tokenizer: Tokenizer | None, **sizes: int) -> LLM:
    return LLM(model=model, tokenizer=tokenizer, **({"max_num_seqs": 8, "num_blocks": 64, "block_size": 16} | sizes))
