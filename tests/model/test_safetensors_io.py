"""Safetensors files: the library reads ours, we read the library's, and damage is told by file and tensor."""

import contextlib
import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finback.config import InputError, TensorSpec
from finback.model.safetensors_io import (
    StoredTensor,
    TensorReader,
    plan_shards,
    read_catalog,
    read_header,
    tensor_bytes,
    write_safetensors,
)

NAMES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    dtypes = {dtype: name for name, dtype in NAMES.items()}
    return [TensorSpec(name, tuple(tensor.shape), dtypes[tensor.dtype]) for name, tensor in tensors.items()]


def bits(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().view(-1).view(torch.uint8).tolist()
    return values


def samples() -> dict[str, Tensor]:
    """Odd sizes, so that a narrow tensor before a wide one would misplace it."""
    return {
        "payload": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "scale": torch.randn(1, 1),
        "half": torch.randn(7).to(torch.bfloat16),
        "other": torch.randn(2, 3, 1).to(torch.float16),
        "wide": torch.tensor([float("nan"), -0.0, float("inf")]),
        "one": torch.randn(()),
        "none": torch.randn(0, 4),
    }


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    write_safetensors(path, specs_of(tensors), iter(tensors.items()))


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = samples()
    write(tmp_path / "a.safetensors", tensors)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape, bits(read[name])) == (tensor.dtype, tensor.shape, bits(tensor)), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = samples()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    catalog = read_header(tmp_path / "a.safetensors")
    assert catalog.keys() == tensors.keys()
    with TensorReader() as reader:
        for name, tensor in tensors.items():
            read = reader.read(catalog[name])
            assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor)), name


def test_tensors_are_read_in_place_cast_and_strided(tmp_path: Path) -> None:
    value = torch.randn(4, 6)
    write(tmp_path / "a.safetensors", {"value": value})
    stored = read_header(tmp_path / "a.safetensors")["value"]
    stack, cast, strided = torch.zeros(3, 4, 6), torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(6, 4).T
    with TensorReader() as reader:
        for destination in (stack[1], cast, strided):
            reader.read_into(stored, destination)
    assert torch.equal(stack, torch.stack([torch.zeros(4, 6), value, torch.zeros(4, 6)]))
    assert torch.equal(cast, value.to(torch.bfloat16))
    assert torch.equal(strided, value)


def test_bytes_are_compared_to_the_last(tmp_path: Path) -> None:
    one = torch.zeros(2_000_000)
    last = one.clone()
    last[-1] = -0.0  # equal in value, not in bits
    write(tmp_path / "a.safetensors", {"one": one, "same": one, "last": last, "shape": one.view(2, -1)})
    catalog = read_header(tmp_path / "a.safetensors")
    with TensorReader() as reader:
        assert reader.same_bytes(catalog["one"], catalog["same"])
        assert not reader.same_bytes(catalog["one"], catalog["last"])
        assert not reader.same_bytes(catalog["one"], catalog["shape"])


def test_writer_refuses_another_tensor_than_planned(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(AssertionError, match="planned"):
        write_safetensors(tmp_path / "a.safetensors", specs_of(tensors), iter(reversed(tensors.items())))


def test_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"a": torch.zeros(9)})
    stored = read_header(tmp_path / "a.safetensors")["a"]
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate(stored.stop - 1)
    with TensorReader() as reader, pytest.raises(InputError, match="has become shorter"):
        reader.read(stored)


# Damage


def encode(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a safetensors file"),
        (b"\x08\x00", "is not a safetensors file"),
        (b"PK\x03\x04" * 10, "is not a safetensors file"),
        (struct.pack("<Q", 100) + b"{", "is truncated inside its header"),
        (encode(b'{"a": '), "has a damaged header"),
        (encode(b"\xff\xff"), "has a damaged header"),
        (encode([]), "has a damaged header"),
        (encode({"a": 3}), r"has a damaged header \(entry a\)"),
        (encode({"a": {"dtype": "F32", "shape": [1]}}), r"has a damaged header \(entry a\)"),
        (encode({"a": entry(0, 4, [-1])}, b"0000"), r"has a damaged header \(entry a\)"),
        (encode({"a": entry(4, 0, [1])}, b"0000"), r"has a damaged header \(entry a\)"),
        (encode({"a": entry(0, 4, [2])}, b"0000"), r"a has 4 bytes for shape \[2\] of F32"),
        (encode({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"0" * 12), "bytes of b do not follow"),
        (encode({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, b"0" * 8), "bytes of b do not follow"),
        (encode({"a": entry(0, 4, [1]), "b": entry(4, 8, [1])}, b"0" * 7), r"is truncated inside b \("),
        (encode({"a": entry(0, 4, [1]), "b": entry(4, 8, [1])}, b"0" * 3), r"is truncated inside a \("),
        (encode({"a": entry(0, 4, [1])}, b"0" * 5), "1 bytes belong to no tensor"),
    ],
)
def test_damaged_file_is_told(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match=words) as raised:
        read_header(file)
    assert str(file) in str(raised.value)


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sound") / "model.safetensors"
    write(file, samples())
    return file


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 600))
def test_any_damage_gives_tensors_or_one_sentence(position: int, value: int, cut: int, sound_file: Path, tmp_path: Path) -> None:
    content = bytearray(sound_file.read_bytes())
    content[position] = value
    file = tmp_path / "model.safetensors"
    file.write_bytes(content[: max(1, len(content) - cut)] if cut % 3 == 0 else content)
    with contextlib.suppress(InputError):  # anything else is a bug
        assert all(stored.stop <= len(content) for stored in read_header(file).values())


# Shards


def sharded(directory: Path) -> None:
    write(directory / "model-00001-of-00002.safetensors", {"a": torch.ones(2)})
    write(directory / "model-00002-of-00002.safetensors", {"b": torch.ones(3)})
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    catalog = read_catalog(tmp_path)
    assert list(catalog) == ["a", "b"]
    assert catalog["b"].file == tmp_path / "model-00002-of-00002.safetensors"
    with TensorReader() as reader:
        assert torch.equal(reader.read(catalog["b"]), torch.ones(3))


def test_missing_shard_is_told_with_a_tensor_it_should_hold(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors is missing, .* names for b"):
        read_catalog(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "1", "b": "2", "c": "2"}, r"2 lacks c, which model\.safetensors\.index\.json places there"),
        ({"a": "1"}, None),
        ({"a": "1", "x": "2"}, r"2 holds b, which model\.safetensors\.index\.json does not list"),
        ({"a": "2", "b": "2"}, r"2 lacks a, which"),
        ({"a": "1", "b": "1"}, r"1 lacks b, which"),
        ({"a": "../1"}, r"places a in '\.\./1', which is no file name"),
        ({"a": 3}, "places a in 3"),
        ({}, "has no weight_map"),
        (["a"], "has no weight_map"),
    ],
)
def test_index_that_disagrees_with_its_shards_is_told(weight_map: Any, words: str | None, tmp_path: Path) -> None:
    write(tmp_path / "1", {"a": torch.ones(2)})
    write(tmp_path / "2", {"b": torch.ones(3)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if words is None:
        assert list(read_catalog(tmp_path)) == ["a"]
        return
    with pytest.raises(InputError, match=words):
        read_catalog(tmp_path)


def test_directory_without_or_with_two_kinds_of_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither"):
        read_catalog(tmp_path)
    sharded(tmp_path)
    write(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    with pytest.raises(InputError, match="holds both"):
        read_catalog(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match=r"index\.json is not JSON"):
        read_catalog(tmp_path)


@settings(max_examples=100)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=12),
    limit=st.integers(1, 200),
)
def test_plan_keeps_order_and_pairs_and_stays_below_the_limit(sizes: list[tuple[int, bool]], limit: int) -> None:
    specs = []
    for number, (size, is_pair) in enumerate(sizes):
        specs.append(TensorSpec(f"{number}.weight", (size,), "F8_E4M3" if is_pair else "BF16"))
        if is_pair:
            specs.append(TensorSpec(f"{number}.weight_scale_inv", (1, 1), "F32"))
    shards = plan_shards(specs, limit)
    assert [spec for shard in shards for spec in shard] == specs
    for shard in shards:
        first = [spec for spec in shard if not spec.name.endswith("_scale_inv")]
        assert shard[0] is first[0]
        assert sum(map(tensor_bytes, shard)) <= limit or len(first) == 1
    for shard, following in itertools.pairwise(shards):
        pair = following[: 2 if len(following) > 1 and following[1].name.endswith("_scale_inv") else 1]
        assert sum(map(tensor_bytes, [*shard, *pair])) > limit  # no file is smaller than it needs to be


def test_stored_tensor_says_where_it_lies(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(file, {"a": torch.zeros(2, 2), "b": torch.ones(3).to(torch.bfloat16)})
    stored = read_header(file)["b"]
    assert stored == StoredTensor(file, "BF16", (3,), file.stat().st_size - 6, file.stat().st_size)
