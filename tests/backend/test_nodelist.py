"""Tests of the parser of Slurm node lists and task counts."""

import pytest

from megatron_lite.backend.nodelist import expand_counts, expand_nodes, ranks_by_node
from megatron_lite.errors import ConfigError


@pytest.mark.parametrize(
    ("nodelist", "nodes"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("n[3,5-7]", "n3 n5 n6 n7"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("gpu[007-010]-ib,head", "gpu007-ib gpu008-ib gpu009-ib gpu010-ib head"),
        ("a-b[01],c", "a-b01 c"),
        ("a[1-2]b[3-4]", "a1b3 a1b4 a2b3 a2b4"),
        ("r[01-02]n[1,3]x,s[5],t", "r01n1x r01n3x r02n1x r02n3x s5 t"),
        ("[10-11].cluster", "10.cluster 11.cluster"),
        ("x[098-101]", "x098 x099 x100 x101"),
    ],
)
def test_node_lists_are_expanded_in_order(nodelist, nodes):
    assert expand_nodes(nodelist) == nodes.split()


@pytest.mark.parametrize("nodelist", ["", "n[1-", "n[2-1]", "n[]", "n[a-b]", "n1,,n2", "n]1[", "n[[1]]", "n[1-2-3]"])
def test_an_invalid_node_list_is_refused(nodelist):
    with pytest.raises(ConfigError, match="host names with ranges in brackets"):
        expand_nodes(nodelist)


@pytest.mark.parametrize(
    ("counts", "expected"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2(x1),3", [1, 2, 3]), ("16(x2)", [16, 16])]
)
def test_counts_per_node_are_expanded(counts, expected):
    assert expand_counts(counts) == expected


@pytest.mark.parametrize("counts", ["", "a", "2(3)", "2(x)", "2,,3"])
def test_invalid_counts_are_refused(counts):
    with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE"):
        expand_counts(counts)


@pytest.mark.parametrize(
    ("variables", "world_size", "ranks"),
    [
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 4, {"n1": 2, "n2": 2}),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 8, {"n1": 4, "n2": 4}),
        ({"SLURM_JOB_NODELIST": "n1,n2"}, 4, {"n1": 2, "n2": 2}),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 3, {}),
        ({"SLURM_JOB_NODELIST": "n[1-"}, 2, {}),
        ({}, 2, {}),
    ],
)
def test_ranks_by_node(variables, world_size, ranks):
    assert ranks_by_node(world_size, variables) == ranks
