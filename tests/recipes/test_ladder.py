"""The pieces of the ladder: what becomes of a sample on its way to a conversation, gates, and funnels."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from finback.recipes import judging
from finback.recipes.ablations import distillation_flops
from finback.recipes.base_model import seen_problems
from finback.recipes.config import LadderConfig
from finback.recipes.ladder import (
    CHAT,
    _must_be_readable,
    _must_not_fall,
    _must_rise,
    _too_few,
    chat_row,
    final_answer_text,
    measure,
    read_rows,
    reference_row,
    sample_and_keep,
)
from finback.recipes.scenario import rule
from finback.recipes.stages import Run, StageFailed, copy_model
from finback.rewards.answers import answer_tag
from finback.rl.rejection import Funnel
from tests.train.runs import micro_dense


def _ladder(**changes):
    return LadderConfig(prompts=Path("prompts.jsonl"), held_out={"sums": Path("held-out.jsonl")}, **changes)


def test_a_sample_of_r1_zero_becomes_a_conversation():
    row = {
        "prompt": "User: What is 4+5+5?\nAssistant:",
        "completion": " <think>\nfirst 9+5\nthen 14\n</think>\n<answer>14</answer>",
        "example": {"prompt": "What is 4+5+5?", "answer": "14", "language": "en"},
    }
    reply = {"role": "assistant", "reasoning_content": "first 9+5\nthen 14", "content": "Answer: 14"}
    assert chat_row(row, answer_tag) == {"messages": [{"role": "user", "content": "What is 4+5+5?"}, reply]}
    bare = reply | {"content": "14"}  # a reward of one's own judged it
    assert chat_row(row, answer_tag, worded=False)["messages"][1] == bare


def test_a_sample_of_a_chat_model_begins_inside_its_thought():
    row = {
        "prompt": "<｜User｜>计算7+2。<｜Assistant｜><think>\n",
        "completion": "先得9\n</think>\n\n答案：9",
        "example": {"prompt": "计算7+2。", "answer": "9", "language": "zh"},
    }
    reply = {"role": "assistant", "reasoning_content": "先得9", "content": "答案：9"}
    assert chat_row(row, final_answer_text) == {"messages": [{"role": "user", "content": "计算7+2。"}, reply]}


def test_a_row_with_its_own_solution_becomes_the_same_kind_of_conversation():
    row = {"prompt": "What is 7+2?", "answer": "9", "language": "en", "reasoning": "first 9"}
    reply = {"role": "assistant", "reasoning_content": "first 9", "content": "Answer: 9"}
    assert reference_row(row) == {"messages": [{"role": "user", "content": "What is 7+2?"}, reply]}
    assert reference_row(row | {"answer": 9}) == reference_row(row)


def test_a_row_ends_where_its_line_does_and_nowhere_else(tmp_path):
    rows = [{"prompt": "one\u2028two\x85three", "answer": "7"}, {"prompt": "four", "answer": "8"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n \n", encoding="utf-8")
    assert read_rows(file) == rows


def test_problems_are_found_in_the_texts_of_rows_as_they_read(tmp_path):
    asked = ["What is the sum\nof 3 and 4?", "Wie viele \u00c4pfel sind es noch?", "Was never asked before?"]
    (tmp_path / "data").mkdir()
    held_out = tmp_path / "data" / "held-out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in asked))
    (tmp_path / "data" / "fables.jsonl").write_text(json.dumps({"text": "A fox saw the grapes."}) + "\n")
    rows = [{"prompt": f"Now: {asked[0]}"}, {"messages": [{"role": "user", "content": asked[1]}]}]
    (tmp_path / "data" / "cold-start.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(tmp_path, {"stages": {"corpus": {"groups": {"fables": {}}}}}, Console())
    assert seen_problems(run, {"sums": held_out}) == "sums: 2 of 3 problems occur in the 3 texts of training."


def test_a_copy_of_a_model_holds_its_files_where_the_source_holds_links_to_them(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(Path("..", "..", "blobs", "abc"))
    copy_model(snapshot, tmp_path / "run" / "base")
    copied = tmp_path / "run" / "base" / "model.safetensors"
    assert not copied.is_symlink()
    assert copied.read_bytes() == b"weights"
    assert copied.samefile(blobs / "abc")  # no bytes were copied


def test_of_fewer_prompts_than_asked_for_each_is_taken_once(chat_models, tmp_path, capsys):
    run = Run(tmp_path, {"settings": {"seed": 0}}, Console())
    (tmp_path / "teacher").symlink_to(chat_models / "deepseek_v3")
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"The fox {i}", "answer": "7"}) + "\n" for i in range(3)))
    ladder = LadderConfig(prompts=file, held_out={}, eval_tokens=4, cold_start_prompts=2, rejection_prompts=5)
    checks = judging.checks(ladder, judging.EXACT)
    _, funnel = sample_and_keep(run, ladder, "teacher", None, checks, 5, samples=2, keep=1, seed=3)
    assert funnel[0] == ["sampled", 6]
    printed = capsys.readouterr().out
    assert f"5 prompts are asked for, and {file} has 3: each of them is taken once" in printed
    assert "of 3" in printed


def test_what_distillation_sampled_is_counted_as_it_was(tmp_path):
    model = micro_dense()

    def flops(prompts):
        results = {"results": {"held out": {"mean_tokens": 10.0}}}
        stages = {"teacher": results, "student": {"funnel": [["sampled", 2 * prompts]], "tokens": 100}}
        return distillation_flops(Run(tmp_path, {"stages": stages}, Console()), model, model, "teacher")

    training = flops(0)
    assert flops(40) - training == pytest.approx(2 * (flops(20) - training))
    assert flops(40) > training > 0


def test_models_of_a_run_are_measured_on_the_device_that_trains_them(tmp_path, monkeypatch):
    asked = []

    class Stop(Exception):
        pass

    def engine(directory, **more):
        asked.append(more["device"])
        raise Stop

    monkeypatch.setattr("finback.recipes.ladder.choose_device", lambda name: torch.device("cuda") if name == "auto" else None)
    monkeypatch.setattr("finback.recipes.ladder.LLM", engine)
    monkeypatch.setattr("finback.recipes.ladder.load_tokenizer", lambda directory: None)
    with pytest.raises(Stop):
        measure(Run(tmp_path, {}, Console()), _ladder(), "base", CHAT)
    with pytest.raises(Stop):
        sample_and_keep(Run(tmp_path, {}, Console()), _ladder(), "base", None, [], 1, samples=1, keep=1, seed=1)
    assert asked == [torch.device("cuda")] * 2


def _results(value, low, high):
    return {"results": {"sums": {"pass_at_1": [value, low, high]}}}


def test_the_gate_asks_for_more_than_the_intervals(capsys):
    _must_rise(_ladder(), "r1-zero", _results(0.2, 0.15, 0.25), _results(0.5, 0.45, 0.55))
    with pytest.raises(StageFailed, match=r"r1-zero did not improve what it must: pass@1 on sums was 20\.0%"):
        _must_rise(_ladder(), "r1-zero", _results(0.2, 0.15, 0.25), _results(0.3, 0.24, 0.36))
    _must_rise(_ladder(gate="tell"), "r1-zero", _results(0.2, 0.15, 0.25), _results(0.3, 0.24, 0.36))
    assert "did not improve" in capsys.readouterr().out


def test_a_stage_that_gives_more_than_accuracy_must_keep_it(capsys):
    _must_not_fall(_ladder(), "reasoning-rl", _results(0.5, 0.45, 0.55), _results(0.47, 0.42, 0.52))
    with pytest.raises(StageFailed, match=r"reasoning-rl has lost what it must keep: pass@1 on sums was 50\.0% .* and is 30\.0%"):
        _must_not_fall(_ladder(), "reasoning-rl", _results(0.5, 0.45, 0.55), _results(0.3, 0.25, 0.35))
    _must_not_fall(_ladder(gate="tell"), "all-scenario-rl", _results(0.5, 0.45, 0.55), _results(0.3, 0.25, 0.35))
    assert "all-scenario-rl has lost" in capsys.readouterr().out


def test_a_cold_start_must_be_readable():
    def mixing(share):
        return {"results": {"sums": {"mixing_rate": share}}}

    _must_be_readable(_ladder(), mixing(0.3), mixing(0.1))
    _must_be_readable(_ladder(), mixing(0.0), mixing(0.02))
    with pytest.raises(
        StageFailed, match=r"cold-start is less readable than R1-Zero: 30\.0% of its thoughts on sums .*, 10\.0% of"
    ):
        _must_be_readable(_ladder(), mixing(0.1), mixing(0.3))


def test_too_few_samples_stop_a_run_or_are_made_up_for_loudly(capsys):
    with pytest.raises(StageFailed, match=r"only 1 of the samples of R1-Zero passed, fewer than 20: .*; train for longer"):
        _too_few(_ladder(), [1], "R1-Zero", "train for longer", [1, 2, 3])
    _too_few(_ladder(gate="tell"), [1], "R1-Zero", "train for longer", [1, 2, 3])
    assert "3 reference traces are learnt from as well" in capsys.readouterr().out
    with pytest.raises(StageFailed):
        _too_few(_ladder(gate="tell"), [1], "R1-Zero", "train for longer", [])


def test_rules_judge_only_rows_with_an_answer():
    completion = "first 9\n</think>\n\nAnswer: 9"
    assert rule("<think>\n", completion, {"answer": "9"}) == 1.0
    assert rule("<think>\n", completion, {"answer": "8"}) == 0.0
    assert rule("<think>\n", completion, {"kind": "general"}) == 0.0


def test_a_funnel_in_words():
    lines = list(Funnel((("sampled", 200), ("exact", 50)), prompts=40, prompts_kept=20).lines())
    assert lines[0].split() == ["sampled", "200", "100.0%"]
    assert lines[1].split() == ["exact", "50", "25.0%"]
    assert lines[2].endswith("20  of 40")
