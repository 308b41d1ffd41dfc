"""What post-training quantisation takes, and which matrices of a model it may touch. No torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from finback.config import InputError, ModelConfig, TensorSpec, checkpoint_tensors

BITS = (3, 4, 8)
NEVER = ("kv_a_proj_with_mqa", "kv_b_proj")  # small, and every head's keys and values pass through them


@dataclass(frozen=True)
class QuantConfig:
    """A grid of integers for each group of inputs of each output channel, and how the integers are chosen."""

    method: str = "gptq"
    """gptq corrects what rounding one column did by the columns after it; rtn rounds to nearest."""
    bits: int = 4
    """Bits of a weight: 3, 4 or 8."""
    group_size: int = 128
    """Inputs that share scale and zero point; it must divide the width of every quantised matrix. -1: the whole width."""
    sym: bool = True
    """The grid lies symmetric around zero; otherwise each group has a zero point of its own, an integer."""
    act_order: bool = False
    """Groups are formed of columns whose activations are of like size, the largest first, instead of neighbours (gptq only)."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""
    min_expert_tokens: int = 128
    """An expert that saw fewer calibration tokens than this is rounded to nearest."""

    def __post_init__(self) -> None:
        if self.method not in ("gptq", "rtn"):
            raise InputError(f"--method is {self.method!r}, it must be gptq or rtn")
        if self.bits not in BITS:
            raise InputError(f"--bits is {self.bits}, it must be one of {', '.join(map(str, BITS))}")
        if self.group_size < 1 and self.group_size != -1:
            raise InputError(f"--group-size is {self.group_size}, it must be positive, or -1 for one group as wide as the matrix")
        if not 0 < self.damping < 1:
            raise InputError(f"--damping is {self.damping}, it must lie between 0 and 1")
        if self.min_expert_tokens < 1:
            raise InputError(f"--min-expert-tokens is {self.min_expert_tokens}, it must be positive")
        if self.act_order and self.method == "rtn":
            raise InputError("--act-order is for gptq, rounding to nearest has no order; leave it out")


def quantised_weights(config: ModelConfig) -> list[TensorSpec]:
    """The matrices that are quantised: projections of attention and feed-forward, but never the latent ones; nor embedding, head,
    router, norms or `eh_proj`."""
    plain = {spec.name for spec in checkpoint_tensors(config, fp8=False) if spec.name.endswith("_proj.weight")}
    may_be = [spec for spec in checkpoint_tensors(config, fp8=True) if spec.dtype == "F8_E4M3" and spec.name in plain]
    return [spec for spec in may_be if spec.name.split(".")[-2] not in NEVER]


def check_fits(model: ModelConfig, config: QuantConfig) -> None:
    """InputError naming the first matrix that groups or whole words do not divide, and a size that does."""
    specs = quantised_weights(model)
    count = 32 // math.gcd(32, config.bits)
    common = math.gcd(*(spec.shape[1] for spec in specs))
    for spec in specs:
        outputs, width = spec.shape
        for axis, size in (("width", width), ("number of outputs", outputs)):
            if size % count:
                raise InputError(
                    f"{spec.name} has the {axis} {size}, and {config.bits} bits are packed {count} at a time, which does not divide "
                    "it; choose other --bits"
                )
        if config.group_size > 0 and width % config.group_size:
            fits = max(d for d in range(1, common + 1) if common % d == 0 and d <= config.group_size)
            raise InputError(
                f"--group-size is {config.group_size}, which does not divide the width {width} of {spec.name}; {fits} divides every "
                "matrix of this model"
            )


def packed_specs(spec: TensorSpec, config: QuantConfig) -> Iterator[TensorSpec]:
    """The four tensors in which a weight [out, in] is stored."""
    outputs, width = spec.shape
    groups = 1 if config.group_size == -1 else width // config.group_size
    module = spec.name.removesuffix(".weight")
    yield TensorSpec(f"{module}.qweight", (width * config.bits // 32, outputs), "I32")
    yield TensorSpec(f"{module}.qzeros", (groups, outputs * config.bits // 32), "I32")
    yield TensorSpec(f"{module}.scales", (groups, outputs), "F16")
    yield TensorSpec(f"{module}.g_idx", (width,), "I32")


def stored_specs(model: ModelConfig, config: QuantConfig) -> list[TensorSpec]:
    """Every tensor of the quantised checkpoint, in the order of the plain one."""
    chosen = {spec.name for spec in quantised_weights(model)}
    specs: list[TensorSpec] = []
    for spec in checkpoint_tensors(model, fp8=False):
        specs.extend(packed_specs(spec, config) if spec.name in chosen else (spec,))
    return specs


def published_config(model: ModelConfig, config: QuantConfig) -> dict[str, object]:
    """config.json of the quantised checkpoint; `dynamic` tells other loaders which projections are plain."""
    quantization: dict[str, object] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.act_order,
        "sym": config.sym,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "damp_percent": config.damping,
    }
    if model.kv_lora_rank:
        names = (*NEVER, *(("eh_proj",) if model.num_nextn_predict_layers else ()))
        quantization["dynamic"] = {rf"-:.*\.{name}$": {} for name in names}
    return {**model.to_dict(), "quantization_config": quantization}
