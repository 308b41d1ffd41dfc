"""Without a GPU, `python -m bench.gpu` says what it could not measure, and estimates nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: python -m bench.gpu measures")
def test_every_kernel_is_listed_as_unmeasured(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("no GPU here")
    assert len(lines) == 8
    assert all(line.endswith("unmeasured") for line in lines[1:])
    assert not out.exists()
