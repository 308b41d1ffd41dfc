"""What surrounds the training loop: where a run lives on the disk, on what it computes, and what a signal does to it."""

import ctypes
import fcntl
import json
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from finback.config import InputError
from finback.data.files import read_json, write_atomic
from finback.data.shards import TokenShards
from finback.data.stream import TokenStream
from finback.data.tokenizer import Tokenizer, load_tokenizer
from finback.ops.native.build import training_kernels
from finback.train.config import PretrainConfig
from finback.train.memory import MemoryEstimate
from finback.train.throughput import matmul_flops, training_flops_per_token

CONFIG_FILE = "config.json"
_MACHINE = "machine"  # the key of config.json that is no field of PretrainConfig
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_BLOCK = 1 << 25  # bytes: the most that glibc takes from what it keeps
_NEVER = (1 << 31) - 1


def read_run_config(directory: str | Path) -> PretrainConfig:
    """The resolved config of the run in `directory`; InputError if there is none."""
    data = read_config_file(directory, start="finback pretrain PRESET --out DIR")
    try:
        return PretrainConfig.from_dict(data)
    except InputError as error:
        raise InputError(f"{Path(directory) / CONFIG_FILE}: {error}") from None


def read_config_file(directory: str | Path, *, start: str) -> dict[str, Any]:
    """config.json of a run without its machine; InputError if there is none: `start` is the command that makes one."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{directory} holds no run (no {CONFIG_FILE}); start one with {start}")
    data = read_json(path)
    data.pop(_MACHINE, None)
    return data


def resolve_config(config: PretrainConfig, directory: Path, resume: bool) -> PretrainConfig:
    """`config` with absolute paths, checked against what is in `directory`.

    Raises InputError if a new run would overwrite one, or a resumed one has other fields than it started with.
    """
    absolute = replace(
        config,
        data=tuple(os.path.abspath(path) for path in config.data),
        tokenizer=None if config.tokenizer is None else os.path.abspath(config.tokenizer),
        init_from=None if config.init_from is None else os.path.abspath(config.init_from),
    )
    check_directory(directory, resume, verb="pretrain")
    if resume:
        check_same_fields(directory, read_run_config(directory).to_dict(), absolute.to_dict())
    return absolute


def check_directory(directory: Path, resume: bool, *, verb: str) -> None:
    """InputError if a run cannot be in `directory`, or a new one would overwrite the one that is there."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; give a directory for the run")
    if not resume and (directory / CONFIG_FILE).exists():
        again = f"continue it with finback {verb} --resume {directory}"
        raise InputError(f"{directory} already holds a run; {again}, or give another --out")


def check_same_fields(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """InputError if a run would be resumed with other fields than it was started with."""
    for name, value in before.items():
        if now[name] != value:
            raise InputError(
                f"field {name} is {now[name]!r}, but the run in {directory} has {value!r}; resume it with its own fields"
            )


def describe_machine(config: PretrainConfig, device: torch.device, estimate: MemoryEstimate) -> dict[str, Any]:
    """What the run is computed on, and the numbers that `mfu` is made of."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": kernels_name(device),
        "matmul_flops_per_second": matmul_flops(config.precision, device),
        "training_flops_per_token": training_flops_per_token(config.model, config.sequence_length),
        "estimated_device_bytes": estimate.on_device,
        "estimated_host_bytes": estimate.moving_average,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def kernels_name(device: torch.device) -> str:
    """What does the elementwise work of a step: C, compiled for this processor, or torch."""
    return "C" if device.type == "cpu" and training_kernels() is not None else "torch"


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next step instead of giving it back, and say whether it will.

    Every step frees and takes the same hundreds of megabytes, and each page that comes back from the system is cleared first: 5 to 10%
    of a step. The peak stays what it is. For processes that train, because it holds for the whole process; only glibc can do it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def write_run_config(directory: Path, fields: dict[str, Any], machine: dict[str, Any]) -> None:
    """config.json of the run: every field as resolved, and the machine it started on."""
    write_atomic(directory / CONFIG_FILE, json.dumps(fields | {_MACHINE: machine}, indent=2) + "\n")


def read_machine(directory: Path) -> dict[str, Any] | None:
    """The machine that the run started on; None if config.json does not tell."""
    machine: dict[str, Any] | None = read_json(directory / CONFIG_FILE).get(_MACHINE)
    return machine


def choose_device(name: str) -> torch.device:
    """The device of the field `device`; InputError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"field device is {name!r}, which torch does not know; use cpu, cuda or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"field device is {name!r}, training runs on cpu and cuda; use one of them")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"field device is {name!r}, but torch finds {count} GPUs here; use cpu, or see finback doctor")
    return device


def open_data(config: PretrainConfig) -> tuple[TokenStream, list[TokenShards], Tokenizer | None]:
    """The training stream, the validation splits, and the tokenizer if it is known; InputError where they do not fit the model."""
    if not config.data:
        raise InputError("field data is empty; give the directories of token shards to train on")
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    training = [TokenShards(directory, "train") for directory in config.data]
    validation = [TokenShards(directory, "validation") for directory in config.data]
    for shards in training:
        if tokenizer is not None:
            shards.check_tokenizer(tokenizer)
        if shards.vocab_size > config.model.vocab_size:
            size = config.model.vocab_size
            raise InputError(
                f"{shards.directory} has {shards.vocab_size} token ids, above the model's vocab_size ({size}); raise it"
            )
    if tokenizer is not None:
        _check_prompts(config, tokenizer)
    stream = TokenStream(training, config.sequence_length, seed=config.seed, weights=config.data_weights or None)
    return stream, validation, tokenizer


def _check_prompts(config: PretrainConfig, tokenizer: Tokenizer) -> None:
    context = config.model.max_position_embeddings
    for prompt in config.sample_prompts:
        needed = len(tokenizer.encode(prompt, add_bos=True)) + config.sample_tokens
        if needed > context:
            raise InputError(
                f"field sample_prompts holds {prompt[:40]!r}, which with sample_tokens ({config.sample_tokens}) needs {needed} "
                f"tokens, above max_position_embeddings ({context}); shorten it or lower sample_tokens"
            )


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time trains in a directory. The lock is on the directory itself and dies with the process."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is training in {directory}; wait for it, or give another --out") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Torch with `count` CPU threads; None: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deferred_interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (SIGTERM, closed terminal) sets, so that the step can end and be saved; the second one interrupts
    at once.

    Signals reach the main thread only: elsewhere the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    heard = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
