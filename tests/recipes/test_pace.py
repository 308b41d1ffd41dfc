"""A run is cut to what a slower machine can do in its minutes, once, and stays as it was cut."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from finback.config import InputError
from finback.presets import nano
from finback.recipes import pace
from finback.recipes.config import R1_SMALL, QuickstartConfig
from finback.recipes.pace import fit_to_machine, fitting_share, precision_here, training_speed
from finback.recipes.small_ladder import small_ladder
from finback.recipes.stages import Run, open_run
from tests.recipes.test_quickstart import small_preset


@pytest.mark.parametrize(
    ("room", "share"), [(5.0, 1.0), (1.06, 1.0), (1.04, 0.95), (0.9, 0.85), (0.64, 0.6), (0.5, 0.45), (0.1, 0.2), (0.0, 0.2)]
)
def test_a_run_is_cut_to_whole_twentieths(room: float, share: float) -> None:
    """A twentieth of the time is kept in hand, and a fifth of the run is always done."""
    assert fitting_share(room) == share


def _opened(directory: Path) -> Run:
    return open_run(directory, "quickstart", {}, fresh=False)


def test_a_slow_machine_does_a_part_and_the_same_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = QuickstartConfig(tokens=5_000_000, student_tokens=1_000_000, minutes=20.0)
    whole = 3.3 * 5_000_000 / (20 * 60)  # tokens a second that the whole run needs
    monkeypatch.setattr(pace, "training_speed", lambda preset, vocab_size: 0.64 * whole)
    cut = fit_to_machine(_opened(tmp_path), config, nano())
    assert (cut.tokens, cut.student_tokens, cut.ladder) == (3_000_000, 600_000, 0.6)
    told = capsys.readouterr().out
    assert "to end within 20 minutes, the run is cut to 60%" in told
    assert "solving sums" not in told

    monkeypatch.setattr(pace, "training_speed", lambda preset, vocab_size: 100 * whole)
    assert fit_to_machine(_opened(tmp_path), config, nano()) == cut


def test_a_cut_that_leaves_too_little_to_learn_from_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the minutes it names are enough, or the next machine's owner would be told the same again."""
    monkeypatch.setattr(pace, "training_speed", lambda preset, vocab_size: 4000.0)
    fit_to_machine(_opened(tmp_path / "cut"), QuickstartConfig(), nano())
    told = capsys.readouterr().out
    found = re.search(r"less than 2,250,000 tokens may not come to solving sums; here --minutes (\d+) should do", told)
    assert found is not None
    again = fit_to_machine(_opened(tmp_path / "again"), QuickstartConfig(minutes=float(found[1])), nano())
    assert 2_250_000 <= again.tokens <= 2_550_000
    assert "solving sums" not in capsys.readouterr().out


def test_a_machine_that_is_too_slow_for_the_least_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pace, "training_speed", lambda preset, vocab_size: 1000.0)
    cut = fit_to_machine(_opened(tmp_path), QuickstartConfig(tokens=5_000_000, minutes=20.0), nano())
    assert cut.tokens == 1_000_000
    assert "cut to 20%, the least there is, and takes about 55 minutes" in capsys.readouterr().out


def test_a_fast_machine_and_no_limit_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pace, "training_speed", lambda preset, vocab_size: 1e6)
    config = QuickstartConfig()
    assert fit_to_machine(_opened(tmp_path), config, nano()) == replace(config, precision=precision_here(config))
    assert _opened(tmp_path).manifest["pace"] == {"tokens_per_second": 1_000_000, "share": 1.0}
    assert "solving sums" not in capsys.readouterr().out

    monkeypatch.setattr(pace, "training_speed", lambda preset, vocab_size: 1.0)
    free = replace(config, minutes=None)
    assert fit_to_machine(_opened(tmp_path / "free"), free, nano()) == replace(free, precision=precision_here(free))
    small = replace(config, tokens=30_000)
    assert fit_to_machine(_opened(tmp_path / "small"), small, nano()) == replace(small, precision=precision_here(small))
    assert "pace" not in _opened(tmp_path / "small").manifest


@pytest.mark.parametrize(("multiplies", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_the_precision_is_what_the_processor_multiplies_and_stays(
    multiplies: bool, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bfloat16 has to be widened, a step takes a third longer in it. A run that moves to another machine goes on as it began."""
    monkeypatch.setattr(pace, "cpu_multiplies_bfloat16", lambda: multiplies)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    timed = []
    monkeypatch.setattr(pace, "training_speed", lambda preset, vocab_size: timed.append(preset.precision) or 1e6)
    found = fit_to_machine(_opened(tmp_path), QuickstartConfig(), nano())
    assert found.precision == chosen
    assert timed == [chosen]
    ladder = small_ladder(tmp_path, found)
    assert {ladder.zero.precision, ladder.reasoning.precision, ladder.cold_start.precision, ladder.student.precision} == {chosen}
    monkeypatch.setattr(pace, "cpu_multiplies_bfloat16", lambda: not multiplies)
    assert fit_to_machine(_opened(tmp_path), QuickstartConfig(), nano()) == found
    for asked in ("bf16", "fp32"):
        assert fit_to_machine(_opened(tmp_path / asked), QuickstartConfig(precision=asked), nano()).precision == asked


def test_the_speed_is_that_of_real_steps() -> None:
    """A step of more tokens shares out what every step costs."""
    preset = small_preset()
    few, many = (training_speed(replace(preset, micro_batch_size=size, global_batch_size=16), 300) for size in (1, 16))
    assert 0.0 < few < many


def test_a_wrong_number_of_minutes_is_told() -> None:
    with pytest.raises(InputError, match=r"field minutes is 0\.0, it must be above 0"):
        QuickstartConfig(minutes=0.0)
    assert R1_SMALL.minutes == 120.0
