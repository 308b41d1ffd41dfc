"""Runs that start from weights which are there already."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.config import InputError, ModelConfig
from finback.model.checkpoint import hf_tensors, load, save
from finback.model.transformer import Transformer, init_weights
from finback.train.initial import check_init_from
from finback.train.pretrain import pretrain
from finback.train.session import read_run_config
from tests.train.runs import micro_config, micro_dense, micro_model, read_rows


def write_weights(directory: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Path:
    """Random weights of a seed that no test trains with, router biases included."""
    model = Transformer(config, dtype=dtype)
    init_weights(model, 77)
    with torch.no_grad():
        for router in model.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.uniform_(-1, 1)
    save(model, directory)
    return directory


@pytest.mark.parametrize(("make", "dtype"), [(micro_model, torch.float32), (micro_dense, torch.bfloat16)])
def test_a_run_starts_from_the_weights_of_a_directory(make: Any, dtype: torch.dtype, micro_data: Path, tmp_path: Path) -> None:
    """A learning rate too small to change anything: after a step the checkpoint still holds the directory's weights."""
    model = make(eos_token_id=5, torch_dtype="bfloat16")  # what may differ
    weights = write_weights(tmp_path / "weights", make(), dtype)
    still = {"lr": 1e-30, "min_lr": 0.0, "final_lr": 0.0, "bias_update_speed": 0.0, "ema_decay": None, "weight_decay": 0.0}
    config = micro_config(micro_data, model=model, init_from=str(weights), steps=1, **still)
    checkpoint = pretrain(config, tmp_path / "run")
    actual, expected = dict(hf_tensors(load(checkpoint))), dict(hf_tensors(load(weights)))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert read_run_config(tmp_path / "run").init_from == str(weights)


def test_training_goes_on_where_it_stopped(micro_data: Path, tmp_path: Path) -> None:
    """The loss of the first step is that of the trained weights, and the run can be resumed without the directory."""
    config = micro_config(micro_data, steps=12, eval_every=None, save_every=None)
    first = pretrain(config, tmp_path / "first")
    again = replace(config, init_from=str(first), steps=4, save_every=2, keep_checkpoints=0)
    pretrain(again, tmp_path / "second")
    start, end = (read_rows(tmp_path / run)[row]["loss"] for run, row in (("first", 0), ("first", -1)))
    assert read_rows(tmp_path / "second")[0]["loss"] < end + 0.2 * (start - end)
    first.rename(tmp_path / "gone")
    losses = [row["loss"] for row in read_rows(tmp_path / "second")]
    (tmp_path / "second" / "checkpoints" / "step-4").rename(tmp_path / "step-4")
    pretrain(again, tmp_path / "second", resume=True)
    assert [row["loss"] for row in read_rows(tmp_path / "second")] == losses


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 40}, "has hidden_size 32, and the model has 40; give the model the value of its weights"),
        ({"n_group": 2, "rope_theta": 5.0}, "has n_group 4, and the model has 2"),  # the first of several
        ({"num_nextn_predict_layers": 1}, "has num_nextn_predict_layers 2, and the model has 1"),
        ({"rope_theta": 500.0}, "has rope_theta 10000.0, and the model has 500.0"),
    ],
)
def test_the_first_field_that_differs_is_named(changes: dict[str, Any], told: str, micro_data: Path, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "weights", micro_model())
    config = micro_config(micro_data, init_from=str(weights), model=micro_model(**changes))
    with pytest.raises(InputError, match=re.escape(f"init_from {weights} {told}")):
        pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_without_mtp_weights_says_what_to_do(micro_data: Path, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "weights", micro_model(num_nextn_predict_layers=0))
    with pytest.raises(InputError, match="it holds no MTP weights, so set the model's to 0"):
        check_init_from(micro_config(micro_data, init_from=str(weights)))


def test_a_directory_that_is_none_is_told(micro_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a directory"):
        pretrain(micro_config(micro_data, init_from=str(tmp_path / "nowhere")), tmp_path / "run")
