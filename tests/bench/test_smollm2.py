"""The run on SmolLM2 at toy size: its data, its reward, and what it writes; what it learns is for the recorded run to show."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.smollm2 import TEMPLATE, Plan, Sum, run, sums
from bench.sum_reward import last_number
from finback.data.problems import is_held_out
from finback.data.tokenizer import save_tokenizer
from finback.model.checkpoint import save
from tests.checkpoint_samples import LLAMA, build
from tests.tokenizer_samples import family_tokenizer


def test_a_sum_is_worked_out_step_by_step():
    example = Sum((47, 85, 29))
    assert (example.question, example.answer) == ("47 + 85 + 29", "161")
    assert example.at_once == "47 + 85 + 29 = 161"
    assert example.worked == "47 + 85 = 132\n132 + 29 = 161"


def test_training_holds_no_problem_of_the_evaluation():
    held_out, trained = sums(200, 1, held_out=True), sums(2000, 2, held_out=False)
    assert len(set(held_out)) == 200
    assert not set(held_out) & set(trained)
    assert all(is_held_out(TEMPLATE.replace("{prompt}", s.question)) for s in held_out)  # in whatever words
    assert sums(200, 1, held_out=True) == held_out


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("47 + 85 = 132\n132 + 29 = 161", 1.0),
        ("The sum is 161.", 1.0),
        ("1,161", 0.0),
        ("161, or perhaps 162", 0.0),
        ("1610", 0.0),
        ("no idea", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_is_the_answer(completion: str, right: float):
    assert last_number("", completion, {"answer": "161"}) == right


def test_the_whole_run_at_toy_size_and_its_continuation(tmp_path: Path):
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = family_tokenizer("smollm", chat_template=chat)
    model = tmp_path / "model"
    save(build(replace(LLAMA, vocab_size=tokenizer.vocab_size, max_position_embeddings=512, rope_scaling=None)), model)
    save_tokenizer(tokenizer, model)
    whole = Plan()
    plan = Plan(
        traces=4,
        prompts=4,
        problems=3,
        warm_up=replace(whole.warm_up, global_batch_size=2, micro_batch_size=2, eval_samples=2),
        grpo=replace(whole.grpo, steps=2, prompts_per_step=2, num_generations=2, max_completion_length=4),
    )
    content = run(plan, model, tmp_path / "run")
    forms = {"chat", "chat, 4 solved", "text, 4 solved", "text, 4 answered", "warm-up", "GRPO"}
    assert content["models"].keys() == forms
    completions = [json.loads(line)["completion"] for line in (tmp_path / "run" / "traces.jsonl").read_text().splitlines()]
    assert sum("\n" not in completion for completion in completions) == 3  # 60% of 4, rounded up
    assert all(
        0 <= part["low"] <= part["value"] <= part["high"] <= 1 for of_it in content["models"].values() for part in of_it.values()
    )
    assert content["verdict"] == "missed"  # a random model learns nothing in two steps
    assert [row["step"] for row in content["curve"]] == [1, 2]
    assert {part["from"] for part in content["gains"]["GRPO over the warm-up"].values()} == {"warm-up"}
    again = run(plan, model, tmp_path / "run")  # nothing is left to train: only measured anew
    assert again["models"] == content["models"]
    assert again["curve"] == content["curve"]
