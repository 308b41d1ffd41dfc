"""The planner as one page without fetches."""

from collections.abc import Mapping

from finback.config import ModelConfig


def page(models: Mapping[str, ModelConfig]) -> str:
    """The page's HTML."""
    return f"<!doctype html><title>finback plan</title><p>{', '.join(models)}"
