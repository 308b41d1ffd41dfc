"""`python -m bench.gpu` in Triton's interpreter, on small shapes and with a stopped clock: every kernel obeys its bound, and one that
is wrong fails the run after everything is printed and written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu
from finback.ops.triton import attention, fp8, grouped, norm
from finback.presets import PRESETS, tiny

SMALL = gpu.Sizes(
    tokens=48,
    width=256,
    gemms=((48, 192, 256),),
    deepgemm_tflops=(1,),
    groups=(2, 32, 128, 256),
    gate=(16, 2, 4, 2),
    decodes=((16, 2, 128),),
    latent=(128, 16),
    heads=2,
    prefill_tokens=70,
    experts_rows=(40, 256),
    logits=(6, 500),
    training=("tiny", 1, 16),
)
MODEL = replace(
    tiny().model,
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)
CEILINGS = {"copy_gb_per_second": 1000.0, "bf16_tflops": 100.0}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here instead of on a GPU."""

    def once(function: Callable[[], Any]) -> float:
        function()
        return 1.0

    monkeypatch.setitem(PRESETS, "tiny", lambda: replace(tiny(), model=MODEL))
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SIZES", SMALL)
    monkeypatch.setattr(gpu, "milliseconds", once)
    monkeypatch.setattr(gpu, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def only(monkeypatch: pytest.MonkeyPatch, *kinds: Any) -> None:
    monkeypatch.setattr(gpu, "KINDS", kinds)


def test_every_kernel_is_checked_and_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "er" / "gpu.json"
    assert gpu.main(["--out", str(out)]) == 0, capsys.readouterr().err
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert all(row["right"] and row["error"] <= row["bound"] <= 2.5e-3 for row in rows.values())
    wanted = """quantize_1x128 quantize_128x128 quantize_over_rows fp8_gemm grouped masked gate permutation unpermute decode FP8 prefill
    RMSNorm rotary backward SwiGLU softmax bf16 fp8"""
    assert all(any(word in name for name in rows) for word in wanted.split())
    for name in (
        "RMSNorm, backward",
        "MLA prefill, 2 heads, 70, backward",
        "rotary, backward",
        "SwiGLU, backward",
        "SwiGLU to FP8",
    ):
        assert name in rows
    assert rows["MLA decode, 16 heads, 2 x 128"]["target_share"] == 0.8
    assert rows["MLA decode, 16 heads, 2 x 128"]["error"] != rows["MLA decode, 16 heads, 2 x 128, FP8 cache"]["error"]
    assert rows["training step of tiny, bf16, 1 x 16"]["share"] > 0
    (refused,) = result["unmeasured"]  # a CPU has no product with block scales
    assert refused["name"] == "torch, block scales, 48 x 192 x 256"
    assert "refuses it" in refused["reason"]
    assert not refused["fault"]
    assert f"{refused['name']:<44} unmeasured" in capsys.readouterr().out


def shifted(function: Callable[..., Any], place: int | None = None, factor: float = 1.01) -> Callable[..., Any]:
    """The same with a hundredth more in one row of a result."""

    def changed(*arguments: Any, **more: Any) -> Any:
        result = function(*arguments, **more)
        chosen: Tensor = result if place is None else result[place]
        with torch.no_grad():
            chosen.view(-1, chosen.shape[-1])[-1] *= factor
            chosen.view(-1, chosen.shape[-1])[-1, 0] += 1
        return result

    return changed


@pytest.mark.parametrize(
    ("module", "name", "place", "kind", "row"),
    [
        (fp8, "quantize_1x128", 1, gpu.time_fp8_casts, "quantize_1x128"),
        (attention, "latent_decode_fp8", None, gpu.time_mla_decode, "MLA decode, 16 heads, 2 x 128, FP8 cache"),
        (norm, "normalise_backward", 0, gpu.time_norm_and_rotary, "RMSNorm, backward"),
        (grouped, "permute", None, gpu.time_gate_and_permutation, "gate and permutation"),
    ],
)
def test_a_wrong_kernel_fails_the_run_and_the_rest_is_written(
    module: Any, name: str, place: int | None, kind: Any, row: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(module, name, shifted(getattr(module, name), place))
    only(monkeypatch, kind)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"off: {row}: error ")
    assert "OFF, at most" in printed.out
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [one["name"] for one in rows if not one["right"]] == [row]
    assert len(rows) > 1


def test_a_kernel_that_breaks_fails_the_run_and_the_next_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("an illegal access\nand more")

    monkeypatch.setattr(fp8, "quantize_1x128", broken)
    only(monkeypatch, gpu.time_fp8_casts, gpu.time_mla_prefill)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 1
    assert "off: fp8 casts: RuntimeError: an illegal access\n" in capsys.readouterr().err
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["MLA prefill, 2 heads, 70", "MLA prefill, 2 heads, 70, backward"]
    assert result["unmeasured"][0]["fault"]


def test_a_peer_that_computes_something_else_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "block_scaled", lambda a, *_: a.float())
    wanted = torch.ones(2, 3).to(torch.float8_e4m3fn)
    assert gpu.block_scaled_peer((wanted,), wanted.float()) == gpu.Peer("torch, block scales", 1.0, 0.8)
    told = gpu.block_scaled_peer((wanted,), torch.full((2, 3), 2.0))
    assert isinstance(told, str)
    assert "computes something else" in told
