"""How much memory a run will need at its peak, by formula, and whether it is there: told before the run starts.

Activations are counted tensor by tensor as the model's operations keep them for backward. What comes and goes within a step is taken
a quarter larger: allocators cannot use all of the gaps. Not counted are the libraries themselves. On small models the estimate has been
within a factor of 1.5 of the measured peak (`tests/train/test_memory.py` holds it to that).
"""

from dataclasses import dataclass, replace

from finback.config import InputError, ModelConfig, count_params
from finback.train.config import PretrainConfig

_GIB = 2**30
_LOGITS_AT_ONCE = 1 << 22  # as in ops.cross_entropy
_LOGITS_COPIES_BYTES = 12  # products, log-probabilities and their gradient, in float32
_WITH_GAPS = 1.25


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a step."""

    parameters: int
    gradients: int
    moments: int
    low_precision_weights: int
    """Copies of the weights that autocast makes for the matrix products."""
    activations: int
    """Of one micro-batch, with what backward needs on the way."""
    head: int
    """Logits of one chunk, gradients of head and hidden states."""
    moving_average: int
    """In host memory, always."""

    @property
    def on_device(self) -> int:
        """Everything but the moving average."""
        return self.parameters + self.gradients + self.moments + self.low_precision_weights + self.activations + self.head


def estimate_memory(config: PretrainConfig) -> MemoryEstimate:
    """Peak memory of a run on one device."""
    m = config.model
    counts = count_params(m)
    shared = m.num_nextn_predict_layers * 2 * m.vocab_size * m.hidden_size  # stored twice, held once
    parameters = counts.total + counts.mtp - shared
    low = 4 if config.precision == "fp32" else 2
    tokens = config.micro_batch_size * config.sequence_length
    head_passes = 1 + m.num_nextn_predict_layers
    logits = min(_LOGITS_AT_ONCE, tokens * m.vocab_size) * _LOGITS_COPIES_BYTES
    return MemoryEstimate(
        parameters=4 * parameters,
        gradients=4 * parameters,
        moments=2 * parameters * (2 if config.moments == "bf16" else 4),
        low_precision_weights=0 if config.precision == "fp32" else 2 * parameters,
        activations=int(_WITH_GAPS * tokens * _activation_bytes(m, low, config.recompute)),
        head=int(_WITH_GAPS * (logits + head_passes * (4 * m.vocab_size * m.hidden_size + low * tokens * m.hidden_size))),
        moving_average=4 * parameters if config.ema_decay is not None else 0,
    )


def _activation_bytes(m: ModelConfig, low: int, recompute: str) -> int:
    """Bytes per token that forward leaves behind for backward, and that backward needs on its way."""
    dense, moe = (_block_bytes(m, low, is_moe, recompute == "selective") for is_moe in (False, True))
    widest = max(_block_bytes(m, low, is_moe, False) for is_moe in (m.num_moe_layers == 0, m.num_moe_layers > 0))
    mtp_input = low * 4 * m.hidden_size
    if recompute == "full":
        dense = moe = low * m.hidden_size
    layers = m.first_k_dense_replace * dense + m.num_moe_layers * moe
    mtp = m.num_nextn_predict_layers * (moe + mtp_input)
    # Backward frees what it has used: on top of it come one block's gradients, and the block itself where it is rebuilt.
    in_backward = widest * (2 if recompute == "full" else 1)
    return layers + mtp + in_backward + low * 2 * m.hidden_size


def _block_bytes(m: ModelConfig, low: int, is_moe: bool, selective: bool) -> int:
    """One block: what each operation saves, in elements of `low` bytes; router and its indices are wider."""
    residual = 2 * m.hidden_size
    normalised = 2 * m.hidden_size
    attention_kept, attention_rebuilt = _attention_elements(m)
    if is_moe:
        routed = m.num_experts_per_tok * m.moe_intermediate_size
        width = routed + m.n_shared_experts * m.moe_intermediate_size
        gathered = m.num_experts_per_tok * m.hidden_size
        router = 4 * m.hidden_size * (low != 4) + 8 * m.n_routed_experts + 48 * m.num_experts_per_tok
    else:
        width, gathered, router = m.intermediate_size, 0, 0
    kept = residual + attention_kept + gathered + 2 * width
    if not selective:
        kept += normalised + attention_rebuilt + width
    return low * kept + router


def _attention_elements(m: ModelConfig) -> tuple[int, int]:
    """What attention keeps per token always, and what selective recomputation builds again."""
    heads = m.num_attention_heads
    if not m.kv_lora_rank:
        query_and_key, value = (heads + m.num_key_value_heads) * m.head_dim, m.num_key_value_heads * m.head_dim
        # Before the norms of query and key where there are any: what comes after them and after rotation can be built again.
        return query_and_key + value + heads * m.head_dim, query_and_key if m.uses_qk_norm else 0
    key = max(m.qk_head_dim, m.v_head_dim)
    compressed = m.kv_lora_rank + m.qk_rope_head_dim + (m.q_lora_rank or 0)
    normalised_latents = m.kv_lora_rank + (m.q_lora_rank or 0)
    expanded = heads * (2 * key + m.qk_nope_head_dim + m.v_head_dim)
    return compressed + heads * m.v_head_dim, normalised_latents + expanded


def check_memory(config: PretrainConfig, device: str, available: int | None) -> MemoryEstimate:
    """The estimate; InputError with the field to lower if it is above `available` bytes of `device` ("cpu", "cuda:0").

    The device is a word, so that `finback doctor` prices the presets without torch.
    """
    estimate = estimate_memory(config)
    needed = _needed(estimate, device)
    if available is None or needed <= available:
        return estimate
    problem = f"this run needs about {needed / _GIB:.1f} GiB on {device} and {available / _GIB:.1f} are available"
    micro = config.micro_batch_size
    while micro > 1:
        micro //= 2
        if _needed(estimate_memory(replace(config, micro_batch_size=micro)), device) <= available:
            raise InputError(
                f"{problem}; lower micro_batch_size from {config.micro_batch_size} to {micro} (the result stays the same)"
            )
    smallest = replace(config, micro_batch_size=1)
    for recompute in ("selective", "full"):
        if _needed(estimate_memory(replace(smallest, recompute=recompute)), device) <= available:
            raise InputError(f"{problem}; set micro_batch_size to 1 and recompute to {recompute} (the result stays the same)")
    length = config.sequence_length
    least = config.model.num_nextn_predict_layers + 1
    while length // 2 >= least:
        length //= 2
        if _needed(estimate_memory(replace(smallest, recompute="full", sequence_length=length)), device) <= available:
            raise InputError(f"{problem}; set micro_batch_size to 1, recompute to full, and lower sequence_length to {length}")
    remedy = "take a smaller model" if config.moments == "bf16" else "take a smaller model or moments_dtype bf16"
    raise InputError(f"{problem}; weights, gradients and moments alone are too large: {remedy}")


def _needed(estimate: MemoryEstimate, device: str) -> int:
    return estimate.on_device + (estimate.moving_average if device.startswith("cpu") else 0)
