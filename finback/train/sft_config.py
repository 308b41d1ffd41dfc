"""What a supervised fine-tuning run is told: `SFTConfig`. No torch, so that `--help` answers at once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from finback.config import InputError, ModelConfig, nearest
from finback.train.config import MomentsDtype, PretrainConfig, Recompute, check_numbers

Batching = Literal["pack", "pad"]
SFTPrecision = Literal["fp32", "bf16"]
LONGEST_DEFAULT = 4096  # tokens per row where nothing is said and the context is longer


@dataclass(frozen=True)
class SFTConfig:
    """One fine-tuning run on completions (V3 section 5.1). It ends after `epochs`.

    The loss of a step is the mean over all completion tokens of its batch, however that is packed and cut into micro-batches.
    """

    data: tuple[str, ...] = ()
    """.jsonl and .parquet files with rows of `messages`, or of `prompt` and `completion`."""
    validation: tuple[str, ...] = ()
    """Files of the same kind that are not trained on: the held-out loss, and where drafts are measured."""
    chat_template: str | None = None
    """Template for `messages`, saved with the model: a file, deepseek_r1 or deepseek_v3; None: the model's own."""
    truncate: bool = False
    """Cut samples longer than `sequence_length` at their end instead of stopping."""
    skip_malformed: bool = False
    """Leave out rows that are malformed or too long, and say how many."""
    seed: int = 0
    """Seed of the order of the samples, another one in each epoch."""
    epochs: int = 2
    """Times that each sample is seen."""

    sequence_length: int | None = None
    """Most tokens of a sample, and of a row that samples are packed into; None: the model's context, at most 4096."""
    global_batch_size: int = 32
    """Samples per optimizer step; the last step of an epoch takes what is left."""
    micro_batch_size: int = 4
    """Rows of `sequence_length` tokens per forward and backward pass; changes memory and speed, not the result."""
    batching: Batching = "pack"
    """pack: samples share rows, masked from each other (V3 section 5.1); pad: one to a row, sorted by length, faster where
    samples are short. The result is the same."""

    lr: float = 5e-5
    """Peak learning rate; R1 gives 5e-5 for 800,000 samples, small models and few samples take more."""
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
    moments_dtype: MomentsDtype = "fp32"
    """Storage of AdamW's moments."""

    bias_update_speed: float | None = None
    """Gamma: the router bias of an expert moves by this much per step; 0 freezes it; None: 0.001 where there is a router bias."""
    balance_loss_coef: float = 0.0001
    """Alpha: weight of the balance loss, taken over each sample (V3 equation 17)."""
    mtp_loss_coef: float = 0.1
    """Lambda: weight of the multi-token prediction loss, so that the MTP modules keep up with the model."""
    freeze_mtp: bool = False
    """Leave the MTP modules as they are; they are not computed then, and their drafts fit the model less and less."""

    precision: SFTPrecision = "bf16"
    """Matrix products: fp32, or bf16 (autocast; weights, gradients and router stay fp32)."""
    recompute: Recompute = "none"
    """What backward computes again to save memory: nothing, V3's choice (norms, MLA up-projections, SwiGLU), or layers."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; auto: the first GPU if there is one."""
    threads: int | None = None
    """CPU threads of torch; None: torch's own choice. A resumed run is bitwise the same with the same number only."""

    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between evaluations on `validation`; None: before the first step and at the end."""
    eval_samples: int = 128
    """Samples that one evaluation reads: of `validation`, or for the drafts of the training data where there is none."""
    save_every: int | None = 200
    """Steps between checkpoints; None: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on the disk, newest first; 0: all."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_together(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, tuples as lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SFTConfig":
        """What `to_dict` gives. InputError for a field that is unknown or of the wrong kind."""
        names = [field.name for field in fields(cls)]
        for name in data:
            if name not in names:
                raise InputError(f"field {name} is not known{nearest(name, names)}")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**values)

    def as_pretraining(self, model: ModelConfig, longest: int) -> PretrainConfig:
        """A pre-training run of the same size: what memory and FLOPs are estimated with. `longest` is a row's width in tokens."""
        return PretrainConfig(
            model=model,
            steps=1,
            sequence_length=max(longest, model.num_nextn_predict_layers + 1),
            global_batch_size=max(self.global_batch_size, self.micro_batch_size),
            micro_batch_size=self.micro_batch_size,
            bias_update_speed=0.0,
            moments_dtype=self.moments_dtype,
            precision=self.precision,
            recompute=self.recompute,
        )


# Field -> least value. Whole numbers first; "more than" limits after.
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
    "eval_every": 1,
    "eval_samples": 1,
    "save_every": 1,
    "keep_checkpoints": 0,
}
_AT_LEAST_ZERO = ("min_lr", "weight_decay", "bias_update_speed", "balance_loss_coef", "mtp_loss_coef")
_ABOVE_ZERO = ("lr", "adam_epsilon", "max_grad_norm")
_FROM_ZERO_BELOW_ONE = ("adam_beta1", "adam_beta2")
_CHOICES = {
    "batching": ("pack", "pad"),
    "precision": ("fp32", "bf16"),
    "moments_dtype": ("fp32", "bf16"),
    "recompute": ("none", "selective", "full"),
}


def _check_numbers(c: SFTConfig) -> None:
    check_numbers(
        c,
        integers=_INTEGERS,
        at_least_zero=_AT_LEAST_ZERO,
        above_zero=_ABOVE_ZERO,
        from_zero_below_one=_FROM_ZERO_BELOW_ONE,
        choices=_CHOICES,
    )
    for name in ("truncate", "skip_malformed", "freeze_mtp"):
        if not isinstance(getattr(c, name), bool):
            raise InputError(f"field {name} is {getattr(c, name)!r}, it must be true or false")
    if c.chat_template is not None and not isinstance(c.chat_template, str):
        raise InputError(f"field chat_template is {c.chat_template!r}, it must be a file or a name")
    if not isinstance(c.device, str):
        raise InputError(f"field device is {c.device!r}, it must be a name such as cpu or cuda")
    for name in ("data", "validation"):
        if not isinstance(getattr(c, name), tuple) or not all(isinstance(item, str) for item in getattr(c, name)):
            raise InputError(f"field {name} is {getattr(c, name)!r}, it must be a list of files")


def _check_together(c: SFTConfig) -> None:
    if c.min_lr is not None and c.min_lr > c.lr:
        raise InputError(f"field min_lr is {c.min_lr}, above lr ({c.lr}); lower it")
    if c.mtp_loss_coef == 0 and not c.freeze_mtp:
        raise InputError("field mtp_loss_coef is 0, so the MTP modules would decay and learn nothing; set freeze_mtp as well")
