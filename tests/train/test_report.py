"""`report.md` and the plots: what they show is what the records hold."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finback.config import InputError
from finback.train.report import (
    draw_expert_load,
    draw_loss,
    draw_plots,
    draw_throughput,
    write_report,
)

PNG = b"\x89PNG\r\n\x1a\n"
MODEL = {
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "float32",
}


def rows(count: int) -> list[dict[str, Any]]:
    found = []
    for step in range(1, count + 1):
        row: dict[str, Any] = {
            "step": step,
            "tokens": 1000 * step,
            "seconds": 1.5 * step,
            "loss": 6.0 / step,
            "mtp_loss": 7.0 / step,
            "tokens_per_second": 2000.0 + step,
            "mfu": 0.25,
            "max_violation": 1.0 / step,
        }
        if step % 5 == 0:
            row["validation_loss"] = 6.5 / step
        found.append(row)
    return found


def loads(count: int) -> list[dict[str, Any]]:
    return [{"step": step, "counts": [[40, 10, 10, 20], [20, 20, 20, 20], [80, 0, 0, 0]]} for step in range(1, count + 1)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "a-run"
    directory.mkdir()
    config = {"model": MODEL, "data": ["shards"], "precision": "bf16", "seed": 7}
    (directory / "config.json").write_text(json.dumps(config))
    for name, records in (("metrics.jsonl", rows(20)), ("expert_load.jsonl", loads(20))):
        (directory / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def test_report_tells_what_ran_and_embeds_its_plots(run: Path) -> None:
    write_report(run, samples=[("Once", " upon a time")], sections=[("Held out", "better than a trigram")])
    report = (run / "report.md").read_text()
    assert "# a-run" in report
    assert "20 steps, 20,000 tokens in 30 s" in report
    assert "4 routed experts (2 per token)" in report
    assert "**Seed**: 7" in report
    assert "| training loss, nats per token | 6.0000 | 0.3000 |" in report
    assert "| held-out loss, nats per token | 1.3000 | 0.3250 |" in report
    assert "Once▌ upon a time" in report
    assert "## Held out\n\nbetter than a trigram" in report
    for name in ("loss", "expert_load", "throughput"):
        assert f"(plots/{name}.png)" in report
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(PNG)
    assert not list(run.rglob("*.tmp"))


def test_report_points_to_the_newest_checkpoint(run: Path) -> None:
    for step in (5, 20, 100):
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    write_report(run)
    assert "step-100 --prompt" in (run / "report.md").read_text()
    (run / "final").mkdir()
    write_report(run)
    assert f"finback generate {run / 'final'} --prompt" in (run / "report.md").read_text()


def test_a_sample_cannot_leave_its_block(run: Path) -> None:
    write_report(run, samples=[("a", "```\n# not a heading\n````")])
    report = (run / "report.md").read_text()
    block = report[report.index("## Samples") : report.index("## Go on")]
    assert block.count("`````text\n") == 1
    assert block.rstrip().endswith("`````")


def test_loss_plot_draws_the_rows() -> None:
    figure = draw_loss(rows(20), {"trigram": 2.0})
    assert figure is not None
    (axes,) = figure.axes
    curves = {line.get_label(): line for line in axes.lines}
    assert {"training", "held-out", "held-out, trigram"} <= set(curves)
    held_out = np.asarray(curves["held-out"].get_xydata())
    assert held_out.tolist() == [[5000, 1.3], [10000, 0.65], [15000, 6.5 / 15], [20000, 0.325]]
    assert np.asarray(axes.lines[0].get_xydata())[:2].tolist() == [[1000, 6.0], [2000, 3.0]]
    assert axes.get_xlabel() == "tokens"
    assert axes.get_ylabel() == "nats per token"


def test_a_nan_in_the_rows_is_left_out_of_the_curves() -> None:
    records = rows(20)
    records[3]["loss"] = math.nan
    figure = draw_loss(records, {})
    assert figure is not None
    assert len(figure.axes[0].lines[0].get_xdata()) == 19  # type: ignore[arg-type]


def test_expert_load_shows_multiples_of_the_mean() -> None:
    figure = draw_expert_load(loads(20), rows(20), ["layer 1", "layer 2", "MTP module 1"])
    pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in figure.axes][:3] == ["layer 1", "layer 2", "MTP module 1"]
    assert np.asarray(pictures[0])[:, 0].tolist() == [2.0, 0.5, 0.5, 1.0]
    assert np.asarray(pictures[2])[:, 0].tolist() == [4.0, 0.0, 0.0, 0.0]


def test_a_deep_model_shows_some_routers_and_bins_its_steps() -> None:
    records = [{"step": step, "counts": [[1, 3]] * 58} for step in range(1, 1001)]
    figure = draw_expert_load(records, rows(5), [f"layer {index}" for index in range(3, 61)])
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.images]
    assert len(titles) == 8
    assert titles[0] == "layer 3"
    assert titles[-1] == "layer 60"
    picture = figure.axes[0].images[0].get_array()
    assert picture is not None
    assert picture.shape == (2, 240)


def test_runs_without_speed_or_experts_have_no_such_plots(run: Path) -> None:
    records = [{"step": step, "tokens": step, "loss": 1.0} for step in (1, 2, 3)]
    assert draw_throughput(records) is None
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "expert_load.jsonl").unlink()
    assert [file.name for file in draw_plots(run)] == ["loss.png"]


def test_an_empty_run_still_has_a_report(run: Path) -> None:
    for name in ("metrics.jsonl", "expert_load.jsonl"):
        (run / name).write_text("")
    write_report(run)
    assert "No plots: no rows yet." in (run / "report.md").read_text()


def test_without_matplotlib_the_report_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(run)
    report = (run / "report.md").read_text()
    assert "No plots: matplotlib is not installed" in report
    assert "training loss" in report
    assert not (run / "plots").exists()


def test_a_directory_that_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config.json does not exist"):
        write_report(tmp_path)


def test_importing_the_module_imports_no_matplotlib() -> None:
    program = "import sys, finback.train.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
