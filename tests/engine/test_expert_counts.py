"""How often experts were chosen, as the engine counts it, beside what the model's own router says of the same tokens."""

import pytest
import torch

from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.engine.runner import Backend
from finback.model.moe import MoE
from finback.model.transformer import Transformer, init_weights
from tests.engine.models import CONFIGS

PROMPTS = [[(7 * i + 3 * j) % 90 + 1 for i in range(20 + 9 * j)] for j in range(3)]


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(("name", "drafts"), [("v3", 0), ("v3-mtp", 1)])
def test_each_token_counts_for_the_experts_that_it_went_to(name: str, drafts: int, backend: Backend) -> None:
    model = Transformer(CONFIGS[name], dtype=torch.float32)
    init_weights(model, 0)
    llm = LLM(
        model=model,
        backend=backend,
        num_blocks=32,
        enable_prefix_caching=False,
        num_speculative_tokens=drafts,
        return_experts=True,
    )
    llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=1))
    expected, routers = [], [block.mlp for block in model.blocks if isinstance(block.mlp, MoE)]
    chosen: dict[MoE, torch.Tensor] = {}
    hooks = [
        router.register_forward_hook(lambda module, _, output: chosen.__setitem__(module, output[1].indices))
        for router in routers
    ]
    with torch.no_grad():
        for prompt in PROMPTS:
            model(torch.tensor([prompt]))
            expected.append(
                [torch.bincount(chosen[router].flatten(), minlength=model.config.n_routed_experts).tolist() for router in routers]
            )
    for hook in hooks:
        hook.remove()
    assert len(llm.expert_counts) == len(routers)
    assert llm.expert_counts.tolist() == torch.tensor(expected).sum(0).tolist()
    plain = LLM(model=model, backend=backend, num_blocks=32)
    plain.generate(PROMPTS, SamplingParams(max_tokens=1))
    assert len(plain.expert_counts) == 0, "nobody asked"
