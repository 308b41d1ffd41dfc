"""The R1 ladder on one's own base model and task, as one command that can be interrupted (R1 section 2)."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from finback.config import InputError, ModelConfig
from finback.data import conversations
from finback.data.files import write_atomic
from finback.data.tokenizer import Tokenizer, load_tokenizer
from finback.eval.contamination import occurrences, row_texts
from finback.model.checkpoint import open_checkpoint
from finback.recipes import judging, ladder
from finback.recipes.config import LadderConfig, R1Config
from finback.recipes.ladder_report import curves, ladder_table, rises
from finback.recipes.room import check_fine_tuning, check_reinforcement_learning, longest_prompt, trace_length, trace_settings
from finback.recipes.stages import Run, Stage, copy_model, file_hash, open_run, run_or_skip, stage_times
from finback.rl.config import GRPOConfig
from finback.rl.model_rewards import check_reward_model
from finback.rl.prompts import read_prompts
from finback.train.sft_config import SFTConfig

_NOT_SETTINGS = ("out", "fresh", "micro_batch_tokens", "micro_batch_size", "recompute")  # what changes no result may change
_RENDERED = (
    {"role": "user", "content": "Is 2+2 4?"},
    {"role": "assistant", "reasoning_content": "2+2 is 4.", "content": "Yes."},
)
"""What every template must be able to say: a thought, and an answer that ends."""


def r1(config: R1Config) -> Path:
    """Run the ladder, or what is left of it, in `config.out`; returns the directory with the finished model.

    Raises:
        InputError: a field, a row or a directory is wrong, or a stage did not improve what it must.
        OSError: the disk is full; what was finished stays, and the next call goes on from there.
        KeyboardInterrupt: after Ctrl-C; a stage that trains has saved before.
    """
    check_files(config)
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    stages = r1_stages(config)  # its fields are checked before anything is written
    run = open_run(Path(config.out), "r1", settings, fresh=config.fresh)
    check_same_files(run, config)
    run_or_skip(run, stages, f"finback r1 {config.base} ... --out {run.directory}, with the same fields")
    print(f"\nTalk with it:            finback chat {run.directory / 'final'}")
    print(f"Read what happened:      {run.directory / 'report.md'}")
    return run.directory / "final"


def check_problems(name: str, file: str, reward: Sequence[str]) -> None:
    """InputError if the field `name` does not name a .jsonl file of rows with a prompt and, without a `reward`, an answer."""
    needed = ("prompt",) if reward else ("prompt", "answer")
    words = "a prompt, a text" if reward else "a prompt and an answer, both texts"
    if not file:
        raise InputError(f"field {name} is missing; give a .jsonl file of rows with {words.partition(',')[0]}")
    _check_file(name, file)
    rows = list(_records(file))
    for where, row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in needed):
            raise InputError(f"{where}: the row needs {words}")
    if not rows:
        raise InputError(f"field {name} names {file}, which has no rows")


def _check_file(name: str, file: str) -> None:
    if not file.endswith(".jsonl") or not Path(file).is_file():
        raise InputError(f"field {name} names {file}, which is no .jsonl file that can be read")


def _records(file: str) -> Iterator[tuple[str, Any]]:
    """Where a row stands, and the row; InputError for one that is no JSON."""
    for row in conversations.read_rows(file):
        if isinstance(row.record, InputError):
            raise InputError(f"{row.where}: {row.record}; mend or remove the line")
        yield row.where, row.record


def check_template(name: str, directory: str, chat_template: str | None) -> Tokenizer:
    """The tokenizer of the model that the field `name` names, with the template that it is fine-tuned with; InputError unless that can
    render a thought and an answer that ends."""
    tokenizer = load_tokenizer(directory)
    if chat_template is not None:
        tokenizer = conversations.with_chat_template(tokenizer, chat_template)
    if tokenizer.chat_template is None:
        names = " or ".join(conversations.PUBLISHED_TEMPLATES)
        raise InputError(f"field {name}: {directory} has no chat template; give the field chat_template, a file, {names}")
    try:
        conversations.conversation_samples(_RENDERED, tokenizer)
    except InputError as error:
        raise InputError(f"field {name}: {directory}: {error}") from None
    return tokenizer


def _check_general(config: R1Config, tokenizer: Tokenizer) -> None:
    """InputError, naming file and line, for a conversation or a general prompt that a late stage could not read."""
    model = ModelConfig.from_hf(config.base)
    length = trace_length(model, config.max_completion_length)
    for where, record in _records(config.general) if config.general else ():
        try:
            longest = max(len(sample.ids) for sample in conversations.row_samples(record, tokenizer))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if longest > length:
            raise InputError(f"{where}: it has {longest} tokens, more than are learnt from ({length}); shorten or remove it")
    if config.general_prompts:
        longest = model.max_position_embeddings - config.max_completion_length
        steps = r1_ladder(config)
        rewards = ladder.scenario_rewards(steps, ladder.scenario_specs(steps))
        read_prompts([config.general_prompts], tokenizer, None, longest=longest, rewards=rewards)


def check_files(config: R1Config) -> None:
    """InputError for what cannot be read, or what a later stage could not go on with, before anything is written."""
    check_problems("data", config.data, config.reward)
    check_problems("held_out", config.held_out, config.reward)
    for name in ("general_rewards", "reward_model"):
        if getattr(config, name) and not config.general_prompts:
            raise InputError(f"field {name} judges answers to general prompts, and there are none; give general_prompts")
    for spec in config.reward_model:
        check_reward_model(spec)
    exact, exact_tag = ((), ()) if config.reward else ((judging.EXACT,), (judging.EXACT_TAG,))
    judging.check_own(config.reward, (*exact_tag, judging.ZERO_FORMAT, judging.ONE_LANGUAGE))
    judging.check_own((*config.reward, *config.general_rewards), (*exact, *ladder.CHAT_RULES))
    for name in ("general", "general_prompts"):
        if getattr(config, name):
            _check_file(name, getattr(config, name))
    open_checkpoint(Path(config.base))
    tokenizer = check_template("base", config.base, config.chat_template)
    if config.student:
        open_checkpoint(Path(config.student))
        check_template("student", config.student, config.chat_template)
    _check_general(config, tokenizer)
    _check_room(config, tokenizer)


def _check_room(config: R1Config, tokenizer: Tokenizer) -> None:
    """InputError for a prompt that leaves no room for an answer, or a stage that does not fit into memory."""
    steps, model, answer = r1_ladder(config), ModelConfig.from_hf(config.base), config.max_completion_length
    files = [config.data, config.held_out]
    prompt = longest_prompt(files, tokenizer, (config.template, None), model, answer)
    for settings, judges in ((steps.zero, ()), (steps.all_scenario, config.reward_model)):
        check_reinforcement_learning(settings, model, prompt, judges)
    check_fine_tuning(steps.cold_start, model, prompt + answer)
    if config.student:
        model, tokenizer = ModelConfig.from_hf(config.student), check_template("student", config.student, config.chat_template)
        prompt = longest_prompt(files, tokenizer, (config.template, None), model, answer)
        check_fine_tuning(steps.student, model, prompt + answer)


def check_same_files(run: Run, config: R1Config) -> None:
    """InputError if a file of data is another than the run was started with."""
    before: Mapping[str, str] = run.manifest["stages"].get("base", {}).get("files", {})
    for file in _files(config):
        path = os.path.abspath(file)
        if path in before and file_hash(Path(path)) != before[path]:
            raise InputError(
                f"{file} has changed since the run in {run.directory} was started; put it back, or add --fresh to start over"
            )


def _files(config: R1Config) -> list[str]:
    return [file for file in (config.data, config.held_out, config.general, config.general_prompts) if file]


def r1_stages(config: R1Config) -> list[Stage]:
    """The recipe, in order; with a student, distillation comes last."""
    steps = r1_ladder(config)
    stages = [
        Stage("base", "The base", partial(base, config=config)),
        Stage("r1-zero", "R1-Zero: GRPO from the base", partial(ladder.r1_zero, ladder=steps)),
        Stage("cold-start", "Cold start: SFT", partial(ladder.cold_start, ladder=steps)),
        Stage("reasoning-rl", "Reasoning RL", partial(ladder.reasoning_rl, ladder=steps)),
        Stage("rejection-sft", "Rejection sampling, SFT", partial(ladder.rejection_sft, ladder=steps)),
        Stage("all-scenario-rl", "All-scenario RL", partial(ladder.all_scenario_rl, ladder=steps)),
    ]
    if config.student:
        stages.append(Stage("student", "Distillation", partial(ladder.student, ladder=steps)))
    return [*stages, Stage("report", "Report", partial(report, config=config))]


def r1_ladder(config: R1Config) -> LadderConfig:
    """The settings of every stage."""
    rl = GRPOConfig(
        model="",
        steps=config.zero_steps,
        prompts_per_step=config.prompts_per_step,
        num_generations=config.num_generations,
        minibatches=config.minibatches,
        max_completion_length=config.max_completion_length,
        lr=config.lr,
        final_lr=config.lr / 10,
        beta=config.beta,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    sft = _sft(config, config.base)
    return LadderConfig(
        prompts=Path(config.data),
        held_out={"held out": Path(config.held_out)},
        reward=config.reward,
        least_reward=config.least_reward,
        zero_template=config.template,
        general=Path(config.general) if config.general else None,
        general_prompts=Path(config.general_prompts) if config.general_prompts else None,
        general_rewards=config.general_rewards,
        reward_model=config.reward_model,
        zero=rl,
        cold_start=sft,
        reasoning=replace(rl, steps=config.reasoning_steps),
        rejection=sft,
        all_scenario=replace(rl, steps=config.all_scenario_steps, temperature=0.7),
        student=_sft(config, config.student) if config.student else sft,
        cold_start_prompts=config.cold_start_prompts,
        rejection_prompts=config.rejection_prompts,
        student_prompts=config.student_prompts,
        gate=config.gate,
        eval_problems=config.eval_problems,
        eval_samples=config.eval_samples,
        eval_tokens=config.max_completion_length,
    )


def _sft(config: R1Config, model: str) -> SFTConfig:
    return trace_settings(config, model, lr=config.sft_lr, epochs=config.sft_epochs)


def base(run: Run, config: R1Config) -> dict[str, Any]:
    """The models to start from, under their names in the run, and the hashes of the files: the lineage of all that follows."""
    copy_model(Path(config.base), run.directory / "base")
    if config.student:
        copy_model(Path(config.student), run.directory / "student-base")
    weights = sorted((run.directory / "base").glob("*.safetensors"))
    facts = {"files": {os.path.abspath(file): file_hash(Path(file)) for file in _files(config)}}
    return facts | {"base": {file.name: file_hash(file) for file in weights}}


def report(run: Run, config: R1Config) -> dict[str, Any]:
    """`final/` and `report.md`."""
    copy_model(run.directory / "all-scenario-rl", run.directory / "final")
    table = ladder_table(run)
    print(table)
    sections = [
        ("The R1 ladder", table),
        ("What each stage added", rises(run)),
        ("Held-out problems in training texts", seen_problems(run, config)),
        *curves(run),
        ("Stages", stage_times(run)),
    ]
    text = "\n\n".join(f"## {heading}\n\n{body}" for heading, body in sections)
    write_atomic(run.directory / "report.md", f"# {run.directory.resolve().name}\n\n{text}\n")
    return {}


def seen_problems(run: Run, config: R1Config) -> str:
    """In words, how many held-out problems stand in a text that a stage was trained on; the base's own corpus is not known here."""
    files = [Path(config.data), *([Path(config.general_prompts)] if config.general_prompts else [])]
    return seen_in_training(run, r1_ladder(config), files)


def seen_in_training(run: Run, steps: LadderConfig, files: Sequence[Path]) -> str:
    """The same for the rows of `files` and those that the run has written."""
    rows = [row for file in (*files, *sorted((run.directory / "data").glob("*.jsonl"))) for row in ladder.read_rows(file)]
    task = judging.task(steps, "held out", ladder.read_rows(steps.held_out["held out"]))
    found = occurrences(task, (text for row in rows for text in row_texts(row)))
    return f"{len(found)} of {len(task.examples)} problems occur in the {len(rows):,} rows of training."
