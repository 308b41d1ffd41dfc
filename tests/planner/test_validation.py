"""The table of published and measured figures: exact rows are exact, causes are told, and the page is the table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.peers import COMPARED
from finback.config import InputError
from finback.planner.hardware import HARDWARE, ROWS, Curve, find_hardware, on_curve
from finback.planner.inference import Unit, decode_step, plain_parameters
from finback.planner.layout import Layout
from finback.planner.measured import CALIBRATION, hardware_of, measured
from finback.planner.model import shape
from finback.planner.own_results import measured_rows
from finback.planner.step import step_time
from finback.planner.validation import exact_rows, markdown, validation_rows
from finback.planner.yardsticks import COMPARED as OURS
from finback.planner.yardsticks import SMOLLM2, Row
from finback.presets import PRESETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
MODELS = {name: PRESETS[name]().model for name in ("v3-671b", "v2-lite-16b", "tiny")}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return validation_rows(MODELS, RESULTS)


@pytest.mark.parametrize("row", exact_rows(MODELS["v3-671b"], MODELS["v2-lite-16b"]), ids=lambda row: row.name)
def test_exact_rows_are_exact(row: Row) -> None:
    assert row.met, f"{row.planner} instead of {row.reference}"
    assert row.target <= 0.005


def test_counts_of_v2_lite_and_mtp_are_exact_rows(rows: list[Row]) -> None:
    exact = {round(row.reference * 1e9): row for row in rows if row.kind == "exact" and row.unit == "billion"}
    for count in (15_706_484_224, 13_463_426_304, 11_610_068_224):
        assert exact[count].target == 0.0
        assert exact[count].planner == exact[count].reference


def test_the_training_cost_of_v3_is_predicted_to_a_quarter(rows: list[Row]) -> None:
    row = next(row for row in rows if "GPU-hours per trillion" in row.name and row.kind == "predicted")
    assert (row.reference, row.target) == (180, 0.25)
    assert row.met


def test_whatever_is_off_has_its_cause_told(rows: list[Row]) -> None:
    for row in rows:
        assert row.met == (not row.note), row.name
        assert row.kind == "measured" or not row.other_machine
        assert len(row.note.split()) != 1
    predicted = [row for row in rows if row.kind == "predicted"]
    assert sum(row.met for row in predicted) >= 9
    assert {"H800", "H100", "B200", "H200"} <= {word for row in predicted for word in row.name.replace(",", "").split()}


def test_told_causes_name_figures_that_are_true(rows: list[Row]) -> None:
    """What a note says of other figures must be those of the table and of the hardware rows."""
    notes = {row.name: row for row in rows if row.note}
    decode = next(row for name, row in notes.items() if name.startswith("DeepSeek online, decode"))
    ours, theirs = (88 * 8 / rate * 1e3 for rate in (decode.planner, decode.reference))
    assert f"{ours:.1f} ms" in decode.note
    assert f"{theirs:.1f} ms" in decode.note
    assert "average over the nodes" not in decode.note  # 88 requests are that average
    b200 = next(row for name, row in notes.items() if name.startswith("V3 on 256 B200, Megatron"))
    assert "the same chip" not in b200.note
    assert {HARDWARE["b200"].bf16_tflops, HARDWARE["gb200"].bf16_tflops} == {2250, 2500}
    assert "2,500" in b200.note
    assert "2,250" in b200.note
    torchtitan = next(row for name, row in notes.items() if "torchtitan" in name)
    assert "918" in torchtitan.note  # MXFP8 with MXFP8, not the row's bf16
    assert "2,689" in torchtitan.note
    assert "three times" not in torchtitan.note


def test_our_own_figures_are_there(rows: list[Row]) -> None:
    names = " ".join(row.name for row in rows if row.kind == "measured")
    assert all(word in names for word in ("train step: training", "train step: tiny", "generate", "decode"))


def test_the_page_is_the_table(rows: list[Row]) -> None:
    """`finback plan validate --out docs/plan-validation.md` writes it."""
    assert (ROOT / "docs" / "plan-validation.md").read_text(encoding="utf-8") == markdown(rows)


def test_the_model_of_the_benchmark_is_the_one_predicted() -> None:
    assert OURS == COMPARED


def test_one_set_of_efficiencies_per_family_and_every_row_has_sources() -> None:
    assert HARDWARE["h800"].efficiencies == HARDWARE["h100"].efficiencies == HARDWARE["h200"].efficiencies
    assert HARDWARE["b200"].efficiencies == HARDWARE["gb200"].efficiencies == HARDWARE["gb300"].efficiencies
    assert all(row.source and row.efficiency_source for row in ROWS)
    wanted = {"h800", "h100", "h200", "a100", "b200", "h20", "rtx4090", "ascend910b", "ascend910c"}
    assert wanted <= set(HARDWARE)
    assert any("hygon" in name for name in HARDWARE)
    assert any("laptop" in name for name in HARDWARE)
    assert "power_watts" in HARDWARE["ascend910b"].unknown


def test_hopper_fp8_efficiency_is_that_of_deepgemms_table() -> None:
    """V3's shapes at 4,096 rows and grouped at 4 x 8,192, H800: parameters of a layer, TFLOPS."""
    table = [(2112 * 7168, 1058), (24576 * 1536, 990), (32768 * 512, 590), (7168 * 16384, 1358)]
    table += [(9 * 4096 * 7168, 1297), (9 * 7168 * 2048, 1099)]
    mean = sum(size for size, _ in table) / sum(size / rate for size, rate in table)
    assert mean / 1979 == pytest.approx(HARDWARE["h800"].efficiencies.fp8_matmul, abs=0.005)


CEILINGS = RESULTS / "ceilings.json"


def test_measured_hardware_is_what_the_benchmark_found() -> None:
    found = {row["name"]: row for row in json.loads(CEILINGS.read_text())["rows"]}
    for precision in ("bf16", "fp32"):
        peak = max(
            row["gflop_per_second"]
            for name, row in found.items()
            if f" {precision} " in name and name.startswith(("matmul", "1x1"))
        )
        row = measured(CEILINGS, precision)
        assert row.peak_flops(precision) == pytest.approx(peak * 1e9)
        for width in (64, 128, 512):
            for what in ("training", "expert"):
                rate = found[f"{what} products {precision}, width {width}"]["gflop_per_second"]
                assert row.matmul_flops(precision, width, experts=what == "expert") == pytest.approx(rate * 1e9)
        reached = row.peak_flops(precision) * row.efficiencies.attention_backward
        assert reached == pytest.approx(found[f"attention {precision}, backward"]["gflop_per_second"] * 1e9)
        assert row.decode_flops(precision, 8) == pytest.approx(
            found[f"decode products {precision}, 8 rows"]["gflop_per_second"] * 1e9
        )
        assert row.bytes_per_second == pytest.approx(found["memory, read"]["gb_per_second"] * 1e9)
        cached = found["again and again, 8 MiB, read"]["gb_per_second"] * 1e9
        assert row.read_bytes_per_second(8 * 2**20) == pytest.approx(max(cached, row.bytes_per_second))
        for size in (8, 256):
            read = found[f"weights of {size} MiB, decode products {precision}, read"]["gb_per_second"] * 1e9
            assert row.weight_bytes_per_second(size * 2**20) == pytest.approx(read)
        for vocabulary in (2048, 131072):
            rate = found[f"head and loss {precision}, vocabulary {vocabulary}"]["gflop_per_second"]
            assert row.head_flops(precision, vocabulary) == pytest.approx(rate * 1e9)


def test_the_calibrations_model_is_predicted_as_it_was_measured() -> None:
    """What its steps take beyond the formulas is known of no other model, and of this one exactly; dense models take none of it."""
    found = {row["name"]: row.get("milliseconds") for row in json.loads(CEILINGS.read_text())["rows"]}
    for precision, value in (("bf16", 2.0), ("fp32", 4.0)):
        row = measured(CEILINGS, precision)
        layout = Layout(1, recompute="none", micro_batch_size=8)
        step = step_time(CALIBRATION, row, layout, precision, 256, 8)
        assert 1e3 * step.seconds == pytest.approx(found[f"training step of the calibration's model {precision}, 2048 tokens"])
        for rows in (1, 16):
            decode = decode_step(CALIBRATION, row, Unit(), precision, rows, 128, cache_value_bytes=value, greedy=True)
            told = found[f"decode step of the calibration's model {precision}, {rows} rows"]
            assert decode.tpot_ms == pytest.approx(told)
        assert row.busy(experts=False) == row.busy_decoding(False, 1) == 1.0


def test_experts_of_other_steps_push_an_expert_out_of_a_cache() -> None:
    """At one request each expert is read every fourth step: at the rate of what four steps read. The rest comes from the cache. At
    so many rows that all are read, all is read at the rate of the whole."""
    small = measured(CEILINGS, "fp32").small_work
    assert small is not None
    model = replace(COMPARED, num_experts_per_tok=4, n_routed_experts=16)
    products = tuple((rows, 1e6) for rows in (1.0, 1024.0))  # so fast that only reading counts
    step = 4 * (plain_parameters(model) + shape(model).embedding + model.num_moe_layers * 4 * shape(model).expert)
    rates = ((1.01 * step, 1e12), (1.02 * step, 1e9))

    def weights(curve: Curve, batch: int) -> float:
        row = replace(
            measured(CEILINGS, "fp32"),
            small_work=replace(small, decode_shares=products, weight_bytes_per_second=curve),
        )
        return decode_step(model, row, Unit(), "fp32", batch, 1).weights_ms

    experts = 4.0 * model.num_moe_layers * 4 * shape(model).expert
    assert weights(rates, 1) - weights(((1.0, 1e12),), 1) == pytest.approx(1e3 * experts * (1e-9 - 1e-12), rel=0.01)
    whole = step + 3 * experts
    assert weights(rates, 256) - weights(((1.0, 1e12),), 256) == pytest.approx(1e3 * whole * (1e-9 - 1e-12), rel=0.01)


def test_steps_without_work_are_given_back() -> None:
    """Overheads solved from four measured steps give these four again."""
    small = measured(CEILINGS).small_work
    assert small is not None
    found = {row["name"]: row.get("milliseconds") for row in json.loads(CEILINGS.read_text())["rows"]}
    for rows, layers in ((1, 2), (16, 2), (1, 8), (16, 8)):
        step = small.engine_step_seconds + layers * small.engine_layer_seconds
        step += rows * (small.engine_row_seconds + layers * small.engine_layer_row_seconds)
        name = f"engine step without work, {rows} requests, {layers} layers, vocabulary 64, greedy"
        assert step == pytest.approx(found[name] / 1e3)
    assert small.sampled_value_seconds > small.greedy_value_seconds > 0
    two, six = (found[f"training step without work, {layers} layers"] for layers in (2, 6))
    assert small.training_layer_seconds == pytest.approx((six - two) / 4e3)


def test_curves_are_followed_between_their_points() -> None:
    curve = ((64.0, 0.2), (256.0, 0.6))
    assert [on_curve(curve, size) for size in (1, 64, 128, 256, 1e9)] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])


def test_a_data_sheet_has_no_overheads() -> None:
    """Nothing of what is measured here reaches a published row: the rates there do not depend on widths or sizes."""
    h800 = HARDWARE["h800"]
    assert h800.matmul_flops("fp8", 64) == h800.matmul_flops("fp8") == h800.decode_flops("fp8", 1)
    assert h800.read_bytes_per_second(1.0) == h800.bytes_per_second
    greedy, sampled = (decode_step(SMOLLM2, h800, Unit(), "bf16", 4, 96, greedy=greedy) for greedy in (True, False))
    assert greedy == sampled


def test_overheads_and_narrow_products_slow_a_small_model_down() -> None:
    found = measured(CEILINGS)
    assert found.small_work is not None
    row = replace(found, small_work=replace(found.small_work, mixture_training=1.0))
    assert row.small_work is not None
    free = replace(
        row,
        small_work=replace(
            row.small_work,
            product_shares=((64.0, 1.0),),
            expert_shares=((64.0, 1.0),),
            training_layer_seconds=0.0,
            engine_step_seconds=0.0,
            engine_row_seconds=0.0,
            engine_layer_seconds=0.0,
            engine_layer_row_seconds=0.0,
        ),
    )
    layout = Layout(1, recompute="none", micro_batch_size=16)
    slow, fast = (step_time(OURS, one, layout, "bf16", 256, 16) for one in (row, free))
    layers = OURS.num_hidden_layers
    assert slow.idle_seconds - fast.idle_seconds == pytest.approx(layers * row.small_work.training_layer_seconds)
    assert slow.compute_seconds > 1.1 * fast.compute_seconds
    steps = [decode_step(OURS, one, Unit(), "bf16", 1, 96) for one in (row, free)]
    assert steps[0].idle_ms > 0
    assert steps[0].tpot_ms > steps[1].tpot_ms


def results_like(directory: Path, **changes: Any) -> Path:
    """The stored results as of one run, that of the ceilings, but for `changes` of a file's facts."""
    facts = json.loads(CEILINGS.read_text())
    for file in ("ceilings", "train", "tiny", "decode", "engine"):
        data = json.loads((RESULTS / f"{file}.json").read_text())
        data |= {"date": facts["date"], "device": facts["device"]} | changes.get(file, {})
        (directory / f"{file}.json").write_text(json.dumps(data))
    return directory


def test_a_result_of_another_machine_or_day_is_said_to_be(tmp_path: Path) -> None:
    device = json.loads(CEILINGS.read_text())["device"]
    old, smaller = {"date": "2020-01-01T00:00:00+00:00"}, {"device": {**device, "cores": 1, "memory_available_bytes": 1}}
    told = {
        row.name: row.other_machine for row in measured_rows(MODELS["tiny"], results_like(tmp_path, train=old, decode=smaller))
    }
    assert "train.json is of 2020-01-01T00:00, the ceilings of " in told["train step: training bf16"]
    assert told["train step: training bf16"].endswith("not of one run")
    assert told["generate fp32, batch 1"].endswith("and cores differ")
    assert told["train step: tiny bf16"] == told["SmolLM2-135M decode, 8 sequences"] == ""


def test_rows_of_another_machine_are_marked_and_their_errors_are_no_misses(tmp_path: Path) -> None:
    old = {"date": "2020-01-01T00:00:00+00:00"}
    rows = measured_rows(MODELS["tiny"], results_like(tmp_path, train=old))
    page = markdown(rows)
    assert page.count("(other machine)") == 2
    assert "- Other machine: train.json is of 2020-01-01T00:00" in page
    assert "- train step: training" not in page


def test_a_grpo_step_is_compared_where_it_was_measured(tmp_path: Path) -> None:
    directory = results_like(tmp_path)
    facts = json.loads(CEILINGS.read_text())
    names = ("GRPO step, V3, bf16", "GRPO step, V3, bf16: rollout", "GRPO step, V3, bf16: training")
    (directory / "grpo.json").write_text(
        json.dumps(facts | {"bench": "grpo", "rows": [{"name": name, "seconds": 1.0} for name in names]})
    )
    rows = {row.name: row for row in measured_rows(MODELS["tiny"], directory)}
    whole, rollout, training = (rows[name].planner for name in names)
    assert whole == pytest.approx(rollout + training)
    assert "GRPO step, SmolLM2-135M, bf16" not in rows
    assert rows[names[0]].unit == "seconds"


def test_ceilings_of_an_older_benchmark_are_refused(tmp_path: Path) -> None:
    data = json.loads(CEILINGS.read_text())
    data["rows"] = [row for row in data["rows"] if not row["name"].startswith("attention")]
    (tmp_path / "ceilings.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="or of an older benchmark; write it again with python -m bench ceilings"):
        measured(tmp_path / "ceilings.json")


def test_unknown_hardware_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'h80', which is unknown; did you mean 'h800'"):
        find_hardware("h80")
    with pytest.raises(InputError, match=r"known are h800, .*measured"):
        find_hardware("zzzzz")
    with pytest.raises(InputError, match="run make bench first"):
        hardware_of("measured", tmp_path / "ceilings.json", None)
    (tmp_path / "ceilings.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match="is not a file of ceilings"):
        hardware_of("measured", tmp_path / "ceilings.json", None)
    with pytest.raises(InputError, match="hardware hygon-k100 has no published scale_up_gb_per_second; take"):
        HARDWARE["hygon-k100"].need("scale_up_gb_per_second")
