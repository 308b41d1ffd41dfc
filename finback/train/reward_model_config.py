"""What the training of a reward model is told: `RewardModelConfig`. No torch, so that `--help` answers at once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from finback.config import InputError, ModelConfig, nearest
from finback.train.config import PretrainConfig, Recompute, check_numbers
from finback.train.sft_config import SFTPrecision

Kind = Literal["pairwise", "pointwise"]


@dataclass(frozen=True)
class RewardModelConfig:
    """One reward model (R1 in Nature, Methods): the helpful one compares pairs of final answers, the safe one judges whole responses.

    Published are batches of 256, a learning rate of 6e-6 and one epoch over 66,000 pairs or 106,000 labels.
    """

    kind: Kind = "pairwise"
    """pairwise: rows of `prompt`, `chosen`, `rejected`, of which the final answers are compared; pointwise: `prompt`, `completion`,
    `label` (1 good, 0 bad)."""
    data: tuple[str, ...] = ()
    """.jsonl and .parquet files; `prompt` is a text or a list of messages."""
    skip_malformed: bool = False
    """Leave out rows that are malformed or too long, and say how many."""
    held_out_fraction: float = 0.1
    """Share of the rows that is not trained on, chosen so that length alone tells nothing."""
    seed: int = 0
    """Seed of the split and of the order of the rows."""
    epochs: int = 1
    """Times that each row is seen."""

    sequence_length: int | None = None
    """Most tokens of prompt and response together; None: the model's context, at most 4096."""
    global_batch_size: int = 32
    """Rows per optimizer step; a pair is one row."""
    micro_batch_size: int = 4
    """Texts of `sequence_length` tokens per forward and backward pass; changes memory and speed, not the result."""

    lr: float = 6e-6
    """Peak learning rate; small models and few rows take 1e-4 and more."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine; None: a tenth of `lr`."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from 0; None: 3% of the run."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    max_nonfinite_steps: int = 3
    """The run stops after this many steps in a row whose gradient norm is not finite; such steps change no weight."""

    precision: SFTPrecision = "bf16"
    """Matrix products: fp32, or bf16 (autocast; weights, gradients, router and head stay fp32)."""
    recompute: Recompute = "none"
    """What backward computes again to save memory."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; auto: the first GPU if there is one."""
    threads: int | None = None
    """CPU threads of torch; None: torch's own choice."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    save_every: int | None = 200
    """Steps between checkpoints; None: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on the disk, newest first; 0: all."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            integers=_INTEGERS,
            at_least_zero=("min_lr", "weight_decay", "held_out_fraction"),
            above_zero=("lr", "adam_epsilon", "max_grad_norm"),
            from_zero_below_one=("adam_beta1", "adam_beta2"),
            choices=_CHOICES,
        )
        if not 0 < self.held_out_fraction <= 0.5:
            raise InputError(f"field held_out_fraction is {self.held_out_fraction}, it must be above 0 and at most 0.5")
        if self.min_lr is not None and self.min_lr > self.lr:
            raise InputError(f"field min_lr is {self.min_lr}, above lr ({self.lr}); lower it")
        if not isinstance(self.data, tuple) or not all(isinstance(item, str) for item in self.data):
            raise InputError(f"field data is {self.data!r}, it must be a list of files")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, tuples as lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RewardModelConfig":
        """What `to_dict` gives. InputError for a field that is unknown or of the wrong kind."""
        names = [field.name for field in fields(cls)]
        for name in data:
            if name not in names:
                raise InputError(f"field {name} is not known{nearest(name, names)}")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**values)

    def as_pretraining(self, model: ModelConfig, longest: int) -> PretrainConfig:
        """A pre-training run of the same size: what memory and FLOPs are estimated with."""
        return PretrainConfig(
            model=model,
            steps=1,
            sequence_length=max(longest, model.num_nextn_predict_layers + 1),
            global_batch_size=max(self.global_batch_size, self.micro_batch_size),
            micro_batch_size=self.micro_batch_size,
            bias_update_speed=0.0,
            precision=self.precision,
            recompute=self.recompute,
        )


_INTEGERS = {
    "seed": 0,
    "epochs": 1,
    "sequence_length": 2,
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "warmup_steps": 0,
    "max_nonfinite_steps": 1,
    "threads": 1,
    "log_every": 1,
    "save_every": 1,
    "keep_checkpoints": 0,
}
_CHOICES = {
    "kind": ("pairwise", "pointwise"),
    "precision": ("fp32", "bf16"),
    "recompute": ("none", "selective", "full"),
}
