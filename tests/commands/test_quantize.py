"""`finback quantize`: from text and a small model to a directory that loads, and one sentence for whatever is wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finback import cli
from finback.commands.parse import parse_arguments
from finback.commands.quantize import QuantizeFields, _sequences
from finback.config import ModelConfig
from finback.data.tokenizer import save_tokenizer, train_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.checkpoint import hf_tensors, load, save
from finback.model.moe import MoE
from finback.ops.gptq import dequantize_gptq
from finback.quant import quantize as pipeline
from finback.quant.config import quantised_weights
from finback.quant.rtn import dequantised, round_to_nearest
from tests.checkpoint_samples import LLAMA, build, file_bytes

MOE = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    q_lora_rank=32,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    max_position_embeddings=128,
    initializer_range=0.2,
)
DENSE = replace(
    LLAMA, vocab_size=320, hidden_size=64, intermediate_size=96, head_dim=16, tie_word_embeddings=True, rope_scaling=None
)
SETTINGS = ("--group-size", "32", "--sequence-length", "32", "--min-expert-tokens", "20")
NEVER_SEEN = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`moe`, whose last expert is never chosen in layer 1, `dense`, and `text.txt`."""
    root = tmp_path_factory.mktemp("quantize")
    text = " ".join(f"the {a} fox sees {b} geese on the {c} hill;" for a in "abcde" for b in range(9) for c in ("red", "far"))
    (root / "text.txt").write_text(text)
    tokenizer = train_tokenizer([text], 300)
    for name, config in (("moe", MOE), ("dense", DENSE)):
        model = build(config)
        if name == "moe":
            with torch.no_grad():
                for router in model.routers():
                    assert router.e_score_correction_bias is not None
                    router.e_score_correction_bias[NEVER_SEEN] = -100.0
        save(model, root / name)
        save_tokenizer(tokenizer, root / name)
    return root


def quantize(*words: str | Path) -> int:
    return cli.main(["quantize", *map(str, words)])


@pytest.fixture(scope="module")
def quantised(root: Path) -> Path:
    assert quantize(root / "moe", root / "gptq", *SETTINGS, "--calibration", root / "text.txt") == 0
    return root / "gptq"


@pytest.mark.parametrize(
    "words",
    [
        ("--samples", "5"),
        ("--held-out", "9"),
        ("--sequence-length", "64"),
        ("--text-field", "x"),
        ("--bits", "8"),
        ("--act-order",),
    ],
)
def test_fp8_refuses_what_it_has_no_use_for(
    words: tuple[str, ...], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(root / "moe", tmp_path / "out", "--method", "fp8", *words) == 2
    assert f"{words[0]} is for gptq and rtn, FP8 blocks have no use for it; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_layout_is_the_ecosystems(quantised: Path) -> None:
    tensors = load_file(quantised / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    shapes = {part: (list(tensors[f"{name}.{part}"].shape), tensors[f"{name}.{part}"].dtype) for part in ("qweight", "qzeros")}
    assert shapes == {"qweight": ([8, 32], torch.int32), "qzeros": ([2, 4], torch.int32)}
    assert (tensors[f"{name}.scales"].shape, tensors[f"{name}.scales"].dtype) == ((2, 32), torch.float16)
    assert tensors[f"{name}.g_idx"].tolist() == [0] * 32 + [1] * 32
    assert tensors[f"{name}.qzeros"].unique().tolist() == [0x77777777]
    assert f"{name}.weight" not in tensors
    config = json.loads((quantised / "config.json").read_text())["quantization_config"]
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
    assert expected.items() <= config.items()


def test_router_latents_embedding_head_norms_and_eh_proj_stay_as_they_were(root: Path, quantised: Path) -> None:
    before, after = load_file(root / "moe" / "model.safetensors"), load_file(quantised / "model.safetensors")
    plain = before.keys() & after.keys()
    chosen = {spec.name for spec in quantised_weights(MOE)}
    assert plain == before.keys() - chosen
    assert all(torch.equal(before[name], after[name]) for name in plain)
    for part in ("kv_a_proj_with_mqa", "kv_b_proj", "mlp.gate.weight", "eh_proj", "embed_tokens", "lm_head", "norm"):
        assert any(part in name for name in plain), part


def test_loading_gives_the_dequantised_weights_bit_for_bit(quantised: Path) -> None:
    tensors = load_file(quantised / "model.safetensors")
    loaded = dict(hf_tensors(load(quantised)))
    for spec in quantised_weights(MOE):
        module = spec.name.removesuffix(".weight")
        parts = [tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        assert torch.equal(loaded[spec.name], dequantize_gptq(*parts, bits=4)), spec.name


@pytest.mark.parametrize("words", [("--bits", "4"), ("--bits", "3"), ("--bits", "8", "--no-sym")])
def test_rounding_to_nearest_loads_as_the_fake_quantised_weights(words: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    assert quantize(root / "moe", tmp_path / "out", "--method", "rtn", "--group-size", "32", *words) == 0
    before, loaded = dict(hf_tensors(load(root / "moe"))), dict(hf_tensors(load(tmp_path / "out")))
    chosen = {spec.name for spec in quantised_weights(MOE)}
    for name, weight in before.items():
        if name in chosen:
            weight = dequantised(round_to_nearest(weight, int(words[1]), 32, "--no-sym" not in words))
        assert torch.equal(loaded[name], weight), name


def test_an_expert_that_no_token_reaches_is_told_and_rounded_to_nearest(root: Path, tmp_path: Path, capsys) -> None:
    assert quantize(root / "moe", tmp_path / "out", *SETTINGS, "--calibration", root / "text.txt") == 0
    printed = capsys.readouterr().out
    assert f"layer 1: experts rounded to nearest, with fewer than 20 calibration tokens: {NEVER_SEEN} (0)" in printed
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    matrices = {m["name"]: m for layer in report["layers"] for m in layer["matrices"]}
    name = f"model.layers.1.mlp.experts.{NEVER_SEEN}.up_proj.weight"
    assert (matrices[name]["method"], matrices[name]["tokens"], matrices[name]["error"]) == ("rtn", 0, None)
    weight = dict(hf_tensors(load(root / "moe")))[name]
    loaded = dict(hf_tensors(load(tmp_path / "out")))[name]
    assert torch.equal(loaded, dequantised(round_to_nearest(weight, 4, 32, True)))
    experts = [m["tokens"] for n, m in matrices.items() if n.startswith("model.layers.1.mlp.experts.") and "up_proj" in n]
    assert sum(experts) == 2 * report["calibration_tokens"]  # every token goes to two experts
    assert matrices["model.layers.0.mlp.up_proj.weight"]["method"] == "gptq"


def test_experts_fall_back_by_the_tokens_that_they_saw(root: Path, tmp_path: Path, capsys) -> None:
    text = ("--calibration", root / "text.txt")
    assert quantize(root / "moe", tmp_path / "all", *SETTINGS[:-1], "1", *text) == 0
    capsys.readouterr()
    # The calibration tokens through the quantised layer 0 and the plain layer 1, each choice of its router counted.
    words = [str(root / "moe"), "x", *SETTINGS, "--calibration", str(root / "text.txt")]
    calibration, _ = _sequences(parse_arguments(QuantizeFields, words, verb="quantize"), MOE)
    model, first = load(root / "moe"), load(tmp_path / "all")
    model.blocks[0].load_state_dict(first.blocks[0].state_dict())
    assert isinstance(model.blocks[1].mlp, MoE)
    chosen: list[torch.Tensor] = []
    model.blocks[1].mlp.gate.register_forward_hook(lambda module, arguments, output: chosen.append(output[1].indices))
    with torch.no_grad():
        model(calibration)
    counts = torch.cat([experts.flatten() for experts in chosen]).bincount(minlength=4).tolist()
    least = sorted(counts)[2]  # so that two of the four have fewer
    assert 0 < sorted(counts)[1] < least
    assert quantize(root / "moe", tmp_path / "out", *SETTINGS[:-1], str(least), *text) == 0
    few = {expert: count for expert, count in enumerate(counts) if count < least}
    told = ", ".join(f"{expert} ({count})" for expert, count in few.items())
    assert f"layer 1: experts rounded to nearest, with fewer than {least} calibration tokens: {told};" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    matrices = {m["name"]: m for layer in report["layers"] for m in layer["matrices"]}
    everyone = load_file(tmp_path / "all" / "model.safetensors")
    own = load_file(tmp_path / "out" / "model.safetensors")
    for expert, count in enumerate(counts):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.mlp.experts.{expert}.{projection}"
            matrix = matrices[f"{name}.weight"]
            assert (matrix["tokens"], matrix["method"]) == (count, "rtn" if expert in few else "gptq")
            same = torch.equal(own[f"{name}.qweight"], everyone[f"{name}.qweight"])
            assert same == (expert not in few or count == 0), name


def test_the_whole_files_ratio_is_told_beside_that_of_the_matrices(root: Path, quantised: Path, tmp_path: Path, capsys) -> None:
    assert quantize(root / "moe", tmp_path / "out", "--method", "rtn", "--group-size", "32") == 0
    before, after = (
        {name: tensor.numel() * tensor.element_size() for name, tensor in load_file(path / "model.safetensors").items()}
        for path in (root / "moe", tmp_path / "out")
    )
    plain = before.keys() & after.keys()
    matrices = [sum(size for name, size in sizes.items() if name not in plain) for sizes in (before, after)]
    whole = [sum(sizes.values()) for sizes in (before, after)]
    told = f"matrices {matrices[0] / matrices[1]:.2f} times smaller, all weights {whole[0] / whole[1]:.2f} times"
    assert told in capsys.readouterr().out
    assert matrices[0] / matrices[1] > 1.2 * whole[0] / whole[1]


def test_held_out_sequences_are_as_many_as_asked_for_and_spread(root: Path) -> None:
    words = [str(root / "moe"), "x", *SETTINGS, "--calibration", str(root / "text.txt"), "--samples", "8", "--held-out", "4"]
    calibration, held_out = _sequences(parse_arguments(QuantizeFields, words, verb="quantize"), MOE)
    assert (calibration.shape, held_out.shape) == ((8, 32), (4, 32))
    words = [*words[:-4], "--samples", "12", "--held-out", "1"]
    everything, last = _sequences(parse_arguments(QuantizeFields, words, verb="quantize"), MOE)
    sequences = torch.cat((everything, last))[:12]
    assert [int((sequences == row).all(1).nonzero()) for row in held_out] == [2, 5, 8, 11]


def test_the_reports_perplexities_are_those_of_the_two_models(root: Path, quantised: Path) -> None:
    words = [str(root / "moe"), "x", *SETTINGS, "--calibration", str(root / "text.txt")]
    _, held_out = _sequences(parse_arguments(QuantizeFields, words, verb="quantize"), MOE)
    report = json.loads((quantised / "quantization_report.json").read_text())
    assert report["held_out_tokens"] == held_out.numel() > 0
    for when, directory in (("before", root / "moe"), ("after", quantised)):
        with torch.no_grad():
            logits = load(directory)(held_out)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
        assert report["perplexity"][when] == pytest.approx(float(loss.exp()), rel=1e-4)
    size = report["bytes"]["all"]["after"]
    assert 0 <= (quantised / "model.safetensors").stat().st_size - size < 100_000


@pytest.mark.parametrize("words", [(), ("--act-order", "--no-sym"), ("--bits", "3")])
def test_gptq_errs_less_than_rounding_and_a_dense_model_generates(words: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    text = ("--calibration", root / "text.txt")
    assert quantize(root / "dense", tmp_path / "gptq", *SETTINGS, *words, *text) == 0
    kept = [word for word in words if word != "--act-order"]
    assert quantize(root / "dense", tmp_path / "rtn", "--method", "rtn", *SETTINGS, *kept, *text) == 0
    errors = []
    for name in ("gptq", "rtn"):
        report = json.loads((tmp_path / name / "quantization_report.json").read_text())
        errors.append(sum(m["error"] for m in report["layers"][0]["matrices"]))
    assert errors[0] < 0.9 * errors[1]
    if not words:
        greedy = SamplingParams(temperature=0.0, max_tokens=4)
        save(load(tmp_path / "gptq"), tmp_path / "plain")
        texts = [LLM(tmp_path / name, device="cpu").generate(["the fox"], greedy)[0] for name in ("gptq", "plain")]
        assert texts[0].token_ids == texts[1].token_ids


def test_a_killed_run_goes_on_after_its_last_layer_and_ends_in_the_same_bytes(
    root: Path, quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (root / "moe", tmp_path / "out", *SETTINGS, "--calibration", root / "text.txt")
    original, made = pipeline._quantise_layer, list[int | str]()

    def killed_in_layer_1(block, source, layer, config, x, path) -> None:  # type: ignore[no-untyped-def]
        if made == [0]:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(layer)
        original(block, source, layer, config, x, path)

    monkeypatch.setattr(pipeline, "_quantise_layer", killed_in_layer_1)
    assert quantize(*words) == 130
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.part" / "layer-00000.safetensors").exists()
    assert quantize(*words) == 0
    assert made == [0, "killed", 1, 2]
    assert file_bytes(tmp_path / "out") == file_bytes(quantised)
    assert not (tmp_path / "out.part").exists()


def test_a_run_that_is_killed_before_its_report_leaves_no_directory_and_goes_on(
    root: Path, quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (root / "moe", tmp_path / "out", *SETTINGS, "--calibration", root / "text.txt")

    def killed(*arguments: object) -> dict[str, object]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("finback.commands.quantize._report", killed)
        assert quantize(*words) == 130
    assert not (tmp_path / "out").exists()
    assert quantize(*words) == 0
    assert file_bytes(tmp_path / "out") == file_bytes(quantised)
    assert not (tmp_path / "out.part").exists()


def test_what_lies_where_finished_layers_go_is_left_alone(root: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.part").mkdir()
    (tmp_path / "a.part" / "mine.txt").write_text("mine")
    (tmp_path / "b.part").write_text("mine")
    for name, sentence in (("a", "a.part holds something else"), ("b", "b.part is a file")):
        assert quantize(root / "moe", tmp_path / name, "--method", "rtn", "--group-size", "32") == 2
        assert sentence in capsys.readouterr().err
    assert (tmp_path / "a.part" / "mine.txt").read_text() == (tmp_path / "b.part").read_text() == "mine"


def test_weights_that_are_no_numbers_are_told(root: Path, tmp_path: Path, capsys) -> None:
    from tests.checkpoint_samples import rewrite_tensors

    shutil.copytree(root / "dense", tmp_path / "nan")
    rewrite_tensors(tmp_path / "nan", lambda t: t["model.layers.0.mlp.up_proj.weight"][0].fill_(float("nan")))
    text = ("--calibration", root / "text.txt")
    for method, sentence in (("rtn", "up_proj.weight: a weight is inf, nan"), ("gptq", "a weight is inf, nan")):
        assert quantize(tmp_path / "nan", tmp_path / "out", "--method", method, *SETTINGS, *text) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.part")


def test_a_resumed_run_must_be_the_same(root: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "run.json").write_text('{"input": "another"}')
    assert quantize(root / "moe", tmp_path / "out", "--method", "rtn", "--group-size", "32") == 2
    assert "holds layers of a run with other weights, settings or text" in capsys.readouterr().err


def test_fp8_is_what_convert_writes(root: Path, tmp_path: Path) -> None:
    assert quantize(root / "moe", tmp_path / "ours", "--method", "fp8") == 0
    assert cli.main(["convert", str(root / "moe"), str(tmp_path / "theirs"), "--fp8"]) == 0
    assert file_bytes(tmp_path / "ours") == file_bytes(tmp_path / "theirs")


def test_convert_makes_a_quantised_directory_plain(quantised: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(quantised), str(tmp_path / "plain"), "--dtype", "float32"]) == 0
    ours, expected = dict(hf_tensors(load(tmp_path / "plain"))), dict(hf_tensors(load(quantised)))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--bits", "5"), "--bits is 5, it must be one of 3, 4, 8"),
        (("--group-size", "0"), "--group-size is 0, it must be positive, or -1"),
        (
            ("--group-size", "24"),
            "--group-size is 24, which does not divide the width 32 of model.layers.0.self_attn.q_a_proj.weight; 16 divides every",
        ),
        (("--method", "rtn", "--act-order"), "--act-order is for gptq"),
        (("--calibration", "EMPTY"), "--calibration holds 0 tokens, too few: two sequences of 32 are the least"),
        (("--calibration", "SHORT"), "tokens, too few: two sequences of 32 are the least; give more text"),
        (("--calibration", "missing.txt"), "missing.txt does not exist"),
        ((), "--calibration is missing, gptq needs text"),
        (("--sequence-length", "4096", "--calibration", "SHORT"), "--sequence-length is 4096, it must lie between 16 and 128"),
        (("--method", "fp8", "--calibration", "SHORT"), "--calibration is for gptq and rtn"),
        (("--method", "fp8"), "--group-size is for gptq and rtn, FP8 blocks have no use for it"),
        (("--held-out", "0", "--calibration", "SHORT"), "--held-out is 0, it must be positive"),
    ],
)
def test_bad_input_is_one_sentence_before_work_starts(
    words: tuple[str, ...], sentence: str, root: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "EMPTY.txt").write_text("")
    (tmp_path / "SHORT.txt").write_text("the fox")
    named = [str(tmp_path / f"{word}.txt") if word in ("EMPTY", "SHORT") else word for word in words]
    others = [word for pair in zip(SETTINGS[::2], SETTINGS[1::2], strict=True) if pair[0] not in words for word in pair]
    assert quantize(root / "moe", tmp_path / "out", *others, *named) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


def test_an_input_that_is_quantised_already_is_told(root: Path, quantised: Path, tmp_path: Path, capsys) -> None:
    for method in ("gptq", "rtn", "fp8"):
        words = ("--calibration", root / "text.txt") if method == "gptq" else ()
        assert quantize(quantised, tmp_path / "out", "--method", method, *SETTINGS, *words) == 2
        assert "is quantised already (gptq); finback convert makes it plain" in capsys.readouterr().err


def test_a_damaged_directory_names_the_part(quantised: Path, tmp_path: Path) -> None:
    from tests.checkpoint_samples import rewrite_tensors

    name = "model.layers.0.mlp.down_proj"
    damages = {
        f"lacks {name}.scales": lambda t: t.pop(f"{name}.scales"),
        f"{name}.qzeros as I32": lambda t: t.update({f"{name}.qzeros": torch.zeros(2, 5, dtype=torch.int32)}),
        f"groups in {name}.g_idx that have no scale": lambda t: t[f"{name}.g_idx"].fill_(2),
    }
    for number, (sentence, change) in enumerate(damages.items()):
        directory = tmp_path / str(number)
        shutil.copytree(quantised, directory)
        rewrite_tensors(directory, change)
        with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
            load(directory)
