"""`finback r1` on a base of one's own: here one that was fine-tuned for a moment on the form of the answers."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finback.cli import main
from finback.config import InputError, ModelConfig
from finback.data.chains import ChainSettings, clean_thought, generate_chains
from finback.recipes import room
from finback.recipes.config import DistillConfig, R1Config
from finback.recipes.distill import distill
from finback.recipes.r1 import check_problems, r1, r1_ladder, seen_problems
from finback.recipes.stages import Run
from finback.rl.config import GRPOConfig
from finback.rl.rollout import Rollout, roll_out
from finback.rl.session import read_run_config
from finback.rl.train import grpo
from finback.train.metrics import read_metrics
from finback.train.sft import sft
from finback.train.sft_config import SFTConfig
from tests.rl.policies import write_policy, write_reward_model
from tests.train.runs import micro_dense, micro_model

TEMPLATE = "Q: {prompt}\nA:"


def _rows(file: Path, *, held_out: bool, count: int) -> Path:
    """Sums that all have the answer 7: what a model of a few thousand parameters can know."""
    chains = generate_chains(count, ChainSettings(2, 2, 6), seed=3, held_out=held_out)
    rows = [{"prompt": chain.question, "answer": "7", "language": chain.language} for chain in chains]
    file.write_text("".join(json.dumps(row) + "\n" for row in {row["prompt"]: row for row in rows}.values()))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("r1")
    _rows(directory / "data.jsonl", held_out=False, count=60)
    _rows(directory / "held-out.jsonl", held_out=True, count=20)
    for name, model in (("raw", micro_model()), ("raw-student", micro_dense())):
        write_policy(directory / name, model)
    traces = directory / "traces.jsonl"
    with traces.open("w") as out:
        for chain in generate_chains(150, ChainSettings(2, 2, 6), seed=5):
            thought = clean_thought(chain)
            completion = f" <think>\n{thought}\n</think>\n<answer>7</answer>"
            out.write(json.dumps({"prompt": TEMPLATE.replace("{prompt}", chain.question), "completion": completion}) + "\n")
    config = SFTConfig(data=(str(traces),), epochs=8, lr=1e-2, batching="pad", save_every=None, global_batch_size=16)
    for name in ("raw", "raw-student"):
        checkpoint = sft(directory / name, config, directory / f"sft-{name}")
        checkpoint.rename(directory / ("student" if "student" in name else "base"))
    answers = directory / "answers.jsonl"
    with answers.open("w") as out:
        for chain in generate_chains(150, ChainSettings(2, 2, 6), seed=5):
            content = ("答案：" if chain.language == "zh" else "Answer: ") + "7"
            reply = {"role": "assistant", "reasoning_content": clean_thought(chain), "content": content}
            out.write(json.dumps({"messages": [{"role": "user", "content": chain.question}, reply]}) + "\n")
    sft(directory / "raw", replace(config, data=(str(answers),)), directory / "sft-teacher").rename(directory / "teacher")
    return directory


def _config(files: Path, out: Path, **changes: object) -> R1Config:
    config = R1Config(
        base=str(files / "base"),
        data=str(files / "data.jsonl"),
        held_out=str(files / "held-out.jsonl"),
        student=str(files / "student"),
        out=str(out),
        template=TEMPLATE,
        zero_steps=2,
        reasoning_steps=1,
        all_scenario_steps=1,
        prompts_per_step=4,
        num_generations=4,
        max_completion_length=48,
        cold_start_prompts=24,
        rejection_prompts=8,
        student_prompts=8,
        lr=1e-3,
        beta=0.0,
        sft_lr=1e-3,
        gate="tell",
        eval_problems=4,
        eval_samples=4,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def test_the_whole_recipe_on_a_base_of_ones_own(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = r1(_config(files, tmp_path / "run"))
    printed = capsys.readouterr().out
    assert final == tmp_path / "run" / "final"
    assert "language_consistency" in printed  # the funnel of the cold start
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["stages"]["base"]["files"][str(files / "data.jsonl")]
    for name in ("base", "r1-zero", "cold-start", "reasoning-rl", "rejection-sft", "all-scenario-rl", "student", "final"):
        assert (tmp_path / "run" / name / "model.safetensors").exists(), name
        assert (tmp_path / "run" / name / "tokenizer.json").exists(), name
    report = (tmp_path / "run" / "report.md").read_text()
    assert r1(_config(files, tmp_path / "run", micro_batch_size=2, recompute="full")) == final  # on a smaller machine, say
    assert "finished already" in capsys.readouterr().out
    assert "| student | held out |" in report
    assert "0 of" in report
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    r1(_config(files, tmp_path / "run"))
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    with pytest.raises(InputError, match="was started with zero_steps 2, not 3"):
        r1(_config(files, tmp_path / "run", zero_steps=3))


def test_a_gate_stops_the_run_with_a_reason(files: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stage r1-zero did not improve what it must"):
        r1(_config(files, tmp_path / "run", gate="stop", lr=1e-9, zero_steps=1))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "base" in manifest["stages"]
    assert "r1-zero" not in manifest["stages"]


def test_a_teacher_teaches_a_student_of_another_family(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DistillConfig(
        teacher=str(files / "teacher"),
        student=str(files / "student"),
        data=str(files / "data.jsonl"),
        held_out=str(files / "held-out.jsonl"),
        out=str(tmp_path / "run"),
        template=TEMPLATE,
        prompts=40,
        max_completion_length=48,
        eval_problems=4,
        eval_samples=4,
    )
    assert distill(config) == tmp_path / "run" / "student"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["stages"]["student"]["rows"] >= 20
    report = (tmp_path / "run" / "report.md").read_text()
    for name in ("teacher", "student before", "student"):
        assert f"| {name} | held out |" in report
    with pytest.raises(InputError, match="field student is missing"):
        distill(replace(config, student=""))


OWN_REWARDS = '''
from finback.rewards.answers import behind_thought

def wanted(prompt, completion, example):
    """1 if the wanted word stands behind the thought; rows have no answer."""
    return float(example["wanted"] in (behind_thought(prompt, completion) or ""))

def polite(prompt, completion, example):
    return float(example["general"])
'''


@pytest.fixture(scope="module")
def own(files: Path) -> Path:
    """Rows of a task that has no exact answer, with a reward of its own, and general prompts that it cannot judge."""
    (files / "own_rewards.py").write_text(OWN_REWARDS)
    for name in ("data", "held-out"):
        rows = [json.loads(line) for line in (files / f"{name}.jsonl").read_text().splitlines()]
        texts = [json.dumps({"prompt": row["prompt"], "language": row["language"], "wanted": "7"}) for row in rows]
        (files / f"own-{name}.jsonl").write_text("\n".join(texts) + "\n")
    (files / "general.jsonl").write_text('{"prompt": "What is a whale?", "language": "en", "general": 1}\n' * 4)
    return files


def test_a_reward_of_ones_own_judges_in_every_stage(own: Path, tmp_path: Path) -> None:
    config = _config(
        own,
        tmp_path / "run",
        data=str(own / "own-data.jsonl"),
        held_out=str(own / "own-held-out.jsonl"),
        reward=(f"{own / 'own_rewards.py'}:wanted:2",),
        least_reward=2.0,
        general_prompts=str(own / "general.jsonl"),
        general_rewards=(f"{own / 'own_rewards.py'}:polite",),
        reward_model=(f"{write_reward_model(tmp_path / 'helpful', 'pairwise')}:0.1",),
        all_scenario_steps=4,
        student=None,
    )
    r1(config)
    run = tmp_path / "run"
    manifest = json.loads((run / "manifest.json").read_text())["stages"]
    assert manifest["base"]["files"]
    assert "wanted" in [name for name, _ in manifest["cold-start"]["funnel"]]
    assert manifest["r1-zero"]["results"]["held out"]["pass_at_1"][0] > 0.5  # without an "answer" the exact one judges nothing
    learnt = [json.loads(line)["messages"][1]["content"] for line in (run / "data" / "cold-start.jsonl").read_text().splitlines()]
    assert all("7" in content for content in learnt)
    assert not any("<" in content for content in learnt)  # R1-Zero's tags stay behind: chat turns have none
    for stage in ("r1-zero", "reasoning-rl", "all-scenario-rl"):
        rows = read_metrics(run / "training" / stage / "metrics.jsonl")
        assert all("reward/wanted" in row for row in rows)
        assert not any("reward/exact" in row for row in rows)
        assert [row["failed_rewards"] for row in rows] == [0.0] * len(rows)  # nothing is asked about rows that it cannot judge
    assert any(row.get("reward/polite") == 1.0 for row in rows)
    assert any("reward/helpful" in row for row in rows)


def test_distillation_beside_rl_alone_by_a_reward_of_ones_own_goes_on_where_it_was_interrupted(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = DistillConfig(
        teacher=str(own / "teacher"),
        student=str(own / "student"),
        data=str(own / "own-data.jsonl"),
        held_out=str(own / "own-held-out.jsonl"),
        reward=(f"{own / 'own_rewards.py'}:wanted",),
        out=str(run),
        template=TEMPLATE,
        prompts=40,
        max_completion_length=48,
        eval_problems=4,
        eval_samples=4,
        compare_rl=True,
        prompts_per_step=4,
        num_generations=4,
        beta=0.0,
        rl_lr=1e-3,
    )
    with monkeypatch.context() as patch:
        patch.setattr("finback.rl.train.roll_out", _interrupted_in_step(2))
        with pytest.raises(KeyboardInterrupt):
            distill(config)
    assert list(json.loads((run / "manifest.json").read_text())["stages"]) == ["teacher", "student"]
    assert "The same command goes on from here" in capsys.readouterr().out
    distill(config)
    printed = capsys.readouterr().out
    assert "Distillation: done before" in printed
    facts = json.loads((run / "manifest.json").read_text())["stages"]
    assert facts["teacher"]["results"]["held out"]["pass_at_1"][0] > 0
    assert [name for name, _ in facts["student"]["funnel"]][2] == "wanted"
    assert facts["student"]["rows"] >= 20

    assert (run / "training" / "teacher-samples.jsonl").read_text().count('"place"') == 40  # none of them is sampled again

    alone, training = facts["student-rl"], run / "training" / "student-rl"
    assert [row["step"] for row in read_metrics(training / "metrics.jsonl")] == list(range(1, alone["steps"] + 1))
    uninterrupted = grpo(read_run_config(training, GRPOConfig), tmp_path / "whole")
    assert (uninterrupted / "model.safetensors").read_bytes() == (run / "student-rl" / "model.safetensors").read_bytes()

    report = (run / "report.md").read_text()
    assert f"| {alone['distillation_flops']:.3g} |\n" in report
    assert f"| {alone['rl_flops']:.3g} |\n" in report
    (claim,) = facts["report"]["claims"]
    assert f"RL had {alone['rl_flops'] / alone['distillation_flops']:.2f} times the FLOPs | " in report
    distilled = facts["student"]["results"]["held out"]["pass_at_1"]
    above = distilled[1] > alone["results"]["held out"]["pass_at_1"][2]
    assert claim["holds"] is (above and alone["rl_flops"] >= alone["distillation_flops"])
    table = report[report.index("| model |") : report.index("verified traces")]
    assert table.strip().rpartition("\n")[0].strip() in printed

    with pytest.raises(InputError, match=r"own_rewards\.py has no function 'wante'; did you mean 'wanted'"):
        distill(replace(config, reward=(f"{own / 'own_rewards.py'}:wante",), out=str(tmp_path / "other")))
    with pytest.raises(InputError, match="field num_generations is 1"):
        distill(replace(config, num_generations=1, out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def _interrupted_in_step(number: int) -> Callable[..., Rollout]:
    """A rollout during which Ctrl-C is pressed, in one step."""

    def rolled(*words: Any, step: int, **more: Any) -> Rollout:
        if step == number:
            os.kill(os.getpid(), signal.SIGINT)
        return roll_out(*words, step=step, **more)

    return rolled


LINE_SEPARATOR = "\u2028"  # ends a line for str.splitlines, and no row


def test_problems_in_training_rows_are_found_however_json_writes_them(files: Path, tmp_path: Path) -> None:
    asked = [
        "How many\nwhat then remain?",
        "Wie viele Äpfel sind übrig?",
        "Go on.",
        f"A line{LINE_SEPARATOR}that goes on here",
        "Never seen?",
    ]
    rows = {
        "held": [{"prompt": text, "answer": "7"} for text in asked],
        "data": [
            {"prompt": f"First: {asked[0]}", "answer": "7"},
            {"prompt": asked[1], "answer": "7"},
            {"prompt": "x", "answer": "1"},
        ],
        "general": [{"prompt": [{"role": "user", "content": asked[2]}]}],
    }
    for name, own in rows.items():
        lines = [json.dumps(row, ensure_ascii=name != "held") + "\n" for row in own]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "run" / "data").mkdir(parents=True)
    row = {"messages": [{"role": "user", "content": asked[3]}, {"role": "assistant", "content": "7"}]}
    (tmp_path / "run" / "data" / "rejection.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    config = _config(
        files,
        tmp_path / "run",
        data=str(tmp_path / "data.jsonl"),
        held_out=str(tmp_path / "held.jsonl"),
        general_prompts=str(tmp_path / "general.jsonl"),
    )
    run = Run(tmp_path / "run", {}, Console())
    assert seen_problems(run, config) == "4 of 5 problems occur in the 5 rows of training."
    check_problems("held_out", config.held_out, ())


def test_data_that_changed_is_told_when_a_run_is_continued(files: Path, tmp_path: Path) -> None:
    data = shutil.copy(files / "data.jsonl", tmp_path / "data.jsonl")
    config = _config(files, tmp_path / "run", data=str(data), gate="stop", lr=1e-9, zero_steps=1, student=None)
    with pytest.raises(InputError, match="stage r1-zero did not improve"):
        r1(config)
    with data.open("a") as file:
        file.write('{"prompt": "What is 3+4?", "answer": "7"}\n')
    with pytest.raises(InputError, match=r"data\.jsonl has changed since the run in .* was started; put it back, or add --fresh"):
        r1(config)


def _changed_tokenizer(source: Path, target: Path, **fields: object) -> Path:
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return target


CONSISTENT = "finback.rewards.language:language_consistency"
UNENDED = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base": "BARE"}, "field base: .*bare has no chat template; give the field chat_template, a file, deepseek_r1 or"),
        ({"student": "BARE"}, "field student: .*bare has no chat template"),
        ({"base": "UNENDED"}, "field base: .*unended: the chat template"),
        ({"reward": (CONSISTENT,)}, "language_consistency'; .* the recipe has .*:language_consistency by itself"),
        (
            {"general_rewards": ("finback.rewards.answers:exact",)},
            r"answers\.exact'; .* the recipe has finback\.rewards\.answers:exact",
        ),
        ({"general": "CUT"}, r"cut\.jsonl, line 2: it is not valid JSON .*; mend or remove the line"),
        ({"general": "PROMPTS"}, r"prompts\.jsonl, line 1: it has neither messages nor prompt and completion"),
        ({"general_prompts": "CUT"}, r"cut\.jsonl, line 1: the row has no prompt"),
        ({"data": "EMPTY"}, r"field data names .*empty\.jsonl, which has no rows"),
        ({"data": "LONG"}, r"long\.jsonl, line 2: the prompt has \d+ tokens, and the model's context leaves"),
        ({"held_out": "LONG"}, r"long\.jsonl, line 2: the prompt has \d+ tokens, and the model's context leaves"),
        ({"max_completion_length": 10**6}, "field max_completion_length is 1000000, and the model's context has"),
        ({"num_generations": 1}, "field num_generations is 1"),
        ({"lr": -1.0}, "field lr is -1.0, it must be above 0"),
        ({"sft_lr": 0.0}, "field sft_lr is 0.0, it must be above 0"),
        ({"micro_batch_size": 0}, "field micro_batch_size is 0"),
    ],
)
def test_what_a_late_stage_could_not_go_on_with_is_told_before_the_first(
    files: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    places = {
        "BARE": _changed_tokenizer(files / "base", tmp_path / "bare", chat_template=None),
        "UNENDED": _changed_tokenizer(files / "base", tmp_path / "unended", chat_template=UNENDED),
        **{name: tmp_path / f"{name.lower()}.jsonl" for name in ("CUT", "PROMPTS", "EMPTY", "LONG")},
    }
    rows = [{"prompt": "What is 3+4?", "answer": "7"}, {"prompt": "What is 3+4? " * 2000, "answer": "7"}]
    places["LONG"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    reply = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    places["CUT"].write_text(json.dumps(reply) + "\n" + json.dumps(reply)[:40])
    places["PROMPTS"].write_text('{"prompt": "What is a whale?"}\n')
    places["EMPTY"].write_text("\n")
    named = {name: str(places[value]) if value in places else value for name, value in changes.items() if isinstance(value, str)}
    if "general_rewards" in changes:
        named["general_prompts"] = str(places["PROMPTS"])
    with pytest.raises(InputError, match=sentence):
        r1(_config(files, tmp_path / "run", **{**changes, **named}))
    assert not (tmp_path / "run").exists()


def test_too_little_memory_for_any_stage_is_told_before_the_first(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the fields that these commands have."""
    config = _config(files, tmp_path / "run", micro_batch_tokens=1 << 20)
    distillation = _distillation(files, tmp_path / "run")
    monkeypatch.setattr(room, "available_memory", lambda device: 1 << 28)
    with pytest.raises(InputError, match=r"lower micro_batch_tokens from 1048576 to \d+ \(the result stays the same"):
        r1(config)
    with pytest.raises(InputError, match=r"lower micro_batch_size from 4096 to \d+ \(the result stays the same"):
        r1(replace(config, micro_batch_tokens=1024, micro_batch_size=4096))
    with pytest.raises(InputError, match=r"lower micro_batch_size from 4096 to \d+ \(the result stays the same"):
        distill(replace(distillation, micro_batch_size=4096))
    with pytest.raises(InputError, match=r"lower micro_batch_tokens from 1048576 to \d+ \(the result stays the same"):
        distill(replace(distillation, compare_rl=True, micro_batch_tokens=1 << 20))
    assert not (tmp_path / "run").exists()


def test_traces_may_be_as_long_as_the_answers_asked_for(files: Path, tmp_path: Path) -> None:
    model = replace(micro_model(), max_position_embeddings=16384)
    assert room.trace_length(model, 512) == 4608
    assert room.trace_length(model, 8192) == 12288
    assert room.trace_length(model, 16000) == 16384
    context = ModelConfig.from_hf(files / "base").max_position_embeddings
    assert r1_ladder(_config(files, tmp_path)).cold_start.sequence_length == context


def _distillation(files: Path, out: Path) -> DistillConfig:
    return DistillConfig(
        teacher=str(files / "teacher"),
        student=str(files / "student"),
        data=str(files / "data.jsonl"),
        held_out=str(files / "held-out.jsonl"),
        template=TEMPLATE,
        max_completion_length=48,
        out=str(out),
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": "LONG"}, r"long\.jsonl, line 1: the prompt has \d+ tokens, and the model's context leaves"),
        ({"lr": 0.0}, "field lr is 0.0, it must be above 0"),
        ({"student": "BARE"}, "field student: .*bare has no chat template"),
        ({"teacher": "BARE"}, "field teacher: .*bare has no chat template; a teacher is a chat model"),
        ({"reward": ("finback.rewards.format:think_then_answer",)}, "the recipe has .*think_then_answer by itself"),
        ({"reward": ("finback.rewards.format:r1_zero_format",), "compare_rl": True}, "the recipe has .*r1_zero_format by itself"),
    ],
)
def test_distill_tells_so_too(files: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    places = {"BARE": _changed_tokenizer(files / "base", tmp_path / "bare", chat_template=None), "LONG": tmp_path / "long.jsonl"}
    places["LONG"].write_text(json.dumps({"prompt": "What is 3+4? " * 2000, "answer": "7"}) + "\n")
    named = {name: str(places[value]) if value in ("BARE", "LONG") else value for name, value in changes.items()}
    with pytest.raises(InputError, match=sentence):
        distill(replace(_distillation(files, tmp_path / "run"), **named))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the base model's directory is missing"),
        (["BASE"], "field data is missing"),
        (["BASE", "--data", "nowhere.jsonl"], "field data names nowhere.jsonl"),
        (["BASE", "--data", "DATA"], "field held_out is missing"),
        (["BASE", "--data", "BAD", "--held-out", "DATA"], "bad.jsonl, line 1: the row needs a prompt and an answer"),
        (["nowhere", "--data", "DATA", "--held-out", "DATA"], "nowhere"),
        (["BASE", "--zero-steps", "0"], "field zero_steps is 0"),
        (["BASE", "--data", "BAD", "--held-out", "BAD", "--reward", "nowhere.py:judge"], "there is no file 'nowhere.py'"),
        (["BASE", "--data", "DATA", "--held-out", "DATA", "--reward-model", "BASE"], "give general_prompts"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    files: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], sentence: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "What is 3+4?"}\n')
    names = {"BASE": str(files / "base"), "DATA": str(files / "data.jsonl"), "BAD": str(bad)}
    assert main(["r1", *(names.get(word, word) for word in words)]) == 2
    assert sentence in capsys.readouterr().err
