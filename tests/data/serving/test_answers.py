"""Loss masks: read with the tokens, packed and merged with them, errors, cut answers."""

import numpy as np
import pytest

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.data import DataConfig, DataSource
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.config.tuning import TuningConfig
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.format.loss_mask import MASK_TYPE, has_mask, mask_prefix
from megatron_lite.data.preparation.merge import find_prefixes, merge_datasets
from megatron_lite.data.preparation.packed_dataset import pack_dataset
from megatron_lite.data.serving.build import build_datasets
from megatron_lite.data.serving.loader import Loader
from megatron_lite.errors import DataError

EOD, LENGTH = 99, 16


def write(prefix, documents=40, longest=12, seed=0, masked=True):
    """Write documents whose tokens 0-49 are prompts and 50-98 answers, ended by EOD, which belongs to the answer."""
    rng = np.random.RandomState(seed)
    with (
        IndexedDatasetWriter(prefix, np.uint16) as tokens,
        IndexedDatasetWriter(mask_prefix(prefix), MASK_TYPE) as mask,
    ):
        for _ in range(documents):
            prompt, answer = rng.randint(0, 50, rng.randint(1, longest)), rng.randint(50, 99, rng.randint(1, longest))
            tokens.add_document([*prompt, *answer, EOD])
            mask.add_document([0] * len(prompt) + [1] * (len(answer) + 1))
    if not masked:
        for suffix in (".bin", ".idx"):
            prefix.with_name(f"{prefix.name}_loss_mask{suffix}").unlink()
    return str(prefix)


def open_sets(prefix, answers=True, length=LENGTH, **data):
    return build_datasets(
        RunConfig(
            model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=100),
            batch=BatchConfig(seq_length=length, micro_batch_size=2, global_batch_size=4),
            training=TrainingConfig(train_iters=5, eval_iters=0),
            data=DataConfig(sources=(DataSource(path=prefix),), split="1", **data),
            tuning=TuningConfig(answer_loss=answers),
        )
    )


@pytest.mark.parametrize("data", [{}, {"index_order": "closed-form"}, {"sampling": "slice"}])
def test_samples_have_the_mask_of_their_tokens(tmp_path, data):
    train = open_sets(write(tmp_path / "a"), **data).train
    for sample in range(10):
        tokens, mask = train[sample]
        assert mask.tolist() == (tokens >= 50).astype(int).tolist()
    loader = Loader(train, micro_batch=2, global_batch=lambda _: 4)
    assert loader.microbatch(0, 1).shape == (2, 2, LENGTH + 1)
    assert loader.microbatch(0, 1, 5).shape == (2, 2, 6)


def test_packing_keeps_masks_and_counts_cut_answers(tmp_path):
    prefix, packed = write(tmp_path / "a", longest=14), str(tmp_path / "packed")
    made = pack_dataset(IndexedDataset(prefix), packed, LENGTH, {"eod": EOD})
    lengths = IndexedDataset(prefix).sizes
    assert made.cut == np.count_nonzero(lengths > LENGTH) > 0
    tokens, mask = IndexedDataset(packed), IndexedDataset(mask_prefix(packed))
    for number in range(len(tokens)):
        bin_, own = tokens.get(number), mask.get(number).astype(bool)
        assert not own[0] and not (own & (bin_ < 50)).any()
        # An answer is unmasked except the first token of the remainder of a document, and padding is masked.
        starts = np.flatnonzero((bin_ >= 50) & (bin_ != EOD) & ~own)
        assert all(start == 0 or bin_[start - 1] == EOD for start in starts)
    answered = sum(int(mask.get(number).sum()) for number in range(len(mask)))
    assert IndexedDataset(mask_prefix(prefix)).document(0).size and answered >= made.tokens / 4
    notices = open_sets(packed).notices.warnings
    assert notices == [f"packing {packed} in sequences of {LENGTH} tokens cut {made.cut} of 40 answers"]
    assert pack_dataset(IndexedDataset(prefix), packed, LENGTH, {"eod": EOD}) is None


def test_an_unpacked_dataset_warns_of_cut_answers(tmp_path):
    (warning,) = open_sets(write(tmp_path / "a")).notices.warnings
    assert "--seq-length 16 cuts about" in warning and "of the 40 answers" in warning
    assert "megatron-lite data pack" in warning


def test_a_mask_that_is_not_used(tmp_path):
    (warning,) = open_sets(write(tmp_path / "a"), answers=False).notices.warnings
    assert "marks its answers, and without --answer-loss prompts are trained on" in warning


def test_a_dataset_without_a_mask(tmp_path):
    with pytest.raises(DataError, match=r"does not mark its answers \(.*a_loss_mask.idx is missing\)"):
        open_sets(write(tmp_path / "a", masked=False))


def test_a_mask_of_another_dataset(tmp_path):
    prefix = write(tmp_path / "a")
    write(tmp_path / "b", documents=39)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"b_loss_mask{suffix}").rename(tmp_path / f"a_loss_mask{suffix}")
    with pytest.raises(DataError, match=r"does not belong to the dataset .*39 sequences of .*40 sequences of"):
        open_sets(prefix)


def test_a_mask_of_another_type(tmp_path):
    prefix = write(tmp_path / "a")
    with IndexedDatasetWriter(mask_prefix(prefix), np.uint16) as mask:
        mask.add_document([1, 2])
    with pytest.raises(DataError, match="its values are uint16, not uint8"):
        open_sets(prefix)


def test_merging_merges_masks(tmp_path):
    prefixes = [write(tmp_path / "a"), write(tmp_path / "b", seed=1)]
    assert find_prefixes(tmp_path) == prefixes
    merge_datasets(prefixes, str(tmp_path / "ab"))
    merged, mask = IndexedDataset(tmp_path / "ab"), IndexedDataset(mask_prefix(tmp_path / "ab"))
    assert [mask.get(n).tolist() for n in range(80)] == [(merged.get(n) >= 50).astype(int).tolist() for n in range(80)]
    merge_datasets([write(tmp_path / "c", masked=False)], str(tmp_path / "ab"), overwrite=True)
    assert not has_mask(tmp_path / "ab")
    with pytest.raises(DataError, match=r"Cannot merge .*/c with datasets that mark their answers"):
        merge_datasets([prefixes[0], str(tmp_path / "c")], str(tmp_path / "d"))


@pytest.mark.parametrize(("eval_iters", "warned"), [(12, True), (1, False)])
def test_a_validation_set_smaller_than_one_evaluation(tmp_path, eval_iters, warned):
    prefix = write(tmp_path / "a")
    config = RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=100),
        batch=BatchConfig(seq_length=LENGTH, micro_batch_size=2, global_batch_size=4),
        training=TrainingConfig(train_iters=5, eval_iters=eval_iters),
        data=DataConfig(sources=(DataSource(path=prefix),), split="50,50,0"),
    )
    found = [text for text in build_datasets(config).notices.warnings if "one evaluation reads" in text]
    samples = int(IndexedDataset(prefix).sizes[20:].sum() - 1) // LENGTH
    assert len(found) == warned
    if warned:
        assert f"the valid set has {samples} samples, and one evaluation reads 48 (--eval-iters 12 with" in found[0]
