"""`python -m bench.perplexity TEXT DIR [DIR ...]`: how well models that share a tokenizer predict the same text.

Made for what quantising costs: the first directory is the one that the others are held against, sequence by sequence, so that the
error of the difference is far smaller than that of either perplexity.
"""

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tyro.conf import Positional

from finback.config import InputError
from finback.data.sources import documents_from
from finback.data.tokenizer import load_tokenizer
from finback.model.checkpoint import load


def main(
    text: Positional[Path],
    directories: Positional[tuple[Path, ...]],
    tokens: int = 8192,
    sequence_length: int = 512,
    json_file: Path | None = None,
    threads: int = 1,
) -> None:
    """Print the perplexity of each model, and how much more than the first one each pays.

    Args:
        text: A .txt, .jsonl or .parquet file that no model was trained or calibrated on.
        directories: Hugging Face directories, the plain model first.
        tokens: How many tokens of the text are predicted.
        sequence_length: How many of them a model sees at once.
        json_file: Where the numbers are written as well.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    rows = sequences(text, directories[0], tokens, sequence_length)
    first: list[float] | None = None
    results = {}
    for directory in directories:
        losses = sequence_losses(directory, rows)
        first = losses if first is None else first
        differences = [one - plain for one, plain in zip(losses, first, strict=True)]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        results[str(directory)] = {
            "perplexity": math.exp(fmean(losses)),
            "rise": math.exp(fmean(differences)) - 1,
            "nats": fmean(differences),
            "standard_error": error,
        }
        told = results[str(directory)]
        print(
            f"{directory}: perplexity {told['perplexity']:.4f} of {rows.numel():,} tokens ({told['rise']:+.2%}; "
            f"{told['nats']:+.5f} nats, standard error {error:.5f})",
            flush=True,
        )
    if json_file is not None:
        json_file.write_text(json.dumps({"tokens": rows.numel(), "models": results}, indent=2) + "\n", encoding="utf-8")


def sequences(text: Path, model: Path, tokens: int, length: int) -> Tensor:
    """The text's first tokens [N, length]."""
    tokenizer, ids = load_tokenizer(model), list[int]()
    for document in documents_from(text):
        ids += tokenizer.encode(document.text, add_bos=True)
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // length
    if not count:
        raise InputError(f"{text} holds {len(ids)} tokens, less than one sequence of {length}; give more text")
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def sequence_losses(directory: Path, rows: Tensor) -> list[float]:
    """The mean loss of each sequence, in nats per token, its first token left out; in float32."""
    model = load(directory, dtype=torch.float32).eval()
    return [float(F.cross_entropy(model(row.unsqueeze(0))[0, :-1], row[1:])) for row in rows]


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.perplexity")
