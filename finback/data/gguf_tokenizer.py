"""A tokenizer as GGUF metadata, which llama.cpp and Ollama read.

The file holds the vocabulary and the merges, but of the pre-tokenizer only a name: the regular expressions themselves are compiled
into llama.cpp. So the one in tokenizer.json is compared with those, step by step, and one that is not among them is an error: the same
name over other expressions would cut text in other places without a word.
"""

import json
from typing import Any, NamedTuple

from finback.config import InputError
from finback.data.tokenizer import PRE_TOKENIZER_PATTERNS, Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's token types: control tokens are no text, user-defined ones are recognised in text wherever they stand."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Step = tuple[Any, ...]


class PreTokenizer(NamedTuple):
    """What llama.cpp does under one name: the steps of the pre-tokenizer, and how merges are used."""

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole


def _split(pattern: str) -> Step:
    return ("Split", _escaped(pattern), "Isolated", False)


def _escaped(pattern: str) -> str:
    """Line ends are written as themselves in some files and as escapes in others, which means the same."""
    return pattern.replace("\r", "\\r").replace("\n", "\\n")


_BYTES: Step = ("ByteLevel", False, False)  # add_prefix_space, use_regex
_GPT2: Step = ("ByteLevel", False, True)

KNOWN = (
    PreTokenizer("deepseek-v3", (*map(_split, PRE_TOKENIZER_PATTERNS), _BYTES)),
    PreTokenizer("llama-bpe", (_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), _BYTES), ignore_merges=True),
    PreTokenizer("qwen2", (_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), _BYTES)),
    PreTokenizer("smollm", (("Digits", True), _GPT2)),
    PreTokenizer("gpt-2", (_GPT2,)),
)


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys; `vocab_size` is the model's, ids without a token are filled up.

    Raises InputError if llama.cpp has no pre-tokenizer that cuts text like this one, or no way to do another step of it.
    """
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"config field vocab_size is {vocab_size}, but the tokenizer has ids up to {tokenizer.vocab_size - 1}; "
            "take the tokenizer that belongs to the model"
        )
    content = json.loads(tokenizer.backend.to_str())
    tokens, types = [f"[PAD{token_id}]" for token_id in range(vocab_size)], [UNUSED] * vocab_size
    for token, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        tokens[token_id], types[token_id] = token, NORMAL
    for added in content["added_tokens"]:
        for flag in ("lstrip", "rstrip", "single_word"):
            if added[flag]:
                raise InputError(
                    f"token {added['content']!r} has {flag}, which llama.cpp does not do; clear it in tokenizer.json"
                )
        types[added["id"]] = CONTROL if added["special"] or _looks_like_control(added["content"]) else USER_DEFINED
    if not content["model"]["merges"]:
        raise InputError("the tokenizer has no merges, and llama.cpp reads none without; train one with a larger vocabulary")
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(content),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos_token,
        "tokenizer.ggml.add_eos_token": bool(tokenizer.config.get("add_eos_token", False)),
    }
    if tokenizer.bos_token_id is not None:
        metadata["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def pre_tokenizer_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json; InputError if it has none."""
    model = content["model"]
    steps = tuple(_steps(content["pre_tokenizer"]))
    ignore_merges = bool(model.get("ignore_merges", False))
    known = next((known for known in KNOWN if known.steps == steps), None)
    names = ", ".join(known.name for known in KNOWN)
    if known is None:
        raise InputError(
            f"the tokenizer cuts text by {_told(steps)}, which is none of llama.cpp's pre-tokenizers {names}; it cannot become GGUF"
        )
    if known.ignore_merges != ignore_merges:
        raise InputError(
            f"the tokenizer has ignore_merges {ignore_merges}, llama.cpp's pre-tokenizer {known.name} {known.ignore_merges}; "
            "it cannot become GGUF"
        )
    normalizers = list(_normalizers(content["normalizer"]))
    # Qwen's NFC is left out by every converter. Text that is not in that form (few files are not) gets other tokens.
    if normalizers and not (known.name == "qwen2" and normalizers == ["NFC"]):
        raise InputError(f"the tokenizer normalises text by {', '.join(normalizers)}, llama.cpp does not; it cannot become GGUF")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "unk_token", "dropout"):
        if model.get(name):
            raise InputError(
                f"the tokenizer's model has {name} {model[name]!r}, which llama.cpp does not know; it cannot become GGUF"
            )
    return known.name


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[Step]:
    """The pre-tokenizer with everything left out that does not change the tokens."""
    if pre_tokenizer is None:
        return []
    match pre_tokenizer["type"]:
        case "Sequence":
            return [step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner)]
        case "Split":
            ((_, text),) = pre_tokenizer["pattern"].items()
            return [("Split", _escaped(text), pre_tokenizer["behavior"], pre_tokenizer["invert"])]
        case "ByteLevel":
            return [("ByteLevel", pre_tokenizer["add_prefix_space"], pre_tokenizer.get("use_regex", True))]
        case "Digits":
            return [("Digits", pre_tokenizer["individual_digits"])]
        case other:
            return [(other,)]


def _normalizers(normalizer: dict[str, Any] | None) -> list[str]:
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [name for inner in normalizer["normalizers"] for name in _normalizers(inner)]
    return [normalizer["type"]]


def _told(steps: tuple[Step, ...]) -> str:
    return ", then ".join(" ".join(map(str, step[:2])) for step in steps) or "nothing at all"


def _looks_like_control(token: str) -> bool:
    """Role and tool tokens are not special in DeepSeek's tokenizer.json. llama.cpp's converter goes by their looks, as we do: control
    tokens are not shown, and text from outside cannot forge them."""
    return token.startswith(("<|", "<｜")) and token.endswith(("|>", "｜>"))
