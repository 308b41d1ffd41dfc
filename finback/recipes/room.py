"""Whether every stage of a recipe has room, in the model's context and in memory: asked before the first stage, not in the fifth."""

from collections.abc import Sequence

from finback.config import InputError, ModelConfig
from finback.data.tokenizer import Tokenizer
from finback.ops.memory import available_memory
from finback.recipes.config import DistillConfig, R1Config
from finback.rl import memory as rl_memory
from finback.rl.config import GRPOConfig
from finback.rl.model_rewards import weight_bytes
from finback.rl.prompts import read_prompts
from finback.train import memory
from finback.train.fine_tuning_config import LONGEST_DEFAULT
from finback.train.session import choose_device
from finback.train.sft_config import SFTConfig


def trace_length(model: ModelConfig, max_completion_length: int) -> int:
    """The longest conversation that a stage learns from, in tokens: an answer and a prompt of 4096, if the context takes that."""
    return min(model.max_position_embeddings, max_completion_length + LONGEST_DEFAULT)


def trace_settings(config: R1Config | DistillConfig, model: str, *, lr: float, epochs: int) -> SFTConfig:
    """How the model in the directory `model` is fine-tuned on traces."""
    return SFTConfig(
        lr=lr,
        epochs=epochs,
        batching="pad",
        chat_template=config.chat_template,
        sequence_length=trace_length(ModelConfig.from_hf(model), config.max_completion_length),
        micro_batch_size=config.micro_batch_size,
        recompute=config.recompute,
    )


def longest_prompt(
    files: Sequence[str], tokenizer: Tokenizer, templates: Sequence[str | None], model: ModelConfig, max_completion_length: int
) -> int:
    """Tokens of the longest prompt of the files, in each of the templates (None: the tokenizer's own).

    Raises InputError, naming file and line, for a prompt that leaves no room for an answer.
    """
    room = model.max_position_embeddings - max_completion_length
    if room < 1:
        raise InputError(
            f"field max_completion_length is {max_completion_length}, and the model's context has {model.max_position_embeddings} "
            "tokens, the prompt among them; lower it"
        )
    return max(
        len(prompt.token_ids) for template in templates for prompt in read_prompts(files, tokenizer, template, longest=room)
    )


def check_reinforcement_learning(settings: GRPOConfig, model: ModelConfig, prompt: int, judges: Sequence[str] = ()) -> None:
    """InputError, with the field to lower, where a stage's training does not fit into memory; `prompt` is the longest's length."""
    device = choose_device(settings.device)
    width = prompt + settings.max_completion_length
    rl_memory.check_memory(settings, model, width, device, available_memory(device), weight_bytes(judges))


def check_fine_tuning(settings: SFTConfig, model: ModelConfig, trace: int) -> None:
    """The same of fine-tuning on padded traces of at most `trace` tokens."""
    device = choose_device(settings.device)
    width = min(trace, model.max_position_embeddings)
    memory.check_memory(settings.as_pretraining(model, width), str(device), available_memory(device))
