"""Fixtures and settings of all tests."""

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every machine, however slow or busy it is. Function-scoped fixtures serve all examples of a test.
settings.register_profile(
    "any machine",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory):
    """Calls a function on several gloo ranks, with a world size and arguments: one result a rank. See ranks.py."""
    from support.ranks import RankPools

    pools = RankPools(lambda: tmp_path_factory.mktemp("ranks"))
    yield pools
    pools.close()
