"""Too little memory is told before a run starts, with the field to lower."""

import pytest
import torch

from finback.config import InputError, count_params
from finback.presets import tiny
from finback.rl.config import GRPOConfig
from finback.rl.memory import check_memory, needed_bytes

MODEL = tiny().model
CPU = torch.device("cpu")


def test_the_reference_costs_a_model_and_smaller_batches_less():
    config = GRPOConfig(model="", beta=0.0)
    whole = needed_bytes(config, MODEL, 512, 8192)
    assert needed_bytes(GRPOConfig(model="", beta=0.1), MODEL, 512, 8192) - whole >= 4 * 8_000_000
    sampled = needed_bytes(GRPOConfig(model="", beta=0.0, rollout_precision="bf16"), MODEL, 512, 8192)
    assert sampled - whole == 2 * count_params(MODEL).total
    assert needed_bytes(config, MODEL, 512, 1024) < whole
    assert check_memory(config, MODEL, 512, CPU, whole) == whole
    assert check_memory(config, MODEL, 512, CPU, None) == whole


def test_the_field_to_lower_is_named_and_lowering_it_helps():
    config = GRPOConfig(model="", beta=0.0)
    available = needed_bytes(config, MODEL, 512, 2048)
    with pytest.raises(InputError, match=r"lower micro_batch_tokens from 8192 to 2048 \(the result stays the same\)"):
        check_memory(config, MODEL, 512, CPU, available)
    with pytest.raises(InputError, match="set beta to 0"):
        check_memory(GRPOConfig(model=""), MODEL, 512, CPU, 1 << 20)
    with pytest.raises(InputError, match="take a smaller model"):
        check_memory(config, MODEL, 512, CPU, 1 << 20)
