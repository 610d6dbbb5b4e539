from support.job_commands import SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.vocabulary import with_vocabulary


def test_with_vocabulary_pads_for_tensor_parallelism():
    config = parse_run([*SMALL, "--tensor-model-parallel-size", "2"]).config
    model = with_vocabulary(config, 50257).model
    assert (model.vocab_size, model.padded_vocab_size) == (50257, 50432)


def test_a_given_padding_stays():
    config = parse_run([*SMALL, "--pad-vocab-size-to", "51200", "--tokenizer-vocab-size", "50257"]).config
    assert with_vocabulary(config, 50257).model.padded_vocab_size == 51200
