"""The time of prefill and of a decode step on one device of a serving unit, by component."""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm

from finback.config import InputError, ModelConfig, count_params
from finback.planner.communication import COMBINE_BYTES, all_to_all, dispatch_bytes
from finback.planner.hardware import GIGA, ROWS, Hardware, Precision
from finback.planner.layout import nearest_divisor
from finback.planner.model import WEIGHT_BYTES, absorbed_core_flops, attention_core_flops, cache_bytes_per_token, shape
from finback.planner.step import elementwise_bytes, product_seconds

RESERVED = 0.10  # of memory: activations, communication buffers, graphs


@dataclass(frozen=True)
class Unit:
    """Devices that serve together: experts spread over `ep` of them, attention replicated (data-parallel); or each layer cut over `tp`.
    `redundant_experts` are copies that even out the load (V3 section 3.4)."""

    ep: int = 1
    tp: int = 1
    redundant_experts: int = 0
    expert_imbalance: float = 1.2

    @property
    def devices(self) -> int:
        return max(self.ep, self.tp)

    @property
    def sharing(self) -> int:
        """Devices that work on the same request: all of a cut unit, one of a unit with spread experts."""
        return self.tp if self.ep == 1 else 1


def check_unit(c: ModelConfig, unit: Unit, field: str = "--ep", beside: int = 1) -> None:
    """Refuse what does not divide, with the nearest value that does. `field` is the word of the command line for `unit.ep`; the number
    of copies that is offered also suits the `beside` devices of another unit."""
    for name, value, least in (
        (field, unit.ep, 1),
        ("--tp", unit.tp, 1),
        ("--redundant-experts", unit.redundant_experts, 0),
    ):
        if value < least:
            raise InputError(f"{name} is {value}, it must be at least {least}")
    if not c.n_routed_experts:
        if unit.ep > 1:
            raise InputError(f"{field} is {unit.ep}, but the model is dense; use 1, and --tp to cut it")
        if unit.redundant_experts:
            raise InputError(f"--redundant-experts is {unit.redundant_experts}, but the model is dense; use 0")
    if unit.ep > 1 and unit.tp > 1:
        raise InputError(f"--tp is {unit.tp}, but experts are spread over {field} {unit.ep} devices; use 1")
    experts = c.n_routed_experts + unit.redundant_experts
    if unit.ep > 1 and experts % unit.ep:
        every = lcm(unit.ep, beside)
        copies = -(-c.n_routed_experts // every) * every - c.n_routed_experts
        told = f", or --redundant-experts {copies}" if copies < c.n_routed_experts else ""
        raise InputError(
            f"{field} is {unit.ep}, it must divide experts with their copies ({c.n_routed_experts} + {unit.redundant_experts}); "
            f"the nearest is {nearest_divisor(experts, unit.ep)}{told}"
        )
    if c.num_attention_heads % unit.tp:
        near = nearest_divisor(c.num_attention_heads, unit.tp)
        raise InputError(
            f"--tp is {unit.tp}, it must divide num_attention_heads ({c.num_attention_heads}); the nearest is {near}"
        )


def check_acceptance(c: ModelConfig, mtp_acceptance: float) -> None:
    """Refuse a share of accepted drafts that is none, and drafts of a model that makes none."""
    if not 0 <= mtp_acceptance <= 1:
        raise InputError(f"--mtp-acceptance is {mtp_acceptance:g}, it must be between 0 and 1")
    if mtp_acceptance and not c.num_nextn_predict_layers:
        raise InputError(f"--mtp-acceptance is {mtp_acceptance:g}, but the model has no MTP layer; use 0")


def usual_unit(
    c: ModelConfig,
    hardware: Hardware,
    precision: Precision,
    several_nodes: int,
    tp: int = 1,
    redundant_experts: int | None = None,
) -> Unit:
    """The unit of a question that leaves it open: the fewest devices of a node over which experts can be spread such that each holds
    its part, `several_nodes` where there are none, as in DeepSeek's deployment. With `tp`, every layer is cut instead.

    Raises:
        InputError: one node does not hold the weights, and nothing connects it to others.
    """
    if tp < 1:
        raise InputError(f"--tp is {tp}, it must be at least 1")
    if not c.n_routed_experts:
        return Unit(1, tp, redundant_experts or 0)
    unit = _in_a_node(c, hardware, precision, tp, redundant_experts or 0)
    if unit is not None:
        return unit
    if tp == 1 and hardware.scale_out_gb_per_second is None:
        raise _too_heavy(c, hardware, precision)
    return Unit(several_nodes, tp, usual_copies(hardware, several_nodes) if redundant_experts is None else redundant_experts)


def _in_a_node(c: ModelConfig, hardware: Hardware, precision: Precision, tp: int, copies: int) -> Unit | None:
    """The fewest devices of a node that hold the model, if they do."""
    for ep in (1, 2, 4, 8) if tp == 1 else (1,):
        unit = Unit(ep, tp, copies)
        divides = ep <= hardware.devices_per_node and (c.n_routed_experts + copies) % ep == 0
        if divides and weight_bytes_per_device(c, unit, precision) <= 0.8 * hardware.memory_bytes:
            return unit
    return None


def _too_heavy(c: ModelConfig, hardware: Hardware, precision: Precision) -> InputError:
    """Of a node that does not hold the model and has no network: the precision or hardware with which it would go."""
    has = f"{hardware.name} has {hardware.memory_bytes / 1e9:.0f} GB"
    if hardware.devices_per_node > 1:
        has += f" on each of a node's {hardware.devices_per_node} devices"
    weights = weight_bytes_per_device(c, Unit(), precision) / 1e9
    larger = next(
        (row.name for row in ROWS if row.scale_out_gb_per_second is not None or _in_a_node(c, row, precision, 1, 0)), "measured"
    )
    # Int4 weights are multiplied in bf16, so it helps where that rate is known.
    lower = hardware.bf16_tflops is not None and _in_a_node(c, hardware, "int4", 1, 0) is not None
    remedy = f"--precision int4 or --hardware {larger}" if lower else f"--hardware {larger}"
    return InputError(f"{has}, and {weights:.0f} GB of weights in {precision} do not fit; take {remedy}")


def usual_copies(hardware: Hardware, ep: int) -> int:
    """Copies of experts: DeepSeek's 32 in units of several nodes (V3 section 3.4)."""
    return 32 if ep > hardware.devices_per_node else 0


def plain_parameters(c: ModelConfig) -> int:
    """Matrix parameters that every device of an expert-parallel unit holds and every token uses: all but routed experts and the
    input embedding, of which one row is read."""
    s = shape(c)
    layers, moe = c.num_hidden_layers, c.num_moe_layers
    shared = moe * (c.n_shared_experts * s.expert + s.router) if c.n_routed_experts else 0
    return layers * s.attention + c.first_k_dense_replace * s.dense + shared


@lru_cache(maxsize=64)
def drafter(c: ModelConfig) -> ModelConfig:
    """The MTP layer that writes drafts, as a model of one layer; what joins its two inputs is apart. Embedding and head are those of
    the model itself (V3 section 2.2)."""
    return replace(c, num_hidden_layers=1, first_k_dense_replace=0 if c.n_routed_experts else 1, num_nextn_predict_layers=0)


def joining_parameters(c: ModelConfig) -> int:
    """Of the projection in which an MTP layer joins the last hidden state and the next token's embedding."""
    return 2 * c.hidden_size**2


def weight_bytes_per_device(c: ModelConfig, unit: Unit, precision: Precision, *, mtp: bool = False) -> float:
    """Bytes of weights on one device: products' weights in `precision`, embedding and head in bf16; with `mtp` those of the layer that
    writes drafts, too."""
    s, size = shape(c), WEIGHT_BYTES[precision]
    ends = (1 if c.tie_word_embeddings else 2) * s.embedding * (size if precision == "fp32" else min(2.0, 2 * size))
    plain, layers = plain_parameters(c), c.num_moe_layers
    if mtp:
        plain += plain_parameters(drafter(c)) + joining_parameters(c)
        layers += 1
    experts = layers * (c.n_routed_experts + unit.redundant_experts) / unit.ep * s.expert if c.n_routed_experts else 0
    return (plain * size + ends) / unit.tp + experts * size / unit.sharing


def largest_batch(
    c: ModelConfig,
    hardware: Hardware,
    unit: Unit,
    precision: Precision,
    context: float,
    cache_value_bytes: float,
    *,
    mtp: bool = False,
) -> int:
    """Requests per device whose caches fit beside the weights, those of drafts counted with `mtp`; 0 where the weights alone do not."""
    left = (1 - RESERVED) * hardware.memory_bytes - weight_bytes_per_device(c, unit, precision, mtp=mtp)
    return max(0, int(left / (context * request_bytes_per_token(c, unit, cache_value_bytes, mtp=mtp))))


def request_bytes_per_token(c: ModelConfig, unit: Unit, cache_value_bytes: float, *, mtp: bool = False) -> float:
    """Bytes of cache that one token of a request takes on a device."""
    drafting = cache_bytes_per_token(drafter(c), bytes_per_value=cache_value_bytes) if mtp else 0.0
    return (cache_bytes_per_token(c, bytes_per_value=cache_value_bytes) + drafting) / cache_split(c, unit)


def cache_split(c: ModelConfig, unit: Unit) -> int:
    """Devices that share one request's cache: key-value heads are cut by tp, a latent is not."""
    return 1 if c.kv_lora_rank else min(unit.tp, c.num_key_value_heads)


@dataclass(frozen=True)
class DecodeStep:
    """Milliseconds of one decode step of `batch` requests per device, by component, and what comes of it."""

    batch: int
    context: float
    weights_ms: float
    """Reading weights, or multiplying by them where that takes longer."""
    cache_ms: float
    exchange_ms: float
    exposed_exchange_ms: float
    idle_ms: float
    """Between kernels, and what the engine and sampling take where that was measured."""
    tpot_ms: float
    tokens_per_second_per_request: float
    tokens_per_second_per_device: float
    overlapped: bool
    fits: bool


def decode_step(
    c: ModelConfig,
    hardware: Hardware,
    unit: Unit,
    precision: Precision,
    batch: int,
    context: float,
    *,
    cache_value_bytes: float = 2.0,
    mtp_acceptance: float = 0.0,
    greedy: bool = False,
) -> DecodeStep:
    """One step: each part takes the longer of its memory traffic and its products. Two half batches hide the exchange behind the
    other's computing where that gains, though weights are then read twice (V3 section 3.4.2). With `mtp_acceptance` each request
    brings one draft, verified in the same step; then all rows pass the MTP layer and the head again, which writes the next."""
    rows = batch * (2 if mtp_acceptance else 1)
    whole_weights, cache = _decode_compute(c, hardware, unit, precision, rows, batch, context, cache_value_bytes)
    exchange = _exchange_seconds(c, hardware, unit, precision, rows)
    half_weights, half_cache = _decode_compute(
        c, hardware, unit, precision, max(1, rows // 2), max(1, batch // 2), context, cache_value_bytes
    )
    plain = whole_weights + cache + exchange
    halved = max(2 * (half_weights + half_cache), exchange)
    overlapped = batch > 1 and halved < plain
    weights, cache = (2 * half_weights, 2 * half_cache) if overlapped else (whole_weights, cache)
    kernels = min(plain, halved) if batch > 1 else plain
    draft_weights = draft_cache = draft_exchange = 0.0
    if mtp_acceptance:
        layer = drafter(c)
        draft_weights, draft_cache = _decode_compute(
            layer, hardware, unit, precision, rows, batch, context, cache_value_bytes, joining_parameters(c)
        )
        draft_exchange = _exchange_seconds(layer, hardware, unit, precision, rows)
    draft = draft_weights + draft_cache + draft_exchange
    busy = hardware.busy_decoding(c.n_routed_experts > 0, rows)
    step = (kernels + draft) / busy + _engine_seconds(c, hardware, rows, greedy)
    tpot = step / (1 + mtp_acceptance)
    return DecodeStep(
        batch=batch,
        context=context,
        weights_ms=1e3 * (weights + draft_weights),
        cache_ms=1e3 * (cache + draft_cache),
        exchange_ms=1e3 * (exchange + draft_exchange),
        exposed_exchange_ms=1e3 * (kernels - weights - cache + draft_exchange),
        idle_ms=1e3 * (step - kernels - draft),
        tpot_ms=1e3 * tpot,
        tokens_per_second_per_request=1 / tpot,
        tokens_per_second_per_device=batch / tpot / unit.sharing,
        overlapped=overlapped,
        fits=batch <= largest_batch(c, hardware, unit, precision, context, cache_value_bytes, mtp=mtp_acceptance > 0),
    )


def _engine_seconds(c: ModelConfig, hardware: Hardware, rows: int, greedy: bool) -> float:
    """What a step takes besides the model: scheduling, bookkeeping and choosing tokens. Only measured hardware tells."""
    small = hardware.small_work
    if small is None:
        return 0.0
    value = small.greedy_value_seconds if greedy else small.sampled_value_seconds
    layers = c.num_hidden_layers
    step = small.engine_step_seconds + layers * small.engine_layer_seconds
    return step + rows * (small.engine_row_seconds + layers * small.engine_layer_row_seconds + c.vocab_size * value)


def _decode_compute(
    c: ModelConfig,
    hardware: Hardware,
    unit: Unit,
    precision: Precision,
    rows: int,
    batch: int,
    context: float,
    value_bytes: float,
    joining: int = 0,
) -> tuple[float, float]:
    """Seconds of products with weights, `joining` parameters more than the model's among them, and of attention over the cache. What is
    read again and again comes from a cache where all of it fits one that was measured."""
    s, size = shape(c), WEIGHT_BYTES[precision]
    known = hardware.bf16_tflops is not None

    def seconds(parameters: float, together: float) -> float:
        """Of products of all rows, `together` of them by one matrix."""
        return 2.0 * rows * parameters / hardware.decode_flops(precision, together) if known else 0.0

    alone = unit.sharing  # devices that share an expert
    plain, head = (plain_parameters(c) + joining) / unit.tp, s.embedding / unit.tp
    # Of each part the bytes that are read, the seconds of its products, and the chance that a step reads any given byte of it.
    parts = [
        (plain * size, seconds(plain, rows), 1.0),
        (head * (size if precision == "fp32" else min(2.0, 2 * size)), seconds(head, rows), 1.0),
    ]
    if c.n_routed_experts:
        hit = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** (rows * unit.ep)  # each row chooses different ones
        local = c.num_moe_layers * (c.n_routed_experts + unit.redundant_experts) / unit.ep * s.expert / alone
        uneven = unit.expert_imbalance if unit.ep > 1 else 1.0
        products = uneven * c.num_moe_layers * c.num_experts_per_tok * s.expert / alone
        together = c.num_experts_per_tok * rows * unit.ep / (c.n_routed_experts * hit)
        parts.append((local * hit * size, seconds(products, together), hit))
    cached = batch * context * cache_bytes_per_token(c, bytes_per_value=value_bytes) / cache_split(c, unit)
    step = cached + sum(read for read, _, _ in parts)
    # A cache still has what was read last if it holds all that was read since: of an expert that every fourth step chooses, four steps.
    memory = hardware.read_bytes_per_second(step)
    weights = sum(max(read / hardware.weight_bytes_per_second(step / chance), computed) for read, computed, chance in parts)
    weights += c.num_hidden_layers * rows * elementwise_bytes(c, precision) / unit.tp / memory
    scores = c.num_hidden_layers * rows * absorbed_core_flops(c, context) / unit.tp
    wide: Precision = "fp32" if precision == "fp32" else "bf16"
    rate = hardware.peak_flops(wide) * hardware.efficiencies.attention_forward if known else float("inf")
    return weights, max(cached / memory, scores / rate)


def _exchange_seconds(c: ModelConfig, hardware: Hardware, unit: Unit, precision: Precision, rows: int) -> float:
    """Dispatch in the precision of products and combine in bf16, each copy sent directly (V3 section 3.4.2); or the two sums per layer
    of a cut model."""
    latency = hardware.exchange_latency_us * 1e-6
    seconds = 0.0
    if unit.ep > 1:
        nodes = -(-unit.ep // hardware.devices_per_node)
        link = hardware.need("scale_out_gb_per_second" if nodes > 1 else "scale_up_gb_per_second")
        copies = c.num_experts_per_tok * (unit.ep - 1) / unit.ep
        moved = rows * copies * c.hidden_size * exchange_bytes(precision) * unit.expert_imbalance
        share = hardware.efficiencies.low_latency_network
        seconds += c.num_moe_layers * (moved / (link * GIGA * share) + 2 * latency)
    if unit.tp > 1:
        link = hardware.need("scale_up_gb_per_second")
        moved = 2 * rows * c.hidden_size * 2.0 * (unit.tp - 1) / unit.tp
        seconds += c.num_hidden_layers * 2 * (moved / (link * GIGA * hardware.efficiencies.low_latency_network) + latency)
    return seconds


@dataclass(frozen=True)
class Prefill:
    """Prefill on one device: microseconds per computed token by component, and the rates. `tokens_per_second_with_hits` counts tokens
    found in the cache as well, as published figures do."""

    products_us: float
    attention_us: float
    elementwise_us: float
    exchange_us: float
    exposed_exchange_us: float
    idle_us: float
    tokens_per_second_per_device: float
    tokens_per_second_per_device_with_hits: float


def prefill(
    c: ModelConfig, hardware: Hardware, unit: Unit, precision: Precision, prompt: float, hit_share: float, *, mtp: bool = False
) -> Prefill:
    """Prompts of `prompt` tokens of which `hit_share` is cached: the rest is computed, over the whole prompt. Two micro-batches hide
    the exchange (V3 section 3.4.1). With `mtp` a prompt passes the layer that writes drafts, too, and fills its cache."""
    if not 0 <= hit_share < 1:
        raise InputError(f"--hit-share is {hit_share}, it must be at least 0 and below 1")
    drafts = 1 if mtp else 0
    layers, moe = c.num_hidden_layers + drafts, c.num_moe_layers + drafts
    uneven = unit.expert_imbalance if unit.ep > 1 else 1.0
    products = product_seconds(replace(c, num_nextn_predict_layers=drafts), hardware, precision, layers, moe, uneven) / unit.tp
    seen = prompt * (hit_share + (1 - hit_share) / 2)
    wide: Precision = "fp32" if precision == "fp32" else "bf16"
    core_rate = hardware.peak_flops(wide) * hardware.efficiencies.attention_forward
    attention = layers * attention_core_flops(c, seen) / core_rate / unit.tp
    elementwise = layers * elementwise_bytes(c, precision) / hardware.bytes_per_second / unit.tp
    hops = all_to_all(c, unit.ep, hardware.devices_per_node, dispatch_bytes(precision))
    exchange = uneven * moe * max(hops.seconds(hardware)) if unit.ep > 1 else 0.0
    if unit.tp > 1:
        moved = 4.0 * 2.0 * c.hidden_size * layers * (unit.tp - 1) / unit.tp
        exchange += moved / (hardware.need("scale_up_gb_per_second") * GIGA * hardware.efficiencies.network)
    compute = products + attention + elementwise
    total = max(compute + exchange * hardware.efficiencies.communication_cores, exchange)
    busy = hardware.busy(c.n_routed_experts > 0)
    rate = busy / total / unit.sharing
    return Prefill(
        products_us=1e6 * products,
        attention_us=1e6 * attention,
        elementwise_us=1e6 * elementwise,
        exchange_us=1e6 * exchange,
        exposed_exchange_us=1e6 * (total - compute),
        idle_us=1e6 * total * (1 / busy - 1),
        tokens_per_second_per_device=rate,
        tokens_per_second_per_device_with_hits=rate / (1 - hit_share),
    )


def exchange_bytes(precision: Precision) -> float:
    """Bytes of a value out to its experts and back."""
    return dispatch_bytes(precision) + COMBINE_BYTES


def network_limit_ms(
    *, batch: int = 32, picks: int = 9, width: int = 7168, layers: int = 61, gb_per_second: float = 50.0, value_bytes: float = 3.0
) -> float:
    """The shortest possible step where only the network counts (V3 hardware paper, section 2.3.2): every layer exchanges twice `batch`
    tokens, for the two micro-batches that hide each other; a value takes `value_bytes`, 1 out and 2 back in FP8. The paper writes 7K
    for the width and gets 14.76 ms."""
    return 2e3 * layers * value_bytes * batch * picks * width / (gb_per_second * GIGA)


def total_weight_gb(c: ModelConfig, precision: Precision) -> float:
    """Weights of the whole model, MTP left out."""
    return count_params(c).total * WEIGHT_BYTES[precision] / 1e9
