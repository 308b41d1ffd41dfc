"""A scalar head over the hidden state of a text's last token: what turns a language model into a reward model (R1 in Nature, Methods).

The head lies beside the model's own files, in `reward_head.safetensors` with `reward_head.json`: `finback.load` and every other reader
find the language model there and nothing else.
"""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from finback.config import InputError, TensorSpec
from finback.model.directory import write_durably
from finback.model.safetensors_io import TensorReader, read_header, write_safetensors
from finback.model.transformer import Transformer

HEAD_FILE = "reward_head.safetensors"
HEAD_CONFIG_FILE = "reward_head.json"


class RewardHead(nn.Module):
    """weight . hidden + bias, in float32. It begins at zero: every text scores 0."""

    def __init__(self, hidden_size: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, device=device, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=torch.float32))

    def forward(self, hidden: Float[Tensor, "B T D"], last: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Scores of B rows whose texts end at the positions `last`."""
        rows = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
        with torch.autocast(hidden.device.type, enabled=False):
            return (rows @ self.weight[0]) + self.bias


def score_rows(
    model: Transformer, head: RewardHead, input_ids: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Scores of texts padded at their end, `lengths` tokens each. MTP modules have no part in it."""
    valid = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths.unsqueeze(1)
    scores: Tensor = head(model.train_forward(input_ids, valid=valid, mtp=False).hidden, lengths - 1)
    return scores


def save_reward_head(head: RewardHead, directory: Path, config: dict[str, Any]) -> None:
    """Write the head beside a model; `config` says how texts are put together for it."""
    tensors = {name: parameter.detach().cpu() for name, parameter in head.named_parameters()}
    specs = [TensorSpec(name, tuple(tensor.shape), "F32") for name, tensor in tensors.items()]
    write_safetensors(directory / HEAD_FILE, specs, iter(tensors.items()))
    write_durably(directory / HEAD_CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def load_reward_head(directory: Path, hidden_size: int, device: torch.device) -> tuple[RewardHead, dict[str, Any]]:
    """The head beside a model, and its config; InputError where there is none or it fits another model."""
    path = directory / HEAD_CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{directory} holds no reward model (no {HEAD_CONFIG_FILE}); make one with finback reward-model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch or write it again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a JSON {type(config).__name__} where an object is expected")
    head = RewardHead(hidden_size, device)
    stored = read_header(directory / HEAD_FILE)
    with torch.no_grad(), TensorReader() as reader:
        for name, parameter in head.named_parameters():
            if name not in stored or tuple(stored[name].shape) != tuple(parameter.shape):
                raise InputError(
                    f"{directory / HEAD_FILE} has no {name} of shape {tuple(parameter.shape)}: it is another model's"
                )
            reader.read_into(stored[name], parameter)
        reader.wait()
    return head, config
