"""The pieces of the ladder: what becomes of a sample on its way to a conversation, gates, and funnels."""

import pytest

from finback.recipes.config import LadderConfig
from finback.recipes.ladder import _must_rise, _too_few, chat_row, final_answer_text, reference_row
from finback.recipes.scenario import rule
from finback.recipes.stages import StageFailed
from finback.rewards.answers import answer_tag
from finback.rl.rejection import Funnel


def _ladder(**changes):
    from pathlib import Path

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


def _results(value, low, high):
    return {"results": {"sums": {"pass_at_1": [value, low, high]}}}


def test_the_gate_asks_for_more_than_the_intervals(capsys):
    _must_rise(_ladder(), "r1-zero", _results(0.2, 0.15, 0.25), _results(0.5, 0.45, 0.55))
    with pytest.raises(StageFailed, match=r"r1-zero did not improve what it must: pass@1 on sums was 20\.0%"):
        _must_rise(_ladder(), "r1-zero", _results(0.2, 0.15, 0.25), _results(0.3, 0.24, 0.36))
    _must_rise(_ladder(gate="tell"), "r1-zero", _results(0.2, 0.15, 0.25), _results(0.3, 0.24, 0.36))
    assert "did not improve" in capsys.readouterr().out


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
