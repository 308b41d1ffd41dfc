"""Bytes that experts' all-to-all moves by hop, as V3 routes it: a token goes once to each node that holds some of its experts, over
the network, and from there over the links inside the node (V3 section 3.2.2)."""

from dataclasses import dataclass

from finback.config import ModelConfig
from finback.planner.hardware import GIGA, Hardware, Precision

COMBINE_BYTES = 2.0


def dispatch_bytes(precision: Precision) -> float:
    """Bytes of a value on its way to its experts: 1 where products are FP8, whose input is quantised before it leaves (V3 section
    3.3.3), else bf16's 2. Results come back in bf16."""
    return 1.0 if precision == "fp8" else 2.0


@dataclass(frozen=True)
class Hops:
    """One all-to-all round (dispatch and combine) of one token in one layer: how many copies leave and their bytes, by hop."""

    nodes: int
    copies_to_other_nodes: float
    copies_to_other_devices: float
    scale_out_bytes: float
    scale_up_bytes: float

    def seconds(self, hardware: Hardware) -> tuple[float, float]:
        """Seconds of one token on the network and on the links inside the node; they run at the same time, the longer counts."""
        share = hardware.efficiencies.network
        out = self.scale_out_bytes / (hardware.need("scale_out_gb_per_second") * GIGA * share) if self.scale_out_bytes else 0.0
        up = self.scale_up_bytes / (hardware.need("scale_up_gb_per_second") * GIGA * share) if self.scale_up_bytes else 0.0
        return out, up


def distinct(places: int, picks: int) -> float:
    """Expected number of different places that `picks` equally likely choices hit."""
    return places * (1.0 - (1.0 - 1.0 / places) ** picks)


def all_to_all(c: ModelConfig, devices: int, devices_per_node: int, dispatch_bytes: float) -> Hops:
    """Experts spread evenly over `devices`; `dispatch_bytes` is the size of a value on its way there (1 in FP8, 2 in bf16), results
    come back in bf16. With group-limited routing a token reaches at most `topk_group` nodes, where groups and nodes agree."""
    if devices == 1 or not c.n_routed_experts:
        return Hops(1, 0.0, 0.0, 0.0, 0.0)
    picks = c.num_experts_per_tok
    nodes = max(1, -(-devices // devices_per_node))
    reached_nodes = distinct(nodes, picks)
    if c.topk_method != "greedy" and c.n_group > 1:
        reached_nodes = (
            min(reached_nodes, distinct(min(nodes, c.topk_group), picks)) if c.topk_group >= nodes else float(c.topk_group)
        )
    other_nodes = reached_nodes * (nodes - 1) / nodes
    other_devices = distinct(devices, picks) * (devices - 1) / devices
    size = c.hidden_size * (dispatch_bytes + COMBINE_BYTES)
    return Hops(nodes, other_nodes, other_devices, other_nodes * size, other_devices * size)
