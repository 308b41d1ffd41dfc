"""TRL's GRPOTrainer, one step at a turn, for `bench.grpo`."""

import os
import queue
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.grpo_reward import maths

REPEATS = 4096  # of the prompts in TRL's data set: more steps than anyone will ask for


@dataclass(frozen=True)
class Work:
    """What a step consists of: one update after a rollout of `num_generations` samples for each prompt, all `new_tokens` long."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    num_generations: int
    new_tokens: int
    lr: float = 1e-6


@dataclass(frozen=True)
class Step:
    """What a step took, by its own clock: `waited` of the rollout's seconds with nothing left to sample."""

    seconds: float
    rollout_seconds: float
    training_seconds: float
    waited: float = 0.0
    evidence: Mapping[str, Any] | None = None
    """Of a peer's first step, what ours is compared with: samples, advantages, log-probabilities, the gradient's norm."""


def is_installed() -> bool:
    return find_spec("trl") is not None


def build_trl(directory: Path, work: Work, precision: str, settings: Mapping[str, str]) -> Callable[[Any], Step]:
    """GRPOTrainer on the model in `directory`, its weights in float32, with autocast to bfloat16 where `precision` says so.

    Its training runs in a thread of its own, which waits between steps. What would make the steps slower is off: gradient
    checkpointing, reports, progress bars.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is there; nobody is asked
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    asked: queue.SimpleQueue[None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Step] = queue.SimpleQueue()

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = time.perf_counter()
            outputs = super()._generate_and_score_completions(inputs)
            self.rollout_seconds = time.perf_counter() - start
            return outputs

        def _get_per_token_logps_and_entropies(self, *arguments: Any, **more: Any) -> Any:
            result = super()._get_per_token_logps_and_entropies(*arguments, **more)
            self.log_probs = result[0].detach().float().tolist()
            return result

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            # `_prepare_inputs` shuffles the samples: keep them in the order of the log-probabilities
            self.samples = {name: inputs[name].tolist() for name in ("prompt_ids", "completion_ids", "advantages")}
            return super()._compute_loss(model, inputs)

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *arguments: Any, **more: Any) -> None:
            asked.get()
            self.start = time.perf_counter()

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            self.seconds = time.perf_counter() - self.start

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "grad_norm" in logs:
                evidence = {**trainer.samples, "log_probs": trainer.log_probs, "grad_norm": float(logs["grad_norm"])}
                rollout = trainer.rollout_seconds
                first = evidence if state.global_step == 1 else None
                done.put(Step(self.seconds, rollout, self.seconds - rollout, evidence=first))

    def rewards(prompts: list[str], completions: list[str], answer: list[str], **more: Any) -> list[float]:
        return [maths(p, c, {"answer": a}) for p, c, a in zip(prompts, completions, answer, strict=True)]

    with warnings.catch_warnings():  # newer transformers have another name for this field, which older ones and TRL do not know
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        config = GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="finback-bench-trl-"),
            per_device_train_batch_size=len(work.prompts) * work.num_generations,
            num_generations=work.num_generations,
            max_completion_length=work.new_tokens,
            generation_kwargs={"min_new_tokens": work.new_tokens},
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            loss_type="grpo",
            learning_rate=work.lr,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            gradient_checkpointing=False,
            max_steps=REPEATS,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **settings),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": p, "answer": a} for p, a in zip(work.prompts, work.answers, strict=True)] * REPEATS
        ),
        processing_class=AutoTokenizer.from_pretrained(directory),
        callbacks=[Turns()],
    )
    trainer.remove_callback(PrinterCallback)
    thread = threading.Thread(target=trainer.train, daemon=True)
    thread.start()

    def turn(item: Any) -> Step:
        asked.put(None)
        while True:
            try:
                return done.get(timeout=1.0)
            except queue.Empty:
                if not thread.is_alive():
                    raise RuntimeError("TRL's training has ended; its own message stands above") from None

    return turn
