"""`finback quantize`: a checkpoint with 3, 4 or 8 bits per weight in the GPTQ layout, or in DeepSeek's FP8 layout, and a report of
what that cost."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from tyro.conf import Positional

from finback.commands.parse import parse_arguments
from finback.config import InputError, ModelConfig, checkpoint_tensors
from finback.quant.config import QuantConfig, check_fits, quantised_weights

if TYPE_CHECKING:
    from torch import Tensor

    from finback.quant.quantize import LayerReport

REPORT = "quantization_report.json"
_HELD_OUT_SHARE = 7  # calibration sequences for each one that is held out


@dataclass(frozen=True)
class QuantizeFields:
    """What `finback quantize` takes."""

    source: Positional[Path]
    """Hugging Face directory to read."""
    out: Positional[Path]
    """Hugging Face directory to write, which must not exist yet or be empty. Finished layers lie in OUT.part meanwhile; the same
    command goes on after them."""
    method: Literal["gptq", "rtn", "fp8"] = "gptq"
    """gptq; rtn, rounding to nearest, as the baseline; or fp8, DeepSeek's layout of E4M3 blocks, which needs none of the rest."""
    bits: int = 4
    """Bits of a weight: 3, 4 or 8."""
    group_size: int = 128
    """Inputs that share scale and zero point; -1: all of a matrix's."""
    calibration: tuple[Path, ...] = ()
    """Text files (.txt, .jsonl, .parquet) or directories of them. Some of what is read is held out to measure perplexity."""
    sym: bool = True
    """A grid symmetric around zero; --no-sym gives each group an integer zero point of its own."""
    act_order: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Form groups of columns whose activations are of like size, the largest first, instead of neighbours."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""
    min_expert_tokens: int = 128
    """An expert that saw fewer calibration tokens is rounded to nearest."""
    samples: int = 128
    """Sequences of calibration text, at most."""
    held_out: int | None = None
    """Sequences of the same text that are not calibrated on but measure perplexity; a seventh of the samples if not given. Figures
    that must be firm want several thousand tokens."""
    sequence_length: int | None = None
    """Tokens of a sequence; 512 if not given, or what the model takes if that is less."""
    text_field: str = "text"
    """Field (column) of .jsonl and .parquet files that holds the text."""


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code is 0 when OUT is written."""
    fields = parse_arguments(
        QuantizeFields, argv, verb="quantize", description="Quantise a checkpoint layer by layer, and report what that cost."
    )
    if fields.out.exists() and not (fields.out.is_dir() and not any(fields.out.iterdir())):
        raise InputError(f"OUT {fields.out} exists and is not empty; give a new directory")
    if fields.method == "fp8":
        return _to_fp8(fields)
    config = QuantConfig(
        fields.method, fields.bits, fields.group_size, fields.sym, fields.act_order, fields.damping, fields.min_expert_tokens
    )
    check_fits(_plain_config(fields.source), config)
    if config.method == "gptq" and not fields.calibration:
        raise InputError("--calibration is missing, gptq needs text such as the model is for; give files, or --method rtn")

    from finback.data.files import write_atomic
    from finback.model.checkpoint import open_checkpoint
    from finback.quant.quantize import quantised_layers, write_quantised

    source = open_checkpoint(fields.source)
    calibration, held_out = _sequences(fields, source.config)
    width = max(spec.shape[1] for spec in quantised_weights(source.config) if ".experts." not in spec.name)
    if config.method == "gptq" and calibration.numel() < width:
        print(
            f"calibration text of {calibration.numel()} tokens is less than a matrix has inputs ({width}): what is learnt from it may "
            "not hold for other text; give more, or raise --samples",
            file=sys.stderr,
        )
    out = fields.out.resolve()
    parts = out.with_name(out.name + ".part")
    layers = source.config.num_hidden_layers + source.config.num_nextn_predict_layers
    reports = list(_with_progress(quantised_layers(source, config, calibration, held_out, parts), layers))
    finished = parts / "finished"  # so that OUT appears with its report, whenever the run is killed
    sizes = write_quantised(finished, source, config, parts, fields.source)
    text = _report(config, reports, sizes, calibration.numel(), held_out.numel())
    write_atomic(finished / REPORT, json.dumps(text, indent=2) + "\n")
    finished.rename(out)
    shutil.rmtree(parts)
    _tell(fields.out, config, reports, sizes, held_out.numel())
    return 0


def _plain_config(directory: Path) -> ModelConfig:
    """The config of a directory that is not quantised yet."""
    from finback.data.files import read_json

    config = ModelConfig.from_hf(directory)
    quantization = read_json(directory / "config.json").get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(f"{directory} is quantised already ({method}); finback convert makes it plain, or give its source")
    return config


def _to_fp8(fields: QuantizeFields) -> int:
    """What `finback convert --fp8` does."""
    source_config = _plain_config(fields.source)
    defaults = QuantizeFields(fields.source, fields.out, "fp8")
    bound = ("calibration", "bits", "group_size", "sym", "act_order", "damping", "min_expert_tokens")
    for name in (*bound, "samples", "held_out", "sequence_length", "text_field"):
        if getattr(fields, name) != getattr(defaults, name):
            raise InputError(f"--{name.replace('_', '-')} is for gptq and rtn, FP8 blocks have no use for it; leave it out")
    from finback.model.checkpoint import converted, open_checkpoint, write_checkpoint
    from finback.model.safetensors_io import tensor_bytes

    source = open_checkpoint(fields.source)
    config = replace(source.config, fp8=True)
    write_checkpoint(fields.out, config, converted(source, config), tokenizer_from=fields.source)
    before, after = (sum(map(tensor_bytes, checkpoint_tensors(c))) for c in (replace(source_config, fp8=False), config))
    print(f"{fields.out}: FP8 blocks, {after / 1e6:,.1f} MB, {before / after:.2f} times smaller")
    return 0


def _sequences(fields: QuantizeFields, model: ModelConfig) -> "tuple[Tensor, Tensor]":
    """Token sequences to calibrate on [N, T] and held out [M, T]; none of either without text."""
    import torch

    length = min(512, model.max_position_embeddings) if fields.sequence_length is None else fields.sequence_length
    if not 16 <= length <= model.max_position_embeddings:
        raise InputError(f"--sequence-length is {length}, it must lie between 16 and {model.max_position_embeddings}")
    for name, value in (("samples", fields.samples), ("held-out", fields.held_out)):
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}, it must be positive")
    if not fields.calibration:
        return torch.empty(0, length, dtype=torch.int64), torch.empty(0, length, dtype=torch.int64)

    from finback.data.sources import documents_from
    from finback.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(fields.source)
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(f"the tokenizer of {fields.source} has {tokenizer.vocab_size} tokens, the model {model.vocab_size}")
    wanted_held_out = -(-fields.samples // _HELD_OUT_SHARE) if fields.held_out is None else fields.held_out
    wanted = fields.samples + wanted_held_out
    share = -(-wanted // len(fields.calibration)) * length
    tokens: list[int] = []
    for path in fields.calibration:
        own: list[int] = []
        for document in documents_from(path, field=fields.text_field):
            own += tokenizer.encode(document.text, add_bos=True) if document.text.strip() else []
            if len(own) >= share:
                break
        tokens += own[:share]
    count = min(len(tokens) // length, wanted)
    if count < 2:
        raise InputError(
            f"--calibration holds {len(tokens)} tokens, too few: two sequences of {length} are the least; give more text, or a "
            "smaller --sequence-length"
        )
    sequences = torch.tensor(tokens[: count * length]).view(count, length)
    steps = torch.arange(count + 1) * max(1, count * wanted_held_out // wanted) // count
    is_held_out = steps[1:] > steps[:-1]  # spread evenly
    return sequences[~is_held_out], sequences[is_held_out]


def _with_progress(layers: "Iterator[LayerReport]", total: int) -> "Iterator[LayerReport]":
    """Pass the layers on and tell on stderr how far it is: a bar on a terminal, else a line for each."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("quantising", total=total)
        for number, report in enumerate(layers, start=1):
            progress.update(task, completed=number)
            if progress.disable:
                print(f"layer {number} of {total}", file=sys.stderr, flush=True)
            yield report


def _report(
    config: QuantConfig,
    layers: "list[LayerReport]",
    sizes: tuple[int, int, int, int],
    calibration_tokens: int,
    held_out_tokens: int,
) -> dict[str, Any]:
    """What lies beside the weights."""
    matrices_before, matrices_after, before, after = sizes
    return {
        "settings": asdict(config),
        "calibration_tokens": calibration_tokens,
        "held_out_tokens": held_out_tokens,
        "perplexity": next(({"before": p[0], "after": p[1]} for p in (layer.perplexity for layer in layers) if p), None),
        "bytes": {
            "matrices": {"before": matrices_before, "after": matrices_after, "ratio": matrices_before / matrices_after},
            "all": {"before": before, "after": after, "ratio": before / after},
        },
        "layers": [asdict(layer) for layer in layers],
    }


def _tell(
    out: Path, config: QuantConfig, layers: "list[LayerReport]", sizes: tuple[int, int, int, int], held_out_tokens: int
) -> None:
    """Print what was done."""
    print("layer  matrices  mean error  largest error")
    for layer in layers:
        errors = [(matrix.error, matrix.name) for matrix in layer.matrices if matrix.error is not None]
        if errors:
            worst, name = max(errors)
            mean = sum(error for error, _ in errors) / len(errors)
            print(f"{layer.layer:5}  {len(layer.matrices):8}  {mean:10.4f}  {worst:.4f} {name}")
        else:
            print(f"{layer.layer:5}  {len(layer.matrices):8}           -  -")
    if config.method == "gptq":
        _tell_experts(layers, config)
    matrices_before, matrices_after, before, after = sizes
    print(f"quantised matrices {matrices_before / matrices_after:.2f} times smaller, all weights {before / after:.2f} times")
    for plain, quantised in (layer.perplexity for layer in layers if layer.perplexity is not None):
        print(f"perplexity of {held_out_tokens:,} held-out tokens: {plain:.4f} before, {quantised:.4f} after", end="")
        print(f" ({quantised / plain - 1:+.2%})")
    print(f"{out}: {config.method}, {config.bits} bits, {after / 1e6:,.1f} MB; {REPORT} tells the rest")


def _tell_experts(layers: "list[LayerReport]", config: QuantConfig) -> None:
    """Name the experts that the calibration text did not reach."""
    for layer in layers:
        few = {m.name.split(".")[5]: m.tokens for m in layer.matrices if ".experts." in m.name and m.method == "rtn"}
        if few:
            told = ", ".join(f"{expert} ({tokens})" for expert, tokens in few.items())
            print(
                f"layer {layer.layer}: experts rounded to nearest, with fewer than {config.min_expert_tokens} calibration tokens: "
                f"{told}; more --samples may reach them"
            )
