"""The dtype of statistics and accumulators."""

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for everything up to float32; float64 stays, so that formulas can be checked to its precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32
