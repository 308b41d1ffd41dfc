"""Settings of the R1 ladder for the quickstart's model and task: each stage one to four minutes on two cores."""

from dataclasses import replace
from pathlib import Path

from finback.recipes.config import LadderConfig, QuickstartConfig
from finback.recipes.pace import precision_here
from finback.rl.config import GRPOConfig
from finback.train.sft_config import SFTConfig

ZERO_TEMPLATE = "User: {prompt}\nAssistant:"
"""R1's table 1 without its preamble: a base that has read a few million tokens follows no description of a form."""


def small_ladder(data: Path, config: QuickstartConfig) -> LadderConfig:
    """The ladder over the files that the corpus stage writes into `data`."""
    has_text = config.text != "none"

    def steps(count: int) -> int:
        return max(1, round(count * config.ladder))

    rl = GRPOConfig(
        model="",
        precision=precision_here(config),
        steps=steps(30),
        max_completion_length=96,
        minibatches=2,
        beta=0.0,
        lr=5e-4,
        final_lr=5e-5,
        save_every=20,
        samples_per_step=2,
    )
    sft = SFTConfig(
        epochs=3,
        lr=1e-3,
        global_batch_size=32,
        micro_batch_size=32,
        batching="pad",
        precision=precision_here(config),
        save_every=None,
        sequence_length=256,
    )
    return LadderConfig(
        prompts=data / "prompts.jsonl",
        held_out={"sums": data / "held-out.jsonl", "longer sums": data / "held-out-longer.jsonl"},
        zero_template=ZERO_TEMPLATE,
        general=data / "general.jsonl" if has_text else None,
        general_prompts=data / "general-prompts.jsonl" if has_text else None,
        zero=rl,
        cold_start=replace(sft, epochs=6),
        reasoning=replace(rl, steps=steps(20), lr=3e-4, final_lr=3e-5),
        rejection=sft,
        all_scenario=replace(rl, steps=steps(15), lr=3e-4, final_lr=3e-5, temperature=0.7),
        student=replace(sft, lr=2e-3, epochs=6),
        cold_start_prompts=steps(400),
        rejection_prompts=steps(800),
        student_prompts=steps(1500),
        gate=config.gate,
        least_rows=50,
        eval_problems=config.eval_problems,
        eval_tokens=160,
    )
