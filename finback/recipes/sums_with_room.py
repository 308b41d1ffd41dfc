"""`finback r1 small`: the settings under which every stage of the ladder has room for the next.

The task is harder than the quickstart's: up to six terms, which may repeat, and thoughts that say what is left of a sum instead of what
is added up. R1-Zero would learn nearly all of it in 60 steps; here it is stopped long before, and so is the reasoning RL; few samples
of it are learnt from, and the last stage has the most steps. The base is wider than the quickstart's and reads four times as much:
after 8M tokens one of three seeds had not found out how to add, and no stage behind it could. On sums of up to eight terms a base of
this size knows too little to begin with.

Most thoughts of the corpus switch between the languages: what a base writes at a temperature below one is purer than what it read.
Which of them R1-Zero takes up is nothing to its rewards. Left alone it drifts: of runs on one base, one may mix in half of its thoughts
and another in none. The divergence from the base keeps what the rewards are indifferent to about as it was.
"""

from dataclasses import replace
from pathlib import Path

from finback.data.chains import ChainSettings, Habits
from finback.recipes.config import LadderConfig, QuickstartConfig
from finback.recipes.corpus import SumsTask
from finback.recipes.small_ladder import small_ladder
from finback.rl.config import GRPOConfig

SUMS_WITH_ROOM = SumsTask(
    ChainSettings(least_terms=3, most_terms=6, largest=9),
    Habits(own_language=0.32, other_language=0.03),
    prompts=8000,
    held_out=1600,
    held_out_longer=100,
)


def roomy_ladder(data: Path, config: QuickstartConfig) -> LadderConfig:
    """The ladder over the files that the corpus stage writes into `data`."""
    before = small_ladder(data, config)

    def steps(count: int) -> int:
        return max(1, round(count * config.ladder))

    return replace(
        before,
        zero=replace(before.zero, steps=steps(16), beta=0.05),
        reasoning=replace(before.reasoning, steps=steps(30), lr=2e-4, final_lr=2e-5),
        all_scenario=replace(before.all_scenario, steps=steps(70), lr=3e-4, final_lr=2e-5, temperature=1.0),
        cold_start_prompts=steps(1000),
        rejection_prompts=steps(600),
        student_prompts=steps(2500),
    )


def student_rl_settings(ladder: LadderConfig) -> GRPOConfig:
    """Of reinforcement learning on the student alone: R1-Zero's, at the higher rate that a smaller model takes, and free to go where
    the reward is."""
    return replace(ladder.zero, beta=0.0, lr=1e-3, final_lr=1e-4)
