"""Batches in which samples share prompts, beside each sample by itself."""

import random

import pytest
import torch

from finback.config import ModelConfig
from finback.model.mla import Rotary
from finback.model.transformer import Transformer, init_weights
from finback.ops.rotary import rotary_table
from finback.rl.batch import PADDED, Batch, cut_batches, sample_log_probs
from finback.rl.drafting import draft_loss_sum
from finback.rl.prompts import Prompt
from finback.rl.rollout import Completion
from tests.train.runs import micro_dense, micro_model

CPU = torch.device("cpu")
SHORT = [(1, [1]), (1, [3, 1]), (2, [1, 1, 5]), (3, [4]), (17, [9, 2, 30, 1])]


def samples(lengths: list[tuple[int, list[int]]], seed: int = 0) -> list[Completion]:
    """Of prompts and samples with so many tokens."""
    draw = random.Random(seed)
    groups = [(Prompt("", [draw.randrange(3, 64) for _ in range(prompt)], {}), own) for prompt, own in lengths]
    return [
        Completion(prompt, [draw.randrange(3, 64) for _ in range(length)], [-draw.random() for _ in range(length)])
        for prompt, own in groups
        for length in own
    ]


def policy(config: ModelConfig) -> Transformer:
    model = Transformer(config, dtype=torch.float32)
    init_weights(model, 1)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        for router in model.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize(
    "config",
    [*(micro_model(num_nextn_predict_layers=depths) for depths in (0, 1, 2)), micro_dense()],
    ids=["no MTP", "one depth", "two depths", "dense"],
)
def test_log_probs_gradients_drafts_and_counts_are_those_of_each_sample_alone(config: ModelConfig) -> None:
    model, completions, depths = policy(config), samples(SHORT), config.num_nextn_predict_layers
    batch = Batch(completions, [0.0] * len(completions), depths, CPU)
    weights = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(3))
    output = sample_log_probs(model, batch, temperature=1.0, precision="fp32", mtp=True)
    drafts = draft_loss_sum(model, batch, output.mtp_hidden)
    ((output.at_temperature * weights).sum() + drafts).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    counts, of_drafts, total = torch.zeros_like(output.expert_counts), torch.zeros(()), torch.zeros(())
    head = model.lm_head.weight.detach()
    for row, completion in enumerate(completions):
        ids = torch.tensor([[*completion.prompt.token_ids, *completion.token_ids]])
        first, length = len(completion.prompt.token_ids), len(completion.token_ids)
        alone = model.train_forward(ids[:, :-1], mtp=False)
        log_probs = model.lm_head(alone.hidden).log_softmax(-1).gather(-1, ids[:, 1:, None])[0, first - 1 :, 0]
        torch.testing.assert_close(output.at_temperature[row, :length], log_probs, rtol=1e-4, atol=1e-5)
        assert not output.at_temperature[row, length:].any()
        total = total + (log_probs * weights[row, :length]).sum()
        counts[: len(alone.expert_counts)] += alone.expert_counts
        whole = model.train_forward(ids, mtp=True)
        counts[len(alone.expert_counts) :] += whole.expert_counts[len(alone.expert_counts) :]
        previous, known = alone.hidden.detach(), model.embed(ids).detach()
        for depth, module in enumerate(model.mtp_modules):  # as train_forward, but cut off from the main model
            previous = previous[:, : ids.shape[1] - 1 - depth]
            if not previous.shape[1]:
                break
            table = Rotary(*rotary_table(config, torch.arange(previous.shape[1])))
            previous = module.shared_head.norm(module(module.combine(previous, known[:, depth + 1 :]), table)[0])
            for place in range(first, ids.shape[1]):
                if place - 2 - depth >= 0:
                    of_drafts = of_drafts - (previous[0, place - 2 - depth] @ head.T).log_softmax(-1)[ids[0, place]]
    assert float(drafts.detach()) == pytest.approx(float(of_drafts.detach()), rel=1e-5)
    assert torch.equal(output.expert_counts, counts)
    (total + of_drafts).backward()
    for name, parameter in model.named_parameters():
        one, other = found[name], parameter.grad
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            assert float((one - other).norm()) <= 1e-4 * float(other.norm()) + 1e-7, name


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_a_prompt_is_computed_once(depths: int) -> None:
    completions = samples([(50, [64] * 8)])
    batch = Batch(completions, [0.0] * 8, depths, CPU)
    assert batch.num_tokens == 49 - depths + 8 * (64 + depths)
    assert batch.prefixes.positions.max() == 50 + 63 - 1


@pytest.mark.parametrize("limit", [1, 20, 60, 10_000])
@pytest.mark.parametrize("depths", [0, 1])
def test_batches_hold_every_sample_once_and_no_more_tokens_than_they_may(limit: int, depths: int) -> None:
    completions = samples(SHORT)
    order = list(range(len(completions)))
    random.Random(4).shuffle(order)
    mixed = [completions[i] for i in order]
    batches = cut_batches(mixed, [float(i) for i in order], limit, depths, CPU)
    assert sorted(a for batch in batches for a in batch.advantages.tolist()) == [float(i) for i in range(len(order))]
    for batch in batches:
        assert all(completions[int(a)] is c for a, c in zip(batch.advantages.tolist(), batch.completions, strict=True))
        assert batch.num_tokens <= limit or len(batch.completions) == 1
    if limit == 10_000:
        (batch,) = batches
        assert batch.num_tokens == sum(max(0, p - 1 - depths) + sum(min(p - 1, depths) + n for n in own) for p, own in SHORT)


def test_batches_are_filled() -> None:
    """A prompt of 11 tokens and four samples of 5: two to a batch of 20."""
    batches = cut_batches(samples([(11, [5] * 4)]), [0.0] * 4, 20, 0, CPU)
    assert [(len(batch.completions), batch.num_tokens) for batch in batches] == [(2, 20), (2, 20)]


def test_a_long_sample_does_not_have_many_short_ones_padded_to_it() -> None:
    """Attention's sequences are padded to the longest of a batch; each batch has one for each prompt besides."""
    completions = samples([(10, [200] + [5] * 60), (12, [4] * 8)])
    batches = cut_batches(completions, [0.0] * len(completions), 300, 0, CPU)
    for batch in batches:
        assert batch.num_tokens <= 300
        assert batch.prefixes.keys.numel() <= PADDED * 300
    assert sum(len(batch.completions) for batch in batches) == 69
    assert len(batches) <= 4


def test_choices_of_experts_are_those_that_the_engine_recorded() -> None:
    """Of a prompt those for its first sample."""
    completions = samples([(3, [2, 3])])
    for value, completion in enumerate(completions):
        tokens = len(completion.prompt.token_ids) + len(completion.token_ids) - 1
        completion.experts = (torch.arange(tokens * 4).view(tokens, 2, 2) + 100 * value).to(torch.int16)
    experts = Batch(completions, [0.0, 0.0], 1, CPU).experts
    assert experts is not None
    first, second = (completion.experts.transpose(0, 1).long() for completion in completions if completion.experts is not None)
    assert torch.equal(experts, torch.cat((first, second[:, 1:]), 1))


def test_a_token_behind_a_token_reaches_every_module() -> None:
    """Its deeper MTP modules have nothing to draft, and a gradient of zero."""
    model = policy(micro_model(num_nextn_predict_layers=2))
    batch = Batch(samples([(1, [1])]), [0.0], 2, CPU)
    output = sample_log_probs(model, batch, temperature=1.0, precision="fp32", mtp=True)
    (output.at_temperature.sum() + draft_loss_sum(model, batch, output.mtp_hidden)).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_a_sample_without_tokens_is_refused() -> None:
    empty = Completion(Prompt("", [3, 4], {}), [], [])
    with pytest.raises(AssertionError, match="leave it out"):
        Batch([*samples([(2, [3])]), empty], [0.0, 0.0], 0, CPU)
