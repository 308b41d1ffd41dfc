"""Small random models of every kind that the engine runs, and the tokens that transformers generates from them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from finback.config import ModelConfig
from finback.model.transformer import Transformer
from tests.model.oracle import BASE, LLAMA, LLAMA3, QWEN2, QWEN3, V2, V2_LITE, twin, yarn

TIE = 1e-4  # logits that are closer may be ordered differently by sums in another order

V3_MTP = replace(BASE, num_nextn_predict_layers=1)

DENSE: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "llama3-tied": replace(LLAMA3, tie_word_embeddings=True),
    "llama-biases": replace(LLAMA, attention_bias=True),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}
CONFIGS: dict[str, ModelConfig] = {
    "v3": BASE,
    "v3-mtp": V3_MTP,
    "v3-yarn": replace(BASE, **yarn(mscale=1.0, mscale_all_dim=1.0)),
    "v2": V2,
    "v2-lite": V2_LITE,
    **DENSE,
}


def assert_same_tokens(model: Transformer, prompt: Sequence[int], actual: Sequence[int], expected: Sequence[int]) -> None:
    """Equal, or different only from a token on at which the model's logits of the two are a tie."""
    assert len(actual) == len(expected)
    for at, (mine, other) in enumerate(zip(actual, expected, strict=True)):
        if mine != other:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *expected[:at]]]))[0, -1]
            margin = float((logits[mine] - logits[other]).abs())
            assert margin < TIE, f"token {at}: {mine} instead of {other}, {margin:.1e} apart; {actual} {expected}"
            return


def transformers_greedy(model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """What transformers' own model with the same weights continues each prompt with, one prompt at a time."""
    other: Any = twin(model)
    other.generation_config.eos_token_id = None
    other.generation_config.pad_token_id = 0
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            output = other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
        answers.append(output[0, len(prompt) :].tolist())
    return answers
