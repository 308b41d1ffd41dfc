"""The paged forward pass, in torch and by the native kernels, against the model on whole sequences."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from finback.config import InputError, ModelConfig
from finback.engine.batch import SHORT, Chunk, pack
from finback.engine.runner import Backend, Runner
from finback.model.transformer import Transformer
from tests.engine.models import DENSE, V3_MTP
from tests.model.oracle import BASE, V2, V2_LITE, build, untied, worst_row, yarn

BLOCK = 8
CONFIGS = {
    "v3": BASE,
    "v3-yarn": replace(BASE, **yarn(mscale=1.0, mscale_all_dim=1.0)),
    "v3-no-query-compression": replace(BASE, q_lora_rank=None),
    "v3-dense-layers": replace(BASE, first_k_dense_replace=2),
    "v2": V2,
    "v2-lite": V2_LITE,
    **DENSE,
}
BACKENDS: list[Backend] = ["torch", "native"]


def runner(model: Transformer, backend: Backend, max_rows: int = 16, mtp: bool = False) -> Runner:
    return Runner(model, 40, BLOCK, max_model_len=128, max_rows=max_rows, max_head_rows=8, mtp=mtp, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_in_any_order_equal_whole_sequences(name: str, backend: Backend) -> None:
    """Sequences of unequal length, cut at random, their chunks mixed in every step, their blocks scattered."""
    generator = random.Random(1)
    model = build(CONFIGS[name])
    lengths = [37, 20, 1, 9, 24]
    ids = untied(model, len(lengths), max(lengths)).tolist()
    sequences = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    engine = runner(model, backend)
    engine.cache.fill_(1e4)  # whatever lies in a block before it is used must not matter
    free = generator.sample(range(40), 40)
    tables = [[free.pop() for _ in range(-(-length // BLOCK))] for length in lengths]
    done = [0] * len(lengths)
    hidden: list[list[Tensor]] = [[] for _ in lengths]
    last_logits: list[list[Tensor]] = [[] for _ in lengths]
    while any(count < length for count, length in zip(done, lengths, strict=True)):
        numbers = [i for i, length in enumerate(lengths) if done[i] < length and generator.random() < 0.7]
        generator.shuffle(numbers)
        if not numbers:
            continue
        counts = [min(generator.choice([1, 1, 2, 3, SHORT, 14]), lengths[i] - done[i]) for i in numbers]
        chunks = [
            Chunk(sequences[i][done[i] : done[i] + count], done[i], tables[i]) for i, count in zip(numbers, counts, strict=True)
        ]
        wanted = [generator.randint(0, count) for count in counts]
        result = engine.forward(chunks, wanted)
        rows = result.logits.split(wanted)
        for i, count, first, logits in zip(numbers, counts, result.first_rows, rows, strict=True):
            hidden[i].append(result.hidden[first : first + count].clone())
            done[i] += count
            last_logits[i].append(logits.clone())
            expected = model(torch.tensor([sequences[i][: done[i]]]))[0, done[i] - len(logits) :]
            if len(logits):
                assert worst_row(logits, expected) < 1e-4
    with torch.no_grad():
        for sequence, parts in zip(sequences, hidden, strict=True):
            expected = model.train_forward(torch.tensor([sequence]), mtp=False).hidden[0]
            assert worst_row(torch.cat(parts), expected) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_mtp_equals_the_training_pass(backend: Backend) -> None:
    """The MTP module over cached rows, chunk by chunk, gives what `train_forward` gives for whole sequences."""
    model = build(V3_MTP)
    ids = untied(model, 1, 30)
    whole = model.train_forward(ids)
    engine = runner(model, backend, mtp=True)
    table = [3, 1, 0, 2]
    parts, start = [], 0
    for count in (12, 1, 2, 5, 1, 8):
        main = engine.forward([Chunk(ids[0, start : start + count].tolist(), start, table)], [0])
        following = ids[0, start + 1 : start + count + 1].tolist()
        main_hidden = main.hidden.clone()
        draft = engine.draft([Chunk(following, start, table)], [1], main_hidden)
        parts.append(draft.hidden.clone())
        logits = model.lm_head(draft.hidden[-1:])
        assert worst_row(draft.logits, logits) < 1e-5
        start += count
    assert worst_row(torch.cat(parts), whole.mtp_hidden[0][0]) < 1e-4


EVERY_EXPERT = replace(BASE, num_experts_per_tok=8, n_group=1, topk_group=1)  # rounding can move no choice


@torch.no_grad()
@pytest.mark.parametrize("config", [EVERY_EXPERT, *DENSE.values()], ids=["v3", *DENSE])
def test_bfloat16_backends_agree(config: ModelConfig) -> None:
    """Each back-end is at most twice as far from float32 as the plain model in bfloat16 is."""
    exact, model = build(config), build(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
            parameter.copy_(rounded)
    ids = untied(exact, 1, 24)
    expected = exact(ids)[0]
    plain = _distance(model(ids)[0], expected)
    for backend in BACKENDS:
        engine = runner(model, backend)
        logits = [
            engine.forward([Chunk(ids[0, i : i + 1].tolist(), i, [5, 2, 7])], [1]).logits.clone() for i in range(ids.shape[1])
        ]
        assert _distance(torch.cat(logits), expected) < 2 * plain


def _distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def test_more_rows_than_prepared_are_computed_in_parts() -> None:
    model = build(BASE)
    ids = untied(model, 7, 3).tolist()
    engine = runner(model, "native", max_rows=8)
    chunks = [Chunk(row, 0, [number]) for number, row in enumerate(ids)]
    result = engine.forward(chunks, [1] * 7)
    expected = model(torch.tensor(ids))[:, -1]
    assert worst_row(result.logits, expected) < 1e-4


def test_weights_changed_in_place_count_at_once() -> None:
    model = build(BASE)
    engine = runner(model, "native")
    chunk = Chunk([1, 2], 0, [0])
    before = engine.forward([chunk], [1]).logits.clone()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)  # type: ignore[union-attr]
    after = engine.forward([chunk], [1]).logits
    assert not torch.equal(before, after)
    assert worst_row(after, model(torch.tensor([[1, 2]]))[:, -1]) < 1e-4


def test_the_head_reads_rows_where_they_lie_as_it_reads_copies() -> None:
    """Of all tokens, of the first ones, of others."""
    engine = runner(build(BASE), "native")
    hidden = engine.forward([Chunk([1, 2, 3, 4], 0, [0])], [4]).hidden
    assert engine._native is not None
    for rows in (slice(0, 4), slice(0, 2), slice(1, 3)):
        where_they_lie = engine._native.logits(hidden[rows]).clone()
        assert torch.equal(where_they_lie, engine._native.logits(hidden[rows].clone()))


@pytest.mark.parametrize("wanted", [1, 2])
def test_parameters_that_were_replaced_count_when_told(wanted: int) -> None:
    """Where the head reads all rows of a step, and where it reads the last one."""
    model = build(BASE)
    engine = runner(model, "native")
    chunk = Chunk([1, 2], 0, [0])
    engine.forward([chunk], [wanted])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.5
    engine.weights_changed()
    after = engine.forward([chunk], [wanted]).logits
    assert worst_row(after, model(torch.tensor([[1, 2]]))[0, -wanted:]) < 1e-4


def test_a_backend_that_cannot_run_is_named() -> None:
    model = build(BASE, dtype=torch.float64)
    with pytest.raises(InputError, match=r"backend is 'native', but the weights are torch\.float64"):
        runner(model, "native")
    assert runner(model, "auto").backend == "torch"


@pytest.mark.parametrize("name", ["v3", "llama"])
def test_long_prompts_of_one_length_go_together(name: str) -> None:
    model = build(CONFIGS[name])
    ids = untied(model, 3, 20)
    engine = runner(model, "torch")
    tables = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(3)]
    engine.forward([Chunk(ids[0, :9].tolist(), 0, tables[0])], [0])
    # The first prompt goes on, as many tokens as the other two have.
    chunks = [Chunk(ids[0, 9:].tolist(), 9, tables[0])] + [Chunk(ids[i, :11].tolist(), 0, tables[i]) for i in (1, 2)]
    packed = pack(chunks, BLOCK, torch.device("cpu"))
    assert [(group.chunks, group.mask is None) for group in packed.groups] == [(2, True), (1, False)]
    result = engine.forward(chunks, [1, 1, 1])
    expected = [model(ids[:1])[0, -1], *model(ids[1:, :11])[:, -1]]
    assert worst_row(result.logits, torch.stack(expected)) < 1e-4


def test_packing_groups_short_chunks_by_length() -> None:
    chunks = [Chunk([1], 4, [0]), Chunk([2] * 20, 0, [1, 2, 3]), Chunk([3, 4], 0, [4]), Chunk([5], 17, [5, 6, 7])]
    packed = pack(chunks, BLOCK, torch.device("cpu"))
    assert packed.order == [0, 3, 2, 1]
    assert packed.first_rows == [0, 1, 2, 4]
    assert [(group.first, group.end, group.chunks, group.length) for group in packed.groups] == [
        (0, 2, 2, 18),
        (2, 4, 1, 2),
        (4, 24, 1, 20),
    ]
    assert packed.input_ids.tolist() == [1, 5, 3, 4, *[2] * 20]
    assert packed.slots.tolist()[:4] == [4, 57, 32, 33]
    assert packed.groups[2].mask is None
