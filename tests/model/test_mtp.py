"""Multi-token prediction against transformers' MtpModel, which loads the released layer 61, and by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import finback
from finback.config import ModelConfig
from finback.model.transformer import Transformer
from finback.train.losses import loss_sums
from tests.model.oracle import BASE, build, gradients, mtp_twin, relative_error, twin, untied, worst_row, yarn

CONFIGS: dict[str, ModelConfig] = {
    "depth 1": replace(BASE, num_nextn_predict_layers=1),
    "depth 2, yarn": replace(BASE, num_nextn_predict_layers=2, **yarn(mscale=1.0, mscale_all_dim=1.0)),
    "depth 3": replace(BASE, num_nextn_predict_layers=3),
    "no query compression": replace(BASE, num_nextn_predict_layers=2, q_lora_rank=None),
    "large norm eps": replace(BASE, num_nextn_predict_layers=2, rms_norm_eps=0.05),
    "a dense model with MoE in its MTP": replace(BASE, num_nextn_predict_layers=2, first_k_dense_replace=3),
    "two shared experts, plain gate values": replace(BASE, num_nextn_predict_layers=2, n_shared_experts=2, norm_topk_prob=False),
}


def mtp_logits_of_transformers(main: nn.Module, mtp: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """Layer by layer over whole sequences. Its depth k runs at positions k + 1 ahead; rotary embedding is relative."""
    tokens, logits = input_ids.shape[1], []
    hidden, cache = main.model(input_ids).last_hidden_state, MtpCache(config=mtp.config)
    for depth in range(mtp.num_mtp_layers):
        length = tokens - 1 - depth
        positions = torch.arange(depth + 1, tokens)[None]
        hidden = mtp.forward_layer(depth, hidden[:, :length], positions, cache, input_ids=input_ids[:, depth + 1 :])
        logits.append(main.lm_head(hidden))
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_every_depth_equal_those_of_transformers(name: str) -> None:
    """Facts 1.7: embedding first, the post-final-norm hidden of the main model, the module's own norm before the shared head, and the
    post-norm output chained to the next depth."""
    config = CONFIGS[name]
    model = build(config)
    input_ids = untied(model, 2, 140 if "yarn" in name else 23)
    main = twin(model)
    mtp = mtp_twin(model, main)
    with torch.no_grad():
        logits, mtp_logits = model(input_ids, mtp=True)
        expected = mtp_logits_of_transformers(main, mtp, input_ids)
        assert relative_error(logits, main(input_ids).logits) < 1e-5
    assert len(mtp_logits) == len(expected) == config.num_nextn_predict_layers
    for depth, (one, other) in enumerate(zip(mtp_logits, expected, strict=True)):
        assert one.shape == (2, input_ids.shape[1] - 1 - depth, config.vocab_size)
        assert relative_error(one, other) < 1e-5, depth
        assert worst_row(one, other) < 2e-5, depth


def test_gradients_of_the_mtp_logits_equal_those_of_transformers() -> None:
    """Into the modules, and through the shared embedding and head and the hidden states into the main model."""
    config = CONFIGS["depth 3"]
    model = build(config)
    input_ids = untied(model, 2, 23)
    main = twin(model)
    mtp = mtp_twin(model, main)
    weights = [torch.randn(2, 22 - depth, config.vocab_size) for depth in range(3)]
    _, mtp_logits = model(input_ids, mtp=True)
    sum((a * b).sum() for a, b in zip(mtp_logits, weights, strict=True)).backward()
    sum((a * b).sum() for a, b in zip(mtp_logits_of_transformers(main, mtp, input_ids), weights, strict=True)).backward()
    expected = dict(gradients(main))
    for name, gradient in gradients(mtp):
        if name.startswith("layers."):
            layer, rest = name.removeprefix("layers.").split(".", 1)
            rest = rest.replace("mtp_block.", "").replace("post_norm", "shared_head.norm")
            expected[f"model.layers.{int(layer) + config.num_hidden_layers}.{rest}"] = gradient
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert actual[name] is not None
        assert relative_error(actual[name], gradient) < 1e-4, name
    every = sorted(expected)
    joined = [torch.cat([side[name].flatten() for name in every]) for side in (actual, expected)]
    assert relative_error(*joined) < 1e-5


def test_transformers_loads_the_mtp_layer_that_save_wrote(tmp_path: Path) -> None:
    """Facts 1.7: its loader knows `model.layers.61.*` only, so a model of 61 narrow layers."""
    config = replace(
        BASE, num_hidden_layers=61, first_k_dense_replace=60, num_nextn_predict_layers=1, hidden_size=16, intermediate_size=16,
        moe_intermediate_size=8, num_attention_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
        v_head_dim=4, vocab_size=32, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    model = build(config)
    with torch.no_grad():  # 61 random layers amplify rounding; weaker ones keep the comparison sharp
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.mul_(0.3)
    finback.save(model, tmp_path / "model")
    main = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager").eval()
    mtp = MtpModel.from_pretrained(main)
    assert mtp.num_mtp_layers == 1
    input_ids = untied(model, 2, 12)
    with torch.no_grad():
        logits, mtp_logits = model(input_ids, mtp=True)
        assert relative_error(logits, main(input_ids).logits) < 1e-5
        (expected,) = mtp_logits_of_transformers(main, mtp, input_ids)
    assert relative_error(mtp_logits[0], expected) < 1e-5
    state, layer = dict(mtp.state_dict()), model.mtp_modules[0]
    assert torch.equal(state["layers.0.eh_proj.weight"], layer.eh_proj.weight)
    assert torch.equal(state["layers.0.post_norm.weight"], layer.shared_head.norm.weight)


def test_the_projection_takes_the_embedding_first() -> None:
    """Facts 1.7: unlike the paper's equation. Without the first half of its columns, a module does not see the next token."""
    model = build(CONFIGS["depth 1"])
    (module,) = model.mtp_modules
    hidden, embedding = torch.randn(1, 4, 48), torch.randn(1, 4, 48)
    with torch.no_grad():
        module.eh_proj.weight[:, :48] = 0
        assert torch.equal(module.combine(hidden, embedding), module.combine(hidden, torch.randn(1, 4, 48)))
        assert not torch.equal(module.combine(hidden, embedding), module.combine(torch.randn(1, 4, 48), embedding))


def test_embedding_and_head_are_those_of_the_main_model() -> None:
    model = build(CONFIGS["depth 2, yarn"])
    names = [name for name, _ in model.named_parameters() if ".layers.3." in name or ".layers.4." in name]
    assert names
    assert not any("embed_tokens" in name or "head.head" in name or "lm_head" in name for name in names)
    _, mtp_logits = model(torch.randint(0, 96, (1, 6)), mtp=True)
    mtp_logits[1].square().sum().backward()
    assert model.lm_head.weight.grad is not None
    assert model.model.embed_tokens.weight.grad is not None


def test_a_forward_pass_without_mtp_is_the_main_model_alone() -> None:
    with_mtp = build(CONFIGS["depth 2, yarn"])
    config = replace(with_mtp.config, num_nextn_predict_layers=0)
    without = Transformer(config)
    without.load_state_dict({name: tensor for name, tensor in with_mtp.state_dict().items() if name in without.state_dict()})
    input_ids = torch.randint(0, 96, (2, 9))
    with torch.no_grad():
        assert torch.equal(with_mtp(input_ids), without(input_ids))
        logits, mtp_logits = without(input_ids, mtp=True)
        assert torch.equal(logits, without(input_ids))
        assert mtp_logits == []
        assert with_mtp.train_forward(input_ids, mtp=False).expert_counts.shape[0] == 2
        assert with_mtp.train_forward(input_ids).expert_counts.shape[0] == len(with_mtp.routers()) == 4


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_sequences_shorter_than_the_depths_have_empty_logits(tokens: int) -> None:
    """DESIGN section 5: D tensors [B, T - 1 - k, vocab_size]; a row of counts for every router all the same."""
    config = CONFIGS["depth 3"]
    model = build(config)
    input_ids = torch.randint(0, 96, (2, tokens))
    logits, mtp_logits = model(input_ids, mtp=True)
    assert logits.shape == (2, tokens, 96)
    assert [tuple(each.shape) for each in mtp_logits] == [(2, max(0, tokens - 1 - k), 96) for k in range(3)]
    output = model.train_forward(input_ids)
    assert output.balance_loss.isfinite()
    expected = [2 * 3 * tokens] * 2 + [2 * 3 * max(0, tokens - 1 - k) for k in range(3)]
    assert output.expert_counts.sum(1).tolist() == expected


def test_mtp_loss_by_hand() -> None:
    """V3 equations 24-25: depth k (from 0) of position i predicts token i + 2 + k; summed here, every depth over T by the caller."""
    config = CONFIGS["depth 2, yarn"]
    model = build(config)
    rows = torch.randint(0, 96, (2, 8))  # 7 inputs and a last target
    output = model.train_forward(rows[:, :-1])
    sums = loss_sums(output, model.lm_head.weight, rows)
    main = mtp = 0.0
    for b in range(2):
        for i in range(7):
            main -= F.log_softmax(model.lm_head(output.hidden[b, i]), -1)[rows[b, i + 1]].item()
        for k in range(2):
            for i in range(7 - 1 - k):
                mtp -= F.log_softmax(model.lm_head(output.mtp_hidden[k][b, i]), -1)[rows[b, i + 2 + k]].item()
    assert sums.main.item() == pytest.approx(main, rel=1e-5)
    assert sums.mtp.item() == pytest.approx(mtp, rel=1e-5)
