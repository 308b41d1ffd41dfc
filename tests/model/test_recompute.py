"""Recomputation in backward: bitwise the gradients of the run that keeps everything, and less kept."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finback.config import ModelConfig
from finback.model.recompute import rebuilt
from finback.model.transformer import Transformer
from finback.ops.cross_entropy import linear_cross_entropy
from tests.model.oracle import BASE, V2, V2_LITE, build, yarn

CONFIGS = {
    "v3": replace(BASE, **yarn(mscale=1.0, mscale_all_dim=1.0), num_nextn_predict_layers=2),
    "no query compression": replace(BASE, q_lora_rank=None, num_nextn_predict_layers=1),
    "one head": replace(BASE, num_attention_heads=1, v_head_dim=20),
    "all dense": replace(BASE, first_k_dense_replace=3),
    "v2": V2,
    "v2-lite": V2_LITE,
}


def loss_of(model: Transformer, input_ids: Tensor, recompute: Any, autocast: bool, documents: Tensor | None) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model.train_forward(input_ids, recompute=recompute, document_ids=documents)
        loss = 0.01 * output.balance_loss
        for shift, hidden in enumerate([output.hidden, *output.mtp_hidden]):
            targets = input_ids[:, shift:].flatten()
            loss = loss + linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets)
    return loss


def gradients_of(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # outside autocast, as training does
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
def test_recomputed_gradients_are_bitwise_the_kept_ones(name: str, autocast: bool, documents: bool) -> None:
    model = build(CONFIGS[name])
    tokens = 131 if not documents else 20
    input_ids = torch.randint(0, BASE.vocab_size, (2, tokens))
    document_ids = torch.arange(tokens).expand(2, -1) // 7 if documents else None
    losses, gradients = {}, {}
    for recompute in ("none", "selective", "full"):
        loss = loss_of(model, input_ids, recompute, autocast, document_ids)
        losses[recompute], gradients[recompute] = loss.item(), gradients_of(model, loss)
    for recompute in ("selective", "full"):
        assert losses[recompute] == losses["none"]
        assert set(gradients[recompute]) == set(gradients["none"]) == {name for name, _ in model.named_parameters()}
        for parameter, gradient in gradients["none"].items():
            assert torch.equal(gradients[recompute][parameter], gradient), (recompute, parameter)


def test_gradients_accumulate_over_micro_batches_with_recomputation() -> None:
    """Two graphs alive at once, backward in the other order, and a graph that is walked twice."""
    model = build(CONFIGS["v3"])
    first, second = torch.randint(0, 96, (2, 1, 9))
    expected = gradients_of(model, loss_of(model, first, "none", False, None) + 2 * loss_of(model, second, "none", False, None))
    model.zero_grad()
    one, two = (loss_of(model, input_ids, "selective", False, None) for input_ids in (first, second))
    two.backward(retain_graph=True)
    one.backward()
    two.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


class Alive(TorchDispatchMode):
    """Remembers every storage that an op makes, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def kept_bytes(config: ModelConfig, recompute: Any, autocast: bool) -> int:
    """What a forward pass leaves in memory for backward (results and casts of weights included, weights not)."""
    model = build(config)
    input_ids = torch.randint(0, config.vocab_size, (2, 128))
    with Alive() as alive:
        loss = loss_of(model, input_ids, recompute, autocast, None)
    kept = alive.bytes()
    assert loss.requires_grad
    del loss
    return kept


# Wide enough in the parts that are recomputed; a forward pass of few tokens is mostly weights, so few of them.
WIDE = replace(
    BASE, hidden_size=64, intermediate_size=192, moe_intermediate_size=48, num_attention_heads=4, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, kv_lora_rank=24, q_lora_rank=32, num_nextn_predict_layers=1,
)  # fmt: skip


def saved_by(recompute: str, config: ModelConfig, autocast: bool) -> float:
    return 1 - kept_bytes(config, recompute, autocast) / kept_bytes(config, "none", autocast)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_recomputation_keeps_less(autocast: bool) -> None:
    """V3 section 3.2.3: RMSNorm and the MLA up-projections, and SwiGLU, are not kept; whole blocks keep their input only."""
    assert saved_by("selective", WIDE, autocast) > 0.3
    assert saved_by("full", WIDE, autocast) > 0.6


def test_selective_recomputation_keeps_no_normalised_input_without_query_compression_either() -> None:
    with_compression, without = (replace(WIDE, q_lora_rank=rank) for rank in (32, None))
    assert saved_by("selective", without, False) > 0.3
    assert saved_by("selective", without, False) > saved_by("selective", with_compression, False) - 0.05


def test_rebuilt_gives_nodes_views_of_what_build_makes() -> None:
    """Each tensor is made once for all nodes that ask, only in backward, and through views and transposes."""
    x = torch.randn(4, 6, requires_grad=True)
    made: list[int] = []

    def build_it() -> tuple[Tensor, ...]:
        made.append(1)
        return (x.exp(), x.detach() * 2)

    first, second = build_it()
    made.clear()
    with rebuilt((first, second), build_it, True):
        result = (first[1:].T * second[1:].T).sum() + (first * second).sum()
    assert not made
    result.backward()
    assert made == [1]
    mask = torch.ones(4, 1)
    mask[1:] += 1
    torch.testing.assert_close(x.grad, mask * x.exp().detach() * 2 * x.detach())


def test_recomputation_without_gradients_changes_nothing() -> None:
    model = build(CONFIGS["v3"])
    input_ids = torch.randint(0, 96, (2, 9))
    with torch.no_grad():
        kept = model.train_forward(input_ids)
        for recompute in ("selective", "full"):
            other = model.train_forward(input_ids, recompute=recompute)  # type: ignore[arg-type]
            assert torch.equal(other.hidden, kept.hidden)
            assert torch.equal(other.expert_counts, kept.expert_counts)
