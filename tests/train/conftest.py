"""Data that the training tests share."""

from pathlib import Path

import pytest

from tests.train.runs import write_micro_data


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `tokens` (shards) and `tokenizer`."""
    return write_micro_data(tmp_path_factory.mktemp("micro-data"))
