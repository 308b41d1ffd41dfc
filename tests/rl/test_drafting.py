"""MTP modules in GRPO: they learn to draft what the policy writes, and the policy does not notice."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import finback
from finback.config import InputError
from finback.model.transformer import Transformer
from finback.rewards.reward import Score
from finback.rl.batch import Batch, sample_log_probs
from finback.rl.config import GRPOConfig
from finback.rl.drafting import clip_apart, draft_acceptance, draft_loss_sum
from finback.rl.prompts import Prompt
from finback.rl.report import write_report
from finback.rl.rollout import Completion, Rollout
from finback.rl.train import grpo
from finback.train.metrics import read_metrics
from tests.rl.policies import grpo_config, write_policy
from tests.train.runs import micro_model

TWO_DEPTHS = micro_model(num_nextn_predict_layers=2)


def _completions() -> list[Completion]:
    lengths = [(3, 6), (5, 2), (1, 1), (2, 4)]
    return [
        Completion(
            Prompt("", [7 + i + j for j in range(prompt)], {}),
            [40 + 3 * i + j for j in range(sample)],
            [0.0] * sample,
            "",
            "stop",
            Score(0.0, {}),
        )
        for i, (prompt, sample) in enumerate(lengths)
    ]


def test_the_loss_is_that_of_each_samples_tokens_alone(tmp_path: Path):
    model = finback.load(write_policy(tmp_path / "model", TWO_DEPTHS), dtype=torch.float32)
    batch = Batch(_completions(), [0.0] * 4, 2, torch.device("cpu"))
    output = sample_log_probs(model, batch, temperature=1.0, precision="fp32", mtp=True)
    got = draft_loss_sum(model, batch, output.mtp_hidden)
    expected = 0.0
    for completion in batch.completions:
        ids = completion.prompt.token_ids + completion.token_ids
        with torch.no_grad():
            _, drafts = model(torch.tensor([ids]), mtp=True)
        for depth, logits in enumerate(drafts):
            for place in range(len(completion.prompt.token_ids), len(ids)):
                row = place - 2 - depth
                if row >= 0:
                    expected -= float(logits[0, row].log_softmax(-1)[ids[place]])
    assert float(got.detach()) == pytest.approx(expected, rel=1e-4)
    got.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    first = model.config.num_hidden_layers
    assert reached
    assert all(name.startswith(("model.layers.",)) and int(name.split(".")[2]) >= first for name in reached)


def test_gradients_of_drafts_are_clipped_by_their_own_norm():
    model = Transformer(micro_model(), dtype=torch.float32)
    inside, outside = f"model.layers.{micro_model().num_hidden_layers}.a", "model.layers.0.b"
    gradients = {inside: torch.tensor([30.0, 40.0]), outside: torch.tensor([3.0, 4.0])}
    assert clip_apart(model, gradients, 1.0) == pytest.approx(5.0)
    # The update multiplies everything by 1/5: the drafts' gradient must come out with norm 1.
    assert torch.linalg.vector_norm(gradients[inside] / 5) == pytest.approx(1.0, rel=1e-4)
    assert gradients[outside].tolist() == [3.0, 4.0]
    gradients[inside][0] = math.inf
    assert math.isnan(clip_apart(model, gradients, 1.0))


def _policy(directory: Path) -> dict[str, torch.Tensor]:
    model = finback.load(directory, dtype=torch.float32)
    first = model.config.num_hidden_layers
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < first
    }


def test_the_policy_is_bitwise_the_same_with_and_without_drafts(tmp_path: Path):
    config = grpo_config(tmp_path, steps=3, max_grad_norm=0.05)
    trained, frozen = (grpo(replace(config, freeze_mtp=freeze), tmp_path / f"freeze-{freeze}") for freeze in (False, True))
    left, right = _policy(trained), _policy(frozen)
    assert all(torch.equal(left[name], right[name]) for name in left)
    rows = [read_metrics(tmp_path / f"freeze-{freeze}" / "metrics.jsonl") for freeze in (False, True)]
    assert all("mtp_loss" in row for row in rows[0])
    assert not any("mtp_loss" in row for row in rows[1])
    assert [row["reward"] for row in rows[0]] == [row["reward"] for row in rows[1]]
    before, after = (finback.load(place, dtype=torch.float32) for place in (tmp_path / "model", trained))
    moved = zip(before.mtp_modules[0].parameters(), after.mtp_modules[0].parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_drafts_are_learnt_and_told(tmp_path: Path):
    config = grpo_config(tmp_path, steps=10, lr=1e-2, mtp_loss_weight=0.3)
    grpo(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(0 <= row["mtp_acceptance"] <= 1 for row in rows)
    assert rows[-1]["mtp_loss"] < rows[0]["mtp_loss"]
    assert rows[-1]["mtp_acceptance_after"] > rows[0]["mtp_acceptance"]
    write_report(tmp_path / "run")
    assert "The MTP module, trained along" in (tmp_path / "run" / "report.md").read_text()


def test_acceptance_is_the_share_of_drafts_that_the_main_head_agrees_with(tmp_path: Path):
    model = finback.load(write_policy(tmp_path / "model", TWO_DEPTHS), dtype=torch.float32)
    completions = _completions()
    rollout = Rollout([[completion] for completion in completions], 1.0, 0.0)
    got = draft_acceptance(model, rollout, GRPOConfig(model="", micro_batch_tokens=20, precision="fp32"))
    agreed, total = [0, 0], [0, 0]
    for completion in completions:
        ids = completion.prompt.token_ids + completion.token_ids
        with torch.no_grad():
            logits, drafts = model(torch.tensor([ids]), mtp=True)
        for depth in range(2):
            for place in range(max(2 + depth, len(completion.prompt.token_ids)), len(ids)):
                agreed[depth] += int(drafts[depth][0, place - 2 - depth].argmax() == logits[0, place - 1].argmax())
                total[depth] += 1
    assert got == {"mtp_acceptance": agreed[0] / total[0], "mtp_acceptance_2": agreed[1] / total[1]}


def test_router_biases_move_whether_drafts_are_trained_or_not(tmp_path: Path):
    config = grpo_config(tmp_path, steps=1, bias_update_speed=0.01)
    for freeze in (False, True):
        checkpoint = grpo(replace(config, freeze_mtp=freeze), tmp_path / f"run-{freeze}")
        biases = [router.e_score_correction_bias for router in finback.load(checkpoint, dtype=torch.float32).routers()]
        moved = [bool(bias.any()) for bias in biases if bias is not None]
        assert moved == [True, True, not freeze, not freeze]


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(InputError, match="set freeze_mtp as well"):
        GRPOConfig(model="", mtp_loss_weight=0.0)
