"""A request's tokens, and what it resolves from its parameters; none of this room's pure modules needs torch."""

import subprocess
import sys

from finback.engine.config import DEFAULT_MAX_TOKENS, SamplingParams
from finback.engine.request import Request, RequestState

PROGRAM = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None
from finback.engine import blocks, config, request, scheduler
"""


def test_imports_without_torch() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=300)


def test_tokens_of_prompt_and_answer_stay_together() -> None:
    prompt = [1, 2, 3]
    request = Request(7, prompt, SamplingParams())
    assert (request.token_ids, request.num_tokens, request.output_token_ids) == ([1, 2, 3], 3, [])
    request.append([4])
    request.append([5, 6])
    request.append([])
    assert (request.token_ids, request.num_tokens, request.output_token_ids) == ([1, 2, 3, 4, 5, 6], 6, [4, 5, 6])
    assert prompt == [1, 2, 3]


def test_a_new_request_waits_and_holds_nothing() -> None:
    request = Request(7, [1], SamplingParams())
    assert (request.state, request.finish_reason) == (RequestState.WAITING, None)
    assert (request.num_computed_tokens, request.num_cached_tokens, request.block_table) == (0, 0, [])
    assert repr(request) == "Request(7, waiting, 1+0 tokens, 0 computed, blocks [])"


def test_the_seed_is_the_given_one_or_the_parameters_or_drawn() -> None:
    assert Request(0, [1], SamplingParams(seed=0), seed=5).seed == 5
    assert Request(0, [1], SamplingParams(seed=0)).seed == 0
    drawn = {Request(0, [1], SamplingParams()).seed for _ in range(8)}
    assert len(drawn) == 8
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_max_tokens_has_a_default() -> None:
    assert Request(0, [1], SamplingParams(max_tokens=3)).max_tokens == 3
    assert Request(0, [1], SamplingParams()).max_tokens == DEFAULT_MAX_TOKENS
