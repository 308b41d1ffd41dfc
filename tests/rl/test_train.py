"""The GRPO loop: it learns, it resumes bit for bit, its gradient does not depend on the cut, and it says what is wrong."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import finback
from finback.config import InputError
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.transformer import Transformer
from finback.rewards.reward import Score
from finback.rl.batch import cut_batches, sample_log_probs
from finback.rl.config import GRPOConfig
from finback.rl.prompts import Prompt, check_vocabulary, read_prompts
from finback.rl.report import write_report
from finback.rl.rollout import Completion, roll_out
from finback.rl.session import PromptStream, minibatch_order, read_run_config
from finback.rl.train import grpo
from finback.rl.update import learning_rate
from finback.train.metrics import read_metrics
from finback.train.session import locked
from tests.rl.policies import TIMES, dense, grpo_config, write_reward_model


def _rows(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run / "metrics.jsonl")]


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    model = finback.load(directory, dtype=torch.float32)
    return {name: tensor.clone() for name, tensor in finback.hf_tensors(model)}


def _same_weights(left: Path, right: Path) -> bool:
    a, b = _weights(left), _weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("model", [None, dense()], ids=["v3", "qwen3"])
def test_the_reward_rises(tmp_path, model):
    config = grpo_config(tmp_path, model=model, steps=12, num_generations=8)
    grpo(config, tmp_path / "run")
    rewards = [row["reward"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15, rewards


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "beta": 0.05,
            "reference_steps": 2,
            "minibatches": 2,
            "num_iterations": 2,
            "temperature": 0.8,
            "loss": "sequence",
            "replay_experts": True,
        },
        {"reward_model": ("judge:0.1",), "freeze_mtp": True},
        {"rollout_precision": "bf16"},
    ],
    ids=["plain", "reference", "reward-model", "sampled in bf16"],
)
def test_a_resumed_run_is_bitwise_the_run_that_was_not_interrupted(tmp_path, changes):
    if "reward_model" in changes:
        write_reward_model(tmp_path / "judge", "pointwise")
        changes = changes | {"reward_model": tuple(str(tmp_path / spec) for spec in changes["reward_model"])}
    config = grpo_config(tmp_path, steps=4, save_every=1, keep_checkpoints=0, **changes)
    whole = grpo(config, tmp_path / "whole")
    grpo(config, tmp_path / "cut")
    for step in (4, 3):  # the run as it was after step 2: killed before it could write the next checkpoint
        _remove(tmp_path / "cut" / "checkpoints" / f"step-{step}")
    resumed = grpo(config, tmp_path / "cut", resume=True)
    assert _rows(tmp_path / "whole") == _rows(tmp_path / "cut")
    assert _same_weights(whole, resumed)
    samples = [(tmp_path / name / "samples.jsonl").read_text(encoding="utf-8") for name in ("whole", "cut")]
    assert samples[0] == samples[1]


def _remove(directory: Path) -> None:
    for file in sorted(directory.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    directory.rmdir()


@pytest.mark.parametrize("loss", ["token", "sequence", "global-token"])
def test_micro_batches_do_not_change_the_run(tmp_path, loss):
    changes = {"loss": loss, "steps": 2, "minibatches": 2, "beta": 0.02}
    config = grpo_config(tmp_path, **changes)
    runs = []
    for tokens in (64, 4096):
        checkpoint = grpo(replace(config, micro_batch_tokens=tokens), tmp_path / f"run-{tokens}")
        runs.append(_weights(checkpoint))
    moved = _weights(tmp_path / "model")
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], rtol=1e-4, atol=2e-5)
    assert any(not torch.equal(moved[name], runs[0][name]) for name in moved)


def test_trainer_and_engine_agree_in_fp32(tmp_path):
    grpo(grpo_config(tmp_path), tmp_path / "run")
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert row["logprob_gap"] < 1e-5


@pytest.mark.parametrize("model", [None, dense()], ids=["v3", "qwen3"])
def test_a_rollout_in_bf16_is_of_the_weights_of_its_step(tmp_path, model, monkeypatch):
    """The engine's model holds the policy's weights, rounded, whenever it samples; the policy itself stays in float32."""
    seen = []

    def spied(llm, *arguments, **settings):
        seen.append({name: tensor.clone() for name, tensor in llm.model.state_dict().items()})
        return roll_out(llm, *arguments, **settings)

    monkeypatch.setattr("finback.rl.train.roll_out", spied)
    config = grpo_config(tmp_path, model=model, steps=3, save_every=1, keep_checkpoints=0, lr=1e-2, bias_update_speed=0.01)
    grpo(replace(config, rollout_precision="bf16"), tmp_path / "run")
    policies = [tmp_path / "model", *(tmp_path / "run" / "checkpoints" / f"step-{step}" for step in (1, 2))]
    assert len(seen) == 3
    for directory, sampled in zip(policies, seen, strict=True):
        policy = finback.load(directory, dtype=torch.float32)
        assert {tensor.dtype for name, tensor in policy.named_parameters()} == {torch.float32}
        for name, tensor in policy.state_dict().items():
            assert torch.equal(tensor.to(sampled[name].dtype), sampled[name]), (directory, name)
    assert any(not torch.equal(seen[0][name], seen[2][name]) for name in seen[0])
    assert all(0 < row["logprob_gap"] < 0.05 for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_samples_that_the_engine_loses_count_nothing_and_hang_nothing(tmp_path, monkeypatch, capsys):
    config, steps = grpo_config(tmp_path, steps=2), []
    step = LLM.step

    def losing(llm):
        steps.append(1)
        if len(steps) == 3:
            llm.abort(next(iter(llm._answers)))
        return step(llm)

    monkeypatch.setattr(LLM, "step", losing)
    grpo(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["failed_rewards"] for row in rows] == [1 / 16, 0.0]
    assert "step 1: the engine lost its sample 1 times; such samples count 0" in capsys.readouterr().out


def test_a_tokenizer_of_another_model_is_told_before_the_run(tmp_path):
    config = grpo_config(tmp_path)
    narrow = replace(finback.load(config.model).config, vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    prompts = read_prompts(config.data, load_tokenizer(config.model), config.template, longest=100)
    check_vocabulary(prompts, 10_000)
    with pytest.raises(
        InputError, match=r"prompts\.jsonl, line \d+: the prompt has token \d+, outside of the model's vocabulary \(64\)"
    ):
        check_vocabulary(prompts, narrow.vocab_size)
    finback.save(Transformer(narrow, dtype=torch.float32), tmp_path / "narrow")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(config.model) / name, tmp_path / "narrow" / name)
    with pytest.raises(InputError, match="outside of the model's vocabulary"):
        grpo(replace(config, model=str(tmp_path / "narrow")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_gap_is_watched_where_nothing_teaches(tmp_path):
    config = grpo_config(tmp_path, beta=0.0, reward="never")
    grpo(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["zero_variance"] for row in rows] == [1.0] * len(rows)
    assert all(row["logprob_gap"] < 1e-5 for row in rows)
    apart = replace(config, precision="bf16", max_logprob_gap=1e-9)
    with pytest.raises(InputError, match=r"step 1: .*differ by .* max_logprob_gap"):
        grpo(apart, tmp_path / "apart")


def test_a_gap_above_the_limit_stops_the_run_and_says_why(tmp_path):
    config = grpo_config(tmp_path, precision="bf16", max_logprob_gap=1e-9)
    with pytest.raises(InputError, match=r"step 1: .*differ by .* max_logprob_gap"):
        grpo(config, tmp_path / "run")


def test_rewards_that_are_always_zero_are_told(tmp_path, capsys):
    before = _weights(grpo_config(tmp_path).model and tmp_path / "model")
    checkpoint = grpo(grpo_config(tmp_path, reward="never", steps=4), tmp_path / "run")
    assert "the reward has been 0 for every sample" in capsys.readouterr().out
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["zero_variance"] for row in rows] == [1.0] * 4
    after = _weights(checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)  # nothing to learn, nothing learnt


def test_log_probs_of_the_batch_are_those_of_the_model_alone(tmp_path):
    config = grpo_config(tmp_path)
    model = finback.load(config.model, dtype=torch.float32)
    tokenizer = load_tokenizer(config.model)
    prompts = read_prompts(config.data, tokenizer, config.template, longest=100)
    llm = LLM(model=model, tokenizer=tokenizer)
    completions = []
    for seed, prompt in enumerate(prompts[:5]):
        (out,) = llm.generate([prompt.token_ids], SamplingParams(max_tokens=2 + 3 * seed, seed=seed, logprobs=0, ignore_eos=True))
        log_probs = [entry.logprob for entry in out.logprobs]
        completions.append(Completion(prompt, out.token_ids, log_probs, out.text, out.finish_reason, Score(0.0, {}, {})))
    for batch in cut_batches(completions, [0.0] * 5, 60, 2, torch.device("cpu")):
        got, at_one, *_ = sample_log_probs(model, batch, temperature=0.7, precision="fp32")
        assert batch.num_tokens <= 60 or len(batch.completions) == 1
        for row, completion in enumerate(batch.completions):
            ids = torch.tensor([completion.prompt.token_ids + completion.token_ids])
            with torch.no_grad():
                logits = model(ids)[0, len(completion.prompt.token_ids) - 1 : -1]
            targets = torch.tensor(completion.token_ids).unsqueeze(1)
            length = len(completion.token_ids)
            for scale, values in ((0.7, got), (1.0, at_one)):
                expected = (logits / scale).log_softmax(-1).gather(1, targets).squeeze(1)
                torch.testing.assert_close(values[row, :length].detach(), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(batch.engine_log_probs[row, :length], at_one[row, :length], rtol=1e-4, atol=1e-5)
            assert not got[row, length:].any()


def read_only_prompt(length: int) -> Prompt:
    return Prompt("", list(range(length)), {})


def test_the_rows_of_a_run_hold_each_step_once_and_what_is_watched(tmp_path):
    config = grpo_config(tmp_path, steps=3, beta=0.01, minibatches=2, samples_per_step=2)
    grpo(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    watched = {"reward", "reward/vowels", "completion_length", "kl", "clip_fraction", "entropy", "zero_variance", "reflection",
               "logprob_gap", "rollout_tokens_per_second", "tokens_per_second", "failed_rewards", "truncated", "lr"}  # fmt: skip
    for row in rows:
        assert watched <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2, 3, 3]
    assert samples[0]["prompt"].startswith("Q: count")


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "it is not valid JSON"), ('{"answer": "3"}', "the row has no prompt"), ("[1]", "the row has no prompt")],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, words):
    config = grpo_config(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "count"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError, match=rf"prompts\.jsonl, line 2: {words}"):
        grpo(config, tmp_path / "run")


def test_malformed_rows_are_left_out_on_request_and_counted(tmp_path, capsys):
    config = grpo_config(tmp_path, steps=1, skip_malformed=True)
    bad = ["{", '{"answer": "3"}', "[1]", json.dumps({"prompt": "fish " * 200}), "7", "nothing"]
    good = [json.dumps({"prompt": f"count {i}"}) for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join([good[0], *bad, *good[1:]]) + "\n", encoding="utf-8")
    grpo(config, tmp_path / "run")
    told = capsys.readouterr().out
    assert "GRPO on 3 prompts" in told
    assert re.search(r"6 malformed rows of \S*prompts\.jsonl are left out:", told)
    assert re.search(r"prompts\.jsonl, line 2: it is not valid JSON", told)
    assert re.search(r"prompts\.jsonl, line 5: the prompt has \d+ tokens", told)
    assert "and 1 more" in told
    (tmp_path / "prompts.jsonl").write_text("\n".join(bad), encoding="utf-8")
    with pytest.raises(
        InputError, match=r"names no rows.*; 6 rows are malformed, the first one: .*prompts\.jsonl, line 1: it is not"
    ):
        grpo(config, tmp_path / "other")


def test_references_are_kept_as_long_as_a_kept_checkpoint_needs_them(tmp_path):
    config = grpo_config(tmp_path, steps=9, beta=0.05, reference_steps=2, save_every=3, keep_checkpoints=2)
    whole = grpo(config, tmp_path / "run")
    # Checkpoints 6 and 9 are there: 6 goes on with the reference of step 6, 9 with that of step 8.
    assert sorted(path.name for path in (tmp_path / "run" / "references").iterdir()) == ["step-6", "step-8"]
    before, rows = _weights(whole), _rows(tmp_path / "run")
    (whole / "model.safetensors").write_bytes(b"damaged")
    resumed = _weights(grpo(config, tmp_path / "run", resume=True))  # from step 6 on
    assert all(torch.equal(before[name], resumed[name]) for name in before)
    assert _rows(tmp_path / "run") == rows


def test_a_prompt_has_the_tokens_that_the_engine_gives_it(tmp_path):
    """Also where a tokenizer has a begin token that it does not put before a text, as Qwen's and SmolLM2's do."""
    config = grpo_config(tmp_path)
    model, tokenizer = finback.load(config.model, dtype=torch.float32), load_tokenizer(config.model)
    for adds in (True, False):
        tokenizer.add_bos_token = adds
        llm = LLM(model=model, tokenizer=tokenizer)
        for prompt in read_prompts(config.data, tokenizer, config.template, longest=100)[:2]:
            (out,) = llm.generate([prompt.text], SamplingParams(max_tokens=1))
            assert prompt.token_ids == out.prompt_token_ids
            assert (prompt.token_ids[0] == tokenizer.bos_token_id) == adds


def test_each_prompt_comes_once_an_epoch_and_orders_differ():
    stream = PromptStream(3)
    stream.prompts = [read_only_prompt(length) for length in range(1, 8)]
    first, second = ([stream.next_batch(1)[0] for _ in range(7)] for _ in range(2))
    assert sorted(len(p.token_ids) for p in first) == sorted(len(p.token_ids) for p in second) == list(range(1, 8))
    assert first != second
    again = PromptStream(3)
    again.prompts = stream.prompts
    again.load_state_dict({"taken": 5})
    assert again.next_batch(4) == [*first[5:], *second[:2]]


def test_minibatches_cut_a_rollout_into_random_parts():
    config = GRPOConfig(model="", minibatches=4)
    parts = minibatch_order(config, 18, step=2)
    assert sorted(i for part in parts for i in part) == list(range(18))
    assert {len(part) for part in parts} == {4, 5}
    assert parts != minibatch_order(config, 18, step=3)
    assert parts == minibatch_order(config, 18, step=2)


def test_the_learning_rate_by_hand():
    config = GRPOConfig(model="", lr=1.0, final_lr=0.1, steps=10, warmup_steps=4, minibatches=2)
    assert learning_rate(config, 1, 0) == 0.25
    assert learning_rate(config, 1, 1) == 0.5
    assert learning_rate(config, 4, 0) == pytest.approx(0.7)
    assert learning_rate(config, 10, 1) == pytest.approx(0.1)
    assert learning_rate(replace(config, final_lr=None), 10, 1) == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": ()}, "field reward is empty"),
        ({"data": ()}, "field data is empty"),
        ({"data": ("/nowhere/prompts.jsonl",)}, r"prompts\.jsonl does not exist"),
        ({"max_completion_length": 127}, "the prompt has"),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_is_written(tmp_path, changes, words):
    config = replace(grpo_config(tmp_path), **changes)
    with pytest.raises(InputError, match=words):
        grpo(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_and_not_resumed_with_other_fields(tmp_path):
    config = grpo_config(tmp_path, steps=1)
    grpo(config, tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        grpo(config, tmp_path / "run")
    with pytest.raises(InputError, match=r"field lr is 0\.5"):
        grpo(replace(config, lr=0.5), tmp_path / "run", resume=True)


def test_a_second_process_leaves_what_the_first_is_writing(tmp_path):
    config = grpo_config(tmp_path, steps=1)
    grpo(config, tmp_path / "run")
    written = tmp_path / "run" / "checkpoints" / ".step-2.abc"
    written.mkdir()
    with locked(tmp_path / "run"), pytest.raises(InputError, match="another process is training in"):
        grpo(config, tmp_path / "run", resume=True)
    assert written.is_dir()
    grpo(config, tmp_path / "run", resume=True)
    assert not written.exists()  # nobody writes it any more


@pytest.mark.parametrize("change", [lambda row: {**row, "prompt": "count 99 fish"}, lambda row: {**row, "answer": "zzz"}])
def test_a_run_is_not_resumed_with_other_prompts(tmp_path, change):
    config = grpo_config(tmp_path, steps=2, save_every=1, keep_checkpoints=0)
    grpo(config, tmp_path / "run")
    _remove(tmp_path / "run" / "checkpoints" / "step-2")
    file = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps(change(row) if i == 3 else row) + "\n" for i, row in enumerate(rows)), encoding="utf-8")
    with pytest.raises(InputError, match="the run was started with other prompts: rows of field data"):
        grpo(config, tmp_path / "run", resume=True)


def test_a_state_that_does_not_tell_its_prompts_is_continued():
    stream = PromptStream(3, [read_only_prompt(2)])
    assert PromptStream(3, [read_only_prompt(2)]).state_dict() == stream.state_dict()
    assert PromptStream(3, [read_only_prompt(3)]).state_dict() != stream.state_dict()
    stream.load_state_dict({"taken": 5, "seed": 3})
    assert stream.taken == 5


def test_a_reward_in_a_file_is_found_again_from_another_directory(tmp_path, monkeypatch):
    config = grpo_config(tmp_path, steps=2, save_every=1, keep_checkpoints=0)
    monkeypatch.chdir(tmp_path)
    grpo(replace(config, reward=("rewards_of_the_test.py:vowels:0.5",)), tmp_path / "run")
    stored = tmp_path / "run" / "config.json"
    assert json.loads(stored.read_text())["reward"] == [f"{tmp_path / 'rewards_of_the_test.py'}:vowels:0.5"]
    _remove(tmp_path / "run" / "checkpoints" / "step-2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    grpo(read_run_config(tmp_path / "run", GRPOConfig), tmp_path / "run", resume=True)
    monkeypatch.chdir(tmp_path)  # a run that was started when configs held the words as they were given
    stored.write_text(stored.read_text().replace(f"{tmp_path / 'rewards_of_the_test.py'}", "rewards_of_the_test.py"))
    assert grpo(read_run_config(tmp_path / "run", GRPOConfig), tmp_path / "run", resume=True).name == "step-2"


def test_a_reward_that_fails_is_told_once_with_its_sentence(tmp_path, capsys):
    config = grpo_config(tmp_path, steps=3)
    both = (*config.reward, config.reward[0].replace("vowels", "fails"))
    grpo(replace(config, reward=both), tmp_path / "run")
    told = " ".join(capsys.readouterr().out.split())
    sentence = (
        "step 1: the reward fails failed on 16 of 16 samples, where it counts 0; most often it raised ValueError: no such field, "
        f"first on {tmp_path / 'prompts.jsonl'}, line "
    )
    assert told.count(sentence) == told.count("the reward fails failed") == 1
    assert "the reward vowels failed" not in told
    write_report(tmp_path / "run")
    table = (tmp_path / "run" / "report.md").read_text()
    assert "| share of samples on which a reward failed | 100.0% | 100.0% |" in table
