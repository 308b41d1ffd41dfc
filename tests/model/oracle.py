"""Tiny random models, DeepSeek's and dense ones, and their twins in transformers, for tests that compare the two.

Weights are drawn at the scale of a trained model (matrices keep the norm of what they multiply), norms and router biases away from
their neutral values, so that a forgotten factor or term shows. Continuous draws leave no routing ties but by accident: `untied`
picks tokens for which every expert choice has a margin, so that both sides choose the same experts on any machine.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_layers import MtpModel

from finback.config import Llama3RopeScaling, ModelConfig, RopeScaling
from finback.model.moe import Router
from finback.model.transformer import Transformer
from finback.ops.router import router_scores

BASE = ModelConfig(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=3,
    kv_lora_rank=20,
    q_lora_rank=28,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
    max_position_embeddings=512,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
V2 = replace(
    BASE,
    model_type="deepseek_v2",
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    n_shared_experts=2,
)
V2_LITE = replace(
    V2, topk_method="greedy", q_lora_rank=None, n_group=1, topk_group=1, routed_scaling_factor=1.0, num_experts_per_tok=4
)
LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)
QWEN2 = replace(LLAMA, model_type="qwen2", attention_bias=True, rms_norm_eps=1e-6)
QWEN3 = replace(LLAMA, model_type="qwen3", head_dim=20, rms_norm_eps=1e-6)  # heads wider than hidden_size / num_attention_heads
LLAMA3 = replace(LLAMA, rope_theta=500.0, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 64))
MARGIN = 1e-5  # between the last expert chosen and the first one not: far above what float32 sums differ by


def yarn(factor: float = 8.0, original: int = 64, **fields: float | None) -> dict[str, Any]:
    """The config fields of a YaRN model whose context is exactly `factor` times the original one, as transformers expects."""
    scaling = RopeScaling(factor=factor, original_max_position_embeddings=original, **fields)  # type: ignore[arg-type]
    return {"rope_scaling": scaling, "max_position_embeddings": round(factor * original)}


def build(config: ModelConfig, seed: int = 0, bias: float = 0.3, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model with random weights; router biases are normal with deviation `bias`, shifted so that most biased scores are negative."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * draw if name.endswith(".bias") else 1 + 0.2 * draw)
            elif "embed_tokens" in name:
                parameter.copy_(draw)
            else:
                parameter.copy_(draw * parameter.shape[-1] ** -0.5)
        for router in model.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts, generator=generator) * bias - 0.6)
    return model


def untied(model: Transformer, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random token ids [batch, tokens] on which no router of the model is near a tie."""
    for attempt in count(seed):
        generator = torch.Generator().manual_seed(attempt)
        input_ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator)
        if smallest_margin(model, input_ids) > MARGIN:
            return input_ids
    raise AssertionError


@torch.no_grad()
def smallest_margin(model: Transformer, input_ids: Tensor) -> float:
    """The smallest difference that decides a choice of group or expert, over all tokens and routers."""
    seen: list[tuple[Router, Tensor]] = []
    handles = [
        router.register_forward_pre_hook(lambda module, args: seen.append((module, args[0]))) for router in model.routers()
    ]
    model.train_forward(input_ids)
    for handle in handles:
        handle.remove()
    return min((_margin(router, x) for router, x in seen), default=float("inf"))


def _margin(router: Router, x: Tensor) -> float:
    c = router.config
    choice = router_scores(x, router.weight, c.scoring_func)
    if router.e_score_correction_bias is not None:
        choice = choice + router.e_score_correction_bias
    margins = [float("inf")]
    if c.topk_method != "greedy" and c.topk_group < c.n_group:
        groups = choice.view(len(choice), c.n_group, -1)
        score = groups.topk(2).values.sum(-1) if c.topk_method == "noaux_tc" else groups.amax(-1)
        ordered = score.sort(descending=True)
        margins.append(float((ordered.values[:, c.topk_group - 1] - ordered.values[:, c.topk_group]).min()))
        mask = torch.full_like(score, float("-inf")).scatter(1, ordered.indices[:, : c.topk_group], 0.0)
        choice = (groups + mask.unsqueeze(-1)).flatten(1)
    if c.num_experts_per_tok < c.n_routed_experts:
        ordered = choice.sort(descending=True)
        k = c.num_experts_per_tok
        margins.append(float((ordered.values[:, k - 1] - ordered.values[:, k]).min()))
    return min(margins)


def twin(model: Transformer, attention: str = "eager") -> nn.Module:
    """transformers' own model with the same weights, without MTP layers."""
    config_class: Any
    model_class: Any
    config_class, model_class = {
        "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
        "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[model.config.model_type]
    config = config_class.from_dict(model.config.to_dict(), attn_implementation=attention, experts_implementation="eager")
    other = model_class(config).eval().to(model.lm_head.weight.dtype)
    other.load_state_dict(_hf_state(model), strict=True)
    for router, source in zip(_hf_routers(other), model.routers(), strict=False):
        if source.e_score_correction_bias is not None:
            router.e_score_correction_bias.data = source.e_score_correction_bias.clone()
    return other


def mtp_twin(model: Transformer, main: nn.Module) -> nn.Module:
    """transformers' MtpModel over `main`, with the weights of the model's MTP modules."""
    modules = model.mtp_modules
    other = MtpModel(main, len(modules)).eval()
    names: dict[str, Tensor] = {}
    for depth, module in enumerate(modules):
        for name, tensor in _fused(dict(module.state_dict())).items():
            own = name.startswith(("enorm", "hnorm", "eh_proj"))
            name = name.replace("shared_head.norm", "post_norm") if name.startswith("shared_head") else name
            prefix = f"layers.{depth}." + ("" if own or name.startswith("post_norm") else "mtp_block.")
            names[prefix + name] = tensor
    shared = {name: tensor for name, tensor in other.state_dict().items() if not name.startswith("layers.")}
    other.load_state_dict(names | shared, strict=True)
    return other


def gradients(other: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in our model, gradient) of each parameter of a `twin`."""
    for name, parameter in other.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name.endswith("experts.gate_up_proj"):
            gate, up = gradient.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj"), gate
            yield name.replace("gate_up_proj", "up_proj"), up
        else:
            yield name, gradient


def check_gradients(model: Transformer, other: nn.Module) -> None:
    """Each gradient of `model` against that of its `twin` (1e-4), and all together (1e-5), after both went backward."""
    parameters = dict(model.named_parameters())
    actual, expected = [], []
    for name, gradient in gradients(other):
        ours = parameters.pop(name).grad
        assert ours is not None, name
        if gradient.any():
            assert relative_error(ours, gradient) < 1e-4, name
        else:  # one token attends to itself with weight 1: nothing for queries and keys
            assert not ours.any(), name
        actual.append(ours.flatten())
        expected.append(gradient.flatten())
    assert not parameters  # each was compared
    assert relative_error(torch.cat(actual), torch.cat(expected)) < 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; nan and inf never pass a comparison with it."""
    actual, expected = actual.detach().to(torch.float64), expected.detach().to(torch.float64)
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def worst_row(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error of one row (last dimension): one wrong token among many right ones shows."""
    actual, expected = actual.detach().to(torch.float64), expected.detach().to(torch.float64)
    assert actual.shape == expected.shape
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _hf_routers(other: nn.Module) -> list[Any]:
    return [module for name, module in other.named_modules() if name.endswith("mlp.gate")]


def _hf_state(model: Transformer) -> dict[str, Tensor]:
    mtp = tuple(f"model.layers.{model.config.num_hidden_layers + k}." for k in range(model.config.num_nextn_predict_layers))
    return _fused({name: tensor for name, tensor in model.state_dict().items() if not name.startswith(mtp or ("-",))})


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> transformers': it stacks gate and up projections of the experts into one tensor."""
    fused = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_proj"):
            up = state[name.replace("gate_proj", "up_proj")]
            fused[name.replace("gate_proj", "gate_up_proj")] = torch.cat((tensor, up), dim=1).clone()
        elif not name.endswith("experts.up_proj"):
            fused[name] = tensor.clone()
    return fused
