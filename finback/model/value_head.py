"""A scalar head over every hidden state: what turns a language model into PPO's critic."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ValueHead(nn.Module):
    """weight . hidden + bias, in float32. It begins at zero: every state is worth 0."""

    def __init__(self, hidden_size: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros((), device=device, dtype=torch.float32))

    def forward(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """The value of each state."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight + self.bias
