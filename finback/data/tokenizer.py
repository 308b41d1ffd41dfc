"""Byte-level BPE with DeepSeek's pre-tokenizer and special tokens: trained here, or loaded from a Hugging Face
directory.

A vocabulary trained here is laid out like the published one, only smaller:

    0 <｜begin▁of▁sentence｜>   1 <｜end▁of▁sentence｜>   2 <｜▁pad▁｜>      as in DeepSeek-V3
    3 .. 258                    the 256 bytes, in the order of the GPT-2 byte alphabet
    259 ..                      merges, most frequent first
    the last 17                 LATE_SPECIAL_TOKENS, in the order of ids 128798 .. 128814 of DeepSeek-R1

Digits. DeepSeek's pre-tokenizer keeps up to three digits together, and its vocabulary has 1,100 entries that hold
digits. A small model cannot learn such tables, so our training puts one more split in front, which isolates every
numeral: no pair with a numeral in it is ever seen, so no merge contains one. The split is used for training only. What
is saved is DeepSeek's pre-tokenizer, unchanged, and with these merges it still gives one token for each digit.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from finback.config import InputError
from finback.data.chat import Message, published_template, render_chat
from finback.data.files import read_json, write_atomic

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
PAD_TOKEN = "<｜▁pad▁｜>"
THINK_TOKEN = "<think>"
END_THINK_TOKEN = "</think>"
FIM_HOLE_TOKEN = "<｜fim▁hole｜>"
FIM_BEGIN_TOKEN = "<｜fim▁begin｜>"
FIM_END_TOKEN = "<｜fim▁end｜>"
USER_TOKEN = "<｜User｜>"
ASSISTANT_TOKEN = "<｜Assistant｜>"
LATE_SPECIAL_TOKENS = (
    THINK_TOKEN,
    END_THINK_TOKEN,
    FIM_HOLE_TOKEN,
    FIM_BEGIN_TOKEN,
    FIM_END_TOKEN,
    USER_TOKEN,
    ASSISTANT_TOKEN,
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, *LATE_SPECIAL_TOKENS)

# The three splits of the published tokenizer.json.
PRE_TOKENIZER_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_BYTES = 256
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + _BYTES


class Tokenizer:
    """A tokenizer as a Hugging Face directory describes it: the BPE itself, its special tokens and its chat template.

    Special tokens are recognised in text wherever they are written, as in the published tokenizer. Ids are plain ints.
    `bos_token` and `bos_token_id` are None where the family has no begin-of-sentence token (Qwen): nothing is then put in front.
    """

    def __init__(self, backend: Backend, config: dict[str, Any], chat_template: str | None = None) -> None:
        """`backend` holds tokenizer.json, `config` holds tokenizer_config.json (without the chat template)."""
        self.backend = backend
        self.config = config
        self.chat_template = chat_template
        self.bos_token = self._special("bos_token") if config.get("bos_token") is not None else None
        self.eos_token = self._special("eos_token")
        self.pad_token = self._special("pad_token") if config.get("pad_token") is not None else self.eos_token
        self.bos_token_id = None if self.bos_token is None else self.token_to_id(self.bos_token)
        self.eos_token_id = self.token_to_id(self.eos_token)
        self.pad_token_id = self.token_to_id(self.pad_token)
        self.add_bos_token = self._adds_bos()
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._control_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest token id: what a model's `vocab_size` must at least be."""
        self._bytes_of_char = {char: value for value, char in enumerate(_byte_alphabet())}

    def _adds_bos(self) -> bool:
        """What tokenizer_config.json says; where it says nothing (Llama 3), what the steps of tokenizer.json do."""
        said = self.config.get("add_bos_token")
        if said is None:
            return self.bos_token_id is not None and self.backend.encode("").ids[:1] == [self.bos_token_id]
        return bool(said) and self.bos_token_id is not None

    def _special(self, name: str) -> str:
        value = self.config.get(name)
        if isinstance(value, dict):  # an AddedToken as older libraries write it
            value = value.get("content")
        if not isinstance(value, str):
            raise InputError(f"tokenizer_config.json field {name} is {value!r}, it must name a token of tokenizer.json")
        return value

    @property
    def control_token_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` drops (begin and end of sentence, padding, ...); role and think tokens are
        not among them."""
        return self._control_ids

    def token_to_id(self, token: str) -> int:
        """The id of a token given by its text; InputError if there is none."""
        token_id: int | None = self.backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"the tokenizer has no token {token!r}")
        return token_id

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Token ids of `text`; with `add_bos` the begin-of-sentence id comes first, if the family has one."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return [*self.bos_ids, *ids] if add_bos else ids

    @property
    def bos_ids(self) -> list[int]:
        """The begin-of-sentence id, or nothing."""
        return [] if self.bos_token_id is None else [self.bos_token_id]

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool = False) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        bos = self.bos_ids if add_bos else []
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [bos + encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a token may hold part of a character. An id without a token gives none."""
        if token_id in self._added:
            return self._added[token_id]
        token: str | None = self.backend.id_to_token(token_id)
        return b"" if token is None else bytes(self._bytes_of_char[char] for char in token)

    def token_byte_lengths(self) -> np.ndarray:
        """int64 [vocab_size]: bytes of text per token id, 0 for control and FIM tokens, which are no text.

        Over a document these add up to its size in UTF-8, so bits per byte are sum(loss) / ln 2 / sum(lengths).
        """
        lengths = np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)], dtype=np.int64)
        not_text = set(self.control_token_ids)
        for token in (FIM_HOLE_TOKEN, FIM_BEGIN_TOKEN, FIM_END_TOKEN):
            token_id = self.backend.token_to_id(token)
            if token_id is not None:
                not_text.add(token_id)
        lengths[sorted(not_text)] = 0
        return lengths

    @cached_property
    def most_bytes_per_token(self) -> int | None:
        """Bytes of the longest token: text of more than n times as many has more than n tokens. None where that does not follow: a
        normaliser may shorten text, and an added token may take all white space beside it."""
        normalizer = self.backend.normalizer
        if normalizer is not None and json.loads(normalizer.__getstate__()) != {"type": "Sequence", "normalizers": []}:
            return None
        if any(token.lstrip or token.rstrip for token in self.backend.get_added_tokens_decoder().values()):
            return None
        return max(len(self.token_bytes(token_id)) for token_id in range(self.vocab_size))

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides how text becomes ids."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text, begin-of-sentence token included: encode it without `add_bos`."""
        if self.chat_template is None:
            raise InputError("this tokenizer has no chat template; add chat_template.jinja to its directory")
        return render_chat(
            self.chat_template,
            messages,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token,
            pad_token=self.pad_token,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **variables,
        )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, chat_template: str | None = None, model_max_length: int = 16384
) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens on `texts` (V3 section 4.1; layout in the module's
    docstring).

    `chat_template` is the published R1 template unless given. Raises InputError if `vocab_size` is below 276 (bytes
    and special tokens) or more than the text can give.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"vocab_size is {vocab_size}, it must be at least {SMALLEST_VOCABULARY} (256 bytes and the special tokens)"
        )
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([])
    isolate_numerals = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([isolate_numerals, *_published_splits()])
    early = [AddedToken(token, normalized=False, special=True) for token in (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LATE_SPECIAL_TOKENS),
        special_tokens=early,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_without_special_tokens(texts), trainer)
    backend.add_tokens([AddedToken(token, normalized=True, special=token == "<|EOT|>") for token in LATE_SPECIAL_TOKENS])
    reached = backend.get_vocab_size(with_added_tokens=True)
    if reached != vocab_size:
        raise InputError(f"vocab_size is {vocab_size}, but this text gives only {reached} tokens; lower it or add text")
    backend.pre_tokenizer = pre_tokenizers.Sequence(_published_splits())
    backend.decoder = decoders.ByteLevel()
    # Published files leave this step to the library's class; a template in the file gives the same in every library.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN}:0 $A:0", pair=f"{BOS_TOKEN}:0 $A:0 {BOS_TOKEN}:1 $B:1", special_tokens=[(BOS_TOKEN, 0)]
    )
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS_TOKEN,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS_TOKEN,
        "model_max_length": model_max_length,
        "pad_token": PAD_TOKEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    return Tokenizer(backend, config, published_template("deepseek_r1") if chat_template is None else chat_template)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read a Hugging Face tokenizer directory: tokenizer.json, tokenizer_config.json and, if present,
    chat_template.jinja.

    Raises InputError naming the file that is missing or broken.
    """
    directory = Path(directory)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{directory} holds no tokenizer.json; give a Hugging Face directory with a fast tokenizer")
    config = read_json(directory / "tokenizer_config.json")
    template = config.pop("chat_template", None)
    template_file = directory / "chat_template.jinja"
    if template_file.is_file():
        template = template_file.read_bytes().decode()
    if template is not None and not isinstance(template, str):
        raise InputError(f"{directory / 'tokenizer_config.json'}: chat_template must be one text, not {type(template).__name__}")
    content = read_json(file)
    model, decoder = content.get("model"), content.get("decoder")
    if not isinstance(model, dict) or model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(decoder):
        raise InputError(f"{file} is not a byte-level BPE in the form of the `tokenizers` library")
    try:
        backend = Backend.from_str(json.dumps(content))
    except Exception as error:  # the library raises no narrower one
        raise InputError(f"{file} cannot be read by the `tokenizers` library of this machine: {error}") from None
    return Tokenizer(backend, config, template)


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write `tokenizer` as a Hugging Face directory, the chat template inside tokenizer_config.json as DeepSeek
    publishes it.

    `transformers.AutoTokenizer`, vLLM, SGLang and llama.cpp's converter read this form, with or without a config.json
    beside it.
    """
    directory = Path(directory)
    config = dict(tokenizer.config)
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    write_atomic(directory / "tokenizer.json", tokenizer.backend.to_str(pretty=True) + "\n")
    write_atomic(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    # A template file left from before would win over the one just written.
    (directory / "chat_template.jinja").unlink(missing_ok=True)


def _published_splits() -> list[Any]:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZER_PATTERNS]
    return [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def _without_special_tokens(texts: Iterable[str]) -> Iterator[str]:
    # The trainer does not know special tokens written in the text, and would spend merges on their letters.
    pattern = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
    for text in texts:
        yield from (piece for piece in pattern.split(text) if piece)


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in tokenizer.json (GPT-2's map: printable bytes are themselves)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
