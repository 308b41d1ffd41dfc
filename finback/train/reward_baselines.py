"""What a reward model has to beat: the length of a response alone, and the words in it without their order."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from finback.data.rated import Rated

_MOST_TOKENS = 2000  # of the bag: the most frequent ones
_PENALTY = 1.0  # of the squared weights, against the summed loss


def accuracy(rated: Sequence[Rated], score: Callable[[Sequence[int]], float]) -> float:
    """Share of rows that scores of single responses get right: the better one of a pair higher, a good one above 0. Equal is half."""
    total = 0.0
    for one in rated:
        if len(one.texts) == 2:
            better, worse = (score(response) for response in one.responses)
            margin = better - worse
        else:
            margin = score(one.responses[0]) * (1 if one.good else -1)
        total += 0.5 if margin == 0 else float(margin > 0)
    return total / len(rated)


def length_baseline(training: Sequence[Rated], held_out: Sequence[Rated]) -> float:
    """Held-out accuracy of logistic regression on the logarithm of the length."""
    return _fitted_accuracy(training, held_out, lambda response: torch.tensor([len(response)]).log())


def word_baseline(training: Sequence[Rated], held_out: Sequence[Rated]) -> float:
    """Held-out accuracy of logistic regression on which tokens occur in the response."""
    seen = Counter(token for one in training for response in one.responses for token in set(response))
    column = {token: index for index, (token, _) in enumerate(seen.most_common(_MOST_TOKENS))}

    def features(response: Sequence[int]) -> Tensor:
        row = torch.zeros(len(column))
        row[[column[token] for token in set(response) if token in column]] = 1.0
        return row

    return _fitted_accuracy(training, held_out, features)


def _fitted_accuracy(training: Sequence[Rated], held_out: Sequence[Rated], features: Callable[[Sequence[int]], Tensor]) -> float:
    pairs = len(training[0].texts) == 2
    if pairs:
        rows = torch.stack([features(one.responses[0]) - features(one.responses[1]) for one in training])
        weights = logistic_regression(rows, torch.ones(len(rows)))
        return accuracy(held_out, lambda response: float(features(response) @ weights))
    rows = torch.stack([torch.cat((features(one.responses[0]), torch.ones(1))) for one in training])
    weights = logistic_regression(rows, torch.tensor([float(one.good) for one in training]))
    return accuracy(held_out, lambda response: float(torch.cat((features(response), torch.ones(1))) @ weights))


@torch.enable_grad()
def logistic_regression(features: Float[Tensor, "N F"], labels: Float[Tensor, " N"]) -> Float[Tensor, " F"]:
    """Weights that minimise the summed -log p of 0 and 1 labels plus half the squared weights."""
    weights = torch.zeros(features.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(features @ weights, labels, reduction="sum")
        value = fit + _PENALTY / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
