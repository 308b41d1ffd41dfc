"""reasoning-gym's scorers as a verdict: an answer that gets all of the score is right, and part of a score is not half an answer."""

from finback.rewards import gym
from finback.rewards.reward import Example


def solved(prompt: str, completion: str, example: Example) -> float:
    """1.0 where the family's own scorer gives the answer everything. Rows are those of `finback.data.gym.gym_rows`."""
    return float(gym.gym_score(prompt, completion, example) >= 1.0)


def prepare() -> None:
    """Load the scorers before the first deadline."""
    gym.prepare()
