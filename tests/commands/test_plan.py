"""`finback plan` at the terminal: every kind as table and as JSON, pictures, and one sentence for whatever is wrong."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finback.cli import main
from finback.commands.machine import read_hardware
from finback.config import ModelConfig
from finback.presets import v3_671b
from tests.test_torch_blocked import run_verb

ROOT = Path(__file__).parents[2]
CEILINGS = str(ROOT / "bench" / "results" / "ceilings.json")
KINDS = {
    "model": ["model", "v3-671b"],
    "train": ["train", "v3-671b", "--pp", "16", "--ep", "64", "--schedule", "dualpipe"],
    "rl": ["rl", "v3-671b"],
    "serve": ["serve", "v3-671b"],
    "fit": ["fit", "rtx4090"],
    "schedule": ["schedule", "dualpipe", "--stages", "4", "--microbatches", "8"],
    "hardware": ["hardware"],
    "validate": ["validate", "--results", str(ROOT / "bench" / "results")],
}
HUGE = "1" + 400 * "0"
DRAWN = ["model", "train", "rl", "serve", "fit", "schedule"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_prints_a_table_and_json(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *KINDS[kind]]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) > 5
    assert main(["plan", *KINDS[kind], "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize("kind", DRAWN)
def test_pictures_are_png_files(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *KINDS[kind], "--json", "--png", str(tmp_path / "plan.png")]) == 0
    json.loads(capsys.readouterr().out)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


def test_the_whole_search_answers_without_torch_and_within_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    """Processor time of the answer itself, which a busy machine does not stretch much."""
    assert main(["plan", "serve", "v3-671b", "--json"]) == 0  # imports everything
    start = time.process_time()
    assert main(["plan", "serve", "v3-671b", "--json"]) == 0
    assert time.process_time() - start < 1.0
    done = run_verb("plan", "train", "v3-671b", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"]["fits"] is True


@pytest.mark.parametrize(
    "words",
    [
        ["train", "v3-671b"],
        ["train", "v3-671b", "--devices", "600000000"],
        ["train", "v3-671b", "--devices", "1000000007"],
        ["train", "v3-671b", "--devices", "999999937", "--ep", "8"],
        ["serve", "v3-671b", "--redundant-experts", "999999937"],
        ["rl", "v3-671b", "--devices", "1000000000", "--pp", "999"],
        ["schedule", "one_f_one_b", "--stages", "20000", "--microbatches", "1"],
        ["schedule", "one_f_one_b", "--stages", "1000", "--microbatches", "12"],
        ["schedule", "dualpipe", "--stages", "64", "--microbatches", "186"],
    ],
    ids=" ".join,
)
def test_the_largest_questions_are_answered_soon(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Or refused, not in minutes: one second where nothing else runs, and six on a slow machine whose cores are shared."""
    main(["plan", "hardware"])  # imports, whose types and shapes are checked only under pytest
    capsys.readouterr()
    start = time.process_time()
    assert main(["plan", *words]) in (0, 2)
    assert time.process_time() - start < 15
    printed = capsys.readouterr()
    assert len(printed.out) > 100 or printed.err.count("\n") == 1


@pytest.mark.parametrize(("stages", "microbatches"), [(64, 187), (1000, 12)])
def test_the_largest_schedules_are_drawn_soon(
    stages: int, microbatches: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.process_time()
    words = ["--stages", str(stages), "--microbatches", str(microbatches), "--json", "--png", str(tmp_path / "plan.png")]
    assert main(["plan", "schedule", "one_f_one_b", *words]) == 0
    assert time.process_time() - start < 15  # one, where nothing else runs; six where cores are slow and shared
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_of_very_many_ranks_the_first_are_printed_and_the_rest_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "schedule", "1f1b", "--stages", "129", "--microbatches", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "The first 128 of 129 ranks; --json has all, --png draws all."
    drawn = [line.split()[0] for line in printed if re.match(r" *\d+  [.F]", line)]
    assert drawn == [str(rank) for rank in range(128)]
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ranks"]) == 129


def test_numbers_carry_their_units(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *KINDS["train"], "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["bill"].keys() == {"device_hours", "days", "cost_usd", "energy_mwh", "co2_tonnes"}
    assert all(name.endswith("_bytes") for name in plan["best"]["memory"])
    assert plan["best"]["layout"]["pp"] == 16


def test_the_rl_run_that_is_asked_without_a_layout_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "rl", "v3-671b", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["memory_gb"] < 0.92 * 80
    assert main(["plan", "rl", "v3-671b", "--recompute", "selective"]) == 0
    assert "GB per device, does not fit" in capsys.readouterr().out


def test_what_a_model_takes_bounds_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """`tiny` has shorter sequences than the default prompt."""
    assert main(["plan", "serve", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decode"]["fits"] is True


def test_a_directory_is_a_model_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(v3_671b().model.to_dict()))
    assert main(["plan", "model", str(tmp_path), "--json"]) == 0
    by_directory = json.loads(capsys.readouterr().out)
    assert main(["plan", "model", "v3-671b", "--json"]) == 0
    assert by_directory == json.loads(capsys.readouterr().out)
    assert by_directory["total_parameters"] == 671_026_419_200
    assert ModelConfig.from_hf(tmp_path).hidden_size == 7168


def test_this_machine_by_its_ceilings(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "train", "tiny", "--hardware", "measured", "--ceilings", CEILINGS, "--devices", "1", "--tokens", "1e7"]
    assert main([*words, "--global-batch-size", "8", "--sequence-length", "256", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["precision"] == "bf16"
    assert 1_000 < plan["tokens_per_second"] < 100_000
    assert plan["bill"]["cost_usd"] is None


def test_the_drawing_has_a_line_for_each_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "schedule", "1F1B", "--stages", "3", "--microbatches", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one_f_one_b, 3 stages, 4 micro-batches"
    assert lines[1].startswith("  0  F0  F1  F2  ")
    assert lines[3].startswith("  2  ........F0  B0      F1  B1      F2  B2      F3  B3")
    assert len({len(line) for line in lines[1:4]}) == 1


def test_the_schedule_json_is_what_an_executor_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    from finback.parallel.schedule import dualpipe

    assert main(["plan", "schedule", "dualpipe", "--stages", "4", "--microbatches", "8", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    schedule = dualpipe(4, 8)
    assert [len(actions) for actions in plan["ranks"]] == [len(actions) for actions in schedule]
    for told, actions in zip(plan["ranks"], schedule, strict=True):
        assert [(one["kind"], one["microbatch"], one["stage"]) for one in told] == [
            (a.kind.value, a.microbatch, a.stage) for a in actions
        ]
    assert plan["peak_live_activations"] == [5] * 4


def test_the_schedule_json_says_in_what_unit_its_times_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *KINDS["schedule"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time_unit"] == "that in which the costs are given"


def test_an_rl_plan_says_which_stages_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    """R1 has two RL stages and two of fine-tuning; steps are published of one only."""
    assert main(["plan", "rl", "v3-671b", "--recipe", "r1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["not_modelled"]
    assert "first RL stage" in told
    assert "not published" in told
    assert main(["plan", "rl", "v3-671b", "--recipe", "r1"]) == 0
    assert f"Not modelled: {told}." in capsys.readouterr().out
    assert main(["plan", "rl", "v3-671b"]) == 0
    assert "Not modelled" not in capsys.readouterr().out


@pytest.mark.parametrize("change", [{}, {"cpu": "Other CPU"}, {"cores": 77}, {"memory_total_bytes": 1e9}])
def test_ceilings_of_another_machine_are_warned_of(
    change: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(Path(CEILINGS).read_text())
    data["device"] |= {name: read_hardware(tmp_path)[name] for name in ("cpu", "cores", "memory_total_bytes")} | change
    (tmp_path / "ceilings.json").write_text(json.dumps(data))
    words = ["plan", "fit", "measured", "--ceilings", str(tmp_path / "ceilings.json"), "--json"]
    assert main(words) == 0
    printed = capsys.readouterr()
    json.loads(printed.out)
    if not change:
        assert printed.err == ""
    else:
        assert f"the ceilings are of {data['date'][:10]}, {data['device']['cpu']}, {data['device']['cores']} cores" in printed.err
        assert "python -m bench ceilings" in printed.err
        assert printed.err.count("\n") == 1


def test_validate_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *KINDS["validate"], "--out", str(tmp_path / "page.md")]) == 0
    capsys.readouterr()
    assert (tmp_path / "page.md").read_text() == (ROOT / "docs" / "plan-validation.md").read_text()


def test_help_names_every_kind_and_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("usage: finback plan")
    assert all(f"usage: finback plan {kind}" in page for kind in KINDS)
    assert all(field in page for field in ("--html", "--global-batch-size", "--hit-share", "--microbatches", "--ceilings"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "unknown kind of plan 'trian'; did you mean 'train'?"),
        (["model", "v3-67b"], "model 'v3-67b' is neither a preset nor a directory; did you mean 'v3-671b'?"),
        (["train", "v3-671b", "--hardware", "h80"], "--hardware is 'h80', which is unknown; did you mean 'h800'?"),
        (["train", "v3-671b", "--devises", "8"], "unknown field --devises; the nearest is --devices"),
        (["train", "v3-671b", "--pp", "24"], "--pp is 24, it must divide --devices / --tp (2048 / 1 = 2048); the nearest is 16"),
        (["train", "v3-671b", "--pp", "7"], "--pp is 7, it must divide --devices / --tp (2048 / 1 = 2048); the nearest is 8"),
        (["train", "v3-671b", "--pp", "64"], "--pp is 64, above the model's 61 layers; the nearest that divides is 32"),
        (["train", "v3-671b", "--global-batch-size", "15361"], "--global-batch-size is 15361"),
        (["train", "v3-671b", "--global-batch-size", "15361"], "the nearest that does is 15360"),
        (["train", "v3-671b", "--global-batch-size", "3100"], "the nearest that does is 3072"),
        (["train", "v3-671b", "--tokens", "1e308", "--json"], "--tokens is 1e+308, above 1e+18; use at most 1e+18"),
        (["train", "v3-671b", "--tokens", "inf", "--json"], "--tokens is inf, above 1e+18; use at most 1e+18"),
        (
            ["train", "v3-671b", "--usd-per-device-hour", "1e300"],
            "--usd-per-device-hour is 1e+300, above 1e+06; use at most 1e+06",
        ),
        (["serve", "v3-671b", "--usd-per-device-hour", "1e308", "--json"], "--usd-per-device-hour is 1e+308, above 1e+06"),
        (["serve", "v3-671b", "--usd-per-device-hour", "1e-308", "--json"], "--usd-per-device-hour is 1e-308, below 1e-06"),
        (
            ["serve", "v3-671b", "--context-tokens", "1e-320", "--json"],
            "--context-tokens is 9.99989e-321, below 1; use at least 1",
        ),
        (["schedule", "dualpipe", "--forward", "1e308", "--backward-input", "1e308"], "--forward is 1e+308, above 1e+09"),
        (["schedule", "dualpipe", "--forward", "1e-320"], "below 1e-09; use at least 1e-09"),
        (["schedule", "dualpipe", "--send", "1e300"], "--send is 1e+300, above 1e+09"),
        (
            ["train", "v3-671b", "--devices", HUGE],
            "--devices is a number of 401 digits, above 1000000000; use at most 1000000000",
        ),
        (["train", "v3-671b", "--devices", "-" + HUGE], "--devices is a number of 401 digits, below -1000000000"),
        (["train", "v3-671b", "--global-batch-size", HUGE], "--global-batch-size is a number of 401 digits, above 1000000000"),
        (["train", "v3-671b", "--pp", "2", "--stage-layers", HUGE, "1"], "--stage-layers holds a number of 401 digits, above"),
        (["fit", "rtx4090", "--context", HUGE], "--context is a number of 401 digits, above 1000000000"),
        (["train", "v3-671b", "--expert-imbalance", "0.1"], "--expert-imbalance is 0.1, below 1; use at least 1"),
        (["train", "v3-671b", "--pue", "0.5"], "--pue is 0.5, below 1; use at least 1"),
        (["train", "v3-671b", "--kg-co2-per-kwh", "-0.5"], "--kg-co2-per-kwh is -0.5, it must be at least 0"),
        (["train", "v3-671b", "--kg-co2-per-kwh", "nan"], "--kg-co2-per-kwh is nan, it must be at least 0"),
        (["serve", "v3-671b", "--hardware", "a100"], "each of 32 devices would hold 80 GB of weights; take --prefill-ep 48"),
        (["serve", "v3-671b", "--hardware", "ascend910b"], "each of 32 devices would hold 80 GB of weights; take --prefill-ep"),
        (
            ["serve", "v2-lite-16b", "--hardware", "laptop-rtx4070"],
            "laptop-rtx4070 has 8 GB, and 16 GB of weights in fp8 do not fit; take --hardware h800",
        ),
        (
            ["serve", "v2-lite-16b", "--hardware", "laptop-cpu"],
            "laptop-cpu has 32 GB, and 31 GB of weights in bf16 do not fit; take --hardware h800",
        ),
        (
            ["train", "v3-671b", "--tp", "16"],
            "--tp is 16, but a node of h800 has 8 devices and layers are cut inside a node; the nearest is 8",
        ),
        (["serve", "v3-671b", "--tp", "128"], "--tp is 128, but a node of h800 has 8 devices"),
        (
            ["serve", "tiny-dense", "--tp", "2", "--hardware", "laptop-m3max"],
            "has 1 device and layers are cut inside a node; use 1",
        ),
        (
            ["train", "v2-lite-16b", "--hardware", "rtx4090", "--devices", "64"],
            "rtx4090 has no published scale_out_gb_per_second",
        ),
        (
            ["train", "v3-671b", "--hardware", "laptop-m3max", "--devices", "1"],
            "of which laptop-m3max has 118 usable, and nothing connects it to others; take --hardware h800 and about 256 devices",
        ),
        (["validate", "--out", "."], "--out . is a directory; give a file"),
        (["model", "v3-671b", "--png", "."], "--png . is a directory; give a file"),
        (["train", "v3-671b", "--devices", "2047"], "the nearest that does is 2048"),
        (["train", "v3-671b", "--schedule", "dualpip"], "'one_f_one_b', 'zb1p'); did you mean 'dualpipe'?"),
        (["train", "v3-671b", "--sequence-length", "1000000"], "use at most 163840"),
        (
            ["train", "v3-671b", "--pp", "4", "--schedule", "zb1p", "--stage-layers", "61"],
            "has 1 numbers for 4 stages; the most even is --stage-layers 16",
        ),
        (["train", "v3-671b", "--tokens", "-1"], "--tokens is -1, it must be positive"),
        (["train", "v3-671b", "--tokens", "nan"], "--tokens is nan, it must be positive"),
        (["train", "v3-671b", "--hardware", "hygon-k100"], "has no published scale_out_gb_per_second"),
        (["train", "v3-671b", "--pp", "0"], "--pp is 0, it must be at least 1"),
        (["schedule", "dualpip"], "unknown schedule 'dualpip'; did you mean 'dualpipe'?"),
        (["schedule", "dualpipe", "--stages", "7"], "num_stages is 7, it must be divisible by 2; the nearest is 8"),
        (["schedule", "dualpipe", "--forward", "0"], "--forward is 0, it must be positive"),
        (["schedule", "zb1p", "--microbatches", "1000000"], "give fewer micro-batches"),
        (["schedule"], "NAME is missing"),
        (["schedule", "interleaved", "--stages", "8", "--microbatches", "16", "--chunks", "1000000"], "use at most --chunks 93"),
        (["schedule", "interleaved", "--stages", "100", "--microbatches", "200", "--chunks", "2"], "give fewer micro-batches"),
        (
            ["serve", "v3-671b", "--decode-ep", "100"],
            "--decode-ep is 100, it must divide experts with their copies (256 + 32); the nearest is 96",
        ),
        (["serve", "v3-671b", "--prefill-ep", "0"], "--prefill-ep is 0, it must be at least 1"),
        (["serve", "v3-671b", "--tp", "0"], "--tp is 0, it must be at least 1"),
        (["serve", "v3-671b", "--tp", "8"], "--tp is 8, but experts are spread over --prefill-ep 32 devices; use 1"),
        (["serve", "v3-671b", "--redundant-experts", "-60"], "--redundant-experts is -60, it must be at least 0"),
        (["serve", "v3-671b", "--context-tokens", "nan"], "--context-tokens is nan, it must be a positive number"),
        (["serve", "v3-671b", "--output-tokens-per-day", "inf", "--json"], "--output-tokens-per-day is inf"),
        (["serve", "v3-671b", "--prompt-tokens", "1e9"], "--prompt-tokens is 1000000000, above the model's max_position_embed"),
        (["serve", "v3-671b", "--usd-per-million-hit", "-1"], "--usd-per-million-hit is -1, it must be at least 0"),
        (["rl", "v3-671b", "--mean-tokens", "nan"], "--mean-tokens is nan, it must be a number of at least 1"),
        (["rl", "v3-671b", "--mtp-acceptance", "5"], "--mtp-acceptance is 5, it must be between 0 and 1"),
        (["rl", "v3-671b", "--pp", "0"], "--pp is 0, it must be at least 1"),
        (["rl", "v3-671b", "--ep", "0"], "--ep is 0, it must be at least 1"),
        (["rl", "v2-lite-16b", "--devices", "8", "--ep", "8"], "it must divide --devices / --ep (8 / 8 = 1); the nearest is 1"),
        (["rl", "v3-671b", "--hardware", "a100", "--precision", "fp8"], "a100 has no FP8 units; use bf16"),
        (["rl", "v3-671b", "--precision", "int4"], "invalid choice 'int4' for argument '--precision'"),
        (["train", "v3-671b", "--precision", "int4"], "invalid choice 'int4' for argument '--precision'"),
        (["serve", "tiny-dense", "--hardware", "laptop-cpu"], "no published"),
        (["fit", "rtx4090", "--context", "0"], "--context is 0"),
        (["hardware", "--png", "x.png"], "there is no picture of it"),
        (["rl", "v3-671b", "--devices", "500"], "--devices is 500"),
        (["train", "tiny", "--hardware", "measured", "--ceilings", "gone.json"], "run make bench first"),
        (["serve", "v3-671b", "--batch", "0"], "--batch is 0, but from 1 to 136 requests"),
        (["--html"], "--html"),
        (["--html", "."], "is a directory; give a file"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    "words",
    [
        ["train", "v3-671b", "--global-batch-size", "15360"],
        ["train", "v3-671b", "--global-batch-size", "3072"],
        ["train", "v3-671b", "--pp", "16"],
        ["train", "v3-671b", "--pp", "8"],
        ["train", "v3-671b", "--pp", "32"],
        ["serve", "v3-671b", "--hardware", "a100", "--prefill-ep", "48"],
        ["serve", "v3-671b", "--hardware", "ascend910b", "--prefill-ep", "144"],
        ["serve", "v2-lite-16b", "--hardware", "h800"],
        ["train", "v3-671b", "--tokens", "1e18", "--usd-per-device-hour", "1e6"],
        ["schedule", "dualpipe", "--forward", "1e9", "--backward-input", "1e-9"],
    ],
    ids=" ".join,
)
def test_what_an_error_offers_is_taken(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words, "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["plan", *words]) == 0


@pytest.mark.parametrize("words", [["model", "v3-671b", "--png"], ["--html"], ["validate", "--out"]], ids=" ".join)
def test_a_file_in_a_directory_that_is_not_there_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slip in a path makes no directory."""
    directory = tmp_path / "missing"
    assert main(["plan", *words, str(directory / "plan")]) == 2
    assert f"{words[-1]} {directory / 'plan'}: there is no directory {directory}; make it first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    assert main(["plan", "--html", str(tmp_path / "plan.html")]) == 0
    assert (tmp_path / "plan.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


def test_python_m_runs_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finback", "plan", "model", "tiny"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "attention projections" in done.stdout
