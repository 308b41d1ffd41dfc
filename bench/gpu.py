"""`python -m bench.gpu`: every Triton kernel checked and timed in one call, on the shapes of DeepSeek's own tables.

Needs a GPU, torch, triton and numpy, nothing else; `finback.ops` is all of finback that it imports. Each row says what was moved or
multiplied, how long it took, its share of what a plain copy and a cuBLAS product reach on the same device in the same call, and, where
DeepSeek published one, the figure of DeepGEMM or FlashMLA beside it (on an H800). Without a GPU all of it is listed as unmeasured.
"""

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
GEMM_SHAPES = (
    (4096, 2112, 7168),
    (4096, 24576, 1536),
    (4096, 32768, 512),
    (4096, 7168, 16384),
    (4096, 4096, 7168),
    (4096, 7168, 2048),
)
DEEPGEMM_TFLOPS = (1058, 990, 590, 1358, 1304, 1025)  # its first README, dense shapes at M = 4096
DECODES = ((16, 64, 4096), (16, 128, 16384), (128, 64, 4096), (128, 128, 4096))  # heads, sequences, context


@dataclass
class Row:
    """One timed kernel. `share` is of the copy bandwidth, or of cuBLAS's bfloat16 rate for the same shape."""

    name: str
    milliseconds: float
    tflops: float | None
    gb_per_second: float | None
    share: float
    error: float
    peer: str | None = None
    peer_milliseconds: float | None = None
    published: str | None = None
    target: float | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.peer_milliseconds is None else self.peer_milliseconds / self.milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu.json", help="the JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "no GPU here: the kernels stay unmeasured; tests/ops/triton proves them in the interpreter and compiles them for sm_90"
        )
        for kind in KINDS:
            print(f"  {kind.__name__.removeprefix('time_').replace('_', ' '):<28} unmeasured")
        return
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copy {ceilings['copy_gb_per_second']:.0f} GB/s, bf16 {ceilings['bf16_tflops']:.0f} TFLOP/s"
    )
    rows = []
    for kind in KINDS:
        for row in kind(ceilings):
            rows.append(row)
            print(describe(row), flush=True)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {"commit": commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__, "ceilings": ceilings}
    temporary = arguments.out.with_suffix(".part")
    temporary.write_text(json.dumps({**facts, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}, indent=2) + "\n")
    temporary.replace(arguments.out)


def describe(row: Row) -> str:
    rate = f"{row.tflops:8.0f} TFLOP/s" if row.tflops is not None else f"{row.gb_per_second:8.0f} GB/s   "
    words = f"{row.name:<44} {row.milliseconds:8.3f} ms {rate} {row.share:6.1%}  error {row.error:.1e}"
    if row.ratio is not None:
        target = "" if row.target is None else f" (target {row.target:g})"
        words += f"  {row.ratio:.2f}x {row.peer}{target}"
    return words + (f"  published {row.published}" if row.published else "")


def milliseconds(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    median: float = do_bench(function, warmup=50, rep=200, return_mode="median")
    return median


def measure_ceilings() -> dict[str, float]:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {
        "copy_gb_per_second": 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6,
        "bf16_tflops": 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9,
    }


def difference(got: Tensor, wanted: Tensor) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2), DeepSeek's one number without a scale."""
    x, y = got.double(), wanted.double()
    return float(1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()))


def moved(name: str, size: int, ceilings: dict[str, float], function: Callable[[], Any], error: float, **more: Any) -> Row:
    """A row of a kernel that is bound by the bytes it moves."""
    time = milliseconds(function)
    rate = size / time / 1e6
    return Row(name, time, None, rate, rate / ceilings["copy_gb_per_second"], error, **more)


def time_fp8_casts(ceilings: dict[str, float]) -> Iterator[Row]:
    from finback.ops import fp8 as reference
    from finback.ops.triton import fp8 as kernels

    x = torch.randn(4096, 7168, device="cuda", dtype=torch.bfloat16)
    for name in ("quantize_1x128", "quantize_128x128", "quantize_over_rows"):
        kernel = getattr(kernels, name)
        wanted = reference.quantize_1x128(x.t()) if name == "quantize_over_rows" else getattr(reference, name)(x)
        equal = torch.equal(kernel(x)[0].view(torch.uint8), wanted[0].view(torch.uint8))
        yield moved(name, 3 * x.numel(), ceilings, lambda kernel=kernel: kernel(x), 0.0 if equal else 1.0)


def time_fp8_gemm(ceilings: dict[str, float]) -> Iterator[Row]:
    from finback.ops.fp8 import quantize_1x128, quantize_128x128
    from finback.ops.fp8_product import fp8_gemm as reference
    from finback.ops.triton.fp8_product import fp8_gemm

    for (m, n, k), published in zip(GEMM_SHAPES, DEEPGEMM_TFLOPS, strict=True):
        x, weight = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (n, k)))
        a, b = quantize_1x128(x), quantize_128x128(weight)
        time, plain = milliseconds(lambda: fp8_gemm(*a, *b, torch.bfloat16)), milliseconds(lambda: x @ weight.t())  # noqa: B023
        error = difference(fp8_gemm(*a, *b), reference(*a, *b))
        rate = 2 * m * n * k / time / 1e9
        name = f"fp8_gemm {m} x {n} x {k}"
        target = 1.3 if k >= 7168 else None
        yield Row(name, time, rate, None, plain / time, error, "cuBLAS bf16", plain, f"DeepGEMM {published} TFLOP/s", target)


def time_grouped_gemm(ceilings: dict[str, float]) -> Iterator[Row]:
    from finback.ops.fp8 import quantize_1x128, quantize_128x128
    from finback.ops.triton.fp8_product import grouped_fp8_gemm, masked_fp8_gemm

    groups, rows, n, k = 8, 1024, 4096, 7168
    pairs = [quantize_128x128(torch.randn(n, k, device="cuda", dtype=torch.bfloat16)) for _ in range(groups)]
    b, b_scale = (torch.stack(part) for part in zip(*pairs, strict=True))
    counts = torch.full((groups,), rows, device="cuda")
    a = quantize_1x128(torch.randn(groups * rows, k, device="cuda", dtype=torch.bfloat16))
    x, w = (torch.randn(groups, *shape, device="cuda", dtype=torch.bfloat16) for shape in ((rows, k), (n, k)))
    plain = milliseconds(lambda: torch.bmm(x, w.transpose(1, 2)))
    room = tuple(part.view(groups, rows, -1) for part in a)
    for name, kernel, operand in (("contiguous", grouped_fp8_gemm, a), ("masked", masked_fp8_gemm, room)):
        time = milliseconds(lambda kernel=kernel, operand=operand: kernel(*operand, b, b_scale, counts, torch.bfloat16))
        rate = 2 * groups * rows * n * k / time / 1e9
        yield Row(f"grouped fp8_gemm, {name}, {groups} x {rows}", time, rate, None, plain / time, 0.0, "torch.bmm bf16", plain)


def time_gate_and_permutation(ceilings: dict[str, float]) -> Iterator[Row]:
    from finback.ops import grouped as reference
    from finback.ops.router import route as plain_route
    from finback.ops.triton import grouped as kernels
    from finback.ops.triton.router import route

    tokens, experts, top_k, size = 4096, 256, 8, 7168
    logits, bias = torch.randn(tokens, experts, device="cuda"), torch.randn(experts, device="cuda") * 0.01
    x = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16)

    def ours() -> Tensor:
        _, indices = route(logits, bias, top_k, 8, 4)
        return kernels.permute(x, kernels.dispatch_order(indices, experts).token)

    def eager() -> Tensor:
        _, indices = plain_route(logits, bias, top_k, 8, 4)
        return x.index_select(0, reference.dispatch_order(indices, experts).token)

    size_moved = x.numel() * 2 * (1 + top_k)
    yield moved(
        "gate and permutation", size_moved, ceilings, ours, 0.0, peer="eager", peer_milliseconds=milliseconds(eager), target=5.0
    )
    y = torch.randn(tokens * top_k, size, device="cuda", dtype=torch.bfloat16)
    inverse = torch.randperm(tokens * top_k, device="cuda")
    wanted = y.float()[inverse].view(tokens, top_k, size).sum(1)
    error = difference(kernels.unpermute(y, inverse, tokens), wanted)
    yield moved("unpermute", size_moved, ceilings, lambda: kernels.unpermute(y, inverse, tokens), error)


def time_mla_decode(ceilings: dict[str, float]) -> Iterator[Row]:
    from finback.ops.attention import latent_attention
    from finback.ops.fp8 import quantize_1x128
    from finback.ops.triton.attention import latent_decode, latent_decode_fp8

    rank, rope, block = 512, 64, 64
    for heads, batch, context in DECODES:
        per_row = context // block
        cache = torch.randn(batch * per_row, block, rank + rope, device="cuda", dtype=torch.bfloat16)
        table = torch.randperm(batch * per_row, device="cuda").view(batch, per_row).to(torch.int32)
        lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        query = torch.randn(batch, heads, rank + rope, device="cuda", dtype=torch.bfloat16)
        scale = (128 + rope) ** -0.5
        rows = cache[table[:1].long()].flatten(1, 2)
        wanted = latent_attention(query[:1].unsqueeze(1), rows, rank, scale)[:, 0]
        error = difference(latent_decode(query, cache, table, lengths, rank, scale)[:1], wanted)
        name = f"MLA decode, {heads} heads, {batch} x {context}"
        row = moved(name, cache.numel() * 2, ceilings, lambda: latent_decode(query, cache, table, lengths, rank, scale), error)  # noqa: B023
        row.tflops = 2 * batch * context * heads * (2 * rank + rope) / row.milliseconds / 1e9 if heads == 128 else None
        row.published = "FlashMLA 3000 GB/s or 660 TFLOP/s"
        yield row
        latents, scales = quantize_1x128(cache[..., :rank])
        keys = cache[..., rank:].contiguous()
        size = latents.numel() + 4 * scales.numel() + 2 * keys.numel()
        yield moved(
            name + ", FP8 cache",
            size,
            ceilings,
            lambda: latent_decode_fp8(query, latents, scales, keys, table, lengths, scale),  # noqa: B023
            error,
        )


def time_mla_prefill(ceilings: dict[str, float]) -> Iterator[Row]:
    from finback.ops.attention import attention_reference
    from finback.ops.triton.attention import causal_attention

    heads, tokens = 128, 4096
    query, key = (torch.randn(1, heads, tokens, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    value = torch.randn(1, heads, tokens, 128, device="cuda", dtype=torch.bfloat16)
    wanted = attention_reference(query, key, value, 192**-0.5)
    error = difference(causal_attention(query, key, value, 192**-0.5, 64), wanted)
    plain = milliseconds(lambda: attention_reference(query, key, value, 192**-0.5))
    time = milliseconds(lambda: causal_attention(query, key, value, 192**-0.5, 64))
    rate = heads * tokens**2 * (192 + 128) / time / 1e9
    yield Row(
        f"MLA prefill, {heads} heads, {tokens}", time, rate, None, rate / ceilings["bf16_tflops"], error, "SDPA, padded", plain
    )


def time_elementwise(ceilings: dict[str, float]) -> Iterator[Row]:
    from finback.ops import cross_entropy, norm, swiglu
    from finback.ops.triton import cross_entropy as triton_loss
    from finback.ops.triton import norm as triton_norm
    from finback.ops.triton import swiglu as triton_swiglu

    x = torch.randn(8192, 7168, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(7168, device="cuda")
    error = difference(triton_norm.normalise(x, weight, 1e-6)[0], norm.normalise(x, weight, 1e-6)[0])
    yield moved("RMSNorm", 4 * x.numel(), ceilings, lambda: triton_norm.normalise(x, weight, 1e-6), error)
    gate, up = (torch.randn(32768, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    row_weight = torch.rand(32768, device="cuda")
    error = difference(triton_swiglu.activate(gate, up, row_weight), swiglu.activate(gate, up, row_weight))
    yield moved("SwiGLU", 6 * gate.numel(), ceilings, lambda: triton_swiglu.activate(gate, up, row_weight), error)
    yield moved("SwiGLU to FP8", 5 * gate.numel(), ceilings, lambda: triton_swiglu.activate_quantize(gate, up, row_weight), 0.0)
    logits = torch.randn(2048, 129280, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 129280, (2048,), device="cuda")
    wanted = cross_entropy.softmax_gradient(logits.clone(), targets, -100, False)
    error = difference(triton_loss.softmax_gradient(logits.clone(), targets, -100, False), wanted)
    yield moved(
        "softmax of the head",
        6 * logits.numel(),
        ceilings,
        lambda: triton_loss.softmax_gradient(logits, targets, -100, True),
        error,
    )


KINDS = (
    time_fp8_casts,
    time_fp8_gemm,
    time_grouped_gemm,
    time_gate_and_permutation,
    time_mla_decode,
    time_mla_prefill,
    time_elementwise,
)

if __name__ == "__main__":
    main()
