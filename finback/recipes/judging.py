"""Who judges an answer in a recipe: the exact answer, or rewards of one's own in its place.

Both decide wherever a stage asks whether an answer is right: in training, rejection sampling, evaluation and gates.
"""

from collections.abc import Sequence

from finback.config import InputError
from finback.eval.task import Task
from finback.recipes.config import LadderConfig
from finback.rewards.answers import behind_thought, final_answer
from finback.rewards.reward import Example, load_reward, load_rewards
from finback.rl.rejection import Check

EXACT = "finback.rewards.answers:exact"
EXACT_TAG = "finback.rewards.answers:exact_answer_tag"
ZERO_FORMAT = "finback.rewards.format:r1_zero_format"
CHAT_FORMAT = "finback.rewards.format:think_then_answer"
ONE_LANGUAGE = "finback.rewards.language:language_consistency"


def rewards(ladder: LadderConfig, exact: str, *others: str) -> tuple[str, ...]:
    """What is learnt from: the ladder's own rewards or `exact`, and others."""
    return (*(ladder.reward or (exact,)), *others)


def check_own(own: Sequence[str], *beside: Sequence[str]) -> None:
    """InputError if rewards of one's own cannot be loaded, or one of them is among those that a stage has `beside` them by itself."""
    if own:
        load_rewards(own)
    for others in beside:
        try:
            load_rewards((*own, *others))
        except InputError as error:
            raise InputError(f"{error}; the recipe has {', '.join(others)} by itself, so leave that one out") from None


def checks(ladder: LadderConfig, exact: str, *others: str) -> list[Check]:
    """What a sample must pass to be learnt from: the judge, and each of the others."""
    judges = len(ladder.reward) or 1
    loaded = load_rewards(rewards(ladder, exact, *others))
    least = ladder.least_reward if ladder.reward else 1.0
    return [Check(loaded[:judges], least), *(Check((reward,)) for reward in loaded[judges:])]


def task(ladder: LadderConfig, title: str, examples: Sequence[Example]) -> Task:
    """Problems whose answers are judged so. Rewards of one's own may hang: they run in processes that can be killed."""
    if not ladder.reward:
        return Task(title, examples, load_reward(EXACT), final_answer)
    own = load_rewards(ladder.reward)
    return Task(title, examples, own[0], _vote, rewards=own, least=ladder.least_reward)


def _vote(prompt: str, completion: str) -> str | None:
    """A final answer in one of the usual forms, else all that is said behind the thought."""
    return final_answer(prompt, completion) or behind_thought(prompt, completion)
