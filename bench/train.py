"""Training speed of our model beside transformers' DeepseekV3: same weights, same tokens, same dtype, same optimizer.

A step is forward, loss, backward, clipping and AdamW. Every step draws new tokens, so that routing sends other numbers of rows to each
expert every time, as it does in real training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ceilings import DTYPES, Ceilings, matmul_rate
from bench.contest import Turn, alternate, summarize
from bench.peers import COMPARED, SETTINGS, our_model, their_model
from bench.results import Row
from finback.config import ModelConfig, count_params
from finback.ops.cross_entropy import linear_cross_entropy
from finback.train.losses import accumulate_gradients
from finback.train.optimizer import adamw_update, clip_scale, gradient_norm, init_adam_state
from finback.train.session import keep_freed_memory
from finback.train.throughput import training_flops_per_token

TARGET_RATIO = {"fp32": 1.4, "bf16": 2.5}
TARGET_SHARE = 0.65  # of the bf16 matmul ceiling
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # of the first step, before any update
LR, BETA1, BETA2, EPSILON, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.9, 0.95, 1e-8, 0.1, 1.0
_PROBE_SECONDS = 0.3


@dataclass(frozen=True)
class Size:
    """How much is measured: turns of one step each."""

    config: ModelConfig = COMPARED
    sequences: int = 16
    tokens: int = 256
    warm_up: int = 2
    turns: int = 9
    separate: bool = True


FULL: Size = Size()
QUICK: Size = Size(sequences=4, warm_up=1, turns=2, separate=False)  # importing transformers ten times is slow


def run(size: Size, ceilings: Ceilings) -> tuple[list[Row], list[str]]:
    """Rows for each precision."""
    rows = []
    for precision in DTYPES:
        turns = alternate(_competitors(size, precision, ceilings), range(size.warm_up + size.turns), separate=size.separate)
        _check_losses(turns, precision)
        rows += _rows(size, precision, {name: kept[size.warm_up :] for name, kept in turns.items()}, ceilings)
    return rows, _notes(size)


def _competitors(size: Size, precision: str, ceilings: Ceilings) -> dict[str, Callable[[], Any]]:
    theirs = {name: partial(build_theirs, size, precision, settings) for name, settings in SETTINGS.items()}
    return {
        "finback": partial(build_ours, size, precision),
        "finback, own loop": partial(build_own_loop, size, precision),
        **theirs,
        "matmul": partial(build_probe, precision, ceilings.matmul_shape[precision]),
    }


def build_ours(size: Size, precision: str) -> Callable[[Any], float]:
    """Our model with torch's fused AdamW."""
    model = our_model(size.config)

    def loss_of(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = model.train_forward(rows[:, :-1])
            total = linear_cross_entropy(output.hidden.flatten(0, 1), model.lm_head.weight, rows[:, 1:].flatten())
        return total / rows[:, 1:].numel()

    return _torch_step(model, loss_of, size)


def build_theirs(size: Size, precision: str, settings: Mapping[str, str]) -> Callable[[Any], float]:
    """transformers' model with torch's fused AdamW."""
    model = their_model(size.config, settings).train()

    def loss_of(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    return _torch_step(model, loss_of, size)


def _torch_step(model: torch.nn.Module, loss_of: Callable[[Tensor], Tensor], size: Size) -> Callable[[Any], float]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
    )
    draw = token_source(size)

    def step(turn: Any) -> float:
        loss = loss_of(draw())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def build_own_loop(size: Size, precision: str) -> Callable[[Any], float]:
    """Our model in the step of `finback.train.pretrain`, whose AdamW clips and updates in one pass."""
    return training_step(size.config, precision, token_source(size))


def training_step(
    config: ModelConfig, precision: str, draw: Callable[[], Tensor], recompute: str = "none"
) -> Callable[[Any], float]:
    """The same functions with the same arguments as the loop in `finback.train.pretrain`; the loss of the main head.

    The process keeps freed memory from here on, as the verb's process does.
    """
    keep_freed_memory()
    model = our_model(config)
    parameters = dict(model.named_parameters())
    adam = init_adam_state(parameters)
    coefficients: Any = {"mtp_loss_coef": 0.3, "balance_loss_coef": 1e-4, "precision": precision, "recompute": recompute}

    def step(turn: Any) -> float:
        losses = accumulate_gradients(model, [draw()], **coefficients)
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        with torch.profiler.record_function("optimizer"):
            scale = clip_scale(gradient_norm(gradients), MAX_NORM)
            adamw_update(
                parameters,
                gradients,
                adam,
                lr=LR,
                beta1=BETA1,
                beta2=BETA2,
                epsilon=EPSILON,
                weight_decay=WEIGHT_DECAY,
                gradient_scale=scale,
            )
        for parameter in parameters.values():
            parameter.grad = None
        return losses.loss

    return step


def token_source(size: Any) -> Callable[[], Tensor]:
    """Draws rows of `size.tokens` + 1 random tokens, other ones each time, the same ones for every competitor."""
    generator = torch.Generator().manual_seed(1)
    return lambda: torch.randint(size.config.vocab_size, (size.sequences, size.tokens + 1), generator=generator)


def build_probe(precision: str, shape: tuple[int, int, int]) -> Callable[[Any], float]:
    """The ceiling again, in turns with the others, because it drifts as they do."""
    return lambda turn: matmul_rate(shape, DTYPES[precision], _PROBE_SECONDS)


def _check_losses(turns: Mapping[str, list[Turn]], precision: str) -> None:
    """The first step of all sides has the same loss, or they did not do the same work."""
    ours = turns["finback"][0].value
    for name, theirs in turns.items():
        if name != "matmul":
            difference = abs(ours - theirs[0].value)
            assert difference <= LOSS_TOLERANCE[precision], f"first {precision} loss: finback {ours}, {name} {theirs[0].value}"


def _rows(size: Size, precision: str, turns: Mapping[str, list[Turn]], ceilings: Ceilings) -> list[Row]:
    tokens = size.sequences * size.tokens
    speeds = {name: summarize([tokens / turn.seconds for turn in kept]) for name, kept in turns.items() if name != "matmul"}
    ceiling = max(ceilings.matmul_gflop_per_second[precision], summarize([turn.value for turn in turns["matmul"]]).median)
    gflop_per_token = training_flops_per_token(size.config, size.tokens) / 1e9
    floor = {"gflop": gflop_per_token * tokens, "seconds": gflop_per_token * tokens / ceiling}
    best_peer = max(SETTINGS, key=lambda name: speeds[name].median)

    def against(ours: str, peer: str, target: float | None) -> Row:
        mine, theirs = speeds[ours], speeds[peer]
        extra = {"seconds_per_step": tokens / mine.median, "peer_seconds_per_step": tokens / theirs.median}
        name = f"training {precision}{ours.removeprefix('finback')}"
        return Row(name, "tokens_per_second", *mine, peer, *theirs, target=target, floor=floor, extra=extra)

    def share(name: str, target: float | None) -> Row:
        value, theirs = (speeds[side].median * gflop_per_token / ceiling for side in (name, best_peer))
        label = f"training {precision}{name.removeprefix('finback')}: share of the ceiling"
        floor = {"ceiling_gflop_per_second": ceiling}
        return Row(label, "share", value, target=target, floor=floor, extra={f"share_of_{best_peer}": theirs})

    return [
        *(against("finback", peer, TARGET_RATIO[precision]) for peer in SETTINGS),
        against("finback, own loop", best_peer, None),
        share("finback", TARGET_SHARE if precision == "bf16" else None),
        share("finback, own loop", None),
    ]


def _notes(size: Size) -> list[str]:
    counts = count_params(size.config)
    return [
        f"{counts.total / 1e6:.2f}M parameters, {counts.active / 1e6:.2f}M active; {size.sequences} x {size.tokens} new random "
        "tokens per step; forward, loss, backward, clipping to 1.0 and torch's fused AdamW on both sides; losses of the first step "
        "compared before.",
        "transformers: as it comes (sdpa, grouped_mm). transformers, eager: eager attention and eager experts, sometimes faster on "
        "a CPU. own loop: our model in the step of finback pretrain, with its own AdamW and balance terms, beside the faster one.",
        "FLOP: the matrix products of forward and backward, attention counted causally, nothing for norms, routing and the optimizer. "
        "The ceiling is the highest matmul rate of this run.",
    ]


if __name__ == "__main__":
    from bench.cli import main_of

    main_of("train")
