"""`finback doctor`: hardware, versions, what will run here and what will not, in plain words.

It is the command for a machine where something is missing, so it needs no torch, no GPU and no network, and reports a
broken torch as a row of its table.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

import finback
from finback.commands.machine import read_code_sandbox, read_hardware, read_packages, read_tools, read_torch
from finback.commands.parse import parse_arguments
from finback.config import count_params
from finback.presets import PRESETS

OLDEST_TORCH = (2, 11)
GB = 1e9
WORTHWHILE_RATIO = 1.3  # bf16 is advised where its matrix products are this much faster than fp32
QUICKSTART_MEMORY_BYTES = 4 * GB
QUICKSTART_DISK_BYTES = 2 * GB
TRAINING_SHARE = 0.3  # of the measured matrix rate, that training reaches: a rough figure for rough times
DAY_SECONDS = 86400.0
LEAST_GFLOP_PER_SECOND = 20.0  # below this the quickstart's time budget buys too few steps to be worth reading


@dataclass(frozen=True)
class Doctor:
    """Options of `finback doctor`."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of tables; units are in the field names."""


@dataclass(frozen=True)
class Ability:
    """One thing finback can do: whether it will run here ("yes", "slow" or "no"), and why in plain words."""

    name: str
    runs: str
    why: str


def main(argv: list[str]) -> int:
    """Print the report; the exit code is 0 whenever a report could be made, however bad the news."""
    options = parse_arguments(
        Doctor, argv, verb="doctor", description="Hardware, versions, what will run here and what will not."
    )
    report = examine(Path.cwd())
    if options.json:
        print(json.dumps(report, indent=2))
    elif sys.stdout.isatty():
        _print_tables(report)
    else:
        print("\n".join(_plain_lines(report)))
    return 0


def examine(disk_path: Path) -> dict[str, Any]:
    """The whole report as plain data; runs would be written under `disk_path`."""
    report: dict[str, Any] = {
        "finback": finback.__version__,
        "python": {"version": sys.version.split()[0], "executable": sys.executable},
        "hardware": read_hardware(disk_path),
        "torch": read_torch(),
        "packages": read_packages(),
        "tools": read_tools(),
        "code_sandbox": read_code_sandbox(),
    }
    report["advice"] = {"precision": advised_precision(report["torch"])}
    report["presets"] = dict.fromkeys(PRESETS) if _obstacle(report) else preset_needs()
    report["abilities"] = [vars(ability) for ability in abilities(report)]
    report["warnings"] = warnings(report)
    return report


def preset_needs() -> dict[str, dict[str, Any]]:
    """What training each preset takes on one device: peak memory, and about 6 FLOP per active parameter and token."""
    from finback.train.memory import estimate_memory

    needs = {}
    for name, preset in PRESETS.items():
        run = preset()
        tokens = run.tokens or (run.steps or 0) * run.global_batch_size * run.sequence_length
        needs[name] = {
            "memory_bytes": estimate_memory(run).on_device,
            "training_flop": 6.0 * count_params(run.model).active * tokens,
            "precision": run.precision,
        }
    return needs


def advised_precision(torch: dict[str, Any]) -> str | None:
    """The `--precision` to train with here, from the measured matrix products; None without a working torch."""
    if torch["error"] is not None:
        return None
    rates = torch["matmul"]
    return "bf16" if rates["bf16_gflop_per_second"] >= WORTHWHILE_RATIO * rates["fp32_gflop_per_second"] else "fp32"


def abilities(report: dict[str, Any]) -> list[Ability]:
    """What will run on the machine of `report` and what will not, each with its reason."""
    judges: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
        "quickstart": _judge_quickstart,
        **{f"pretrain {name}": partial(_judge_preset, needs=needs) for name, needs in report["presets"].items()},
        "precision fp32": _judge_fp32,
        "precision bf16": _judge_bf16,
        "GPU": _judge_gpu,
        "several processes": _judge_processes,
        "torch.compile": _judge_compile,
        "Triton kernels": _judge_triton,
        "code rewards": _judge_code_rewards,
    }
    obstacle = _obstacle(report)
    return [Ability(name, *(("no", obstacle) if obstacle else judge(report))) for name, judge in judges.items()]


def _judge_quickstart(report: dict[str, Any]) -> tuple[str, str]:
    shortage = _shortage(report["hardware"], QUICKSTART_MEMORY_BYTES, QUICKSTART_DISK_BYTES)
    if shortage:
        return "no", shortage
    rates = report["torch"]["matmul"]
    rate = max(rates["fp32_gflop_per_second"], rates["bf16_gflop_per_second"])
    device = "a GPU" if report["torch"]["gpus"] else f"{report['hardware']['cores']} cores"
    return "yes" if rate >= LEAST_GFLOP_PER_SECOND else "slow", f"{rate:,.0f} GFLOP/s measured on {device}"


def _judge_preset(report: dict[str, Any], needs: dict[str, Any]) -> tuple[str, str]:
    needed = needs["memory_bytes"]
    gpu = next((gpu for gpu in report["torch"]["gpus"] if gpu["memory_free_bytes"] >= needed), None)
    shortage = _shortage(report["hardware"], needed, QUICKSTART_DISK_BYTES)
    if gpu is None and report["torch"]["gpus"]:
        return "no", f"needs {_gigabytes(needed)} on one GPU, and no GPU here has that much free"
    if gpu is None and shortage:
        return "no", shortage
    rate = report["torch"]["matmul"][f"{'fp32' if needs['precision'] == 'fp32' else 'bf16'}_gflop_per_second"]
    seconds = needs["training_flop"] / (TRAINING_SHARE * rate * 1e9)
    device = gpu["name"] if gpu else "the CPU"
    return ("yes" if seconds < DAY_SECONDS else "slow"), f"{_gigabytes(needed)} on {device}, {_duration(seconds)}"


def _judge_fp32(report: dict[str, Any]) -> tuple[str, str]:
    return "yes", "works everywhere"


def _judge_bf16(report: dict[str, Any]) -> tuple[str, str]:
    rates = report["torch"]["matmul"]
    ratio = rates["bf16_gflop_per_second"] / rates["fp32_gflop_per_second"]
    state = "yes" if report["advice"]["precision"] == "bf16" else "slow"
    return state, f"matrix products run {ratio:.1f} times as fast as in fp32"


def _judge_gpu(report: dict[str, Any]) -> tuple[str, str]:
    names = [gpu["name"] for gpu in report["torch"]["gpus"]]
    return ("yes", ", ".join(names)) if names else ("no", "torch sees none; everything above runs on the CPU")


def _judge_processes(report: dict[str, Any]) -> tuple[str, str]:
    backends = [name for name in ("gloo", "nccl") if report["torch"][name]]
    if not backends:
        return "no", "this build of torch has neither gloo nor nccl"
    if not report["tools"]["torchrun"]:
        return "no", "torchrun is not beside this Python nor on the path"
    return "yes", f"torchrun with {' and '.join(backends)}"


def _judge_compile(report: dict[str, Any]) -> tuple[str, str]:
    compiler = report["tools"]["cxx_compiler"]
    if compiler and report["tools"]["python_headers"]:
        return "yes", f"with {compiler}"
    return "no", "needs a C++ compiler and Python's headers"


def _judge_triton(report: dict[str, Any]) -> tuple[str, str]:
    version = report["tools"]["triton"]
    if not version:
        return "no", "triton is not installed; the PyTorch operations do the same work"
    return ("yes", f"triton {version}") if report["torch"]["gpus"] else ("no", f"triton {version}, but no GPU")


def _judge_code_rewards(report: dict[str, Any]) -> tuple[str, str]:
    found = report["code_sandbox"]
    if found["obstacle"] is not None:
        return "no", f"refused without a sandbox, and {found['obstacle']}"
    return "yes", f"in {found['bubblewrap']}, for {', '.join(found['languages'])}"


def warnings(report: dict[str, Any]) -> list[str]:
    """What deserves a second look, one sentence each, with the remedy."""
    torch, hardware, tools, packages = report["torch"], report["hardware"], report["tools"], report["packages"]
    missing = [row["name"] for row in packages if row["version"] is None and row["group"] == "core"]
    extras = sorted({row["group"] for row in packages if row["version"] is None} - {"core"})
    load = hardware["load_average_1_minute"]
    avx2 = (hardware["cpu_flags"] or {}).get("avx2", True)
    found = []
    if torch["error"] is not None:
        found.append(f"torch is {torch['error']}; `make install` installs the version that finback is tested with")
    else:
        found.extend(_torch_warnings(torch, hardware, tools))
    if missing:
        found.append(f"core packages are missing: {', '.join(missing)}; `make install` brings them")
    if extras:
        found.append(f"optional packages are missing (extras {', '.join(extras)}); `make install` brings them all")
    if not packages:
        found.append("finback is not installed, so its packages were not checked; use `make install`")
    if load is not None and load > hardware["cores"] / 2:
        found.append(f"the machine is busy (load {load}); training will be slower, and measured rates above are low")
    if not avx2:
        found.append("the CPU has no AVX2: everything works, several times slower")
    if not (tools["cxx_compiler"] and tools["python_headers"]):
        found.append("no C++ compiler or no Python headers (Debian: g++, python3-dev), so torch.compile will not work")
    return found


def _torch_warnings(torch: dict[str, Any], hardware: dict[str, Any], tools: dict[str, Any]) -> Iterator[str]:
    if _release(torch["version"]) < OLDEST_TORCH:
        oldest = _dotted(OLDEST_TORCH)
        yield f"torch {torch['version']} is older than {oldest}, the oldest supported; `make install` renews it"
    for message in torch["warnings"]:
        yield f"torch says: {' '.join(message.split())}"
    if tools["nvidia_smi"] and not torch["gpus"]:
        yield f"an NVIDIA driver is here, but torch ({torch['build']} build) sees no GPU; install a CUDA build"
    if torch["threads"] < hardware["cores"]:
        yield f"torch uses {torch['threads']} of {hardware['cores']} cores; is OMP_NUM_THREADS set?"


def _obstacle(report: dict[str, Any]) -> str | None:
    """Why nothing that computes can run, or None."""
    torch = report["torch"]
    if torch["error"] is not None:
        return f"torch is {torch['error']}"
    if _release(torch["version"]) < OLDEST_TORCH:
        return f"torch {torch['version']} is too old, {_dotted(OLDEST_TORCH)} is the oldest supported"
    missing = [row["name"] for row in report["packages"] if row["group"] == "core" and row["version"] is None]
    return f"missing: {', '.join(missing)}" if missing else None


def _shortage(hardware: dict[str, Any], memory_bytes: float, disk_bytes: float) -> str | None:
    memory = hardware["memory_available_bytes"] or hardware["memory_total_bytes"]
    if memory is not None and memory < memory_bytes:
        return f"needs {_gigabytes(memory_bytes)} of free memory, here {_gigabytes(memory)}"
    if hardware["disk_free_bytes"] < disk_bytes:
        return f"needs {_gigabytes(disk_bytes)} of free disk, here {_gigabytes(hardware['disk_free_bytes'])}"
    return None


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _gigabytes(size_bytes: float | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / GB:,.1f} GB"


def _duration(seconds: float) -> str:
    for size, unit in ((365 * DAY_SECONDS, "years"), (DAY_SECONDS, "days"), (3600.0, "hours")):
        if seconds >= size:
            return f"roughly {seconds / size:,.1f} {unit}"
    return f"roughly {max(1, round(seconds / 60))} minutes"


def _sections(report: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """The report for reading: titles, and rows of (name, state, words), where the state may be empty."""
    hardware, torch, tools = report["hardware"], report["torch"], report["tools"]
    flags = hardware["cpu_flags"]
    extensions = (
        "unknown" if flags is None else ", ".join(name for name, there in flags.items() if there) or "none of those that matter"
    )
    rows = [
        ("system", "", f"{hardware['system']}, {hardware['architecture']}"),
        ("processor", "", f"{hardware['cpu']}, {hardware['cores']} cores"),
        ("extensions", "", extensions),
        (
            "memory",
            "",
            f"{_gigabytes(hardware['memory_available_bytes'])} free of {_gigabytes(hardware['memory_total_bytes'])}",
        ),
        ("disk", "", f"{_gigabytes(hardware['disk_free_bytes'])} free in {hardware['disk_path']}"),
    ]
    for gpu in torch.get("gpus", []):
        words = f"{gpu['name']}, {_gigabytes(gpu['memory_free_bytes'])} free of {_gigabytes(gpu['memory_total_bytes'])}"
        rows.append(("GPU", "", f"{words}, compute capability {gpu['compute_capability']}"))
    yield "Machine", rows

    rows = [
        ("finback", "", report["finback"]),
        ("python", "", f"{report['python']['version']} ({report['python']['executable']})"),
    ]
    if torch["error"] is None:
        fp32, bf16 = torch["matmul"]["fp32_gflop_per_second"], torch["matmul"]["bf16_gflop_per_second"]
        device = "GPU" if torch["gpus"] else "CPU"
        rows += [
            ("torch", "yes", f"{torch['version']}, {torch['build']} build, {torch['threads']} threads"),
            ("matrix products", "", f"{fp32:,.0f} GFLOP/s in fp32, {bf16:,.0f} in bf16 ({device})"),
            ("precision", "", f"{report['advice']['precision']} is the one to use here"),
        ]
    else:
        rows.append(("torch", "no", torch["error"]))
    for package in report["packages"]:
        if package["name"] != "torch":
            brings = "core" if package["group"] == "core" else f"extra {package['group']}"
            rows.append(
                (
                    package["name"],
                    "yes" if package["version"] else "no",
                    f"{package['version'] or 'not installed'} ({brings})",
                )
            )
    yield "Versions", rows

    yield (
        "Tools",
        [
            (
                name.replace("_", " "),
                "yes" if tools[name] else "no",
                tools[name] if isinstance(tools[name], str) else "",
            )
            for name in ("cxx_compiler", "python_headers", "torchrun", "triton", "pip", "npm", "apt_get")
        ],
    )
    yield "What will run", [(ability["name"], ability["runs"], ability["why"]) for ability in report["abilities"]]


def _plain_lines(report: dict[str, Any]) -> Iterator[str]:
    for title, rows in _sections(report):
        yield title
        for name, state, words in rows:
            yield f"  {name:<20} {state:<5} {words}".rstrip()
        yield ""
    yield "Warnings"
    yield from (f"  {sentence}" for sentence in report["warnings"] or ["none"])


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colour = {"yes": "green", "slow": "yellow", "no": "red", "": ""}
    console = Console()
    for title, rows in _sections(report):
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        for name, state, words in rows:
            table.add_row(name, Text(state, style=colour[state]), Text(words))
        console.print(table)
    for sentence in report["warnings"]:
        console.print(Text(f"warning: {sentence}", style="yellow"))
