"""The FLOPs formula against torch's own count of the model's matrix products."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finback.model.transformer import Transformer, init_weights
from finback.presets import tiny_dense, v3_671b
from finback.train.throughput import matmul_flops, training_flops_per_token
from tests.train.runs import micro_model


@pytest.mark.parametrize("depths", [0, 1])
@pytest.mark.parametrize("q_lora_rank", [None, 16])
def test_formula_counts_the_matrix_products_of_the_model(depths: int, q_lora_rank: int | None) -> None:
    """Everything but attention's scores, which are causal here and full in torch's count."""
    config = micro_model(num_nextn_predict_layers=depths, q_lora_rank=q_lora_rank, hidden_size=40)
    model = Transformer(config, dtype=torch.float64)  # others go where the counter does not look
    init_weights(model, seed=0)
    sequences, length = 2, 32
    ids = torch.randint(0, config.vocab_size, (sequences, length))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model.train_forward(ids)
        for hidden in (output.hidden, *output.mtp_hidden):
            model.lm_head(hidden)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    c = config
    pairs = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * (length + 1) / 2
    layers = c.num_hidden_layers + depths
    expected = training_flops_per_token(c, length) / 3 - 2 * layers * pairs
    # an MTP depth sees T - 1 of T positions
    assert counted / (sequences * length) == pytest.approx(expected, rel=0.03 if depths else 1e-6)


def test_v3_costs_about_six_flops_per_active_parameter_and_token() -> None:
    config = replace(v3_671b().model, num_nextn_predict_layers=0)
    flops = training_flops_per_token(config, 4096)
    assert 6 * 36.6e9 < flops < 1.25 * 6 * 36.6e9  # attention over 4K tokens adds the rest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_measured_ceiling_is_a_plausible_speed(precision: str) -> None:
    assert 1e7 < matmul_flops(precision, torch.device("cpu")) < 1e15  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "head_dim": 24, "num_key_value_heads": 1}])
def test_formula_counts_the_matrix_products_of_a_dense_model(changes: dict[str, Any]) -> None:
    config, length = replace(tiny_dense().model, **changes), 32
    model = Transformer(config, device="meta")
    weights = sum(
        parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() == 2 and "embed" not in name
    )
    weights += config.vocab_size * config.hidden_size * config.tie_word_embeddings  # the embedding, used as the head
    pairs = config.num_hidden_layers * config.num_attention_heads * 2 * config.head_dim * (length + 1) / 2
    assert training_flops_per_token(config, length) == 6 * (weights + pairs)
