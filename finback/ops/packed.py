"""Weights that stay packed in memory: 4- or 8-bit integers, a scale for each group of inputs, products that unpack on the way.

A weight [N, D] is cut into blocks of 16 rows. In each, one line of 16 words holds 32 / bits neighbouring inputs of every row: a vector
register reads it at once, with a row in each lane, and all of a block lies in one piece. Input i of a line stands at bit
`bits * (i // 2) + 16 * (i % 2)`, so that inputs 2j and 2j + 1 lie at the same place in both halves of a word: the pair that the
processor's bfloat16 product multiplies in one lane.

An integer q stands for (q - c + shift) * scale, where c = 2 ** (bits - 1) is the middle of the grid and `shift`, c less the zero
point, is left out where it is 0 everywhere: the grid is symmetric. The C product is `ops/native/packed.h`, its twin `packed_linear`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finback.ops.gptq import unpack_bits

BLOCK_ROWS = 16
BITS = (4, 8)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [N, D] (or of E experts, [E, N, D], whose N is then a multiple of 16) in blocks of 16 rows, L lines and G groups."""

    codes: Tensor  # int32 [E * N / 16, L, 16], L = D * bits / 32
    scales: Tensor  # float16 [E * N / 16, G, 16]; 0 in rows after the last
    shifts: Tensor | None  # float16 like the scales; None: all 0
    shape: tuple[int, ...]
    bits: int

    @property
    def group_size(self) -> int:
        return self.shape[-1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.shifts is None else self.shifts.nbytes)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "PackedWeight":
        """The same weight in other memory: what `move` makes of each of its tensors."""
        shifts = None if self.shifts is None else move(self.shifts)
        return replace(self, codes=move(self.codes), scales=move(self.scales), shifts=shifts)


def pack_weight(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> PackedWeight:
    """Integers [N, D] below 2 ** bits, float16 scales and integer zero points [N, G], with D / G inputs to a group -> packed."""
    rows, width = values.shape
    lines = values.to(torch.int32).view(rows, -1, 32 // bits)
    words = torch.zeros(lines.shape[:2], dtype=torch.int32)
    for i in range(32 // bits):
        words |= lines[..., i] << _place(i, bits)
    return _packed(words.T, scales.T, zeros.T, (rows, width), bits)


def pack_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> PackedWeight | None:
    """The four tensors of a GPTQ weight (see `ops.gptq`), packed for products; None where the form has no place for them: other bits,
    groups that are no runs of neighbouring inputs (act-order) or shorter than a line, scales that are no float16s."""
    width, groups = len(g_idx), len(scales)
    halves = scales.to(torch.float16)
    if bits not in BITS or width % groups or width // groups % (32 // bits):
        return None
    if not torch.equal(g_idx.long(), torch.arange(width) // (width // groups)) or not torch.equal(halves.float(), scales.float()):
        return None
    mask = (1 << bits) - 1
    words = torch.zeros_like(qweight)  # a word holds the inputs of one line there, too, in another order
    for i in range(32 // bits):
        words |= (qweight >> (bits * i) & mask) << _place(i, bits)
    zeros = (unpack_bits(qzeros.T, bits).T + 1) & mask
    return _packed(words, halves, zeros, (qweight.shape[1], width), bits)


def _packed(words: Tensor, scales: Tensor, zeros: Tensor, shape: tuple[int, int], bits: int) -> PackedWeight:
    """Words [L, N], scales and zero points [G, N], cut into blocks of rows."""
    assert bits in BITS
    assert scales.dtype == torch.float16
    assert len(words) % len(scales) == 0, f"{len(words)} lines in {len(scales)} groups"
    middle = 1 << (bits - 1)

    def blocked(tensor: Tensor) -> Tensor:
        """[n, N] -> [blocks, n, 16], zeros after the last row."""
        padded = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % BLOCK_ROWS))
        return padded.view(len(tensor), -1, BLOCK_ROWS).transpose(0, 1).contiguous()

    shifts = blocked(middle - zeros).to(torch.float16) if (zeros != middle).any() else None
    return PackedWeight(blocked(words), blocked(scales), shifts, shape, bits)


def stack_packed(weights: list[PackedWeight]) -> PackedWeight | None:
    """Weights of one shape and form, as one of shape [E, N, D]; None where they differ, or where rows do not fill their blocks."""
    first = weights[0]
    forms = {(w.shape, w.bits, w.group_size) for w in weights}
    if len(forms) > 1 or first.shape[0] % BLOCK_ROWS:
        return None
    shifts = None
    if any(w.shifts is not None for w in weights):
        shifts = torch.cat([torch.zeros_like(w.scales) if w.shifts is None else w.shifts for w in weights])
    codes, scales = torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights])
    return PackedWeight(codes, scales, shifts, (len(weights), *first.shape), first.bits)


def round_to_packed(weight: Tensor, bits: int, group_size: int) -> PackedWeight:
    """A plain weight [N, D], each value rounded to the nearest of a symmetric grid whose end is its group's largest magnitude."""
    rows, width = weight.shape
    middle = 1 << (bits - 1)
    grouped = weight.float().view(rows, -1, group_size)
    scales = (grouped.abs().amax(-1) / (middle - 1)).clamp(min=2.0**-24).to(torch.float16)
    values = (grouped / scales.float().unsqueeze(-1)).round().clamp(1 - middle, middle - 1).view(rows, width) + middle
    return pack_weight(values, scales, torch.full(scales.shape, middle), bits)


def unpacked(weight: PackedWeight) -> Tensor:
    """The weight that the integers stand for, float32, of its own shape."""
    bits, per_line, middle = weight.bits, 32 // weight.bits, 1 << (weight.bits - 1)
    mask = (1 << bits) - 1
    values = torch.stack([(weight.codes >> _place(i, bits)) & mask for i in range(per_line)], dim=2)
    blocks, groups = weight.scales.shape[:2]
    grouped = (values - middle).float().view(blocks, groups, -1, BLOCK_ROWS)
    if weight.shifts is not None:
        grouped = grouped + weight.shifts.float().unsqueeze(2)
    grouped = grouped * weight.scales.float().unsqueeze(2)
    width = weight.shape[-1]
    rows = grouped.view(blocks, width, BLOCK_ROWS).transpose(1, 2).reshape(-1, width)
    return rows[: weight.shape[0]].contiguous() if len(weight.shape) == 2 else rows.view(weight.shape)


def packed_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """weight x: x [..., D] -> [..., N] in the dtype of x. Integers meet unrounded activations, and the sum of a group its scale."""
    return torch.nn.functional.linear(x.float(), unpacked(weight)).to(x.dtype)


def _place(i: int, bits: int) -> int:
    """The first bit of input i of a line in its word."""
    return bits * (i // 2) + 16 * (i % 2)
