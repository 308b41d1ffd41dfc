"""Rewards of the last stage, where reasoning and general prompts come together (R1-N equations 8 to 10)."""

from finback.rewards.answers import exact
from finback.rewards.reward import Example


def rule(prompt: str, completion: str, example: Example) -> float:
    """The exact answer where the row has one; 0 for a general prompt, which rules cannot judge."""
    return exact(prompt, completion, example) if "answer" in example else 0.0
