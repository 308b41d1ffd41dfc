"""Every benchmark runs, at toy sizes and in this process, and its JSON holds what docs/benchmarks.md is made of."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import (
    cache,
    ceilings,
    checkpoint,
    cli,
    decode,
    engine,
    grpo,
    grpo_peer,
    kernels,
    llama,
    quant,
    report,
    serve,
    small,
    speculation,
    tiny,
    train,
)
from bench.contest import Turn, alternate, in_a_fresh_process, summarize
from bench.machine import describe_device, peak_memory_bytes, read_commit
from bench.peers import COMPARED, SETTINGS, our_model, their_model
from bench.results import Row, cells, with_unit
from finback.config import ModelConfig, count_params
from finback.data.tokenizer import save_tokenizer
from finback.model.checkpoint import save
from finback.presets import tiny as tiny_preset
from tests.checkpoint_samples import LLAMA, build
from tests.tokenizer_samples import family_tokenizer

SMALL = replace(
    COMPARED,
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    max_position_embeddings=64,
)
TOY: dict[str, Any] = {
    "ceilings": ceilings.TOY,
    "small": small.TOY,
    "kernels": kernels.TOY,
    "train": train.Size(SMALL, sequences=2, tokens=8, warm_up=1, turns=2, separate=False),
    "tiny": tiny.Size(
        replace(SMALL, num_nextn_predict_layers=1), sequences=2, tokens=8, steps=1, warm_up=1, turns=2, separate=False
    ),
    "decode": decode.Size(SMALL, (1, 2), prompt=4, new_tokens=4, turns=1, contexts=(8, 70), path_seconds=0.001, separate=False),
    "checkpoint": checkpoint.Size(replace(SMALL, num_nextn_predict_layers=1), turns=1),
}
PER_RUN = {
    "bench",
    "date",
    "commit",
    "dirty",
    "quick",
    "device",
    "peers",
    "load_average_1_minute_before",
    "busy",
    "notes",
    "rows",
    "bench_seconds",
}
PER_ROW = {"name", "spread_percent", "peer", "peer_spread_percent", "ratio", "target", "met", "floor"}
DEVICE = {"cpu", "cores", "cache_kib", "cpu_flags", "memory_total_bytes", "torch", "torch_build", "threads"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON files of one toy run of everything."""
    out = tmp_path_factory.mktemp("results")
    engine_size = toy_engine(tmp_path_factory.mktemp("models"))
    grpo_size = grpo.Size(
        engine_size.model,
        replace(SMALL, vocab_size=engine_vocabulary(engine_size), max_position_embeddings=256),
        num_generations=2,
        new_tokens=4,
        longest=4,
        precisions=(("fp32", "fp32"), ("fp32", "bf16")),
        warm_up=0,
        turns=1,
        separate=grpo_peer.is_installed(),  # two of TRL's trainers cannot share a process
    )
    served = serve.Size(
        engine_size.model,
        engine_size.llama_bin,
        small=engine_size.model,
        clients=(1, 3),
        requests=1,
        prompt_words=4,
        new_tokens=4,
        turns=1,
        dtype="float32",
    )
    read = cache.Reading(
        "toy", engine_size.mtp.directory, "", write_story(out), (8, 24), windows=2, prompts=2, prompt_tokens=4, new_tokens=3
    )
    cached = cache.Size((read,), {"toy": replace(SMALL, kv_lora_rank=64)}, cached=40, turns=1, step_seconds=0.001)
    packable = replace(LLAMA, hidden_size=64, intermediate_size=96, head_dim=16, rope_scaling=None, tie_word_embeddings=True)
    save(build(packable), out / "packable")
    loops = llama.Size(types=("Q4_0",), batches=(1, 3), prompt=4, new_tokens=4, turns=1)
    quant_size = quant.Size(out / "packable", out, group_size=32, decode=loops, separate=False)
    sizes = {**TOY, "cache": cached, "engine": engine_size, "quant": quant_size, "serve": served, "grpo": grpo_size}
    cli.run(cli.NAMES, sizes, out, quick=True)
    return out


def toy_engine(directory: Path) -> engine.Size:
    """A dense model in place of SmolLM2 and one with an MTP module; llama.cpp is not looked for."""
    tokenizer = family_tokenizer("smollm", chat_template="{{ messages[0].content }}")
    vocabulary = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 256}
    dense = replace(LLAMA, **vocabulary, rope_scaling=None)
    for name, config in (("dense", dense), ("mtp", replace(SMALL, **vocabulary, num_nextn_predict_layers=1))):
        save(build(config), directory / name)
        save_tokenizer(tokenizer, directory / name)
    return engine.Size(
        directory / "dense",
        llama_bin=directory,
        decode=llama.Size(batches=(1, 3), prompt=4, new_tokens=4, turns=1),
        prompts=(130,),
        prompt_turns=1,
        linear_seconds=0.001,
        mtp=speculation.Size(
            directory / "mtp", problems=1, fables=1, opening=4, new_tokens=8, turns=1, peer_turns=1, passes=1, separate=False
        ),
        separate=False,
    )


def write_story(directory: Path) -> Path:
    story = directory / "story.txt"
    story.write_text("A finback is a whale, and a whale is no fish. " * 9, encoding="utf-8")
    return story


def engine_vocabulary(size: engine.Size) -> int:
    return ModelConfig.from_hf(size.model).vocab_size


@pytest.mark.parametrize("name", cli.NAMES)
def test_json_holds_the_promised_fields(results: Path, name: str):
    result = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    assert result["bench"] == name
    assert result.keys() >= PER_RUN
    assert result["device"].keys() >= DEVICE
    assert {"avx512_bf16", "amx_bf16"} <= result["device"]["cpu_flags"].keys() or result["device"]["architecture"] != "x86_64"
    assert result["rows"]
    for row in result["rows"]:
        unit = list(row)[1]
        assert row.keys() >= PER_ROW | {unit, f"peer_{unit}"}
        # A random model's drafts may all be wrong; the engine's steps are differences of two times, here of a few milliseconds each.
        differences = ("engine step without work", "decode step of the calibration's model")
        assert row[unit] > 0 or "acceptance" in row["name"] or row["name"].startswith(differences)
        assert (row["peer"] is None) == (row["ratio"] is None)
        assert (row["target"] is None) == (row["met"] is None)
        assert all(cell == cell.strip() for cell in cells(row)[1:])


def test_every_target_of_the_project_has_a_row(results: Path):
    targets = {}
    for name in cli.NAMES:
        rows = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        targets |= {(row["name"], row["peer"]): row["target"] for row in rows if row["target"] is not None}
    expected = {("training bf16: share of the ceiling", None): 0.65, ("tiny bf16: share of the ceiling", None): 0.5}
    expected |= {("training bf16", peer): 2.5 for peer in SETTINGS} | {("training fp32", peer): 1.4 for peer in SETTINGS}
    expected |= {(f"generate {precision}, batch 1", peer): 8.0 for precision in ("fp32", "bf16") for peer in SETTINGS}
    speculation_of = {"greedy, 1 draft by MTP", "temperature 0.6, 1 draft by MTP"}
    expected |= {(name, "no drafts"): 1.25 for name in speculation_of}
    expected |= {(f"{name}: acceptance", None): 0.7 for name in speculation_of}
    perplexities = {f"toy: perplexity up to {context} tokens, {format}" for context in (8, 24) for format in ("int8", "fp8")}
    expected |= {(name, "plain rows, float32"): 1 / 1.005 for name in perplexities}
    expected |= {("4 bits packed, decode, 1 sequence: share of the bandwidth floor", None): 0.6}
    expected |= {("GRPO step, maths: share without waiting for rewards", None): 0.95}
    if grpo.isolation_is_there():
        expected |= {("GRPO step, code in the sandbox: share without waiting for rewards", None): 0.95}
    if grpo.is_installed():
        for sampled in ("", ", sampled in bf16"):
            expected |= {(f"GRPO step, V3, fp32{sampled}", peer.replace("transformers", "TRL")): 4.0 for peer in SETTINGS}
            expected |= {(f"GRPO step, SmolLM2-135M, fp32{sampled}", "TRL"): 3.0}
    assert targets == expected  # the toy has no batch of 16 or 32, no llama.cpp and no prompt of 4,096 tokens


def test_the_time_of_an_event_loop_is_that_of_a_process_first_thread() -> None:
    code = "import sys, time\nwhile time.process_time() < 0.1: pass\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        seconds = serve.loop_seconds(process.pid)
        process.stdin.close()
    if seconds:  # None or 0 where the system does not tell
        assert 0.08 < seconds < 5


def test_time_shares_add_up(results: Path):
    shares = json.loads((results / "tiny.json").read_text(encoding="utf-8"))["time_shares"]
    assert sum(part["share"] for part in shares) == pytest.approx(1)
    milliseconds = {part["category"]: part["milliseconds"] for part in shares}
    for category in (
        "expert products",
        "attention",
        "head and loss",
        "dense products",
        "norms",
        "SwiGLU",
        "routing and permutation",
        "optimizer",
    ):
        assert milliseconds[category] > 0, category


def test_the_page_and_the_readmes_are_written_from_the_json(results: Path, tmp_path: Path):
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nSTALE\n{report.END}\nafter\n", encoding="utf-8")
    (tmp_path / "README.zh.md").write_text("no markers\n", encoding="utf-8")
    report.main(results, tmp_path)
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(f"## {title}" in page for title in cli.TITLES.values())
    assert "a quick run, no claim" in page
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"before\n{report.BEGIN}\n| ")
    assert readme.endswith(f"{report.END}\nafter\n")
    assert "STALE" not in readme
    assert "2.5x" in readme
    assert (tmp_path / "README.zh.md").read_text(encoding="utf-8") == "no markers\n"
    report.main(results, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme


def test_a_target_concerns_the_ratio_if_there_is_a_peer():
    speed = Row("x", "tokens_per_second", 30.0, peer="p", peer_value=10.0, target=2.5)
    assert (speed.ratio, speed.met) == (3.0, True)
    time = Row("x", "milliseconds", 30.0, peer="p", peer_value=10.0, target=2.5)
    assert (time.ratio, time.met) == (pytest.approx(1 / 3), False)
    assert Row("x", "share", 0.6, target=0.5).met
    assert Row("x", "share", 0.4, target=0.5).met is False
    assert Row("x", "share", 0.4).met is None


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (1234.5, "tokens_per_second", "1,234 tok/s"),
        (0.5, "seconds", "0.5 s"),
        (12.34, "ceiling_gflop_per_second", "ceiling 12.3 GFLOP/s"),
        (3.0, "gb_per_second", "3 GB/s"),
        (0.523, "share", "0.523"),
    ],
)
def test_numbers_carry_their_unit(value: float, name: str, text: str):
    assert with_unit(value, name) == text


def test_competitors_take_turns():
    log: list[tuple[str, int]] = []

    def build(name: str) -> Any:
        return lambda item: log.append((name, item)) or item * 2

    turns = alternate({name: partial(build, name) for name in ("ours", "theirs")}, [1, 2], separate=False)
    assert log == [("ours", 1), ("theirs", 1), ("ours", 2), ("theirs", 2)]
    assert [turn.value for turn in turns["theirs"]] == [2, 4]
    assert summarize([1.0, 2.0, 4.0]) == (2.0, 150.0)


def test_a_competitor_in_a_process_of_its_own_answers():
    assert in_a_fresh_process(build_square, 3) == 9


def build_square() -> Any:
    return lambda item: item * item


def test_the_comparison_model_has_12_and_a_half_million_parameters():
    assert count_params(COMPARED).total == pytest.approx(12.5e6, rel=0.01)
    assert tiny_preset().model.num_nextn_predict_layers == 1  # what the benchmark without MTP is compared with


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_peer_computes_the_same(settings: dict[str, str]):
    ids = torch.randint(SMALL.vocab_size, (2, 8))
    with torch.no_grad():
        assert torch.allclose(our_model(SMALL)(ids), their_model(SMALL, settings)(ids).logits, atol=1e-5)


def test_bytes_per_step_counts_each_weight_once_and_experts_as_chosen():
    def by_hand(config: ModelConfig, experts: float) -> float:
        model = our_model(config)
        state = {name: tensor.numel() for name, tensor in model.named_parameters() if "norm" not in name and "embed" not in name}
        share = {name: experts / config.n_routed_experts for name in state if ".experts." in name}
        return 4 * sum(count * share.get(name, 1.0) for name, count in state.items())

    row = SMALL.kv_lora_rank + SMALL.qk_rope_head_dim
    latents = 4 * 10 * row * SMALL.num_hidden_layers
    assert decode.bytes_per_step(SMALL, 4, batch=1, context=10) == pytest.approx(by_hand(SMALL, 2) + latents)
    assert decode.bytes_per_step(SMALL, 4, batch=2, context=0) == pytest.approx(by_hand(SMALL, 8 * (1 - 0.75**2)))


def test_other_tokens_pass_only_where_two_logits_are_equal():
    prompt = [1, 2, 3]
    with torch.no_grad():
        first, second = our_model(SMALL)(torch.tensor([prompt]))[0, -1].topk(2).indices.tolist()

    def turns(token: int) -> dict[str, list[Turn]]:
        return {"finback": [Turn(1.0, [[*prompt, first, 5]])], "other": [Turn(1.0, [[*prompt, token, 5]])]}

    decode.check_tokens(SMALL, turns(first))
    with pytest.raises(AssertionError, match="token 3"):
        decode.check_tokens(SMALL, turns(second))


def test_one_measurement_has_no_spread():
    assert summarize([2.0]) == (2.0, None)


def test_the_machine_is_described():
    device = describe_device()
    assert device["threads"] == torch.get_num_threads()
    assert read_commit().keys() == {"commit", "dirty"}
    peak = peak_memory_bytes()
    assert peak is None or peak > 10 * 2**20


def test_tables_print_without_a_terminal(capsys: pytest.CaptureFixture[str]):
    from bench.results import print_table

    print_table(Console(width=120), "Title", [Row("x", "seconds", 2.0, peer="p", peer_value=1.0, target=1.5)], ["a note"])
    printed = capsys.readouterr().out
    assert "0.50x" in printed
    assert "MISSED" in printed
    assert "a note" in printed
