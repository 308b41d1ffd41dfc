"""How fast training could be: FLOPs per token by formula, and what this machine's matrix product really reaches."""

import functools
import time

import torch

from finback.config import ModelConfig
from finback.ops.products import mm
from finback.train.config import Precision

_TIMED_RUNS = 8


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of forward and backward per trained token: 3 x 2 x the multiplications of the forward matrix products.

    Attention is counted causally (a token sees T / 2 others on average), MTP and both uses of the head are included, recomputation
    is not: what is compared with it is useful work.
    """
    c = config
    attention = _attention_products(c, sequence_length)
    dense = 3 * c.hidden_size * c.intermediate_size
    experts = 3 * c.hidden_size * c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts)
    moe = experts + c.hidden_size * c.n_routed_experts
    head = c.vocab_size * c.hidden_size
    mtp = c.num_nextn_predict_layers * (attention + moe + 2 * c.hidden_size**2 + head)
    main = c.num_hidden_layers * attention + c.first_k_dense_replace * dense + c.num_moe_layers * moe + head
    return 6.0 * (main + mtp)


def _attention_products(c: ModelConfig, sequence_length: int) -> float:
    heads = c.num_attention_heads
    if not c.kv_lora_rank:
        projections = 2 * c.hidden_size * (heads + c.num_key_value_heads) * c.head_dim
        return projections + heads * 2 * c.head_dim * (sequence_length + 1) / 2
    query = c.hidden_size * heads * c.qk_head_dim
    if c.q_lora_rank is not None:
        query = c.q_lora_rank * (c.hidden_size + heads * c.qk_head_dim)
    latent = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim)
    expand = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    output = heads * c.v_head_dim * c.hidden_size
    scores = heads * (c.qk_head_dim + c.v_head_dim) * (sequence_length + 1) / 2
    return query + latent + expand + output + scores


def matmul_flops(precision: Precision, device: torch.device) -> float:
    """FLOP per second of large matrix products in the run's precision: the ceiling that `mfu` refers to.

    Measured once a process for each precision, device and number of threads: the stages of a recipe refer to one ceiling.
    """
    return _measure_matmul_flops(precision, device, torch.get_num_threads())


@functools.cache
def _measure_matmul_flops(precision: Precision, device: torch.device, threads: int) -> float:
    """The best of a few products on that many threads, which are set."""
    rows, size = (8192, 8192) if device.type == "cuda" else (2048, 1024)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    left = torch.randn(rows, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    right = left[:size].clone()
    best = float("inf")
    for _ in range(_TIMED_RUNS):
        _wait(device)
        start = time.perf_counter()
        mm(left, right.T)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows * size * size / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
