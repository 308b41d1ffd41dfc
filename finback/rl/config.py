"""What a GRPO run is told: `GRPOConfig`. No torch, so that `--help` and recipes answer at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from finback.config import InputError, nearest

Config = TypeVar("Config", bound="GRPOConfig")
Objective = Literal["token", "sequence", "global-token"]
RLPrecision = Literal["fp32", "bf16"]
DEFAULT_GAP = {"fp32": 0.02, "bf16": 0.05}
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The User asks a question and the Assistant solves it. The Assistant first thinks about "
    "the reasoning in its mind and then gives the User the answer. The reasoning stands within <think> </think> and the answer within "
    "<answer> </answer> tags, like this: <think> reasoning here </think> <answer> answer here </answer>.\nUser: {prompt}\nAssistant:"
)
"""After R1's table 1: it asks for the form and says nothing about how to reason."""


@dataclass(frozen=True)
class GRPOConfig:
    """One GRPO run (DeepSeekMath section 4.1; R1). Names are TRL's where it has one; defaults are R1's where they are published, but
    for `lr`, `epsilon` (R1 clips at 10) and the lengths, which suit smaller models."""

    verb: ClassVar[str] = "grpo"

    model: Annotated[str, tyro.conf.Positional]
    """Directory of the policy to start from, any that finback loads. On the command line it comes first."""
    data: tuple[str, ...] = ()
    """Files of prompts, .jsonl or .parquet: rows with a `prompt` (a text or a list of messages), and what the rewards read."""
    skip_malformed: bool = False
    """Leave out rows that are malformed or too long, and say how many and where."""
    reward: tuple[str, ...] = ()
    """Rewards as module:function[:weight] or file.py:function[:weight]; their weighted sum is what is learnt from."""
    reward_model: tuple[str, ...] = ()
    """Reward models as DIR[:weight], directories that finback reward-model wrote; their scores are added to the rewards'."""
    process_reward: str | None = None
    """Function of one's own (prompt, completion, example) -> [(end, reward), ...], as module:function: a reward for each step, which
    ends where so many characters stand before. Then tokens learn from the steps that end behind them, and other rewards are watched
    only."""
    template: str | None = None
    """Text around a prompt, with {prompt} in it; None: the model's own chat template."""
    seed: int = 0
    """Seed of the order of prompts, of every sample and of the minibatches."""
    steps: int = 100
    """Rollouts; each is followed by `num_iterations` times `minibatches` updates."""

    prompts_per_step: int = 32
    """Prompts of one rollout."""
    num_generations: int = 16
    """Samples for each prompt: the size G of a group."""
    max_completion_length: int = 256
    """Longest sample in tokens."""
    temperature: float = 1.0
    """Of sampling; the log-probabilities of the loss are those at this temperature."""
    max_num_seqs: int = 128
    """Samples that the engine writes at the same time."""

    minibatches: int = 1
    """Parts into which a rollout is cut at random, with an update for each (R1: 16)."""
    num_iterations: int = 1
    """Times that a rollout is gone through."""
    micro_batch_tokens: int = 8192
    """Tokens of one forward and backward pass; changes memory and speed, not the result."""
    loss: Objective = "token"
    """The objective: token (DeepSeekMath), sequence (V3, R1), or global-token (a mean over all tokens)."""
    epsilon: float = 0.2
    """Ratios are clipped from below at 1 - epsilon."""
    epsilon_high: float | None = None
    """Ratios are clipped from above at 1 + epsilon_high; None: epsilon."""
    beta: float = 0.001
    """Weight of the divergence from the reference in the loss; 0: no reference is kept."""
    reference_steps: int = 400
    """Steps after which the reference becomes the policy as it is then."""

    lr: float = 1e-5
    """Peak learning rate."""
    final_lr: float | None = None
    """Learning rate of the last step, reached linearly; None: `lr` throughout."""
    warmup_steps: int = 3
    """Updates over which the learning rate rises linearly from 0."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    bias_update_speed: float = 0.0
    """Gamma: router biases move by this much per update; 0 freezes them."""
    mtp_loss_weight: float = 0.1
    """Lambda: weight of the multi-token prediction loss on the samples (V3: 0.1 at the end). It trains the MTP modules alone: the
    policy's gradient is GRPO's and nothing else."""
    replay_experts: bool = False
    """The policy's routers take the experts that the engine's took when it sampled, with gate weights of their own: in low precision
    the two may choose otherwise where scores are close. The reference chooses for itself."""
    freeze_mtp: bool = False
    """Leave the MTP modules as they are; they are not computed then, and their drafts fit the policy less and less."""

    precision: RLPrecision = "bf16"
    """Matrix products of training."""
    rollout_precision: RLPrecision = "fp32"
    """fp32: the engine samples with the trainer's own weights. bf16: with a copy of them, made anew before each rollout; half as much
    is read for each token, 2 bytes more are held for each parameter, and the two log-probabilities differ by more."""
    max_logprob_gap: float | None = None
    """The run stops when trainer's and engine's log-probabilities differ by more on average; None: 0.02 in fp32, 0.05 where either
    computes in bf16."""
    reward_processes: int = 1
    """Processes that compute rewards while the engine samples."""
    reward_deadline: float = 10.0
    """Seconds after which a reward that has not answered counts 0."""
    device: str = "auto"
    """"cpu", "cuda", ...; auto: the first GPU if there is one."""
    threads: int | None = None
    """CPU threads of torch; None: torch's own choice. A resumed run is bitwise the same with the same number only."""

    save_every: int | None = 50
    """Steps between checkpoints; None: only at the end."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on the disk, newest first; 0: all."""
    samples_per_step: int = 4
    """Samples of each step that are kept in samples.jsonl."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.template is not None and "{prompt}" not in self.template:
            raise InputError("field template has no {prompt} in it; put it where the prompt belongs")
        if self.mtp_loss_weight == 0 and not self.freeze_mtp:
            raise InputError("field mtp_loss_weight is 0, so the MTP modules would learn nothing; set freeze_mtp as well")
        if self.process_reward is not None and self.loss == "sequence":
            raise InputError(
                "field process_reward rewards steps, which loss sequence cannot tell apart; use token or global-token"
            )
        if self.minibatches > self.prompts_per_step * self.num_generations:
            samples = self.prompts_per_step * self.num_generations
            raise InputError(f"field minibatches is {self.minibatches}, above the samples of a step ({samples}); lower it")
        if self.final_lr is not None and self.final_lr > self.lr:
            raise InputError(f"field final_lr is {self.final_lr}, above lr ({self.lr}); lower it")

    @property
    def gap_limit(self) -> float:
        lower: RLPrecision = "bf16" if "bf16" in (self.precision, self.rollout_precision) else "fp32"
        return DEFAULT_GAP[lower] if self.max_logprob_gap is None else self.max_logprob_gap

    def to_dict(self) -> dict[str, Any]:
        """JSON values, tuples as lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
        """What `to_dict` gives. InputError for a field that is unknown, missing or of the wrong kind."""
        names = [field.name for field in fields(cls)]
        for name in data:
            if name not in names:
                raise InputError(f"field {name} is not known{nearest(name, names)}")
        if not isinstance(data.get("model"), str):
            raise InputError("field model is missing; it must be a directory")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**values)


@dataclass(frozen=True)
class PPOConfig(GRPOConfig):
    """One run of PPO with a critic (Schulman et al., 2017), the baseline that DeepSeekMath section 4.1 argues against. Of GRPO's fields
    all hold but those that are refused; the divergence from the reference is in the reward."""

    verb: ClassVar[str] = "ppo"

    loss: Objective = "global-token"
    """The objective; PPO's is the mean over all tokens."""
    freeze_mtp: bool = True
    """PPO leaves the MTP modules as they are."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 1.0
    """Of generalised advantage estimation: R1 found 1 close to GRPO and 0.95 clearly worse (R1 in Nature, supplement A.3)."""
    value_epsilon: float = 0.2
    """A value may move by this much from what it was at rollout; beyond, the loss has no gradient."""
    critic_lr: float = 1e-4
    """Learning rate of the critic."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"field {name} is {getattr(self, name)!r}, it must be from 0 to 1")
        for name in ("value_epsilon", "critic_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"field {name} is {getattr(self, name)!r}, it must be a number above 0")
        if self.loss != "global-token" or not self.freeze_mtp:
            raise InputError("PPO's loss is the mean over tokens, and its MTP modules are frozen; leave loss and freeze_mtp out")
        if self.reward_model or self.process_reward or self.replay_experts:
            raise InputError(
                "PPO learns from the field reward alone; give rewards, and leave reward_model, process_reward and replay_experts out"
            )


_INTEGERS = {
    "seed": 0,
    "steps": 1,
    "prompts_per_step": 1,
    "num_generations": 2,
    "max_completion_length": 1,
    "max_num_seqs": 1,
    "minibatches": 1,
    "num_iterations": 1,
    "micro_batch_tokens": 1,
    "reference_steps": 1,
    "warmup_steps": 0,
    "reward_processes": 1,
    "threads": 1,
    "save_every": 1,
    "keep_checkpoints": 0,
    "samples_per_step": 0,
}
_BOOLEANS = ("freeze_mtp", "replay_experts", "skip_malformed")
_AT_LEAST_ZERO = ("mtp_loss_weight", "beta", "final_lr", "weight_decay", "bias_update_speed", "adam_beta1", "adam_beta2")
_ABOVE_ZERO = (
    "temperature",
    "epsilon",
    "epsilon_high",
    "lr",
    "adam_epsilon",
    "max_grad_norm",
    "max_logprob_gap",
    "reward_deadline",
)
_CHOICES = {"loss": ("token", "sequence", "global-token"), "precision": ("fp32", "bf16"), "rollout_precision": ("fp32", "bf16")}
_MAY_BE_NONE = frozenset(field.name for field in fields(GRPOConfig) if "| None" in str(field.type))


def _check_numbers(c: GRPOConfig) -> None:
    for name, least in _INTEGERS.items():
        value = getattr(c, name)
        if value is None and name in _MAY_BE_NONE:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"field {name} is {value!r}, it must be a whole number of at least {least}")
    for name in (*_AT_LEAST_ZERO, *_ABOVE_ZERO):
        value = getattr(c, name)
        if value is None and name in _MAY_BE_NONE:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"field {name} is {value!r}, it must be a finite number")
        if value < 0 or (value == 0 and name in _ABOVE_ZERO) or (value >= 1 and name.startswith("adam_beta")):
            wanted = "above 0" if name in _ABOVE_ZERO else "at least 0"
            raise InputError(f"field {name} is {value!r}, it must be {wanted}")
    for name in _BOOLEANS:
        if not isinstance(getattr(c, name), bool):
            raise InputError(f"field {name} is {getattr(c, name)!r}, it must be true or false")
    for name, choices in _CHOICES.items():
        if getattr(c, name) not in choices:
            raise InputError(f"field {name} is {getattr(c, name)!r}, it must be one of {', '.join(choices)}")
    for name in ("data", "reward", "reward_model"):
        if not isinstance(getattr(c, name), tuple) or not all(isinstance(item, str) for item in getattr(c, name)):
            raise InputError(f"field {name} is {getattr(c, name)!r}, it must be a list of texts")
