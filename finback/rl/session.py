"""Where a GRPO run lives on the disk, and what it starts from."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finback.config import InputError
from finback.data.files import read_json, write_atomic
from finback.data.stream import permute
from finback.model.checkpoint import load, save
from finback.model.transformer import Transformer
from finback.rewards.reward import absolute_reward_spec
from finback.rl.config import Config, GRPOConfig
from finback.rl.model_rewards import absolute_spec
from finback.rl.prompts import Prompt, prompts_fingerprint
from finback.train.checkpoint import TrainingState, list_checkpoints, new_state, restore_state
from finback.train.session import CONFIG_FILE

REFERENCES = "references"


class PromptStream:
    """Every prompt once per epoch, in an order that the seed and the epoch give; batches go on into the next epoch."""

    def __init__(self, seed: int, prompts: Sequence[Prompt] = ()) -> None:
        self.seed, self.taken = seed, 0
        self.prompts = prompts

    def next_batch(self, size: int) -> list[Prompt]:
        return [self._at(place) for place in self._advance(size)]

    def _advance(self, size: int) -> range:
        self.taken += size
        return range(self.taken - size, self.taken)

    def _at(self, place: int) -> Prompt:
        epoch, within = divmod(place, len(self.prompts))
        return self.prompts[permute(within, len(self.prompts), key=(self.seed, epoch))]

    @cached_property
    def _fingerprint(self) -> str:
        return prompts_fingerprint(self.prompts)

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {"taken": self.taken, "seed": self.seed, "prompts": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; InputError if it belongs to other prompts. Older states do not tell theirs."""
        if state.get("prompts", self._fingerprint) != self._fingerprint:
            raise InputError(
                "the run was started with other prompts: rows of field data, or the template around them, have changed since; "
                "resume it with those that it was started with, or start another run"
            )
        self.taken = int(state["taken"])


def minibatch_order(config: GRPOConfig, count: int, step: int) -> list[list[int]]:
    """The samples of a rollout in `config.minibatches` random parts of nearly the same size."""
    order = np.random.default_rng([config.seed, 1, step]).permutation(count)
    return [sorted(part.tolist()) for part in np.array_split(order, config.minibatches)]


def read_run_config(directory: str | Path, kind: type[Config]) -> Config:
    """The resolved config of the run in `directory`; InputError if there is none of this kind."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"{directory} holds no run (no {CONFIG_FILE}); start one with finback {kind.verb} MODEL --data FILE --out DIR"
        )
    data = read_json(path)
    own = {field.name for field in fields(kind)} - {field.name for field in fields(GRPOConfig)}
    if not own <= data.keys():
        raise InputError(
            f"{directory} holds a run of another kind, not of finback {kind.verb}; its report.md says how to resume it"
        )
    try:
        return kind.from_dict(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def resolve_config(config: Config, directory: Path, resume: bool) -> Config:
    """`config` with absolute paths, checked against what is in `directory`."""
    if not config.reward and not config.reward_model and config.process_reward is None:
        raise InputError("field reward is empty; give module:function[:weight], such as finback.rewards.answers:exact")
    if not config.data:
        raise InputError("field data is empty; give .jsonl or .parquet files of prompts")
    absolute = _with_absolute_paths(config)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; give a directory for the run")
    if not resume:
        if (directory / CONFIG_FILE).exists():
            again = f"continue it with finback {config.verb} --resume {directory}"
            raise InputError(f"{directory} already holds a run; {again}, or give another --out")
        return absolute
    # What older runs were started with may hold relative files of rewards.
    before, now = (each.to_dict() for each in (_with_absolute_paths(read_run_config(directory, type(config))), absolute))
    for name, value in before.items():
        if now[name] != value:
            raise InputError(
                f"field {name} is {now[name]!r}, but the run in {directory} has {value!r}; resume it with its own fields"
            )
    return absolute


def _with_absolute_paths(config: Config) -> Config:
    return replace(
        config,
        model=os.path.abspath(config.model),
        data=tuple(os.path.abspath(path) for path in config.data),
        reward=tuple(absolute_reward_spec(spec) for spec in config.reward),
        reward_model=tuple(absolute_spec(spec) for spec in config.reward_model),
        process_reward=None if config.process_reward is None else absolute_reward_spec(config.process_reward),
    )


def write_run_config(directory: Path, config: GRPOConfig) -> None:
    write_atomic(directory / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def new_policy(config: GRPOConfig, stream: PromptStream, device: torch.device) -> TrainingState[PromptStream]:
    """The model to start from, in float32, with a fresh optimizer."""
    return _policy(Path(config.model), config, stream, device)


def load_policy(checkpoint: Path, config: GRPOConfig, stream: PromptStream, device: torch.device) -> TrainingState[PromptStream]:
    """A policy as `save_checkpoint` wrote it."""
    state = _policy(checkpoint, config, stream, device)
    restore_state(checkpoint, state)
    return state


def _policy(directory: Path, config: GRPOConfig, stream: PromptStream, device: torch.device) -> TrainingState[PromptStream]:
    model = load(directory, dtype=torch.float32, device=device)
    for module in model.mtp_modules:
        module.requires_grad_(not config.freeze_mtp)
    return new_state(model, stream, moments_dtype="fp32", ema_decay=None)


def sampling_model(config: GRPOConfig, policy: Transformer) -> Transformer:
    """What the engine samples with: the policy itself, or a copy in bf16 that `refresh_sampling` fills before each rollout."""
    if config.rollout_precision == "fp32":
        return policy
    device = policy.lm_head.weight.device
    return load(config.model, dtype=torch.bfloat16, device=device).requires_grad_(False)


def refresh_sampling(sampling: Transformer, policy: Transformer) -> None:
    """The policy's weights and router biases into what the engine samples with, if that is a copy."""
    if sampling is not policy:
        sampling.load_state_dict(policy.state_dict())


def reference_directory(run: Path, step: int) -> Path:
    return run / REFERENCES / f"step-{step}"


def reference_step(config: GRPOConfig, step: int) -> int:
    """The step whose policy is the reference after step `step`; 0: the model that the run started from."""
    return step // config.reference_steps * config.reference_steps


def refresh_reference(config: GRPOConfig, run: Path, step: int, model: Transformer, reference: Transformer | None) -> None:
    """Every so many steps the reference becomes the policy, and is kept for a run that is resumed."""
    if reference is not None and step % config.reference_steps == 0:
        reference.load_state_dict(model.state_dict())
        save(model, reference_directory(run, step), tokenizer_from=config.model)


def prune_references(config: GRPOConfig, run: Path, step: int) -> None:
    """After step `step`, remove the references that neither the run itself nor one that is resumed from a checkpoint needs."""
    kept = {reference_step(config, int(checkpoint.name.partition("-")[2])) for checkpoint in list_checkpoints(run)}
    kept.add(reference_step(config, step))
    folder = run / REFERENCES
    for directory in folder.iterdir() if folder.is_dir() else ():
        if directory.name not in {reference_directory(run, number).name for number in kept}:
            shutil.rmtree(directory)


def load_reference(config: GRPOConfig, run: Path, step: int, device: torch.device) -> Transformer | None:
    """The reference that holds after step `step`; None where the loss has none."""
    if config.beta == 0:
        return None
    refreshed = reference_step(config, step)
    directory = reference_directory(run, refreshed) if refreshed else Path(config.model)
    return load(directory, dtype=torch.float32, device=device).requires_grad_(False)
