"""What must work, and answer fast, without torch: the package itself, its help, its configuration, and doctor."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finback.cli import VERBS
from finback.config import ModelConfig, count_params

ROOT = Path(__file__).parents[1]

BLOCK_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "triton", "fastapi", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run_blocked(program: str) -> subprocess.CompletedProcess[str]:
    """Run `program` in a new interpreter to which torch and the heavy optional packages do not exist."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH + program],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def run_verb(*words: str) -> subprocess.CompletedProcess[str]:
    return run_blocked(f"from finback.cli import main\nsys.exit(main({list(words)!r}))")


def test_the_block_works():
    done = run_blocked("import torch")
    assert done.returncode == 1
    assert "blocked" in done.stderr


def test_import_and_public_names_need_no_torch():
    program = """
import finback
assert finback.ModelConfig.__module__ == finback.count_params.__module__ == "finback.config"
assert issubclass(finback.InputError, ValueError)
assert set(finback.__all__) <= set(dir(finback))
assert "torch" not in sys.modules
"""
    done = run_blocked(program)
    assert done.returncode == 0, done.stderr


def test_configuration_needs_no_torch():
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        max_position_embeddings=128,
    )
    published = config.to_dict()
    program = f"import finback; print(finback.count_params(finback.ModelConfig.from_dict({published!r})).total)"
    prices = "from finback.commands.doctor import preset_needs; assert preset_needs()['tiny']['memory_bytes'] > 0"
    done = run_blocked(f"{program}; {prices}")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == count_params(config).total


def test_help_needs_no_torch():
    done = run_verb("--help")
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


EACH_VERB = """
import contextlib, io, json
from finback.cli import VERBS, main

said = {}
for verb in VERBS:
    for option in ("--help", "--helq"):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([verb, option])
            except SystemExit as end:
                code = end.code
        said[f"{verb} {option}"] = code or 0, out.getvalue(), err.getvalue()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, list[Any]]:
    """Exit code, output and error of each verb asked for help, well spelt and not: in one interpreter, to which torch stays missing."""
    done = run_blocked(EACH_VERB)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself_without_torch(said: dict[str, list[Any]], verb: str):
    code, out, err = said[f"{verb} --help"]
    assert code == 0, err
    assert out.startswith(f"usage: finback {verb}")
    assert "--help" in out


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_names_the_nearest_field_without_torch(said: dict[str, list[Any]], verb: str):
    code, _, err = said[f"{verb} --helq"]
    assert code == 2
    assert "unknown field --helq" in err
    assert len(err.strip().splitlines()) == 1


def test_doctor_reports_a_missing_torch():
    done = run_verb("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["torch"] == {"error": "not installed"}
    assert {"quickstart", "pretrain tiny", "pretrain v3-671b"} <= {ability["name"] for ability in report["abilities"]}
    assert {ability["runs"] for ability in report["abilities"]} == {"no"}
    assert {ability["why"] for ability in report["abilities"]} == {"torch is not installed"}
    assert any("torch is not installed" in sentence for sentence in report["warnings"])


def test_a_verb_that_computes_says_what_is_missing():
    done = run_blocked("""
import finback.cli
sys.modules["finback.commands.needy"] = needy = type(sys)("needy")
def main(argv):
    import torch
needy.main = main
finback.cli.VERBS["doctor"] = ("", "finback.commands.needy:main")
sys.exit(finback.cli.main(["doctor"]))
""")
    assert done.returncode == 2
    assert done.stderr.startswith("finback doctor: this needs the Python package torch, which is not installed")
    assert len(done.stderr.strip().splitlines()) == 1
