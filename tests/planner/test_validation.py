"""The table of published and measured figures: exact rows are exact, causes are told, and the page is the table."""

from pathlib import Path

import pytest

from bench.peers import COMPARED
from finback.config import InputError
from finback.planner.hardware import HARDWARE, ROWS, find_hardware, measured, read_ceilings
from finback.planner.validation import Row, exact_rows, markdown, validation_rows
from finback.planner.yardsticks import COMPARED as OURS
from finback.presets import PRESETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
MODELS = {name: PRESETS[name]().model for name in ("v3-671b", "tiny", "nano")}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return validation_rows(MODELS, RESULTS)


@pytest.mark.parametrize("row", exact_rows(MODELS["v3-671b"]), ids=lambda row: row.name)
def test_exact_rows_are_exact(row: Row) -> None:
    assert row.met, f"{row.planner} instead of {row.reference}"
    assert row.target <= 0.005


def test_the_training_cost_of_v3_is_predicted_to_a_quarter(rows: list[Row]) -> None:
    row = next(row for row in rows if "GPU-hours per trillion" in row.name and row.kind == "predicted")
    assert (row.reference, row.target) == (180, 0.25)
    assert row.met


def test_whatever_is_off_has_its_cause_told(rows: list[Row]) -> None:
    for row in rows:
        assert row.met == (not row.note), row.name
        assert len(row.note.split()) != 1
    predicted = [row for row in rows if row.kind == "predicted"]
    assert sum(row.met for row in predicted) >= 9
    assert {"H800", "H100", "B200", "H200"} <= {word for row in predicted for word in row.name.replace(",", "").split()}


def test_our_own_figures_are_there(rows: list[Row]) -> None:
    names = " ".join(row.name for row in rows if row.kind == "measured")
    assert all(word in names for word in ("train step", "generate", "decode", "GRPO step"))


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


def test_measured_hardware_is_what_the_benchmark_found() -> None:
    found = read_ceilings(RESULTS / "ceilings.json")
    row = measured(RESULTS / "ceilings.json")
    assert row.bf16_tflops == pytest.approx(found.bf16_gflop_per_second / 1000)
    assert row.peak_flops("bf16") == pytest.approx(found.bf16_gflop_per_second * 1e9)
    assert measured(RESULTS / "ceilings.json", "fp32").peak_flops("fp32") == pytest.approx(found.fp32_gflop_per_second * 1e9)
    assert row.bytes_per_second == pytest.approx(found.read_gb_per_second * 1e9)


def test_unknown_hardware_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'h80', which is unknown; did you mean 'h800'"):
        find_hardware("h80", tmp_path)
    with pytest.raises(InputError, match=r"known are h800, .*measured"):
        find_hardware("zzzzz", tmp_path)
    with pytest.raises(InputError, match="run make bench first"):
        find_hardware("measured", tmp_path / "ceilings.json")
    (tmp_path / "ceilings.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match="is not a file of ceilings"):
        find_hardware("measured", tmp_path / "ceilings.json")
    with pytest.raises(InputError, match="hardware hygon-k100 has no published scale_up_gb_per_second; take"):
        HARDWARE["hygon-k100"].need("scale_up_gb_per_second")
