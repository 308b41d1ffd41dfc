"""The quickstart's corpus: fables where the package registry can be reached, docstrings of Python's library elsewhere, and sums."""

import ast
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from finback.config import InputError
from finback.data.chains import ChainSettings, Habits, chain_documents
from finback.data.fetch import default_cache, fetch, fetched_documents
from finback.data.items import find_item
from finback.data.sources import stdlib_documents
from finback.recipes.config import QuickstartConfig

FABLES = ("fables-en", "fables-zh")
CHAINS = "chains"
DOCSTRING_BYTES = 2_000_000


class SumsTask(NamedTuple):
    """The sums of a run: what is asked for, how the corpus writes about it, and how much is kept for the stages behind the base."""

    chains: ChainSettings
    habits: Habits
    prompts: int
    """Questions to learn from by samples."""
    held_out: int
    """Held-out questions as long as those of training."""
    held_out_longer: int
    """Held-out questions with one or two terms more than any of training."""


QUICKSTART_SUMS = SumsTask(
    ChainSettings(least_terms=3, most_terms=5, largest=9, distinct=True),
    Habits(facts=0.14, direct=0.36, leaps=0.04, steps=0.40, tagged=0.4, tagged_direct=0.8, equations=True, repeats=True),
    prompts=8000,
    held_out=400,
    held_out_longer=40,
)
"""What a small model can learn in minutes. Most answers in tags come without a thought, most thoughts without tags: so does what the
base is likeliest to write, and that it had better think, and answer in tags, is left to reinforcement learning."""


class Group(NamedTuple):
    """Documents of one kind, in the order in which they are written."""

    name: str
    texts: list[str]
    origin: str
    licence: str


def collect_groups(config: QuickstartConfig, task: SumsTask = QUICKSTART_SUMS) -> list[Group]:
    """The corpus as `config.text` wants it, each group shuffled; the generated sums of `task` always come last.

    Raises InputError if the fables are asked for and cannot be had.
    """
    groups = _text_groups(config)
    sums = list(chain_documents(config.problems, task.chains, task.habits, seed=config.seed))
    groups.append(Group(CHAINS, sums, "generated", "Apache-2.0, as finback"))
    for group in groups:
        random.Random(f"{config.seed}/{group.name}").shuffle(group.texts)
    return groups


def _text_groups(config: QuickstartConfig) -> list[Group]:
    if config.text == "none":
        return []
    if config.text != "docstrings":
        cache = default_cache() if config.cache is None else Path(config.cache)
        try:
            return [_fables(name, cache) for name in FABLES]
        except InputError as error:
            if config.text == "fables":
                raise
            print(f"Without fables: {error}. Docstrings of Python's own library take their place.")
    texts = list(docstring_texts(config.seed, DOCSTRING_BYTES))
    return [Group("docstrings", texts, "docstrings of Python's standard library on this machine", "PSF licence")]


def _fables(name: str, cache: Path) -> Group:
    item = find_item(name)
    fetch(item, cache)
    return Group(name, [document.text for document in fetched_documents(name, cache)], item.origin, item.licence)


def docstring_texts(seed: int, most_bytes: int) -> Iterator[str]:
    """The docstrings of Python's standard library, one text per source file, files in random order, about `most_bytes` in all."""
    files = [document.text for document in stdlib_documents()]
    random.Random(seed).shuffle(files)
    size = 0
    for source in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files
            try:
                tree = ast.parse(source)
            except SyntaxError:
                continue  # a few files are wrong on purpose
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(docstring for docstring in found if docstring)
        if text:
            size += len(text.encode())
            yield text
        if size >= most_bytes:
            return
