"""Every wrong field of a run is told by its name, its value and what to do; the resolved config survives its file."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from finback.config import InputError
from finback.presets import tiny, v2_lite_16b
from finback.train.config import PretrainConfig
from tests.train.runs import micro_config

BASE = PretrainConfig(model=tiny().model, steps=10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "field steps is 0, it must be a whole number of at least 1"),
        ({"steps": True}, "field steps is True"),
        ({"steps": None}, "exactly one of the fields steps, tokens and minutes ends a run, but none of them is given"),
        ({"tokens": 5}, "but steps and tokens is given"),
        ({"steps": None, "minutes": 0.0}, "field minutes is 0.0, it must be above 0"),
        ({"steps": None, "minutes": float("inf")}, "field minutes is inf, it must be a finite number"),
        ({"seed": -1}, "field seed is -1"),
        ({"lr": 0.0}, "field lr is 0.0, it must be above 0"),
        ({"lr": float("nan")}, "field lr is nan, it must be a finite number"),
        ({"min_lr": 1.0}, "fields lr (0.002), min_lr (1.0)"),
        ({"final_lr": -1e-9}, "field final_lr is -1e-09, it must be at least 0"),
        ({"adam_beta2": 1.0}, "field adam_beta2 is 1.0, it must be at least 0 and below 1"),
        ({"ema_decay": 1.0}, "field ema_decay is 1.0, it must be at least 0 and below 1"),
        ({"max_grad_norm": 0}, "field max_grad_norm is 0, it must be above 0"),
        ({"weight_decay": -0.1}, "field weight_decay is -0.1, it must be at least 0"),
        ({"micro_batch_size": 0}, "field micro_batch_size is 0"),
        ({"micro_batch_size": 17}, "field micro_batch_size is 17, above global_batch_size (16); lower it"),
        ({"initial_batch_size": 17, "batch_ramp_tokens": 5}, "field initial_batch_size is 17, above global_batch_size"),
        ({"initial_batch_size": 8}, "a batch-size ramp needs"),
        ({"batch_ramp_tokens": 8}, "a batch-size ramp needs"),
        ({"sequence_length": 4096}, "field sequence_length is 4096, above the model's max_position_embeddings (2048)"),
        ({"sequence_length": 1}, "field sequence_length is 1, it must be above num_nextn_predict_layers (1)"),
        (
            {"fp8_scales": "ue8m0"},
            "fields fp8_scales and fp8_gradient_tiles belong to precision fp8, but precision is bf16; leave them out",
        ),
        ({"threads": 0}, "field threads is 0"),
        ({"save_every": 0}, "field save_every is 0"),
        ({"keep_checkpoints": -1}, "field keep_checkpoints is -1"),
        ({"data": ("a",), "data_weights": (1.0, 2.0)}, "field data_weights has 2 values for 1 directories of data"),
        ({"sample_prompts": ("Once",)}, "field sample_prompts needs the field tokenizer"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        replace(BASE, **changes)


def test_a_router_bias_speed_needs_a_router_bias() -> None:
    with pytest.raises(InputError, match=r"field bias_update_speed is 0\.01, but routers with topk_method 'greedy'"):
        replace(v2_lite_16b(), bias_update_speed=0.01)


def test_every_field_has_a_meaning_in_its_help() -> None:
    source = Path(PretrainConfig.__module__.replace(".", "/") + ".py")
    text = (Path(__file__).parents[2] / source).read_text()
    for field in fields(PretrainConfig)[1:]:
        assert re.search(rf'\n    {field.name}: [^\n]+\n    """', text), field.name


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    config = micro_config(tmp_path, lr=0.1 + 0.2, sample_prompts=("a", "b"), data_weights=(1.0,))
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": 1.0}, "field learning_rate is not known"),
    ({"warmup_step": 1}, "field warmup_step is not known; did you mean 'warmup_steps'?"),
    ({"model": None}, "field model is missing"),
    ({"lr": None}, "field lr is None, it must be a finite number"),
    ({"lr": "fast"}, "field lr is 'fast', it must be a finite number"),
    ({"steps": 2.5}, "field steps is 2.5, it must be a whole number"),
    ({"global_batch_size": "16"}, "field global_batch_size is '16'"),
    ({"precision": "fp16"}, "field precision is 'fp16', it must be one of fp32, bf16, fp8"),
    ({"moments_dtype": "int8"}, "field moments_dtype is 'int8', it must be one of fp32, bf16"),
    ({"recompute": "some"}, "field recompute is 'some', it must be one of none, selective, full"),
    ({"data": "a"}, "field data is 'a', it must be a list of texts"),
    ({"data": [1]}, "field data is (1,), it must be a list of texts"),
    ({"data_weights": ["1"], "data": ["a"]}, "field data_weights is ('1',)"),
    ({"tokenizer": 5}, "field tokenizer is 5"),
]
_READ = """
import json, sys
from finback.config import InputError
from finback.train.config import PretrainConfig
for damage in json.load(sys.stdin):
    try:
        PretrainConfig.from_dict(damage)
        print("no error")
    except InputError as error:
        print(error)
"""


def test_a_damaged_config_file_is_told() -> None:
    """In a process of its own: here the tests' own type checks would come first."""
    damaged = json.dumps([BASE.to_dict() | damage for damage, _ in DAMAGE])
    done = subprocess.run([sys.executable, "-c", _READ], input=damaged, capture_output=True, text=True, check=True)
    for told, (damage, words) in zip(done.stdout.splitlines(), DAMAGE, strict=True):
        assert words in told, damage
