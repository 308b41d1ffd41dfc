"""Rows become samples whose masked tokens are exactly what the model would write, end token included; bad rows are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finback.config import InputError
from finback.data.chat import published_template
from finback.data.conversations import (
    completion_sample,
    conversation_samples,
    load_samples,
    samples_fingerprint,
    split_thought,
    with_chat_template,
)
from finback.data.packing import Sample
from finback.data.tokenizer import Tokenizer
from tests.tokenizer_samples import family_tokenizer

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pieces(tokenizer: Tokenizer, *parts: tuple[str, bool]) -> Sample:
    """A sample put together by hand: each text encoded on its own, learnt or not."""
    ids, mask = [], []
    for text, learnt in parts:
        own = tokenizer.encode(text)
        ids += own
        mask += [learnt] * len(own)
    return Sample(ids, mask)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def v3(tokenizer: Tokenizer) -> Tokenizer:
    return with_chat_template(tokenizer, "deepseek_v3")


def test_every_assistant_turn_is_learnt_once_and_nothing_else(v3: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        user("2 + 2?"),
        assistant("4"),
        user("And 3 + 3?"),
        assistant("It is 6."),
        user("Thanks"),
    ]
    expected = pieces(
        v3,
        (f"{BOS}Be short.{USER}2 + 2?{ASSISTANT}", False),
        (f"4{EOS}", True),
        (f"{USER}And 3 + 3?{ASSISTANT}", False),
        (f"It is 6.{EOS}", True),
    )
    assert conversation_samples(messages, v3) == [expected]
    assert expected.ids[0] == v3.bos_token_id
    assert expected.ids[-1] == v3.eos_token_id


def chatml_sample(tokenizer: Tokenizer, *turns: tuple[str, str], learnt: int) -> Sample:
    """Pieces of a ChatML conversation whose last `learnt` answers are learnt; the newline behind an end is the template's."""
    start, parts = "", list[tuple[str, bool]]()
    for number, (question, answer) in enumerate(turns):
        start += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        if number >= len(turns) - learnt:
            parts += [(start, False), (f"{answer}<|im_end|>", True)]
            start = "\n"
        else:
            start += f"{answer}<|im_end|>\n"
    return pieces(tokenizer, *parts)


def test_turns_share_a_sample_where_their_tokens_are_those_of_inference() -> None:
    chatml = family_tokenizer("qwen2", chat_template=CHATML)
    turns = (("x", "yes"), ("y", "no"))
    messages = [user("x"), assistant("yes"), user("y"), assistant("no")]
    assert conversation_samples(messages, chatml) == [chatml_sample(chatml, *turns, learnt=2)]
    # Written behind the prompt's newline, these newlines stand apart; read again as history, all three are one token.
    turns = (("x", "\n\nyes"), ("y", "no"))
    messages[1] = assistant("\n\nyes")
    samples = conversation_samples(messages, chatml)
    assert samples == [chatml_sample(chatml, turns[0], learnt=1), chatml_sample(chatml, *turns, learnt=1)]
    assert samples[1].ids[: len(samples[0].ids)] != samples[0].ids


@pytest.mark.parametrize("form", ["reasoning_content", "content"])
def test_r1_thoughts_are_learnt_behind_the_prompt_that_opens_them(tokenizer: Tokenizer, form: str) -> None:
    turns = {
        "content": assistant("<think>\nTwo and two.\n</think>\n\n4"),
        "reasoning_content": assistant("4", reasoning_content="Two and two."),
    }
    samples = conversation_samples([user("2 + 2?"), turns[form]], tokenizer)
    prompt = f"{BOS}{USER}2 + 2?{ASSISTANT}<think>\n"
    assert samples == [pieces(tokenizer, (prompt, False), (f"Two and two.\n</think>\n\n4{EOS}", True))]
    assert tokenizer.encode(prompt) == list(samples[0].ids[: len(tokenizer.encode(prompt))])


def test_r1_history_without_thoughts_makes_a_sample_of_each_turn(tokenizer: Tokenizer) -> None:
    messages = [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("d", reasoning_content="so")]
    assert conversation_samples(messages, tokenizer) == [
        pieces(tokenizer, (f"{BOS}{USER}a{ASSISTANT}<think>\n", False), (f"hm\n</think>\n\nb{EOS}", True)),
        # The answer of a turn whose thought is dropped keeps the newlines behind </think>: so the published template has it.
        pieces(
            tokenizer,
            (f"{BOS}{USER}a{ASSISTANT}\n\nb{EOS}{USER}c{ASSISTANT}<think>\n", False),
            (f"so\n</think>\n\nd{EOS}", True),
        ),
    ]


def test_r1_without_a_thought_learns_to_close_it_at_once(tokenizer: Tokenizer) -> None:
    (sample,) = conversation_samples([user("a"), assistant("b")], tokenizer)
    assert sample == pieces(tokenizer, (f"{BOS}{USER}a{ASSISTANT}<think>\n", False), (f"\n</think>\n\nb{EOS}", True))


def test_v3_keeps_a_thought_in_the_turn(v3: Tokenizer) -> None:
    whole = "<think>\nhm\n</think>\n\nb"
    expected = [pieces(v3, (f"{BOS}{USER}a{ASSISTANT}", False), (whole + EOS, True))]
    assert conversation_samples([user("a"), assistant(whole)], v3) == expected
    assert conversation_samples([user("a"), assistant("b", reasoning_content="hm")], v3) == expected
    # A thought that happens to be the answer is not taken for kept.
    same = [pieces(v3, (f"{BOS}{USER}a{ASSISTANT}", False), (f"<think>\n4\n</think>\n\n4{EOS}", True))]
    assert conversation_samples([user("a"), assistant("4", reasoning_content="4")], v3) == same


def test_r1_tool_calls_are_learnt_and_tool_outputs_are_not(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [user("a"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "42"}, assistant("It is 42.")]
    first, second = conversation_samples(messages, tokenizer)
    learnt = [
        tokenizer.decode([token for token, mask in zip(each.ids, each.loss_mask, strict=True) if mask])
        for each in (first, second)
    ]
    assert learnt[0].startswith("\n</think>\n\n<｜tool▁calls▁begin｜>")
    assert learnt[0].endswith(f"<｜tool▁calls▁end｜>{EOS}")
    assert learnt[1] == f"It is 42.{EOS}"
    assert not any("42" in text for text in learnt[:1])


def test_prompt_and_completion_are_taken_as_they_are(tokenizer: Tokenizer) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt, completion = tokenizer.encode("2 + 2 ="), tokenizer.encode(" 4")
    expected = Sample([bos, *prompt, *completion, eos], [False] * (1 + len(prompt)) + [True] * (len(completion) + 1))
    assert completion_sample("2 + 2 =", " 4", tokenizer) == expected
    assert completion_sample(BOS + "2 + 2 =", " 4" + EOS, tokenizer) == expected  # nothing is doubled
    no_bos = family_tokenizer("qwen2")
    assert completion_sample("a", "b", no_bos).ids == [*no_bos.encode("a"), *no_bos.encode("b"), no_bos.eos_token_id]


@pytest.mark.parametrize(
    ("turn", "parts"),
    [
        (assistant("b"), (None, "b")),
        (assistant("<think>\nhm\n</think>\n\nb"), ("hm", "b")),
        (assistant("<think></think>b"), ("", "b")),
        (assistant("<think>\nnever closed"), (None, "<think>\nnever closed")),
        (assistant("see <think> x </think>"), (None, "see <think> x </think>")),
        (assistant("b", reasoning_content="\nhm\n"), ("hm", "b")),
        (assistant(None, tool_calls=[1]), (None, "")),
    ],
)
def test_thought_and_answer(turn: dict[str, Any], parts: tuple[str | None, str]) -> None:
    assert split_thought(turn) == parts


# Files

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def lines(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return path

    return lines


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": ', r"it is not valid JSON"),
        ("[" * 100_000, r"it is not valid JSON"),
        ([1], "it holds a JSON list where an object is expected"),
        ({"text": "a"}, "it has neither messages nor prompt and completion"),
        ({"prompt": "a"}, "it has neither messages nor prompt and completion"),
        ({"prompt": "a", "completion": ""}, "its completion is empty"),
        ({"prompt": 1, "completion": "b"}, "its prompt is a int, it must be text"),
        ({"prompt": "a", "completion": "\ud800"}, "its completion holds half of a surrogate pair"),
        ({"messages": []}, "its messages must be a list of at least one message"),
        ({"messages": "hi"}, "its messages must be a list of at least one message"),
        ({"messages": ["hi"]}, "message 1 is a str, it must have a role and a content"),
        ({"messages": [{"content": "a"}]}, "its role of message 1 is missing, it must be text"),
        ({"messages": [user("a"), {"role": "assistant"}]}, "its content of message 2 is missing, it must be text"),
        ({"messages": [user("a")]}, "it has no assistant turn to learn"),
        ({"messages": [user("a"), assistant("b", reasoning_content=3)]}, "its reasoning_content of message 2 is a int"),
        (
            {"prompt": "a " * 60, "completion": "b"},
            r"tokens, more than sequence_length \(40\); raise that or cut with --truncate",
        ),
    ],
)
def test_a_malformed_row_is_named_or_left_out(write: Write, tokenizer: Tokenizer, row: Any, words: str) -> None:
    path = write(GOOD, "", row, GOOD)
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 3: .*{words}") as caught:
        load_samples([path], tokenizer, sequence_length=40)
    assert "--skip-malformed" in str(caught.value)
    loaded = load_samples([path], tokenizer, sequence_length=40, skip_malformed=True)
    assert loaded.samples == [completion_sample("a", "b", tokenizer)] * 2
    assert len(loaded.skipped) == 1
    assert "line 3" in loaded.skipped[0]


def test_long_samples_are_cut_only_if_something_is_left_to_learn(write: Write, tokenizer: Tokenizer) -> None:
    path = write({"prompt": "a", "completion": "b " * 60})
    (sample,) = load_samples([path], tokenizer, sequence_length=40, truncate=True).samples
    assert list(sample.ids) == list(completion_sample("a", "b " * 60, tokenizer).ids[:40])
    path = write({"prompt": "a " * 60, "completion": "b"})
    with pytest.raises(InputError, match=r"line 1: its prompt alone fills sequence_length \(40\)"):
        load_samples([path], tokenizer, sequence_length=40, truncate=True)
    with pytest.raises(InputError, match=r"give no sample to train on; 1 rows were left out, the first one"):
        load_samples([path], tokenizer, sequence_length=40, truncate=True, skip_malformed=True)


def test_files_that_are_none(write: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "a.parquet").write_text("nothing")
    for name, words in (
        ("no.jsonl", "does not exist; give"),
        ("a.csv", r"has suffix '\.csv'"),
        ("empty.jsonl", "give no sample"),
        ("a.parquet", "is not a Parquet file"),
    ):
        with pytest.raises(InputError, match=words):
            load_samples([tmp_path / name], tokenizer, sequence_length=40)


def test_parquet_holds_the_same_rows(write: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [user("a"), assistant("b", reasoning_content="hm")]},
        {"messages": [user("c"), assistant("d")]},
        {"prompt": "a", "completion": "b"},
    ]
    filled = [{"messages": None, "prompt": None, "completion": None} | row for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(filled), tmp_path / "rows.parquet")
    theirs = load_samples([write(*rows)], tokenizer, sequence_length=60)
    assert load_samples([tmp_path / "rows.parquet"], tokenizer, sequence_length=60) == theirs
    broken = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}]
    parquet.write_table(pyarrow.Table.from_pylist(broken), tmp_path / "broken.parquet")
    with pytest.raises(InputError, match=r"broken\.parquet, row 1: it has neither"):
        load_samples([tmp_path / "broken.parquet"], tokenizer, sequence_length=60)


def test_a_base_without_a_template_is_told_and_can_be_given_one(write: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    base = Tokenizer(tokenizer.backend, tokenizer.config)
    path = write({"messages": [user("a"), assistant("b")]})
    with pytest.raises(InputError, match="has no chat template"):
        load_samples([path], base, sequence_length=40)
    (tmp_path / "own.jinja").write_text(published_template("deepseek_r1"))
    for name in ("deepseek_r1", str(tmp_path / "own.jinja")):
        given = with_chat_template(base, name)
        assert load_samples([path], given, sequence_length=40) == load_samples([path], tokenizer, sequence_length=40)
    with pytest.raises(InputError, match="neither a text file nor a published one; give a file, deepseek_r1 or deepseek_v3"):
        with_chat_template(base, "deepseek_r2")


def test_templates_that_cannot_teach_are_told(tokenizer: Tokenizer) -> None:
    endless = Tokenizer(tokenizer.backend, tokenizer.config, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(InputError, match="does not end an assistant turn with the tokenizer's end-of-sentence token"):
        conversation_samples([user("a"), assistant("b")], endless)
    elsewhere = Tokenizer(
        tokenizer.backend,
        tokenizer.config,
        "{% if add_generation_prompt %}Answer:{% else %}{{ messages[-1].content }}{% endif %}",
    )
    with pytest.raises(InputError, match="otherwise than behind its own generation prompt"):
        conversation_samples([user("a"), assistant("b")], elsewhere)


def test_the_fingerprint_sees_ids_masks_and_borders() -> None:
    one = [Sample([1, 2], [False, True]), Sample([3], [True])]
    others = [
        [Sample([1, 2], [False, False]), Sample([3], [True])],
        [Sample([1], [False]), Sample([2, 3], [True, True])],
        [Sample([1, 4], [False, True]), Sample([3], [True])],
        one[::-1],
    ]
    assert len({samples_fingerprint(each) for each in (one, *others)}) == 5
