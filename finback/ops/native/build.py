"""Compile the C kernels of this directory for the machine at hand, once, and load them.

A library lies in `~/.cache/finback/native` under the hash of all that it depends on: sources, flags, the compiler and the
processor. So it is compiled on the machine type that runs it and can hold no instruction that is missing there; another
processor, compiler or version of finback finds no library under its own hash and compiles again, which takes seconds.

OpenMP is linked to the runtime that torch has already loaded. A second one would bring threads of its own, which fight with
torch's for the same cores.
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from finback.ops.native.calls import Kernels
from finback.ops.native.causal import CausalKernels
from finback.ops.native.grouped import GroupedKernels
from finback.ops.native.training import SUFFIXES, TrainingKernels

SOURCES = (
    "kernels.c",
    "vectors.h",
    "codes.h",
    "company.h",
    "product.h",
    "packed.h",
    "operations.h",
    "rows.h",
    "attention.h",
    "grouped_query.h",
    "latent.h",
    "experts.h",
    "undefine.h",
)
TRAINING_SOURCES = ("training.c", "vectors.h", "training.h")
GROUPED_SOURCES = ("grouped.c", "vectors.h", "tiles.h", "tile.h", "grouped.h")
CAUSAL_SOURCES = ("causal.c", "vectors.h", "tiles.h", "tile.h", "causal.h")
COMPILERS = ("gcc", "cc", "clang")
# No -ffast-math: it would drop nan and inf, and flush denormal numbers of the whole process to zero.
# Products and sums may become one operation only where all copies of a loop come out alike, as tests have shown of AVX-512: with AVX2
# GCC joins them in some and not in others, and a result depended on how many rows and threads there were. There `multiply_add` of
# vectors.h joins those that take the time.
CONTRACTION = () if torch.cpu._is_avx512_supported() else ("-ffp-contract=off",)
FLAGS = ("-std=gnu11", "-O3", "-march=native", *CONTRACTION, "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp")

logger = logging.getLogger("finback")

Declared = TypeVar("Declared")


class BuildError(Exception):
    """Why there are no kernels, in one sentence without its subject."""


@cache
def kernels() -> Kernels | None:
    """The kernels, compiled if need be; None where that is impossible, which is said once, as a warning."""
    return _loaded(Kernels, SOURCES, "decoding on the CPU runs on torch alone, several times slower")


@cache
def training_kernels() -> TrainingKernels | None:
    """Those of a training step, likewise."""
    return _loaded(TrainingKernels, TRAINING_SOURCES, "training on the CPU runs on torch alone, up to a third slower")


@cache
def grouped_kernels() -> GroupedKernels | None:
    """The products of a layer of experts, likewise."""
    return _loaded(
        GroupedKernels, GROUPED_SOURCES, "experts on the CPU are multiplied by torch, a training step up to a tenth slower"
    )


@cache
def causal_kernels() -> CausalKernels | None:
    """Attention over expanded keys and values and its gradients, likewise."""
    return _loaded(
        CausalKernels, CAUSAL_SOURCES, "attention on the CPU is multiplied by torch, a training step up to a tenth slower"
    )


def _loaded(declare: Callable[[ctypes.CDLL], Declared], sources: tuple[str, ...], loss: str) -> Declared | None:
    try:
        return declare(_library(sources))
    except BuildError as error:
        logger.warning("%s: %s", loss, error)
        return None


def grouped_kernels_for(dtype: torch.dtype, device: torch.device) -> GroupedKernels | None:
    """Those, where they multiply this fast."""
    kernels = grouped_kernels() if device.type == "cpu" and dtype in SUFFIXES else None
    return kernels if kernels is not None and dtype in kernels.dtypes else None


def causal_kernels_for(query: Tensor, key: Tensor, value: Tensor) -> CausalKernels | None:
    """Those, where they take these tensors."""
    kernels = causal_kernels() if query.device.type == "cpu" and query.dtype in SUFFIXES else None
    return kernels if kernels is not None and kernels.take(query, key, value) else None


def training_kernels_for(*tensors: Tensor) -> TrainingKernels | None:
    """Those, where they take all these tensors: float32 or bfloat16, on the CPU."""
    return training_kernels() if all(t.device.type == "cpu" and t.dtype in SUFFIXES for t in tensors) else None


def cache_directory() -> Path:
    """Where compiled libraries lie; they can be removed at any time."""
    return Path("~/.cache/finback/native").expanduser()


def _library(sources: tuple[str, ...]) -> ctypes.CDLL:
    """The library of the first of `sources`, which includes the others."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError("there is no C compiler; install one (on Debian and Ubuntu: apt-get install gcc)")
    runtime = _openmp_runtime()
    path = cache_directory() / f"{_key(compiler, runtime, sources)}.so"
    if _is_whole(path):
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            logger.info("%s does not load (%s); compiling it again", path, error)
    logger.info("compiling the CPU kernels with %s, once for this machine", compiler)
    # Beside its place if possible, so that it can be moved there in one step; two processes may do so at once.
    with _temporary_directory(path.parent) as temporary:
        compiled = _compile(compiler, runtime, temporary, sources[0])
        try:
            os.replace(compiled, path)
            compiled = path
        except OSError as error:
            logger.info("the compiled kernels cannot be kept in %s (%s): this run only", path.parent, error.strerror)
        try:
            return ctypes.CDLL(str(compiled))  # which stays loaded when the file goes
        except OSError as error:
            raise BuildError(f"the compiled kernels do not load ({error}); repair {compiler}, or install another") from None


@contextmanager
def _temporary_directory(parent: Path) -> Iterator[Path]:
    """In `parent`, or, where nothing can be written there, in the system's place for temporary files."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(dir=parent)
    except OSError:
        directory = tempfile.TemporaryDirectory()
    with directory as name:
        yield Path(name)


def _compile(compiler: str, runtime: Path | None, directory: Path, name: str) -> Path:
    """Compile `name` into `directory` and return the library, with its own digest at the end."""
    source, compiled, library = Path(__file__).with_name(name), directory / "kernels.o", directory / "kernels.so"
    _run(compiler, *FLAGS, "-c", str(source), "-o", str(compiled))
    openmp = "-fopenmp" if runtime is None else str(runtime)
    _run(compiler, "-shared", str(compiled), "-o", str(library), openmp, "-lm")
    try:
        with library.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BuildError(f"{compiler} left no library behind ({error.strerror}); repair it, or install another") from None
    return library


def _is_whole(path: Path) -> bool:
    """Whether the library ends in its digest: loading half a file would not fail, it would end the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _run(*command: str) -> str:
    try:
        # Messages in English, whatever the user's language, because they are quoted.
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error.strerror}); repair or reinstall it") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {done.returncode}")
        raise BuildError(f"{command[0]} failed ({reason}); repair it, or install another C compiler")
    return done.stdout


def _key(compiler: str, runtime: Path | None, sources: tuple[str, ...] | None = None) -> str:
    parts = [Path(__file__).with_name(name).read_bytes() for name in sources or SOURCES]
    parts += [" ".join(FLAGS).encode(), _run(compiler, "--version").encode(), _processor().encode(), str(runtime).encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _processor() -> str:
    """What decides which instructions a compiler may use: the processor's model and features."""
    try:
        information = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = information.split("\n\n")[0]
    return platform.machine() + "\n".join(
        re.findall(r"^(?:vendor_id|cpu family|model|flags|Features|CPU \w+)\s*:.*$", first, re.M)
    )


def _openmp_runtime() -> Path | None:
    """The OpenMP library in this process (torch's own), or None where it cannot be told."""
    torch.get_num_threads()
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"/\S.*/lib(?:g|i)omp[^/\n]*\.so[^/\n]*$", maps, re.M)
    return Path(found[0]) if found else None
