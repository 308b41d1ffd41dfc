"""What the machine tells of its memory, and memory in large pages."""

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finback.ops.memory import LargePages, available_memory, host_memory, zeros_in_large_pages

ROLLUP = Path("/proc/self/smaps_rollup")
LINUX = pytest.mark.skipif(not ROLLUP.exists(), reason="only Linux tells what a process has taken")


def taken(kind: str) -> int:
    """Bytes of this process' memory of one kind, as Linux names it."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", ROLLUP.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def test_this_machine_tells_its_memory() -> None:
    total, available = host_memory()
    if total is not None and available is not None:
        assert 2**20 < available <= total < 2**50
    now = available_memory(torch.device("cpu"))
    assert now is None or 2**20 < now < 2**50


def test_no_torch_is_loaded_to_look_at_the_host() -> None:
    code = "import sys, finback.ops.memory as m; m.host_memory(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_large_pages_hold_zeros_to_write_over(dtype: torch.dtype) -> None:
    tensor = zeros_in_large_pages((3, 5, 7), dtype)
    assert tensor.shape == (3, 5, 7)
    assert tensor.dtype == dtype
    assert not tensor.any()
    tensor.fill_(3)
    gc.collect()  # the tensor alone keeps its memory
    assert (tensor == 3).all()
    assert zeros_in_large_pages((0, 4), dtype).shape == (0, 4)


@LINUX
def test_memory_is_taken_where_it_is_written() -> None:
    before = taken("Rss")
    tensor = zeros_in_large_pages((2**28,), torch.uint8)
    assert taken("Rss") - before < 2**24
    tensor[2**26 : 2**27] = 1
    assert 2**26 - 2**22 < taken("Rss") - before < 2**26 + 2**24


@LINUX
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no large pages")
def test_large_pages_are_asked_for() -> None:
    """Whether it gives them is the system's affair, and depends on what is free."""
    pages = LargePages()
    tensors = [pages.zeros((2**20,), torch.uint8) for _ in range(4)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    flags = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            holds = int(found[1], 16) <= tensors[0].data_ptr() < int(found[2], 16)
        elif holds and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    assert flags is not None
    assert "hg" in flags


def test_places_lie_behind_each_other_and_apart() -> None:
    pages = LargePages()
    shapes = [((3, 5), torch.float32), ((), torch.int64), ((7,), torch.uint8), ((0,), torch.float32), ((2, 2), torch.bfloat16)]
    tensors = [pages.zeros(shape, dtype) for shape, dtype in shapes]
    copied = pages.copy(torch.arange(6).view(2, 3))
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == number).all()
    assert copied.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_what_does_not_fit_gets_a_piece_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finback.ops.memory._PIECE", 256)
    pages = LargePages()
    tensors = [pages.zeros((size,), torch.uint8).fill_(size % 251) for size in (100, 200, 1000, 50)]
    assert [int(tensor[-1]) for tensor in tensors] == [100, 200, 1000 % 251, 50]
    assert [len(tensor) for tensor in tensors] == [100, 200, 1000, 50]
