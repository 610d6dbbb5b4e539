"""Fixtures and settings for all tests."""

import atexit
import gc
import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every machine, without deadlines. Function-scoped fixtures serve all examples of a test.
settings.register_profile(
    "any machine",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("any machine")

# Variables of launchers (interactive Slurm job, mpirun, torchrun) and terminals, which change behaviour and output.
LAUNCHERS = ("SLURM", "OMPI_", "PMI_", "PMIX_", "PALS_", "MV2_", "MPI_", "MPIEXEC_", "TORCHELASTIC_")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
TERMINAL = ("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


# Tests start hundreds of processes, and each worker imports all test modules: without bytecode, each compiles them.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts background commands with SIGINT ignored, which the processes of tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def full_collections():
    """Return a list with the number of full garbage collections when imported modules were last known to be frozen."""
    return [-1]


@pytest.fixture(scope="module", autouse=True)
def imports_are_frozen(full_collections):
    """Exempt imported modules from garbage collection, a million objects; a training run unfreezes them at its end."""
    # A training run also begins with a full collection; get_freeze_count passes over all frozen objects.
    if gc.get_stats()[-1]["collections"] != full_collections[0]:
        if not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            gc.set_threshold(20_000, 20, 20)
        full_collections[0] = gc.get_stats()[-1]["collections"]


@pytest.fixture(scope="session", autouse=True)
def plain_environment():
    """Remove the variables of launchers and terminals; set 80 columns."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(LAUNCHERS) or name in RANKS + TERMINAL:
                patch.delenv(name)
        patch.setenv("COLUMNS", "80")
        yield


@pytest.fixture(scope="session", autouse=True)
def exit_code_of_pytest():
    """Keep pytest's exit code: a call or a job that failed in this process would set its own at the exit."""
    yield
    from megatron_lite.backend import interruptible

    atexit.unregister(interruptible._end_if_running)
    atexit.unregister(interruptible.end_at_once)


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory):
    """Return a function that runs a test function on several gloo ranks (support/ranks.py)."""
    from support.ranks import RankPools

    pools = RankPools(lambda: tmp_path_factory.mktemp("ranks"))
    yield pools
    pools.close()
