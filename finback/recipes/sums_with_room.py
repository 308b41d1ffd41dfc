"""`finback r1 small`: the settings under which every stage of the ladder has room for the next.

The task is the quickstart's. On it R1-Zero learns nearly all in 60 steps; here it is stopped long before, and the stages behind it
have more samples to learn from and more steps. On sums of up to eight terms a base of this size knows too little to begin with.

Most thoughts of the corpus switch between the languages: what a base writes at a temperature below one is purer than what it read.
"""

from dataclasses import replace
from pathlib import Path

from finback.data.chains import Habits
from finback.recipes.config import LadderConfig, QuickstartConfig
from finback.recipes.corpus import QUICKSTART_SUMS
from finback.recipes.small_ladder import small_ladder
from finback.rl.config import GRPOConfig

SUMS_WITH_ROOM = QUICKSTART_SUMS._replace(habits=Habits(own_language=0.25, other_language=0.1), held_out=800, held_out_longer=100)

LONGER_STEPS = 40


def roomy_ladder(data: Path, config: QuickstartConfig) -> LadderConfig:
    """The ladder over the files that the corpus stage writes into `data`."""
    before = small_ladder(data, config)

    return replace(
        before,
        zero=replace(before.zero, steps=_share(24, config)),
        reasoning=replace(before.reasoning, steps=_share(40, config), lr=2e-4, final_lr=2e-5),
        all_scenario=replace(before.all_scenario, steps=_share(70, config), lr=3e-4, final_lr=2e-5, temperature=1.0),
        cold_start_prompts=_share(1000, config),
        rejection_prompts=_share(1200, config),
        student_prompts=_share(2500, config),
    )


def longer_zero_settings(ladder: LadderConfig, config: QuickstartConfig) -> GRPOConfig:
    """Of R1-Zero with a reward for one language, and of its twin without: the ladder's R1-Zero ends before habits are settled."""
    return replace(ladder.zero, steps=_share(LONGER_STEPS, config))


def student_rl_settings(ladder: LadderConfig) -> GRPOConfig:
    """Of reinforcement learning on the student alone: R1-Zero's, at the higher rate that a smaller model takes."""
    return replace(ladder.zero, lr=1e-3, final_lr=1e-4)


def _share(count: int, config: QuickstartConfig) -> int:
    return max(1, round(count * config.ladder))
