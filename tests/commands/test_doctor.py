"""`finback doctor` on machines that have everything, little, or a broken torch."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finback.commands import doctor, machine
from finback.config import count_params
from finback.presets import PRESETS
from finback.train.memory import estimate_memory

ROOT = Path(__file__).parents[2]
GIB = 2**30


def run_doctor(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run doctor in a new interpreter that finds the modules under `path` first."""
    return subprocess.run(
        [sys.executable, "-m", "finback", "doctor", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path or "")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def report_here() -> dict[str, Any]:
    done = run_doctor("--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make_report(**changes: Any) -> dict[str, Any]:
    """The facts of a good two-core machine, with `changes` to its parts."""
    parts: dict[str, dict[str, Any]] = {
        "hardware": {
            "cores": 2, "load_average_1_minute": 0.1, "cpu_flags": {"avx2": True, "avx512": False},
            "memory_total_bytes": 16 * GIB, "memory_available_bytes": 12 * GIB, "disk_free_bytes": 50 * GIB,
        },
        "torch": {
            "error": None, "version": "2.13.0+cpu", "build": "cpu", "threads": 2, "gloo": True, "nccl": False,
            "gpus": [],
            "matmul": {"device": "cpu", "fp32_gflop_per_second": 100.0, "bf16_gflop_per_second": 300.0}, "warnings": [],
        },
        "tools": {
            "cxx_compiler": "/usr/bin/g++", "python_headers": True, "torchrun": "/x/torchrun", "nvidia_smi": None,
            "triton": None,
        },
        "presets": {
            "tiny": {"memory_bytes": GIB // 2, "training_flop": 7e13, "precision": "bf16"},
            "small": {"memory_bytes": 11 * GIB, "training_flop": 6e17, "precision": "bf16"},
            "v3-671b": {"memory_bytes": 9600 * GIB, "training_flop": 3e24, "precision": "fp8"},
        },
    }  # fmt: skip
    parts["code_sandbox"] = {"bubblewrap": "/usr/bin/bwrap", "obstacle": None, "languages": ["python", "c"]}
    for part, values in changes.items():
        parts[part] |= values
    report = {**parts, "packages": [{"name": "torch", "group": "core", "version": "2.13.0"}]}
    report["advice"] = {"precision": doctor.advised_precision(report["torch"])}
    return report


def runs(report: dict[str, Any]) -> dict[str, str]:
    return {ability.name: ability.runs for ability in doctor.abilities(report)}


SLOW = {"device": "cpu", "fp32_gflop_per_second": 3.0, "bf16_gflop_per_second": 1.0}
GPU = {
    "name": "H200",
    "memory_total_bytes": 140 * GIB,
    "memory_free_bytes": 139 * GIB,
    "compute_capability": "9.0",
    "bf16": True,
}


def test_json_has_units_in_its_names(report_here: dict[str, Any]):
    assert report_here["hardware"]["cores"] >= 1
    assert report_here["hardware"]["memory_total_bytes"] > 2**28
    assert report_here["hardware"]["disk_free_bytes"] >= 0
    assert report_here["torch"]["error"] is None
    assert report_here["torch"]["matmul"]["fp32_gflop_per_second"] > 0
    assert report_here["torch"]["matmul"]["bf16_gflop_per_second"] > 0
    assert report_here["advice"]["precision"] in ("fp32", "bf16")


def test_every_dependency_is_listed_with_its_group(report_here: dict[str, Any]):
    groups = {row["name"]: row["group"] for row in report_here["packages"]}
    assert groups["torch"] == groups["tyro"] == "core"
    assert groups["matplotlib"] == "report"
    assert groups["hypothesis"] == "test"
    versions = {row["name"]: row["version"] for row in report_here["packages"]}
    assert versions["torch"] == report_here["torch"]["version"]


def test_plain_text_where_there_is_no_terminal():
    done = run_doctor()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "Machine",
        "Versions",
        "Tools",
        "What will run",
        "Warnings",
    ]
    assert "\x1b" not in done.stdout
    assert any(line.split()[:2] == ["quickstart", "yes"] or line.split()[0:1] == ["quickstart"] for line in lines)


def test_tables_on_a_terminal():
    """The report goes to a pseudo-terminal: it has table borders and colours, and every section."""
    reading, writing = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "finback", "doctor"],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color"},
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)
    printed = b""
    while chunk := read_terminal(reading):
        printed += chunk
    os.close(reading)
    text = printed.decode()
    assert process.wait() == 0, text
    assert "│" in text
    assert "\x1b[" in text
    assert all(title in text for title in ("Machine", "Versions", "Tools", "What will run"))


def read_terminal(reading: int) -> bytes:
    try:
        return os.read(reading, 65536)
    except OSError:  # how Linux says that the other side is closed
        return b""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "raise ImportError('libcudart.so.13: cannot open shared object file')",
            "does not work: ImportError: libcudart.so.13",
        ),
        ("raise RuntimeError('numpy is too new')", "does not work: RuntimeError: numpy is too new"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "crashed with signal 4"),
    ],
)
def test_a_broken_torch_is_a_row(tmp_path: Path, source: str, words: str):
    (tmp_path / "torch.py").write_text(source, encoding="utf-8")
    done = run_doctor("--json", path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert words in report["torch"]["error"]
    assert report["advice"]["precision"] is None
    assert any(words in sentence for sentence in report["warnings"])
    done = run_doctor(path=tmp_path)
    assert done.returncode == 0
    assert words in done.stdout


def test_a_good_laptop_runs_the_quickstart():
    report = make_report()
    states = runs(report)
    assert states["quickstart"] == states["pretrain tiny"] == states["precision bf16"] == states["torch.compile"] == "yes"
    assert states["pretrain small"] == "slow"
    assert states["pretrain v3-671b"] == states["GPU"] == states["Triton kernels"] == "no"
    words = {ability.name: ability.why for ability in doctor.abilities(report)}
    assert words["pretrain tiny"] == "0.5 GB on the CPU, roughly 13 minutes"
    assert words["pretrain small"] == "11.8 GB on the CPU, roughly 77.2 days"
    assert report["advice"]["precision"] == "bf16"
    assert doctor.warnings(report) == []


def test_a_gpu_runs_the_small_preset():
    rates = {"device": "cuda", "fp32_gflop_per_second": 5e4, "bf16_gflop_per_second": 6e5}
    torch = {"gpus": [GPU], "build": "cuda 13.0", "nccl": True, "matmul": rates}
    report = make_report(torch=torch, tools={"triton": "3.7.1", "nvidia_smi": "/usr/bin/nvidia-smi"})
    states = runs(report)
    assert states["GPU"] == states["pretrain small"] == states["Triton kernels"] == "yes"
    assert states["pretrain v3-671b"] == "no"
    assert doctor.warnings(report) == []
    words = {ability.name: ability.why for ability in doctor.abilities(report)}
    assert words["pretrain small"] == "11.8 GB on H200, roughly 56 minutes"
    assert words["pretrain v3-671b"] == "needs 10,307.9 GB on one GPU, and no GPU here has that much free"


def test_presets_are_priced_by_the_formulas_of_training(report_here: dict[str, Any]):
    config = PRESETS["tiny"]()
    needs = report_here["presets"]["tiny"]
    assert needs["memory_bytes"] == estimate_memory(config).on_device
    assert needs["training_flop"] > 6 * count_params(config.model).active * config.sequence_length
    assert report_here["presets"].keys() == PRESETS.keys()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "roughly 1 minutes"), (840, "roughly 14 minutes"), (7200, "roughly 2.0 hours"), (3e5, "roughly 3.5 days"),
     (1e11, "roughly 3,171.0 years")],
)  # fmt: skip
def test_durations_read_well(seconds: float, words: str):
    assert doctor._duration(seconds) == words


def test_bf16_that_gains_nothing_is_not_advised():
    report = make_report(torch={"matmul": {"fp32_gflop_per_second": 50.0, "bf16_gflop_per_second": 40.0}})
    assert report["advice"]["precision"] == "fp32"
    assert runs(report)["precision bf16"] == "slow"


@pytest.mark.parametrize(
    ("changes", "name", "state", "words"),
    [
        ({"hardware": {"memory_available_bytes": GIB}}, "quickstart", "no", "needs 4.0 GB of free memory, here 1.1 GB"),
        ({"hardware": {"disk_free_bytes": GIB}}, "pretrain tiny", "no", "needs 2.0 GB of free disk, here 1.1 GB"),
        ({"torch": {"version": "2.4.1"}}, "quickstart", "no", "torch 2.4.1 is too old, 2.11 is the oldest supported"),
        ({"torch": {"error": "not installed"}}, "GPU", "no", "torch is not installed"),
        ({"torch": {"matmul": SLOW}}, "quickstart", "slow", "3 GFLOP/s"),
        ({"tools": {"cxx_compiler": None}}, "torch.compile", "no", "needs a C++ compiler"),
        ({"tools": {"torchrun": None}}, "several processes", "no", "torchrun"),
        ({}, "code rewards", "yes", "in /usr/bin/bwrap, for python, c"),
        ({"code_sandbox": {"obstacle": "it is too old"}}, "code rewards", "no", "refused without a sandbox, and it is too old"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(changes: dict[str, Any], name: str, state: str, words: str):
    found = {ability.name: ability for ability in doctor.abilities(make_report(**changes))}
    assert found[name].runs == state
    assert words in found[name].why


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"torch": {"error": "not installed"}}, "torch is not installed"),
        ({"torch": {"version": "2.10.0"}}, "older than 2.11"),
        ({"torch": {"warnings": ["a\n b"]}}, "torch says: a b"),
        ({"torch": {"threads": 1}}, "torch uses 1 of 2 cores"),
        ({"tools": {"nvidia_smi": "/usr/bin/nvidia-smi"}}, "sees no GPU"),
        ({"hardware": {"load_average_1_minute": 3.5}}, "the machine is busy (load 3.5)"),
        ({"hardware": {"cpu_flags": {"avx2": False}}}, "no AVX2"),
        ({"tools": {"python_headers": False}}, "Python headers"),
    ],
)
def test_what_deserves_a_look_is_a_warning(changes: dict[str, Any], words: str):
    found = doctor.warnings(make_report(**changes))
    assert len(found) == 1
    assert words in found[0]


def test_flags_of_each_kind_of_cpu():
    assert machine.cpu_flags("flags\t\t: fpu avx2 avx512f\n") == {
        "avx2": True, "avx512": True, "avx512_bf16": False, "amx_bf16": False,
    }  # fmt: skip
    assert machine.cpu_flags("Features\t: fp asimd bf16\n") == {"neon": True, "arm_bf16": True, "arm_sve": False}
    assert machine.cpu_flags("") is None


@pytest.mark.parametrize(
    ("version", "release"), [("2.13.0+cpu", (2, 13)), ("2.11.0a0+git1", (2, 11)), ("2.9", (2, 9)), ("3.0rc1", (3, 0))]
)
def test_releases_are_compared_as_numbers(version: str, release: tuple[int, int]):
    assert doctor._release(version) == release


def test_an_unknown_option_names_the_nearest():
    done = run_doctor("--jsno")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "finback doctor: unknown field --jsno; the nearest is --json; see finback doctor --help\n"
