"""Hardware as data: what makers and papers publish about each device, with its source; what nobody publishes is None.

Rates are of one device, dense (no sparsity), one direction for links. Each row carries one set of `Efficiencies`: the share of a
peak that real kernels reach. A row's set holds for every question asked of it, and no published result of training or serving
V3 went into it: the shares come from kernel benchmarks, and where there is none the note says that it is assumed.
"""

from dataclasses import dataclass, field, fields
from itertools import pairwise
from math import log
from typing import Literal

from finback.config import InputError, nearest

Precision = Literal["fp32", "bf16", "fp8", "int4"]
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Efficiencies:
    """Shares of the peaks that are reached.

    `matmul` and `fp8_matmul` of the matrix peaks, `attention_forward` and `attention_backward` of the bf16 peak, `memory` of the
    bandwidth, `network` of the links (`low_latency_network` with decode's small messages); `busy` is the share of time in which
    kernels run at all (launches, stragglers, uneven experts); `communication_cores` is the share of the processor that
    all-to-all kernels occupy while they run.
    """

    matmul: float = 0.70
    fp8_matmul: float = 0.60
    attention_forward: float = 0.59
    attention_backward: float = 0.40
    memory: float = 0.90
    network: float = 0.90
    low_latency_network: float = 0.78
    busy: float = 0.85
    communication_cores: float = 20 / 132


Curve = tuple[tuple[float, float], ...]


def on_curve(curve: Curve, size: float) -> float:
    """The value at `size` of points (size, value) in rising order: lines over the logarithm of the size, level beyond the ends."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (left, low), (right, high) in pairwise(curve):
        if size <= right:
            return low + (high - low) * log(size / left) / log(right / left)
    return curve[-1][1]


@dataclass(frozen=True)
class SmallWork:
    """What small models cost where it was measured; a data sheet knows nothing of it. Shares are those of the matrix peak that
    products of so narrow a matrix reach in training, of experts with their fewer rows. What a step takes without any work is Python,
    dispatch and bookkeeping."""

    product_shares: Curve
    expert_shares: Curve
    head_shares: Curve
    """By the vocabulary, of the output head with its loss: what logits cost besides their products is in it."""
    decode_shares: Curve
    """By the rows of a step, of matrices that are not narrow."""
    read_bytes_per_second: Curve
    """By the bytes that are read again and again: what fits a cache is read faster."""
    weight_bytes_per_second: Curve
    """The same of weights by products of one row, which read memory more slowly than a sum does."""
    mixture_training: float
    """Of the rates above, what a training step of a model with latent attention and experts reaches: its many passes over small tensors
    (routing, gathers, casts, norms) are in no other row."""
    mixture_decoding: Curve
    """The same of a step of the engine, by its rows."""
    training_layer_seconds: float
    engine_step_seconds: float
    engine_row_seconds: float
    engine_layer_seconds: float
    engine_layer_row_seconds: float
    greedy_value_seconds: float
    """Of each logit of each row."""
    sampled_value_seconds: float


@dataclass(frozen=True)
class Hardware:
    """One device, and how it is connected; None where no figure is published."""

    name: str
    title: str
    memory_gb: float | None
    memory_gb_per_second: float | None
    bf16_tflops: float | None
    fp8_tflops: float | None
    scale_up_gb_per_second: float | None
    """To the other devices of a node (NVLink, HCCS, PCIe), per direction."""
    devices_per_node: int
    scale_out_gb_per_second: float | None
    """To other nodes, per device and direction."""
    power_watts: float | None
    usd_per_hour: float | None
    """Rent of one device for an hour."""
    source: str
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    efficiency_source: str = "assumed as Hopper's"
    exchange_latency_us: float = 10.0
    """Fixed part of one exchange between devices, besides its bytes: some network latencies of 3 us (V3 hardware paper) and a
    launch."""
    small_work: SmallWork | None = None
    """Measured hardware only."""

    @property
    def unknown(self) -> list[str]:
        """Fields without a published figure."""
        return [f.name for f in fields(self) if getattr(self, f.name) is None and f.name != "small_work"]

    def need(self, name: str) -> float:
        """A figure, or InputError where there is none."""
        value = getattr(self, name)
        if value is None:
            raise InputError(
                f"hardware {self.name} has no published {name}; take one that has, {_first_with(name)!r} for instance"
            )
        return float(value)

    def peak_flops(self, precision: Precision) -> float:
        """FLOP per second of matrix products. Without FP8 units FP8 weights are multiplied in bf16; fp32 has a row of its own only
        in measured hardware, elsewhere it runs at half of bf16 (TF32)."""
        bf16 = self.need("bf16_tflops") * TERA
        if precision == "fp8" and self.fp8_tflops is not None:
            return self.fp8_tflops * TERA
        return bf16 / 2 if precision == "fp32" else bf16

    def matmul_flops(self, precision: Precision, width: float = float("inf"), *, experts: bool = False) -> float:
        """FLOP per second that matrix products really reach; on measured hardware those of matrices as narrow as `width`, of `experts`
        with a part of the rows each."""
        if self.small_work is not None:
            curve = self.small_work.expert_shares if experts else self.small_work.product_shares
            return self.peak_flops(precision) * on_curve(curve, width)
        share = self.efficiencies.fp8_matmul if precision == "fp8" and self.fp8_tflops is not None else self.efficiencies.matmul
        return self.peak_flops(precision) * share

    def head_flops(self, precision: Precision, vocabulary: float) -> float:
        """The same of the output head; on measured hardware the loss is in it."""
        if self.small_work is not None:
            return self.peak_flops(precision) * on_curve(self.small_work.head_shares, vocabulary)
        return self.matmul_flops(precision)

    def decode_flops(self, precision: Precision, rows: float) -> float:
        """The same of the engine's products for `rows` rows."""
        if self.small_work is not None:
            return self.peak_flops(precision) * on_curve(self.small_work.decode_shares, rows)
        return self.matmul_flops(precision)

    def busy(self, experts: bool) -> float:
        """The share of kernel time in all time, idle times that are counted apart left out; `experts`: of a model that has some."""
        return self.efficiencies.busy * (self.small_work.mixture_training if self.small_work and experts else 1.0)

    def busy_decoding(self, experts: bool, rows: float) -> float:
        """The same of a decode step."""
        return self.efficiencies.busy * (on_curve(self.small_work.mixture_decoding, rows) if self.small_work and experts else 1.0)

    @property
    def bytes_per_second(self) -> float:
        """Bytes per second that memory really gives."""
        return self.need("memory_gb_per_second") * GIGA * self.efficiencies.memory

    def read_bytes_per_second(self, touched: float) -> float:
        """The same where the same `touched` bytes are read again and again: those that fit a measured cache come faster."""
        if self.small_work is None:
            return self.bytes_per_second
        return max(self.bytes_per_second, on_curve(self.small_work.read_bytes_per_second, touched))

    def weight_bytes_per_second(self, touched: float) -> float:
        """The same of weights in decoding."""
        return self.bytes_per_second if self.small_work is None else on_curve(self.small_work.weight_bytes_per_second, touched)

    @property
    def memory_bytes(self) -> float:
        """Bytes of one device's memory."""
        return self.need("memory_gb") * GIGA


_HOPPER = (
    "fp8_matmul: harmonic mean of DeepGEMM's rows at 4,096 rows for V3's shapes, 1,182 of 1,979; "
    "attention_forward: FlashMLA 580 of 989; "
    "memory: FlashMLA 3,000 of 3,350; network: DeepEP 46 of 50, low latency 39; communication_cores: 20 of 132 SMs (V3 section 3.2.2); "
    "attention_backward as on B200 relative to forward; matmul and busy are assumed"
)
_BLACKWELL = (
    "attention: FlashMLA's dense MHA on B200, 1,460 forward and 1,000 backward of 2,250; the rest as Hopper's, which gives the "
    "published dense Llama 3 8B rows of Megatron-Bridge on H100 and B200 to 15%"
)
_BLACKWELL_SET = Efficiencies(attention_forward=0.65, attention_backward=0.44)

ROWS = (
    Hardware(
        *("h800", "NVIDIA H800 SXM", 80, 3350, 989, 1979, 160, 8, 50, 700, 2.0),
        source="V3 section 3.1 (links, 160 and 50 GB/s as reached), table 1 ($2); the rest as H100",
        efficiency_source=_HOPPER,
    ),
    Hardware(
        *("h100", "NVIDIA H100 SXM", 80, 3350, 989, 1979, 400, 8, 50, 700, 2.0),
        source="NVIDIA H100 Tensor Core GPU data sheet, SXM, sparse rates halved; NVLink 450 less protocol as H800's 160 of 200; "
        "one ConnectX-7 of 400 Gb/s each as in DGX H100; $2 as in the LMSYS report of 2025-05",
        efficiency_source=_HOPPER,
    ),
    Hardware(
        *("h200", "NVIDIA H200 SXM", 141, 4800, 989, 1979, 400, 8, 50, 700, None),
        source="NVIDIA H200 Tensor Core GPU data sheet, SXM, sparse rates halved; links as H100",
        efficiency_source=_HOPPER,
    ),
    Hardware(
        *("a100", "NVIDIA A100 SXM 80 GB", 80, 2039, 312, None, 240, 8, 25, 400, None),
        source="NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM; NVLink 300 less protocol, "
        "one HDR link of 200 Gb/s each as in DGX A100",
    ),
    Hardware(
        *("b200", "NVIDIA B200 SXM", 180, 8000, 2250, 4500, 720, 8, 50, 1000, None),
        source="NVIDIA DGX B200 data sheet by eight (1,440 GB, 64 TB/s, FP8 72 PFLOPS sparse); "
        "1,000 W of HGX B200; NVLink 900 less protocol",
        efficiencies=_BLACKWELL_SET,
        efficiency_source=_BLACKWELL,
    ),
    Hardware(
        *("gb200", "NVIDIA GB200 NVL72", 186, 8000, 2500, 5000, 720, 72, 50, 1200, None),
        source="NVIDIA GB200 NVL72 product page by 72 (13.4 TB, 576 TB/s, FP8 720 PFLOPS sparse); 1,200 W by third parties",
        efficiencies=_BLACKWELL_SET,
        efficiency_source=_BLACKWELL,
    ),
    Hardware(
        *("gb300", "NVIDIA GB300 NVL72", 279, 8000, 2500, 5000, 720, 72, 100, 1400, None),
        source="NVIDIA GB300 NVL72 product page by 72 (20 TB, 576 TB/s, FP8 720 PFLOPS sparse, "
        "800 Gb/s each); 1,400 W by third parties",
        efficiencies=_BLACKWELL_SET,
        efficiency_source=_BLACKWELL,
    ),
    Hardware(
        *("h20", "NVIDIA H20", 96, 4000, 148, 296, 400, 8, 50, 400, None),
        source="third parties (TweakTown 2024-01, and others alike); the maker publishes no data sheet; NVLink as H100",
    ),
    Hardware(
        *("rtx4090", "NVIDIA GeForce RTX 4090", 24, 1008, 165, 330, 25, 8, None, 450, None),
        source="NVIDIA Ada GPU architecture white paper, appendix A (fp32 accumulation, dense); PCIe 4.0 x16 less protocol; no network",
    ),
    Hardware(
        *("ascend910b", "Huawei Ascend 910B", 64, 1600, 376, None, 196, 8, 25, None, None),
        source="as one of the two dies of a 910C; variants differ, and the maker publishes no full data sheet",
    ),
    Hardware(
        *("ascend910c", "Huawei Ascend 910C", 128, 3200, 752, None, 392, 8, 50, None, None),
        source="CloudMatrix384 paper (arXiv:2506.12708), section 3: two dies of 376 TFLOPS, 64 GB, 1.6 TB/s, "
        "196 GB/s and 200 Gb/s each; links as the peaks there, eight to a node though 384 share them",
    ),
    Hardware(
        *("hygon-k100", "Hygon DCU K100-AI", 64, 896, 196, None, None, 8, None, 350, None),
        source="third-party reports (resellers' lists), variants differ; links are not published",
    ),
    Hardware(
        *("laptop-rtx4070", "laptop with GeForce RTX 4070 (8 GB)", 8, 256, 60, 120, None, 1, None, 115, None),
        source="NVIDIA's comparison of GeForce RTX 40 laptops for memory and power; matrix rates "
        "depend on the limit, here half of a desktop RTX 4070's",
    ),
    Hardware(
        *("laptop-m3max", "Apple laptop, M3 Max, 128 GB", 128, 400, 28, None, None, 1, None, 80, None),
        source="Apple's technical specifications of the MacBook Pro 2023 for memory (shared with the system); "
        "the GPU's rate and power by third parties",
    ),
    Hardware(
        *("laptop-cpu", "laptop CPU, 32 GB DDR5-5600", 32, 89.6, None, None, None, 1, None, 45, None),
        source="JEDEC DDR5-5600 by two channels of 8 bytes; matrix rates differ too much to give one: --hardware measured",
    ),
)
HARDWARE = {row.name: row for row in ROWS}
"""The rows by the names of the command line."""


def _first_with(name: str) -> str:
    """The first row that has the figure."""
    return next(row.name for row in ROWS if getattr(row, name) is not None)


def find_hardware(name: str) -> Hardware:
    """A row by its name.

    Raises:
        InputError: an unknown name, with the nearest.
    """
    if name not in HARDWARE:
        known = [*HARDWARE, "measured"]
        hint = nearest(name.lower(), known) or f"; known are {', '.join(known)}"
        raise InputError(f"--hardware is {name!r}, which is unknown{hint}")
    return HARDWARE[name]
