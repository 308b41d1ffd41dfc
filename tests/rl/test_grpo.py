"""Advantages and losses against numbers worked out by hand, the formulas in plain Python, and the algebra they must obey."""

import itertools
import math
import random

import pytest
import torch

from finback.rl.grpo import (
    global_token_loss,
    group_advantages,
    has_spread,
    is_clipped,
    k3_divergence,
    process_advantages,
    sequence_level_loss,
    surrogate,
    token_level_loss,
)

LOSSES = [token_level_loss, sequence_level_loss, global_token_loss]


def test_advantages_by_hand():
    # mean 0.5, deviation 0.5; then mean 2, deviation sqrt(2)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 2.0, 4.0, 2.0]])
    expected = torch.tensor([[1.0, -1.0, -1.0, 1.0], [-math.sqrt(2), 0.0, math.sqrt(2), 0.0]])
    torch.testing.assert_close(group_advantages(rewards), expected)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e6])
def test_a_group_of_equal_rewards_has_no_advantage(reward):
    rewards = torch.full((3, 8), reward)
    assert torch.equal(group_advantages(rewards), torch.zeros(3, 8))
    assert not has_spread(rewards).any()


def test_equal_rewards_that_are_sums_of_floats_have_no_spread():
    total = sum([0.1] * 7)  # 0.7 but for rounding
    assert not has_spread(torch.tensor([[total, 0.7, 0.7 + 1e-9]], dtype=torch.float64)).any()


def test_advantages_do_not_change_with_scale_and_shift_of_the_reward():
    rewards = torch.rand(5, 6, dtype=torch.float64)
    torch.testing.assert_close(group_advantages(3 * rewards + 2), group_advantages(rewards))


def test_process_supervision_by_hand():
    # Steps of the group: 1, 0 | 1, 1, 0, so mean 0.6 and deviation sqrt(0.24).
    deviation = math.sqrt(0.24)
    good, bad = 0.4 / deviation, -0.6 / deviation
    first, second = process_advantages([[1.0, 0.0], [1.0, 1.0, 0.0]], [[1, 3], [0, 2, 4]], [4, 6])
    assert first.tolist() == pytest.approx([good + bad] * 2 + [bad] * 2)
    assert second.tolist() == pytest.approx([2 * good + bad, good + bad, good + bad, bad, bad, 0.0])


def test_process_supervision_of_one_step_a_sample_is_outcome_supervision():
    rewards = [1.0, 0.0, 0.5]
    expected = group_advantages(torch.tensor(rewards)).tolist()
    for advantages, value in zip(process_advantages([[r] for r in rewards], [[4], [2], [3]], [5, 3, 4]), expected, strict=True):
        assert advantages.tolist() == pytest.approx([value] * len(advantages))


def test_k3_is_unbiased_and_never_negative():
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    divergence = k3_divergence(policy.log(), reference.log())
    assert (divergence >= 0).all()
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * divergence).sum(), exact)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "held"),
    [(1.5, 1.0, 1.2, True), (1.5, -1.0, -1.5, False), (0.5, 1.0, 0.5, False), (0.5, -1.0, -0.8, True), (1.1, 2.0, 2.2, False)],
)
def test_the_clip_by_hand(ratio, advantage, value, held):
    r = torch.tensor([ratio], requires_grad=True)
    objective = surrogate(r, torch.tensor([advantage]), 0.2)
    assert float(objective.detach()) == pytest.approx(value)
    assert bool(is_clipped(r, torch.tensor([advantage]), 0.2)) == held
    objective.sum().backward()
    assert float(r.grad) == pytest.approx(0.0 if held else advantage)


def test_r1s_clip_of_ten_has_no_lower_bound():
    ratio = torch.tensor([1e-6, 10.9, 11.5])
    assert is_clipped(ratio, torch.tensor([-1.0, 1.0, 1.0]), 10.0).tolist() == [False, False, True]


def test_two_epsilons():
    ratio = torch.tensor([1.25, 1.25, 0.75])
    assert is_clipped(ratio, torch.tensor([1.0, 1.0, -1.0]), 0.2, 0.28).tolist() == [False, False, True]


def _example(seed=0, samples=4, tokens=6):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 3, 1, 5])[:samples]
    mask = torch.arange(tokens) < lengths.unsqueeze(1)
    log_probs, old, reference = (-3 * torch.rand(samples, tokens, generator=generator, dtype=torch.float64) for _ in range(3))
    advantages = torch.randn(samples, generator=generator, dtype=torch.float64)
    return log_probs, old, advantages, mask, reference


def _written_out(kind, log_probs, old, advantages, mask, reference, epsilon, beta):
    """The published sums, one Python number at a time."""
    per_sample, all_tokens = [], []
    for i in range(len(log_probs)):
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        a = float(advantages[i])
        terms = []
        for t in tokens:
            rho = math.exp(log_probs[i, t] - old[i, t])
            clipped = min(max(rho, 1 - epsilon), 1 + epsilon)
            r = math.exp(reference[i, t] - log_probs[i, t])
            terms.append(min(rho * a, clipped * a) - beta * (r - math.log(r) - 1))
        all_tokens += terms
        if kind is token_level_loss:
            per_sample.append(sum(terms) / len(tokens))
        else:
            rho = math.exp(sum(float(log_probs[i, t] - old[i, t]) for t in tokens))
            r = math.exp(sum(float(reference[i, t] - log_probs[i, t]) for t in tokens))
            clipped = min(max(rho, 1 - epsilon), 1 + epsilon)
            per_sample.append(min(rho * a, clipped * a) - beta * (r - math.log(r) - 1))
    return -sum(all_tokens) / len(all_tokens) if kind is global_token_loss else -sum(per_sample) / len(per_sample)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_losses_are_the_published_sums(loss, beta):
    log_probs, old, advantages, mask, reference = _example()
    value = loss(log_probs, old, advantages, mask, epsilon=0.2, beta=beta, reference_log_probs=reference)
    assert float(value) == pytest.approx(_written_out(loss, log_probs, old, advantages, mask, reference, 0.2, beta))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("parts", [[(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 4)]])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(loss, parts):
    log_probs, old, advantages, mask, reference = _example()
    whole = {"num_tokens": int(mask.sum())} if loss is global_token_loss else {"num_samples": 4}

    def gradient(cuts):
        leaf = log_probs.clone().requires_grad_()
        for start, end in cuts:
            rows = slice(start, end)
            width = int(mask[rows].sum(1).max())  # a micro-batch is as wide as its longest sample
            loss(
                leaf[rows, :width], old[rows, :width], advantages[rows], mask[rows, :width],
                beta=0.04, reference_log_probs=reference[rows, :width], **whole,
            ).backward()  # fmt: skip
        return leaf.grad

    torch.testing.assert_close(gradient(parts), gradient([(0, 4)]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_stands_outside_of_the_mask_changes_nothing(loss):
    log_probs, old, advantages, mask, reference = _example()
    leaf = torch.where(mask, log_probs, 77.0).requires_grad_()
    noisy = loss(
        leaf, torch.where(mask, old, -99.0), advantages, mask, beta=0.1, reference_log_probs=torch.where(mask, reference, 5.0)
    )
    clean = loss(log_probs, old, advantages, mask, beta=0.1, reference_log_probs=reference)
    torch.testing.assert_close(noisy, clean)
    noisy.backward()
    assert torch.equal(leaf.grad[~mask], torch.zeros_like(leaf.grad[~mask]))


def test_the_single_update_has_the_gradient_of_the_papers_appendix():
    """With pi_old = pi the coefficient of grad log pi is A + beta (pi_ref / pi - 1) (DeepSeekMath equation 21)."""
    log_probs, _, advantages, mask, reference = _example()
    leaf = log_probs.clone().requires_grad_()
    token_level_loss(leaf, log_probs, advantages, mask, beta=0.04, reference_log_probs=reference).backward()
    coefficient = advantages.unsqueeze(1) + 0.04 * ((reference - log_probs).exp() - 1)
    expected = -coefficient * mask / mask.sum(1, keepdim=True) / 4
    torch.testing.assert_close(leaf.grad, expected)


def test_token_level_takes_advantages_by_token():
    log_probs, old, advantages, mask, _ = _example()
    by_token = advantages.unsqueeze(1).expand_as(log_probs).contiguous()
    torch.testing.assert_close(
        token_level_loss(log_probs, old, by_token, mask), token_level_loss(log_probs, old, advantages, mask)
    )


def test_the_forms_differ_in_how_long_samples_weigh():
    """A sample twice as long pulls twice as hard in the sequence form and in the global mean, and not in the token form."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    pulls = {}
    for loss in LOSSES:
        leaf = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
        loss(leaf, torch.zeros(2, 4, dtype=torch.float64), torch.ones(2, dtype=torch.float64), mask).backward()
        pulls[loss] = leaf.grad.sum(1)
    assert pulls[token_level_loss].tolist() == pytest.approx([-0.5, -0.5])
    assert pulls[sequence_level_loss].tolist() == pytest.approx([-2.0, -1.0])
    assert pulls[global_token_loss].tolist() == pytest.approx([-4 / 6, -2 / 6])


def test_a_sample_without_tokens_adds_nothing():
    mask = torch.tensor([[True, True], [False, False]])
    zeros = torch.zeros(2, 2)
    for loss in LOSSES:
        assert torch.isfinite(loss(zeros, zeros, torch.tensor([1.0, 1.0]), mask))


def test_advantages_of_random_groups_have_mean_zero_and_deviation_one():
    generator = random.Random(3)
    for size, _ in itertools.product((2, 4, 16), range(20)):
        rewards = torch.tensor([generator.choice([0.0, 0.1, 1.0, 1.1]) for _ in range(size)], dtype=torch.float64)
        advantages = group_advantages(rewards)
        if has_spread(rewards):
            assert float(advantages.mean()) == pytest.approx(0, abs=1e-12)
            assert float(advantages.std(correction=0)) == pytest.approx(1)
