"""`finback pretrain`: train a preset on text files or token shards, or continue a run."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from finback.commands.parse import parse_arguments, with_home
from finback.config import InputError
from finback.presets import PRESETS
from finback.train.config import PretrainConfig

if TYPE_CHECKING:
    from finback.data.sources import Document
    from finback.data.tokenizer import Tokenizer

TOKENIZER_TEXT_BYTES = 50_000_000  # more text than this changes a vocabulary little and takes its time
_LIMITS = ("--steps", "--tokens", "--minutes")
_DESCRIPTION = """Train a preset, or continue a run with: finback pretrain --resume DIR.
PRESET gives every field below its value (shown are those of the preset on the line, or of tiny)."""


@dataclass(frozen=True)
class Arguments:
    """Words of `finback pretrain PRESET`; the fields of the run's config stand beside them."""

    preset: Annotated[
        Literal["nano", "nano-dense", "micro", "tiny", "tiny-dense", "small", "v2-lite-16b", "v3-671b"], tyro.conf.Positional
    ]
    """Model and recipe to start from: nano, nano-dense, micro, tiny, tiny-dense, small, v2-lite-16b or v3-671b. It comes first."""
    config: Annotated[PretrainConfig, tyro.conf.AvoidSubcommands, tyro.conf.arg(name="")]
    out: Path | None = None
    """Directory of the run: config, metrics, checkpoints, report. `data` may also name .txt, .jsonl and .parquet files
    or directories of them: they are tokenised into its folder `data` first."""
    text_field: str = "text"
    """Field (column) of .jsonl and .parquet files that holds the text."""


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code is 0 when the run has reached its end."""
    if any(word.split("=")[0] == "--resume" for word in argv):
        _resume(argv)
        return 0
    arguments = _parse(argv)
    config = _with_homes(arguments.config)
    if arguments.out is None:
        raise InputError("--out is missing; give a directory for the run")
    if not config.data:
        raise InputError("--data is missing; give text files (.txt, .jsonl, .parquet; finback fetch gets some) or token shards")
    if (arguments.out / "config.json").exists():
        again = f"continue it with finback pretrain --resume {arguments.out}"
        raise InputError(f"--out {arguments.out} already holds a run; {again}, or give another --out")
    from finback.ops.memory import available_memory
    from finback.train.initial import check_init_from
    from finback.train.memory import check_memory
    from finback.train.pretrain import pretrain
    from finback.train.session import choose_device, keep_freed_memory

    check_init_from(config)  # this and what follows before text is tokenised
    device = choose_device(config.device)
    check_memory(config, str(device), available_memory(device))
    config = prepare_data(config, arguments.out, text_field=arguments.text_field)
    keep_freed_memory()
    _tell_end(pretrain(config, arguments.out))
    return 0


def _resume(argv: Sequence[str]) -> None:
    words = [word for argument in argv for word in argument.split("=", 1)]
    if len(words) != 2 or words[0] != "--resume":
        raise InputError("--resume DIR stands alone: a run is continued with the fields that it was started with")
    from finback.train.pretrain import pretrain
    from finback.train.session import keep_freed_memory, read_run_config

    directory = Path(with_home(words[1]))
    keep_freed_memory()
    _tell_end(pretrain(read_run_config(directory), directory, resume=True))


def _with_homes(config: PretrainConfig) -> PretrainConfig:
    """The config's paths, which are texts, without ~."""
    tokenizer, init_from = (None if path is None else with_home(path) for path in (config.tokenizer, config.init_from))
    return replace(config, data=tuple(map(with_home, config.data)), tokenizer=tokenizer, init_from=init_from)


def _tell_end(checkpoint: Path) -> None:
    print(f"done: {checkpoint}")
    print(f"report: {checkpoint.parents[1] / 'report.md'}")


def _parse(argv: Sequence[str]) -> Arguments:
    name = argv[0] if argv else ""
    if name.startswith("-"):
        shown = Arguments(preset="tiny", config=PRESETS["tiny"]())
        parse_arguments(Arguments, argv, verb="pretrain", description=_DESCRIPTION, default=shown)  # help, or an unknown field
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"a preset comes first ({', '.join(PRESETS)}), not {name!r}{hint}; see finback pretrain --help")
    preset = PRESETS[name]()
    given = [word.split("=")[0] for word in argv if word.split("=")[0] in _LIMITS]
    if given:
        # A limit on the line takes the place of the preset's own; its value is read below.
        limit = given[0].removeprefix("--")
        preset = replace(
            preset,
            steps=1 if limit == "steps" else None,
            tokens=1 if limit == "tokens" else None,
            minutes=1.0 if limit == "minutes" else None,
        )
    default = Arguments(preset=name, config=preset)  # type: ignore[arg-type]
    return parse_arguments(Arguments, argv, verb="pretrain", description=_DESCRIPTION, default=default)


def prepare_data(config: PretrainConfig, out: Path, *, text_field: str = "text") -> PretrainConfig:
    """`config` with token shards in `data` and a tokenizer whose special tokens the model takes.

    Text files are tokenised into `out/data`: with the config's tokenizer, or with one of `model.vocab_size` tokens that
    is trained on them. Weights that are there already (`init_from`) bring their own.
    """
    from finback.data.tokenizer import load_tokenizer

    if config.tokenizer is None and config.init_from is not None and (Path(config.init_from) / "tokenizer.json").is_file():
        config = replace(config, tokenizer=config.init_from)
    shards = [(Path(path) / "index.json").is_file() for path in config.data]
    if all(shards):
        if config.tokenizer is None:
            return config
        return _with_special_tokens(config, load_tokenizer(config.tokenizer))
    if any(shards):
        mixed = config.data[shards.index(True)]
        raise InputError(f"--data mixes token shards ({mixed}) and text; give one kind, or run once for each")
    if config.data_weights:
        raise InputError(
            "--data-weights gives shares to token shards, and text files are tokenised into one; give shards (a run's data/tokens), or "
            "leave it out"
        )
    return _tokenise(config, out / "data", text_field)


def _tokenise(config: PretrainConfig, directory: Path, text_field: str) -> PretrainConfig:
    from finback.data.config import DataConfig
    from finback.data.shards import write_shards
    from finback.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    elif config.init_from is not None:
        raise InputError(f"--tokenizer is missing, and {config.init_from} holds none; give the one that its weights know")
    else:
        print(f"training a tokenizer of {config.model.vocab_size} tokens", flush=True)
        texts = _first_texts(_documents(config.data, text_field), TOKENIZER_TEXT_BYTES)
        try:
            tokenizer = train_tokenizer(texts, config.model.vocab_size)
        except InputError as error:
            hint = " (the field is --model.vocab-size)" if str(error).startswith("vocab_size") else ""
            raise InputError(f"{error}{hint}") from None
    config = _with_special_tokens(config, tokenizer)
    print(f"tokenising into {directory}", flush=True)
    shards = directory / "tokens"
    index = write_shards(_documents(config.data, text_field), tokenizer, shards, DataConfig(seed=config.seed))
    save_tokenizer(tokenizer, directory / "tokenizer")
    sizes = [sum(shard["tokens"] for shard in split["shards"]) for split in index["splits"].values()]
    print(f"{sizes[0]:,} tokens to train on, {sizes[1]:,} held out", flush=True)
    return replace(config, data=(str(shards),), data_weights=(), tokenizer=str(directory / "tokenizer"))


def _documents(paths: Iterable[str], text_field: str) -> "Iterator[Document]":
    from finback.data.sources import documents_from

    for path in paths:
        yield from documents_from(path, field=text_field)


def _first_texts(documents: "Iterable[Document]", limit: int) -> Iterator[str]:
    """Texts until together they have `limit` bytes."""
    size = 0
    for document in documents:
        yield document.text
        size += len(document.text.encode())
        if size >= limit:
            return


def _with_special_tokens(config: PretrainConfig, tokenizer: "Tokenizer") -> PretrainConfig:
    if tokenizer.vocab_size > config.model.vocab_size:
        size = config.model.vocab_size
        raise InputError(
            f"--model.vocab-size is {size}, but the tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens; "
            f"set it to {-(-tokenizer.vocab_size // 64) * 64}"
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return replace(config, model=replace(config.model, **ids))
