"""The engine's generation beside transformers' and our plain one, and MLA's two paths against the length of the context."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.ceilings import DTYPES, Ceilings, best_seconds
from bench.contest import Turn, alternate, summarize
from bench.peers import COMPARED, SETTINGS, our_model, their_model
from bench.results import Row
from finback import LLM, SamplingParams
from finback.config import ModelConfig
from finback.engine.batch import Chunk
from finback.engine.runner import Runner
from finback.model.checkpoint import save
from finback.model.generate import Cache, Path, cached_forward, generate
from finback.model.transformer import Transformer

TARGET_RATIO = {1: 8.0, 16: 10.0}  # to transformers
TWIN = "our plain twin"
BLOCK = 64
TIE = 1e-5  # between two logits; sums in another order move them by a tenth of that


@dataclass(frozen=True)
class Size:
    """How much is measured: `turns` calls of generate for each batch."""

    config: ModelConfig = COMPARED
    batches: tuple[int, ...] = (1, 16)
    prompt: int = 32
    new_tokens: int = 128
    warm_up: int = 1
    turns: int = 4
    contexts: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    path_seconds: float = 0.3
    separate: bool = True


FULL: Size = Size()
QUICK: Size = Size(turns=1, new_tokens=32, contexts=(128, 512, 2048), path_seconds=0.1, separate=False)


def run(size: Size, ceilings: Ceilings) -> tuple[list[Row], list[str]]:
    """Rows for each precision and batch, then for each context length and path."""
    rows = []
    for precision in DTYPES:
        competitors: dict[str, Callable[[], Any]] = {"finback": partial(build_ours, size, precision)}
        competitors[TWIN] = partial(build_twin, size, precision)
        competitors |= {name: partial(build_theirs, size, precision, settings) for name, settings in SETTINGS.items()}
        schedule = [batch for _ in range(size.warm_up + size.turns) for batch in size.batches]
        turns = alternate(competitors, schedule, separate=size.separate)
        equal = _equal_tokens(turns, schedule)
        if precision == "fp32":
            check_tokens(size.config, turns)
        for batch in size.batches:
            kept = {
                name: [turn for turn, b in zip(all_turns, schedule, strict=True) if b == batch]
                for name, all_turns in turns.items()
            }
            kept = {name: kept_turns[size.warm_up :] for name, kept_turns in kept.items()}
            rows += _rows(size, precision, batch, kept, equal[batch], ceilings)
    for precision in DTYPES:
        rows += context_rows(size, precision, ceilings)
    return rows, _notes(size)


def build_ours(size: Size, precision: str) -> Callable[[int], list[list[int]]]:
    """The engine's generate on `batch` prompts, none of which it has seen."""
    with tempfile.TemporaryDirectory(prefix="finback-bench-") as directory:
        save(our_model(size.config, DTYPES[precision]), directory)
        llm = LLM(directory, max_num_seqs=max(size.batches))
    params = SamplingParams(temperature=0.0, max_tokens=size.new_tokens, ignore_eos=True)

    def turn(batch: int) -> list[list[int]]:
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts(size, batch).tolist(), params)
        return [output.prompt_token_ids + output.token_ids for output in outputs]

    return turn


def build_twin(size: Size, precision: str) -> Callable[[int], list[list[int]]]:
    """The same by `finback.model.generate`: torch alone, one cache, no scheduler."""
    model = our_model(size.config, DTYPES[precision])
    return lambda batch: generate(model, prompts(size, batch), size.new_tokens).tolist()


def build_theirs(size: Size, precision: str, settings: Mapping[str, str]) -> Callable[[int], list[list[int]]]:
    """The same by transformers' generate, which caches the latent too, but expands all of it at every step."""
    model: Any = their_model(size.config, settings, DTYPES[precision]).eval()
    model.generation_config.eos_token_id = None  # neither side stops early
    model.generation_config.pad_token_id = 0

    def turn(batch: int) -> list[list[int]]:
        ids = prompts(size, batch)
        answer: list[list[int]] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=size.new_tokens, do_sample=False
        ).tolist()
        return answer

    return turn


def prompts(size: Size, batch: int) -> torch.Tensor:
    """Random prompts, the same for every competitor."""
    return torch.randint(size.config.vocab_size, (batch, size.prompt), generator=torch.Generator().manual_seed(2))


def _equal_tokens(turns: Mapping[str, list[Turn]], schedule: list[int]) -> dict[int, float]:
    """For each batch, the share of tokens that is equal on all sides."""
    equal: dict[int, float] = {}
    for index, batch in enumerate(schedule):
        ours = torch.tensor(turns["finback"][index].value)
        for others in turns.values():
            share = float((ours == torch.tensor(others[index].value)).double().mean())
            equal[batch] = min(equal.get(batch, 1.0), share)
    return equal


def check_tokens(config: ModelConfig, turns: Mapping[str, list[Turn]]) -> None:
    """All sides generate the same tokens; where two differ, the logits of both tokens are equal to the fifth digit.

    Raises AssertionError where they differ by more: then the sides do not compute the same.
    """
    model = our_model(config)
    for name, others in turns.items():
        for ours, theirs in zip(turns["finback"], others, strict=True):
            check_same(model, name, ours.value, theirs.value, TIE)


def check_same(model: Transformer, name: str, ours: Sequence[list[int]], theirs: Sequence[list[int]], tie: float) -> None:
    """The same sequences but for ties: where two part, the logits of the two tokens in `model` are at most `tie` apart."""
    for mine, other in zip(ours, theirs, strict=True):
        at = next((index for index, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            assert len(mine) == len(other), f"finback has {len(mine)} tokens, {name} {len(other)}"
            continue
        with torch.no_grad():
            logits = model(torch.tensor([mine[:at]]))[0, -1]
        margin = float((logits[mine[at]] - logits[other[at]]).abs())
        assert margin < tie, f"token {at}: finback has {mine[at]}, {name} {other[at]}, {margin:.1e} apart in our logits"


def _rows(size: Size, precision: str, batch: int, turns: Mapping[str, list[Turn]], equal: float, ceilings: Ceilings) -> list[Row]:
    tokens = batch * size.new_tokens
    speeds = {name: summarize([tokens / turn.seconds for turn in kept]) for name, kept in turns.items()}
    read = bytes_per_step(size.config, DTYPES[precision].itemsize, batch, size.prompt + size.new_tokens // 2)
    seconds = read / 1e9 / ceilings.read_gb_per_second
    floor = {"megabytes_per_step": read / 1e6, "tokens_per_second": batch / seconds}
    extra = {"milliseconds_per_step": 1e3 * batch / speeds["finback"].median, "equal_tokens": equal}
    name = f"generate {precision}, batch {batch}"
    return [
        Row(
            name,
            "tokens_per_second",
            *speeds["finback"],
            peer,
            *speeds[peer],
            target=None if peer == TWIN else TARGET_RATIO.get(batch),
            floor=floor,
            extra=extra,
        )
        for peer in (*SETTINGS, TWIN)
    ]


def bytes_per_step(config: ModelConfig, itemsize: int, batch: int, context: int) -> float:
    """Bytes that one decode step must read: the weights in use (each expert that some row of the batch is expected to choose), and
    the cached latents."""
    c = config
    query = c.hidden_size * c.num_attention_heads * c.qk_head_dim
    if c.q_lora_rank is not None:
        query = c.q_lora_rank * (c.hidden_size + c.num_attention_heads * c.qk_head_dim)
    row = c.kv_lora_rank + c.qk_rope_head_dim
    expand = c.kv_lora_rank * c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    attention = query + c.hidden_size * row + expand + c.num_attention_heads * c.v_head_dim * c.hidden_size
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    chosen = c.n_routed_experts * (1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** batch)
    moe = c.hidden_size * c.n_routed_experts + expert * (chosen + c.n_shared_experts)
    dense = 3 * c.hidden_size * c.intermediate_size
    layers = c.num_hidden_layers * attention + c.num_moe_layers * moe + c.first_k_dense_replace * dense
    latents = batch * context * row * c.num_hidden_layers
    return itemsize * (layers + c.vocab_size * c.hidden_size + latents)


def context_rows(size: Size, precision: str, ceilings: Ceilings) -> list[Row]:
    """Milliseconds of one decode step against the number of cached tokens: the engine's, which uses the latents absorbed, beside the
    expanded path over the same latents."""
    longest = max(size.contexts) + 1
    model = our_model(replace(size.config, max_position_embeddings=longest), DTYPES[precision])
    table = list(range(-(-longest // BLOCK)))
    runner = Runner(model, len(table), BLOCK, max_model_len=longest, max_rows=1, max_head_rows=1)
    runner.cache.normal_()
    rows = []
    for context in size.contexts:
        chunk = [Chunk([0], context, table)]
        engine = 1e3 * best_seconds(lambda chunk=chunk: runner.forward(chunk, [1]), size.path_seconds)  # type: ignore[misc]
        absorbed, expanded = (_torch_step(model, context, path, size.path_seconds) for path in ("absorbed", "expanded"))
        read = bytes_per_step(size.config, DTYPES[precision].itemsize, 1, context)
        floor = {"megabytes": read / 1e6, "milliseconds": read / 1e6 / ceilings.read_gb_per_second}
        name = f"one step over {context} cached tokens, {precision}, absorbed"
        extra = {
            "precision": precision,
            "cached_tokens": context,
            "absorbed_in_torch_milliseconds": absorbed,
            "backend": runner.backend,
        }
        rows.append(Row(name, "milliseconds", engine, peer="expanded, in torch", peer_value=expanded, floor=floor, extra=extra))
    return rows


@torch.no_grad()
def _torch_step(model: Transformer, context: int, path: Path, seconds: float) -> float:
    """Milliseconds of the plain twin's step by one of the paths."""
    cache, token = Cache(model, 1, context + 1), torch.zeros(1, 1, dtype=torch.int64)
    cache.rows.normal_()

    def step() -> torch.Tensor:
        cache.length = context
        logits: torch.Tensor = model.lm_head(cached_forward(model, token, cache, path)[:, -1])
        return logits

    return 1e3 * best_seconds(step, seconds)


def _notes(size: Size) -> list[str]:
    return [
        f"The model of the training comparison. {size.prompt} prompt tokens, {size.new_tokens} new ones, greedy, the whole call timed, "
        "prompt included; in fp32 all tokens were compared and are equal (but where two logits are, to the fifth digit). The "
        "engine's prefix cache was emptied before each call. Our plain twin: the same model in torch, one cache, no scheduler.",
        "One step: the engine's, by its kernels, MLA absorbed; beside it the expanded path, in torch. The JSON and the picture hold "
        "the absorbed path in torch, too, so that the gain of the path and that of the kernels can be told apart.",
        "Floor: weights in use and cached latents, read once per step at the measured memory bandwidth. A model that fits into the "
        "last cache can be read faster than that.",
    ]


if __name__ == "__main__":
    from bench.cli import main_of

    main_of("decode")
