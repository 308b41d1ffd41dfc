"""Reward models: the loss by hand, that order is learnt where words and length tell nothing, and what is written and scored."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.cli import main
from finback.config import InputError
from finback.data.rated import Rated
from finback.model.checkpoint import load, save
from finback.model.reward_head import RewardHead, load_reward_head, save_reward_head, score_rows
from finback.model.transformer import Transformer, init_weights
from finback.train.checkpoint import list_checkpoints
from finback.train.reward_baselines import accuracy, length_baseline, logistic_regression, word_baseline
from finback.train.reward_model import accumulate_reward_gradients, read_reward_run, reward_loss, train_reward_model
from finback.train.reward_model_config import RewardModelConfig
from finback.train.reward_scoring import load_reward_model, score_texts
from tests.train.runs import micro_dense, micro_model, read_rows
from tests.train.test_resume import begun

FILLERS = ("the", "whale", "swims", "cold", "water")


def ordered_pairs(count: int = 120) -> list[dict[str, str]]:
    """The better answer ends with north before south; both have the same words, and either may be longer by a filler."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        start = [draw.choice(FILLERS) for _ in range(draw.randint(1, 3))]
        extra = [draw.choice(start)]
        chosen, rejected = ([*start, *pair] for pair in (("north", "south"), ("south", "north")))
        chosen, rejected = (extra + chosen, rejected) if number % 2 else (chosen, extra + rejected)
        rows.append({"prompt": "where?", "chosen": " ".join(chosen), "rejected": " ".join(rejected)})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, micro_data: Path) -> Path:
    """`base`, `pairs.jsonl` and `labels.jsonl`."""
    folder = tmp_path_factory.mktemp("reward")
    model = Transformer(micro_model(num_nextn_predict_layers=1), dtype=torch.float32)
    init_weights(model, seed=3)
    save(model, folder / "base", tokenizer_from=micro_data / "tokenizer")
    pairs = ordered_pairs()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    labels = [
        {"prompt": row["prompt"], "completion": row[name], "label": int(name == "chosen")}
        for row in pairs
        for name in ("chosen", "rejected")
    ]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return folder


def make_config(folder: Path, **changes: Any) -> RewardModelConfig:
    config = RewardModelConfig(
        data=(str(folder / "pairs.jsonl"),),
        held_out_fraction=0.2,
        epochs=12,
        sequence_length=48,
        global_batch_size=24,
        micro_batch_size=64,
        lr=5e-3,
        precision="fp32",
        device="cpu",
        threads=1,
        save_every=None,
        keep_checkpoints=0,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A run on pairs, with checkpoints on the way."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train_reward_model(folder / "base", make_config(folder, save_every=10), run)
    return run


def test_the_order_of_words_is_learnt_where_the_baselines_cannot(trained: Path) -> None:
    last = read_rows(trained)[-1]
    assert last["accuracy"] >= 0.9
    assert last["length_accuracy"] <= 0.6
    assert last["word_accuracy"] <= 0.7
    report = (trained / "report.md").read_text()
    assert f"reward model {last['accuracy']:.1%}, length alone {last['length_accuracy']:.1%}, bag of words" in report
    assert f"finback reward-model --resume {trained}" in report


def test_it_is_saved_as_a_model_with_a_head_and_scores(trained: Path, folder: Path) -> None:
    checkpoint = list_checkpoints(trained)[0]
    trunk, base = load(checkpoint), load(folder / "base")
    assert not hasattr(trunk, "reward_head")
    assert torch.equal(trunk.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(trunk.model.norm.weight, base.model.norm.weight)
    rewards = load_reward_model(checkpoint)
    answers = ["the whale north south", "the whale south north", "north south"]
    scores = rewards.score(["where?"] * 3, answers)
    assert scores[0] > scores[1]
    alone = [rewards.score(["where?"], [answer])[0] for answer in answers]
    assert scores == pytest.approx(alone, rel=1e-4, abs=1e-5)  # company and padding change nothing
    thought = rewards.score(["where?"], ["south north, I think.\n</think>\n\nthe whale north south"])
    assert thought == pytest.approx(scores[:1], rel=1e-5)  # pairs are judged by their final answer
    assert len(rewards.score(["where?"], ["north " * 400])) == 1  # longer than the context
    with pytest.raises(InputError, match="there are 1 prompts and 2 completions"):
        rewards.score(["where?"], ["a", "b"])
    with pytest.raises(InputError, match="holds no reward model"):
        load_reward_model(folder / "base")


def test_it_resumes_bitwise(tmp_path: Path, trained: Path) -> None:
    step = int(list_checkpoints(trained)[-1].name.removeprefix("step-"))
    run = begun(tmp_path / "run", trained, step=step)
    base, config = read_reward_run(run)
    train_reward_model(base, config, run, resume=True)
    assert read_rows(run) == read_rows(trained)
    ours, theirs = list_checkpoints(run)[0], list_checkpoints(trained)[0]
    for name in ("model.safetensors", "reward_head.safetensors", "trainer.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_labels_are_learnt_too(tmp_path: Path, folder: Path) -> None:
    config = make_config(folder, kind="pointwise", data=(str(folder / "labels.jsonl"),), epochs=20, global_batch_size=32)
    checkpoint = train_reward_model(folder / "base", config, tmp_path / "run")
    last = read_rows(tmp_path / "run")[-1]
    assert last["accuracy"] >= 0.85
    assert max(last["length_accuracy"], last["word_accuracy"]) <= 0.7
    rewards = load_reward_model(checkpoint)
    scores = rewards.score(["where?"] * 2, ["the whale north south", "the whale south north"])
    assert scores[0] > 0 > scores[1]


# Pieces


def rated(*texts: list[int], good: bool = True) -> Rated:
    return Rated(tuple(texts), tuple(text[1:] for text in texts), good)


def test_losses_by_hand() -> None:
    pairs = [rated([1, 2], [1, 3]), rated([1, 4], [1, 5])]
    scores = torch.tensor([1.0, 0.5, -1.0, 2.0])
    expected = math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(3.0))
    assert reward_loss(scores, pairs).item() == pytest.approx(expected)
    labels = [rated([1, 2]), rated([1, 3], good=False)]
    expected = math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(0.5))
    assert reward_loss(scores[:2], labels).item() == pytest.approx(expected)


@pytest.mark.parametrize("dense", [False, True])
def test_a_score_is_the_head_over_the_last_token_whatever_the_padding(dense: bool) -> None:
    model = Transformer(micro_dense() if dense else micro_model(), dtype=torch.float32)
    init_weights(model, seed=0)
    head = RewardHead(32)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
        head.bias.fill_(0.3)
    texts = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
    expected = []
    with torch.no_grad():
        for text in texts:
            hidden = model.train_forward(torch.tensor([text])).hidden[0, -1]
            expected.append(float(hidden @ head.weight[0]) + 0.3)
    assert score_texts(model, head, texts) == pytest.approx(expected, rel=1e-4)


def test_the_cut_into_micro_batches_changes_nothing(folder: Path) -> None:
    model = Transformer(micro_model(), dtype=torch.float32)
    init_weights(model, seed=0)
    head = RewardHead(32)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
    batch = [rated(list(range(5, 8 + n)), list(range(9, 11 + 2 * n))) for n in range(6)]
    found = []
    for size in (1, 100):
        model.zero_grad()
        head.zero_grad()
        loss = accumulate_reward_gradients(model, head, batch, make_config(folder, micro_batch_size=size))
        found.append((loss, head.weight.grad, model.model.embed_tokens.weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_head_survives_its_file_and_fits_one_size(tmp_path: Path) -> None:
    head = RewardHead(8)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
        head.bias.fill_(-1.5)
    save_reward_head(head, tmp_path, {"kind": "pairwise"})
    again, config = load_reward_head(tmp_path, 8, torch.device("cpu"))
    assert config == {"kind": "pairwise"}
    assert torch.equal(again.weight, head.weight)
    assert torch.equal(again.bias, head.bias)
    with pytest.raises(InputError, match=r"has no weight of shape \(1, 16\): it is another model's"):
        load_reward_head(tmp_path, 16, torch.device("cpu"))


def test_the_rows_of_a_batch_do_not_see_each_other() -> None:
    model = Transformer(micro_model(), dtype=torch.float32)
    init_weights(model, seed=0)
    head = RewardHead(32)
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    with torch.no_grad():
        head.weight.fill_(1.0)
        both = score_rows(model, head, ids, torch.tensor([3, 2]))
        ids[1, 2] = 99  # padding
        assert torch.allclose(both, score_rows(model, head, ids, torch.tensor([3, 2])), atol=1e-5)


def test_logistic_regression_finds_the_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 3, generator=generator)
    labels = (features[:, 0] + 0.5 * torch.randn(40, generator=generator) > 0).float()
    weights = logistic_regression(features, labels)
    gradient = features.T @ (torch.sigmoid(features @ weights) - labels) + weights
    assert float(gradient.abs().max()) < 1e-3


def test_baselines_find_what_they_can() -> None:
    by_length = [rated([1] * 6, [1] * 3), rated([2] * 9, [2] * 4), rated([1] * 7, [2] * 5)]
    assert length_baseline(by_length, by_length) == 1.0
    by_word = [rated([0, 7, 5], [0, 8, 5]), rated([0, 7, 6], [0, 8, 6]), rated([0, 6, 7], [0, 6, 8])]
    assert word_baseline(by_word, by_word) == 1.0
    assert length_baseline(by_word, by_word) == 0.5
    labels = [rated([0, 7, 5]), rated([0, 8, 5], good=False), rated([0, 7, 6]), rated([0, 8, 6], good=False)]
    assert word_baseline(labels, labels) == 1.0
    assert accuracy(labels, lambda response: 1.0) == 0.5
    assert accuracy(by_word, lambda response: 0.0) == 0.5


# Mistakes


def test_mistakes_are_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    long = tmp_path / "longer.jsonl"
    long.write_text("".join(json.dumps({"prompt": "a", "chosen": "b b b", "rejected": "c"}) + "\n" for _ in range(9)))
    for words, told in (
        (f"{folder}/base --data {folder}/pairs.jsonl", "--out is missing"),
        (f"{folder}/base --out {out}", "--data is missing"),
        (f"{folder}/base --data {long} --out {out}", "no held-out rows can be balanced by length"),
        (f"{folder}/base --data {folder}/pairs.jsonl --kind pointwise --out {out}", "pairs.jsonl, line 1: it must be an object"),
        (f"{folder}/base --data {folder}/pairs.jsonl --kind both --out {out}", "invalid choice 'both'"),
        (f"{folder}/base --data {folder}/pairs.jsonl --held-out-fraction 0 --out {out}", "field held_out_fraction is 0.0"),
        (f"--resume {out}", "holds no run"),
    ):
        assert main(["reward-model", *words.split()]) == 2
        err = capsys.readouterr().err
        assert told in err
        assert len(err.strip().splitlines()) == 1
        assert not out.exists()


def test_the_verb(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{folder}/base --data {folder}/pairs.jsonl --out {tmp_path}/run --device cpu --threads 1 --global-batch-size 64"
    assert main(["reward-model", *words.split()]) == 0
    out = capsys.readouterr().out
    assert "held-out accuracy over 12 rows balanced by length: reward model" in out
    assert f"done: {tmp_path}/run/checkpoints/step-2" in out
    assert main(["reward-model", "--resume", f"{tmp_path}/run"]) == 0
