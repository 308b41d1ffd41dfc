"""`python -m bench.gpu`: every Triton kernel checked and timed in one call, on the shapes of DeepSeek's own tables.

Needs a GPU, torch, triton and numpy, nothing else; but for the training step, which is left out where more is missing, `finback.ops`
is all of finback that it imports. Each row says what was moved or multiplied, how long it took, its share of what a plain copy and a
cuBLAS product reach on the same device in the same call, how far its result is from the reference's and how far it may be, and, where
DeepSeek published one, the figure of DeepGEMM or FlashMLA beside it (on an H800). The exit code is 1 where a result is off, after all
is printed and written. Without a GPU all of it is listed as unmeasured.
"""

import argparse
import json
import math
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
DEVICE = "cuda"
EXACT = 0.0
ROUNDING = 1e-5
"""Of `difference` in any row: bfloat16's rounding of a result gives about 1e-6, of attention's weights besides about 2e-6."""
FEW = 1e-3
"""Share of choices or bytes that may fall the other way, since the device's exponential differs from the library's in its last bit."""
LOSS = 2.5e-3
"""Relative, of the first step's loss in low precision against float32."""
COPY_TARGET = 0.8  # of the copy bandwidth, by decoding with 16 heads
BLOCK_SCALED_TARGET = 0.8  # times as fast as torch's own product with block scales


@dataclass(frozen=True)
class Sizes:
    """The shapes; tests take small ones."""

    tokens: int = 4096
    width: int = 7168
    gemms: tuple[tuple[int, int, int], ...] = (
        (4096, 2112, 7168),
        (4096, 24576, 1536),
        (4096, 32768, 512),
        (4096, 7168, 16384),
        (4096, 4096, 7168),
        (4096, 7168, 2048),
    )
    deepgemm_tflops: tuple[int, ...] = (1058, 990, 590, 1358, 1304, 1025)  # its first README, dense shapes at M = 4096
    groups: tuple[int, int, int, int] = (8, 1024, 4096, 7168)  # groups, rows of each, N, K
    gate: tuple[int, int, int, int] = (256, 8, 8, 4)  # experts, chosen, groups, groups kept
    decodes: tuple[tuple[int, int, int], ...] = ((16, 64, 4096), (16, 128, 16384), (128, 64, 4096), (128, 128, 4096))
    """Heads, sequences, context."""
    latent: tuple[int, int] = (512, 64)  # values of the latent, of the rotary part
    heads: int = 128
    prefill_tokens: int = 4096
    experts_rows: tuple[int, int] = (32768, 2048)
    logits: tuple[int, int] = (2048, 129280)
    training: tuple[str, int, int] = ("small", 32, 1024)  # preset, sequences, tokens of each


SIZES = Sizes()


@dataclass
class Peer:
    """What else computes the same, and how many times as fast we should be."""

    name: str
    milliseconds: float
    target: float | None = None


@dataclass
class Row:
    """One checked and timed kernel. `share` is of the copy bandwidth, or of cuBLAS's bfloat16 rate; `error` is how far its result is
    from the reference's, by one of the functions below, and `bound` how far it may be."""

    name: str
    milliseconds: float
    tflops: float | None
    gb_per_second: float | None
    share: float
    error: float
    bound: float
    peers: tuple[Peer, ...] = ()
    published: str | None = None
    target_share: float | None = None

    @property
    def right(self) -> bool:
        return self.error <= self.bound  # nan is not


@dataclass(frozen=True)
class Unmeasured:
    """What has no figure here, and why. A `fault` is ours and fails the run."""

    name: str
    reason: str
    fault: bool = False


Found = Row | Unmeasured
Check = tuple[float, float]  # error, bound


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu.json", help="the JSON file")
    out: Path = parser.parse_args(argv).out
    if out.is_dir():
        parser.error(f"--out {out} is a directory; give a file")
    if not torch.cuda.is_available():
        print(
            "no GPU here: the kernels stay unmeasured; tests/ops/triton proves them in the interpreter and compiles them for sm_90"
        )
        for kind in KINDS:
            print(f"  {title_of(kind):<28} unmeasured")
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)  # before the minutes that are lost where it fails
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copy {ceilings['copy_gb_per_second']:.0f} GB/s, bf16 {ceilings['bf16_tflops']:.0f} TFLOP/s"
    )
    found = []
    for one in measure(SIZES, ceilings):
        found.append(one)
        print(describe(one), flush=True)
    write(out, ceilings, found)
    off = faults(found)
    for line in off:
        print(f"off: {line}", file=sys.stderr)
    return 1 if off else 0


def title_of(kind: Callable[..., Any]) -> str:
    return kind.__name__.removeprefix("time_").replace("_", " ")


def measure(sizes: Sizes, ceilings: dict[str, float]) -> Iterator[Found]:
    """Every kind of kernel. One that breaks is told and fails the run at its end; the others are measured all the same."""
    for kind in KINDS:
        try:
            yield from kind(sizes, ceilings)
        except Exception as error:
            traceback.print_exc()
            yield Unmeasured(title_of(kind), f"{type(error).__name__}: {first_line(error)}", fault=True)


def first_line(error: Exception) -> str:
    return (str(error).strip() or "no words").splitlines()[0]


def faults(found: Sequence[Found]) -> list[str]:
    """A line for each result that is off and each kind that broke; with any, the run has failed."""
    lines = []
    for one in found:
        if isinstance(one, Row) and not one.right:
            lines.append(f"{one.name}: error {one.error:.1e}, at most {one.bound:.1e}")
        elif isinstance(one, Unmeasured) and one.fault:
            lines.append(f"{one.name}: {one.reason}")
    return lines


def write(out: Path, ceilings: dict[str, float], found: Sequence[Found]) -> None:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {"commit": commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__, "ceilings": ceilings}
    rows = [
        asdict(one) | {"right": one.right, "ratios": {peer.name: peer.milliseconds / one.milliseconds for peer in one.peers}}
        for one in found
        if isinstance(one, Row)
    ]
    unmeasured = [asdict(one) for one in found if isinstance(one, Unmeasured)]
    temporary = out.with_suffix(".part")
    temporary.write_text(json.dumps({**facts, "rows": rows, "unmeasured": unmeasured}, indent=2) + "\n")
    temporary.replace(out)


def describe(one: Found) -> str:
    if isinstance(one, Unmeasured):
        return f"{one.name:<44} unmeasured: {one.reason}"
    rate = f"{one.tflops:8.0f} TFLOP/s" if one.tflops is not None else f"{one.gb_per_second:8.0f} GB/s   "
    aim = "" if one.target_share is None else f" (target {one.target_share:.0%})"
    words = f"{one.name:<44} {one.milliseconds:8.3f} ms {rate} {one.share:6.1%}{aim}  error {one.error:.1e}"
    words += "" if one.right else f" OFF, at most {one.bound:.1e}"
    for peer in one.peers:
        target = "" if peer.target is None else f" (target {peer.target:g})"
        words += f"  {peer.milliseconds / one.milliseconds:.2f}x {peer.name}{target}"
    return words + (f"  published {one.published}" if one.published else "")


def milliseconds(function: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    median: float = do_bench(function, warmup=50, rep=200, return_mode="median")
    return median


def measure_ceilings() -> dict[str, float]:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (normal(8192, 8192) for _ in range(2))
    return {
        "copy_gb_per_second": 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6,
        "bf16_tflops": 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9,
    }


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def difference(got: Tensor, wanted: Tensor) -> float:
    """1 - 2 <x, y> / (|x|^2 + |y|^2), DeepSeek's one number without a scale, of the row (last dimension) that is furthest off."""
    if got.shape != wanted.shape:
        return math.inf
    x, y = got.double(), wanted.double()
    size = (x * x).sum(-1) + (y * y).sum(-1)
    off = torch.where(size == 0, 0.0, 1 - 2 * (x * y).sum(-1) / size)
    return float(off.max()) if off.numel() else 0.0  # nan is the largest


def unequal(got: Tensor, wanted: Tensor) -> float:
    """The share of bytes that differ."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return 1.0
    one, other = (x.cpu().contiguous().view(torch.uint8) for x in (got, wanted))
    return float((one != other).double().mean()) if one.numel() else 0.0


def furthest(*checks: Check) -> Check:
    """The check that is furthest beyond its bound; before all one whose error is nan."""

    def beyond(check: Check) -> float:
        error, bound = check
        if math.isnan(error):
            return math.inf
        return error / bound if bound else (math.inf if error > 0 else 0.0)

    return max(checks, key=beyond)


def moved(name: str, size: float, ceilings: dict[str, float], function: Callable[[], Any], check: Check, **more: Any) -> Row:
    """A row of a kernel that is bound by the bytes it moves."""
    time = milliseconds(function)
    rate = size / time / 1e6
    return Row(name, time, None, rate, rate / ceilings["copy_gb_per_second"], *check, **more)


def time_fp8_casts(sizes: Sizes, ceilings: dict[str, float]) -> Iterator[Found]:
    from finback.ops import fp8 as reference
    from finback.ops.triton import fp8 as kernels

    x = normal(sizes.tokens, sizes.width)
    host = x.cpu()  # a CPU divides as IEEE 754 has it; on a GPU torch multiplies by a reciprocal, which moves some scales
    for name in ("quantize_1x128", "quantize_128x128", "quantize_over_rows"):
        kernel = getattr(kernels, name)
        wanted = reference.quantize_1x128(host.t()) if name == "quantize_over_rows" else getattr(reference, name)(host)
        check = furthest(*((unequal(one, other), EXACT) for one, other in zip(kernel(x), wanted, strict=True)))
        yield moved(name, 3 * x.numel(), ceilings, partial(kernel, x), check)


def block_scaled(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """torch's own product of the same payloads and scales; it wants the scales of rows one column after another."""
    product: Tensor = torch._scaled_mm(
        a, b.t(), scale_a=a_scale.t().contiguous().t(), scale_b=b_scale.t(), out_dtype=torch.bfloat16
    )
    return product


def block_scaled_peer(operands: Sequence[Tensor], wanted: Tensor) -> Peer | str:
    """Its time, or why there is none."""
    run = partial(block_scaled, *operands)
    try:
        error = difference(run(), wanted)
    except (AttributeError, RuntimeError, ValueError) as refusal:  # of this torch, device or shape
        return f"torch {torch.__version__} refuses it: {first_line(refusal)}"
    if not error <= ROUNDING:
        return f"torch {torch.__version__} computes something else: error {error:.1e}"
    return Peer("torch, block scales", milliseconds(run), BLOCK_SCALED_TARGET)


def time_fp8_gemm(sizes: Sizes, ceilings: dict[str, float]) -> Iterator[Found]:
    from finback.ops.fp8 import quantize_1x128, quantize_128x128
    from finback.ops.fp8_product import fp8_gemm as reference
    from finback.ops.triton.fp8_product import fp8_gemm

    for (m, n, k), published in zip(sizes.gemms, sizes.deepgemm_tflops, strict=True):
        name = f"fp8_gemm {m} x {n} x {k}"
        x, weight = normal(m, k), normal(n, k)
        operands = *quantize_1x128(x), *quantize_128x128(weight)
        wanted = reference(*operands)
        error = difference(fp8_gemm(*operands), wanted)
        time = milliseconds(partial(fp8_gemm, *operands, torch.bfloat16))
        peers = [Peer("cuBLAS bf16", milliseconds(partial(torch.matmul, x, weight.t())), 1.3 if k >= 7168 else None)]
        other = block_scaled_peer(operands, wanted)
        if isinstance(other, Peer):
            peers.append(other)
        else:
            yield Unmeasured(f"torch, block scales, {m} x {n} x {k}", other)
        rate = 2 * m * n * k / time / 1e9
        share = rate / ceilings["bf16_tflops"]
        yield Row(name, time, rate, None, share, error, ROUNDING, tuple(peers), f"DeepGEMM {published} TFLOP/s")


def time_grouped_gemm(sizes: Sizes, ceilings: dict[str, float]) -> Iterator[Found]:
    from finback.ops.fp8 import quantize_1x128, quantize_128x128
    from finback.ops.fp8_product import fp8_gemm
    from finback.ops.triton.fp8_product import grouped_fp8_gemm, masked_fp8_gemm

    groups, rows, n, k = sizes.groups
    x, w = normal(groups, rows, k), normal(groups, n, k)
    b, b_scale = (torch.stack(part) for part in zip(*map(quantize_128x128, w), strict=True))
    a, a_scale = quantize_1x128(x)
    full = torch.full((groups,), rows, device=DEVICE)
    ragged = full - torch.arange(groups, device=DEVICE) * (rows // (2 * groups))  # of the check: groups of unequal size
    used = torch.arange(rows, device=DEVICE) < ragged[:, None]
    wanted = torch.stack([fp8_gemm(a[e], a_scale[e], b[e], b_scale[e]) for e in range(groups)])
    plain = Peer("torch.bmm bf16", milliseconds(lambda: torch.bmm(x, w.transpose(1, 2))))
    contiguous = grouped_fp8_gemm(a[used], a_scale[used], b, b_scale, ragged)
    masked = masked_fp8_gemm(a, a_scale, b, b_scale, ragged)
    for name, kernel, operands, error in (
        ("contiguous", grouped_fp8_gemm, (a.flatten(0, 1), a_scale.flatten(0, 1)), difference(contiguous, wanted[used])),
        ("masked", masked_fp8_gemm, (a, a_scale), difference(masked, torch.where(used[..., None], wanted, 0.0))),
    ):
        time = milliseconds(partial(kernel, *operands, b, b_scale, full, torch.bfloat16))
        rate = 2 * groups * rows * n * k / time / 1e9
        title = f"grouped fp8_gemm, {name}, {groups} x {rows}"
        yield Row(title, time, rate, None, rate / ceilings["bf16_tflops"], error, ROUNDING, (plain,))


def time_gate_and_permutation(sizes: Sizes, ceilings: dict[str, float]) -> Iterator[Found]:
    from finback.ops import grouped as reference
    from finback.ops.router import route as plain_route
    from finback.ops.triton import grouped as kernels
    from finback.ops.triton.router import route

    (experts, top_k, groups, kept), tokens = sizes.gate, sizes.tokens
    logits, bias = torch.randn(tokens, experts, device=DEVICE), torch.randn(experts, device=DEVICE) * 0.01
    x = normal(tokens, sizes.width)

    def ours() -> Tensor:
        _, indices = route(logits, bias, top_k, groups, kept)
        return kernels.permute(x, kernels.dispatch_order(indices, experts).token)

    def eager() -> Tensor:
        _, indices = plain_route(logits, bias, top_k, groups, kept)
        return x.index_select(0, reference.dispatch_order(indices, experts).token)

    values, indices = route(logits, bias, top_k, groups, kept)
    wanted_values, wanted = plain_route(logits, bias, top_k, groups, kept)
    order, wanted_order = indices.argsort(1), wanted.argsort(1)  # neither promises the order of equals
    same = indices.gather(1, order) == wanted.gather(1, wanted_order)
    agreed = same.all(1)
    off = difference(values.gather(1, order)[agreed], wanted_values.gather(1, wanted_order)[agreed])
    check = furthest((1 - float(same.double().mean()), FEW), (off, ROUNDING))
    yield moved(
        "gate", 4 * logits.numel() + 12 * indices.numel(), ceilings, lambda: route(logits, bias, top_k, groups, kept), check
    )
    got, plain = kernels.dispatch_order(indices, experts), reference.dispatch_order(indices, experts)
    pairs = [(getattr(got, name), getattr(plain, name)) for name in ("order", "token", "inverse", "rows")]
    pairs.append((kernels.permute(x, got.token), x.index_select(0, plain.token)))
    size_moved = x.numel() * 2 * (1 + top_k)
    yield moved(
        "gate and permutation",
        size_moved,
        ceilings,
        ours,
        furthest(*((unequal(*pair), EXACT) for pair in pairs)),
        peers=(Peer("eager", milliseconds(eager), 5.0),),
    )
    y = normal(tokens * top_k, sizes.width)
    inverse = torch.randperm(tokens * top_k, device=DEVICE)
    summed = y.float()[inverse].view(tokens, top_k, sizes.width).sum(1)
    error = difference(kernels.unpermute(y, inverse, tokens), summed)
    yield moved("unpermute", size_moved, ceilings, lambda: kernels.unpermute(y, inverse, tokens), (error, ROUNDING))


def time_mla_decode(sizes: Sizes, ceilings: dict[str, float]) -> Iterator[Found]:
    from finback.ops.attention import latent_attention
    from finback.ops.fp8 import dequantize_1x128, quantize_1x128
    from finback.ops.triton.attention import latent_decode, latent_decode_fp8

    (rank, rope), block = sizes.latent, 64
    for heads, batch, context in sizes.decodes:
        per_row = context // block
        cache = normal(batch * per_row, block, rank + rope)
        table = torch.randperm(batch * per_row, device=DEVICE).view(batch, per_row).to(torch.int32)
        full = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        ragged = full - torch.arange(batch, dtype=torch.int32, device=DEVICE) % context  # of the check
        query, scale = normal(batch, heads, rank + rope), (128 + rope) ** -0.5
        latents, scales = quantize_1x128(cache[..., :rank])
        keys = cache[..., rank:].contiguous()
        restored = torch.cat((dequantize_1x128(latents, scales, torch.bfloat16), keys), dim=-1)

        def error(got: Tensor, stored: Tensor) -> float:
            """Of the first and the last sequence, against float32 over what their caches stand for."""
            offs = []
            for place in (0, batch - 1):  # noqa: B023
                rows = stored[table[place].long()].flatten(0, 1)[: int(ragged[place])]  # noqa: B023
                wanted = latent_attention(query[place].float().view(1, 1, heads, -1), rows.float()[None], rank, scale)[0, 0]  # noqa: B023
                offs.append(difference(got[place], wanted))
            return furthest(*((off, ROUNDING) for off in offs))[0]

        plain = partial(latent_decode, query, cache, table, rank=rank, scale=scale)
        compressed = partial(latent_decode_fp8, query, latents, scales, keys, table, scale=scale)
        bytes_of = {"": 2 * cache.numel(), ", FP8 cache": latents.numel() + 4 * scales.numel() + 2 * keys.numel()}
        for (suffix, size), kernel, stored in zip(bytes_of.items(), (plain, compressed), (cache, restored), strict=True):
            name = f"MLA decode, {heads} heads, {batch} x {context}{suffix}"
            check = error(kernel(lengths=ragged), stored), ROUNDING
            aim = COPY_TARGET if heads == 16 else None  # with more it is the products that take the time
            row = moved(name, size, ceilings, partial(kernel, lengths=full), check, target_share=aim)
            if not suffix:
                row.tflops = 2 * batch * context * heads * (2 * rank + rope) / row.milliseconds / 1e9 if heads == 128 else None
                row.published = "FlashMLA 3000 GB/s or 660 TFLOP/s"
            yield row


def time_mla_prefill(sizes: Sizes, ceilings: dict[str, float]) -> Iterator[Found]:
    from finback.ops.attention import attention_reference
    from finback.ops.triton.causal_attention import causal_attention

    heads, tokens = sizes.heads, sizes.prefill_tokens
    query, key = (normal(1, heads, tokens, 192) for _ in range(2))
    value = normal(1, heads, tokens, 128)
    few = slice(0, 4)  # heads of the check: float32 takes four times as long
    wanted = attention_reference(query[:, few].float(), key[:, few].float(), value[:, few].float(), 192**-0.5)
    error = difference(causal_attention(query, key, value, 192**-0.5, 64)[:, few], wanted)
    plain = Peer("SDPA, padded", milliseconds(lambda: attention_reference(query, key, value, 192**-0.5)))
    time = milliseconds(lambda: causal_attention(query, key, value, 192**-0.5, 64))
    rate = heads * tokens**2 * (192 + 128) / time / 1e9
    name = f"MLA prefill, {heads} heads, {tokens}"
    yield Row(name, time, rate, None, rate / ceilings["bf16_tflops"], error, ROUNDING, (plain,))

    grad = normal(1, heads, tokens, 128)
    leaves = [one.requires_grad_() for one in (query, key, value)]
    exact = [one[:, few].detach().float().requires_grad_() for one in leaves]
    wanted_grads = torch.autograd.grad(attention_reference(*exact, 192**-0.5), exact, grad[:, few].float())
    ours, eager = causal_attention(*leaves, 192**-0.5, 64), attention_reference(*leaves, 192**-0.5)
    found = torch.autograd.grad(ours, leaves, grad, retain_graph=True)
    # Heads as a whole: a row by itself may be a difference of equals, as the first query's, which is zero.
    check = differences([one[:, few].flatten(2) for one in found], [one.flatten(2) for one in wanted_grads])
    plain = Peer("SDPA, padded", milliseconds(lambda: torch.autograd.grad(eager, leaves, grad, retain_graph=True)))
    time = milliseconds(lambda: torch.autograd.grad(ours, leaves, grad, retain_graph=True))
    rate = heads * tokens**2 * (3 * 192 + 2 * 128) / time / 1e9  # of the five products; the second pass makes two of them again
    yield Row(f"{name}, backward", time, rate, None, rate / ceilings["bf16_tflops"], *check, (plain,))


def differences(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> Check:
    return furthest(*((difference(one, other), ROUNDING) for one, other in zip(got, wanted, strict=True)))


def time_norm_and_rotary(sizes: Sizes, ceilings: dict[str, float]) -> Iterator[Found]:
    from finback.ops import norm, rotary
    from finback.ops.triton import norm as triton_norm
    from finback.ops.triton import rotary as triton_rotary

    x, grad, weight = normal(2 * sizes.tokens, sizes.width), normal(2 * sizes.tokens, sizes.width), torch.randn(sizes.width)
    weight = weight.to(DEVICE)
    wanted, scale = norm.normalise(x.float(), weight, 1e-6)
    check = differences(triton_norm.normalise(x, weight, 1e-6), (wanted, scale))
    yield moved("RMSNorm", 4 * x.numel(), ceilings, lambda: triton_norm.normalise(x, weight, 1e-6), check)
    grads = norm.normalise_backward(grad.float(), x.float(), weight, scale)
    check = differences(triton_norm.normalise_backward(grad, x, weight, scale), grads)
    backward = partial(triton_norm.normalise_backward, grad, x, weight, scale)
    yield moved("RMSNorm, backward", 6 * x.numel(), ceilings, backward, check)

    queries, gradient = (normal(sizes.tokens, sizes.heads, 64) for _ in range(2))
    angles = torch.randn(sizes.tokens, 1, 32, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    error = difference(triton_rotary.apply_rotary(queries, cos, sin), rotary.apply_rotary(queries.float(), cos, sin))
    rotate = partial(triton_rotary.apply_rotary, queries, cos, sin)
    yield moved("rotary", 4 * queries.numel(), ceilings, rotate, (error, ROUNDING))
    leaf, plain = queries.clone().requires_grad_(), queries.float().requires_grad_()
    (wanted_grad,) = torch.autograd.grad(rotary.apply_rotary(plain, cos, sin), plain, gradient.float())
    rotated = triton_rotary.apply_rotary(leaf, cos, sin)
    turn_back = partial(torch.autograd.grad, rotated, leaf, gradient, retain_graph=True)
    check = difference(turn_back()[0], wanted_grad), ROUNDING
    yield moved("rotary, backward", 4 * queries.numel(), ceilings, turn_back, check)


def time_swiglu_and_loss(sizes: Sizes, ceilings: dict[str, float]) -> Iterator[Found]:
    from finback.ops import cross_entropy, fp8, swiglu
    from finback.ops.triton import cross_entropy as triton_loss
    from finback.ops.triton import swiglu as triton_swiglu

    gate, up, grad = (normal(*sizes.experts_rows) for _ in range(3))
    weight = torch.rand(len(gate), device=DEVICE)
    operands = gate, up, weight
    wide = gate.float(), up.float(), weight
    activated = triton_swiglu.activate(*operands)
    check = difference(activated, swiglu.activate(*wide)), ROUNDING
    yield moved("SwiGLU", 6 * gate.numel(), ceilings, partial(triton_swiglu.activate, *operands), check)
    backward = partial(triton_swiglu.activate_backward, grad, *operands)
    got, wanted = backward(), swiglu.activate_backward(grad.float(), *wide)
    check = differences([x for x in got if x is not None], [x for x in wanted if x is not None])
    yield moved("SwiGLU, backward", 10 * gate.numel(), ceilings, backward, check)
    quantise = partial(triton_swiglu.activate_quantize, *operands)
    cast = fp8.quantize_1x128(activated.cpu())
    check = furthest(*((unequal(one, other), FEW) for one, other in zip(quantise(), cast, strict=True)))
    yield moved("SwiGLU to FP8", 5 * gate.numel(), ceilings, quantise, check)

    rows, vocab = sizes.logits
    logits, targets = normal(rows, vocab), torch.randint(0, vocab, (rows,), device=DEVICE)
    exact, ours = logits.float(), logits.clone()
    losses = cross_entropy.softmax_gradient(exact, targets, -100, True)
    check = differences((triton_loss.softmax_gradient(ours, targets, -100, True), ours), (losses, exact))
    del exact, ours
    softmax = partial(triton_loss.softmax_gradient, logits, targets, -100, True)
    yield moved("softmax of the head", 6 * logits.numel(), ceilings, softmax, check)


def time_training_step(sizes: Sizes, ceilings: dict[str, float]) -> Iterator[Found]:
    """Forward, backward, clipping and AdamW as `finback pretrain` does them; FP8 products are those of dequantised operands there."""
    preset, sequences, tokens = sizes.training
    try:
        from finback.presets import PRESETS
        from finback.train.throughput import training_flops_per_token

        steps = {precision: training_step(preset, sequences, tokens, precision) for precision in ("fp32", "bf16", "fp8")}
    except ImportError as error:
        yield Unmeasured(f"training step of {preset}", f"{error.name} is not installed")
        return
    plain = steps.pop("fp32")()
    flops = training_flops_per_token(PRESETS[preset]().model, tokens) * sequences * tokens
    for precision, step in steps.items():
        error = abs(step() / plain - 1)  # the first step, before any update
        time = milliseconds(step)
        rate = flops / time / 1e9
        name = f"training step of {preset}, {precision}, {sequences} x {tokens}"
        yield Row(name, time, rate, None, rate / ceilings["bf16_tflops"], error, LOSS, published="share is the MFU")


def training_step(preset: str, sequences: int, tokens: int, precision: Any) -> Callable[[], float]:
    """A step with the weights of seed 0 on one micro-batch, always the same; returns its loss."""
    from finback.model.transformer import Transformer, init_weights
    from finback.presets import PRESETS
    from finback.quant.fp8_training import train_in_fp8
    from finback.train.losses import accumulate_gradients
    from finback.train.optimizer import adamw_update, clip_scale, gradient_norm, init_adam_state

    config = PRESETS[preset]().model
    model = Transformer(config, device=torch.device(DEVICE), dtype=torch.float32)
    init_weights(model, seed=0)
    if precision == "fp8":
        train_in_fp8(model)
    parameters = dict(model.named_parameters())
    adam = init_adam_state(parameters)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(config.vocab_size, (sequences, tokens + 1), generator=generator).to(DEVICE)

    def step() -> float:
        losses = accumulate_gradients(model, [rows], mtp_loss_coef=0.3, balance_loss_coef=1e-4, precision=precision)
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        scale = clip_scale(gradient_norm(gradients), 1.0)
        adamw_update(
            parameters, gradients, adam, lr=1e-4, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, gradient_scale=scale
        )
        for parameter in parameters.values():
            parameter.grad = None
        return losses.loss

    return step


KINDS = (
    time_fp8_casts,
    time_fp8_gemm,
    time_grouped_gemm,
    time_gate_and_permutation,
    time_mla_decode,
    time_mla_prefill,
    time_norm_and_rotary,
    time_swiglu_and_loss,
    time_training_step,
)

if __name__ == "__main__":
    sys.exit(main())
