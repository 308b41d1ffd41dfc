"""What the training of a reward model is told: `RewardModelConfig`. No torch, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import Literal

from finback.config import InputError
from finback.train.config import check_numbers
from finback.train.fine_tuning_config import FineTuningConfig

Kind = Literal["pairwise", "pointwise"]


@dataclass(frozen=True)
class RewardModelConfig(FineTuningConfig):
    """One reward model (R1 in Nature, Methods): the helpful one compares pairs of final answers, the safe one judges whole responses.

    Published are batches of 256, a learning rate of 6e-6 and one epoch over 66,000 pairs or 106,000 labels.
    """

    data: tuple[str, ...] = ()
    """.jsonl and .parquet files; `prompt` is a text or a list of messages."""
    seed: int = 0
    """Seed of the split and of the order of the rows."""
    sequence_length: int | None = None
    """Most tokens of prompt and response together; None: the model's context, at most 4096."""
    global_batch_size: int = 32
    """Rows per optimizer step; a pair is one row."""
    micro_batch_size: int = 4
    """Texts of `sequence_length` tokens per forward and backward pass; changes memory and speed, not the result."""
    lr: float = 6e-6
    """Peak learning rate; small models and few rows take 1e-4 and more."""

    kind: Kind = "pairwise"
    """pairwise: rows of `prompt`, `chosen`, `rejected`, of which the final answers are compared; pointwise: `prompt`, `completion`,
    `label` (1 good, 0 bad)."""
    held_out_fraction: float = 0.1
    """Share of the rows that is not trained on, chosen so that length alone tells nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(
            self,
            integers={},
            at_least_zero=("held_out_fraction",),
            above_zero=(),
            from_zero_below_one=(),
            choices={"kind": ("pairwise", "pointwise")},
        )
        if not 0 < self.held_out_fraction <= 0.5:
            raise InputError(f"field held_out_fraction is {self.held_out_fraction}, it must be above 0 and at most 0.5")
