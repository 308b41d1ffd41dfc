"""Expert choices recorded at rollout and taken again in training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import finback
from finback.config import InputError
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.transformer import Transformer
from finback.rl.batch import Batch, sample_log_probs
from finback.rl.prompts import read_prompts
from finback.rl.rollout import roll_out
from finback.rl.train import grpo
from finback.train.metrics import read_metrics
from tests.rl.policies import dense, grpo_config


def _batch(tmp_path: Path, model: Transformer) -> Batch:
    """Two groups of samples whose prompts, of more than a block, the engine shares."""
    config = grpo_config(tmp_path, prompts_per_step=2)
    prompts = read_prompts(config.data, load_tokenizer(config.model), config.template, longest=100)[:2]
    llm = LLM(model=model, block_size=4, max_num_seqs=3, return_experts=True)
    rollout = roll_out(llm, None, prompts, 4, SamplingParams(max_tokens=7), seed=1, step=1)
    assert llm.scheduler_stats.prefix_hit_tokens > 0
    return Batch(rollout.completions, [0.0] * 8, model.config.num_nextn_predict_layers, torch.device("cpu"))


def _moved(model: Transformer) -> Transformer:
    """The same weights with other router biases: other choices, the same gate weights for each expert."""
    generator = torch.Generator().manual_seed(4)
    for router in model.routers():
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias += torch.randn(router.e_score_correction_bias.shape, generator=generator)
    return model


@torch.no_grad()
def _log_probs(model: Transformer, batch: Batch, *, replay: bool) -> torch.Tensor:
    return sample_log_probs(model, batch, temperature=1.0, precision="fp32", replay=replay).at_temperature


def test_replay_changes_nothing_where_the_choices_agree(tmp_path: Path):
    model = finback.load(grpo_config(tmp_path).model, dtype=torch.float32)
    batch = _batch(tmp_path, model)
    torch.testing.assert_close(
        _log_probs(model, batch, replay=True), _log_probs(model, batch, replay=False), rtol=1e-6, atol=1e-6
    )


def test_replay_gives_the_log_probabilities_of_a_router_that_is_forced(tmp_path: Path):
    """The engine's routers have other biases than the trainer's. A bias moves choices and no gate weight, so the trainer with the
    engine's biases is the trainer whose routers are forced by hand."""
    directory = grpo_config(tmp_path).model
    trainer, engine = (finback.load(directory, dtype=torch.float32) for _ in range(2))
    batch = _batch(tmp_path, _moved(engine))
    forced = _log_probs(engine, batch, replay=False)
    apart = (_log_probs(trainer, batch, replay=False) - forced).abs().max()
    assert apart > 0.01, "the case was to differ"
    torch.testing.assert_close(_log_probs(trainer, batch, replay=True), forced, rtol=1e-5, atol=1e-5)
    assert ((forced - batch.engine_log_probs) * batch.mask).abs().max() < 1e-4


def test_the_gate_weights_are_the_trainers_own(tmp_path: Path):
    """Choices are replayed, not weights: the router's matrix gets a gradient that fits the trainer's scores."""
    directory = grpo_config(tmp_path).model
    trainer = finback.load(directory, dtype=torch.float32)
    batch = _batch(tmp_path, _moved(finback.load(directory, dtype=torch.float32)))
    sample_log_probs(trainer, batch, temperature=1.0, precision="fp32").at_temperature.sum().backward()
    router = trainer.routers()[0]
    assert router.weight.grad is not None
    with torch.no_grad():
        direction = router.weight.grad / router.weight.grad.norm()
        sums = []
        for step in (1e-3, -1e-3):
            router.weight += step * direction
            sums.append(float(_log_probs(trainer, batch, replay=True).double().sum()))
            router.weight -= step * direction
    assert (sums[0] - sums[1]) / 2e-3 == pytest.approx(float(router.weight.grad.norm()), rel=0.05)


def test_a_run_with_replay_learns_and_agrees_with_its_engine(tmp_path: Path):
    config = grpo_config(tmp_path, steps=8, num_generations=8, replay_experts=True, beta=0.01)
    grpo(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(row["logprob_gap"] < 1e-5 for row in rows)
    assert sum(row["reward"] for row in rows[-3:]) > sum(row["reward"] for row in rows[:3])


def test_a_model_without_experts_has_nothing_to_replay(tmp_path: Path):
    config = replace(grpo_config(tmp_path, model=dense()), replay_experts=True)
    with pytest.raises(InputError, match="field replay_experts is true, but this model has no routed experts"):
        grpo(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
