"""What the benchmark of packed weights counts as read, and which rows have a target."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench import llama, quant
from bench.ceilings import Ceilings
from bench.llama import OURS
from bench.results import Row
from finback.model.checkpoint import save
from tests.checkpoint_samples import LLAMA, build
from tests.ops.native.rule import compiled

CEILINGS = Ceilings({"bf16": 300.0}, {"bf16": (1, 1, 1)}, 40.0)


def test_bytes_read_are_those_of_integers_scales_head_and_cache(tmp_path: Path) -> None:
    compiled()
    config = replace(LLAMA, hidden_size=64, intermediate_size=96, head_dim=16, tie_word_embeddings=True, rope_scaling=None)
    save(build(config), tmp_path / "model")
    packed = quant.quantise(quant.Size(tmp_path / "model", group_size=32), tmp_path)
    matrices = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)  # query, output; key, value; feed-forward
    head, norms = 96 * 64 + 96 * 2, 7 * 64 * 2  # 8 bits and one float16 for each row's 64 inputs; bfloat16
    read = matrices // 2 + matrices // 32 * 2 + head + norms
    assert quant.weights_read(packed) == read
    floor = quant.floor(config, read, 2, llama.Size(prompt=10, new_tokens=4), CEILINGS)
    cached = 2 * 12 * 3 * 2 * 2 * 16 * 2  # sequences, tokens, layers, keys and values, heads, width, bytes
    assert floor["megabytes"] == pytest.approx((read + cached) / 1e6)
    assert floor["bandwidth_tokens_per_second"] == pytest.approx(2 * 40e9 / (read + cached))


def test_targets_are_beside_llama_cpp_and_the_floor_at_one_sequence() -> None:
    def row(sequences: int, peer: str) -> Row:
        floor = {"bandwidth_tokens_per_second": 400.0}
        extra = {"sequences": sequences, "step_milliseconds": 3.125}
        return Row("decode", "tokens_per_second", 300.0, None, peer, 100.0, floor=floor, extra=extra)

    assert OURS == "finback"
    rows = {(s, peer): quant.with_target(row(s, peer)) for s in (1, 8) for peer in (quant.PLAIN, "llama.cpp Q4_0")}
    assert {key: found.target for key, found in rows.items() if found.target} == {(1, "llama.cpp Q4_0"): 1.0}
    share = quant.share(rows[1, quant.PLAIN])
    assert (share.value, share.target, share.met) == (pytest.approx(0.8), 0.6, True)  # 320 of 400 steps a second
    assert share.extra["share_of_the_whole_loop"] == 0.75
    assert quant.share(rows[8, quant.PLAIN]).target is None


def test_a_missing_model_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    rows, notes = quant.run(quant.Size(tmp_path), CEILINGS)
    assert rows == []
    assert "finback fetch smollm2" in notes[0]
