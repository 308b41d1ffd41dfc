"""What every test gets: the same seeds, one torch thread per worker where several share the machine, no deadlines."""

import os
import random
import sys

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each start a thread per core mostly wait for each other. Set before torch loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton decides when it is imported whether kernels are interpreted, and other packages import it; there is nothing else to run them.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Time says nothing about correctness on a shared machine.
settings.register_profile("finback", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("finback-ci", settings.get_profile("finback"), derandomize=True, database=None)
settings.load_profile("finback-ci" if os.environ.get("CI") else "finback")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start each test from the same random state, so that tests pass in any order; torch only where it is loaded."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
