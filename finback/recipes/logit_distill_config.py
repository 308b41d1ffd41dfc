"""Settings of `finback logit-distill`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from finback.config import InputError


@dataclass(frozen=True)
class LogitDistillConfig:
    """What `finback logit-distill` takes."""

    teacher: Positional[Path]
    """Hugging Face directory of the model that is learnt from."""
    student: Positional[Path]
    """Hugging Face directory of the model that learns; its tokenizer must be the teacher's."""
    data: tuple[str, ...]
    """.jsonl or .parquet files of the teacher's verified traces, as finback reject writes them."""
    out: Path
    """Directory to write: student/ and metrics.jsonl."""
    distill_temperature: float = 1.0
    """Both models' logits are divided by it."""
    top_k: int | None = None
    """Tell so many of the teacher's likeliest tokens apart, and take all others together; None is the whole vocabulary."""
    epochs: int = 2
    """Times that every trace is seen."""
    lr: float = 5e-5
    """Highest learning rate; it falls to a tenth along a cosine."""
    global_batch_size: int = 32
    """Traces to a step."""
    sequence_length: int = 1024
    """Longest trace in tokens; bounded by both models' contexts."""
    balance_loss_coef: float = 0.0001
    """Weight of the experts' balance loss; a dense student has none."""
    seed: int = 0
    """Draws the order of the traces."""

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("distill_temperature", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}, it must be a number above 0")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}, it must be at least 1; leave it out to take the whole vocabulary")
