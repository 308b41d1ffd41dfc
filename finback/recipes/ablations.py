"""Runs beside the ladder, each of which answers one question of the paper's.

- What does one language cost? R1-Zero again, from the same base in the same steps, with a reward for the question's language (R1
  section 2.3.2 has it that accuracy falls a little).
- Would reinforcement learning alone have done as much for the student? (R1 section 4.1 has it that it would not.)
"""

import math
from dataclasses import replace
from typing import Any

from finback.config import ModelConfig
from finback.data.tokenizer import load_tokenizer
from finback.recipes import judging
from finback.recipes.config import LadderConfig
from finback.recipes.ladder import TRAINING, measure, read_rows, tell_rise, train_by_grpo
from finback.recipes.stages import Run
from finback.rl.config import GRPOConfig
from finback.train.metrics import METRICS_FILE, read_metrics
from finback.train.throughput import training_flops_per_token

LANGUAGE_REWARD = "finback.rewards.language:language_consistency"
SPARE = 3.0
"""Samples that become shorter, and groups that teach nothing, leave reinforcement learning below its estimate."""


def r1_zero_language(run: Run, ladder: LadderConfig) -> dict[str, Any]:
    """R1-Zero once more, the reward for the question's language added and nothing else changed."""
    rewards = (*_zero_rewards(ladder), LANGUAGE_REWARD)
    settings = replace(ladder.zero, data=(str(ladder.prompts),), reward=rewards, template=ladder.zero_template)
    facts = train_by_grpo(run, "r1-zero-language", "base", settings)
    after = measure(run, ladder, "r1-zero-language", ladder.zero_form)
    tell_rise("r1-zero", run.facts("r1-zero"), "r1-zero-language", after)
    for title, numbers in after["results"].items():
        before = run.facts("r1-zero")["results"][title]["mixing_rate"]
        print(f"thoughts that mix languages on {title}: {before:.1%} without the reward, {numbers['mixing_rate']:.1%} with it")
    return {**after, **facts}


def student_rl(
    run: Run, ladder: LadderConfig, settings: GRPOConfig, teacher: str = "all-scenario-rl", spare: float = SPARE
) -> dict[str, Any]:
    """GRPO on the student's base, rules alone as for R1-Zero, with at least the compute that distillation had: `student` went before.

    How many steps `spare` times that is follows from the lengths of the base's samples; what was spent in the end is counted and told.
    """
    base = run.facts("student")["base"]["results"]
    first = next(iter(base.values()))
    student, model = _config(run, "student-base"), _config(run, teacher)
    budget = distillation_flops(run, student, model, teacher)
    prompt = _prompt_tokens(run, ladder)
    step = rl_step_flops(settings, student, prompt, first["mean_tokens"])
    steps = max(1, math.ceil(spare * budget / step))
    print(f"distillation took {budget:.3g} FLOPs, a step of reinforcement learning about {step:.3g}: {steps} steps")
    settings = replace(
        settings,
        steps=steps,
        data=(str(ladder.prompts),),
        reward=_zero_rewards(ladder),
        template=ladder.zero_template,
    )
    facts = train_by_grpo(run, "student-rl", "student-base", settings)
    spent = rl_flops(read_metrics(run.directory / TRAINING / "student-rl" / METRICS_FILE), student, prompt + first["mean_tokens"])
    print(f"reinforcement learning took {spent:.3g} FLOPs, {spent / budget:.2f} times as many")
    after = measure(run, ladder, "student-rl", ladder.zero_form)
    tell_rise("student-base", run.facts("student")["base"], "student-rl", after)
    return {"distillation_flops": budget, "rl_flops": spent, "steps": steps, **after, **facts}


def _zero_rewards(ladder: LadderConfig) -> tuple[str, ...]:
    """Those of R1-Zero."""
    return judging.rewards(ladder, judging.EXACT_TAG, f"{judging.ZERO_FORMAT}:0.1")


def distillation_flops(run: Run, student: ModelConfig, teacher_model: ModelConfig, teacher: str) -> float:
    """Of the student's fine-tuning, and of the teacher's samples, of which it learns; the teacher's own training is not counted."""
    length = next(iter(run.facts(teacher)["results"].values()))["mean_tokens"]
    facts = run.facts("student")
    sampled = facts["funnel"][0][1] * length  # as many samples as there were, whatever number of prompts was asked for
    trained: int = facts["tokens"]
    flops: float = trained * _training(student, length) + sampled * _forward(teacher_model, length)
    return flops


def rl_step_flops(settings: GRPOConfig, model: ModelConfig, prompt_tokens: float, sample_tokens: float) -> float:
    """Of one step of GRPO: each sample is written, token by token, and gone through forward and backward; each prompt is gone through
    once for all of its samples."""
    prompts = settings.prompts_per_step * prompt_tokens
    sampled = settings.prompts_per_step * settings.num_generations * sample_tokens
    length = prompt_tokens + sample_tokens
    return sampled * _forward(model, length) + (prompts + sampled) * _training(model, length)


def rl_flops(rows: list[dict[str, Any]], model: ModelConfig, length: float) -> float:
    """Of a finished run, from its records: the tokens that were sampled and those that were trained on, as they were.

    Forward passes without a gradient (the reference's, and of old log-probabilities) are not counted: what is compared favours
    reinforcement learning.
    """
    trained = sum(row["tokens_per_second"] * row["training_seconds"] for row in rows)
    return float(rows[-1]["tokens"] * _forward(model, length) + trained * _training(model, length))


def _training(model: ModelConfig, length: float) -> float:
    """FLOPs of a token, forward and backward, without MTP modules, which either way trains along where there are some."""
    return training_flops_per_token(replace(model, num_nextn_predict_layers=0), round(length))


def _forward(model: ModelConfig, length: float) -> float:
    return _training(model, length) / 3


def _config(run: Run, name: str) -> ModelConfig:
    return ModelConfig.from_hf(run.directory / name)


def _prompt_tokens(run: Run, ladder: LadderConfig) -> float:
    """Mean length of the student's prompts in tokens."""
    tokenizer = load_tokenizer(run.directory / "student-base")
    texts = [ladder.zero_template.replace("{prompt}", row["prompt"]) for row in read_rows(ladder.prompts)[:200]]
    lengths = [len(tokenizer.encode(text, add_bos=True)) for text in texts]
    return sum(lengths) / len(lengths)
