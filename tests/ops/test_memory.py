"""What the machine tells of its memory."""

import subprocess
import sys

import torch

from finback.ops.memory import available_memory, host_memory


def test_this_machine_tells_its_memory() -> None:
    total, available = host_memory()
    if total is not None and available is not None:
        assert 2**20 < available <= total < 2**50
    now = available_memory(torch.device("cpu"))
    assert now is None or 2**20 < now < 2**50


def test_no_torch_is_loaded_to_look_at_the_host() -> None:
    code = "import sys, finback.ops.memory as m; m.host_memory(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
