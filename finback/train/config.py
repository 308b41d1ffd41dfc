"""What a pre-training run is told: `PretrainConfig`. No torch, so that `--help` and presets answer at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from finback.config import InputError, ModelConfig, nearest

Precision = Literal["fp32", "bf16", "fp8"]
MomentsDtype = Literal["fp32", "bf16"]
FP8Scales = Literal["float32", "ue8m0"]
GradientTiles = Literal["1x128", "128x128"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class PretrainConfig:
    """One pre-training run (V3 section 4.2). The run ends by exactly one of `steps`, `tokens` and `minutes`.

    Ramps are functions of the tokens seen so far. Where a `*_tokens` field is None, the ramp takes V3's own share of the whole run
    (constant learning rate until 10 of 14.8T tokens, cosine for 4.3T, first tail for 333B; gamma off for the last 500B).
    """

    model: ModelConfig
    data: tuple[str, ...] = ()
    """Directories of token shards: their "train" splits are trained on, their "validation" splits evaluated."""
    data_weights: tuple[float, ...] = ()
    """Share of rows taken from each directory of `data`, in its order; none given: equal shares."""
    tokenizer: str | None = None
    """Directory of the tokenizer that wrote the shards; it is saved into every checkpoint, and samples need it."""
    init_from: str | None = None
    """Hugging Face directory whose weights the run starts from, of the same model; None: weights are drawn from `seed`."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""
    steps: int | None = None
    """The run ends after this many optimizer steps."""
    tokens: int | None = None
    """The run ends with the step that reaches this many tokens."""
    minutes: float | None = None
    """The run is planned to end after this many minutes of training, from the speed that its first steps show."""

    sequence_length: int = 256
    """Tokens per sequence that the model reads (T)."""
    global_batch_size: int = 16
    """Sequences per optimizer step."""
    initial_batch_size: int | None = None
    """Sequences per step at the start of the batch-size ramp; None: `global_batch_size` from the start."""
    batch_ramp_tokens: int = 0
    """Tokens over which the batch grows linearly from `initial_batch_size` to `global_batch_size`."""
    micro_batch_size: int = 16
    """Sequences per forward and backward pass; changes memory and speed, not the result."""

    lr: float = 2e-3
    """Peak learning rate."""
    min_lr: float = 2e-4
    """Learning rate at the end of the cosine and during the first tail."""
    final_lr: float = 7e-5
    """Learning rate of the second tail."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from 0."""
    lr_constant_tokens: int | None = None
    """The learning rate stays at `lr` until this many tokens."""
    lr_decay_tokens: int | None = None
    """Length in tokens of the cosine from `lr` to `min_lr`."""
    lr_tail_tokens: int | None = None
    """Length in tokens of the first tail, at `min_lr`; after it comes `final_lr`."""

    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of AdamW's second moment. V3 does not publish its value."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    max_nonfinite_steps: int = 3
    """The run stops after this many steps in a row whose gradient norm is not finite; such steps change no weight."""
    moments_dtype: MomentsDtype | None = None
    """Storage of AdamW's moments; None: bf16 with precision fp8, as V3 keeps them, and fp32 otherwise."""

    bias_update_speed: float = 0.001
    """Gamma: the router bias of an expert moves by this much per step (V3 section 2.1.2); 0 for models without one."""
    bias_update_tokens: int | None = None
    """Gamma is 0 from this many tokens on."""
    balance_loss_coef: float = 0.0001
    """Alpha: weight of the sequence-wise balance loss (V3 equation 17)."""
    mtp_loss_coef: float = 0.3
    """Lambda: weight of the multi-token prediction loss (V3 equation 25)."""
    final_mtp_loss_coef: float = 0.1
    """Lambda from `mtp_loss_switch_tokens` on."""
    mtp_loss_switch_tokens: int | None = None
    """Tokens after which lambda switches."""

    precision: Precision = "bf16"
    """Matrix products: fp32, bf16 (autocast; weights, gradients and router stay fp32), or fp8 (V3 section 3.3: E4M3 in the products
    of attention's projections, feed-forwards and experts, bf16 elsewhere; emulated where the device has no FP8)."""
    fp8_scales: FP8Scales = "float32"
    """Scales of the FP8 tiles; ue8m0: all of them powers of two."""
    fp8_gradient_tiles: GradientTiles = "1x128"
    """Tiles of the output gradients in FP8. 128x128 is what the paper found to diverge; it is here to be seen."""
    recompute: Recompute = "none"
    """What backward computes again to save memory: nothing, V3's choice (norms, MLA up-projections, SwiGLU), or layers."""
    ema_decay: float | None = None
    """Decay per step of the moving average of the weights, kept in host memory; None: no average. V3 does not publish its value."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; auto: the first GPU if there is one."""
    threads: int | None = None
    """CPU threads of torch; None: torch's own choice. A resumed run is bitwise the same with the same number only."""

    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    eval_every: int | None = 50
    """Steps between evaluations on the validation split; None: only at the end."""
    eval_sequences: int = 64
    """Sequences of the validation split that one evaluation reads (all, if there are fewer)."""
    save_every: int | None = 200
    """Steps between checkpoints; None: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on the disk, newest first; 0: all."""
    sample_every: int | None = None
    """Steps between samples of text; None: only at the end. Needs `tokenizer`."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts to continue when sampling."""
    sample_tokens: int = 64
    """Tokens per sample."""
    sample_temperature: float = 0.7
    """Sampling temperature; 0 takes the most probable token."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_together(self)

    @property
    def moments(self) -> MomentsDtype:
        """Storage of AdamW's moments, as resolved."""
        return self.moments_dtype or ("bf16" if self.precision == "fp8" else "fp32")

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the model in its published form under "model", tuples as lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return values | {"model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PretrainConfig":
        """What `to_dict` gives. InputError for a field that is missing, unknown or of the wrong kind."""
        names = [field.name for field in fields(cls)]
        for name in data:
            if name not in names:
                raise InputError(f"field {name} is not known{nearest(name, names)}")
        if not isinstance(data.get("model"), Mapping):
            raise InputError("field model is missing; it must hold the model's config")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        values["model"] = ModelConfig.from_dict(data["model"])
        return cls(**values)


# Field -> least value. Whole numbers first; "more than" limits after.
_INTEGERS = {
    "seed": 0,
    "steps": 1,
    "tokens": 1,
    "sequence_length": 1,
    "global_batch_size": 1,
    "initial_batch_size": 1,
    "batch_ramp_tokens": 0,
    "micro_batch_size": 1,
    "warmup_steps": 0,
    "lr_constant_tokens": 0,
    "lr_decay_tokens": 0,
    "lr_tail_tokens": 0,
    "max_nonfinite_steps": 1,
    "bias_update_tokens": 0,
    "mtp_loss_switch_tokens": 0,
    "threads": 1,
    "log_every": 1,
    "eval_every": 1,
    "eval_sequences": 1,
    "save_every": 1,
    "keep_checkpoints": 0,
    "sample_every": 1,
    "sample_tokens": 1,
}
_MOST = {"seed": 2**63 - 1, "threads": 4096}
_AT_LEAST_ZERO = (
    "min_lr",
    "final_lr",
    "weight_decay",
    "bias_update_speed",
    "balance_loss_coef",
    "mtp_loss_coef",
    "final_mtp_loss_coef",
    "sample_temperature",
)
_ABOVE_ZERO = ("minutes", "lr", "adam_epsilon", "max_grad_norm")
_FROM_ZERO_BELOW_ONE = ("adam_beta1", "adam_beta2", "ema_decay")
_CHOICES = {
    "precision": ("fp32", "bf16", "fp8"),
    "moments_dtype": ("fp32", "bf16", None),
    "fp8_scales": ("float32", "ue8m0"),
    "fp8_gradient_tiles": ("1x128", "128x128"),
    "recompute": ("none", "selective", "full"),
}


def check_numbers(
    config: Any,
    *,
    integers: Mapping[str, int],
    at_least_zero: Sequence[str],
    above_zero: Sequence[str],
    from_zero_below_one: Sequence[str],
    choices: Mapping[str, Sequence[str | None]],
) -> None:
    """Check the fields of a config by name; InputError names the first that is wrong. `integers` gives their least values. A field
    whose type allows None may be None."""
    may_be_none = {field.name for field in fields(config) if "None" in str(field.type)}
    for name, least in integers.items():
        value = getattr(config, name)
        if value is None and name in may_be_none:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"field {name} is {value!r}, it must be a whole number of at least {least}")
        if value > _MOST.get(name, value):
            raise InputError(f"field {name} is {value!r}, it must be at most {_MOST[name]}")
    for name in (*at_least_zero, *above_zero, *from_zero_below_one):
        value = getattr(config, name)
        if value is None and name in may_be_none:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"field {name} is {value!r}, it must be a finite number")
        if value < 0 or (value == 0 and name in above_zero) or (value >= 1 and name in from_zero_below_one):
            wanted = "above 0" if name in above_zero else "at least 0"
            raise InputError(
                f"field {name} is {value!r}, it must be {wanted}{' and below 1' if name in from_zero_below_one else ''}"
            )
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise InputError(f"field {name} is {getattr(config, name)!r}, it must be one of {', '.join(filter(None, allowed))}")


def _check_numbers(c: PretrainConfig) -> None:
    check_numbers(
        c,
        integers=_INTEGERS,
        at_least_zero=_AT_LEAST_ZERO,
        above_zero=_ABOVE_ZERO,
        from_zero_below_one=_FROM_ZERO_BELOW_ONE,
        choices=_CHOICES,
    )
    if not isinstance(c.data_weights, tuple) or not all(isinstance(share, int | float) for share in c.data_weights):
        raise InputError(f"field data_weights is {c.data_weights!r}, it must be a list of numbers")
    for name in ("tokenizer", "init_from"):
        if getattr(c, name) is not None and not isinstance(getattr(c, name), str):
            raise InputError(f"field {name} is {getattr(c, name)!r}, it must be a directory")
    if not isinstance(c.device, str):
        raise InputError(f"field device is {c.device!r}, it must be a name such as cpu or cuda")
    for name in ("data", "sample_prompts"):
        if not isinstance(getattr(c, name), tuple) or not all(isinstance(item, str) for item in getattr(c, name)):
            raise InputError(f"field {name} is {getattr(c, name)!r}, it must be a list of texts")


def _check_together(c: PretrainConfig) -> None:
    limits = [name for name in ("steps", "tokens", "minutes") if getattr(c, name) is not None]
    if len(limits) != 1:
        given = " and ".join(limits) or "none of them"
        raise InputError(f"exactly one of the fields steps, tokens and minutes ends a run, but {given} is given; keep one")
    if c.precision != "fp8" and (c.fp8_scales, c.fp8_gradient_tiles) != ("float32", "1x128"):
        raise InputError(
            f"fields fp8_scales and fp8_gradient_tiles belong to precision fp8, but precision is {c.precision}; leave them out"
        )
    if c.sequence_length > c.model.max_position_embeddings:
        limit = c.model.max_position_embeddings
        raise InputError(
            f"field sequence_length is {c.sequence_length}, above the model's max_position_embeddings ({limit}); lower it"
        )
    if c.sequence_length <= c.model.num_nextn_predict_layers:
        depth = c.model.num_nextn_predict_layers
        raise InputError(f"field sequence_length is {c.sequence_length}, it must be above num_nextn_predict_layers ({depth})")
    if c.micro_batch_size > c.global_batch_size:
        raise InputError(
            f"field micro_batch_size is {c.micro_batch_size}, above global_batch_size ({c.global_batch_size}); lower it"
        )
    if c.initial_batch_size is not None and c.initial_batch_size > c.global_batch_size:
        raise InputError(f"field initial_batch_size is {c.initial_batch_size}, above global_batch_size ({c.global_batch_size})")
    if (c.initial_batch_size in (None, c.global_batch_size)) != (c.batch_ramp_tokens == 0):
        raise InputError(
            "a batch-size ramp needs initial_batch_size below global_batch_size and batch_ramp_tokens above 0, or neither"
        )
    if c.min_lr > c.lr or c.final_lr > c.min_lr:
        raise InputError(
            f"fields lr ({c.lr}), min_lr ({c.min_lr}) and final_lr ({c.final_lr}) must not rise; lower the later ones"
        )
    if c.bias_update_speed > 0 and not c.model.uses_expert_bias:
        routers = f"routers with topk_method {c.model.topk_method!r} have" if c.model.n_routed_experts else "a dense model has"
        raise InputError(f"field bias_update_speed is {c.bias_update_speed}, but {routers} no router bias; set it to 0")
    if c.data_weights and len(c.data_weights) != len(c.data):
        given = f"{len(c.data_weights)} values for {len(c.data)} directories of data"
        raise InputError(f"field data_weights has {given}; give one for each")
    if c.sample_prompts and c.tokenizer is None:
        raise InputError("field sample_prompts needs the field tokenizer: the directory of the tokenizer that wrote the shards")
