"""`python -m bench.gpu`: what it compares by, and that without a GPU it says what it could not measure, and estimates nothing.

tests/ops/triton runs all of it in Triton's interpreter."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import EXACT, ROUNDING, Row, Unmeasured, describe, difference, faults, furthest, main, unequal

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: python -m bench.gpu measures")
def test_every_kernel_is_listed_as_unmeasured(tmp_path: Path) -> None:
    out = tmp_path / "new" / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("no GPU here")
    assert len(lines) == 10
    assert all(line.endswith("unmeasured") for line in lines[1:])
    assert "training step" in lines[-1]
    assert not out.parent.exists()


def test_a_directory_is_no_file_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "is a directory; give a file" in capsys.readouterr().err


def test_the_difference_is_that_of_the_worst_row() -> None:
    torch.manual_seed(0)
    right = torch.randn(1000, 64)
    assert difference(right, right) == pytest.approx(0, abs=1e-12)
    assert difference(right.bfloat16(), right) < ROUNDING
    assert difference(2 * right, right) == pytest.approx(0.2)
    wrong = right.clone()
    wrong[7, 3] += 1
    assert difference(wrong, right) > 100 * ROUNDING
    assert difference(right[:5], right) == math.inf
    assert difference(torch.zeros(3, 4), torch.zeros(3, 4)) == 0
    wrong[7, 3] = math.nan
    assert math.isnan(difference(wrong, right))
    assert difference(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


def test_bytes_differ_or_do_not() -> None:
    codes = torch.arange(4, dtype=torch.float32)
    assert unequal(codes, codes.clone()) == 0
    assert unequal(codes, torch.nextafter(codes, codes + 1)) > 0
    assert unequal(codes, codes.double()) == 1
    assert unequal(codes.to(torch.float8_e4m3fn), torch.zeros(4).to(torch.float8_e4m3fn)) == 0.75


def test_the_worst_check_counts_by_its_own_bound() -> None:
    assert furthest((2e-6, 1e-5), (1e-4, 1e-3)) == (2e-6, 1e-5)
    assert furthest((1e-6, 1e-5), (5e-4, 1e-3)) == (5e-4, 1e-3)
    assert furthest((0.0, EXACT), (1e-9, 1e-5)) == (1e-9, 1e-5)
    assert furthest((1e-9, EXACT), (1.0, 1e-5)) == (1e-9, EXACT)
    assert math.isnan(furthest((1.0, 1e-5), (math.nan, 1e-5))[0])


def test_what_is_off_fails_and_what_is_missing_does_not() -> None:
    def row(error: float) -> Row:
        return Row("kernel", 1.0, None, 1.0, 0.5, error, 1e-5, target_share=0.8)

    assert faults([row(0.0), row(1e-5), Unmeasured("peer", "torch refuses it")]) == []
    assert faults([row(2e-5)]) == ["kernel: error 2.0e-05, at most 1.0e-05"]
    assert faults([row(math.nan)]) == ["kernel: error nan, at most 1.0e-05"]
    assert faults([Unmeasured("casts", "RuntimeError: no", fault=True)]) == ["casts: RuntimeError: no"]
    assert "50.0% (target 80%)" in describe(row(0.0))
    assert "OFF" in describe(row(1.0))
