"""Data of the training tests."""

from tests.train.conftest import micro_data

__all__ = ["micro_data"]
