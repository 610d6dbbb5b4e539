"""Fixtures of all tests."""

import pytest


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory):
    """Calls a function on several gloo ranks, with a world size and arguments: one result a rank. See ranks.py."""
    from ranks import RankPools

    pools = RankPools(lambda: tmp_path_factory.mktemp("ranks"))
    yield pools
    pools.close()
