"""What the work of small models costs on this machine: products as narrow as theirs, attention, reading what fits a cache, and steps
of models so small that nothing but the overhead is left. `finback plan --hardware measured` reads it.

Each is measured on shapes of its own, through the functions that the training step and the engine call; no model that the planner is
compared with is among them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.ceilings import DTYPES, best_seconds, memory_rates
from bench.peers import our_model
from bench.results import Row
from bench.train import training_step
from finback.config import ModelConfig
from finback.engine.batch import Chunk
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.engine.runner import Runner
from finback.model.transformer import Transformer, init_weights
from finback.ops.attention import causal_attention
from finback.ops.cross_entropy import linear_cross_entropy
from finback.ops.grouped import grouped_linear
from finback.ops.linear import linear
from finback.ops.memory import LargePages
from finback.ops.native.build import kernels
from finback.planner.measured import CALIBRATED_CONTEXT, CALIBRATED_SEQUENCE, CALIBRATION
from finback.train.losses import accumulate_gradients
from finback.train.optimizer import adamw_update, gradient_norm, init_adam_state
from finback.train.session import keep_freed_memory


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: int = 4096
    widths: tuple[int, ...] = (64, 128, 256, 512)
    experts: int = 16
    heads: tuple[int, int, int] = (16, 4, 256)  # sequences, heads and tokens of attention
    head_size: int = 64
    mebibytes: tuple[int, ...] = (1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 128, 256)
    batches: tuple[int, int] = (1, 16)
    vocabularies: tuple[int, int] = (64, 16384)
    heads_of: tuple[int, ...] = (2048, 16384, 131072)
    head_rows: int = 1024
    steps: int = 64  # of the engine
    decode_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    decode_width: int = 384
    layers: tuple[int, int] = (2, 6)  # of training
    calibration: tuple[int, int] = (8, 48)  # sequences of a training step, and least tokens that the engine writes
    engine_layers: tuple[int, int] = (2, 8)
    seconds: float = 0.3  # for each number


FULL: Size = Size()
QUICK: Size = Size(seconds=0.1)
TOY: Size = Size(
    rows=64,
    widths=(16, 32),
    experts=2,
    heads=(1, 1, 8),
    head_size=16,
    mebibytes=(1, 2),
    batches=(1, 2),
    vocabularies=(64, 128),
    heads_of=(64, 128),
    head_rows=8,
    steps=2,
    decode_batches=(1, 2),
    decode_width=32,
    layers=(1, 2),
    calibration=(1, 2),
    engine_layers=(1, 2),
    seconds=0.001,
)


def run(size: Size) -> list[Row]:
    """All of it, each the best of its repetitions."""
    keep_freed_memory()
    rows = [row for precision in DTYPES for row in _product_rows(precision, size)]
    rows += [head_row(size, precision, vocabulary) for precision in DTYPES for vocabulary in size.heads_of]
    for mebibytes in size.mebibytes:
        read, _ = memory_rates(mebibytes << 20, size.seconds)
        rows.append(Row(f"again and again, {mebibytes} MiB, read", "gb_per_second", read))
    rows += [weights_row(size, precision, mebibytes) for precision in DTYPES for mebibytes in size.mebibytes]
    rows += [decode_row(size, precision, batch) for precision in DTYPES for batch in size.decode_batches]
    few, many = size.vocabularies
    rows += [engine_row(size, batch, layers, few, False) for layers in size.engine_layers for batch in size.batches]
    rows += [engine_row(size, size.batches[1], size.engine_layers[0], many, sampled) for sampled in (False, True)]
    rows += [training_row(size, layers) for layers in size.layers]
    return rows + [row for precision in DTYPES for row in calibration_rows(size, precision)]


def notes() -> list[str]:
    return [
        "Training products: the product and both of its gradients, square matrices as narrow as small models', by the functions of "
        "the training step; of experts, as many rows for each. Attention: causal FLOPs, backward counted as two forwards.",
        "Head and loss: the output head with its loss and both gradients, some hundred rows at a time. Steps of the calibration's "
        "model: one of V3's kind that is compared with nothing; finback plan takes over what they take beyond its formulas.",
        "Steps without work: a model of 16 values and almost no layers, so that what is left is Python, dispatch and bookkeeping.",
    ]


def _product_rows(precision: str, size: Size) -> list[Row]:
    dtype, rows = DTYPES[precision], []
    for width in size.widths:
        x, weight = leaf(size.rows, width, dtype=dtype), leaf(width, width, dtype=dtype)
        seconds = _both_ways(lambda x=x, weight=weight: linear(x, weight), (x, weight), size.seconds)  # type: ignore[misc]
        rows.append(Row(f"training products {precision}, width {width}", "gflop_per_second", _gflops(size.rows, width, seconds)))
    for width in size.widths:
        counts = torch.full((size.experts,), size.rows // size.experts * 2)
        x, weight = leaf(int(counts.sum()), width, dtype=dtype), leaf(size.experts, width, width, dtype=dtype)
        seconds = _both_ways(lambda x=x, w=weight, c=counts: grouped_linear(x, w, c), (x, weight), size.seconds)  # type: ignore[misc]
        rate = _gflops(x.shape[0], width, seconds)
        rows.append(Row(f"expert products {precision}, width {width}", "gflop_per_second", rate))
    sequences, heads, tokens = size.heads
    leaves = tuple(leaf(sequences, heads, tokens, size.head_size, dtype=dtype) for _ in range(3))
    plain = [leaf.detach() for leaf in leaves]
    flops = sequences * heads * tokens * 2 * 2 * size.head_size * (tokens + 1) / 2
    forward = best_seconds(lambda: causal_attention(plain[0], plain[1], plain[2], 0.1), size.seconds)
    both = _both_ways(lambda: causal_attention(leaves[0], leaves[1], leaves[2], 0.1), leaves, size.seconds)
    rows.append(Row(f"attention {precision}, forward", "gflop_per_second", flops / forward / 1e9))
    rows.append(Row(f"attention {precision}, backward", "gflop_per_second", 2 * flops / max(both - forward, 1e-9) / 1e9))
    return rows


def head_row(size: Size, precision: str, vocabulary: int) -> Row:
    """The output head with its loss, forward and both gradients, beside the same by torch's linear and cross_entropy, which holds all
    logits at once."""
    dtype, width = DTYPES[precision], size.decode_width
    hidden, weight = leaf(size.head_rows, width, dtype=dtype), leaf(vocabulary, width, dtype=torch.float32)
    targets = torch.randint(vocabulary, (size.head_rows,))

    def rate(loss: Callable[[], Tensor]) -> float:
        def work() -> None:
            loss().backward()
            hidden.grad = weight.grad = None

        return 6.0 * size.head_rows * width * vocabulary / best_seconds(work, size.seconds) / 1e9

    ours = rate(lambda: linear_cross_entropy(hidden, weight, targets))
    logits = lambda: torch.nn.functional.linear(hidden, weight.to(dtype)).float()  # noqa: E731
    theirs = rate(lambda: torch.nn.functional.cross_entropy(logits(), targets, reduction="sum"))
    name = f"head and loss {precision}, vocabulary {vocabulary}"
    return Row(name, "gflop_per_second", ours, None, "torch's linear and cross_entropy", theirs)


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random values that want a gradient."""
    return torch.randn(*shape).to(dtype).requires_grad_()


def _both_ways(function: Callable[[], Tensor], leaves: tuple[Tensor, ...], seconds: float) -> float:
    """The shortest time of a forward and a backward."""
    gradient = torch.randn_like(function())

    def work() -> None:
        function().backward(gradient)
        for leaf in leaves:
            leaf.grad = None

    return best_seconds(work, seconds)


def _gflops(rows: int, width: int, seconds: float) -> float:
    return 6.0 * rows * width * width / seconds / 1e9


def small_model(layers: int, vocabulary: int) -> Transformer:
    """V3's kind of model, with so little in it that its products cost nothing."""
    model = Transformer(
        ModelConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=1 if layers > 1 else 0,
            n_group=1,
            topk_group=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
            max_position_embeddings=1024,
            initializer_range=0.02,
        )
    )
    init_weights(model, seed=0)
    return model


def weights_row(size: Size, precision: str, mebibytes: int) -> Row:
    """How fast the engine's products of one row read so many weights, again and again: square matrices of the width of `decode_row`, as
    they lie in a model that was loaded."""
    width, dtype, pages = size.decode_width, DTYPES[precision], LargePages()
    count = max(1, (mebibytes << 20) // (width * width * dtype.itemsize))
    weights = [pages.copy(torch.randn(width, width).to(dtype)) for _ in range(count)]
    x, output = torch.randn(1, width).to(dtype), torch.empty(1, width, dtype=dtype)
    library = kernels()
    work: Callable[[], object]
    if library is None:  # without a compiler the engine multiplies by torch, too
        work = lambda: [torch.nn.functional.linear(x, weight) for weight in weights]  # noqa: E731
    else:
        work = library.program([library.linear(x, [weight], [output]) for weight in weights])
    read = sum(weight.nbytes for weight in weights) / best_seconds(work, size.seconds) / 1e9
    return Row(f"weights of {mebibytes} MiB, decode products {precision}, read", "gb_per_second", read)


def decode_row(size: Size, precision: str, batch: int) -> Row:
    """The engine's products for a few rows: one step of a dense model that fits a cache, behind a single token each."""
    width = size.decode_width
    config = ModelConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        max_position_embeddings=64,
        initializer_range=0.02,
    )
    model = Transformer(config)
    init_weights(model, seed=0)
    runner = Runner(model.to(DTYPES[precision]), batch, 16, max_model_len=16, max_rows=batch, max_head_rows=batch)
    chunks = [Chunk([number], 1, [number]) for number in range(batch)]
    seconds = best_seconds(lambda: runner.forward(chunks, [1] * batch), size.seconds)
    products = 2.0 * batch * (2 * (4 + 12) * width**2 + 64 * width)
    return Row(f"decode products {precision}, {batch} rows", "gflop_per_second", products / seconds / 1e9)


def engine_row(size: Size, batch: int, layers: int, vocabulary: int, sampled: bool) -> Row:
    """Milliseconds of one step of the engine with `batch` requests."""
    llm = LLM(model=small_model(layers, vocabulary), max_num_seqs=batch)
    prompts = [[1 + number % 50] for number in range(batch)]
    each = engine_step_seconds(llm, prompts, size.steps, size.seconds, 1.0 if sampled else 0.0)
    way = "sampled" if sampled else "greedy"
    name = f"engine step without work, {batch} requests, {layers} layers, vocabulary {vocabulary}, {way}"
    return Row(name, "milliseconds", 1e3 * each)


def engine_step_seconds(llm: LLM, prompts: Sequence[list[int]], steps: int, least_seconds: float, temperature: float) -> float:
    """Of one step with all prompts: twice as many less as many, so that the call's own beginning and end, and the prompts, cancel."""

    def generate(count: int) -> None:
        llm.reset_prefix_cache()
        llm.generate(prompts, SamplingParams(temperature=temperature, max_tokens=count, ignore_eos=True))

    twice, once = (best_seconds(lambda count=count: generate(count), least_seconds) for count in (2 * steps, steps))  # type: ignore[misc]
    return (twice - once) / steps


def training_row(size: Size, layers: int) -> Row:
    """Milliseconds of one training step of 8 tokens."""
    model = small_model(layers, size.vocabularies[0])
    parameters = dict(model.named_parameters())
    adam = init_adam_state(parameters)
    tokens = torch.randint(size.vocabularies[0], (1, 9))

    def step() -> None:
        accumulate_gradients(model, [tokens], mtp_loss_coef=0.0, balance_loss_coef=1e-4, precision="fp32", recompute="none")
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        gradient_norm(gradients)
        adamw_update(
            parameters, gradients, adam, lr=1e-4, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, gradient_scale=1.0
        )
        for parameter in parameters.values():
            parameter.grad = None

    return Row(f"training step without work, {layers} layers", "milliseconds", 1e3 * best_seconds(step, size.seconds))


def calibration_rows(size: Size, precision: str) -> list[Row]:
    """Whole steps of a model of V3's kind that is compared with nothing: what they take beyond the planner's formulas."""
    sequences, least = size.calibration
    generator = torch.Generator().manual_seed(1)
    shape = (sequences, CALIBRATED_SEQUENCE + 1)
    step = training_step(CALIBRATION, precision, lambda: torch.randint(CALIBRATION.vocab_size, shape, generator=generator))
    name = f"training step of the calibration's model {precision}, {sequences * CALIBRATED_SEQUENCE} tokens"
    rows = [Row(name, "milliseconds", 1e3 * best_seconds(lambda: step(None), size.seconds))]
    model = our_model(CALIBRATION, DTYPES[precision])
    for batch in size.batches:
        llm = LLM(model=model, max_num_seqs=batch)
        length = CALIBRATED_CONTEXT - 3 * least // 2  # so that the steps that are timed have this context in the middle
        prompts = [[1 + (7 * number + place) % 999 for place in range(length)] for number in range(batch)]
        seconds = engine_step_seconds(llm, prompts, least, size.seconds, 0.0)
        rows.append(Row(f"decode step of the calibration's model {precision}, {batch} rows", "milliseconds", 1e3 * seconds))
    return rows
