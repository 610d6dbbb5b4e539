from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.counts import head_forward_flops, layer_forward_flops
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.partition import num_stages, stage_layers


def counts(layers, parallel, **model):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 32, **model}
    return [len(part) for part in stage_layers(ModelConfig(num_layers=layers, **shape), parallel)]


METHODS = ["balanced", "uniform", "parameters", "type:transformer", "type:transformer|embedding", "type:embedding"]


@given(st.integers(1, 60), st.integers(1, 16), st.sampled_from(METHODS), st.sampled_from([0, 64, 50000]))
def test_every_layer_has_one_stage_and_every_stage_a_layer(layers, stages, method, vocabulary):
    stages = min(stages, layers)
    model = ModelConfig(num_layers=layers, hidden_size=64, num_attention_heads=4, vocab_size=vocabulary)
    parts = stage_layers(model, ParallelConfig(world_size=stages, pp=stages, partition_method=method))
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert len(parts) == stages
    assert all(len(part) > 0 for part in parts)


def test_type_regex_counts_as_deepspeed_does():
    both = ParallelConfig(world_size=12, pp=12, partition_method="type:transformer|embedding")
    assert counts(70, both) == [5, *[6] * 10, 5], "BLOOM-176B: 70 layers and 2 embeddings over 12 stages"
    two = ParallelConfig(world_size=2, pp=2, partition_method="type:transformer|embedding")
    assert counts(2, two) == [1, 1]
    layers_only = ParallelConfig(world_size=4, pp=4, partition_method="type:transformer")
    assert counts(8, layers_only) == [2, 2, 2, 2]


def test_uniform_puts_the_remainder_in_the_middle():
    assert counts(8, ParallelConfig(world_size=4, pp=4, partition_method="uniform")) == [2, 2, 2, 2]
    assert counts(10, ParallelConfig(world_size=4, pp=4, partition_method="uniform")) == [2, 3, 3, 2]


def test_balanced_counts_the_head():
    parallel = ParallelConfig(world_size=4, pp=4)
    assert counts(24, parallel, vocab_size=64) == [6, 6, 6, 6]
    assert counts(24, parallel, vocab_size=50304, hidden_size=1024, num_attention_heads=16) == [7, 7, 7, 3]


@given(st.integers(4, 40), st.integers(0, 100_000))
def test_no_move_of_a_layer_beats_balanced(layers, vocabulary):
    model = ModelConfig(num_layers=layers, hidden_size=64, num_attention_heads=4, vocab_size=vocabulary)
    parts = [len(part) for part in stage_layers(model, ParallelConfig(world_size=4, pp=4))]
    head = head_forward_flops(model) / layer_forward_flops(model, 0)

    def slowest(sizes):
        return max(*sizes[:-1], sizes[-1] + head)

    for last in range(1, layers - 2):
        others = -(-(layers - last) // 3)
        assert slowest(parts) <= max(others, last + head) + 1e-9


def test_given_ends_and_chunks():
    ends = ParallelConfig(world_size=4, pp=4, first_stage_layers=1, last_stage_layers=2)
    assert counts(11, ends) == [1, 4, 4, 2]
    assert counts(9, ParallelConfig(world_size=2, pp=2, last_stage_layers=3)) == [6, 3]
    chunks = ParallelConfig(world_size=2, pp=2, num_layers_per_virtual_stage=2, pipeline_schedule="interleaved")
    assert counts(8, chunks) == [2, 2, 2, 2]
    assert num_stages(ModelConfig(num_layers=8, hidden_size=8, num_attention_heads=1), chunks) == 4
    assert len(counts(8, ParallelConfig(world_size=2, pp=2, pipeline_schedule="zb-v"))) == 4
