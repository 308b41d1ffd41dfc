"""One minibatch of GRPO cut over two processes: their gradients add up to those of one process."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

from finback.rl.batch import cut_batches, sample_log_probs
from finback.rl.config import GRPOConfig
from finback.rl.update import objective
from tests.rl.test_batch import CPU, policy, samples
from tests.train.runs import micro_model

LENGTHS = [(5, [7, 2, 9, 4]), (3, [6, 1, 8, 3]), (9, [2, 5, 4, 7])]
ADVANTAGES = [0.9, -1.2, 0.4, -0.1, 1.5, -0.5, -0.7, -0.3, 0.2, 0.6, -1.4, 0.6]
CONFIG = GRPOConfig(model="", beta=0.04)
LOSSES = {"token": 1e-6, "sequence": 1e-5, "global-token": 1e-6}
"""Each with the error that a tensor's gradient may have, relative to its norm. Rounding was seen to leave 5e-7, and 4e-6 with the
sequence loss."""


def gradients(config: GRPOConfig, chosen: list[int]) -> list[torch.Tensor]:
    """Of the whole minibatch's loss, what the chosen samples add: gradients of all weights, then the routers' counts."""
    model, completions = policy(micro_model(num_nextn_predict_layers=0)), samples(LENGTHS)
    reference = policy(micro_model(num_nextn_predict_layers=0))
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.8)
    tokens, counts = sum(len(completion.token_ids) for completion in completions), torch.zeros(())
    for batch in cut_batches([completions[i] for i in chosen], [ADVANTAGES[i] for i in chosen], 64, 0, CPU):
        output = sample_log_probs(model, batch, temperature=1.0, precision="fp32")
        with torch.no_grad():
            batch.reference_log_probs = sample_log_probs(reference, batch, temperature=1.0, precision="fp32").at_temperature
        batch.old_log_probs = (output.at_temperature + 0.15 * batch.engine_log_probs).detach()  # some ratios are beyond the clip
        objective(config, batch, output.at_temperature, len(completions), tokens).backward()
        counts = counts + output.expert_counts
    return [*(parameter.grad for parameter in model.parameters() if parameter.grad is not None), counts]


def run_rank(rank: int, directory: str) -> None:
    """Each process has other samples, groups cut in two among them; the first writes the sums."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    try:
        for loss in LOSSES:
            summed = gradients(replace(CONFIG, loss=loss), list(range(6)) if rank == 0 else list(range(6, 12)))
            for tensor in summed:
                torch.distributed.all_reduce(tensor)
            if rank == 0:
                torch.save(summed, f"{directory}/{loss}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    for loss, error in LOSSES.items():
        whole = gradients(replace(CONFIG, loss=loss), list(range(12)))
        summed = torch.load(tmp_path / f"{loss}.pt")
        assert len(summed) == len(whole) > 10
        assert torch.equal(summed[-1], whole[-1])
        for found, expected in zip(summed[:-1], whole[:-1], strict=True):
            # Of the whole tensor: an element may be the small difference of large terms, which round as libraries sum them.
            assert float((found - expected).norm()) <= error * float(expected.norm())
        assert any(float(tensor.abs().max()) > 1e-3 for tensor in whole[:-1])
