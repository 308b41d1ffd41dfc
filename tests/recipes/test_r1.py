"""`finback r1` on a base of one's own: here one that was fine-tuned for a moment on the form of the answers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finback.cli import main
from finback.config import InputError
from finback.data.chains import ChainSettings, clean_thought, generate_chains
from finback.recipes.config import DistillConfig, R1Config
from finback.recipes.distill import distill
from finback.recipes.r1 import r1
from finback.train.sft import sft
from finback.train.sft_config import SFTConfig
from tests.rl.policies import write_policy
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
