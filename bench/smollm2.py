"""SmolLM2-135M learns to add: a short warm-up on worked sums, then GRPO on their answers alone: `python -m bench.smollm2`.

The model is a real one that was pre-trained elsewhere, and the task one that it can hardly do as it is: the sum of three numbers of two
digits. It is asked as a chat, with and without solved sums before the question, and as text behind solved sums; the better of these is
what the trained model is held against, on sums that none of the training data holds.

The texts of the warm-up write sums in two ways, as texts that people write do: most give the answer at once, which this model hardly
ever gets right, the others go step by step. Which way pays is for reinforcement learning to find.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from bench.machine import ROOT, describe_device, read_commit, read_load
from bench.results import write_result
from bench.sum_reward import last_number
from finback.config import InputError
from finback.data.fetch import default_cache
from finback.data.files import write_atomic
from finback.data.problems import is_held_out
from finback.engine.llm import LLM
from finback.eval.answers import vote
from finback.eval.config import Decoding, PromptForm
from finback.eval.runner import evaluate_answers
from finback.eval.statistics import paired_difference
from finback.eval.task import Task
from finback.rewards.reward import Reward
from finback.rl.config import GRPOConfig
from finback.rl.train import grpo
from finback.train.session import keep_freed_memory
from finback.train.sft import sft
from finback.train.sft_config import SFTConfig

TARGET, TARGET_GRPO = 0.25, 0.15  # pass@1 over the better untrained form; of it, GRPO over the warm-up
TEMPLATE = "Question: {prompt}\n"
SHOTS = 4
DECODINGS = {"T = 0.6": Decoding(samples=2, temperature=0.6, top_p=1.0), "greedy": Decoding(samples=1, temperature=0.0)}

Measure = Callable[[], dict[str, Any]]


class Sum(NamedTuple):
    """Three numbers of two digits."""

    terms: tuple[int, int, int]

    @property
    def question(self) -> str:
        return " + ".join(map(str, self.terms))

    @property
    def answer(self) -> str:
        return str(sum(self.terms))

    @property
    def at_once(self) -> str:
        """Without a thought."""
        return f"{self.question} = {self.answer}"

    @property
    def worked(self) -> str:
        """Step by step."""
        a, b, c = self.terms
        return f"{a} + {b} = {a + b}\n{a + b} + {c} = {self.answer}"


@dataclass(frozen=True)
class Plan:
    """Sizes of the run; the defaults are those of the recorded one."""

    seed: int = 0
    traces: int = 192
    at_once: float = 0.6  # share of the traces that give the answer without a thought
    prompts: int = 2000
    problems: int = 200
    warm_up: SFTConfig = field(
        default_factory=lambda: SFTConfig(
            epochs=1,
            lr=4e-5,
            global_batch_size=16,
            micro_batch_size=16,
            batching="pad",
            sequence_length=128,
            precision="fp32",  # see docs/howto/smollm2.md
            save_every=None,
            eval_samples=16,
        )
    )
    grpo: GRPOConfig = field(
        default_factory=lambda: GRPOConfig(
            model="",
            reward=("bench.sum_reward:last_number",),
            template=TEMPLATE,
            steps=24,
            prompts_per_step=8,
            num_generations=8,
            max_completion_length=28,
            beta=0.0,
            lr=1.5e-5,
            final_lr=2e-6,
            precision="fp32",
            save_every=10,
        )
    )


def main(
    model: Path | None = None,
    out: Path = Path("runs/smollm2"),
    results: Path = ROOT / "bench" / "results",
    threads: int | None = None,
) -> None:
    """Warm up, train, measure, and write smollm2.json; the same command goes on with an interrupted run.

    Args:
        model: The directory of SmolLM2-135M; where `finback fetch smollm2` writes it if not given.
        out: Directory of the run.
        results: Directory of the JSON file.
        threads: CPU threads of torch; torch's own choice if not given.
    """
    model = default_cache() / "smollm2" if model is None else model
    if not (model / "config.json").is_file():
        raise SystemExit(f"{model} holds no model; finback fetch smollm2 gets it")
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()
    facts = {**read_commit(), "device": describe_device(), **read_load()}
    try:
        content = run(Plan(), model, out)
    except InputError as error:
        raise SystemExit(f"{out}: {error}") from error
    notes = [
        "Sums of three numbers of two digits; the answer is the last number of the text, in whatever form. pass@1 with 95% intervals "
        "over problems; differences over the same problems, paired.",
    ]
    path = write_result(results, "smollm2", [], notes, facts, content)
    for name, measured in content["models"].items():
        print(
            f"{name:<34}",
            *(f"{key} {part['value']:6.1%} [{part['low']:.1%}, {part['high']:.1%}]" for key, part in measured.items()),
        )
    for name, measured in content["gains"].items():
        print(f"{name:<34}", *(f"{key} {part['value']:+6.1%}" for key, part in measured.items()))
    print(f"targets: {content['verdict']}; written to {path}")


def run(plan: Plan, model: Path, out: Path) -> dict[str, Any]:
    """Train what is not trained yet, measure everything, and return what the JSON file holds."""
    held_out = sums(plan.problems, plan.seed + 1, held_out=True)
    traces = sums(plan.traces, plan.seed + 2, held_out=False)
    prompts = sums(plan.prompts, plan.seed + 3, held_out=False)
    assert not set(held_out) & {*traces, *prompts}, "a problem of the evaluation is trained on"
    rows = {
        "traces": [
            {
                "prompt": TEMPLATE.replace("{prompt}", s.question),
                "completion": s.at_once if i < plan.at_once * plan.traces else s.worked,
            }
            for i, s in enumerate(traces)
        ],
        "prompts": [{"prompt": s.question, "answer": s.answer} for s in prompts],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, part in rows.items():
        write_atomic(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))

    warm_up = replace(plan.warm_up, data=(str(out / "traces.jsonl"),), seed=plan.seed)
    warm = sft(model, warm_up, out / "warm-up", resume=(out / "warm-up" / "config.json").exists())
    learning = replace(plan.grpo, model=str(warm), data=(str(out / "prompts.jsonl"),), seed=plan.seed)
    policy = grpo(learning, out / "grpo", resume=(out / "grpo" / "config.json").exists())

    plain = PromptForm("plain", TEMPLATE)
    measured = {name: remembered(out, name, asking) for name, asking in untrained(model, held_out, plan.seed).items()}
    forms = list(measured)
    measured["warm-up"] = remembered(out, "warm-up", partial(measure, warm, task_of(held_out), plain))
    measured["GRPO"] = remembered(out, "GRPO", partial(measure, policy, task_of(held_out), plain))
    gains: dict[str, dict[str, Any]] = {"GRPO over the better untrained": {}, "GRPO over the warm-up": {}}
    for decoding in DECODINGS:
        best = max(forms, key=lambda name: measured[name][decoding]["value"])
        for gain, before in zip(gains.values(), (best, "warm-up"), strict=True):
            difference = paired_difference(measured[before][decoding]["scores"], measured["GRPO"][decoding]["scores"])
            gain[decoding] = {"from": before, **difference._asdict()}
    met = all(
        part["value"] >= target
        for gain, target in zip(gains.values(), (TARGET, TARGET_GRPO), strict=True)
        for part in gain.values()
    )
    return {
        "settings": {"plan": asdict(plan), "targets": [TARGET, TARGET_GRPO]},
        "models": {
            name: {how: {key: value for key, value in part.items() if key != "scores"} for how, part in of_it.items()}
            for name, of_it in measured.items()
        },
        "gains": gains,
        "verdict": "met" if met else "missed",
        "curve": list(curve(out / "grpo" / "metrics.jsonl")),
    }


def sums(count: int, seed: int, *, held_out: bool) -> list[Sum]:
    """`count` different sums, held-out ones or others, as the seed gives them."""
    generator, found = random.Random(f"sums/{seed}"), dict[Sum, None]()
    while len(found) < count:
        drawn = Sum((generator.randint(11, 99), generator.randint(11, 99), generator.randint(11, 99)))
        if is_held_out(drawn.question) == held_out:
            found[drawn] = None
    return list(found)


def task_of(problems: Sequence[Sum], shots: Sequence[tuple[str, str]] = (), asking: str = "{}") -> Task:
    examples = [{"question": s.question, "prompt": asking.format(s.question), "answer": s.answer} for s in problems]
    return Task("sums", examples, Reward("last_number", last_number), vote, shots)


def untrained(model: Path, problems: Sequence[Sum], seed: int) -> dict[str, Measure]:
    """The model as it is, in every form that might suit it."""
    shown = sums(SHOTS, seed + 4, held_out=False)
    asking = "What is {}?"
    worked = [(s.question, s.worked) for s in shown]
    answered = [(s.question, s.answer) for s in shown]
    in_chat = [(asking.format(question), reply) for question, reply in worked]
    chat, text = PromptForm("chat", few_shot=SHOTS), PromptForm("plain", TEMPLATE, few_shot=SHOTS)
    return {
        "chat": partial(measure, model, task_of(problems, asking=asking), PromptForm(), longest=64),
        "chat, 4 solved": partial(measure, model, task_of(problems, in_chat, asking), chat, longest=48),
        "text, 4 solved": partial(measure, model, task_of(problems, worked), text, longest=48),
        "text, 4 answered": partial(measure, model, task_of(problems, answered), text),
    }


def measure(model: Path, task: Task, form: PromptForm, longest: int = 28) -> dict[str, Any]:
    """By each decoding, in fp32: pass@1 with its interval, the score of each problem, and the first answers."""
    llm = LLM(model, dtype=torch.float32, max_num_seqs=64, max_model_len=512)
    measured = {}
    for name, how in DECODINGS.items():
        result = evaluate_answers(llm, task, form, replace(how, max_tokens=longest))
        kept = [{"completion": s.completion, "score": s.score} for s in result.kept]
        measured[name] = {**result.pass_at_1._asdict(), "tokens": result.mean_tokens, "scores": result.scores, "samples": kept}
    return measured


def remembered(out: Path, name: str, work: Measure) -> dict[str, Any]:
    """What `work` measures, or has measured in an earlier call on the same run."""
    file = out / "measured" / f"{name}.json"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, json.dumps(work()) + "\n")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def curve(metrics: Path) -> Iterator[dict[str, float]]:
    """What is plotted: a few numbers of each step of GRPO."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        names = (
            "step",
            "reward",
            "entropy",
            "completion_length",
            "zero_variance",
            "logprob_gap",
            "rollout_seconds",
            "training_seconds",
        )
        yield {name: row[name] for name in names if name in row}


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.smollm2")
