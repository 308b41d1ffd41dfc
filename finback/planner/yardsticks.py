"""Published and measured results that the planner is held against, each with its source. What a source leaves out is said here."""

from dataclasses import dataclass, replace
from typing import Literal

from finback.config import ModelConfig
from finback.planner.inference import Unit
from finback.planner.layout import Layout


@dataclass(frozen=True)
class Row:
    """One figure: what is published or measured, what the planner says, and how far it is off. `target` is the largest error that is
    asked for; `note` tells the likely cause where the error is above it."""

    name: str
    kind: Literal["exact", "predicted", "measured"]
    unit: str
    reference: float
    planner: float
    target: float
    source: str
    note: str = ""
    other_machine: str = ""
    """Measured rows: why the ceilings are not those of the machine that the figure is of, in one clause; empty where they are."""

    @property
    def error(self) -> float:
        """Relative to the reference."""
        return self.planner / self.reference - 1

    @property
    def met(self) -> bool:
        return abs(self.error) <= self.target + 1e-12


def told(row: Row, cause: str) -> Row:
    """The row, with the likely cause where it is off by more than asked."""
    return row if row.met else replace(row, note=cause)


@dataclass(frozen=True)
class Cluster:
    """A published training throughput of V3 with its layout; routing was forced to be even where `expert_imbalance` is 1."""

    name: str
    hardware: str
    layout: Layout
    precision: str
    global_batch_size: int
    tokens_per_second_per_device: float
    source: str
    if_off: str
    """The likely cause, told where the error is above the target."""


_MEGATRON = "Megatron-Bridge performance summary"
CLUSTERS = (
    Cluster(
        "V3 on 1,024 H100, Megatron-Bridge 25.09, FP8",
        "h100",
        Layout(1024, pp=8, ep=64, tp=2, schedule="interleaved", expert_imbalance=1.0),
        "fp8",
        8192,
        1297,
        _MEGATRON,
        "",
    ),
    Cluster(
        "V3 on 256 B200, Megatron-Bridge 26.02, MXFP8",
        "b200",
        Layout(256, pp=16, ep=8, schedule="one_f_one_b", expert_imbalance=1.0),
        "fp8",
        4096,
        2689,
        _MEGATRON,
        "the same container reaches 3,955 on GB200, whose chip is rated 11% higher (2,500 against 2,250 TFLOPS in bf16) and whose row "
        "the planner gives to 30%, so most of the gap is not the chip's: here PP is 16 without interleaving and EP 8, the host may set "
        "the pace, and the table does not say what is recomputed",
    ),
    Cluster(
        "V3 on 256 GB200, Megatron-Bridge 26.02, MXFP8",
        "gb200",
        Layout(256, pp=4, ep=64, schedule="interleaved", expert_imbalance=1.0),
        "fp8",
        4096,
        3955,
        _MEGATRON,
        "",
    ),
    Cluster(
        "V3 on 256 GB300, Megatron-Bridge 26.02, MXFP8",
        "gb300",
        Layout(256, pp=2, ep=32, schedule="interleaved", micro_batch_size=2, expert_imbalance=1.0),
        "fp8",
        4096,
        4612,
        _MEGATRON,
        "",
    ),
    Cluster(
        "V3 on 256 B200, torchtitan 2026-03 with DeepEP, bf16 (layout assumed)",
        "b200",
        Layout(256, pp=8, ep=32, schedule="interleaved", expert_imbalance=1.0),
        "bf16",
        2048,
        859,
        "PyTorch blog 2026-03",
        "a framework that is not tuned for this size: with MXFP8 products it reaches 918 where Megatron-Bridge, also in MXFP8 on 256 "
        "B200, reaches 2,689, and its own rows of the 16B model are at 20% of the peak; the layout is not published either",
    ),
)


@dataclass(frozen=True)
class Serving:
    """A published serving throughput, per node or per device."""

    name: str
    hardware: str
    phase: str  # "prefill" or "decode"
    unit: Unit
    batch: int
    tokens: float
    """Prompt in prefill, context in decode."""
    hit_share: float
    per_node: bool
    tokens_per_second: float
    source: str
    if_off: str


_DECODE = (
    "at equal batch a token takes 34.9 ms here and 47.6 ms there; the 88 requests follow from the day's averages (14,800 tokens/s of "
    "8 GPUs at 21 for each request) and the context of 4,989 is published, so neither can be the cause. Likely ones: load that is less "
    "even over 144 GPUs than the assumed 1.2, waiting for the slowest GPU at each exchange, batches that come and go, and the work of "
    "scheduling and sampling, none of which is published"
)
_DAY = (
    "a day's average over the nodes in use, few of which are full at night, while the planner gives a full node; the length of prompts "
    "is not published either (4,000 assumed)"
)
SERVINGS = (
    Serving(
        "DeepSeek online, prefill per H800 node, cache hits counted",
        *(
            "h800",
            "prefill",
            Unit(ep=32, redundant_experts=32),
            0,
            4000,
            342 / 608,
            True,
            73_700,
            "open-infra-index, day 6",
            _DAY,
        ),
    ),
    Serving(
        "DeepSeek online, decode per H800 node, 88 requests per GPU as 20-22 tokens/s imply",
        *("h800", "decode", Unit(ep=144, redundant_experts=32), 88, 4989, 0.0, True, 14_800, "open-infra-index, day 6", _DECODE),
    ),
    Serving(
        "SGLang, prefill per H100 node, 4 nodes",
        *("h100", "prefill", Unit(ep=32, redundant_experts=32), 0, 4000, 0.0, True, 52_300, "LMSYS blog 2025-05", ""),
    ),
    Serving(
        "SGLang, decode per H100 node, 9 nodes",
        *("h100", "decode", Unit(ep=72, redundant_experts=32), 256, 2050, 0.0, True, 22_300, "LMSYS blog 2025-05", ""),
    ),
    Serving(
        "vLLM wide EP, decode per H200 (16 GPUs, 128 requests each assumed)",
        *("h200", "decode", Unit(ep=16), 128, 4000, 0.0, False, 2_200, "vLLM blog 2025-12", ""),
    ),
)

# The model of the training and decoding comparisons (bench/peers.py), and SmolLM2-135M.
COMPARED = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=640,
    moe_intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    max_position_embeddings=4096,
    initializer_range=0.02,
)
SMOLLM2 = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    model_type="llama",
)
