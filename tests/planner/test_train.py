"""Training plans: traffic and memory by hand, what must grow with what, and impossible layouts."""

import time
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.config import InputError
from finback.parallel.schedule import SCHEDULES, Costs, interleaved, simulate
from finback.planner.communication import all_to_all, distinct
from finback.planner.dense import cheapest, chinchilla_loss, compare_with_dense, dense_equivalent
from finback.planner.hardware import HARDWARE
from finback.planner.inference import Unit
from finback.planner.layout import (
    Layout,
    activation_bytes_per_layer,
    check_layout,
    nearest_divisor,
    parameters_of_ranks,
    stages,
    training_memory,
)
from finback.planner.model import modules
from finback.planner.rl import R1_ZERO, plan_rl
from finback.planner.stages import balanced
from finback.planner.step import pipeline, step_time
from finback.planner.train import Prices, bill, evaluate, plan_train, search
from finback.presets import tiny_dense, v2_lite_16b, v3_671b

V3, H800 = v3_671b().model, HARDWARE["h800"]
PAPER = Layout(2048, pp=16, ep=64, schedule="dualpipe", overlap=True)
SEARCHED = frozenset({"pp", "ep", "schedule", "recompute"})


def test_a_token_of_v3_goes_to_four_nodes_of_eight() -> None:
    hops = all_to_all(V3, 64, 8, 1.0)
    assert hops.nodes == 8
    assert hops.copies_to_other_nodes == pytest.approx(4 * 7 / 8)
    assert hops.scale_out_bytes == pytest.approx(3.5 * 7168 * 3)
    assert hops.copies_to_other_devices == pytest.approx(distinct(64, 8) * 63 / 64)
    network, links = hops.seconds(H800)
    assert network == pytest.approx(3.5 * 7168 * 3 / (50e9 * 0.9))
    assert links < network


def test_inside_a_node_nothing_goes_over_the_network() -> None:
    hops = all_to_all(V3, 8, 8, 1.0)
    assert (hops.nodes, hops.scale_out_bytes) == (1, 0.0)
    assert hops.scale_up_bytes > 0
    assert all_to_all(V3, 1, 8, 1.0).seconds(H800) == (0.0, 0.0)


def test_without_groups_more_nodes_are_reached() -> None:
    free = replace(V3, n_group=1, topk_group=1)
    assert all_to_all(free, 64, 8, 1.0).copies_to_other_nodes == pytest.approx(8 * (1 - (7 / 8) ** 8) * 7 / 8)
    assert all_to_all(free, 64, 8, 1.0).copies_to_other_nodes > all_to_all(V3, 64, 8, 1.0).copies_to_other_nodes


def test_memory_of_v3_by_hand() -> None:
    """PP 16, EP 64, DP 128, ZeRO-1, bf16 moments. DualPipe's ranks hold a stage of each direction: those in the middle 8 MoE layers,
    the ends the first stage (embedding, 3 dense layers, 1 MoE layer) and the last (1 layer, head, MTP's layer and projection)."""
    memory = training_memory(V3, PAPER, "fp8", 4096, [17] * 16)
    expert, router = 44_040_192, 256 * 7168
    attention = sum(part.rest_parameters for part in stages(V3, PAPER)[1:2]) / 4 - expert - router
    assert attention == pytest.approx(187_107_328, rel=2e-5)
    middle_rest, middle_experts = 8 * (attention + expert + router), 8 * 256 * expert / 64
    ends_rest = 6 * attention + 3 * 3 * 7168 * 18432 + 3 * (expert + router) + 2 * 129_280 * 7168 + 2 * 7168**2
    assert parameters_of_ranks(V3, PAPER)[7] == (pytest.approx(middle_rest), pytest.approx(middle_experts))
    assert parameters_of_ranks(V3, PAPER)[0] == (pytest.approx(ends_rest), pytest.approx(3 * 256 * expert / 64))
    assert memory.weights_bytes == pytest.approx(2 * (middle_rest + middle_experts))
    assert memory.gradients_bytes == 2 * memory.weights_bytes
    assert memory.optimizer_bytes == pytest.approx(8 * (middle_rest / 128 + middle_experts / 2) / 2)
    assert memory.activations_bytes == 17 * 4 * 4096 * activation_bytes_per_layer(V3, "fp8", "selective")
    assert memory.total_bytes < 80e9  # it did run


def test_moments_are_as_wide_as_the_precision() -> None:
    """fp32: two moments of 4 bytes and no master copy; else two of 2 bytes and a master copy of 4: 8 bytes either way."""
    wide, mixed = (training_memory(V3, PAPER, precision, 4096, [17] * 16).optimizer_bytes for precision in ("fp32", "bf16"))
    assert wide == mixed
    assert training_memory(V3, PAPER, "fp32", 4096, [17] * 16, moments_bytes=2.0).optimizer_bytes == wide / 2


def test_stages_hold_every_parameter_of_the_model_once() -> None:
    for model in (V3, v2_lite_16b().model, tiny_dense().model):
        for count in (1, 2, 4):
            parts = stages(model, Layout(count, pp=count))
            held = sum(part.rest_parameters + part.expert_parameters for part in parts)
            listed = [m.parameters for m in modules(model, 1024)]
            assert held == pytest.approx(sum(listed), rel=1e-12)
            flops = sum(m.forward_flops_per_token for m in modules(model, 4096))
            assert sum(part.forward_flops for part in parts) == pytest.approx(flops, rel=1e-6)


def test_the_most_even_stages_of_v3_leave_the_last_few_layers() -> None:
    """It has the head and MTP, which weigh about three layers."""
    assert balanced(V3, 16) == (4,) * 15 + (1,)
    assert balanced(V3, 8) == (8,) * 7 + (5,)
    assert sorted(balanced(V3, 32)) == [0, 1] + [2] * 30


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(2, 12))
def test_no_other_cut_has_a_busiest_stage_with_less(num_stages: int, layers: int) -> None:
    """Against all cuts, where every stage but the last has a layer."""
    num_stages = min(num_stages, layers, 5)
    model = replace(V3, num_hidden_layers=layers, first_k_dense_replace=min(3, layers - 1))

    def busiest(counts: tuple[int, ...]) -> float:
        return max(part.forward_flops for part in stages(model, Layout(num_stages, pp=num_stages, stage_layers=counts)))

    cuts = combinations_with_replacement(range(layers + 1), num_stages - 1)
    counts = [tuple(b - a for a, b in pairwise((0, *cut, layers))) for cut in cuts]
    least = min(busiest(one) for one in counts if all(one[:-1]))
    assert busiest(balanced(model, num_stages)) == pytest.approx(least, rel=1e-12)


def test_uneven_stages_take_what_the_busiest_takes() -> None:
    even = step_time(V3, H800, Layout(8, pp=4, stage_layers=(16, 16, 16, 13)), "fp8", 4096, 1024)
    uneven = step_time(V3, H800, Layout(8, pp=4, stage_layers=(10, 10, 31, 10)), "fp8", 4096, 1024)
    parts = [
        [part.forward_flops for part in stages(V3, Layout(8, pp=4, stage_layers=counts))]
        for counts in ((16, 16, 16, 13), (10, 10, 31, 10))
    ]
    work = [step.compute_seconds + step.idle_seconds + step.recompute_seconds + step.bubble_seconds for step in (even, uneven)]
    assert work[1] / work[0] == pytest.approx(max(parts[1]) / max(parts[0]), rel=0.01)  # 512 micro-batches, hardly any filling
    assert uneven.compute_seconds == even.compute_seconds


@pytest.mark.parametrize("precision", ["fp8", "bf16", "fp32"])
def test_more_recomputation_keeps_less(precision: str) -> None:
    sizes = [activation_bytes_per_layer(V3, precision, kind) for kind in ("none", "selective", "full")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] == (4 if precision == "fp32" else 2) * 7168


def test_more_recomputation_takes_longer() -> None:
    seconds = [
        step_time(V3, H800, replace(PAPER, recompute=kind), "fp8", 4096, 15360).seconds for kind in ("none", "selective", "full")
    ]
    assert seconds == sorted(seconds)
    assert seconds[2] > 1.2 * seconds[0]


def test_overlap_hides_the_exchange_and_costs_cores() -> None:
    hidden = step_time(V3, H800, PAPER, "fp8", 4096, 15360)
    plain = step_time(V3, H800, replace(PAPER, overlap=False), "fp8", 4096, 15360)
    exchange = plain.exposed_all_to_all_seconds
    assert hidden.exposed_all_to_all_seconds == pytest.approx(exchange * 20 / 132)
    assert hidden.hidden_all_to_all_seconds == pytest.approx(exchange * 112 / 132)
    assert exchange == pytest.approx(max(plain.all_to_all_network_seconds, plain.all_to_all_links_seconds))
    assert hidden.seconds < plain.seconds


def test_parts_sum_to_the_step() -> None:
    step = step_time(V3, H800, PAPER, "fp8", 4096, 15360)
    parts = [value for name, value in vars(step).items() if name.endswith("_seconds")]
    apart = step.hidden_all_to_all_seconds + step.all_to_all_network_seconds + step.all_to_all_links_seconds + step.p2p_seconds
    assert step.seconds == pytest.approx(sum(parts) - apart)


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 8, 16, 64]), st.sampled_from([1, 2, 4]))
def test_twice_the_batch_is_less_than_twice_the_time(pp: int, ep: int, factor: int) -> None:
    layout = Layout(512, pp=pp, ep=ep)
    one, two = (step_time(V3, H800, layout, "fp8", 4096, 512 * factor * times).seconds for times in (1, 2))
    assert one < two <= 2 * one + 1e-9


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", ["one_f_one_b", "interleaved", "zb1p", "dualpipe", "dualpipe_v"])
def test_a_long_pipeline_is_followed_from_two_short_ones(name: str, uneven: bool) -> None:
    """Against the simulation of the whole, where sending takes time and so every micro-batch adds something."""
    layout = Layout(4, pp=4, schedule=name)
    scale = tuple(1.0 + 0.1 * (stage % 3) for stage in range(layout.num_stages)) if uneven else None
    costs = Costs(1.0, 1.1, 0.8, overlapped=2.6, send=0.1, stage_scale=scale)
    seconds, live = pipeline(layout, 64, costs)
    parts = {"dualpipe_v": 2, "interleaved": 4}.get(name, 1)
    cut = Costs(1.0 / parts, 1.1 / parts, 0.8 / parts, overlapped=2.6 / parts, send=0.1, stage_scale=scale)
    whole = interleaved(4, 64, 4) if name == "interleaved" else SCHEDULES[name](8 if name == "dualpipe_v" else 4, 64)
    result = simulate(whole, cut)
    assert seconds == pytest.approx(result.makespan, rel=2e-3 if uneven else 1e-9)
    assert live == tuple(result.peak_live_activations)


def test_the_search_finds_nothing_slower_than_the_paper() -> None:
    found = search(V3, H800, PAPER, SEARCHED, "fp8", 4096, 15360)
    paper = evaluate(V3, H800, PAPER, "fp8", 4096, 15360)
    assert found[0].step_seconds <= paper.step_seconds
    assert all(one.fits for one in found)
    assert [one.step_seconds for one in found] == sorted(one.step_seconds for one in found)
    assert found[0].why_worse == ""
    assert all(one.why_worse for one in found[1:])


def test_the_sorting_by_table_agrees_with_the_simulation() -> None:
    """What the search simulates first must hold what simulation finds best."""
    from finback.planner.train import _quick_seconds, candidates

    layouts = candidates(V3, H800, PAPER, frozenset({"schedule"}), "fp8", 4096, 15360)
    assert len(layouts) == 4  # 120 micro-batches are no multiple of 16, as interleaving wants
    by_table = sorted(layouts, key=lambda one: _quick_seconds(V3, H800, one, "fp8", 4096, 15360))
    by_simulation = sorted(layouts, key=lambda one: evaluate(V3, H800, one, "fp8", 4096, 15360).step_seconds)
    assert {one.schedule for one in by_table[:2]} == {one.schedule for one in by_simulation[:2]} == {"dualpipe", "dualpipe_v"}


def test_a_bill_by_hand() -> None:
    paid = bill(2_788_000, 2048, H800, Prices(None))
    assert paid.cost_usd == 5_576_000
    assert paid.days == pytest.approx(56.72, abs=0.01)
    assert paid.energy_mwh == pytest.approx(2_788_000 * 1000 * 1.3 / 1e6)
    assert paid.co2_tonnes == pytest.approx(paid.energy_mwh * 0.55)
    unknown = bill(100, 8, HARDWARE["ascend910b"], Prices(None))
    assert (unknown.cost_usd, unknown.energy_mwh, unknown.co2_tonnes) == (None, None, None)
    assert bill(100, 8, HARDWARE["ascend910b"], Prices(1.5)).cost_usd == 150


def test_a_run_scales_with_its_tokens() -> None:
    one, two = (plan_train(V3, H800, PAPER, frozenset(), tokens=tokens) for tokens in (1e12, 2e12))
    assert two.bill.device_hours == pytest.approx(2 * one.bill.device_hours)
    assert one.mfu == two.mfu
    assert one.steps == pytest.approx(1e12 / (15360 * 4096))


def test_chinchilla_by_hand_and_the_published_pair() -> None:
    assert chinchilla_loss(70e9, 1.4e12) == pytest.approx(1.937, abs=0.002)
    v2_lite = v2_lite_16b().model
    assert dense_equivalent(v2_lite) == pytest.approx((15.706e9 * 2.66e9) ** 0.5, rel=0.01)
    size, tokens = cheapest(chinchilla_loss(70e9, 1.4e12), 0.0)
    assert chinchilla_loss(size, tokens) == pytest.approx(chinchilla_loss(70e9, 1.4e12))
    assert size * tokens <= 70e9 * 1.4e12
    assert compare_with_dense(V3, 14.8e12, 4096).dense_over_moe_training > 3
    assert compare_with_dense(V3, 14.8e12, 4096).law.endswith("a rule of thumb without a source")


@pytest.mark.parametrize(
    ("layout", "batch", "words"),
    [
        (Layout(2048, pp=24), 15360, r"--pp is 24, it must divide --devices / --tp \(2048 / 1 = 2048\); the nearest is 16"),
        (Layout(2048, pp=64), 15360, "--pp is 64, above the model's 61 layers; the nearest that divides is 32"),
        (Layout(2048, pp=16, ep=48), 15360, "--ep is 48, it must divide n_routed_experts .256.; the nearest is 32"),
        (Layout(96, pp=8, ep=8), 96, r"--ep is 8, it must divide dp x tp \(12\); the nearest is 6"),
        (Layout(2048, pp=16, ep=64), 15361, "multiple of dp x micro_batch_size = 128; the nearest is 15360"),
        (Layout(2048, pp=16, ep=64, schedule="dualpipe"), 2048, "needs at least 32 micro-batches per replica and has 16"),
        (Layout(8, pp=1, tp=3), 8, "multiple of pp x tp = 3; the nearest is 9"),
        (Layout(9, pp=1, tp=3), 9, "--tp is 3, it must divide num_attention_heads"),
        (Layout(0), 8, "--devices is 0, it must be at least 1"),
        (Layout(64, pp=4, schedule="interleaved"), 96, "needs a multiple of pp"),
        (Layout(64, pp=32, schedule="interleaved"), 96, "makes 128 stages of 61 layers; use at most --pp 15"),
        (
            Layout(16, pp=4, stage_layers=(20, 20, 21)),
            96,
            "has 3 numbers for 4 stages; the most even is --stage-layers 16 16 16 13",
        ),
        (Layout(16, pp=4, stage_layers=(20, 20, 20, 2)), 96, "must be 61 layers in all and is 62; the most even is"),
        (Layout(16, pp=4, stage_layers=(41, -20, 20, 20)), 96, "--stage-layers holds -20, a stage has at least 0 layers"),
    ],
)
def test_layouts_that_do_not_divide(layout: Layout, batch: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_layout(V3, layout, batch)


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(-5, 4000))
def test_the_nearest_divisor_is_the_one_that_trying_all_finds(size: int, value: int) -> None:
    divisors = [one for one in range(1, size + 1) if size % one == 0]
    assert nearest_divisor(size, value) == min(divisors, key=lambda one: (abs(one - value), one))


def test_the_divisors_of_a_large_prime_are_found_at_once() -> None:
    start = time.process_time()
    assert nearest_divisor(1_000_000_007, 8) == 1
    assert time.process_time() - start < 1


def test_what_goes_between_nodes_needs_a_network_and_inside_a_node_its_links() -> None:
    small, card = v2_lite_16b().model, HARDWARE["rtx4090"]
    for layout in (Layout(64, pp=8), Layout(64), Layout(64, pp=8, ep=8)):
        with pytest.raises(InputError, match="rtx4090 has no published scale_out_gb_per_second; take one that has"):
            step_time(small, card, layout, "bf16", 4096, 4096)
    inside = step_time(small, card, Layout(8, pp=8), "bf16", 4096, 64)
    moved = 2 * 64 * 2.0 * small.hidden_size * 4096
    assert inside.p2p_seconds == pytest.approx(moved / (25e9 * card.efficiencies.network))
    alone = replace(card, scale_up_gb_per_second=None)
    with pytest.raises(InputError, match="no published scale_up_gb_per_second"):
        step_time(small, alone, Layout(8, pp=8), "bf16", 4096, 64)
    between = step_time(V3, H800, PAPER, "fp8", 4096, 15360)
    assert between.p2p_seconds == pytest.approx(2 * 120 * 2.0 * 7168 * 4096 / (50e9 * H800.efficiencies.network))


def test_after_a_step_the_slowest_rank_is_waited_for() -> None:
    """Not the one with most parameters: one with fewer experts and more of the rest may have more to send."""
    layout = Layout(256, pp=16, ep=16)
    held = parameters_of_ranks(V3, layout)
    link = H800.scale_out_gb_per_second
    assert link is not None

    def sending(rest: float, expert: float) -> float:
        ways = [(rest, layout.dp), (expert, layout.dp // layout.ep)]
        return sum(6.0 * size * (count - 1) / count for size, count in ways) / (link * 1e9 * H800.efficiencies.network)

    assert max(held, key=sum) != max(held, key=lambda rank: sending(*rank))
    step = step_time(V3, H800, layout, "fp8", 4096, 2048)
    assert step.gradient_sync_seconds == pytest.approx(max(sending(*rank) for rank in held))


def test_layers_are_cut_over_more_devices_where_a_node_has_more() -> None:
    with pytest.raises(InputError, match="--tp is 16, but a node of h800 has 8 devices"):
        plan_train(V3, H800, Layout(1024, pp=8, tp=16, ep=64), frozenset(), tokens=1e12)
    plan_train(V3, HARDWARE["gb200"], Layout(1024, pp=8, tp=16, ep=64), frozenset(), tokens=1e12)
    with pytest.raises(InputError, match="--tp is 16, but a node of h800 has 8 devices"):
        plan_rl(V3, H800, Layout(512, pp=1, tp=16, ep=32), Unit(ep=32), R1_ZERO)


def test_experts_of_a_dense_model_and_precisions_that_are_missing() -> None:
    with pytest.raises(InputError, match="the model is dense; use 1"):
        check_layout(tiny_dense().model, Layout(8, ep=2), 8)
    with pytest.raises(InputError, match="a100 has no FP8 units; use bf16"):
        plan_train(V3, HARDWARE["a100"], PAPER, frozenset(), tokens=1e12)
    with pytest.raises(InputError, match="no published bf16_tflops"):
        plan_train(
            tiny_dense().model,
            HARDWARE["laptop-cpu"],
            Layout(1),
            frozenset(),
            tokens=1e9,
            precision="bf16",
            sequence_length=1024,
            global_batch_size=8,
        )


def test_too_few_devices_say_how_many() -> None:
    with pytest.raises(InputError, match="usable; take about 256 devices or more"):
        search(V3, H800, Layout(64), SEARCHED, "fp8", 4096, 15360)


def test_a_number_of_devices_without_a_layout_names_the_nearest_with_one() -> None:
    with pytest.raises(
        InputError, match="over which no layout of the search shares out --global-batch-size 15360; the nearest that does is 2048"
    ):
        search(V3, H800, Layout(2047), SEARCHED, "fp8", 4096, 15360)


@pytest.mark.parametrize(("devices", "batch"), [(2048, 15361), (2048, 3100), (2000, 15360), (1536, 15359), (1024, 7)])
def test_the_nearest_batch_or_devices_are_those_that_trying_all_finds(devices: int, batch: int) -> None:
    """The offer answers, and where it is a batch no batch nearer to the one that was asked for does."""
    from finback.planner.train import candidates

    def divides(size: int) -> bool:
        return bool(candidates(V3, H800, Layout(devices), SEARCHED, "fp8", 4096, size))

    with pytest.raises(InputError) as refused:
        search(V3, H800, Layout(devices), SEARCHED, "fp8", 4096, batch)
    told = int(str(refused.value).split()[-1])
    if str(refused.value).startswith("--global-batch-size"):
        assert divides(told)
        assert not any(divides(size) for size in range(max(1, batch - abs(told - batch) + 1), batch + abs(told - batch)))
    else:
        assert candidates(V3, H800, Layout(told), SEARCHED, "fp8", 4096, batch)


def test_a_sequence_that_does_not_fit_is_not_answered_with_more_devices() -> None:
    longer = replace(V3, max_position_embeddings=1_000_000)
    with pytest.raises(InputError, match="shorten --sequence-length or raise --tp"):
        search(longer, H800, Layout(2048), SEARCHED, "fp8", 1_000_000, 15360)
    with pytest.raises(InputError, match="use at most 163840"):
        plan_train(V3, H800, PAPER, frozenset(), tokens=1e12, sequence_length=1_000_000)
