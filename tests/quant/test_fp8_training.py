"""Which products a model trained in FP8 makes in FP8, how near its gradients stay, and that it learns and resumes bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch

from finback.model.transformer import Transformer, init_weights
from finback.quant.fp8_training import train_in_fp8
from finback.train.losses import accumulate_gradients
from finback.train.pretrain import pretrain
from tests.train.runs import TIMES, micro_config, micro_dense, micro_model, read_rows


def gradients(model: Transformer, precision: str) -> dict[str, torch.Tensor]:
    rows = torch.randint(0, model.config.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    accumulate_gradients(model, rows.split(2), mtp_loss_coef=0.3, balance_loss_coef=1e-4, precision=precision)  # type: ignore[arg-type]
    result = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        result[name], parameter.grad = parameter.grad, None
    return result


def test_what_the_paper_names_is_fp8_and_the_rest_is_not() -> None:
    model = Transformer(micro_model(), dtype=torch.float32)
    train_in_fp8(model)
    products = {}
    for name, module in model.named_modules():
        product = getattr(module, "product", None) or getattr(module, "whole", None)
        if product is not None:
            products[name] = getattr(getattr(product, "func", product), "__name__", "")
    layer = "model.layers.1."
    assert products[layer + "self_attn.kv_b_proj"] == products[layer + "self_attn.q_a_proj"] == "fp8_linear"
    assert products[layer + "self_attn.o_proj"] == "fp8_linear_after_attention"
    assert products[layer + "mlp.experts"] == products[layer + "mlp.shared_experts"] == "fp8_swiglu_feed_forward"
    assert products["model.layers.0.mlp"] == "fp8_swiglu_feed_forward"
    assert products["lm_head"] == products["model.layers.3.eh_proj"] == "linear"
    assert products["model.layers.3.mlp.experts"] == "fp8_swiglu_feed_forward"  # of an MTP module
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("config", [micro_model(), micro_dense()])
def test_gradients_are_those_of_bf16_but_for_the_format(config: object) -> None:
    model = Transformer(config, dtype=torch.float32)  # type: ignore[arg-type]
    init_weights(model, 0)
    exact = gradients(model, "fp32")
    train_in_fp8(model)
    low = gradients(model, "fp8")
    difference = sum(float((low[name] - exact[name]).square().sum()) for name in exact) ** 0.5
    size = sum(float(exact[name].square().sum()) for name in exact) ** 0.5
    assert 0.01 < difference / size < 0.3  # a few percent a product, through a dozen products


def test_a_run_in_fp8_learns_and_resumes_bit_for_bit(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data, steps=12, save_every=4, precision="fp8", recompute="selective", keep_checkpoints=0)
    assert config.moments == "bf16"
    pretrain(config, tmp_path / "whole")
    rows = read_rows(tmp_path / "whole")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-12")
    pretrain(config, tmp_path / "cut", resume=True)
    keys = [key for key in rows[0] if key not in TIMES]
    assert [[row.get(key) for key in keys] for row in read_rows(tmp_path / "cut")] == [
        [row.get(key) for key in keys] for row in rows
    ]
