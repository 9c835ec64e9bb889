"""Fixtures of several integration tests."""

from collections.abc import Iterator

import pytest
from ranks import RankProcesses


@pytest.fixture(scope="module")
def on_ranks() -> Iterator[RankProcesses]:
    ranks = RankProcesses()
    yield ranks
    ranks.close()
