"""What a run needs to continue bit for bit, and how it survives the death of the process or the disk.

`checkpoints/step-N/` is a Hugging Face directory that `finback.load` reads as it is, plus

    trainer.safetensors   the optimizer's moments (and master weights, if there are any)
    trainer.json          counters, stream position, random states, and what the run ran on
    ema/                  the moving average, if there is one, as a Hugging Face directory of its own
    manifest.json         size and SHA-256 of every other file

It is filled beside its place, written through to the disk and renamed: it is there whole or not at all. What was damaged later is found
by the manifest, and the run continues from the newest checkpoint that is not.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from finback.config import DTYPE_BYTES, InputError, TensorSpec
from finback.data.files import read_json
from finback.data.stream import TokenStream
from finback.model.checkpoint import hf_tensors, load, save
from finback.model.directory import replaced_directory, write_durably
from finback.model.safetensors_io import TORCH_DTYPES, TensorReader, read_catalog, read_header, write_safetensors
from finback.model.transformer import Transformer
from finback.train.config import MomentsDtype, PretrainConfig
from finback.train.ema import MovingAverage
from finback.train.initial import initialise
from finback.train.optimizer import AdamState, adam_tensors, init_adam_state

CHECKPOINTS = "checkpoints"
_TENSORS = "trainer.safetensors"
_STATE = "trainer.json"
_AVERAGE = "ema"
_MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"\.+step-\d+\..*")
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items() if name in DTYPE_BYTES}


@dataclass
class Progress:
    """Counters of a run. `seconds` is the time spent training, over all processes that had a part in it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    nonfinite_steps: int = 0
    """Steps in a row, up to now, that were not applied because their gradient norm was not finite."""


@runtime_checkable
class Stream(Protocol):
    """Data with a position that can be kept and taken up again."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


StreamT = TypeVar("StreamT", bound=Stream)


@dataclass
class TrainingState(Generic[StreamT]):
    """Everything that changes while a run goes on, and nothing else."""

    model: Transformer
    adam: AdamState
    average: MovingAverage | None
    stream: StreamT
    progress: Progress

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those that are trained."""
        return trained_parameters(self.model)


def trained_parameters(model: Transformer) -> dict[str, torch.nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fresh_state(config: PretrainConfig, stream: TokenStream, device: torch.device) -> TrainingState[TokenStream]:
    """A run before its first step: weights from `config.seed` or `config.init_from`, in float32."""
    torch.manual_seed(config.seed)
    model = Transformer(replace(config.model, torch_dtype="float32", fp8=False), device=device, dtype=torch.float32)
    initialise(model, config)
    return new_state(model, stream, moments_dtype=config.moments, ema_decay=config.ema_decay)


def new_state(
    model: Transformer, stream: StreamT, *, moments_dtype: MomentsDtype, ema_decay: float | None
) -> TrainingState[StreamT]:
    """A model at its first step, with an optimizer for what is not frozen in it."""
    parameters = trained_parameters(model)
    moments = torch.bfloat16 if moments_dtype == "bf16" else torch.float32
    average = None if ema_decay is None else MovingAverage(parameters, ema_decay)
    return TrainingState(model, init_adam_state(parameters, moments_dtype=moments), average, stream, Progress())


def save_checkpoint(
    run: Path,
    state: TrainingState[Any],
    *,
    tokenizer_from: str | None,
    keep: int,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write `checkpoints/step-N`, then remove all but the newest `keep` (0: none is removed). `write_more` adds files to it.

    Raises OSError or InputError when the disk is full; the checkpoints before are then untouched.
    """
    step = state.progress.step
    target = run / CHECKPOINTS / f"step-{step}"
    with replaced_directory(target, lambda name: True) as temporary:
        save(state.model, temporary, tokenizer_from=tokenizer_from)
        if state.average is not None:
            state.average.wait()
            save(_averaged_model(state.model, state.average), temporary / _AVERAGE, tokenizer_from=tokenizer_from)
        if write_more is not None:
            write_more(temporary)
        write_tensors(temporary / _TENSORS, adam_tensors(state.adam))
        trainer = {
            "format": 1,
            "progress": asdict(state.progress),
            "updates": state.adam.updates,
            "stream": state.stream.state_dict(),
            "random": _random_states(),
        }
        write_durably(temporary / _STATE, (json.dumps(trainer, indent=2) + "\n").encode())
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(temporary)): _describe(path) for path in files}
        write_durably(temporary / _MANIFEST, (json.dumps({"files": manifest}, indent=2) + "\n").encode())
    if keep:
        for path in list_checkpoints(run)[keep:]:
            _remove(path)
    return target


def _averaged_model(model: Transformer, average: MovingAverage) -> Transformer:
    """The model with averaged parameters in the place of its own; nothing is copied."""
    averaged = Transformer(model.config, device="meta", dtype=torch.float32)
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    averaged.load_state_dict(average.tensors | buffers, assign=True)
    return averaged


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of them."""
    specs = [TensorSpec(name, tuple(tensor.shape), _DTYPE_NAMES[tensor.dtype]) for name, tensor in tensors.items()]
    write_safetensors(path, specs, iter(tensors.items()))


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _remove(checkpoint: Path) -> None:
    """Take the name away first: what is half removed must not look like a checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first, sound or not."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def remove_leftovers(run: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    folder = run / CHECKPOINTS
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None. Reads all of it."""
    try:
        files = read_json(checkpoint / _MANIFEST)["files"]
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes where {expected['bytes']} were written"
            if _describe(path) != expected:
                return f"{name} does not match its checksum"
    except (InputError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is missing or damaged"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def newest_sound_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, None where none was written yet, and a sentence for each damaged one that was passed over.

    Raises InputError if there are checkpoints and all are damaged.
    """
    sentences: list[str] = []
    for checkpoint in list_checkpoints(run):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, sentences
        sentences.append(f"checkpoint {checkpoint} is damaged ({damage}) and is passed over")
    if sentences:
        raise InputError(f"{'; '.join(sentences)}; no sound checkpoint is left, start the run again in another directory")
    return None, []


def load_checkpoint(
    checkpoint: Path, config: PretrainConfig, stream: TokenStream, device: torch.device
) -> TrainingState[TokenStream]:
    """The state that `save_checkpoint` wrote. `stream` is set to its position, torch's random states are set."""
    model = load(checkpoint, dtype=torch.float32, device=device)
    state = new_state(model, stream, moments_dtype=config.moments, ema_decay=config.ema_decay)
    restore_state(checkpoint, state)
    return state


def restore_state(checkpoint: Path, state: TrainingState[Any]) -> None:
    """Everything that `save_checkpoint` wrote but the weights, into a state whose model has them. Sets torch's random states, too."""
    trainer = read_json(checkpoint / _STATE)
    read_tensors(checkpoint / _TENSORS, adam_tensors(state.adam))
    if state.average is not None:
        # The stacked experts are filled through views, one expert of the file at a time.
        averaged = _averaged_model(state.model, state.average)
        catalog = read_catalog(checkpoint / _AVERAGE)
        with TensorReader() as reader:
            for name, tensor in hf_tensors(averaged):
                reader.read_into(catalog[name], tensor)
    state.adam.updates = int(trainer["updates"])
    state.progress = Progress(**trainer["progress"])
    state.stream.load_state_dict(trainer["stream"])
    _set_random_states(trainer["random"])


def read_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` from what `write_tensors` wrote; InputError if the file holds others."""
    catalog = read_header(path)
    if catalog.keys() != tensors.keys():
        raise InputError(f"{path} holds other tensors than this run has; resume with the run's own fields")
    with TensorReader() as reader:
        for name, tensor in tensors.items():
            reader.read_into(catalog[name], tensor)


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state().numpy().tobytes().hex(), "cuda": [state.numpy().tobytes().hex() for state in cuda]}


def _set_random_states(states: dict[str, Any]) -> None:
    def tensor(text: str) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    torch.set_rng_state(tensor(states["cpu"]))
    if states["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all([tensor(state) for state in states["cuda"]])
