"""`finback plan serve`: throughput, latency and money of serving, and dense against mixture for a given traffic."""

import math
from dataclasses import dataclass, fields

from finback.config import InputError, ModelConfig
from finback.planner.dense import dense_equivalent
from finback.planner.hardware import Hardware, Precision
from finback.planner.inference import (
    RESERVED,
    DecodeStep,
    Prefill,
    Unit,
    check_acceptance,
    check_unit,
    decode_step,
    exchange_bytes,
    largest_batch,
    network_limit_ms,
    prefill,
    request_bytes_per_token,
    usual_copies,
    weight_bytes_per_device,
)
from finback.planner.layout import check_node, divisors

DAY_SECONDS = 86400.0
USUAL_BATCH = 88  # 14.8K tokens per second of a node at 21 for each request
BATCHES = (1, 4, 16, 32, 64, 96, 128, 192, 256)
HIT_SHARES = (0.0, 0.25, 0.5, 0.563, 0.75, 0.9)
PREFILL_LOAD = 0.7  # share of its capacity at which prefill is planned, so that prompts do not queue long


@dataclass(frozen=True)
class Traffic:
    """One day of requests. The defaults are DeepSeek's day of 27 February 2025 (open-infra-index, day 6); the average prompt is not
    published there and assumed."""

    input_tokens_per_day: float = 608e9
    output_tokens_per_day: float = 168e9
    hit_share: float = 342 / 608
    prompt_tokens: float = 4000.0
    context_tokens: float = 4989.0
    """Average length that an output token attends to."""


@dataclass(frozen=True)
class Tariff:
    """Prices per million tokens; the defaults are R1's of February 2025."""

    usd_per_million_hit: float = 0.14
    usd_per_million_miss: float = 0.55
    usd_per_million_output: float = 2.19


def daily_cost_usd(nodes: float, devices_per_node: int, usd_per_device_hour: float) -> float:
    """Rent of so many nodes for a day."""
    return nodes * devices_per_node * 24 * usd_per_device_hour


def revenue_usd(traffic: Traffic, tariff: Tariff) -> float:
    """What a day's tokens would bring."""
    hit = traffic.input_tokens_per_day * traffic.hit_share
    miss = traffic.input_tokens_per_day - hit
    tokens = (
        hit * tariff.usd_per_million_hit
        + miss * tariff.usd_per_million_miss
        + traffic.output_tokens_per_day * tariff.usd_per_million_output
    )
    return tokens / 1e6


def margin(revenue: float, cost: float) -> float:
    """Profit by cost: 5.45 is DeepSeek's 545%."""
    return (revenue - cost) / cost


@dataclass(frozen=True)
class Latency:
    """One batch size: time to first token and per token, and what a node does."""

    batch_per_device: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_second_per_request: float
    output_tokens_per_second_per_node: float
    cache_gb_per_device: float
    fits: bool


@dataclass(frozen=True)
class HitRow:
    """What a share of cached input does to prefill and to the bill."""

    hit_share: float
    prefill_nodes: float
    total_nodes: float
    cost_usd_per_day: float | None
    revenue_usd_per_day: float
    cost_usd_per_million_input: float | None


@dataclass(frozen=True)
class Economics:
    """A day's bill."""

    prefill_nodes: float
    decode_nodes: float
    total_nodes: float
    cost_usd_per_day: float | None
    revenue_usd_per_day: float
    margin: float | None
    cost_usd_per_million_input: float | None
    cost_usd_per_million_output: float | None


@dataclass(frozen=True)
class ServePlan:
    """The whole answer."""

    hardware: str
    precision: str
    prefill_unit_devices: int
    decode_unit_devices: int
    weight_gb_per_prefill_device: float
    weight_gb_per_decode_device: float
    largest_batch_per_device: int
    prefill: Prefill
    input_tokens_per_second_per_node: float
    input_tokens_per_second_per_node_with_hits: float
    decode: DecodeStep
    output_tokens_per_second_per_node: float
    latencies: list[Latency]
    network_limit_tpot_ms: float | None
    economics: Economics
    cache_hits: list[HitRow]
    traffic_choices: "list[TrafficChoice]"
    unknown_figures: list[str]
    efficiency_source: str


def plan_serve(
    c: ModelConfig,
    hardware: Hardware,
    prefill_unit: Unit,
    decode_unit: Unit,
    *,
    precision: Precision = "fp8",
    batch: int | None = None,
    traffic: Traffic | None = None,
    tariff: Tariff | None = None,
    usd_per_device_hour: float | None = None,
    mtp_acceptance: float = 0.0,
    cache_value_bytes: float = 2.0,
) -> ServePlan:
    """Plan serving with separate units for prefill and decode. `batch` is the number of requests per decode device that the bill
    counts on."""
    traffic, tariff = traffic or Traffic(), tariff or Tariff()
    _check(c, hardware, prefill_unit, decode_unit, traffic, tariff, mtp_acceptance, precision)
    mtp = mtp_acceptance > 0
    largest = largest_batch(c, hardware, decode_unit, precision, traffic.context_tokens, cache_value_bytes, mtp=mtp)
    for unit, field in ((prefill_unit, "--prefill-ep"), (decode_unit, "--decode-ep")):
        weights = weight_bytes_per_device(c, unit, precision, mtp=mtp)
        if weights > (1 - RESERVED) * hardware.memory_bytes:
            raise InputError(
                f"{hardware.name} has {hardware.memory_bytes / 1e9:.0f} GB and each of {unit.devices} devices would hold "
                f"{weights / 1e9:.0f} GB of weights; take {_more_devices(c, unit, precision, hardware, field, mtp)}"
            )
    batch = _fitting_batch(batch, largest, traffic.context_tokens)
    node = hardware.devices_per_node
    filled = prefill(c, hardware, prefill_unit, precision, traffic.prompt_tokens, traffic.hit_share, mtp=mtp)

    def step(size: int) -> DecodeStep:
        return decode_step(
            c,
            hardware,
            decode_unit,
            precision,
            size,
            traffic.context_tokens,
            cache_value_bytes=cache_value_bytes,
            mtp_acceptance=mtp_acceptance,
        )

    chosen = step(batch)
    cache = traffic.context_tokens * request_bytes_per_token(c, decode_unit, cache_value_bytes, mtp=mtp)
    rate = usd_per_device_hour if usd_per_device_hour is not None else hardware.usd_per_hour
    output_rate = node * chosen.tokens_per_second_per_device
    link = hardware.scale_out_gb_per_second if decode_unit.ep > node else hardware.scale_up_gb_per_second
    limit = None
    if decode_unit.ep > 1 and link is not None:
        picks = c.num_experts_per_tok + c.n_shared_experts
        limit = network_limit_ms(
            batch=32,
            picks=picks,
            width=c.hidden_size,
            layers=c.num_hidden_layers,
            gb_per_second=link,
            value_bytes=exchange_bytes(precision),
        )
    return ServePlan(
        hardware=hardware.title,
        precision=precision,
        prefill_unit_devices=prefill_unit.devices,
        decode_unit_devices=decode_unit.devices,
        weight_gb_per_prefill_device=weight_bytes_per_device(c, prefill_unit, precision, mtp=mtp) / 1e9,
        weight_gb_per_decode_device=weight_bytes_per_device(c, decode_unit, precision, mtp=mtp) / 1e9,
        largest_batch_per_device=largest,
        prefill=filled,
        input_tokens_per_second_per_node=node * filled.tokens_per_second_per_device,
        input_tokens_per_second_per_node_with_hits=node * filled.tokens_per_second_per_device_with_hits,
        decode=chosen,
        output_tokens_per_second_per_node=output_rate,
        latencies=[
            _latency(filled, prefill_unit.sharing, step(size), node, traffic, cache) for size in sorted({*BATCHES, batch})
        ],
        network_limit_tpot_ms=limit,
        economics=economics(filled, output_rate, node, traffic, tariff, rate),
        cache_hits=[
            _hit_row(c, hardware, prefill_unit, precision, share, traffic, tariff, output_rate, rate, mtp) for share in HIT_SHARES
        ],
        traffic_choices=dense_or_moe(c, hardware, precision, traffic.context_tokens, rate),
        unknown_figures=hardware.unknown,
        efficiency_source=hardware.efficiency_source,
    )


def _check(
    c: ModelConfig,
    hardware: Hardware,
    prefill_unit: Unit,
    decode_unit: Unit,
    traffic: Traffic,
    tariff: Tariff,
    mtp_acceptance: float,
    precision: Precision,
) -> None:
    for unit in (prefill_unit, decode_unit):
        check_node(c, hardware, unit.tp)
    check_unit(c, prefill_unit, "--prefill-ep", decode_unit.ep)
    check_unit(c, decode_unit, "--decode-ep", prefill_unit.ep)
    for name in ("input_tokens_per_day", "output_tokens_per_day", "prompt_tokens", "context_tokens"):
        value = getattr(traffic, name)
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} is {value:g}, it must be a positive number")
    for name in ("prompt_tokens", "context_tokens"):
        value, limit = getattr(traffic, name), c.max_position_embeddings
        if value > limit:
            raise InputError(f"--{name.replace('_', '-')} is {value:.0f}, above the model's max_position_embeddings; use {limit}")
    if not 0 <= traffic.hit_share < 1:
        raise InputError(f"--hit-share is {traffic.hit_share:g}, it must be at least 0 and below 1")
    for price in fields(tariff):
        value = getattr(tariff, price.name)
        if not (value >= 0 and math.isfinite(value)):
            raise InputError(f"--{price.name.replace('_', '-')} is {value:g}, it must be at least 0; use 0 for what is free")
    check_acceptance(c, mtp_acceptance)
    if precision == "fp8" and hardware.fp8_tflops is None and hardware.bf16_tflops is None:
        raise InputError(
            f"hardware {hardware.name} has no published matrix rates; measure this machine and use --hardware measured"
        )


def _fitting_batch(batch: int | None, largest: int, context: float) -> int:
    """The requests that were asked for; else as many as DeepSeek's day implies, if they fit."""
    if largest < 1:
        raise InputError(
            f"--context-tokens is {context:.0f}, of which no request fits beside the weights; shorten it, or take more devices by "
            "--decode-ep or --tp"
        )
    if batch is None:
        return min(USUAL_BATCH, largest)
    if not 1 <= batch <= largest:
        raise InputError(
            f"--batch is {batch}, but from 1 to {largest} requests of {context:.0f} tokens fit on a device; use {largest}"
        )
    return batch


def _more_devices(c: ModelConfig, unit: Unit, precision: Precision, hardware: Hardware, field: str, mtp: bool) -> str:
    """The smallest unit of the same kind that holds the weights; `field` is the word of the command line for its experts' devices.
    It divides with the copies that `unit` has, and with the usual ones of the larger unit if those of `unit` are usual."""
    room, node = 0.88 * hardware.memory_bytes, hardware.devices_per_node  # some is left for a cache
    nothing = "a device with more memory, or a lower precision"
    if not c.n_routed_experts:
        sizes = (size for size in divisors(c.num_attention_heads) if size <= node)
        fitting = (size for size in sizes if weight_bytes_per_device(c, Unit(tp=size), precision, mtp=mtp) <= room)
        return next((f"--tp {size}" for size in fitting), nothing)
    usual = unit.redundant_experts == usual_copies(hardware, unit.ep)
    for size in range(2, c.n_routed_experts + unit.redundant_experts + 1):
        copies = usual_copies(hardware, size) if usual else unit.redundant_experts
        divides = not any((c.n_routed_experts + held) % size for held in (copies, unit.redundant_experts))
        if not divides or (size > node and hardware.scale_out_gb_per_second is None):
            continue
        if weight_bytes_per_device(c, Unit(size, redundant_experts=copies), precision, mtp=mtp) <= room:
            return f"{field} {size}" + (" and --tp 1" if unit.tp > 1 else "")
    return nothing


def _latency(filled: Prefill, sharing: int, step: DecodeStep, node: int, traffic: Traffic, cache_bytes: float) -> Latency:
    """First token: the prompt's own prefill by the `sharing` devices that work on it together, its wait in a queue at the planned load
    (M/D/1), and one decode step. `cache_bytes` are those of a request on one device."""
    computed = traffic.prompt_tokens * (1 - traffic.hit_share)
    service = computed / (sharing * filled.tokens_per_second_per_device)
    wait = service * PREFILL_LOAD / (2 * (1 - PREFILL_LOAD))
    return Latency(
        batch_per_device=step.batch,
        ttft_ms=1e3 * (service + wait) + step.tpot_ms,
        tpot_ms=step.tpot_ms,
        tokens_per_second_per_request=step.tokens_per_second_per_request,
        output_tokens_per_second_per_node=node * step.tokens_per_second_per_device,
        cache_gb_per_device=step.batch * cache_bytes / 1e9,
        fits=step.fits,
    )


def economics(filled: Prefill, output_rate: float, node: int, traffic: Traffic, tariff: Tariff, rate: float | None) -> Economics:
    """Nodes that the day's tokens need when evenly spread and planned at full decode batches, and their bill."""
    prefill_nodes = traffic.input_tokens_per_day / DAY_SECONDS / (node * filled.tokens_per_second_per_device_with_hits)
    decode_nodes = traffic.output_tokens_per_day / DAY_SECONDS / output_rate
    revenue = revenue_usd(traffic, tariff)
    if rate is None:
        return Economics(prefill_nodes, decode_nodes, prefill_nodes + decode_nodes, None, revenue, None, None, None)
    cost = daily_cost_usd(prefill_nodes + decode_nodes, node, rate)
    return Economics(
        prefill_nodes=prefill_nodes,
        decode_nodes=decode_nodes,
        total_nodes=prefill_nodes + decode_nodes,
        cost_usd_per_day=cost,
        revenue_usd_per_day=revenue,
        margin=margin(revenue, cost),
        cost_usd_per_million_input=daily_cost_usd(prefill_nodes, node, rate) / traffic.input_tokens_per_day * 1e6,
        cost_usd_per_million_output=daily_cost_usd(decode_nodes, node, rate) / traffic.output_tokens_per_day * 1e6,
    )


def _hit_row(
    c: ModelConfig,
    hardware: Hardware,
    unit: Unit,
    precision: Precision,
    share: float,
    traffic: Traffic,
    tariff: Tariff,
    output_rate: float,
    rate: float | None,
    mtp: bool,
) -> HitRow:
    changed = Traffic(
        traffic.input_tokens_per_day, traffic.output_tokens_per_day, share, traffic.prompt_tokens, traffic.context_tokens
    )
    filled = prefill(c, hardware, unit, precision, traffic.prompt_tokens, share, mtp=mtp)
    money = economics(filled, output_rate, hardware.devices_per_node, changed, tariff, rate)
    return HitRow(
        hit_share=share,
        prefill_nodes=money.prefill_nodes,
        total_nodes=money.total_nodes,
        cost_usd_per_day=money.cost_usd_per_day,
        revenue_usd_per_day=money.revenue_usd_per_day,
        cost_usd_per_million_input=money.cost_usd_per_million_input,
    )


@dataclass(frozen=True)
class TrafficChoice:
    """Mixture against the dense model of equal loss for so many requests at once: devices that each needs at least, speed of a request,
    and cost per million output tokens (None without a rent)."""

    requests_at_once: int
    moe_devices: int
    moe_tokens_per_second_per_request: float
    moe_usd_per_million_output: float | None
    moe_device_seconds_per_million_output: float
    dense_devices: int
    dense_tokens_per_second_per_request: float
    dense_usd_per_million_output: float | None
    dense_device_seconds_per_million_output: float
    cheaper: str


def dense_twin(c: ModelConfig) -> ModelConfig:
    """A dense Llama-like model with the parameters of `dense_equivalent`: 128 values wide per layer, heads of 128, GQA of 8, FFN
    3.5 wide."""
    whole = blocks = dense_equivalent(c)
    for _ in range(4):  # embedding and head come off what the layers get, and depend on the width
        # Per layer 2.25 d^2 of attention (with 8 of d / 128 key-value heads) and 10.5 d^2 of FFN, d = 128 layers.
        layers = max(2, round((blocks / (12.75 * 128**2)) ** (1 / 3)))
        heads = max(1, round((blocks / (12.75 * layers)) ** 0.5 / 128))
        heads = max(8, 8 * round(heads / 8)) if heads > 8 else heads
        width = 128 * heads
        blocks = max(0.2 * whole, whole - 2 * c.vocab_size * width)
    return ModelConfig(
        vocab_size=c.vocab_size,
        hidden_size=width,
        intermediate_size=int(3.5 * width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads),
        head_dim=128,
        max_position_embeddings=c.max_position_embeddings,
        model_type="llama",
    )


def dense_or_moe(
    c: ModelConfig, hardware: Hardware, precision: Precision, context: float, rate: float | None
) -> list[TrafficChoice]:
    """From one request at a time (one tenant) to many. Each side takes the layout with the least device time per token that
    holds it."""
    if not c.n_routed_experts or hardware.scale_up_gb_per_second is None:
        return []
    twin = dense_twin(c)
    moe_units = [Unit(ep=ep) for ep in (1, 2, 4, 8, 16, 32, 64, 128, 256) if c.n_routed_experts % ep == 0]
    dense_units = [Unit(tp=tp) for tp in (1, 2, 4, 8) if twin.num_attention_heads % tp == 0]
    found = []
    for requests in (1, 8, 64, 512, 4096, 32768):
        moe = _cheapest_unit(c, hardware, moe_units, precision, context, requests)
        dense = _cheapest_unit(twin, hardware, dense_units, precision, context, requests)
        if moe is None or dense is None:
            continue
        seconds = [devices / (requests / tpot) * 1e6 for devices, tpot in (moe, dense)]
        money = [None if rate is None else value / 3600 * rate for value in seconds]
        found.append(
            TrafficChoice(
                requests_at_once=requests,
                moe_devices=moe[0],
                moe_tokens_per_second_per_request=1 / moe[1],
                moe_usd_per_million_output=money[0],
                moe_device_seconds_per_million_output=seconds[0],
                dense_devices=dense[0],
                dense_tokens_per_second_per_request=1 / dense[1],
                dense_usd_per_million_output=money[1],
                dense_device_seconds_per_million_output=seconds[1],
                cheaper="mixture" if seconds[0] < seconds[1] else "dense",
            )
        )
    return found


def _cheapest_unit(
    c: ModelConfig, hardware: Hardware, units: list[Unit], precision: Precision, context: float, requests: int
) -> tuple[int, float] | None:
    """Devices and seconds per token of the unit (and number of units) that costs least device time for `requests` requests at once."""
    best: tuple[float, int, float] | None = None
    for unit in units:
        if unit.ep > hardware.devices_per_node and hardware.scale_out_gb_per_second is None:
            continue
        largest = min(256, largest_batch(c, hardware, unit, precision, context, 2.0))
        if largest < 1:
            continue
        apart = unit.devices // unit.sharing  # devices with requests of their own
        count = -(-requests // (largest * apart))
        batch = -(-requests // (count * apart))
        tpot = decode_step(c, hardware, unit, precision, batch, context).tpot_ms / 1e3
        devices = count * unit.devices
        best = min(best or (float("inf"), 0, 0.0), (devices * tpot, devices, tpot))
    return None if best is None else (best[1], best[2])
