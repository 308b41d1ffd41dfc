"""Settings of `finback logit-distill`."""

from dataclasses import dataclass

from finback.config import InputError
from finback.train.config import check_numbers
from finback.train.fine_tuning_config import FineTuningConfig, SFTPrecision


@dataclass(frozen=True)
class LogitDistillConfig(FineTuningConfig):
    """One run of logit distillation. It ends after `epochs`."""

    data: tuple[str, ...] = ()
    """.jsonl or .parquet files of the teacher's verified traces, as finback reject writes them."""
    epochs: int = 2
    """Times that every trace is seen."""
    sequence_length: int | None = None
    """Most tokens of a trace; None: the smaller of both models' contexts, at most 4096."""
    precision: SFTPrecision = "fp32"
    """Matrix products of both models: fp32, or bf16 (autocast; weights, gradients and the loss stay fp32)."""

    distill_temperature: float = 1.0
    """Both models' logits are divided by it."""
    top_k: int | None = None
    """Tell so many of the teacher's likeliest tokens apart, and take all others together; None is the whole vocabulary."""
    balance_loss_coef: float = 0.0001
    """Weight of the experts' balance loss; a dense student has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(
            self,
            integers={},
            at_least_zero=("balance_loss_coef",),
            above_zero=("distill_temperature",),
            from_zero_below_one=(),
            choices={},
        )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"field top_k is {self.top_k}, it must be at least 1; leave it out to take the whole vocabulary")
