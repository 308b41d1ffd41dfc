"""Rated rows become the texts that a reward model reads, and the held-out ones are balanced by length."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.config import InputError
from finback.data.conversations import with_chat_template
from finback.data.rated import Rated, balanced_split, final_answer, load_rated, rated_fingerprint, rated_ids, rated_row
from finback.data.tokenizer import Tokenizer

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"


def test_pairs_compare_final_answers_and_labels_judge_the_whole(tokenizer: Tokenizer) -> None:
    whole = "hm\n</think>\n\n4"
    for completion in (whole, "<think>\n" + whole, "4"):
        ids, response = rated_ids("2 + 2?", completion, tokenizer, "pairwise")
        assert ids == tokenizer.encode(f"{BOS}{USER}2 + 2?{ASSISTANT}") + response
        assert response == tokenizer.encode(f"4{EOS}")
    for completion in (whole, "<think>\n" + whole):
        ids, response = rated_ids("2 + 2?", completion, tokenizer, "pointwise")
        assert ids == tokenizer.encode(f"{BOS}{USER}2 + 2?{ASSISTANT}<think>\n") + response
        assert response == tokenizer.encode(whole + EOS)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}]
    v3 = with_chat_template(tokenizer, "deepseek_v3")
    assert rated_ids(messages, "b", v3, "pairwise")[0] == v3.encode(f"{BOS}Be kind.{USER}a{ASSISTANT}") + v3.encode("b" + EOS)
    bare = Tokenizer(tokenizer.backend, tokenizer.config)
    assert rated_ids("a", "b", bare, "pairwise")[0] == [*bare.encode("a", add_bos=True), *bare.encode("b"), bare.eos_token_id]
    with pytest.raises(InputError, match="no chat template"):
        rated_ids(messages, "b", bare, "pairwise")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("a", "a"),
        ("<think>x</think>\n\na", "a"),
        ("x\n</think>a", "a"),
        ("<think>never closed", ""),
        ("a <think> b", "a <think> b"),
    ],
)
def test_final_answers(completion: str, answer: str) -> None:
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("pairwise", {"prompt": "a", "chosen": "b"}, "an object with prompt, chosen and rejected"),
        ("pairwise", [1], "an object with prompt"),
        ("pairwise", {"prompt": "a", "chosen": "b", "rejected": 3}, "its rejected is a int, it must be text"),
        ("pairwise", {"prompt": 1, "chosen": "b", "rejected": "c"}, "its prompt is a int"),
        ("pairwise", {"prompt": [], "chosen": "b", "rejected": "c"}, "at least one message"),
        ("pointwise", {"prompt": "a", "completion": "b"}, "its label is None, it must be 1"),
        ("pointwise", {"prompt": "a", "completion": "b", "label": "perhaps"}, "its label is 'perhaps'"),
        ("pointwise", {"prompt": "a", "completion": "b " * 90, "label": 1}, "more than sequence_length"),
    ],
)
def test_a_malformed_row_is_named_or_left_out(tmp_path: Path, tokenizer: Tokenizer, kind: Any, row: Any, words: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b", "label": 0}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(each) for each in (good, row, good)))
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 2: .*{words}"):
        load_rated([tmp_path / "rows.jsonl"], tokenizer, kind, sequence_length=60)
    rated, skipped = load_rated([tmp_path / "rows.jsonl"], tokenizer, kind, sequence_length=60, skip_malformed=True)
    assert rated == [rated_row(good, tokenizer, kind)] * 2
    assert len(skipped) == 1
    assert [one.good for one in rated] == [kind == "pairwise"] * 2


def pair(better: int, worse: int) -> Rated:
    return Rated(((0,) * (better + 1), (0,) * (worse + 1)), ((0,) * better, (0,) * worse), True)


def label(length: int, good: bool) -> Rated:
    return Rated(((0,) * (length + 1),), ((0,) * length,), good)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=4, max_size=60), st.integers(0, 9))
def test_held_out_pairs_are_longer_as_often_as_shorter(lengths: list[tuple[int, int]], seed: int) -> None:
    rated = [pair(*each) for each in lengths]
    longer, shorter = (sum((a - b) * sign > 0 for a, b in lengths) for sign in (1, -1))
    if not min(longer, shorter) or len(lengths) == 2:
        with pytest.raises(InputError, match="no held-out rows can be balanced by length; add pairs"):
            balanced_split(rated, 0.2, seed)
        return
    training, held_out = balanced_split(rated, 0.2, seed)
    signs = [len(one.responses[0]) - len(one.responses[1]) for one in held_out]
    assert sum(sign > 0 for sign in signs) == sum(sign < 0 for sign in signs) == len(held_out) / 2 > 0
    assert sorted(map(repr, training + held_out)) == sorted(map(repr, rated))
    assert len(held_out) <= max(2, round(0.2 * len(rated)) + 1)


@given(st.lists(st.integers(1, 30), min_size=15, max_size=40), st.integers(0, 9))
def test_held_out_labels_are_half_good_and_of_like_length(lengths: list[int], seed: int) -> None:
    rated = [label(length, good) for length in lengths for good in (True, False)]
    training, held_out = balanced_split(rated, 0.2, seed)
    assert sum(one.good for one in held_out) * 2 == len(held_out) > 0
    assert sorted(map(repr, training + held_out)) == sorted(map(repr, rated))
    assert len(held_out) <= round(0.2 * len(rated)) + 2


def test_labels_that_length_tells_cannot_be_balanced() -> None:
    with pytest.raises(InputError, match="add good and bad responses of like length"):
        balanced_split([label(length, length > 8) for length in range(1, 17)], 0.2, 0)


def test_two_pairs_are_too_few() -> None:
    with pytest.raises(InputError, match="2 rows are too few"):
        balanced_split([pair(1, 2), pair(2, 1)], 0.5, 0)


def test_the_fingerprint_sees_texts_and_labels() -> None:
    each = ([label(3, True)], [label(3, False)], [label(4, True)], [pair(3, 2)], [pair(2, 3)], [])
    assert len({rated_fingerprint(rated) for rated in each}) == 6
