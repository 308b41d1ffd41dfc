"""The quickstart, end to end on generated problems and a very small model, without any network."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import finback
from finback.config import InputError
from finback.data.ngram import TrigramModel
from finback.data.problems import is_held_out
from finback.data.shards import TokenShards
from finback.data.tokenizer import load_tokenizer
from finback.presets import nano, nano_dense, tiny
from finback.recipes.base_model import compare, mixed
from finback.recipes.config import QuickstartConfig
from finback.recipes.corpus import docstring_texts
from finback.recipes.quickstart import quickstart
from finback.train.config import PretrainConfig
from finback.train.metrics import read_metrics

STAGES_WITH_MODELS = ("base", "r1-zero", "cold-start", "reasoning-rl", "rejection-sft", "all-scenario-rl", "student")
PNG = b"\x89PNG\r\n\x1a\n"


def small_preset() -> PretrainConfig:
    preset = tiny()
    model = replace(
        preset.model,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    return replace(preset, model=model, sequence_length=64, micro_batch_size=8, global_batch_size=8, warmup_steps=5, threads=1)


def small_config(out: Path, **more: object) -> QuickstartConfig:
    fields = {"out": str(out), "tokens": 40_000, "student_tokens": 5000, "seed": 3, "text": "none", "problems": 1500}
    fields |= {"vocab_size": 512, "ladder": 0.02, "eval_problems": 4}
    return QuickstartConfig(**fields | more)  # type: ignore[arg-type]


def climb(config: QuickstartConfig) -> Path:
    return quickstart(config, small_preset(), small_student())


def small_student() -> PretrainConfig:
    preset = nano_dense()
    model = replace(preset.model, vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
    return replace(preset, model=model, sequence_length=64, warmup_steps=2, threads=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, shared by the tests below, which only look at it."""
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    assert climb(small_config(out)) == out / "final"
    return out


def test_run_directory_is_complete(run: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "expert_load.jsonl", "manifest.json", "report.md"):
        assert (run / name).stat().st_size > 0, name
    for stage in (*STAGES_WITH_MODELS, "student-base", "final"):
        for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            assert (run / stage / name).stat().st_size > 0, f"{stage}/{name}"
        assert not (run / stage / "trainer.safetensors").exists()
    for name in ("loss", "expert_load", "throughput"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(PNG)
    for name in ("r1-zero", "reasoning-rl", "all-scenario-rl"):
        assert (run / "training" / name / "plots" / "curves.png").read_bytes().startswith(PNG)
    assert not list(run.rglob("*.tmp"))


def test_manifest_holds_stages_versions_and_checksums(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert [name for name in manifest["stages"] if name in STAGES_WITH_MODELS] == list(STAGES_WITH_MODELS)
    assert all(stage["seconds"] >= 0 and stage["title"] for stage in manifest["stages"].values())
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["settings"]["tokens"] == 40_000
    assert {"base/model.safetensors", "final/model.safetensors", "report.md", "metrics.jsonl"} <= set(manifest["files"])
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((run / name).read_bytes()).hexdigest() == digest, name


def test_each_step_stands_once_and_held_out_loss_falls(run: Path) -> None:
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(held_out) >= 2
    assert held_out[-1] < held_out[0]
    assert all("max_violation" in row for row in rows)


def test_final_is_the_same_in_transformers(run: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(3, 300, (2, 40))
    with torch.no_grad():
        ours = finback.load(run / "final")(ids)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32)(ids).logits
    assert isinstance(ours, torch.Tensor)
    assert torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs) < 1e-5
    text = "User: What is 3+4?\nAssistant: <think>\nfirst 7\n</think>\n<answer>7</answer>\n答案"
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "final")
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == load_tokenizer(run / "final").encode(text)


def test_training_text_holds_no_held_out_problem(run: Path) -> None:
    texts = [json.loads(line)["text"] for line in (run / "data" / "chains.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in (run / "data" / "prompts.jsonl").read_text().splitlines()]
    held_out = [json.loads(line)["prompt"] for line in (run / "data" / "held-out.jsonl").read_text().splitlines()]
    assert len(texts) == 1500
    assert all(is_held_out(question) for question in held_out)
    assert not any(is_held_out(question) for question in prompts)
    assert not any(is_held_out(text.partition("\n")[0].removeprefix("User: ")) for text in texts if text.startswith("User: "))
    everything = "\n".join([*texts, *prompts])
    assert not any(question in everything for question in held_out)
    assert "sums: 0 of" in (run / "report.md").read_text()


def test_the_ladder_measures_every_model_and_says_what_it_trained_from(run: Path) -> None:
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    for name in STAGES_WITH_MODELS[1:]:
        for title in ("sums", "longer sums"):
            numbers = stages[name]["results"][title]
            assert numbers["problems"] == 4
            assert numbers["samples"] == 16
            assert 0 <= numbers["pass_at_1"][1] <= numbers["pass_at_1"][0] <= numbers["pass_at_1"][2] <= 1
    assert [stages[name]["trained_from"] for name in STAGES_WITH_MODELS[1:]] == [
        "base", "base", "cold-start", "base", "rejection-sft", "student-base"
    ]  # fmt: skip
    report = (run / "report.md").read_text()
    for name in STAGES_WITH_MODELS:
        assert f"| {name} | sums |" in report
        assert f"| {name} | longer sums |" in report


def test_bits_per_byte_are_of_the_same_tokens_and_the_validation_loss_agrees(run: Path) -> None:
    held_out = json.loads((run / "manifest.json").read_text())["stages"]["comparison"]["held_out"]
    split = TokenShards(run / "data" / "chains", "validation")
    train = TokenShards(run / "data" / "chains", "train")
    rows = (split.num_tokens - 1) // 64
    tokens = split.tokens(0, rows * 64 + 1)
    lengths = load_tokenizer(run / "tokenizer").token_byte_lengths()
    assert held_out["all"]["tokens"] == rows * 64
    assert held_out["all"]["bytes"] == lengths[tokens[1:]].sum()
    trigram = TrigramModel(train.tokens(0, train.num_tokens), 320)
    bits = -trigram.log_probabilities(tokens).sum() / np.log(2)
    assert held_out["all"]["trigram_bits_per_byte"] == pytest.approx(bits / held_out["all"]["bytes"], rel=1e-12)
    last = read_metrics(run / "metrics.jsonl")[-1]  # measured in bf16
    assert held_out["all"]["nats_per_token"] == pytest.approx(last["validation_loss"], rel=0.02)
    again = compare(finback.load(run / "base"), trigram, {"chains": split}, lengths, 64)
    assert again["all"]["nats_per_token"] == pytest.approx(held_out["all"]["nats_per_token"], rel=1e-5)


def test_report_shows_the_comparison_the_ladder_and_samples(run: Path) -> None:
    report = (run / "report.md").read_text()
    assert "Beside an interpolated trigram model" in report
    assert "| Pre-training |" in report
    assert "The R1 ladder" in report
    assert report.count("▌") >= 1
    assert f"finback generate {run / 'final'}" in report


def test_a_finished_run_says_so_and_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "manifest.json").read_bytes()
    climb(small_config(run))
    printed = capsys.readouterr().out
    assert "finished already" in printed
    assert "--fresh" in printed
    assert (run / "manifest.json").read_bytes() == before


def test_other_fields_than_the_run_was_started_with_are_refused(run: Path) -> None:
    with pytest.raises(InputError, match=r"was started with seed 3, not 4; run it with --seed 3, or with --fresh"):
        climb(small_config(run, seed=4))


def test_an_interrupted_run_goes_on_with_the_first_unfinished_stage(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    shutil.copytree(run, out)
    manifest = json.loads((out / "manifest.json").read_text())
    former = manifest["stages"]["comparison"]["held_out"]
    for name in ("comparison", "samples", "student", "report"):
        del manifest["stages"][name]
    (out / "manifest.json").write_text(json.dumps(manifest | {"finished": False, "files": {}}))
    for name in ("final", "plots", "student"):
        shutil.rmtree(out / name)
    shutil.rmtree(out / "training" / "student")  # its run belongs to the directory that it was started in
    climb(small_config(out))
    assert "Pre-training: done before" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stages"]["comparison"]["held_out"] == former
    assert (out / "final" / "model.safetensors").is_file()
    assert manifest["finished"] is True


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no quickstart run"):
            climb(small_config(tmp_path, fresh=fresh))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(InputError, match="is a file"):
        climb(small_config(tmp_path / "thesis.txt"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokens", 0), ("student_tokens", -1), ("seed", -1), ("problems", 10), ("ladder", float("nan")), ("eval_problems", 0)],
)
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"field {field} is"):
        QuickstartConfig(**{field: value})  # type: ignore[arg-type]


def test_docstrings_are_prose_of_the_standard_library() -> None:
    texts = list(docstring_texts(0, 200_000))
    assert 200_000 <= sum(len(text.encode()) for text in texts) < 600_000
    assert texts == list(docstring_texts(0, 200_000))
    assert sum("return" in text.lower() for text in texts) > len(texts) / 5


@pytest.mark.slow
def test_killed_during_pre_training_and_run_again(tmp_path: Path) -> None:
    """kill -9 after some steps; the same call continues, and every step stands once."""
    out = tmp_path / "quickstart"
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from tests.recipes.test_quickstart import quickstart, small_config, small_preset, small_student\n"
        "quickstart(small_config(Path(sys.argv[1])), replace(small_preset(), save_every=1), small_student())\n"
    )
    command = [sys.executable, "-c", program, str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < 3:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
    assert "base" not in json.loads((out / "manifest.json").read_text())["stages"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "Tokenizer: done before" in done.stdout
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert json.loads((out / "manifest.json").read_text())["finished"] is True


def test_groups_are_mixed_in_their_shares() -> None:
    def row(tokens: int, size: int, nats: float, trigram: float) -> dict[str, float]:
        return {"tokens": tokens, "bytes": size, "nats_per_token": nats, "trigram_nats_per_token": trigram}

    rows = {"stories": row(100, 300, 4.0, 3.0), "sums": row(10, 20, 1.0, 2.0), "all": row(110, 320, 3.7, 2.9)}
    found = mixed(rows, {"stories": 1000, "sums": 3000})
    assert (found["tokens"], found["bytes"]) == (110, 320)
    assert found["nats_per_token"] == pytest.approx((4.0 + 3 * 1.0) / 4)
    assert found["trigram_nats_per_token"] == pytest.approx((3.0 + 3 * 2.0) / 4)
    bytes_per_token = (3 + 3 * 2) / 4
    assert found["bits_per_byte"] == pytest.approx(7 / 4 / bytes_per_token / np.log(2))
    assert found["trigram_bits_per_byte"] == pytest.approx(9 / 4 / bytes_per_token / np.log(2))


@pytest.mark.slow
def test_the_real_quickstart(tmp_path: Path) -> None:
    """What `make quickstart` shows, in the 20 minutes that it is given on two cores: more than a trigram model knows, and R1-Zero's
    rise."""
    out = tmp_path / "quickstart"
    quickstart(QuickstartConfig(out=str(out)), nano(), nano_dense())
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    held_out = stages["comparison"]["held_out"]["as the corpus"]
    assert held_out["bits_per_byte"] < held_out["trigram_bits_per_byte"]
    before, after = stages["r1-zero"]["base"]["results"]["sums"], stages["r1-zero"]["results"]["sums"]
    assert after["pass_at_1"][0] - before["pass_at_1"][0] >= 0.30
    assert after["greedy"][0] - before["greedy"][0] >= 0.15
