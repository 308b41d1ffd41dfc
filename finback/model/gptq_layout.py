"""GPTQ directories: each quantised projection is four tensors, `qweight`, `qzeros`, `scales` and `g_idx`, in place of its `weight`.

The catalog of such a directory gets an entry of the pseudo-dtype GPTQ for each of these weights, so that the rest of the reading
goes by the names of plain checkpoints; `read_packed` dequantises.
"""

from pathlib import Path

from torch import Tensor

from finback.config import InputError
from finback.model.safetensors_io import StoredTensor, TensorReader
from finback.ops.gptq import PACKABLE_BITS, WORD_BITS, dequantize_gptq

GPTQ = "GPTQ"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def with_packed_weights(stored: dict[str, StoredTensor], directory: Path) -> dict[str, StoredTensor]:
    """The catalog with an entry X.weight of dtype GPTQ and the plain shape for each X.qweight; the parts keep theirs.

    Raises InputError naming a part that is missing or fits the others in neither dtype nor shape.
    """
    found = {}
    for name, qweight in stored.items():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        missing = [part for part in PARTS if f"{module}.{part}" not in stored]
        if missing:
            raise InputError(f"{directory} holds {name} but lacks {module}.{missing[0]}; fetch it again")
        if f"{module}.weight" in stored:
            raise InputError(f"{directory} holds {module} both quantised and plain; remove one of the two")
        qzeros, scales, g_idx = (stored[f"{module}.{part}"] for part in PARTS[1:])
        bits = _bits(qweight, g_idx)
        columns = g_idx.shape[0] if bits else 0
        outputs = qweight.shape[-1]
        groups = scales.shape[0] if scales.shape else 0
        expected = {
            "qweight": ("I32", (columns * bits // WORD_BITS, outputs)),
            "qzeros": ("I32", (groups, outputs * bits // WORD_BITS)),
            "scales": (scales.dtype if scales.dtype in ("F16", "BF16", "F32") else "F16", (groups, outputs)),
            "g_idx": ("I32", (columns,)),
        }
        for part, entry in zip(PARTS, (qweight, qzeros, scales, g_idx), strict=True):
            if not bits or (entry.dtype, entry.shape) != expected[part]:
                told = f"{entry.dtype} {list(entry.shape)}"
                raise InputError(f"{entry.file} holds {module}.{part} as {told}, which fits no GPTQ weight; fetch it again")
        found[f"{module}.weight"] = StoredTensor(qweight.file, GPTQ, (outputs, columns), qweight.start, qweight.stop)
    return stored | found


def is_part(name: str, stored: dict[str, StoredTensor]) -> bool:
    """Whether `name` is one of the four tensors of a quantised weight of the catalog."""
    module, _, part = name.rpartition(".")
    weight = stored.get(f"{module}.weight")
    return part in PARTS and weight is not None and weight.dtype == GPTQ


def read_packed(reader: TensorReader, stored: dict[str, StoredTensor], name: str) -> Tensor:
    """The dequantised weight `name`, float32 [out, in], on the CPU."""
    module = name.removesuffix(".weight")
    qweight, qzeros, scales, g_idx = (stored[f"{module}.{part}"] for part in PARTS)
    groups = reader.read(g_idx)
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < scales.shape[0]:
        raise InputError(f"{g_idx.file} holds groups in {module}.g_idx that have no scale; fetch it again")
    bits = _bits(qweight, g_idx)
    return dequantize_gptq(reader.read(qweight), reader.read(qzeros), reader.read(scales), groups, bits)


def _bits(qweight: StoredTensor, g_idx: StoredTensor) -> int:
    """The width that the shapes say, 0 if they fit none."""
    if len(qweight.shape) != 2 or len(g_idx.shape) != 1:
        return 0
    fitting = [bits for bits in PACKABLE_BITS if qweight.shape[0] * WORD_BITS == g_idx.shape[0] * bits]
    return fitting[0] if fitting else 0
