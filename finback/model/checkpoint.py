"""Hugging Face directories: load, save, and weights as (hf_name, tensor) pairs (DESIGN decision 5).

Names and shapes come from `config.checkpoint_tensors`. Two differences lie between a file and the model in memory:
experts are stacked here and separate there, and there each MTP layer has its own copies of the embedding and the head
that it shares here. A head that is tied to the embedding is not stored by us; some publishers do store it. FP8 weights
(E4M3 with `weight_scale_inv`, see `ops.fp8`) are dequantised on the way in and quantised on the way out. Loaded in
float32 and saved again, they keep their payload, and their scales to the last bit but one; loaded in bfloat16 they keep
the payload, and scales move by up to one part in 256.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finback.config import InputError, ModelConfig, TensorSpec, checkpoint_tensors, nearest
from finback.model.directory import replaced_directory, write_durably
from finback.model.gptq_layout import (
    GPTQ,
    is_part,
    keep_packed,
    packed_parameters,
    read_for_products,
    read_packed,
    with_packed_weights,
)
from finback.model.safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_DTYPES,
    StoredTensor,
    TensorReader,
    plan_shards,
    read_catalog,
    tensor_bytes,
    write_safetensors,
)
from finback.model.transformer import Transformer
from finback.ops.fp8 import dequantize_128x128, quantize_128x128
from finback.ops.memory import LargePages

MAX_SHARD_BYTES = 5_000_000_000
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_PLAIN = ("F32", "BF16", "F16")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ROTARY_TABLE = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)  # old Llama files hold what follows from the config
EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MTP_COPIES = {"embed_tokens.weight": _EMBEDDING, "shared_head.head.weight": _HEAD}

logger = logging.getLogger("finback")


class Checkpoint(NamedTuple):
    """A Hugging Face directory whose tensors have been checked against its config; nothing but headers has been read.

    `config` says what is really there: no MTP layers if none is stored.
    """

    directory: Path
    config: ModelConfig
    stored: dict[str, StoredTensor]


def load(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", packed: bool = False
) -> Transformer:
    """The model in a Hugging Face directory, its weights cast to `dtype` (the router bias stays float32).

    Weights go one by one from the file to their place: the peak is the model plus one stored tensor (and its scales).
    The model's config says what is in memory: `torch_dtype` is `dtype`, `fp8` is false, and MTP layers that are not
    stored are not there. With `packed`, on a CPU, GPTQ weights of 4 and 8 bits stay packed: such a model is for inference, it can be
    neither trained nor saved. Raises InputError naming the file or tensor that is missing, damaged or not what
    config.json says.
    """
    if dtype not in _DTYPE_NAMES:
        raise InputError(f"dtype is {dtype}, it must be one of {', '.join(map(str, _DTYPE_NAMES))}")
    checkpoint = open_checkpoint(directory)
    model = Transformer(replace(checkpoint.config, torch_dtype=_DTYPE_NAMES[dtype], fp8=False), device=device, dtype=dtype)
    pages = LargePages()
    with torch.no_grad(), TensorReader() as reader:
        copies: dict[str, Tensor] = {}
        taken, kept = read_for_products(model, reader, checkpoint.stored, pages) if packed else ({}, set())
        if torch.device(device).type == "cpu":
            to_be_packed = {id(parameter) for parameter in packed_parameters(model, taken)}
            for parameter in model.parameters():  # nothing is written there yet
                if id(parameter) not in to_be_packed:
                    parameter.data = pages.zeros(parameter.shape, parameter.dtype)
        for name, tensor in hf_tensors(model):
            if name in kept:
                continue
            if _original(name, model.config) == name:
                read_weight(reader, checkpoint.stored, name, tensor)
            elif name in checkpoint.stored:
                copies[name] = tensor
        reader.wait()
        for name, tensor in copies.items():
            _check_copy(reader, checkpoint.stored, name, _original(name, model.config), tensor)
        _check_tied(reader, checkpoint)
    keep_packed(model, taken)
    model.source_directory = checkpoint.directory.resolve()
    return model


def save(
    model: Transformer,
    directory: str | Path,
    fp8: bool = False,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory in the model's dtype, projections as FP8 blocks with `fp8`.

    Tokenizer, chat template and generation config are copied from `tokenizer_from`, by default the directory that the
    model was loaded from. `directory` is replaced whole or not at all (see `replaced_directory`); what else it holds
    stays. The model is never in memory twice: tensors go to their file one by one, `max_shard_bytes` to a file.
    Raises InputError if the parameters differ in dtype, hold what FP8 cannot, or do not fit on the disk.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPE_NAMES):
        found = ", ".join(sorted(map(str, dtypes)))
        raise InputError(f"the model's parameters are {found}; a checkpoint has one of {', '.join(_DTYPE_NAMES.values())}")
    config = replace(model.config, torch_dtype=_DTYPE_NAMES[dtypes.pop()], fp8=fp8)
    remembered = model.source_directory
    if tokenizer_from is None and remembered is not None and remembered.is_dir():
        tokenizer_from = remembered
    stored_as = {spec.name: spec.dtype for spec in checkpoint_tensors(config)}
    tensors = (pair for name, tensor in hf_tensors(model) for pair in _encode(name, tensor, stored_as[name]))
    write_checkpoint(directory, config, tensors, tokenizer_from, max_shard_bytes)


def hf_tensors(model: Transformer, grads: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The model as (hf_name, tensor) pairs, in the order of `checkpoint_tensors`; nothing is copied.

    Experts are views of the stacked weights. The pairs are a complete checkpoint: each MTP layer repeats embedding and
    head. With `grads`, instead, each parameter's gradient once: no copies, no router bias, and nothing for a parameter
    that has no gradient. Raises InputError for a model whose weights are packed.
    """
    if model.is_packed:
        raise InputError("the model's weights are packed, for inference only; load its directory with finback.load")
    tensors = model.state_dict(keep_vars=True)
    for spec in checkpoint_tensors(model.config, fp8=False):
        original = _original(spec.name, model.config)
        expert = EXPERT.fullmatch(original)
        tensor = tensors[f"{expert[1]}.{expert[3]}" if expert else original]
        value = tensor.grad if grads else tensor.detach()
        if value is not None and not (grads and original != spec.name):
            yield spec.name, value[int(expert[2])] if expert else value


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Read config and headers of a Hugging Face directory and check that they agree.

    Raises InputError naming the tensor that is missing, unknown, of another shape than config.json says, of an
    unsupported dtype, or half of an FP8 pair.
    """
    directory = Path(directory)
    config = ModelConfig.from_hf(directory)
    stored = with_packed_weights(read_catalog(directory), directory)
    layers = (_LAYER.fullmatch(name) for name in stored)
    if config.num_nextn_predict_layers and not any(m and int(m[1]) >= config.num_hidden_layers for m in layers):
        logger.warning(
            "%s: config.json announces num_nextn_predict_layers %d, but no MTP layer is stored; loaded without MTP",
            directory,
            config.num_nextn_predict_layers,
        )
        config = replace(config, num_nextn_predict_layers=0)
    _check_stored(stored, config, directory)
    return Checkpoint(directory, config, stored)


def converted(source: Checkpoint, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of `source`, recast as `config` wants them, in its order: the input of `write_checkpoint`.

    `config` is the source's but for `torch_dtype` and `fp8`. One tensor is in memory at a time; FP8 weights that stay
    FP8 keep payload and scales as they are.
    """
    with TensorReader() as reader:
        _check_tied(reader, source)
        stored_as = {spec.name: spec.dtype for spec in checkpoint_tensors(config)}
        for spec in checkpoint_tensors(config, fp8=False):
            name = spec.name if spec.name in source.stored else _original(spec.name, config)
            entry, wanted = source.stored[name], stored_as[spec.name]
            if entry.dtype == wanted == "F8_E4M3":
                yield spec.name, reader.read(entry)
                yield spec.name + "_scale_inv", _read_scale(reader, source.stored, name)
            elif entry.dtype == "F8_E4M3":
                tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[wanted])
                read_weight(reader, source.stored, name, tensor)
                yield spec.name, tensor
            elif entry.dtype == GPTQ:
                yield from _encode(spec.name, read_packed(reader, source.stored, name), wanted)
            else:
                yield from _encode(spec.name, reader.read(entry), wanted)


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory from a stream of the tensors of `checkpoint_tensors(config)`, in that order.

    The stream is drawn one tensor at a time, while a shard is being written. See `save` for the rest.
    """
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes is {max_shard_bytes}, it must be positive")
    write_tensors(directory, list(checkpoint_tensors(config)), config.to_dict(), tensors, tokenizer_from, max_shard_bytes)


def write_tensors(
    directory: str | Path,
    specs: list[TensorSpec],
    published: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`write_checkpoint` for any list of tensors and any config.json (`published`)."""
    directory = Path(directory)
    total = sum(map(tensor_bytes, specs))
    shards = plan_shards(specs, max_shard_bytes)
    carried = carried_files(None if tokenizer_from is None else Path(tokenizer_from))

    stale = {"config.json", GENERATION_CONFIG, SINGLE_FILE, INDEX_FILE}
    if any(file.name in TOKENIZER_FILES for file in carried):  # the files of two tokenizers must not mix
        stale.update(TOKENIZER_FILES)

    def is_stale(name: str) -> bool:
        return name in stale or _SHARD.fullmatch(name) is not None

    with replaced_directory(directory, is_stale) as temporary:
        free = shutil.disk_usage(temporary).free
        if free < total:
            needs = f"{directory} needs {total / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
            raise InputError(f"{needs}; make room, or write elsewhere")
        stream = iter(tensors)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_safetensors(temporary / file_name, shard, stream)
            weight_map |= dict.fromkeys((spec.name for spec in shard), file_name)
        if len(shards) > 1:
            _write_json(temporary / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for file in carried:
            write_durably(temporary / file.name, file.read_bytes())
        if not (temporary / GENERATION_CONFIG).exists():
            _write_json(temporary / GENERATION_CONFIG, _generation_config(published))
        # Last, so that what a killed process leaves behind is no checkpoint to anyone.
        _write_json(temporary / "config.json", published)


def carried_files(source: Path | None) -> list[Path]:
    """The tokenizer's files and the generation config that `source` has."""
    if source is None:
        return []
    if not source.is_dir():
        raise InputError(f"{source} is not a directory; give the one that holds the tokenizer")
    return [source / name for name in (*TOKENIZER_FILES, GENERATION_CONFIG) if (source / name).is_file()]


def _generation_config(published: dict[str, Any]) -> dict[str, object]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: published[name] for name in names if published.get(name) is not None}
    return {"_from_model_config": True, **tokens}


def _write_json(path: Path, content: object) -> None:
    write_durably(path, (json.dumps(content, indent=2) + "\n").encode())


def _original(name: str, config: ModelConfig) -> str:
    """The main model's tensor that an MTP layer's embedding or head repeats; any other name as it is."""
    layer = _LAYER.fullmatch(name)
    return _MTP_COPIES.get(layer[2], name) if layer and int(layer[1]) >= config.num_hidden_layers else name


def _encode(name: str, tensor: Tensor, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """What is stored for one tensor: itself in `dtype`, or an FP8 payload and its scales."""
    if dtype != "F8_E4M3":
        yield name, tensor.to(TORCH_DTYPES[dtype])
        return
    payload, scale_inv = quantize_128x128(tensor)
    if not scale_inv.isfinite().all():
        raise InputError(f"{name} holds inf or nan, which FP8 blocks cannot; save it without FP8 to look into it")
    yield name, payload
    yield name + "_scale_inv", scale_inv


def read_weight(reader: TensorReader, stored: dict[str, StoredTensor], name: str, destination: Tensor) -> None:
    """Fill `destination` with a stored weight, dequantised if it is FP8 or GPTQ."""
    entry = stored[name]
    if entry.dtype == GPTQ:
        destination.copy_(read_packed(reader, stored, name))
        return
    if entry.dtype != "F8_E4M3":
        reader.read_into(entry, destination)
        return
    scale_inv = _read_scale(reader, stored, name).to(destination.device)
    dequantize_128x128(reader.read(entry).to(destination.device), scale_inv, out=destination)


def _read_scale(reader: TensorReader, stored: dict[str, StoredTensor], name: str) -> Tensor:
    scale_inv = reader.read(stored[name + "_scale_inv"])
    if not scale_inv.isfinite().all():
        raise InputError(f"{stored[name].file} holds inf or nan in {name}_scale_inv; fetch the file again")
    return scale_inv


def _check_tied(reader: TensorReader, checkpoint: Checkpoint) -> None:
    """A stored head that config.json ties to the embedding must equal it."""
    if not checkpoint.config.tie_word_embeddings or _HEAD not in checkpoint.stored:
        return
    stored = checkpoint.stored
    if not reader.same_bytes(stored[_HEAD], stored[_EMBEDDING]):
        raise InputError(
            f"{stored[_HEAD].file} holds a {_HEAD} that differs from {_EMBEDDING}, but tie_word_embeddings in config.json says "
            "that they are one: remove the head, or set it to false"
        )


def _check_copy(reader: TensorReader, stored: dict[str, StoredTensor], name: str, original: str, tensor: Tensor) -> None:
    """`tensor` is the original as loaded: read once, if it has not been cast."""
    as_stored = stored[name].dtype == stored[original].dtype and TORCH_DTYPES[stored[original].dtype] == tensor.dtype
    same = reader.holds(stored[name], tensor) if as_stored else reader.same_bytes(stored[name], stored[original])
    if not same:
        raise InputError(
            f"{stored[name].file} holds a {name} that differs from {original}; MTP shares both with the main model, "
            "so the two must be equal bit for bit: remove the copy, or store the same values"
        )


def _check_stored(stored: dict[str, StoredTensor], config: ModelConfig, directory: Path) -> None:
    """Check names, shapes and dtypes; missing before unknown, so that a renamed tensor is told by its right name."""
    expected = {spec.name: spec for spec in checkpoint_tensors(config, fp8=False)}
    scales = {spec.name: spec for spec in checkpoint_tensors(config, fp8=True) if spec.name not in expected}
    if config.tie_word_embeddings and _HEAD in stored:
        expected[_HEAD] = expected[_EMBEDDING]._replace(name=_HEAD)
    unknown = [
        name
        for name in stored
        if not (name in expected or name in scales or is_part(name, stored) or _ROTARY_TABLE.fullmatch(name))
    ]
    for name, spec in expected.items():
        if name in stored:
            _check_entry(stored, spec, scales.get(name + "_scale_inv"), config)
        elif _original(name, config) == name:
            hint = nearest(name, unknown)
            raise InputError(f"{directory} lacks tensor {name}{hint}; fetch it again or correct config.json")
    for name in unknown:
        layer = _LAYER.fullmatch(name)
        why = f"a {config.model_type} model has no such tensor"
        if layer and int(layer[1]) >= config.num_hidden_layers + config.num_nextn_predict_layers:
            mtp = config.num_nextn_predict_layers
            why = f"num_hidden_layers is {config.num_hidden_layers} and num_nextn_predict_layers {mtp}"
        raise InputError(f"{stored[name].file} holds {name}, unknown to config.json ({why}); correct one of the two")


def _check_entry(stored: dict[str, StoredTensor], spec: TensorSpec, scale_spec: TensorSpec | None, config: ModelConfig) -> None:
    """Check one stored weight; `scale_spec` is given for those that may be FP8."""
    name, entry = spec.name, stored[spec.name]
    scale = stored.get(name + "_scale_inv")
    where = f"{entry.file} holds {name}"
    if entry.shape != spec.shape:
        shapes = f"of shape {list(entry.shape)}, config.json gives {list(spec.shape)}"
        raise InputError(f"{where} {shapes}; correct one of the two")
    if entry.dtype == GPTQ and name.endswith("_proj.weight"):
        return
    if entry.dtype in _PLAIN:
        if scale is not None:
            raise InputError(f"{where} as {entry.dtype}, but {scale.file.name} has FP8 scales for it; remove one of the two")
        return
    if entry.dtype != "F8_E4M3" or scale_spec is None:
        supported = (*_PLAIN, "F8_E4M3") if scale_spec is not None else _PLAIN
        raise InputError(f"{where} as {entry.dtype}, supported for it are {', '.join(supported)}; convert it")
    if not config.fp8:
        raise InputError(f"{where} in FP8, but config.json has no quantization_config; add it")
    if scale is None:
        raise InputError(f"{where} in FP8, but its scales {scale_spec.name} are nowhere; fetch the directory again")
    if (scale.dtype, scale.shape) != (scale_spec.dtype, scale_spec.shape):
        found, needed = f"{scale.dtype} {list(scale.shape)}", f"{scale_spec.dtype} {list(scale_spec.shape)}"
        raise InputError(f"{scale.file} holds {scale_spec.name} as {found}, its weight needs {needed}; fetch it again")
