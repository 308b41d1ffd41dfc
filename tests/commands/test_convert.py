"""`finback convert`: every pair of forms, without building a model, and one sentence for whatever is wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finback import cli
from finback.config import ModelConfig, checkpoint_tensors
from finback.model.checkpoint import load, save
from finback.model.safetensors_io import read_catalog
from tests.checkpoint_samples import BASE, RAGGED, build, file_bytes, raw_bytes, rewrite_config, rewrite_tensors


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as `float32`, `bfloat16` and `fp8` (plain parts in bfloat16)."""
    root = tmp_path_factory.mktemp("sources")
    model = build(RAGGED)
    save(model, root / "float32", max_shard_bytes=1_000_000)
    save(load(root / "float32", dtype=torch.bfloat16), root / "bfloat16")
    save(load(root / "float32", dtype=torch.bfloat16), root / "fp8", fp8=True, max_shard_bytes=300_000)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (root / "fp8" / name).write_text(name)
    return root


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def convert(*words: str | Path) -> int:
    return cli.main(["convert", *map(str, words)])


@pytest.mark.parametrize("source", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_output_is_what_loading_and_saving_gives(source: str, dtype: str, sources: Path, tmp_path: Path) -> None:
    assert convert(sources / source, tmp_path / "out", "--dtype", dtype) == 0
    save(load(sources / source, dtype=getattr(torch, dtype)), tmp_path / "expected")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_fp8_output_quantises_the_source_itself(source: str, sources: Path, tmp_path: Path) -> None:
    assert convert(sources / source, tmp_path / "out", "--dtype", "bfloat16", "--fp8") == 0
    save(load(sources / source), tmp_path / "expected", fp8=True)
    ours, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        is_plain = expected[name].dtype == torch.float32 and not name.endswith(("_scale_inv", "bias"))
        assert raw_bytes(tensor) == raw_bytes(expected[name].to(torch.bfloat16) if is_plain else expected[name]), name
    config = replace(RAGGED, torch_dtype="bfloat16", fp8=True)
    assert ModelConfig.from_hf(tmp_path / "out") == config
    stored = {name: (entry.dtype, entry.shape) for name, entry in read_catalog(tmp_path / "out").items()}
    assert stored == {spec.name: (spec.dtype, spec.shape) for spec in checkpoint_tensors(config)}


def test_fp8_that_stays_fp8_is_not_touched(sources: Path, tmp_path: Path) -> None:
    def odd_scales(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("_scale_inv"):
                tensor *= 1.2345

    convert(sources / "fp8", tmp_path / "source", "--fp8")
    rewrite_tensors(tmp_path / "source", odd_scales)
    assert convert(tmp_path / "source", tmp_path / "out", "--fp8", "--dtype", "float32") == 0
    source, ours = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    assert source.keys() == ours.keys()
    for name, tensor in source.items():
        plain = tensor.dtype == torch.bfloat16
        assert raw_bytes(ours[name]) == raw_bytes(tensor.float() if plain else tensor), name


def test_dtype_of_the_source_is_the_default(sources: Path, tmp_path: Path) -> None:
    assert convert(sources / "fp8", tmp_path / "out") == 0
    config = ModelConfig.from_hf(tmp_path / "out")
    assert (config.torch_dtype, config.fp8) == ("bfloat16", False)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_tokenizer_comes_along(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(sources / "fp8", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == name
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'out'}: bfloat16, ")
    assert printed.out.count("\n") == 1
    assert printed.err == ""


def test_mtp_copies_that_the_source_leaves_out_are_written(sources: Path, tmp_path: Path) -> None:
    save(load(sources / "float32"), tmp_path / "source")
    copy = f"model.layers.{RAGGED.num_hidden_layers}.embed_tokens.weight"

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[copy]

    rewrite_tensors(tmp_path / "source", drop)
    assert convert(tmp_path / "source", tmp_path / "out") == 0
    tensors = tensors_of(tmp_path / "out")
    assert raw_bytes(tensors[copy]) == raw_bytes(tensors["model.embed_tokens.weight"])


def test_mtp_that_is_not_stored_is_not_announced_any_more(tmp_path: Path) -> None:
    save(build(BASE), tmp_path / "source")
    rewrite_config(tmp_path / "source", num_nextn_predict_layers=1)
    assert convert(tmp_path / "source", tmp_path / "out") == 0
    assert ModelConfig.from_hf(tmp_path / "out").num_nextn_predict_layers == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["SOURCE", "TMP/model.gguf"], "holds no tokenizer.json"),
        (["SOURCE", "SOURCE"], "exists and is not empty; give a new directory"),
        (["SOURCE", "SOURCE/config.json"], "exists and is not empty; give a new directory"),
        (["TMP/nowhere", "TMP/out"], "nowhere is not a directory"),
        (["SOURCE/config.json", "TMP/out"], "is not a directory"),
        (["TMP", "TMP/out"], "holds no config.json"),
        (["SOURCE"], "OUT"),
        (["SOURCE", "TMP/out", "--dtype", "float16"], "float16"),
        (["SOURCE", "TMP/out", "--dtypes", "float32"], "the nearest is --dtype"),
        (["SOURCE", "TMP/out", "extra"], "extra"),
    ],
)
def test_mistake_is_one_sentence(
    words: list[str], sentence: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"SOURCE": str(sources / "bfloat16"), "TMP": str(tmp_path)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert convert(*words) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.startswith("finback convert: ")
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_truncated_source_leaves_nothing(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(build(BASE), tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert convert(tmp_path / "source", tmp_path / "out") == 2
    assert "is truncated inside" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


MEMORY = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from finback import cli
from finback.model.checkpoint import hf_tensors, save
from finback.model.transformer import Transformer
from tests.checkpoint_samples import BASE

def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

root = sys.argv[1]
small = Transformer(BASE, dtype=torch.bfloat16)
large = Transformer(replace(BASE, hidden_size=1024, moe_intermediate_size=512, n_routed_experts=32), dtype=torch.bfloat16)
for model, name in ((small, "small"), (large, "large")):
    for _, tensor in hf_tensors(model):
        tensor.fill_(0.01)
    save(model, f"{root}/{name}")
size = sum(tensor.nbytes for tensor in large.state_dict().values())
del model, tensor, small, large
for name in ("small", "large"):  # first use of everything, then measured
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    cli.main(["convert", f"{root}/{name}", f"{root}/{name}-fp8", "--fp8"])
    cli.main(["convert", f"{root}/{name}-fp8", f"{root}/{name}-float32", "--dtype", "float32"])
print("peak", memory("VmHWM") - before, size)
assert "torch._dynamo" not in sys.modules, "torch's compiler takes seconds to import, and nothing here compiles"
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's accounting of memory")
def test_conversion_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    peak, size = map(int, result.stdout.splitlines()[-1].split()[1:])
    assert size > 150e6
    assert peak < 30e6
