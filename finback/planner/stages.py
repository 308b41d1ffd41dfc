"""Which layers each pipeline stage holds: 61 layers on 16 stages are not even, and the last stage has the output head and the MTP
layers besides."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from finback.config import InputError, ModelConfig
from finback.planner.model import attention_core_flops, shape

USUAL_CONTEXT = 2048.5  # tokens that one attends to at V3's 4,096, for the weight of attention among the products


@dataclass(frozen=True)
class Stage:
    """One part of the pipeline. `layers` are decoder layers, `mtp_layers` come after the head's; parameters are those of all devices
    that share the stage, `forward_flops` those of one token."""

    layers: int
    mtp_layers: int
    rest_parameters: float
    """Everything but routed experts; embedding and head where the stage has them."""
    expert_parameters: float
    forward_flops: float

    @property
    def layers_in_all(self) -> int:
        return self.layers + self.mtp_layers


@lru_cache(maxsize=1024)
def stages_of(c: ModelConfig, num_stages: int, stage_layers: tuple[int, ...] | None) -> tuple[Stage, ...]:
    """The stages with so many layers each; None: as even in time as whole layers allow.

    Raises:
        InputError: a list that does not have one entry for each stage, or does not add up to the model's layers.
    """
    counts = balanced(c, num_stages) if stage_layers is None else stage_layers
    _check(c, num_stages, counts)
    s, experts = shape(c), float(c.n_routed_experts)
    found, first = [], 0
    for number, layers in enumerate(counts):
        dense = max(0, min(c.first_k_dense_replace, first + layers) - first) if experts else layers
        mixed, last = layers - dense, number == num_stages - 1
        mtp = c.num_nextn_predict_layers if last else 0
        ends = (s.embedding if number == 0 else 0) + (s.embedding if last and not (c.tie_word_embeddings and number == 0) else 0)
        moe = mixed + (mtp if experts else 0)
        shared = s.router + c.n_shared_experts * s.expert if experts else 0
        joined = mtp * 2 * c.hidden_size**2
        found.append(
            Stage(
                layers=layers,
                mtp_layers=mtp,
                rest_parameters=(layers + mtp) * s.attention + dense * s.dense + moe * shared + joined + ends,
                expert_parameters=moe * experts * s.expert,
                forward_flops=sum(_layer_flops(c)[first : first + layers]) + (_end_flops(c) if last else 0.0),
            )
        )
        first += layers
    return tuple(found)


def _layer_flops(c: ModelConfig) -> list[float]:
    """Forward FLOPs of one token in each decoder layer."""
    s = shape(c)
    core = 2.0 * s.attention + attention_core_flops(c, USUAL_CONTEXT)
    mixed = 2.0 * (s.router + (c.num_experts_per_tok + c.n_shared_experts) * s.expert) if c.n_routed_experts else 0.0
    dense = c.first_k_dense_replace if c.n_routed_experts else c.num_hidden_layers
    return [core + (2.0 * s.dense if layer < dense else mixed) for layer in range(c.num_hidden_layers)]


def _end_flops(c: ModelConfig) -> float:
    """Of the last stage's additions: the head, and the MTP layers with theirs."""
    s, mtp = shape(c), c.num_nextn_predict_layers
    layer = _layer_flops(c)[-1] + 4.0 * c.hidden_size**2
    return 2.0 * (1 + mtp) * s.embedding + mtp * layer


def balanced(c: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage such that the busiest has as little to do as possible, and the others are as even as they can be. Each
    stage has a layer, but the last, which may have its head alone."""
    return _balanced(tuple(_layer_flops(c)), _end_flops(c), num_stages)


@lru_cache(maxsize=256)
def _balanced(layers: tuple[float, ...], end: float, num_stages: int) -> tuple[int, ...]:
    """By dynamic programming over the place of each cut; loads are compared by their largest, then by their squares."""
    total = len(layers)
    if num_stages == 1:
        return (total,)
    before = [0.0]
    for load in layers:
        before.append(before[-1] + load)
    longest = -(-total // (num_stages - 1)) + 2
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for number in range(num_stages):
        last = number == num_stages - 1
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for start, (worst, squares, counts) in best.items():
            ends = (total,) if last else range(start + 1, min(total, start + longest) + 1)
            for stop in ends:
                load = before[stop] - before[start] + (end if last else 0.0)
                rated = (max(worst, load), squares + load * load, (*counts, stop - start))
                if stop not in found or rated < found[stop]:
                    found[stop] = rated
        best = found
    return best[total][2] if total in best else ()


def _check(c: ModelConfig, num_stages: int, counts: Sequence[int]) -> None:
    layers = c.num_hidden_layers
    if not counts:
        raise InputError(f"the layout makes {num_stages} stages of {layers} layers; take at most {layers + 1} stages")
    told = f"--stage-layers {' '.join(map(str, balanced(c, num_stages)))}"
    if len(counts) != num_stages:
        raise InputError(f"--stage-layers has {len(counts)} numbers for {num_stages} stages; the most even is {told}")
    if min(counts) < 0:
        raise InputError(f"--stage-layers holds {min(counts)}, a stage has at least 0 layers; the most even is {told}")
    if sum(counts) != layers:
        raise InputError(f"--stage-layers must be {layers} layers in all and is {sum(counts)}; the most even is {told}")


def scales(stages: Sequence[Stage]) -> tuple[float, ...]:
    """The time of each stage by the mean."""
    mean = sum(stage.forward_flops for stage in stages) / len(stages)
    return tuple(stage.forward_flops / mean for stage in stages)
