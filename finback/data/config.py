"""How documents become training rows: fields of a run's configuration. No torch."""

from dataclasses import dataclass

from finback.config import InputError


@dataclass(frozen=True)
class DataConfig:
    """How documents become token shards (V3 section 4.1)."""

    validation_fraction: float = 0.02
    """Share of documents held out, chosen by a hash of their text."""
    fim_rate: float = 0.1
    """Share of training documents rearranged as fill-in-the-middle, prefix-suffix-middle order."""
    boundary_split_rate: float = 0.1
    """Share of tokens joining punctuation and line breaks that are split in two (V3 does not publish its own)."""
    tokens_per_shard: int = 2**26
    """A shard file is closed at the first document end after this many tokens."""
    seed: int = 0
    """Seed of the fill-in-the-middle and boundary choices."""

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "fim_rate", "boundary_split_rate"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"data config field {name} is {value}, it must lie between 0 and 1")
        if self.tokens_per_shard < 1:
            raise InputError(f"data config field tokens_per_shard is {self.tokens_per_shard}, it must be positive")
