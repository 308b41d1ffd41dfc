"""V3's published schedule at its corner points (section 4.2), and what holds of every ramp."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.presets import tiny, v3_671b
from finback.train.ramps import (
    V3_TOKENS,
    Ramps,
    batch_size,
    bias_update_speed,
    cosine,
    learning_rate,
    mtp_loss_coef,
    resolve_ramps,
    tokens_of_steps,
)

T = 10**12
B = 10**9


@pytest.fixture
def v3() -> Ramps:
    config = v3_671b()
    assert config.tokens == V3_TOKENS == 14_800 * B
    return resolve_ramps(config, config.tokens)


def test_v3_warmup_rises_linearly_over_two_thousand_steps(v3: Ramps) -> None:
    assert learning_rate(v3, step=1, tokens=0) == pytest.approx(2.2e-4 / 2000)
    assert learning_rate(v3, step=1000, tokens=10 * B) == pytest.approx(1.1e-4)
    assert learning_rate(v3, step=2000, tokens=20 * B) == 2.2e-4
    assert learning_rate(v3, step=2001, tokens=20 * B) == 2.2e-4


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (T, 2.2e-4),
        (10 * T - 1, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 2150 * B, (2.2e-4 + 2.2e-5) / 2),  # half of the cosine
        (10 * T + 1075 * B, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.sqrt(0.5)) / 2),
        (14_300 * B, 2.2e-5),
        (14_633 * B - 1, 2.2e-5),
        (14_633 * B, 7.3e-6),
        (14_800 * B - 1, 7.3e-6),
    ],
)
def test_v3_learning_rate_at_published_corners(v3: Ramps, tokens: int, expected: float) -> None:
    assert learning_rate(v3, step=240_000, tokens=tokens) == pytest.approx(expected, rel=1e-12)


def test_v3_batch_grows_from_3072_to_15360_over_469_billion_tokens(v3: Ramps) -> None:
    assert batch_size(v3, 0) == 3072
    assert batch_size(v3, 469 * B // 2) == (3072 + 15360) // 2
    assert batch_size(v3, 469 * B - 1) == 15359
    assert batch_size(v3, 469 * B) == 15360
    assert batch_size(v3, 14 * T) == 15360


def test_v3_gamma_and_lambda_switch_once(v3: Ramps) -> None:
    assert bias_update_speed(v3, 0) == bias_update_speed(v3, 14_300 * B - 1) == 0.001
    assert bias_update_speed(v3, 14_300 * B) == 0.0
    assert mtp_loss_coef(v3, 0) == mtp_loss_coef(v3, 10 * T - 1) == 0.3
    assert mtp_loss_coef(v3, 10 * T) == 0.1


def test_open_switches_take_v3_shares_of_the_run() -> None:
    ramps = resolve_ramps(tiny(), 1_480_000)
    assert ramps.lr_constant_tokens == 1_000_000
    assert ramps.lr_decay_tokens == 430_000
    assert ramps.lr_tail_tokens == 33_300
    assert ramps.bias_update_tokens == 1_430_000
    assert ramps.mtp_loss_switch_tokens == 1_000_000
    assert resolve_ramps(replace(tiny(), lr_decay_tokens=7), 1_480_000).lr_decay_tokens == 7


def test_no_switch_is_reached_while_the_length_of_the_run_is_unknown() -> None:
    config = tiny()
    ramps = resolve_ramps(config, None)
    assert learning_rate(ramps, step=10**6, tokens=10**15) == config.lr
    assert bias_update_speed(ramps, 10**15) == config.bias_update_speed
    assert mtp_loss_coef(ramps, 10**15) == config.mtp_loss_coef


@settings(deadline=None, max_examples=60)
@given(total=st.integers(1, 10**13), a=st.integers(0, 10**13), b=st.integers(0, 10**13))
def test_after_warmup_the_learning_rate_never_rises(total: int, a: int, b: int) -> None:
    ramps = resolve_ramps(tiny(), total)
    early, late = sorted((a, b))
    step = ramps.warmup_steps
    assert learning_rate(ramps, step=step, tokens=early) >= learning_rate(ramps, step=step, tokens=late) >= ramps.final_lr


@settings(deadline=None, max_examples=60)
@given(
    first=st.integers(1, 20),
    last=st.integers(0, 30),
    ramp=st.integers(1, 5000),
    length=st.integers(1, 32),
    steps=st.integers(0, 400),
)
def test_tokens_of_steps_counts_what_the_ramp_reads(first: int, last: int, ramp: int, length: int, steps: int) -> None:
    ramps = replace(resolve_ramps(tiny(), None), initial_batch_size=first, global_batch_size=first + last, batch_ramp_tokens=ramp)
    tokens, sizes = 0, []
    for _ in range(steps):
        sizes.append(batch_size(ramps, tokens))
        tokens += sizes[-1] * length
    assert sizes == sorted(sizes)
    assert all(first <= size <= first + last for size in sizes)
    assert tokens_of_steps(ramps, steps=steps, sequence_length=length) == tokens


def test_fine_tuning_warms_up_and_falls_along_one_cosine() -> None:
    rates = [cosine(step=step, total_steps=12, warmup_steps=2, lr=1.0, min_lr=0.1) for step in range(1, 13)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[6] == pytest.approx(0.55)  # half way between step 2 and step 12
    assert rates[-1] == pytest.approx(0.1)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert cosine(step=1, total_steps=5, warmup_steps=0, lr=1.0, min_lr=0.1) == 1.0
    assert cosine(step=1, total_steps=1, warmup_steps=1, lr=1.0, min_lr=0.1) == 1.0
