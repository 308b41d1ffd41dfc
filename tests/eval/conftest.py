"""One small model for all tests of the evaluation room."""

import pytest

from finback.data.tokenizer import Tokenizer
from finback.engine.llm import LLM
from tests.eval.models import engine, small_model, small_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="session")
def llm(tokenizer: Tokenizer) -> LLM:
    return engine(small_model(tokenizer), tokenizer)
