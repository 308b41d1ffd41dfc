"""Rearrangements of training text that must not change it: fill-in-the-middle and boundary splits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.data.boundary import boundary_table, split_boundaries
from finback.data.fim import fim_document, reassemble
from finback.data.sources import Document
from finback.data.tokenizer import FIM_BEGIN_TOKEN, FIM_END_TOKEN, FIM_HOLE_TOKEN, Tokenizer

TEXTS = st.text(st.characters(codec="utf-8"), max_size=80)


@given(TEXTS, st.integers(0, 10**9), st.integers(0, 10**9), st.floats(0, 1))
def test_fim_can_be_put_together_again(text: str, seed: int, index: int, rate: float) -> None:
    moved = fim_document(text, seed=seed, index=index, rate=rate)
    assert reassemble(moved) == text
    assert moved == fim_document(text, seed=seed, index=index, rate=rate)
    if rate == 0:
        assert moved == text


@given(TEXTS, st.integers(0, 99))
def test_fim_order_is_prefix_suffix_middle(text: str, seed: int) -> None:
    moved = fim_document(text, seed=seed, index=0, rate=1)
    places = [moved.index(token) for token in (FIM_BEGIN_TOKEN, FIM_HOLE_TOKEN, FIM_END_TOKEN)]
    assert places == sorted(places)
    assert places[0] == 0
    prefix, suffix = moved[len(FIM_BEGIN_TOKEN) : places[1]], moved[places[1] + len(FIM_HOLE_TOKEN) : places[2]]
    assert text.startswith(prefix)
    assert text.endswith(suffix)
    assert len(moved) == len(text) + sum(map(len, (FIM_BEGIN_TOKEN, FIM_HOLE_TOKEN, FIM_END_TOKEN)))


def test_fim_rate_and_cuts() -> None:
    moved = [fim_document("abcdefghij", seed=3, index=index, rate=0.1) for index in range(5000)]
    share = sum(text != "abcdefghij" for text in moved) / 5000
    assert 0.08 < share < 0.12
    cuts = {text for text in moved if text != "abcdefghij"}
    assert len(cuts) > 40  # of 66 possible pairs of cuts


def test_fim_leaves_a_text_that_holds_its_tokens() -> None:
    text = f"about {FIM_HOLE_TOKEN} itself"
    assert fim_document(text, seed=0, index=0, rate=1) == text


@given(
    st.lists(st.sampled_from(["end.\n", "so!\n\n", "(x)\n", "葡萄。\n", "a b", "\n\n", ";\r\n", "1 ", ".\n<think>"])),
    st.floats(0, 1),
)
def test_boundary_splits_keep_the_text(tokenizer: Tokenizer, parts: list[str], rate: float) -> None:
    ids = tokenizer.encode("".join(parts))
    table = boundary_table(tokenizer)
    split = split_boundaries(ids, table, seed=1, index=2, rate=rate)
    assert tokenizer.decode(split) == "".join(parts)
    assert split == split_boundaries(ids, table, seed=1, index=2, rate=rate)
    if rate == 0:
        assert split == ids


def test_boundary_table(tokenizer: Tokenizer, documents: list[Document]) -> None:
    table = boundary_table(tokenizer)
    joined = {tokenizer.token_bytes(token_id).decode() for token_id in table}
    assert {".\n", ".\n\n", "!\n"} & joined  # the training text is full of them
    for token_id, parts in table.items():
        whole = tokenizer.token_bytes(token_id)
        assert b"".join(map(tokenizer.token_bytes, parts)) == whole
        assert len(parts) >= 2
        assert whole.rstrip(b"\r\n") != whole
        assert whole.strip()
    text = "".join(document.text for document in documents)
    ids = tokenizer.encode(text)
    assert not set(table) & set(split_boundaries(ids, table, seed=0, index=0, rate=1))
    count = sum(token_id in table for token_id in ids)
    split = split_boundaries(ids, table, seed=0, index=0, rate=0.5)
    assert sum(token_id in table for token_id in split) == pytest.approx(count / 2, rel=0.2)
