"""How many threads a program takes while others keep the cores: the decision, by times that are made up."""

import ctypes
from ctypes import POINTER, c_double, c_int64

import pytest

from finback.ops.native.build import SOURCES, BuildError, _library
from tests.ops.native.rule import compiled


class State(ctypes.Structure):
    """As in company.h."""

    _fields_ = [(name, c_double) for name in ("ran", "absent", "until", "pause")] + [("fewer", c_int64)]


class Company:
    """A team whose programs take 10 ms each."""

    def __init__(self, threads: int) -> None:
        compiled()
        try:
            library = _library(SOURCES)
        except BuildError as error:
            pytest.skip(str(error))
        self._judge, self._members = library.company_judge, library.company_members
        self._judge.restype, self._judge.argtypes = None, [POINTER(State), c_int64, c_double, c_double, c_double]
        self._members.restype, self._members.argtypes = c_int64, [POINTER(State), c_int64, c_double]
        self.threads, self.now, self.state = threads, 1000.0, State()

    def members(self) -> int:
        return int(self._members(self.state, self.threads, self.now))

    def run(self, programs: int, absent: float) -> list[int]:
        """The size of the team in each of them; `absent` is the share of the time in which a member has no core."""
        sizes = []
        for _ in range(programs):
            sizes.append(self.members())
            self.now += 0.01
            if sizes[-1] > 1:
                self._judge(self.state, sizes[-1], 0.01, 0.01 * absent, self.now)
        return sizes


def test_alone_all_threads_run() -> None:
    assert set(Company(2).run(2000, 0.02)) == {2}


def test_a_team_that_lost_a_core_for_half_of_the_time_runs_without_that_member_for_a_while() -> None:
    company = Company(2)
    assert company.run(5, 0.7) == [2] * 5
    assert company.run(49, 0.7) == [1] * 49  # half a second
    company.now += 0.02
    assert company.members() == 2
    assert set(company.run(5, 0.4)) == {2}  # less than half: two are as fast


def test_pauses_grow_while_the_company_stays_and_begin_short_when_it_has_gone() -> None:
    company = Company(2)
    alone = []
    for _ in range(7):
        company.run(5, 0.9)
        start = company.now
        while company.members() == 1:
            company.now += 0.01
        alone.append(company.now - start)
    assert alone == pytest.approx([0.5, 1, 2, 4, 8, 8, 8], abs=0.02)
    company.run(5, 0.0)
    company.run(5, 0.9)
    assert company.state.pause == 0.5


def test_larger_teams_lose_one_member_at_a_time_and_only_where_that_pays() -> None:
    company = Company(8)
    assert set(company.run(100, 0.1)) == {8}  # one part in eight
    sizes = company.run(40, 0.5)
    assert sizes[::5] == [8, 7, 6, 5, 4, 3, 2, 2]
    assert Company(1).run(3, 0.9) == [1, 1, 1]
