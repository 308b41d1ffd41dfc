"""Small tokenizers of the families that students come from, built here with the pre-tokenizers that those publish."""

from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from finback.data.tokenizer import Tokenizer

BATTERY = [
    "The fox saw the grapes and could not reach them. 狐狸看见葡萄，却够不着。\n\n",
    "\tfor i in range(12345):\r\n    print(i)  # naïve café!!\n",
    "<think>Prices rose 12.5% in 2024 (from $1,200 to $1,350): ½ ² Ⅷ ٣</think>",
    "русский 日本語 한국어 🐋🌊  I'll, you'RE, we've.   \n \n\n",
    "",
    " ",
    "\n",
    "\r\n\t ",
    "a  b   c    d\n\n\n  e \t\n",
    "don't Don'T 'tis it's'",
    "x1234567890y 1.5e-10 0xFF",
    "...!!!---+++===  (){}[]<>\\|/`~@#$%^&*_",
    "Größe ελληνικά русский हिन्दी ไทย עברית 👩‍👩‍👧",
]
FAMILIES = ("llama-bpe", "qwen2", "smollm", "gpt-2")
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"NUMERALS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def family_tokenizer(name: str, vocab_size: int = 500, chat_template: str | None = None) -> Tokenizer:
    """A byte-level BPE with the pre-tokenizer of a family (llama.cpp's name for it), trained on the battery."""
    backend = Backend(BPE())
    plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    match name:
        case "llama-bpe":
            cut = pre_tokenizers.Split(Regex(_CUT.replace("NUMERALS", r"\p{N}{1,3}")), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([cut, plain_bytes])
        case "qwen2":
            backend.normalizer = normalizers.NFC()
            cut = pre_tokenizers.Split(Regex(_CUT.replace("NUMERALS", r"\p{N}")), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([cut, plain_bytes])
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        case _:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    controls = [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=controls,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(BATTERY * 20, trainer)
    if name == "llama-bpe":
        backend.model.ignore_merges = True
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    return Tokenizer(backend, config, chat_template)
