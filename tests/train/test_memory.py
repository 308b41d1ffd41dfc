"""The memory estimate against the memory that processes really take, and what is said when it does not fit."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finback.config import InputError
from finback.presets import tiny, tiny_dense, v3_671b
from finback.train.config import PretrainConfig
from finback.train.memory import MemoryEstimate, check_memory, estimate_memory
from finback.train.pretrain import pretrain
from tests.train.runs import ROOT, micro_config

CPU = "cpu"
BASE = PretrainConfig(model=tiny().model, steps=10)
FACTOR = 1.5  # what the module promises

# Growth of the peak resident memory over a process that has already trained a smaller model.
_MEASURE = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
import torch
from finback.model.transformer import Transformer, init_weights
from finback.train.losses import accumulate_gradients
from finback.train.optimizer import adamw_update, init_adam_state
from finback.train.config import PretrainConfig

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def train(config, steps):
    model = Transformer(config.model)
    init_weights(model, 0)
    parameters = dict(model.named_parameters())
    moments = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.moments]
    state = init_adam_state(parameters, moments_dtype=moments)
    for _ in range(steps):
        rows = torch.randint(0, config.model.vocab_size, (config.micro_batch_size, config.sequence_length + 1))
        accumulate_gradients(model, [rows], mtp_loss_coef=0.3, balance_loss_coef=1e-4,
                             precision=config.precision, recompute=config.recompute)
        gradients = {name: p.grad for name, p in parameters.items()}
        adamw_update(parameters, gradients, state, lr=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
        for p in parameters.values():
            p.grad = None

torch.set_num_threads(1)
config = PretrainConfig.from_dict(json.load(sys.stdin))
small = replace(config.model, hidden_size=64, vocab_size=512, num_hidden_layers=2)
train(replace(config, model=small, micro_batch_size=1, sequence_length=16), 1)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
train(config, 2)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize(
    ("precision", "recompute", "micro_batch_size", "moments"),
    [("fp32", "none", 16, "fp32"), ("bf16", "selective", 16, "bf16"), ("bf16", "full", 24, "fp32")],
)
def test_estimate_is_within_its_factor_of_the_measured_peak(
    precision: str, recompute: str, micro_batch_size: int, moments: str
) -> None:
    config = replace(
        BASE,
        precision=precision,
        recompute=recompute,
        micro_batch_size=micro_batch_size,
        global_batch_size=32,
        moments_dtype=moments,
    )
    check_estimate(config)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize(
    ("changes", "precision", "recompute"),
    [({}, "fp32", "none"), ({"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 128}, "bf16", "selective")],
    ids=["llama", "qwen3"],
)
def test_estimate_of_a_dense_model_is_within_its_factor_too(changes: dict[str, Any], precision: str, recompute: str) -> None:
    model = replace(tiny_dense().model, **changes)
    check_estimate(
        PretrainConfig(model=model, steps=10, bias_update_speed=0.0, precision=precision, recompute=recompute)  # type: ignore[arg-type]
    )


def check_estimate(config: PretrainConfig) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], cwd=ROOT, input=json.dumps(config.to_dict()), capture_output=True, text=True, check=True
    )
    measured, estimated = int(done.stdout), estimate_memory(config).on_device
    assert measured / FACTOR <= estimated <= measured * FACTOR


def test_what_saves_memory_lowers_the_estimate() -> None:
    config = BASE
    base = estimate_memory(config).on_device
    less = [
        {"micro_batch_size": 8},
        {"recompute": "selective"},
        {"recompute": "full"},
        {"moments_dtype": "bf16"},
        {"sequence_length": 128},
    ]
    for change in less:
        assert estimate_memory(replace(config, **change)).on_device < base, change
    selective, full = (estimate_memory(replace(config, recompute=mode)).activations for mode in ("selective", "full"))
    assert full < selective
    assert estimate_memory(config).moving_average == 0
    assert estimate_memory(replace(config, ema_decay=0.9)).moving_average == estimate_memory(config).parameters


def test_v3_needs_what_its_parameters_need() -> None:
    estimate = estimate_memory(v3_671b())
    parameters = 671_026_419_200 + 13_463_426_304 - 2 * 926_679_040
    assert estimate.parameters == estimate.gradients == pytest.approx(4 * parameters, rel=1e-6)
    assert estimate.moments == estimate.parameters  # two, in bf16


def needed(**changes: object) -> int:
    return estimate_memory(replace(BASE, **changes)).on_device


@pytest.mark.parametrize(
    ("available", "words"),
    [
        (needed() - 1, "lower micro_batch_size from 16 to 8 (the result stays the same)"),
        (needed(micro_batch_size=3), "lower micro_batch_size from 16 to 2 (the result stays the same)"),
        (needed(micro_batch_size=1) - 1, "set micro_batch_size to 1 and recompute to selective"),
        (needed(micro_batch_size=1, recompute="selective") - 1, "set micro_batch_size to 1 and recompute to full"),
        (needed(micro_batch_size=1, recompute="full") - 1, "recompute to full, and lower sequence_length to 128"),
        (1_000_000, "weights, gradients and moments alone are too large"),
    ],
)
def test_too_little_memory_names_the_field_to_lower(available: int, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        check_memory(BASE, CPU, available)
    assert re.search(r"needs about \d+\.\d GiB on cpu and \d+\.\d are available", str(caught.value))


def test_enough_memory_gives_the_estimate() -> None:
    assert isinstance(check_memory(BASE, CPU, needed()), MemoryEstimate)
    assert isinstance(check_memory(BASE, CPU, None), MemoryEstimate)


def test_a_run_that_cannot_fit_does_not_start(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data)
    huge = replace(config, model=replace(config.model, n_routed_experts=2**22, n_group=1, topk_group=1, hidden_size=4096))
    with pytest.raises(InputError, match="are available; weights, gradients and moments alone are too large"):
        pretrain(huge, tmp_path / "run")
    assert not (tmp_path / "run").exists()
