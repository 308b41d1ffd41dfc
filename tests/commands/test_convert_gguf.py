"""`finback convert DIR OUT.gguf`: what llama.cpp computes from the file is what we compute from the directory."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from finback import cli
from finback.config import Llama3RopeScaling, ModelConfig, RopeScaling
from finback.data.tokenizer import Tokenizer, save_tokenizer, train_tokenizer
from finback.model.checkpoint import hf_tensors, load, save
from tests.checkpoint_samples import BASE, CONFIGS, LLAMA, QWEN2, QWEN3, V2, build, raw_bytes
from tests.llama_cpp import check_same_tokens, llama_server, needs_llama_cpp
from tests.tokenizer_samples import BATTERY, FAMILIES, family_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(BATTERY * 20, 420)


@pytest.fixture(scope="module")
def directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random model of any config with a tokenizer. Its special tokens are never the likeliest, so no text ends."""

    def write(config: ModelConfig, words: Tokenizer = tokenizer) -> Path:
        target = tmp_path_factory.mktemp("source") / "model"
        model = build(replace(config, vocab_size=words.vocab_size))
        with torch.no_grad():
            model.lm_head.weight[sorted(words.backend.get_added_tokens_decoder())] = 0
        save_tokenizer(words, target)
        save(model, target)
        return target

    return write


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short name, for a socket."""
    with tempfile.TemporaryDirectory(prefix="ggf") as name:
        yield Path(name)


def convert(*words: str | Path) -> int:
    return cli.main(["convert", *map(str, words)])


# Rotary tables whose middle pairs lie inside of YaRN's ramp and turn often within a prompt.
ROTARY: dict[str, Any] = {"rope_theta": 100.0, "max_position_embeddings": 1024}
YARN = RopeScaling(8.0, 512, mscale=1.0, mscale_all_dim=1.0)


def changed(**changes: Any) -> ModelConfig:
    return replace(BASE, **({"qk_rope_head_dim": 16, "rope_scaling": YARN} | ROTARY | changes))


def dense(base: ModelConfig, **changes: Any) -> ModelConfig:
    return replace(base, **(ROTARY | {"hidden_size": 64, "head_dim": 16, "rope_scaling": None} | changes))


PARITY = {
    "v3": changed(),
    "three of four groups, no renormalisation": changed(
        topk_group=3, norm_topk_prob=False, num_attention_heads=4, hidden_size=64
    ),
    "no groups dropped": changed(topk_group=4),
    "no query rank": changed(q_lora_rank=None, rope_scaling=None),
    "only dense layers": changed(first_k_dense_replace=3),
    "no dense layer, two shared experts, MTP": changed(first_k_dense_replace=0, n_shared_experts=2, num_nextn_predict_layers=1),
    "yarn of v2": changed(rope_scaling=replace(YARN, mscale=0.707, mscale_all_dim=0.707)),
    "yarn without mscale": changed(rope_scaling=replace(YARN, mscale=None, mscale_all_dim=None)),
    "yarn with one mscale": changed(rope_scaling=replace(YARN, mscale=None)),
    "yarn with two": changed(rope_scaling=replace(YARN, mscale=0.5, mscale_all_dim=1.5)),
    "v2, greedy": changed(**V2, topk_method="greedy", n_shared_experts=2),
    "v2, no group dropped": changed(**V2, topk_method="group_limited_greedy", topk_group=4, routed_scaling_factor=16.0),
    "v2-lite": changed(**V2, topk_method="greedy", q_lora_rank=None, n_group=1, topk_group=1, num_hidden_layers=27),
    "llama": dense(LLAMA, rms_norm_eps=1e-5),
    "llama, tied, 3.1's scaling": dense(LLAMA, tie_word_embeddings=True, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 128)),
    "llama, biases, other head width": dense(LLAMA, attention_bias=True, head_dim=24, num_key_value_heads=1),
    "llama, yarn": dense(LLAMA, rope_scaling=replace(YARN, mscale=None, mscale_all_dim=None)),
    "qwen2": dense(QWEN2, bos_token_id=0),
    "qwen2, tied, yarn": dense(QWEN2, bos_token_id=0, tie_word_embeddings=True, rope_scaling=replace(YARN, mscale=None)),
    "qwen3": dense(QWEN3),
    "qwen3, tied": dense(QWEN3, tie_word_embeddings=True, head_dim=32, num_key_value_heads=4),
}


@needs_llama_cpp
@pytest.mark.parametrize("name", PARITY)
def test_llama_cpp_generates_the_same_tokens(
    name: str, directory: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path, short: Path
) -> None:
    source = directory(PARITY[name])
    assert convert(source, tmp_path / "model.gguf") == 0
    texts = ["", "The fox", "狐狸看见", "<｜User｜>naïve?<｜Assistant｜><think>\n", "".join(BATTERY)]
    prompts = [tokenizer.encode(text, add_bos=True) for text in texts]
    with llama_server(tmp_path / "model.gguf", short) as server:
        assert check_same_tokens(load(source), server, prompts, 64) <= 1


@needs_llama_cpp
@pytest.mark.parametrize("name", ["deepseek-v3", *FAMILIES])
def test_llama_cpp_cuts_text_as_we_do(
    name: str, directory: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path, short: Path
) -> None:
    ours = tokenizer if name == "deepseek-v3" else family_tokenizer(name)
    assert convert(directory(BASE, ours), tmp_path / "model.gguf") == 0
    with llama_server(tmp_path / "model.gguf", short) as server:
        for text in BATTERY:
            assert server.tokenize(text) == ours.encode(text), text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_file_holds_the_model(dtype: str, directory: Callable[..., Path], tmp_path: Path) -> None:
    source = directory(replace(BASE, num_nextn_predict_layers=1, first_k_dense_replace=1))
    assert convert(source, tmp_path / "out" / "model.gguf", "--dtype", dtype) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "deepseek2"
    assert fields["general.name"] == "model"
    assert fields["tokenizer.ggml.pre"] == "deepseek-v3"
    stored = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", stored}
    expected = dict(hf_tensors(load(source)))
    head = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    assert raw_bytes(expected["lm_head.weight"].to(getattr(torch, dtype))) == head.data.tobytes()


def test_type_of_the_source_is_the_default(
    directory: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = directory(replace(BASE, num_nextn_predict_layers=1))
    save(load(source), tmp_path / "fp8", fp8=True)
    assert convert(tmp_path / "fp8", tmp_path / "plain", "--dtype", "bfloat16") == 0
    capsys.readouterr()
    assert convert(tmp_path / "plain", tmp_path / "one" / "model.gguf") == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{tmp_path / 'one' / 'model.gguf'}: bfloat16, ")
    assert told.out.endswith("beside it; its MTP layers are left out, llama.cpp has none for it\n")
    assert (told.out.count("\n"), told.err) == (1, "")
    # FP8 blocks are dequantised on the way, as they are into a directory.
    assert convert(tmp_path / "fp8", tmp_path / "two" / "model.gguf", "--dtype", "bfloat16") == 0
    one, two = (GGUFReader(tmp_path / name / "model.gguf").tensors for name in ("one", "two"))
    for plain, quantised in zip(one, two, strict=True):
        assert (plain.name, plain.tensor_type) == (quantised.name, quantised.tensor_type)
        if plain.tensor_type.name == "BF16":  # what is float32 was rounded on the way through `plain`
            assert plain.data.tobytes() == quantised.data.tobytes(), plain.name


def test_modelfile_stands_beside_it(directory: Callable[..., Path], tmp_path: Path) -> None:
    source = directory(BASE)
    (source / "generation_config.json").write_text('{"temperature": 0.25, "top_k": "many"}')
    assert convert(source, tmp_path / "my model.gguf") == 0
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[0] == 'FROM "./my model.gguf"'
    assert lines[-1] == "PARAMETER num_ctx 128"
    assert "PARAMETER temperature 0.25" in lines
    assert not [line for line in lines if "top_k" in line]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["SOURCE", "TMP/there.gguf"], "there.gguf exists; move it away, or give OUT in another directory"),
        (["SOURCE", "TMP/used/new.gguf"], "used/Modelfile exists; move it away"),
        (["SOURCE", "TMP/new.gguf", "--fp8"], "--fp8 is for directories, GGUF has no such type"),
        (["TMP/bare", "TMP/new.gguf"], "bare holds no tokenizer.json"),
        (["TMP/nowhere", "TMP/new.gguf"], "nowhere is not a directory"),
        (["TMP/v2", "TMP/new.gguf"], "llama.cpp ranks groups by their two best experts"),
        (["SOURCE", "TMP/new.gguf", "--dtype", "float64"], "float64"),
        (["TMP/broken", "TMP/new.gguf"], "broken/generation_config.json"),
        (["SOURCE", "TMP/new", "--dtype", "float16"], "--dtype is float16, which only GGUF files are written in"),
    ],
)
def test_mistake_is_one_sentence(
    words: list[str], sentence: str, directory: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "Modelfile").touch()
    (tmp_path / "there.gguf").touch()
    save(build(BASE), tmp_path / "bare")
    save(build(CONFIGS["v2"]), tmp_path / "v2")
    shutil.copytree(directory(BASE), tmp_path / "broken")
    (tmp_path / "broken" / "generation_config.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    places = {"SOURCE": str(directory(BASE)), "TMP": str(tmp_path)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert convert(*words) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.startswith("finback convert: ")
    assert told.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_package_that_is_not_installed_is_named(
    directory: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finback.commands.convert.find_spec", lambda name: None)
    assert convert(directory(BASE), tmp_path / "model.gguf") == 2
    assert "writing GGUF files needs the package gguf; install finback[data]" in capsys.readouterr().err


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

root, tokenizer = sys.argv[1:]
base = replace(BASE, vocab_size=420)
small = Transformer(base, dtype=torch.bfloat16)
large = Transformer(replace(base, hidden_size=1024, moe_intermediate_size=512, n_routed_experts=32), dtype=torch.bfloat16)
for model, name in ((small, "small"), (large, "large")):
    for _, tensor in hf_tensors(model):
        tensor.fill_(0.01)
    save(model, f"{root}/{name}", tokenizer_from=tokenizer)
size = sum(tensor.nbytes for tensor in large.state_dict().values())
del model, tensor, small, large
for name in ("small", "large"):  # first use of everything, then measured
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    assert cli.main(["convert", f"{root}/{name}", f"{root}/out-{name}/model.gguf"]) == 0
print("peak", memory("VmHWM") - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's accounting of memory")
def test_conversion_holds_one_tensor_at_a_time(directory: Callable[..., Path], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(directory(BASE))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peak, size = map(int, result.stdout.splitlines()[-1].split()[1:])
    assert size > 150e6
    assert peak < 30e6
