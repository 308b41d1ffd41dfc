"""What a supervised fine-tuning run is told: `SFTConfig`. No torch, so that `--help` answers at once."""

import os
from dataclasses import dataclass, replace
from typing import Literal

from finback.config import InputError, ModelConfig
from finback.train.config import MomentsDtype, PretrainConfig, check_numbers
from finback.train.fine_tuning_config import FineTuningConfig

Batching = Literal["pack", "pad"]


@dataclass(frozen=True)
class SFTConfig(FineTuningConfig):
    """One fine-tuning run on completions (V3 section 5.1). It ends after `epochs`.

    The loss of a step is the mean over all completion tokens of its batch, however that is packed and cut into micro-batches.
    """

    data: tuple[str, ...] = ()
    """.jsonl and .parquet files with rows of `messages`, or of `prompt` and `completion`."""
    epochs: int = 2
    """Times that each sample is seen."""
    sequence_length: int | None = None
    """Most tokens of a sample, and of a row that samples are packed into; None: the model's context, at most 4096."""
    lr: float = 5e-5
    """Peak learning rate; R1 gives 5e-5 for 800,000 samples, small models and few samples take more."""

    validation: tuple[str, ...] = ()
    """Files of the same kind that are not trained on: the held-out loss, and where drafts are measured."""
    chat_template: str | None = None
    """Template for `messages`, saved with the model: a file, deepseek_r1 or deepseek_v3; None: the model's own."""
    truncate: bool = False
    """Cut samples longer than `sequence_length` at their end instead of stopping."""
    batching: Batching = "pack"
    """pack: samples share rows, masked from each other (V3 section 5.1); pad: one to a row, sorted by length, faster where
    samples are short. The result is the same."""
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

    eval_every: int | None = None
    """Steps between evaluations on `validation`; None: before the first step and at the end."""
    eval_samples: int = 128
    """Samples that one evaluation reads: of `validation`, or for the drafts of the training data where there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(
            self,
            integers={"eval_every": 1, "eval_samples": 1},
            at_least_zero=("bias_update_speed", "balance_loss_coef", "mtp_loss_coef"),
            above_zero=(),
            from_zero_below_one=(),
            choices={"batching": ("pack", "pad"), "moments_dtype": ("fp32", "bf16")},
        )
        for name in ("truncate", "freeze_mtp"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"field {name} is {getattr(self, name)!r}, it must be true or false")
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise InputError(f"field chat_template is {self.chat_template!r}, it must be a file or a name")
        if not isinstance(self.validation, tuple) or not all(isinstance(item, str) for item in self.validation):
            raise InputError(f"field validation is {self.validation!r}, it must be a list of files")
        if self.mtp_loss_coef == 0 and not self.freeze_mtp:
            raise InputError("field mtp_loss_coef is 0, so the MTP modules would decay and learn nothing; set freeze_mtp as well")

    def resolved(self, model: ModelConfig) -> "SFTConfig":
        """And the files of `validation` by absolute paths."""
        return replace(super().resolved(model), validation=tuple(os.path.abspath(path) for path in self.validation))

    def as_pretraining(self, model: ModelConfig, longest: int) -> PretrainConfig:
        """And with the moments as they are stored."""
        return replace(super().as_pretraining(model, longest), moments_dtype=self.moments_dtype)
