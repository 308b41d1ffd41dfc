"""Batches of samples: packed, padded or alone they have one loss, one gradient and one expert count; MTP stays within its sample."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F

from finback.config import InputError
from finback.data.conversations import samples_fingerprint
from finback.data.packing import Sample
from finback.model.transformer import Transformer, init_weights
from finback.train.losses import BatchLosses, accumulate_gradients
from finback.train.samples import (
    SampleRows,
    SampleStream,
    accumulate_sample_gradients,
    completion_loss,
    micro_batches,
    mtp_acceptance,
    packed_micro_batches,
    padded_micro_batches,
)
from tests.train.runs import VOCAB_SIZE, micro_dense, micro_model

LENGTHS = (11, 3, 20, 2, 7, 13, 4)
COEFFICIENTS = {"mtp_loss_coef": 0.3, "balance_loss_coef": 0.1}


def make_model(config: object = None) -> Transformer:
    """In float64, so that another order of sums is no excuse."""
    model = Transformer(config or micro_model(), dtype=torch.float64)  # type: ignore[arg-type]
    init_weights(model, seed=1)
    for router in model.routers():
        router.e_score_correction_bias.copy_(torch.linspace(-0.02, 0.02, 8))
    return model


def make_samples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Sample]:
    """Random ids; the first half of each, about, is a prompt, and one completion has a hole in it."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        mask = [place >= max(1, length // 3) for place in range(length)]
        if length == 20:
            mask[9] = mask[10] = False
        samples.append(Sample(ids, mask))
    return samples


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def run(model: Transformer, batch: list[SampleRows], **options: object) -> tuple[BatchLosses, dict[str, torch.Tensor]]:
    losses = accumulate_sample_gradients(model, batch, **(COEFFICIENTS | options))  # type: ignore[arg-type]
    return losses, gradients(model)


def assert_same(ours: tuple[BatchLosses, dict[str, torch.Tensor]], theirs: tuple[BatchLosses, dict[str, torch.Tensor]]) -> None:
    # Rotary angles of float64 models are float32 tables, and positions of packed rows run on: that is all that may differ.
    assert ours[0][:3] == pytest.approx(theirs[0][:3], rel=1e-6)
    assert torch.equal(ours[0].expert_counts, theirs[0].expert_counts)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        difference = torch.linalg.vector_norm(ours[1][name] - gradient) / torch.linalg.vector_norm(gradient)
        assert difference < 1e-5, name


def alone(samples: Sequence[Sample]) -> list[SampleRows]:
    """Each sample a micro-batch."""
    return [rows for sample in samples for rows in padded_micro_batches([sample], 1)]


@pytest.mark.parametrize("row_length", [20, 33, 60])
@pytest.mark.parametrize("rows", [1, 2, 50])
def test_packing_changes_nothing(row_length: int, rows: int) -> None:
    model, samples = make_model(), make_samples()
    assert_same(run(model, packed_micro_batches(samples, row_length, rows)), run(model, alone(samples)))


@pytest.mark.parametrize("tokens", [1, 25, 1000])
def test_padding_changes_nothing(tokens: int) -> None:
    model, samples = make_model(), make_samples()
    assert_same(run(model, padded_micro_batches(samples, tokens)), run(model, alone(samples)))


def test_a_dense_model_too() -> None:
    model, samples = make_model(micro_dense()), make_samples()
    reference = run(model, alone(samples))
    assert reference[0].mtp_loss == reference[0].balance_loss == 0.0
    for batch in (packed_micro_batches(samples, 33, 2), padded_micro_batches(samples, 40)):
        assert_same(run(model, batch), reference)


def test_the_id_of_the_padding_is_never_seen() -> None:
    model, samples = make_model(), make_samples()
    for batching in ("pack", "pad"):
        two = [
            run(model, micro_batches(samples, sequence_length=33, micro_batch_size=2, batching=batching, pad_token_id=pad))  # type: ignore[arg-type]
            for pad in (0, 5)
        ]
        assert_same(two[0], two[1])


def test_the_loss_is_the_mean_over_all_completion_tokens() -> None:
    """Against plain logits of each sample alone: main head, each MTP depth, and the balance loss as the mean over samples."""
    model, samples = make_model(), make_samples()
    main, depths, balance, tokens = 0.0, [0.0, 0.0], 0.0, sum(sum(sample.loss_mask[1:]) for sample in samples)
    for sample in samples:
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            logits, mtp_logits = model(ids[:, :-1], mtp=True)
            balance += float(model.train_forward(ids[:, :-1]).balance_loss) / len(samples)
        for heads, ahead, depth in ((logits, 1, None), *((each, k + 2, k) for k, each in enumerate(mtp_logits))):
            for place in range(len(sample.ids) - ahead):
                if sample.loss_mask[place + ahead]:
                    loss = -float(heads[0, place].log_softmax(-1)[sample.ids[place + ahead]])
                    if depth is None:
                        main += loss
                    else:
                        depths[depth] += loss
    losses, _ = run(model, packed_micro_batches(samples, 33, 2))
    assert losses.loss == pytest.approx(main / tokens, rel=1e-6)
    assert losses.mtp_loss == pytest.approx(sum(depths) / (2 * tokens), rel=1e-6)
    assert losses.balance_loss == pytest.approx(balance, rel=1e-6)
    assert completion_loss(model, padded_micro_batches(samples, 40)) == pytest.approx(main / tokens, rel=1e-6)


def test_a_sample_learnt_whole_is_a_row_of_pre_training() -> None:
    model = make_model()
    (sample,) = (Sample(each.ids, [True] * 20) for each in make_samples([20]))
    ours = run(model, packed_micro_batches([sample], 32, 1))
    theirs = accumulate_gradients(model, [torch.tensor([sample.ids])], **COEFFICIENTS)
    assert_same(ours, (theirs, gradients(model)))


def test_a_prompt_has_no_gradient_of_its_own() -> None:
    """The last completion token's embedding gets none: nothing is predicted from it. That of the prompt does, through attention."""
    model = make_model(micro_model(num_nextn_predict_layers=0))
    sample = Sample([10, 11, 12, 13], [False, False, True, True])
    accumulate_sample_gradients(model, packed_micro_batches([sample], 8, 1), mtp_loss_coef=0.3, balance_loss_coef=0.0)
    embedding = model.model.embed_tokens.weight.grad
    assert embedding is not None
    assert [token for token in range(VOCAB_SIZE) if bool(embedding[token].any())] == [10, 11, 12]


def test_counts_are_of_predicting_tokens_only() -> None:
    model, samples = make_model(), make_samples()
    losses, _ = run(model, packed_micro_batches(samples, 33, 2))
    inputs = [length - 1 for length in LENGTHS]
    expected = [sum(max(0, n - less) for n in inputs) * 2 for less in (0, 0, 1, 2)]  # two main routers, two MTP depths
    assert losses.expert_counts.sum(dim=1).tolist() == expected


def test_without_mtp_its_modules_are_not_computed() -> None:
    model, samples = make_model(), make_samples()
    for module in model.mtp_modules:
        module.requires_grad_(False)
    losses, found = run(model, packed_micro_batches(samples, 33, 2), mtp=False)
    assert losses.mtp_loss == 0.0
    assert losses.expert_counts.shape == (2, 8)
    assert not any(name.startswith(("model.layers.3.", "model.layers.4.")) for name in found)
    assert "lm_head.weight" in found


def test_unpadded_rows_are_what_they_were() -> None:
    """`valid` that is true everywhere changes neither hidden states nor counts, and the balance loss only by rounding."""
    model = make_model()
    ids = torch.randint(0, VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = model.train_forward(ids)
        valid = model.train_forward(ids, valid=torch.ones(3, 17, dtype=torch.bool))
    assert torch.equal(plain.hidden, valid.hidden)
    assert all(torch.equal(a, b) for a, b in zip(plain.mtp_hidden, valid.mtp_hidden, strict=True))
    assert torch.equal(plain.expert_counts, valid.expert_counts)
    assert valid.balance_loss.item() == pytest.approx(plain.balance_loss.item(), rel=1e-12)


def test_a_batch_of_padding_alone_counts_nothing() -> None:
    model = make_model()
    with torch.no_grad():
        output = model.train_forward(torch.zeros(2, 9, dtype=torch.int64), document_ids=torch.full((2, 9), -1))
    assert int(output.expert_counts.sum()) == 0
    assert float(output.balance_loss) == 0.0
    assert output.hidden.isfinite().all()


# Acceptance of drafts


def test_acceptance_is_the_share_of_equal_argmaxes() -> None:
    """Counted by hand over plain logits of each sample alone."""
    model, samples = make_model(), make_samples(seed=3)
    same, total = [0, 0], [0, 0]
    with torch.no_grad():
        for sample in samples:
            logits, mtp_logits = model(torch.tensor([sample.ids])[:, :-1], mtp=True)
            for depth, each in enumerate(mtp_logits):
                for place in range(len(sample.ids) - 2 - depth):
                    if sample.loss_mask[place + 2 + depth]:
                        total[depth] += 1
                        same[depth] += int(each[0, place].argmax() == logits[0, place + 1 + depth].argmax())
    expected = [a / b for a, b in zip(same, total, strict=True)]
    for batch in (packed_micro_batches(samples, 33, 2), padded_micro_batches(samples, 40)):
        assert mtp_acceptance(model, batch) == pytest.approx(expected)


def test_acceptance_of_a_head_that_agrees_and_of_one_that_cannot() -> None:
    model, samples = make_model(), make_samples()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for norm in (model.model.norm, *(module.shared_head.norm for module in model.mtp_modules)):
            norm.weight.zero_()
    assert mtp_acceptance(model, packed_micro_batches(samples, 33, 2)) == [1.0, 1.0]
    assert math.isnan(mtp_acceptance(model, packed_micro_batches([Sample([1, 2, 3], [False, True, True])], 8, 1))[1])


# The stream


def test_every_epoch_takes_each_sample_once_in_another_order() -> None:
    samples = [Sample([index + 1, 2], [False, True]) for index in range(11)]
    stream = SampleStream(samples, seed=4, fingerprint="")
    epochs = []
    for _ in range(3):
        batches = [stream.next_batch(4) for _ in range(3)]
        assert [len(batch) for batch in batches] == [4, 4, 3]
        epochs.append([sample.ids[0] for batch in batches for sample in batch])
    assert all(sorted(epoch) == list(range(1, 12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = SampleStream(samples, seed=4, fingerprint="")
    again.load_state_dict({**stream.state_dict(), "taken": 15})
    assert [sample.ids[0] for sample in again.next_batch(4)] == epochs[1][4:8]
    assert [sample.ids[0] for sample in SampleStream(samples, seed=5, fingerprint="").next_batch(4)] != epochs[0][:4]


def test_a_stream_does_not_continue_with_other_samples() -> None:
    def stream(samples: list[Sample], seed: int = 0) -> SampleStream[Sample]:
        return SampleStream(samples, seed=seed, fingerprint=samples_fingerprint(samples))

    for other in (stream(make_samples(seed=1)), stream(make_samples(), seed=1)):
        with pytest.raises(InputError, match="resume it with the data it started with"):
            other.load_state_dict(stream(make_samples()).state_dict())


def test_padded_micro_batches_are_of_like_lengths_and_within_their_tokens() -> None:
    samples = make_samples([5, 30, 6, 29, 7, 28, 5, 5])
    batches = padded_micro_batches(samples, 60)
    assert [tuple(rows.ids.shape) for rows in batches] == [(2, 30), (2, 28), (4, 6)]
    assert sum(rows.num_samples for rows in batches) == 8
    assert [tuple(rows.ids.shape) for rows in padded_micro_batches(samples[1:2], 10)] == [(1, 30)]


def test_columns_of_padding_are_left_out_of_packed_rows() -> None:
    (rows,) = packed_micro_batches(make_samples([5, 6]), 4096, 4)
    assert tuple(rows.ids.shape) == (1, 11)


def test_cross_entropy_oracle_of_one_sample() -> None:
    model, (sample,) = make_model(), make_samples([9])
    with torch.no_grad():
        logits = model(torch.tensor([sample.ids]))[0, :-1]
    targets = torch.tensor([token if learnt else -100 for token, learnt in zip(sample.ids, sample.loss_mask, strict=True)][1:])
    assert completion_loss(model, alone([sample])) == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-9)
