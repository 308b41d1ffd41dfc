"""`python -m bench.gptq_peer --peer-python PYTHON`: our GPTQ beside gptqmodel's, which lives in an environment of its own.

First the same matrices of a model, with the same inputs and the same settings, are quantised by both. The error of a matrix is
|Wx - Vx| / |Wx| over the calibration inputs x, worked out here in float64 for both sides; gptqmodel's weights are taken before their
scales are rounded to float16, which favours it. Then, given a directory that `finback quantize` wrote, both generate greedily from it:
transformers with gptqmodel's layers, and our engine in float32.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.machine import ROOT, describe_device, read_commit, read_load
from bench.results import write_result
from finback.data.fetch import default_cache
from finback.data.sources import documents_from
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.checkpoint import Checkpoint, load, open_checkpoint, read_weight
from finback.model.layers import Linear
from finback.model.safetensors_io import TensorReader
from finback.model.transformer import Block
from finback.ops.linear import linear
from finback.quant.calibration import read_block, through
from finback.quant.gptq import gptq
from finback.quant.rtn import dequantised, round_to_nearest

TARGET = 1.02  # our error over gptqmodel's, at most
DAMPING = 0.05  # gptqmodel's own choice where none is given
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
ORDERS = (
    "own",
    "activation within groups",
    "activation",
)  # of columns; the second is what gptqmodel takes where none is asked for


@dataclass(frozen=True)
class Setting:
    """What both sides are asked for."""

    bits: int
    group_size: int
    sym: bool
    order: str


def main(
    peer_python: Path,
    model: Path | None = None,
    calibration: Path | None = None,
    quantised: Path | None = None,
    results: Path = ROOT / "bench" / "results",
    layers: tuple[int, ...] = (0, 9, 19, 29),
    group_sizes: tuple[int, ...] = (64, 32),
    sequences: int = 16,
    sequence_length: int = 512,
    new_tokens: int = 32,
    threads: int = 1,
) -> None:
    """Compare, print a table, and write gptq.json.

    Args:
        peer_python: The interpreter of an environment with gptqmodel, transformers and optimum.
        model: A dense model as a Hugging Face directory; SmolLM2-135M as `finback fetch smollm2` gets it if not given.
        calibration: Text, the fables of `finback fetch fables-en` if not given; what lies behind the calibration sequences gives
            the prompts.
        quantised: What `finback quantize` made of a dense model; without it no text is generated.
        results: Directory of the JSON file.
        layers: Layers whose matrices are quantised.
        group_sizes: Inputs that share a scale.
        sequences: Calibration sequences.
        sequence_length: Tokens of each.
        new_tokens: Tokens to generate behind each of four prompts.
        threads: CPU threads of both sides.
    """
    torch.set_num_threads(threads)
    model = model or default_cache() / "smollm2"
    calibration = calibration or default_cache() / "fables-en" / "text.jsonl"
    tokenizer, tokens = load_tokenizer(model), list[int]()
    for document in documents_from(calibration):
        tokens += tokenizer.encode(document.text, add_bos=True)
        if len(tokens) >= (sequences + 1) * sequence_length:
            break
    rows = torch.tensor(tokens[: sequences * sequence_length]).view(sequences, sequence_length)
    settings = [Setting(*parts) for parts in product((4, 3), group_sizes, (True, False), ORDERS)]
    facts: dict[str, Any] = {**read_commit(), "device": describe_device(), **read_load()}
    compared, versions = compare(peer_python, open_checkpoint(model), rows, layers, settings, threads)
    told: dict[str, Any] = {
        "peer": versions,
        "settings": {"damping": DAMPING, "layers": layers, "calibration_tokens": rows.numel(), "model": model.name},
        "layer_errors": compared,
        "verdict": "met" if all(row["ratio"] <= TARGET for row in compared) else "missed",
    }
    if quantised is not None:
        start = sequences * sequence_length
        prompts = [tokens[start + 24 * i : start + 24 * (i + 1)] for i in range(4)]
        told["greedy"] = same_text(peer_python, quantised, prompts, new_tokens, threads)
        print(f"greedy: {told['greedy']}")
    print("bits  group  sym    order                      ours    gptqmodel  ratio")
    for row in compared:
        print(
            f"{row['bits']:4}  {row['group_size']:5}  {row['sym']!s:5}  {row['order']:25}  {row['error']:.4f}  "
            f"{row['peer_error']:.4f}     {row['ratio']:.3f} ({row['smallest_ratio']:.3f} to {row['largest_ratio']:.3f})"
        )
    print(write_result(results, "gptq", [], [], facts, told))


def compare(
    peer_python: Path,
    source: Checkpoint,
    tokens: Tensor,
    layers: Sequence[int],
    settings: Sequence[Setting],
    threads: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each setting the mean error of the matrices by both sides, and the peer's versions."""
    weights, inputs = matrices(source, tokens, layers)
    given = {name: _input_name(name) for name in weights}
    with tempfile.TemporaryDirectory(prefix="finback-bench-gptq-") as temporary:
        work = Path(temporary)
        save_file(weights, work / "weights.safetensors")
        save_file(inputs, work / "inputs.safetensors")
        request = {
            "settings": [asdict(setting) for setting in settings],
            "inputs": given,
            "damping": DAMPING,
            "threads": threads,
        }
        answer = ask(peer_python, "quantise", work, request)
        theirs = load_file(work / "results.safetensors")
    hessians = {name: x.T @ x for name, x in inputs.items()}
    exact = {name: x.double().T @ x.double() for name, x in inputs.items()}
    rows = []
    for number, setting in enumerate(settings):
        start, errors = perf_counter(), dict[str, tuple[float, float, float]]()
        for name, weight in weights.items():
            arguments = setting.bits, setting.group_size, setting.sym
            ours = gptq(weight, hessians[given[name]], *arguments, setting.order == "activation", DAMPING)
            nearest = round_to_nearest(weight, *arguments)
            candidates = dequantised(ours), theirs[f"{number}/{name}"], dequantised(nearest)
            errors[name] = tuple(output_error(weight, one, exact[given[name]]) for one in candidates)  # type: ignore[assignment]
        ratios = [our / peer for our, peer, _ in errors.values()]
        mean, peer, nearest_mean = (fmean(column) for column in zip(*errors.values(), strict=True))
        rows.append(
            {
                **asdict(setting),
                "error": mean,
                "peer_error": peer,
                "rounding_error": nearest_mean,
                "ratio": mean / peer,
                "smallest_ratio": min(ratios),
                "largest_ratio": max(ratios),
                "seconds": perf_counter() - start,
                "matrices": {name: {"error": our, "peer_error": their} for name, (our, their, _) in errors.items()},
            }
        )
    return rows, {**answer["versions"], "seconds": answer["seconds"]}


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """|Wx - Vx| / |Wx| from the sum of x x^T, all in float64."""
    wrong, whole = weight.double() - approximation.double(), weight.double()
    return float(((wrong @ hessian * wrong).sum() / (whole @ hessian * whole).sum()).sqrt())


@torch.no_grad()
def matrices(source: Checkpoint, tokens: Tensor, layers: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of some layers by name, and the inputs [tokens, width] that they have in the plain model, by `_input_name`."""
    weights, inputs = dict[str, Tensor](), dict[str, Tensor]()
    with TensorReader() as reader:
        embedding = torch.empty(source.stored["model.embed_tokens.weight"].shape)
        read_weight(reader, source.stored, "model.embed_tokens.weight", embedding)
        reader.wait()
        x = embedding[tokens]
        for layer in range(max(layers) + 1):
            block = read_block(reader, source, layer)
            if layer in layers:
                for name, projection in _projections(block, layer):
                    weights[name] = projection.weight.detach().clone()
                    if name == _input_name(name):
                        projection.product = _keeping(inputs, name)
            x = through(block, source.config, x)
    return weights, {name: torch.cat(parts) for name, parts in inputs.items()}  # type: ignore[arg-type]


def _projections(block: Block, layer: int) -> list[tuple[str, Linear]]:
    return [(f"{layer}.{name}", module) for name, module in block.named_modules() if isinstance(module, Linear)]


def _input_name(name: str) -> str:
    """The matrix whose input is kept for `name`: some have the same."""
    prefix, _, projection = name.rpartition(".")
    return f"{prefix}.{SAME_INPUT.get(projection, projection)}"


def _keeping(inputs: dict[str, Any], name: str) -> Any:
    """A product of a `Linear` that keeps its inputs."""

    def product_of(x: Tensor, weight: Tensor) -> Tensor:
        inputs.setdefault(name, []).append(x.flatten(0, -2).float().clone())
        return linear(x, weight)

    return product_of


def same_text(
    peer_python: Path, quantised: Path, prompts: Sequence[Sequence[int]], new_tokens: int, threads: int
) -> dict[str, Any]:
    """Greedy tokens of both sides behind each prompt, and how far the logits of the first prompt lie apart."""
    with tempfile.TemporaryDirectory(prefix="finback-bench-gptq-") as temporary:
        work = Path(temporary)
        request = {"model": str(quantised), "prompts": prompts, "new_tokens": new_tokens, "threads": threads}
        answer = ask(peer_python, "generate", work, request)
        theirs = load_file(work / "logits.safetensors")["logits"]
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    outputs = LLM(quantised, dtype=torch.float32).generate([list(prompt) for prompt in prompts], params)
    tokens = [list(output.token_ids) for output in outputs]
    with torch.no_grad():
        logits = load(quantised, dtype=torch.float32)(torch.tensor([list(prompts[0])]))[0]
    return {
        "same": [ours == peer for ours, peer in zip(tokens, answer["tokens"], strict=True)],
        "tokens_each": new_tokens,
        "largest_logit_difference": float((logits - theirs).abs().max()),
        "largest_logit": float(theirs.abs().max()),
        "peer_layers": answer["layers"],
        "text": [load_tokenizer(quantised).decode(ids) for ids in tokens],
    }


def ask(peer_python: Path, mode: str, work: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Let gptqmodel's side do its part in `work`; what it prints goes to stderr."""
    (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
    script = Path(__file__).with_name("gptq_peer_side.py")
    done = subprocess.run([str(peer_python), str(script), mode, str(work)], stdout=2, check=False)
    if done.returncode:
        raise SystemExit(f"{peer_python} ended with {done.returncode}; its own message stands above")
    answer: dict[str, Any] = json.loads((work / "answer.json").read_text(encoding="utf-8"))
    return answer


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.gptq_peer")
