"""What every run of fine-tuning is told, whatever it learns: `FineTuningConfig`. No torch, so that `--help` answers at once."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from finback.config import InputError, ModelConfig, nearest
from finback.train.config import PretrainConfig, Recompute, check_numbers

Config = TypeVar("Config", bound="FineTuningConfig")
SFTPrecision = Literal["fp32", "bf16"]
LONGEST_DEFAULT = 4096  # tokens of a row where nothing is said and the context is longer
_WARMUP_SHARE = 0.03


@dataclass(frozen=True)
class FineTuningConfig:
    """Data, batches, AdamW, precision, and what is written: the fields that `finback sft`, `reward-model` and `logit-distill` share."""

    data: tuple[str, ...] = ()
    """.jsonl and .parquet files to train on."""
    skip_malformed: bool = False
    """Leave out rows that are malformed or too long, and say how many."""
    seed: int = 0
    """Seed of the order of the rows, another one in each epoch."""
    epochs: int = 1
    """Times that each row is seen."""

    sequence_length: int | None = None
    """Most tokens of a row; None: the model's context, at most 4096."""
    global_batch_size: int = 32
    """Rows per optimizer step; the last step of an epoch takes what is left."""
    micro_batch_size: int = 4
    """Rows of `sequence_length` tokens per forward and backward pass; changes memory and speed, not the result."""

    lr: float = 5e-5
    """Peak learning rate."""
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
    """Matrix products: fp32, or bf16 (autocast; weights, gradients, router and heads of one number stay fp32)."""
    recompute: Recompute = "none"
    """What backward computes again to save memory: nothing, V3's choice (norms, MLA up-projections, SwiGLU), or layers."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; auto: the first GPU if there is one."""
    threads: int | None = None
    """CPU threads of torch; None: torch's own choice. A resumed run is bitwise the same with the same number only."""

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
            at_least_zero=("min_lr", "weight_decay"),
            above_zero=("lr", "adam_epsilon", "max_grad_norm"),
            from_zero_below_one=("adam_beta1", "adam_beta2"),
            choices=_CHOICES,
        )
        if not isinstance(self.skip_malformed, bool):
            raise InputError(f"field skip_malformed is {self.skip_malformed!r}, it must be true or false")
        if not isinstance(self.device, str):
            raise InputError(f"field device is {self.device!r}, it must be a name such as cpu or cuda")
        if not isinstance(self.data, tuple) or not all(isinstance(item, str) for item in self.data):
            raise InputError(f"field data is {self.data!r}, it must be a list of files")
        if self.min_lr is not None and self.min_lr > self.lr:
            raise InputError(f"field min_lr is {self.min_lr}, above lr ({self.lr}); lower it")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, tuples as lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
        """What `to_dict` gives. InputError for a field that is unknown or of the wrong kind."""
        names = [field.name for field in fields(cls)]
        for name in data:
            if name not in names:
                raise InputError(f"field {name} is not known{nearest(name, names)}")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**values)

    def resolved(self: Config, model: ModelConfig) -> Config:
        """With absolute paths, and a value for the length and the last learning rate, checked against the model."""
        context = model.max_position_embeddings
        length = min(context, LONGEST_DEFAULT) if self.sequence_length is None else self.sequence_length
        if length > context:
            raise InputError(
                f"field sequence_length is {length}, above the model's max_position_embeddings ({context}); lower it"
            )
        return replace(
            self,
            data=tuple(os.path.abspath(path) for path in self.data),
            sequence_length=length,
            min_lr=self.lr / 10 if self.min_lr is None else self.min_lr,
        )

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the whole run over so many rows."""
        return self.epochs * math.ceil(rows / self.global_batch_size)

    def with_warmup(self: Config, total_steps: int) -> Config:
        """With a value for the warm-up of a run of so many steps."""
        steps = math.ceil(_WARMUP_SHARE * total_steps) if self.warmup_steps is None else self.warmup_steps
        return replace(self, warmup_steps=steps)

    def as_pretraining(self, model: ModelConfig, longest: int) -> PretrainConfig:
        """A pre-training run of the same size: what memory and FLOPs are estimated with. `longest` is a row's width in tokens."""
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
_CHOICES = {"precision": ("fp32", "bf16"), "recompute": ("none", "selective", "full")}
