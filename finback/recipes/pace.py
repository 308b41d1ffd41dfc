"""How long a small run may be on this machine, and in which precision: found once, before its first stage, and kept with the run."""

import math
import time
from dataclasses import replace
from typing import Literal

import torch

from finback.model.transformer import Transformer, init_weights
from finback.ops.products import cpu_multiplies_bfloat16
from finback.recipes.config import QuickstartConfig
from finback.recipes.stages import Run, write_manifest
from finback.train.config import PretrainConfig
from finback.train.loop import clipped_update, take_gradients
from finback.train.losses import accumulate_gradients
from finback.train.optimizer import gradient_norm, init_adam_state

WORK = {"quickstart": 3.3, "r1-small": 2.6}
"""All stages of a recipe together, in units of its pre-training: what recorded runs took on two cores."""
ENOUGH = {"quickstart": 2_250_000, "r1-small": 8_400_000}
"""Tokens of pre-training: the shortest quickstart whose base could work out sums, none shorter was tried, and of `r1 small` a little
more than a base needs that could not. Nothing behind a base finds it out for it."""
WARM_STEPS, TIMED_STEPS = 8, 12
_SHARE = 0.95  # of the minutes: machines become slower when they are warm, or shared
_FINE = 20  # parts of the whole that a run is cut down by, so that small differences between two measurements change nothing
_LEAST = 4  # of them, which are always done
_NO_MATTER = 1_000_000  # tokens of pre-training, all stages counted, that no machine takes many minutes for


def fit_to_machine(run: Run, config: QuickstartConfig, preset: PretrainConfig) -> QuickstartConfig:
    """`config` with its precision, and as many tokens and as long a ladder as fit into its minutes here; what was found stays in the
    run's manifest.

    A fast machine changes nothing. A slower one gets a share of the tokens, and of the steps and prompts behind them, that is a whole
    number of twentieths; it is told in one line, and is the same when the run is continued.
    """
    if "precision" not in run.manifest:
        run.manifest["precision"] = precision_here(config)
        write_manifest(run)
    config = replace(config, precision=run.manifest["precision"])
    work = WORK[run.manifest["recipe"]] * config.tokens
    if config.minutes is None or work < _NO_MATTER:
        return config
    if "pace" not in run.manifest:
        speed = training_speed(replace(preset, precision=precision_here(config)), config.vocab_size)
        run.manifest["pace"] = {"tokens_per_second": round(speed), "share": fitting_share(60 * config.minutes * speed / work)}
        write_manifest(run)
    pace = run.manifest["pace"]
    share: float = pace["share"]
    told = f"This machine trains on about {pace['tokens_per_second']:,} tokens a second"
    if share == 1:
        print(f"{told}: the whole run fits into {config.minutes:g} minutes.")
        return config
    minutes = share * work / (60 * max(1, pace["tokens_per_second"]))
    if minutes > config.minutes:
        print(f"{told}: the run is cut to {share:.0%}, the least there is, and takes about {minutes:,.0f} minutes.")
    else:
        print(f"{told}: to end within {config.minutes:g} minutes, the run is cut to {share:.0%} (--minutes changes that).")
    tokens, enough = int(config.tokens * share), ENOUGH[run.manifest["recipe"]]
    if tokens < enough <= config.tokens:
        needed = math.ceil(minutes * enough / tokens / _SHARE)
        print(f"A base of less than {enough:,} tokens may not come to solving sums; here --minutes {needed} should do.")
    return replace(config, tokens=tokens, student_tokens=int(config.student_tokens * share), ladder=config.ladder * share)


def precision_here(config: QuickstartConfig) -> Literal["bf16", "fp32"]:
    """The precision of training that the settings ask for, or what is faster on this machine."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if torch.cuda.is_available() or cpu_multiplies_bfloat16() else "fp32"


def fitting_share(room: float) -> float:
    """The share of a run to do, where `room` is how often the whole run would fit into its time: 1, or a number of twentieths."""
    return min(_FINE, max(_LEAST, math.floor(room * _SHARE * _FINE))) / _FINE


def training_speed(preset: PretrainConfig, vocab_size: int) -> float:
    """Tokens per second of pre-training steps of `preset` on random tokens: the median of a few steps, some warm ones before."""
    model = Transformer(replace(preset.model, vocab_size=vocab_size, torch_dtype="float32"), dtype=torch.float32)
    init_weights(model, seed=0)
    parameters = dict(model.named_parameters())
    adam = init_adam_state(parameters)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        rows = torch.randint(vocab_size, (preset.micro_batch_size, preset.sequence_length + 1), generator=generator)
        start = time.perf_counter()
        accumulate_gradients(
            model,
            [rows],
            mtp_loss_coef=preset.mtp_loss_coef,
            balance_loss_coef=preset.balance_loss_coef,
            precision=preset.precision,
            recompute=preset.recompute,
        )
        gradients = take_gradients(parameters)
        clipped_update(parameters, gradients, adam, preset, lr=preset.lr, norm=gradient_norm(gradients))
        seconds.append(time.perf_counter() - start)
    middle = sorted(seconds[WARM_STEPS:])[TIMED_STEPS // 2]
    return preset.micro_batch_size * preset.sequence_length / middle
