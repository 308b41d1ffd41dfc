"""What the benchmark writes of small models' work is what `--hardware measured` reads."""

import json
from pathlib import Path

from bench import ceilings, small
from bench.machine import describe_device
from finback.planner.measured import measured


def test_the_planner_reads_what_the_benchmark_writes(tmp_path: Path) -> None:
    rows = [row.to_dict() for row in ceilings.run(ceilings.TOY)[0] + small.run(small.TOY)]
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps({"device": describe_device(), "date": "2026-11-30T00:00:00+00:00", "rows": rows}))
    for precision in ("bf16", "fp32"):
        row = measured(path, precision)
        assert row.small_work is not None
        widths = [float(width) for width in small.TOY.widths]
        assert [width for width, _ in row.small_work.product_shares] == widths
        assert [width for width, _ in row.small_work.expert_shares] == widths
        assert [rows for rows, _ in row.small_work.decode_shares] == list(small.TOY.decode_batches)
        assert [size for size, _ in row.small_work.read_bytes_per_second] == [m * 2**20 for m in small.TOY.mebibytes]
        assert [vocabulary for vocabulary, _ in row.small_work.head_shares] == list(small.TOY.heads_of)
        assert row.small_work.mixture_training > 0
        assert [rows for rows, _ in row.small_work.mixture_decoding] == list(small.TOY.batches)
        assert row.efficiencies.attention_forward > 0
        assert row.small_work.training_layer_seconds != 0
