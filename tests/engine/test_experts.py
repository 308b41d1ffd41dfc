"""The experts that an engine records are those that the model's routers choose, however the tokens came to be computed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from finback.config import InputError
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.engine.runner import Backend
from finback.model.transformer import Transformer
from tests.engine.models import CONFIGS, V3_MTP
from tests.model.oracle import build

BACKENDS: list[Backend] = ["torch", "native"]


def routed(model: Transformer, token_ids: list[int]) -> Tensor:
    """int64 [tokens, layers, K], sorted, by a whole forward pass."""
    chosen: list[Tensor] = []
    routers = model.routers()[: model.config.num_moe_layers]
    handles = [
        router.register_forward_hook(lambda module, inputs, output: chosen.append(output[1].indices)) for router in routers
    ]
    with torch.no_grad():
        model(torch.tensor([token_ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(chosen, dim=1).sort(-1).values


def check(model: Transformer, prompts: list[list[int]], **fields: Any) -> LLM:
    llm = LLM(model=model, return_experts=True, block_size=4, max_num_batched_tokens=16, **fields)
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=9, ignore_eos=True)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        assert output.experts is not None
        assert output.experts.dtype == torch.int16
        expected = routed(model, [*prompt, *output.token_ids][:-1])
        assert torch.equal(output.experts.long().sort(-1).values, expected)
    return llm


def sharing_prompts(vocab: int) -> list[list[int]]:
    """Prompts of unequal length that begin alike, some of them more than one block long."""
    draw = torch.Generator().manual_seed(3)
    start = torch.randint(3, vocab, (11,), generator=draw).tolist()
    return [start + torch.randint(3, vocab, (length,), generator=draw).tolist() for length in (1, 6, 2, 12, 1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["v3", "v2-lite"])
def test_recorded_experts_are_the_routers_choices(name: str, backend: Backend) -> None:
    model = build(CONFIGS[name])
    llm = check(model, sharing_prompts(model.config.vocab_size), max_num_seqs=3, backend=backend)
    assert llm.scheduler_stats.prefix_hit_tokens > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_choices_of_cached_prompts_are_told_as_well(backend: Backend) -> None:
    model = build(CONFIGS["v3"])
    prompt = sharing_prompts(model.config.vocab_size)[3]
    llm = LLM(model=model, return_experts=True, block_size=4, backend=backend)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    first, again = (llm.generate([prompt], params)[0] for _ in range(2))
    assert again.num_cached_tokens >= 16
    assert first.experts is not None
    assert again.experts is not None
    assert torch.equal(first.experts, again.experts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_drafts_that_were_wrong_and_requests_that_waited_leave_no_trace(backend: Backend) -> None:
    model = build(V3_MTP)
    llm = check(
        model,
        sharing_prompts(model.config.vocab_size),
        max_num_seqs=5,
        num_blocks=14,
        num_speculative_tokens=2,
        backend=backend,
    )
    assert llm.scheduler_stats.num_preemptions > 0
    assert llm.stats.accepted_tokens < llm.stats.drafted_tokens


def test_nothing_is_recorded_unless_asked_for_and_a_dense_model_has_nothing() -> None:
    model = build(CONFIGS["v3"])
    output = LLM(model=model).generate([[3, 4, 5]], SamplingParams(max_tokens=2))[0]
    assert output.experts is None
    with pytest.raises(InputError, match="return_experts is True, but this model has no routed experts"):
        LLM(model=build(CONFIGS["llama"]), return_experts=True)
