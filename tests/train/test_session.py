"""What surrounds the loop and is not a matter of its own results: memory that is kept, kernels that are named."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finback.ops.native import build
from finback.train import session
from finback.train.loop import machine_changes
from tests.train.runs import ROOT

CPU = torch.device("cpu")

RESIDENT = """
import sys, torch
from pathlib import Path
from finback.train.session import keep_freed_memory
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = torch.ones(100)
del before
start = resident()
block = torch.ones(1 << 22)
del block
print(resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell what is resident")
def test_freed_memory_is_kept_when_asked_for() -> None:
    """16 MiB that were written and freed: still there, or gone."""

    def left(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", RESIDENT, how], cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert left("kept") > 15 << 20
    assert left("given back") < 1 << 20


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not session.keep_freed_memory()


def test_a_run_that_goes_on_with_other_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their last bits differ; a run from before there were kernels ran on torch."""
    machine = {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    monkeypatch.setattr(session, "training_kernels", lambda: None)
    assert machine_changes(machine, CPU) == machine_changes(machine | {"kernels": "torch"}, CPU) == []
    (sentence,) = machine_changes(machine | {"kernels": "C"}, CPU)
    assert sentence.startswith("kernels is torch and was C")
    if build.training_kernels() is not None:
        monkeypatch.undo()
        assert session.kernels_name(CPU) == "C"
        assert machine_changes(machine, CPU)[0].startswith("kernels is C and was torch")
    assert session.kernels_name(torch.device("cuda")) == "torch"
