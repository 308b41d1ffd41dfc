"""Serving and RL plans: published arithmetic, what must grow with what, and impossible units."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.config import InputError, checkpoint_tensors
from finback.planner.fit import PUBLISHED, fit_table
from finback.planner.hardware import HARDWARE
from finback.planner.inference import (
    Unit,
    check_unit,
    decode_step,
    largest_batch,
    network_limit_ms,
    prefill,
    usual_unit,
    weight_bytes_per_device,
)
from finback.planner.layout import Layout, training_memory
from finback.planner.model import cache_bytes_per_token, shape
from finback.planner.rl import R1_ZERO, plan_rl
from finback.planner.serve import Tariff, Traffic, daily_cost_usd, dense_twin, margin, plan_serve, revenue_usd
from finback.planner.step import step_time
from finback.presets import tiny_dense, v2_lite_16b, v3_671b

V3, H800 = v3_671b().model, HARDWARE["h800"]
PREFILL, DECODE = Unit(ep=32, redundant_experts=32), Unit(ep=144, redundant_experts=32)


def test_deepseeks_published_day() -> None:
    cost, revenue = daily_cost_usd(226.75, 8, 2.0), revenue_usd(Traffic(), Tariff())
    assert cost == 87_072
    assert revenue == pytest.approx(562_027, rel=2e-4)
    assert margin(562_027, cost) == pytest.approx(5.45, abs=0.01)


def test_the_network_bound_limit_of_a_token() -> None:
    assert network_limit_ms(width=7000) == pytest.approx(14.76, abs=0.005)
    assert network_limit_ms() == pytest.approx(15.11, abs=0.005)
    assert network_limit_ms(width=7000, gb_per_second=900) == pytest.approx(0.82, abs=0.005)


def test_weights_of_one_device_are_those_of_the_checkpoint() -> None:
    stored = sum(
        spec_bytes * count
        for spec_bytes, count in (
            ({"BF16": 2, "F32": 4, "F8_E4M3": 1}[spec.dtype], _size(spec.shape))
            for spec in checkpoint_tensors(V3)
            if not spec.name.startswith("model.layers.61.")
        )
    )
    assert weight_bytes_per_device(V3, Unit(), "fp8") == pytest.approx(stored, rel=1e-3)
    eighth = weight_bytes_per_device(V3, Unit(ep=8), "fp8")
    assert 8 * eighth > stored > 5 * eighth  # what is no expert is on all eight


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def test_one_request_on_one_device_is_bound_by_reading() -> None:
    """A dense model's step at batch 1 by hand: weights without the embedding's rows, then the cache."""
    model = tiny_dense().model
    card = replace(HARDWARE["rtx4090"], efficiencies=replace(HARDWARE["rtx4090"].efficiencies, busy=1.0))
    step = decode_step(model, card, Unit(), "bf16", 1, 1000)
    read = 1000 * cache_bytes_per_token(model) / card.bytes_per_second
    assert step.cache_ms == pytest.approx(1e3 * read)
    assert step.exchange_ms == 0
    assert step.tokens_per_second_per_device == pytest.approx(step.tokens_per_second_per_request)


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([8, 32, 144]), st.floats(100, 100_000))
def test_more_requests_are_slower_each_and_faster_together(one: int, other: int, ep: int, context: float) -> None:
    unit = Unit(ep=ep, redundant_experts=32 if ep == 144 else 0)
    small, large = (decode_step(V3, H800, unit, "fp8", batch, context) for batch in sorted((one, other)))
    assert small.tpot_ms <= large.tpot_ms * (1 + 1e-9)
    if large.batch >= 2 * small.batch:  # nearer ones may fall on either side of cutting the batch in half
        assert small.tokens_per_second_per_device <= large.tokens_per_second_per_device * 1.2
    longer = decode_step(V3, H800, unit, "fp8", small.batch, 2 * context)
    assert longer.tpot_ms >= small.tpot_ms  # equal where the exchange sets the time
    assert longer.cache_ms == pytest.approx(2 * small.cache_ms) or longer.overlapped != small.overlapped


def test_parts_sum_to_the_step() -> None:
    for batch in (1, 16, 128):
        step = decode_step(V3, H800, DECODE, "fp8", batch, 4989)
        assert step.weights_ms + step.cache_ms + step.exposed_exchange_ms + step.idle_ms == pytest.approx(step.tpot_ms)


def test_drafts_gain_what_is_accepted_less_their_cost() -> None:
    plain = decode_step(V3, H800, DECODE, "fp8", 16, 4989)
    drafted = decode_step(V3, H800, DECODE, "fp8", 16, 4989, mtp_acceptance=0.85)
    assert 1.0 < plain.tpot_ms / drafted.tpot_ms < 1.85


def test_drafts_take_the_weights_and_the_cache_of_mtps_layer() -> None:
    """Its attention, projection, router and shared expert are on every device, its routed experts spread; embedding and head are the
    model's own (V3 section 2.2)."""
    plain, drafting = (weight_bytes_per_device(V3, DECODE, "bf16", mtp=mtp) for mtp in (False, True))
    s = shape(V3)
    own = s.attention + 2 * 7168**2 + s.router + s.expert + 288 / 144 * s.expert
    assert drafting - plain == pytest.approx(2 * own)
    room, more = (
        (0.9 * 80e9 - size) / (4989 * layers * 1152)
        for size, layers in zip(
            (weight_bytes_per_device(V3, DECODE, "fp8"), weight_bytes_per_device(V3, DECODE, "fp8", mtp=True)),
            (61, 62),
            strict=True,
        )
    )
    assert largest_batch(V3, H800, DECODE, "fp8", 4989, 2.0) == int(room)
    assert largest_batch(V3, H800, DECODE, "fp8", 4989, 2.0, mtp=True) == int(more) < int(room)
    assert not decode_step(V3, H800, DECODE, "fp8", int(room), 4989, mtp_acceptance=0.8).fits
    plans = [plan_serve(V3, H800, PREFILL, DECODE, batch=64, mtp_acceptance=share) for share in (0.0, 0.8)]
    assert plans[0].largest_batch_per_device > plans[1].largest_batch_per_device
    assert plans[0].weight_gb_per_decode_device < plans[1].weight_gb_per_decode_device
    assert plans[0].weight_gb_per_prefill_device < plans[1].weight_gb_per_prefill_device
    assert plans[0].latencies[0].cache_gb_per_device < plans[1].latencies[0].cache_gb_per_device
    ratio = plans[1].prefill.tokens_per_second_per_device / plans[0].prefill.tokens_per_second_per_device
    assert 61 / 64 < ratio < 61 / 62  # a prompt passes MTP's layer, too, which fills its cache


def test_a_draft_passes_one_layer_and_the_head() -> None:
    """Of one request on one device, where reading sets the time: weights of MTP's layer and of the head, and a layer's cache."""
    instant = replace(H800, exchange_latency_us=0.0, efficiencies=replace(H800.efficiencies, busy=1.0, memory=1.0))
    plain = decode_step(V3, instant, Unit(), "bf16", 1, 4989)
    drafted = decode_step(V3, instant, Unit(), "bf16", 1, 4989, mtp_acceptance=1e-9)
    verified = decode_step(V3, instant, Unit(), "bf16", 2, 4989)
    s = shape(V3)
    picked = 256 * (1 - (1 - 8 / 256) ** 2)  # experts that either of the two rows chooses
    read = 2 * (s.attention + 2 * 7168**2 + s.router + s.expert + picked * s.expert + s.embedding) + 4989 * 1152
    draft = drafted.tpot_ms - verified.tpot_ms  # scores of two rows take longer than reading one cache or two
    assert draft == pytest.approx(read / 3350e9 * 1e3, rel=0.02)
    assert drafted.tpot_ms > plain.tpot_ms


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    most = largest_batch(V3, H800, DECODE, "fp8", 4989, 2.0)
    assert decode_step(V3, H800, DECODE, "fp8", most, 4989).fits
    assert not decode_step(V3, H800, DECODE, "fp8", most + 1, 4989).fits
    assert largest_batch(V3, H800, Unit(ep=8), "bf16", 4989, 2.0) == 0


def test_cached_input_costs_less_and_brings_less() -> None:
    plan = plan_serve(V3, H800, PREFILL, DECODE, batch=88)
    rows = plan.cache_hits
    assert [row.prefill_nodes for row in rows] == sorted((row.prefill_nodes for row in rows), reverse=True)
    assert [row.revenue_usd_per_day for row in rows] == sorted((row.revenue_usd_per_day for row in rows), reverse=True)
    filled = prefill(V3, H800, PREFILL, "fp8", 4000, 0.5)
    assert filled.tokens_per_second_per_device_with_hits == pytest.approx(2 * filled.tokens_per_second_per_device)


def test_one_tenant_should_take_the_dense_model_and_many_the_mixture() -> None:
    choices = plan_serve(V3, H800, PREFILL, DECODE, batch=88).traffic_choices
    assert choices[0].cheaper == "dense"
    assert choices[-1].cheaper == "mixture"
    assert choices[-1].moe_usd_per_million_output == pytest.approx(choices[-1].moe_device_seconds_per_million_output / 1800)


def test_the_dense_twin_has_the_parameters_it_should() -> None:
    from finback.config import count_params
    from finback.planner.dense import dense_equivalent

    for model in (V3, v2_lite_16b().model):
        assert count_params(dense_twin(model)).total == pytest.approx(dense_equivalent(model), rel=0.15)


def test_the_batch_that_is_left_out_fits() -> None:
    assert plan_serve(V3, H800, PREFILL, DECODE).decode.batch == 88
    small = plan_serve(v2_lite_16b().model, HARDWARE["rtx4090"], Unit(), Unit())
    assert small.decode.batch == small.largest_batch_per_device < 88
    assert small.decode.fits


def test_a_bill_without_a_rent_is_unknown() -> None:
    plan = plan_serve(V3, HARDWARE["h200"], PREFILL, DECODE, batch=88)
    assert plan.economics.cost_usd_per_day is None
    assert plan.economics.total_nodes > 0
    assert plan.unknown_figures == ["usd_per_hour"]


def test_what_fits_on_a_card() -> None:
    rows = {(row.model, row.precision): row for row in fit_table(HARDWARE["rtx4090"], 8192)}
    assert rows["R1-Distill-Qwen-7B", "bf16"].fits
    assert not rows["R1-Distill-Qwen-14B", "bf16"].fits
    assert rows["R1-Distill-Qwen-14B", "fp8"].fits
    assert rows["R1-Distill-Qwen-32B", "int4"].fits
    assert not rows["DeepSeek-V3 / R1", "int4"].fits
    assert rows["DeepSeek-V2-Lite", "fp8"].most_context_tokens == 163_840
    for row in rows.values():
        model = next(model for model in PUBLISHED if model.name == row.model)
        used = row.weights_gb * 1e9 + row.most_context_tokens * model.cache_bytes_per_token
        assert row.most_context_tokens == 0 or used <= 0.9 * 24e9


def test_v2_lite_of_the_table_is_the_preset() -> None:
    model = next(model for model in PUBLISHED if model.name == "DeepSeek-V2-Lite")
    assert model.cache_bytes_per_token == cache_bytes_per_token(v2_lite_16b().model)


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        (Unit(ep=48), r"it must divide experts with their copies \(256 \+ 0\); the nearest is 32, or --redundant-experts 32"),
        (Unit(tp=3), r"--tp is 3, it must divide num_attention_heads \(128\)"),
        (Unit(ep=0), "--ep is 0, it must be at least 1"),
        (Unit(tp=-1), "--tp is -1, it must be at least 1"),
        (Unit(redundant_experts=-60), "--redundant-experts is -60, it must be at least 0"),
        (Unit(ep=8, tp=4), "--tp is 4, but experts are spread over --ep 8 devices; use 1"),
    ],
)
def test_units_that_do_not_divide(unit: Unit, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_unit(V3, unit)


def test_impossible_servings() -> None:
    with pytest.raises(InputError, match="the model is dense"):
        check_unit(tiny_dense().model, Unit(ep=8))
    with pytest.raises(InputError, match="--redundant-experts is 2, but the model is dense; use 0"):
        check_unit(tiny_dense().model, Unit(redundant_experts=2))
    with pytest.raises(InputError, match=r"each of 4 devices would hold \d+ GB of weights; take --prefill-ep 16"):
        plan_serve(V3, H800, Unit(ep=4), Unit(ep=4))
    with pytest.raises(InputError, match=r"each of 4 devices would hold \d+ GB of weights; take --decode-ep 16"):
        plan_serve(V3, H800, Unit(ep=16), Unit(ep=4))
    with pytest.raises(InputError, match=r"each of 8 devices would hold \d+ GB of weights; take --prefill-ep 16 and --tp 1"):
        plan_serve(V3, H800, Unit(tp=8), Unit(tp=8))
    with pytest.raises(InputError, match="a device with more memory, or a lower precision"):
        plan_serve(V3, HARDWARE["laptop-rtx4070"], Unit(ep=8), Unit(ep=8))
    with pytest.raises(InputError, match="--batch is 500, but from 1 to 136 requests of 4989 tokens fit on a device; use 136"):
        plan_serve(V3, H800, PREFILL, DECODE, batch=500)
    with pytest.raises(InputError, match="--hit-share is 1"):
        plan_serve(V3, H800, PREFILL, DECODE, traffic=Traffic(hit_share=1.0))
    with pytest.raises(InputError, match="--mtp-acceptance is 2"):
        plan_serve(V3, H800, PREFILL, DECODE, mtp_acceptance=2.0)
    for name in ("context_tokens", "prompt_tokens"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is 1000000, above .* use 163840"):
            plan_serve(V3, H800, PREFILL, DECODE, traffic=replace(Traffic(), **{name: 1e6}))


def test_an_rl_cycle_is_the_sum_of_its_parts_and_the_longest_answer_binds() -> None:
    plan = plan_rl(V3, H800, Layout(512, pp=16, ep=32), Unit(ep=32), R1_ZERO)
    assert plan.cycle_seconds == pytest.approx(
        plan.rollout_seconds + plan.reference_seconds + plan.reward_seconds + plan.training_seconds
    )
    assert plan.cycles == 650
    assert plan.rollout_seconds == plan.rollout_longest_answer_seconds > plan.rollout_throughput_bound_seconds
    short = plan_rl(V3, H800, Layout(512, pp=16, ep=32), Unit(ep=32), replace(R1_ZERO, longest_tokens=6000.0))
    assert short.cycle_seconds < plan.cycle_seconds


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    for name in ("input_tokens_per_day", "output_tokens_per_day", "prompt_tokens", "context_tokens", "hit_share"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is {value:g}"):
            plan_serve(V3, H800, PREFILL, DECODE, traffic=replace(Traffic(), **{name: value}))
    for name in ("usd_per_million_hit", "usd_per_million_miss", "usd_per_million_output"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is {value:g}, it must be at least 0"):
            plan_serve(V3, H800, PREFILL, DECODE, tariff=replace(Tariff(), **{name: value}))
    for name in ("mean_tokens", "longest_tokens"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is {value:g}"):
            plan_rl(V3, H800, Layout(512, pp=16, ep=32), Unit(ep=32), replace(R1_ZERO, **{name: value}))
    with pytest.raises(InputError, match=f"--mtp-acceptance is {value:g}, it must be between 0 and 1"):
        plan_rl(V3, H800, Layout(512, pp=16, ep=32), Unit(ep=32), R1_ZERO, mtp_acceptance=value)


def test_a_unit_that_does_not_divide_is_offered_what_the_other_takes_too() -> None:
    """144 devices of 256 experts: with 32 copies both units divide, with 44 only one would."""
    with pytest.raises(InputError, match=r"--decode-ep is 144, .* the nearest is 128, or --redundant-experts 32"):
        plan_serve(V3, H800, Unit(ep=32), Unit(ep=144))
    plan_serve(V3, H800, Unit(ep=32, redundant_experts=32), Unit(ep=144, redundant_experts=32))
    with pytest.raises(InputError, match=r"--decode-ep is 100, .* the nearest is 96$"):
        plan_serve(V3, H800, PREFILL, Unit(ep=100, redundant_experts=32))
    plan_serve(V3, H800, PREFILL, Unit(ep=96, redundant_experts=32))


def test_a_cut_model_prefills_a_prompt_together_and_shares_its_cache() -> None:
    twin, unit, traffic = dense_twin(V3), Unit(tp=8), Traffic(hit_share=0.0)
    plan = plan_serve(twin, H800, unit, unit, traffic=traffic, batch=1)
    first = plan.latencies[0]
    filled = prefill(twin, H800, unit, "fp8", traffic.prompt_tokens, 0.0)
    parts = filled.products_us + filled.attention_us + filled.elementwise_us + filled.exposed_exchange_us + filled.idle_us
    own = traffic.prompt_tokens * parts / 1e3  # each of eight does its part of every token, at the same time
    assert first.ttft_ms == pytest.approx(own * (1 + 0.7 / 0.6) + first.tpot_ms)
    whole = traffic.context_tokens * cache_bytes_per_token(twin) / 1e9
    assert first.cache_gb_per_device == pytest.approx(whole / 8)
    assert twin.num_key_value_heads == 8


def test_experts_are_sent_out_in_the_precision_of_products() -> None:
    """FP8: one byte out, two back; bf16: two and two."""
    instant = replace(H800, exchange_latency_us=0.0)
    low, wide = (decode_step(V3, instant, DECODE, precision, 32, 4989) for precision in ("fp8", "bf16"))
    assert wide.exchange_ms / low.exchange_ms == pytest.approx(4 / 3)
    limits = [plan_serve(V3, HARDWARE["h200"], DECODE, DECODE, precision=one).network_limit_tpot_ms for one in ("fp8", "bf16")]
    assert limits == [pytest.approx(network_limit_ms()), pytest.approx(network_limit_ms(value_bytes=4.0))]


def test_a_mixture_that_fits_one_card_is_offered_on_one_card() -> None:
    """And is then the cheaper one from the first request on: it reads fewer weights than the dense model of equal loss."""
    choices = plan_serve(v2_lite_16b().model, H800, Unit(), Unit()).traffic_choices
    assert choices[0].moe_devices == 1
    assert {choice.cheaper for choice in choices} == {"mixture"}
    assert plan_serve(V3, H800, PREFILL, DECODE).traffic_choices[0].moe_devices > 8


def test_the_usual_unit_is_the_smallest_that_holds_the_model() -> None:
    small = v2_lite_16b().model
    assert usual_unit(small, H800, "bf16", 32) == Unit()
    assert usual_unit(small, HARDWARE["rtx4090"], "bf16", 32) == Unit(ep=2)
    assert usual_unit(V3, HARDWARE["h200"], "fp8", 144) == Unit(ep=8)
    assert usual_unit(V3, H800, "fp8", 144) == DECODE
    assert usual_unit(small, H800, "bf16", 32, tp=4) == Unit(tp=4)
    assert usual_unit(tiny_dense().model, H800, "bf16", 32, tp=2) == Unit(tp=2)
    with pytest.raises(InputError, match="--tp is 0"):
        usual_unit(small, H800, "bf16", 32, tp=0)


def test_weights_that_fit_no_node_are_said_not_to_fit() -> None:
    """Where there is no network to more nodes; the precision or the hardware that is offered holds them."""
    small = v2_lite_16b().model
    with pytest.raises(
        InputError, match="24 GB, and 31 GB of weights in bf16 do not fit; take --precision int4 or --hardware h800"
    ):
        usual_unit(small, replace(HARDWARE["rtx4090"], devices_per_node=1), "bf16", 144)
    assert usual_unit(small, replace(HARDWARE["rtx4090"], devices_per_node=1), "int4", 144) == Unit()
    with pytest.raises(InputError, match="8 GB, and 16 GB of weights in fp8 do not fit; take --hardware h800"):
        usual_unit(small, HARDWARE["laptop-rtx4070"], "fp8", 144)


def test_training_in_an_rl_run_fits_or_is_said_not_to() -> None:
    layout = Layout(512, pp=16, ep=32)
    fixed = plan_rl(V3, H800, layout, Unit(ep=32), R1_ZERO)
    assert not fixed.fits
    assert fixed.memory_gb > 0.92 * 80
    length = int(R1_ZERO.mean_tokens + R1_ZERO.prompt_tokens)
    step = step_time(V3, H800, layout, "fp8", length, 512)
    assert fixed.memory_gb == training_memory(V3, layout, "fp8", length, step.live_activations).total_bytes / 1e9
    free = plan_rl(V3, H800, layout, Unit(ep=32), R1_ZERO, frozenset({"recompute"}))
    assert free.fits
    assert free.layout.endswith("recompute full")
    assert free.training_seconds > fixed.training_seconds
    roomy = plan_rl(V3, HARDWARE["h200"], layout, Unit(ep=32), R1_ZERO, frozenset({"recompute"}))
    assert roomy.layout.endswith("recompute selective")


def test_impossible_rl_runs() -> None:
    layout = Layout(512, pp=16, ep=32)
    with pytest.raises(InputError, match="multiple of --batch-size"):
        plan_rl(V3, H800, layout, Unit(ep=32), replace(R1_ZERO, outputs_per_rollout=8000))
    with pytest.raises(InputError, match="multiple of a rollout unit"):
        plan_rl(V3, H800, Layout(80, pp=16), Unit(ep=32), R1_ZERO)
    small = v2_lite_16b().model
    with pytest.raises(InputError, match=r"--pp is 16, it must divide --devices / --ep \(8 / 8 = 1\); the nearest is 1"):
        plan_rl(small, H800, Layout(8, pp=16, ep=8), Unit(ep=8), R1_ZERO)
    plan_rl(small, H800, Layout(8, pp=1, ep=8), Unit(ep=8), R1_ZERO)
    for name in ("pp", "ep"):
        with pytest.raises(InputError, match=f"--{name} is 0, it must be at least 1"):
            plan_rl(V3, H800, replace(layout, **{name: 0}), Unit(ep=0 if name == "ep" else 32), R1_ZERO)
    with pytest.raises(InputError, match="--precision is fp8, but a100 has no FP8 units; use bf16"):
        plan_rl(V3, HARDWARE["a100"], layout, Unit(ep=32), R1_ZERO)
    with pytest.raises(InputError, match=r"--longest-tokens is 200000, .* use at most 163640"):
        plan_rl(V3, H800, layout, Unit(ep=32), replace(R1_ZERO, longest_tokens=200_000.0))
    with pytest.raises(InputError, match="below --mean-tokens"):
        plan_rl(V3, H800, layout, Unit(ep=32), replace(R1_ZERO, longest_tokens=10.0))
