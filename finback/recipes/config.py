"""Fields of the recipes: runs of several stages. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from finback.config import InputError
from finback.eval.config import PromptForm
from finback.rl.config import R1_ZERO_TEMPLATE, GRPOConfig
from finback.train.config import Recompute
from finback.train.sft_config import SFTConfig

LEAST_VOCABULARY, MOST_VOCABULARY = 276, 2**20
Text = Literal["auto", "fables", "docstrings", "none"]


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise InputError(f"field seed is {seed}, it must be at least 0 and below 2^63")


def _check_rates(config: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"field {name} is {getattr(config, name)}, it must be above 0")


@dataclass(frozen=True)
class QuickstartConfig:
    """The whole small run: corpus, tokenizer, pre-training, comparison with a trigram model, and the R1 ladder on top."""

    out: str = "runs/quickstart"
    """Directory of the run; an interrupted run that is there is continued."""
    tokens: int = 3_000_000
    """Tokens of pre-training, of which two cores read 0.6 to 2 million a minute; the stages behind it take more than twice as long."""
    minutes: float | None = 20.0
    """Time for the whole run. The machine is timed first; on a slower one tokens and ladder are cut to what fits. None: never cut."""
    student_tokens: int = 1_500_000
    """Tokens of pre-training of the dense student."""
    ladder: float = 1.0
    """Length of the stages behind the base: steps of reinforcement learning and prompts that are sampled are multiplied by it."""
    eval_problems: int = 200
    """Held-out sums that each model is measured on, with 16 samples of each."""
    seed: int = 0
    """Seed of everything: problems, weights, order of the data, samples."""
    text: Text = "auto"
    """Text beside the sums: English and Chinese fables from the package registry, or docstrings of Python's own library; auto: the
    fables, and the docstrings where they cannot be had."""
    problems: int = 90_000
    """Worked sums to generate for pre-training."""
    vocab_size: int = 2048
    """Size of the vocabulary that is trained on the corpus."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of all training; auto: bf16 on a GPU and on processors that multiply it, fp32 on others, which is faster there."""
    cache: str | None = None
    """Directory that keeps what is fetched; ~/.cache/finback if not given."""
    gate: Literal["stop", "tell"] = "tell"
    """What follows when a stage did not improve what it must: the run stops, or says so and goes on."""
    fresh: bool = False
    """Remove the run that is in `out` and start over."""

    def __post_init__(self) -> None:
        for name in ("tokens", "student_tokens", "eval_problems"):
            if getattr(self, name) < 1:
                raise InputError(f"field {name} is {getattr(self, name)}, it must be at least 1")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"field minutes is {self.minutes}, it must be above 0")
        if not 0 < self.ladder <= 100:
            raise InputError(f"field ladder is {self.ladder}, it must be above 0 and at most 100")
        _check_seed(self.seed)
        if not LEAST_VOCABULARY <= self.vocab_size <= MOST_VOCABULARY:
            raise InputError(
                f"field vocab_size is {self.vocab_size}, it must be from {LEAST_VOCABULARY} (256 bytes and the special tokens) to "
                f"{MOST_VOCABULARY}"
            )
        if self.problems < 100:
            raise InputError(f"field problems is {self.problems}, it must be at least 100, so that some can be held out")


R1_SMALL = QuickstartConfig(
    out="runs/r1-small", tokens=12_000_000, student_tokens=1_000_000, eval_problems=1600, problems=240_000, minutes=120.0
)
"""Where `finback r1 small` begins: the quickstart with longer stages behind R1-Zero, and with runs beside the ladder."""


@dataclass(frozen=True)
class R1Config:
    """The R1 ladder on a base model and a task of one's own."""

    base: Annotated[str, tyro.conf.Positional]
    """Directory of the base model. On the command line it comes first."""
    data: str = ""
    """Rows with `prompt`, `answer` and, where it is known, `language` (zh or en): a .jsonl file."""
    held_out: str = ""
    """Rows of the same kind that no stage trains on: what every model is measured on."""
    reward: tuple[str, ...] = ()
    """What judges an answer in the place of the exact one, as module:function[:weight] or file.py:function[:weight]; several add up.
    It is learnt from, and decides in rejection sampling, evaluation and gates; rows then need a prompt and what it reads."""
    least_reward: float = 1.0
    """With `reward`: an answer is right whose weighted sum reaches this."""
    general: str | None = None
    """Conversations about other things, mixed into the fine-tuning after rejection sampling: rows of `messages`."""
    general_prompts: str | None = None
    """Prompts about other things for the last reinforcement learning."""
    general_rewards: tuple[str, ...] = ()
    """What is rewarded in answers to these, as module:function[:weight]."""
    reward_model: tuple[str, ...] = ()
    """Reward models that judge answers to these, as DIR[:weight], directories that finback reward-model wrote."""
    student: str | None = None
    """Directory of a dense model, of any family and tokenizer, that is fine-tuned on the last model's verified traces."""
    out: str = "runs/r1"
    """Directory of the run; an interrupted run that is there is continued."""
    template: str = R1_ZERO_TEMPLATE
    """Text around a prompt for the base and for R1-Zero, with {prompt} in it."""
    chat_template: str | None = None
    """Template of conversations, saved with the models: a file, deepseek_r1 or deepseek_v3; None: the base's own."""
    seed: int = 0
    """Seed of everything."""

    zero_steps: int = 200
    """Steps of R1-Zero."""
    reasoning_steps: int = 100
    """Steps of the reasoning RL."""
    all_scenario_steps: int = 50
    """Steps of the all-scenario RL."""
    prompts_per_step: int = 32
    """Prompts of one step of reinforcement learning."""
    num_generations: int = 16
    """Samples of each."""
    minibatches: int = 2
    """Updates per step."""
    max_completion_length: int = 512
    """Longest sample in tokens, in training and evaluation."""
    lr: float = 1e-5
    """Learning rate of reinforcement learning, falling to a tenth."""
    beta: float = 0.001
    """Weight of the divergence from the reference."""
    sft_lr: float = 5e-5
    """Learning rate of fine-tuning, falling to a tenth."""
    sft_epochs: int = 2
    """Times that each sample is seen in fine-tuning."""
    cold_start_prompts: int = 1000
    """Prompts that R1-Zero answers for the cold start, with 4 samples each."""
    rejection_prompts: int = 4000
    """Prompts of the rejection sampling, with 4 samples each."""
    student_prompts: int = 4000
    """Prompts that the last model answers for the student, with 2 samples each."""
    micro_batch_tokens: int = 8192
    """Tokens per forward and backward pass of reinforcement learning; changes memory and speed, not the result."""
    micro_batch_size: int = 4
    """Conversations per forward and backward pass of fine-tuning; changes memory and speed, not the result."""
    recompute: Recompute = "none"
    """What backward of fine-tuning computes again to save memory: nothing, V3's choice (norms, MLA up-projections, SwiGLU), layers."""
    gate: Literal["stop", "tell"] = "stop"
    """What follows when a stage did not improve what it must: the run stops, or says so and goes on."""
    eval_problems: int = 200
    """Held-out problems that each model is measured on."""
    eval_samples: int = 16
    """Samples of each, at temperature 0.6."""
    fresh: bool = False
    """Remove the run that is in `out` and start over."""

    def __post_init__(self) -> None:
        counts: tuple[str, ...] = (
            "zero_steps",
            "reasoning_steps",
            "all_scenario_steps",
            "prompts_per_step",
            "minibatches",
            "sft_epochs",
        )
        counts += (
            "max_completion_length",
            "cold_start_prompts",
            "rejection_prompts",
            "student_prompts",
            "eval_problems",
            "eval_samples",
            "micro_batch_tokens",
            "micro_batch_size",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"field {name} is {getattr(self, name)}, it must be at least 1")
        _check_rates(self, "lr", "sft_lr")
        _check_seed(self.seed)


@dataclass(frozen=True)
class DistillConfig:
    """Distillation as in R1 section 2.4: fine-tuning of a student on a teacher's verified answers, and nothing else."""

    teacher: Annotated[str, tyro.conf.Positional]
    """Directory of the teacher, a chat model. On the command line it comes first."""
    student: str = ""
    """Directory of the student: a model of any family, with a tokenizer of its own."""
    data: str = ""
    """Rows with `prompt`, `answer` and, where it is known, `language` (zh or en): a .jsonl file."""
    held_out: str = ""
    """Rows of the same kind that are not learnt from: what teacher and student are measured on."""
    reward: tuple[str, ...] = ()
    """What judges an answer in the place of the exact one, as module:function[:weight] or file.py:function[:weight]; several add up.
    It decides which answers are learnt from, and in evaluation; rows then need a prompt and what it reads."""
    least_reward: float = 1.0
    """With `reward`: an answer is right whose weighted sum reaches this."""
    out: str = "runs/distill"
    """Directory of the run; an interrupted run that is there is continued."""
    template: str = R1_ZERO_TEMPLATE
    """Text around a prompt for the student before it is taught, with {prompt} in it."""
    chat_template: str | None = None
    """Template of conversations, saved with the student: a file, deepseek_r1 or deepseek_v3; None: its own."""
    seed: int = 0
    """Seed of everything."""
    prompts: int = 4000
    """Prompts that the teacher answers, twice each."""
    max_completion_length: int = 512
    """Longest answer in tokens."""
    lr: float = 1e-4
    """Learning rate, falling to a tenth on a cosine (R1 gives 1e-4 for a student of 1.5B)."""
    epochs: int = 2
    """Times that each trace is seen."""
    eval_problems: int = 200
    """Held-out problems that each model is measured on."""
    eval_samples: int = 16
    """Samples of each, at temperature 0.6."""
    compare_rl: bool = False
    """Train the same student by reinforcement learning alone as well, with at least the compute that distillation took, and compare."""
    rl_lr: float = 1e-5
    """With `compare_rl`: learning rate of reinforcement learning, falling to a tenth."""
    prompts_per_step: int = 32
    """With `compare_rl`: prompts of one step; how many steps there are follows from the compute."""
    num_generations: int = 16
    """With `compare_rl`: samples of each prompt."""
    minibatches: int = 2
    """With `compare_rl`: updates per step."""
    beta: float = 0.001
    """With `compare_rl`: weight of the divergence from the reference."""
    micro_batch_tokens: int = 8192
    """With `compare_rl`: tokens per forward and backward pass; changes memory and speed, not the result."""
    micro_batch_size: int = 4
    """Traces per forward and backward pass of fine-tuning; changes memory and speed, not the result."""
    recompute: Recompute = "none"
    """What backward of fine-tuning computes again to save memory: nothing, V3's choice (norms, MLA up-projections, SwiGLU), layers."""
    rl_compute: float = 3.0
    """With `compare_rl`: steps are planned for this many times distillation's FLOPs, by the length of the student's first samples.
    What was spent is counted: where samples become shorter or teach nothing it is less, and below 1 the comparison says nothing."""
    fresh: bool = False
    """Remove the run that is in `out` and start over."""

    def __post_init__(self) -> None:
        counts = ("prompts", "max_completion_length", "epochs", "eval_problems", "eval_samples")
        for name in (*counts, "micro_batch_tokens", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"field {name} is {getattr(self, name)}, it must be at least 1")
        _check_rates(self, "lr", "rl_lr")
        _check_seed(self.seed)
        if not 1 <= self.rl_compute < float("inf"):
            raise InputError(f"field rl_compute is {self.rl_compute}, it must be a number of at least 1")


@dataclass(frozen=True)
class LadderConfig:
    """The R1 ladder: what it learns from, and how each stage trains. In the stages' own configs the model, the data, the rewards and
    the seed are left open; the ladder fills them in."""

    prompts: Path
    """Rows with `prompt`, `answer` and, where it is known, `language`."""
    held_out: Mapping[str, Path]
    """Title -> rows of the same kind that no stage trains on; the gate looks at the first."""
    reward: tuple[str, ...] = ()
    """What judges an answer; empty: the exact one."""
    least_reward: float = 1.0
    """With `reward`: an answer is right whose weighted sum reaches this."""
    zero_template: str = R1_ZERO_TEMPLATE
    """Text around a prompt for the base and for R1-Zero."""
    general: Path | None = None
    """Conversations about other things, for fine-tuning."""
    general_prompts: Path | None = None
    """Prompts about other things, for the last reinforcement learning."""
    general_rewards: tuple[str, ...] = ()
    """What is rewarded in answers to these."""
    reward_model: tuple[str, ...] = ()
    """Reward models that judge answers to these, as DIR[:weight]."""

    zero: GRPOConfig = field(default_factory=lambda: GRPOConfig(model=""))
    cold_start: SFTConfig = field(default_factory=SFTConfig)
    reasoning: GRPOConfig = field(default_factory=lambda: GRPOConfig(model=""))
    rejection: SFTConfig = field(default_factory=SFTConfig)
    all_scenario: GRPOConfig = field(default_factory=lambda: GRPOConfig(model="", temperature=0.7))
    student: SFTConfig = field(default_factory=SFTConfig)

    cold_start_prompts: int = 400
    """Prompts that R1-Zero answers for the cold start."""
    cold_start_rows: int = 300
    """Of its samples, at most so many are learnt from."""
    rejection_prompts: int = 1000
    """Prompts of the rejection sampling."""
    student_prompts: int = 1000
    """Prompts that the last model answers for the student."""
    gate: Literal["stop", "tell"] = "stop"
    """What follows when a stage did not improve what it must: the run stops, or says so and goes on."""
    least_rows: int = 20
    """A stage that would be fine-tuned on fewer samples stops the run."""

    eval_problems: int = 200
    """Held-out problems that each model is measured on."""
    eval_samples: int = 16
    """Samples of each, at temperature 0.6."""
    eval_tokens: int = 512
    """Longest sample, here and in rejection sampling."""

    @property
    def zero_form(self) -> PromptForm:
        return PromptForm("zero", template=self.zero_template)
