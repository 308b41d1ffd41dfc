"""Weights as GPTQ files hold them: unsigned integers in a continuous stream of bits, little end first, cut into int32 words.

Value i of a column takes bits [i * bits, (i + 1) * bits) of its stream: with 4 bits eight values fill a word, with 3 bits 32 values
fill three words and two of them lie across a border. The stored zero point is one less than the one that is subtracted.
"""

import math

import torch
from torch import Tensor

WORD_BITS = 32
PACKABLE_BITS = (2, 3, 4, 8)


def values_per_pack(bits: int) -> int:
    """How many values fill whole words: what a packed axis must be a multiple of."""
    return WORD_BITS // math.gcd(WORD_BITS, bits)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers [N, M] below 2**bits -> int32 [N * bits / 32, M], packed along the first axis; N a multiple of `values_per_pack`."""
    count = values_per_pack(bits)
    grouped = values.to(torch.int64).reshape(-1, count, values.shape[1])
    words = grouped.new_zeros(grouped.shape[0], count * bits // WORD_BITS, values.shape[1])
    for i in range(count):
        word, shift = divmod(i * bits, WORD_BITS)
        words[:, word] |= (grouped[:, i] << shift) & 0xFFFFFFFF
        if shift + bits > WORD_BITS:
            words[:, word + 1] |= grouped[:, i] >> (WORD_BITS - shift)
    words -= (words >> (WORD_BITS - 1)) << WORD_BITS  # the upper half of uint32 are the negative int32
    return words.flatten(0, 1).to(torch.int32)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """int32 [N * bits / 32, M] -> integers [N, M], int32: undoes `pack_bits`."""
    count = values_per_pack(bits)
    words = packed.to(torch.int64).bitwise_and(0xFFFFFFFF).reshape(-1, count * bits // WORD_BITS, packed.shape[1])
    values = torch.empty(words.shape[0], count, packed.shape[1], dtype=torch.int32, device=packed.device)
    for i in range(count):
        word, shift = divmod(i * bits, WORD_BITS)
        value = words[:, word] >> shift
        if shift + bits > WORD_BITS:
            value = value | (words[:, word + 1] << (WORD_BITS - shift))
        values[:, i] = value & ((1 << bits) - 1)
    return values.flatten(0, 1)


def dequantize_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensor:
    """The weight [out, in], float32: (value - zero) * scale of the input channel's group.

    qweight int32 [in * bits / 32, out]; qzeros int32 [groups, out * bits / 32]; scales [groups, out]; g_idx [in], the group of each
    input channel.
    """
    values = unpack_bits(qweight, bits)
    zeros = (unpack_bits(qzeros.T, bits).T + 1) & ((1 << bits) - 1)
    groups = g_idx.long()
    return ((values - zeros[groups]).float() * scales.float()[groups]).T.contiguous()
