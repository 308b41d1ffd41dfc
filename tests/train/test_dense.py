"""Dense students in the training loop: no experts, no MTP, a tied head; they learn, resume bit for bit, and their checkpoints load."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finback.config import InputError, ModelConfig
from finback.model.checkpoint import load
from finback.train.config import PretrainConfig
from finback.train.pretrain import pretrain
from tests.train.runs import micro_config, micro_dense, read_rows

FAMILIES: dict[str, ModelConfig] = {
    "qwen3, tied": micro_dense(),
    "qwen2": micro_dense(model_type="qwen2", attention_bias=True, tie_word_embeddings=False),
    "llama, tied": micro_dense(model_type="llama"),
}


def dense_config(data: Path, model: ModelConfig, **changes: Any) -> PretrainConfig:
    return micro_config(
        data, **{"model": model, "bias_update_speed": 0.0, "sample_prompts": ("the whale",), "sample_tokens": 3} | changes
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_resumed_run_is_bitwise_the_one_that_was_not_interrupted(name: str, tmp_path: Path, micro_data: Path) -> None:
    config = dense_config(micro_data, FAMILIES[name])
    whole = pretrain(config, tmp_path / "whole")
    pretrain(config, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-12")  # as if it had been killed after step 8
    resumed = pretrain(config, tmp_path / "cut", resume=True)
    assert read_rows(tmp_path / "cut") == read_rows(tmp_path / "whole")
    for folder in ("", "ema"):
        one, other = (load_file(run / folder / "model.safetensors") for run in (whole, resumed))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert ("lm_head.weight" in one) != FAMILIES[name].tie_word_embeddings


def test_rows_say_nothing_of_experts(tmp_path: Path, micro_data: Path) -> None:
    run = tmp_path / "run"
    pretrain(dense_config(micro_data, micro_dense(), steps=4), run)
    for row in read_rows(run, drop=()):
        assert row.keys() >= {"step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "mfu"}
        assert not row.keys() & {"mtp_loss", "balance_loss", "max_violation"}
        assert row["mfu"] > 0
    assert (run / "expert_load.jsonl").read_text() == ""
    report = (run / "report.md").read_text()
    assert "dense qwen3, 4 heads over 2 of keys and values" in report
    assert "expert" not in report
    assert sorted(path.name for path in (run / "plots").iterdir()) == ["loss.png", "throughput.png"]


def test_it_learns_and_transformers_reads_what_it_saved(tmp_path: Path, micro_data: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = dense_config(
        micro_data, micro_dense(), steps=60, lr=1e-2, global_batch_size=8, save_every=None, eval_every=20, ema_decay=0.9
    )
    checkpoint = pretrain(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert held_out[-1] < 0.6 * held_out[0]
    ids = torch.randint(0, 300, (2, 20))
    for directory in (checkpoint, checkpoint / "ema"):
        model = load(directory)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
            assert (model(ids) - theirs).norm() < 1e-5 * theirs.norm()


def test_any_cut_into_micro_batches_and_any_recomputation_trains_the_same(tmp_path: Path, micro_data: Path) -> None:
    losses = []
    for number, changes in enumerate(({}, {"recompute": "selective"}, {"recompute": "full"}, {"micro_batch_size": 2})):
        config = dense_config(micro_data, micro_dense(), steps=4, save_every=None, **changes)
        pretrain(config, tmp_path / str(number))
        losses.append([row["loss"] for row in read_rows(tmp_path / str(number))])
    assert losses[0] == losses[1] == losses[2]
    assert losses[3] == pytest.approx(losses[0], rel=1e-5)


def test_router_settings_of_a_model_without_routers_are_told(micro_data: Path) -> None:
    with pytest.raises(InputError, match=r"bias_update_speed is 0\.01, but a dense model has no router bias; set it to 0"):
        replace(micro_config(micro_data), model=micro_dense())


def test_the_run_config_reads_back(tmp_path: Path, micro_data: Path) -> None:
    for model in FAMILIES.values():
        config = dense_config(micro_data, model)
        assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
