"""Learning from a teacher's probabilities instead of its samples: KL(teacher || student), as pure functions and over a batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from finback.model.transformer import Transformer
from finback.ops.linear import linear
from finback.train.config import Precision, Recompute
from finback.train.samples import SampleRows

_LOGITS_AT_ONCE = 1 << 22
_LEAST = 1e-9


def teacher_kl(
    teacher: Float[Tensor, "N vocab"], student: Float[Tensor, "N vocab"], *, temperature: float = 1.0, top_k: int | None = None
) -> Tensor:
    """The sum over N positions of T^2 KL(softmax(teacher / T) || softmax(student / T)), nats; T^2 keeps gradients comparable.

    With `top_k`, the teacher's likeliest tokens are told apart and all others are one class: a lower bound of the whole loss, by which
    probability that the student spends outside still costs.
    """
    log_p, log_q = (torch.log_softmax(logits.float() / temperature, -1) for logits in (teacher, student))
    if top_k is not None and top_k < log_p.shape[-1]:
        log_p, chosen = log_p.topk(top_k, -1)
        log_q = log_q.gather(-1, chosen)
        log_p, log_q = (torch.cat([part, _rest(part)], -1) for part in (log_p, log_q))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


def _rest(log_probabilities: Tensor) -> Tensor:
    """log of what the probabilities leave over."""
    return (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=_LEAST).log()


def accumulate_logit_gradients(
    student: Transformer,
    teacher: Transformer,
    batch: Sequence[SampleRows],
    *,
    temperature: float,
    top_k: int | None,
    balance_loss_coef: float,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
) -> float:
    """Add the gradient of the mean KL over the batch's completion tokens (and of the balance loss) to the student's `.grad`; returns
    that mean. The MTP modules take no part. Logits exist a part at a time, their gradient reaches the hidden states at once."""
    tokens = sum(int(rows.learnt(1).sum()) for rows in batch)
    samples = sum(rows.num_samples for rows in batch)
    vocabulary = student.lm_head.weight.shape[0]
    total = 0.0
    device = student.lm_head.weight.device
    for rows in batch:
        rows = rows.to(device)
        learnt = rows.learnt(1).flatten().nonzero().squeeze(1)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = rows.forward(student, recompute=recompute, mtp=False)
            with torch.no_grad():
                known = rows.forward(teacher, mtp=False).hidden.flatten(0, 1).index_select(0, learnt)
        hidden = output.hidden.flatten(0, 1).index_select(0, learnt)
        cut = hidden.detach().requires_grad_()
        for start in range(0, len(learnt), size := max(1, _LOGITS_AT_ONCE // vocabulary)):
            part = slice(start, start + size)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                with torch.no_grad():
                    told = linear(known[part], teacher.lm_head.weight)
                logits = linear(cut[part], student.lm_head.weight)
            loss = teacher_kl(told, logits, temperature=temperature, top_k=top_k) / tokens
            loss.backward()
            total += float(loss.detach())
        ends, slopes = [hidden], [cut.grad]
        if output.balance_loss.requires_grad:
            ends.append(output.balance_loss)
            slopes.append(torch.tensor(balance_loss_coef * rows.num_samples / samples).to(output.balance_loss))
        torch.autograd.backward(ends, slopes)
    return total
