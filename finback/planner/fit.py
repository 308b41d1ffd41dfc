"""What fits on one card or laptop: at which precision, with how much context, and how fast it can write."""

from dataclasses import dataclass

from finback.planner.hardware import Hardware
from finback.planner.model import WEIGHT_BYTES

USABLE = 0.9


@dataclass(frozen=True)
class Published:
    """A published model by what counts for memory: parameters in all and per token, bytes that a cached token takes in bf16, and its
    longest context."""

    name: str
    parameters: float
    active_parameters: float
    cache_bytes_per_token: float
    longest_context: int


def _gqa(layers: int, groups: int, head: int) -> float:
    return 4.0 * layers * groups * head


PUBLISHED = (
    Published("R1-Distill-Qwen-1.5B", 1.78e9, 1.54e9, _gqa(28, 2, 128), 131072),
    Published("R1-Distill-Qwen-7B", 7.62e9, 7.07e9, _gqa(28, 4, 128), 131072),
    Published("R1-Distill-Llama-8B", 8.03e9, 7.5e9, _gqa(32, 8, 128), 131072),
    Published("R1-Distill-Qwen-14B", 14.77e9, 13.99e9, _gqa(48, 8, 128), 131072),
    Published("DeepSeek-V2-Lite", 15.706e9, 2.45e9, 27 * 576 * 2.0, 163840),
    Published("R1-Distill-Qwen-32B", 32.76e9, 31.98e9, _gqa(64, 8, 128), 131072),
    Published("R1-Distill-Llama-70B", 70.55e9, 69.5e9, _gqa(80, 8, 128), 131072),
    Published("DeepSeek-V3 / R1", 671.026e9, 36.626e9, 61 * 576 * 2.0, 163840),
)


@dataclass(frozen=True)
class FitRow:
    """One model at one precision on one device; `most_context_tokens` is 0 where the weights alone do not fit.
    `tokens_per_second` is one
    request's, bound by reading weights and cache, at the context asked for."""

    model: str
    precision: str
    weights_gb: float
    most_context_tokens: int
    context_tokens: int
    fits: bool
    tokens_per_second: float


def fit_table(hardware: Hardware, context: int, models: tuple[Published, ...] = PUBLISHED) -> list[FitRow]:
    """Every model at every precision on one device of this hardware."""
    rows = []
    for model in models:
        for precision in ("bf16", "fp8", "int4"):
            weights = model.parameters * WEIGHT_BYTES[precision]
            left = USABLE * hardware.memory_bytes - weights
            most = max(0, min(model.longest_context, int(left / model.cache_bytes_per_token)))
            read = model.active_parameters * WEIGHT_BYTES[precision] + context * model.cache_bytes_per_token
            rows.append(
                FitRow(
                    model=model.name,
                    precision=precision,
                    weights_gb=weights / 1e9,
                    most_context_tokens=most,
                    context_tokens=context,
                    fits=most >= context,
                    tokens_per_second=hardware.bytes_per_second * hardware.efficiencies.busy / read,
                )
            )
    return rows
