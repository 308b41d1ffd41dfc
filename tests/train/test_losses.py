"""The loss terms against their definitions, and the whole batch's gradient under any cut into micro-batches."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finback.model.transformer import Transformer, init_weights
from finback.train.balance import update_expert_bias
from finback.train.losses import BatchLosses, accumulate_gradients
from tests.train.runs import VOCAB_SIZE, micro_model


def make_model(**changes: object) -> Transformer:
    model = Transformer(micro_model(**changes))
    init_weights(model, seed=1)
    return model


def make_rows(sequences: int, length: int = 24) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (sequences, length + 1), generator=torch.Generator().manual_seed(0))


def run(model: Transformer, parts: list[Tensor], **options: object) -> tuple[BatchLosses, dict[str, Tensor]]:
    model.zero_grad()
    settings = {"mtp_loss_coef": 0.3, "balance_loss_coef": 0.1} | options
    losses = accumulate_gradients(model, parts, **settings)  # type: ignore[arg-type]
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_term_is_what_the_paper_says() -> None:
    """Against plain logits: means over T for each depth (not T - 1 - k), the mean over depths, sums over routers."""
    model, rows = make_model(), make_rows(3)
    sequences, length = rows.shape[0], rows.shape[1] - 1
    logits, mtp_logits = model(rows[:, :-1], mtp=True)
    main = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    depths = []
    for depth, each in enumerate(mtp_logits):
        total = sum(
            -each[b, i].log_softmax(-1)[rows[b, i + 2 + depth]] for b in range(sequences) for i in range(length - 1 - depth)
        )
        depths.append(total / (sequences * length))
    mtp = sum(depths) / len(depths)
    balance = model.train_forward(rows[:, :-1]).balance_loss
    losses, gradients = run(model, [rows], mtp_loss_coef=0.3, balance_loss_coef=0.1)
    assert losses.loss == pytest.approx(main.item(), rel=1e-5)
    assert losses.mtp_loss == pytest.approx(mtp.item(), rel=1e-5)
    assert losses.balance_loss == pytest.approx(balance.item(), rel=1e-5)
    model.zero_grad()
    (main + 0.3 * mtp + 0.1 * balance).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_untrained_losses_are_those_of_guessing() -> None:
    losses, _ = run(make_model(initializer_range=1e-4), [make_rows(2, 100)])
    assert losses.loss == pytest.approx(math.log(VOCAB_SIZE), abs=0.02)
    # depth k has T - 1 - k positions of T: (99 + 98) / 2 / 100 of a guess
    assert losses.mtp_loss == pytest.approx(0.985 * math.log(VOCAB_SIZE), abs=0.02)


CUTS = [[6], [5, 1], [1, 5], [2, 2, 2], [4, 2], [1] * 6]


@pytest.mark.parametrize("cut", CUTS)
def test_the_cut_into_micro_batches_changes_neither_loss_nor_gradient(cut: list[int]) -> None:
    """Up to the rounding of float32 sums in another order."""
    model, rows = make_model(), make_rows(6)
    whole_losses, whole = run(model, [rows])
    losses, gradients = run(model, list(rows.split(cut)))
    assert losses[:3] == pytest.approx(whole_losses[:3], rel=2e-6)
    assert torch.equal(losses.expert_counts, whole_losses.expert_counts)
    for name, gradient in whole.items():
        difference = torch.linalg.vector_norm(gradients[name] - gradient) / torch.linalg.vector_norm(gradient)
        assert difference < 2e-6, name


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_router_bias_moves_the_same_under_any_cut_and_recomputation(cut: list[int], recompute: str) -> None:
    model, rows = make_model(), make_rows(6)

    def biases_after(parts: list[Tensor], mode: str) -> list[Tensor]:
        losses, _ = run(model, parts, recompute=mode)
        assert int(losses.expert_counts.sum()) == losses_total(rows, model)
        biases = [torch.zeros(model.config.n_routed_experts) for _ in model.routers()]
        update_expert_bias(biases, losses.expert_counts, 0.001)
        return biases

    for ours, reference in zip(biases_after(list(rows.split(cut)), recompute), biases_after([rows], "none"), strict=True):
        assert torch.equal(ours, reference)


def losses_total(rows: Tensor, model: Transformer) -> int:
    """Pairs of token and expert: every position of the main MoE layers, T - 1 - k of depth k, each to K experts."""
    c, length = model.config, rows.shape[1] - 1
    positions = c.num_moe_layers * length + sum(length - 1 - k for k in range(c.num_nextn_predict_layers))
    return rows.shape[0] * positions * c.num_experts_per_tok


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit_of_the_gradient(recompute: str) -> None:
    model, rows = make_model(), make_rows(4)
    for precision in ("fp32", "bf16"):
        kept_losses, kept = run(model, [rows], precision=precision)
        losses, gradients = run(model, [rows], precision=precision, recompute=recompute)
        assert losses[:3] == kept_losses[:3]
        for name, gradient in kept.items():
            assert torch.equal(gradients[name], gradient), (precision, name)


def test_bf16_stays_near_fp32_and_weights_and_gradients_stay_fp32() -> None:
    model, rows = make_model(), make_rows(4)
    exact_losses, exact = run(model, [rows])
    losses, gradients = run(model, [rows], precision="bf16")
    assert losses.loss == pytest.approx(exact_losses.loss, rel=0.01)
    assert losses.loss != exact_losses.loss
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert exact.keys() == gradients.keys()


def test_a_model_without_moe_and_mtp_trains_too() -> None:
    config = replace(micro_model(), num_nextn_predict_layers=0, first_k_dense_replace=3)
    model = Transformer(config)
    init_weights(model, seed=0)
    losses, gradients = run(model, [make_rows(2)])
    assert losses.mtp_loss == losses.balance_loss == 0.0
    assert losses.expert_counts.shape == (0, 8)
    assert len(gradients) == len(list(model.parameters()))
