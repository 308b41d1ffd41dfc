"""`finback r1 small`, end to end with very small models; its claims by hand-made numbers; and, slowly, the real recipe."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finback.cli import main
from finback.config import InputError, ModelConfig
from finback.presets import micro, nano_dense
from finback.recipes.ablations import rl_flops, rl_step_flops
from finback.recipes.config import R1_SMALL, QuickstartConfig
from finback.recipes.r1_small import r1_small
from finback.recipes.small_claims import claims, claims_table
from finback.recipes.sums_with_room import roomy_ladder
from finback.rl.config import GRPOConfig
from finback.train.throughput import training_flops_per_token
from tests.recipes.test_quickstart import PNG, small_config, small_preset, small_student

MODELS = (
    "base",
    "r1-zero",
    "r1-zero-language",
    "cold-start",
    "reasoning-rl",
    "rejection-sft",
    "all-scenario-rl",
    "student",
    "student-rl",
)


def climb(out: Path, **more: object) -> Path:
    return r1_small(small_config(out, **{"ladder": 0.01, "tokens": 30_000, **more}), small_preset(), small_student())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, shared by the tests below, which only look at it."""
    out = tmp_path_factory.mktemp("runs") / "r1-small"
    assert climb(out) == out / "final"
    return out


def test_every_stage_leaves_a_model_and_its_numbers(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["recipe"] == "r1-small"
    for name in (*MODELS, "student-base", "final"):
        assert (run / name / "model.safetensors").is_file(), name
    for name in MODELS[1:]:
        facts = manifest["stages"][name]
        assert facts["tokens"] > 0
        assert facts["seconds"] > 0
        assert facts["trained_from"] in ("base", "cold-start", "rejection-sft", "student-base")
        assert set(facts["results"]) == {"sums", "longer sums"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((run / name).read_bytes()).hexdigest() == digest, name
    assert (run / "final" / "model.safetensors").read_bytes() == (run / "all-scenario-rl" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_two_runs_of_r1_zero_differ_in_one_reward(run: Path) -> None:
    without, rewarded = (
        json.loads((run / "training" / name / "config.json").read_text()) for name in ("r1-zero", "r1-zero-language")
    )
    assert rewarded["reward"] == [*without["reward"], "finback.rewards.language:language_consistency"]
    assert {**rewarded, "reward": None} == {**without, "reward": None}


@pytest.mark.slow
def test_the_report_has_every_model_claim_and_curve(run: Path) -> None:
    report = (run / "report.md").read_text()
    for name in MODELS:
        assert f"| {name} | sums |" in report
        assert f"| {name} | longer sums |" in report
    for claim in json.loads((run / "manifest.json").read_text())["stages"]["report"]["claims"]:
        assert claim["claim"] in report
        assert claim["measured"] in report
    assert "sums: 0 of" in report
    assert report.count("▌") >= 5  # a dialogue of each reinforcement learning at least
    for name in ("r1-zero", "r1-zero-language", "reasoning-rl", "all-scenario-rl", "student-rl"):
        assert f"training/{name}/plots/curves.png" in report
        assert (run / "training" / name / "plots" / "curves.png").read_bytes().startswith(PNG)
    assert (run / "plots" / "ladder.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is_and_an_unfinished_one_goes_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "manifest.json").read_bytes()
    climb(run)
    assert "finished already" in capsys.readouterr().out
    assert (run / "manifest.json").read_bytes() == before
    with pytest.raises(InputError, match="was started with seed 3, not 4"):
        climb(run, seed=4)


def _numbers(mean: float, *, greedy: float = 0.5, mixed: float = 0.0, form: float = 1.0) -> dict[str, Any]:
    numbers = {
        "pass_at_1": [mean, mean - 0.02, mean + 0.02],
        "greedy": [greedy, greedy - 0.02, greedy + 0.02],
        "pass_at_k": [0.9, 0.88, 0.92],
        "scores": [mean] * 40,
        "mixing_rate": mixed,
        "format_rate": form,
    }
    return {"results": {"sums": numbers, "longer sums": _longer}}


_longer: dict[str, Any] = {}  # the claims are about the first set


def _stages(**changes: Any) -> dict[str, Any]:
    stages: dict[str, Any] = {
        "r1-zero": {"base": _numbers(0.2, greedy=0.3), **_numbers(0.6, greedy=0.6, mixed=0.3)},
        "r1-zero-language": _numbers(0.58, mixed=0.09),
        "cold-start": _numbers(0.5),
        "reasoning-rl": _numbers(0.7),
        "rejection-sft": _numbers(0.72),
        "all-scenario-rl": _numbers(0.8),
        "student": {"base": _numbers(0.02), **_numbers(0.4)},
        "student-rl": {"rl_flops": 1.2e12, "distillation_flops": 1e12, **_numbers(0.03)},
    }
    return stages | {name.replace("_", "-"): value for name, value in changes.items()}


def test_a_ladder_as_in_the_paper_bears_out_every_claim() -> None:
    verdicts = claims(_stages())
    assert [verdict.holds for verdict in verdicts] == [True] * 6
    assert verdicts[0].measured.startswith("pass@1 +40.0 points")
    assert "best" in verdicts[3].claim
    assert "rejection-sft 72.0% (70.0% to 74.0%)" in verdicts[3].measured
    assert "30.0% without, 9.0% with it; its price in pass@1: -2.0 points" in verdicts[5].measured
    assert claims_table(verdicts).count("| yes |") == 6


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (0, {"r1_zero": {"base": _numbers(0.31, greedy=0.3), **_numbers(0.6, greedy=0.6, mixed=0.3)}}),  # 29 points
        (0, {"r1_zero": {"base": _numbers(0.2, greedy=0.46), **_numbers(0.6, greedy=0.6, mixed=0.3)}}),  # 14 greedy
        (1, {"cold_start": _numbers(0.5, mixed=0.03)}),
        (1, {"cold_start": _numbers(0.5, form=0.94)}),
        (2, {"reasoning_rl": _numbers(0.54)}),  # its interval begins where the other ends
        (3, {"all_scenario_rl": _numbers(0.76)}),
        (3, {"r1_zero_language": _numbers(0.77)}),
        (4, {"student": {"base": _numbers(0.02), **_numbers(0.06)}}),
        (4, {"student_rl": {"rl_flops": 0.9e12, "distillation_flops": 1e12, **_numbers(0.03)}}),
        (5, {"r1_zero": {"base": _numbers(0.2, greedy=0.3), **_numbers(0.6, greedy=0.6, mixed=0.09)}}),
        (5, {"r1_zero_language": _numbers(0.58, mixed=0.11)}),
    ],
)
def test_a_claim_that_does_not_hold_is_told(place: int, changes: dict[str, Any]) -> None:
    verdicts = claims(_stages(**changes))
    assert not verdicts[place].holds
    assert "| no |" in claims_table(verdicts)


def test_flops_of_reinforcement_learning_by_hand() -> None:
    model: ModelConfig = nano_dense().model
    each = training_flops_per_token(model, 50)
    settings = GRPOConfig(model="", prompts_per_step=2, num_generations=3)
    assert rl_step_flops(settings, model, 20.0, 30.0) == pytest.approx(6 * 30 * each / 3 + (2 * 20 + 6 * 30) * each)
    rows = [
        {"tokens": 100, "tokens_per_second": 10.0, "training_seconds": 4.0},
        {"tokens": 300, "tokens_per_second": 20.0, "training_seconds": 3.0},
    ]
    assert rl_flops(rows, model, 50.0) == pytest.approx(300 * each / 3 + 100 * each)


def test_the_stages_behind_r1_zero_are_the_longer_ones(tmp_path: Path) -> None:
    ladder = roomy_ladder(tmp_path, R1_SMALL)
    assert ladder.reasoning.steps + ladder.all_scenario.steps > 2 * ladder.zero.steps
    assert (
        ladder.zero.max_completion_length == ladder.reasoning.max_completion_length == ladder.all_scenario.max_completion_length
    )
    assert ladder.gate == "tell"
    assert roomy_ladder(tmp_path, replace(R1_SMALL, gate="stop")).gate == "stop"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["small", "--tokens", "0"], "field tokens is 0"),
        (["small", "--zero-steps", "3"], "unknown field --zero-steps"),
        (["--out", "somewhere", "small"], "the word small comes first"),
        (["./small"], "field data is missing"),  # a directory of that name
    ],
)
def test_small_is_a_word_and_not_a_directory(capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    assert main(["r1", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_its_help_has_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["r1", "small", "--help"])
    page = capsys.readouterr().out
    assert "runs/r1-small" in page
    assert f"{R1_SMALL.tokens}" in page


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_claims_hold(tmp_path: Path, seed: int) -> None:
    """The real recipe, 40 minutes for each seed."""
    config: QuickstartConfig = replace(R1_SMALL, out=str(tmp_path / "run"), seed=seed)
    r1_small(config, micro(), nano_dense())
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    claims_of_the_run = stages["report"]["claims"]
    assert len(claims_of_the_run) == 6
    assert not [f"{claim['claim']}: {claim['measured']}" for claim in claims_of_the_run if not claim["holds"]]
