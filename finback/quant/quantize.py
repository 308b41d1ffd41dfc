"""Quantise a checkpoint layer by layer: only one layer's weights and Hessians are in memory, besides the calibration activations.

Each finished layer lies in a directory of parts; a run that was interrupted goes on after the last of them and ends in the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from finback.config import InputError, TensorSpec
from finback.model.checkpoint import Checkpoint, converted, read_weight, write_tensors
from finback.model.directory import write_durably
from finback.model.gptq_layout import with_packed_weights
from finback.model.layers import RMSNorm
from finback.model.safetensors_io import TensorReader, read_header, tensor_bytes, write_safetensors
from finback.model.transformer import Block, MTPModule
from finback.ops.gptq import pack_bits
from finback.quant.calibration import (
    Seen,
    block_tensors,
    expert_hessians,
    observed,
    perplexity,
    read_block,
    through,
)
from finback.quant.config import QuantConfig, packed_specs, published_config, quantised_weights, stored_specs
from finback.quant.gptq import gptq, relative_error
from finback.quant.rtn import Quantised, dequantised, round_to_nearest

_RUN = "run.json"


@dataclass(frozen=True)
class MatrixReport:
    """How one matrix was quantised: `error` is |Wx - Vx| / |Wx| on the `tokens` it saw, None where it saw none."""

    name: str
    method: str
    tokens: int
    error: float | None


@dataclass(frozen=True)
class LayerReport:
    """The matrices of one layer; the last layer of the main model also tells perplexity before and after, of held-out text."""

    layer: int
    matrices: tuple[MatrixReport, ...]
    perplexity: tuple[float, float] | None = None


@dataclass
class _Streams:
    """Activations [N, T, D] on their way through the layers: calibration text and held-out text through the quantised layers, and
    held-out text through the plain ones."""

    calibration: Tensor
    held_out: Tensor
    plain: Tensor


def quantised_layers(
    source: Checkpoint,
    config: QuantConfig,
    calibration: Int[Tensor, "N T"],
    held_out: Int[Tensor, "M T"],
    parts: Path,
) -> Iterator[LayerReport]:
    """Quantise each layer into a file under `parts`, and tell how it went; layers that lie there already are only run through.

    Raises InputError if `parts` is of another run: other weights, settings or text.
    """
    _claim(parts, source, config, calibration, held_out)
    model = source.config
    with TensorReader() as reader:
        embedding = _read(reader, source, "model.embed_tokens.weight")
        embedded = _Streams(embedding[calibration], embedding[held_out], embedding[held_out])
        streams = _Streams(embedded.calibration, embedded.held_out, embedded.plain)
        for layer in range(model.num_hidden_layers + model.num_nextn_predict_layers):
            block = read_block(reader, source, layer)
            if isinstance(block, MTPModule):
                streams = _combined(block, streams, embedded, layer - model.num_hidden_layers + 1)
            path = parts / f"layer-{layer:05}.safetensors"
            if not path.exists():
                _quantise_layer(block, source, layer, config, streams.calibration, path)
            streams.plain = through(block, model, streams.plain)
            _replace_weights(reader, block, source, layer, path)
            streams.calibration = through(block, model, streams.calibration)
            streams.held_out = through(block, model, streams.held_out)
            told = None
            if layer == model.num_hidden_layers - 1:
                norm = RMSNorm(model.hidden_size, model.rms_norm_eps, dtype=torch.float32).requires_grad_(False)
                read_weight(reader, source.stored, "model.norm.weight", norm.weight.detach())
                head = embedding if model.tie_word_embeddings else _read(reader, source, "lm_head.weight")
                reader.wait()
                if len(held_out):
                    told = perplexity(norm, head, streams.plain, held_out), perplexity(norm, head, streams.held_out, held_out)
                for name in ("calibration", "held_out", "plain"):
                    setattr(streams, name, norm(getattr(streams, name)))
            elif isinstance(block, MTPModule):
                for name in ("calibration", "held_out", "plain"):
                    setattr(streams, name, block.shared_head.norm(getattr(streams, name)))
            matrices = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            yield LayerReport(layer, tuple(MatrixReport(**entry) for entry in matrices), told)


def write_quantised(
    directory: Path, source: Checkpoint, config: QuantConfig, parts: Path, tokenizer_from: Path
) -> tuple[int, int, int, int]:
    """Put the finished layers and the plain rest together as a Hugging Face directory. Returns bytes: of the quantised matrices
    before and after, and of all tensors before and after; before is as they would be in the config's own dtype."""
    chosen = {spec.name: spec for spec in quantised_weights(source.config)}
    packed = {name: entry for path in sorted(parts.glob("layer-*.safetensors")) for name, entry in read_header(path).items()}

    def stream() -> Iterator[tuple[str, Tensor]]:
        with TensorReader() as reader:
            for name, tensor in converted(source, replace(source.config, fp8=False)):
                if name not in chosen:
                    yield name, tensor
                    continue
                for spec in packed_specs(chosen[name], config):
                    yield spec.name, reader.read(packed[spec.name])

    specs = stored_specs(source.config, config)
    write_tensors(directory, specs, published_config(source.config, config), stream(), tokenizer_from)
    element = {"float32": 4}.get(source.config.torch_dtype, 2)
    plain_bytes = sum(spec.shape[0] * spec.shape[1] * element for spec in chosen.values())
    packed_bytes = sum(tensor_bytes(part) for spec in chosen.values() for part in packed_specs(spec, config))
    whole = sum(map(tensor_bytes, specs))
    return plain_bytes, packed_bytes, whole - packed_bytes + plain_bytes, whole


@torch.no_grad()
def _quantise_layer(block: Block, source: Checkpoint, layer: int, config: QuantConfig, x: Tensor, path: Path) -> None:
    """Write the packed matrices of one layer, and a report of them before it, so that the tensors' file marks the end."""
    prefix = f"model.layers.{layer}."
    specs = {spec.name: spec for spec in quantised_weights(source.config) if spec.name.startswith(prefix)}
    seen = Seen()
    if len(x):
        with observed(block, {name.removeprefix(prefix).removesuffix(".weight") for name in specs}) as seen:
            through(block, source.config, x)
    reports, tensors = list[MatrixReport](), dict[str, Tensor]()
    tokens = x.shape[0] * x.shape[1]
    expert_seen: tuple[int, tuple[int, dict[str, Tensor]]] = (-1, (0, {}))
    for name, weight in block_tensors(block, source.config, layer):
        if name not in specs:
            continue
        module = name.removeprefix(prefix).removesuffix(".weight")
        if module.startswith("mlp.experts."):
            number, projection = module.split(".")[2:]
            if expert_seen[0] != int(number):
                expert_seen = int(number), expert_hessians(block, seen, int(number))
            rows, hessians = expert_seen[1]
            hessian, enough = hessians.get(projection), rows >= config.min_expert_tokens
        else:
            rows, hessian, enough = tokens, seen.hessians.get(module), True
        quantised, report = _quantise(name, weight, hessian, rows, enough, config)
        reports.append(report)
        tensors |= _packed(specs[name], quantised, config)
    text = json.dumps([asdict(report) for report in reports])
    _write(path.with_suffix(".json"), text)
    layout = [spec for name in specs for spec in packed_specs(specs[name], config)]
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    write_safetensors(temporary, layout, iter([(spec.name, tensors[spec.name]) for spec in layout]))
    os.replace(temporary, path)


def _quantise(
    name: str, weight: Tensor, hessian: Tensor | None, rows: int, enough: bool, config: QuantConfig
) -> tuple[Quantised, MatrixReport]:
    """One matrix by the method, or to nearest where it has seen too little."""
    try:
        if config.method == "gptq" and hessian is not None and enough:
            method = "gptq"
            quantised = gptq(weight, hessian, config.bits, config.group_size, config.sym, config.act_order, config.damping)
        else:
            method = "rtn"
            quantised = round_to_nearest(weight, config.bits, config.group_size, config.sym)
    except InputError as problem:
        raise InputError(f"{name}: {problem}") from None
    error = None if hessian is None else relative_error(weight, dequantised(quantised), hessian)
    return quantised, MatrixReport(name, method, rows, error)


def _packed(spec: TensorSpec, quantised: Quantised, config: QuantConfig) -> dict[str, Tensor]:
    module = spec.name.removesuffix(".weight")
    return {
        f"{module}.qweight": pack_bits(quantised.values.T, config.bits),
        f"{module}.qzeros": pack_bits(quantised.zeros - 1, config.bits).T.contiguous(),
        f"{module}.scales": quantised.scales.T.contiguous(),
        f"{module}.g_idx": quantised.groups,
    }


def _replace_weights(reader: TensorReader, block: Block, source: Checkpoint, layer: int, path: Path) -> None:
    """Give the block the weights that its part file stands for."""
    stored = with_packed_weights(read_header(path), path.parent)
    for name, tensor in block_tensors(block, source.config, layer):
        if name in stored:
            read_weight(reader, stored, name, tensor)
    reader.wait()


@torch.no_grad()
def _combined(module: MTPModule, streams: _Streams, embedded: _Streams, ahead: int) -> _Streams:
    """The streams at the input of the MTP module that predicts `ahead` tokens further."""

    def joined(hidden: Tensor, embedding: Tensor) -> Tensor:
        length = embedding.shape[1] - ahead
        return module.combine(hidden[:, :length], embedding[:, ahead:])

    return _Streams(
        joined(streams.calibration, embedded.calibration),
        joined(streams.held_out, embedded.held_out),
        joined(streams.plain, embedded.plain),
    )


def _read(reader: TensorReader, source: Checkpoint, name: str) -> Tensor:
    tensor = torch.empty(source.stored[name].shape, dtype=torch.float32)
    read_weight(reader, source.stored, name, tensor)
    reader.wait()
    return tensor


def _claim(parts: Path, source: Checkpoint, config: QuantConfig, calibration: Tensor, held_out: Tensor) -> None:
    """Make the directory of parts, or see that an earlier run with the same input made it."""
    digest = hashlib.sha256(json.dumps(asdict(config)).encode())
    for tensor in (calibration, held_out):
        digest.update(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    for file in sorted({entry.file for entry in source.stored.values()}):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    run: dict[str, Any] = {"input": digest.hexdigest()}
    told = parts / _RUN
    if parts.exists() and not parts.is_dir():
        raise InputError(f"{parts} is a file, finished layers are to lie there; remove it, or give another OUT")
    if not told.exists():
        if parts.exists() and any(entry.suffix != ".tmp" for entry in parts.iterdir()):
            raise InputError(f"{parts} holds something else, finished layers are to lie there; remove it, or give another OUT")
        parts.mkdir(parents=True, exist_ok=True)
        _write(told, json.dumps(run))
    elif json.loads(told.read_text(encoding="utf-8")) != run:
        raise InputError(f"{parts} holds layers of a run with other weights, settings or text; remove it, or give another OUT")


def _write(path: Path, text: str) -> None:
    """Beside its target and renamed: a part that is cut off must not be read."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed here
    write_durably(temporary, text.encode())
    os.replace(temporary, path)
