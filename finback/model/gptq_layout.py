"""GPTQ directories: each quantised projection is four tensors, `qweight`, `qzeros`, `scales` and `g_idx`, in place of its `weight`.

The catalog of such a directory gets an entry of the pseudo-dtype GPTQ for each of these weights, so that the rest of the reading
goes by the names of plain checkpoints; `read_packed` dequantises. `read_for_products` leaves a model's weights packed, in the order in
which kernels multiply with them, and `keep_packed` puts them in the place of the plain ones.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from finback.config import InputError
from finback.model.layers import MLP, Linear
from finback.model.moe import Experts
from finback.model.safetensors_io import StoredTensor, TensorReader
from finback.ops.gptq import PACKABLE_BITS, WORD_BITS, dequantize_gptq
from finback.ops.memory import LargePages
from finback.ops.packed import PackedWeight, pack_gptq, stack_packed

GPTQ = "GPTQ"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

logger = logging.getLogger("finback")


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
    return dequantize_gptq(*_read_parts(reader, stored, name), bits=_bits_of(stored, name))


def read_for_products(
    model: nn.Module, reader: TensorReader, stored: dict[str, StoredTensor], pages: LargePages
) -> tuple[dict[str, tuple[PackedWeight, ...]], set[str]]:
    """The weights that stay packed, put into `pages`, by the path of the module that takes them, and the names under which they are
    stored.

    A projection of attention is taken alone; of a feed-forward, or of the experts of a layer, all are or none: one kernel computes
    them. Quantised weights whose form has no place in `ops.packed`, such as 3 bits or groups out of order (act-order), and those of a
    feed-forward that is quantised in part are left for dequantisation, which is logged once. `kv_b_proj` is left, too: absorbed
    attention reads it by heads.
    """
    taken: dict[str, tuple[PackedWeight, ...]] = {}
    names, refused = set[str](), set[str]()
    for path, module in model.named_modules():
        unit = _stored_names(path, module)
        flat = {name for stack in unit for name in stack}
        quantised = {name for name in flat if name in stored and stored[name].dtype == GPTQ}
        if not quantised or flat & (names | refused):
            continue
        if quantised < flat:
            refused |= quantised
            continue
        weights = [_packed_stack(reader, stored, stack) for stack in unit]
        whole = tuple(weight for weight in weights if weight is not None)
        if len(whole) < len(weights):
            refused |= flat
        else:
            taken[path], names = tuple(weight.moved(pages.copy) for weight in whole), names | flat
    if refused:
        logger.info(
            "%d of %d quantised weights are dequantised, with 3 bits, act-order, groups of other than whole words, or plain weights in "
            "the same feed-forward: %s, ...",
            len(refused), len(refused | names), min(refused),
        )  # fmt: skip
    return taken, names


def keep_packed(model: nn.Module, taken: dict[str, tuple[PackedWeight, ...]]) -> None:
    """Put packed weights into their modules, and give back the memory of the plain ones."""
    owners = _owners(model, taken)
    for path, weights in taken.items():
        module = model.get_submodule(path)
        if isinstance(module, Experts):
            gate, up, down = weights
            module.packed = gate, up, down
        else:
            layers = [getattr(module, name) for name in _PROJECTIONS] if isinstance(module, MLP) else [module]
            for layer, weight in zip(layers, weights, strict=True):
                layer.packed = weight
    for owner, name in owners:
        parameter = getattr(owner, name)
        setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


def packed_parameters(model: nn.Module, taken: dict[str, tuple[PackedWeight, ...]]) -> list[nn.Parameter]:
    """The plain ones, whose memory `keep_packed` gives back."""
    return [getattr(owner, name) for owner, name in _owners(model, taken)]


def _owners(model: nn.Module, taken: Iterable[str]) -> list[tuple[nn.Module, str]]:
    """The modules with the plain parameters of packed weights, and their names there."""
    owners: list[tuple[nn.Module, str]] = []
    for path in taken:
        module = model.get_submodule(path)
        if isinstance(module, Experts):
            owners += [(module, name) for name in _PROJECTIONS]
        elif isinstance(module, MLP):
            owners += [(getattr(module, name), "weight") for name in _PROJECTIONS]
        else:
            owners.append((module, "weight"))
    return owners


def _stored_names(path: str, module: nn.Module) -> list[list[str]]:
    """The stored weights that `module` could multiply with packed: one list for each matrix, or stack of experts."""
    if isinstance(module, Experts):
        count = module.gate_proj.shape[0]
        return [[f"{path}.{expert}.{name}.weight" for expert in range(count)] for name in _PROJECTIONS]
    if isinstance(module, MLP):
        return [[f"{path}.{name}.weight"] for name in _PROJECTIONS]
    return [[f"{path}.weight"]] if isinstance(module, Linear) and not path.endswith("kv_b_proj") else []


def _packed_stack(reader: TensorReader, stored: dict[str, StoredTensor], names: list[str]) -> PackedWeight | None:
    weights: list[PackedWeight] = []
    for name in names:
        weight = pack_gptq(*_read_parts(reader, stored, name), bits=_bits_of(stored, name))
        if weight is None:
            return None
        weights.append(weight)
    return stack_packed(weights) if ".experts." in names[0] else weights[0]


def _bits_of(stored: dict[str, StoredTensor], name: str) -> int:
    module = name.removesuffix(".weight")
    return _bits(stored[f"{module}.qweight"], stored[f"{module}.g_idx"])


def _read_parts(reader: TensorReader, stored: dict[str, StoredTensor], name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = name.removesuffix(".weight")
    qweight, qzeros, scales, g_idx = (stored[f"{module}.{part}"] for part in PARTS)
    groups = reader.read(g_idx)
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < scales.shape[0]:
        raise InputError(f"{g_idx.file} holds groups in {module}.g_idx that have no scale; fetch it again")
    return reader.read(qweight), reader.read(qzeros), reader.read(scales), groups


def _bits(qweight: StoredTensor, g_idx: StoredTensor) -> int:
    """The width that the shapes say, 0 if they fit none."""
    if len(qweight.shape) != 2 or len(g_idx.shape) != 1:
        return 0
    fitting = [bits for bits in PACKABLE_BITS if qweight.shape[0] * WORD_BITS == g_idx.shape[0] * bits]
    return fitting[0] if fitting else 0
