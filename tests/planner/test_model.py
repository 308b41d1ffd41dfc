"""What follows from a configuration alone, against published counts and against the model's own formulas."""

import pytest

from finback.config import InputError, count_params
from finback.planner.model import cache_bytes_per_token, cache_table, modules, plan_model, training_flops_per_token
from finback.presets import PRESETS, v3_671b
from finback.train.throughput import training_flops_per_token as trainer_flops

V3 = v3_671b().model


@pytest.mark.parametrize("name", PRESETS)
def test_training_flops_are_those_that_the_trainer_divides_by(name: str) -> None:
    model = PRESETS[name]().model
    assert training_flops_per_token(model, 1024) == pytest.approx(trainer_flops(model, 1024), rel=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_modules_hold_every_matrix_parameter(name: str) -> None:
    """Norms and biases are all that is missing: under 0.2% even in the smallest preset."""
    model = PRESETS[name]().model
    counts, parts = count_params(model), [m for m in modules(model, 128) if m.name != "MTP layers"]
    assert sum(m.parameters for m in parts) == pytest.approx(counts.total, rel=2e-3)
    assert sum(m.active_parameters for m in parts) == pytest.approx(counts.active, rel=4e-3)
    assert sum(m.parameters for m in parts) <= counts.total


def test_v3_by_hand() -> None:
    parts = {m.name: m for m in modules(V3, 4096)}
    assert parts["routed experts"].parameters == 58 * 256 * 44_040_192
    assert parts["routed experts"].active_parameters == 58 * 8 * 44_040_192
    assert parts["output head"].parameters == 926_679_040
    assert parts["MTP layers"].parameters == pytest.approx(11.61e9, rel=1e-3)
    assert parts["attention scores and values"].forward_flops_per_token == 2 * 61 * 128 * 320 * 2048.5


def test_what_a_token_reads_by_module() -> None:
    """Every weight it uses once, in bf16, but one row of the embedding; and the cache of the tokens before it."""
    plan = plan_model(V3, 4096)
    read = {m.name: m.decode_bytes_per_token for m in plan.modules}
    assert read["embedding"] == 2 * 7168
    assert read["attention scores and values"] == 4096 * 70_272
    main = sum(size for name, size in read.items() if name != "MTP layers")
    assert main == pytest.approx(2 * plan.active_parameters_without_embedding + 4096 * 70_272, rel=1e-3)  # norms are left out
    tied = {m.name: m for m in plan_model(PRESETS["nano-dense"]().model, 512).modules}
    assert tied["output head"].decode_bytes_per_token == 2 * tied["embedding"].parameters


def test_v3_published_figures() -> None:
    plan = plan_model(V3)
    assert plan.total_parameters == 671_026_419_200
    assert plan.active_parameters == 37_552_297_472
    assert plan.active_parameters_without_embedding == 36_625_618_432
    assert plan.training_gflop_per_token_without_mtp == pytest.approx(250, rel=0.005)
    assert plan.cache_bytes_per_token == 70_272
    assert plan.cache_bytes_per_token_with_mtp == 71_424
    assert cache_bytes_per_token(V3, mtp=True) * 128 * 1024 / 2**30 == pytest.approx(8.72, abs=0.005)


def test_caches_of_other_designs() -> None:
    rows = {row.name: row for row in cache_table(V3)}
    assert rows["Qwen2.5-72B (GQA)"].bytes_per_token == 327_680
    assert rows["LLaMA-3.1-405B (GQA)"].bytes_per_token == 516_096
    assert rows["the same with MHA"].times_ours == pytest.approx(56.9, abs=0.05)
    assert rows["Qwen2.5-72B (GQA)"].times_ours == pytest.approx(4.66, abs=0.01)
    # MQA of this shape is smaller than the latent: MLA is not the smallest, it is the smallest that keeps the quality.
    assert rows["the same with MQA"].times_ours < 1


def test_a_tied_head_is_counted_once_and_multiplied_with() -> None:
    model = PRESETS["nano-dense"]().model
    plan = plan_model(model, 512)
    head = next(m for m in plan.modules if m.name == "output head")
    assert head.parameters == 0
    assert head.forward_flops_per_token == 2 * model.vocab_size * model.hidden_size
    assert plan.active_parameters_without_embedding == plan.active_parameters == plan.total_parameters


@pytest.mark.parametrize(("length", "words"), [(0, "must be at least 1"), (200_000, "use at most 163840")])
def test_impossible_lengths(length: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan_model(V3, length)
