"""Joining of short documents: the tokens stay the same, each document has enough of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.format.manifest import read_manifest
from megatron_lite.data.preparation.batch import Batch
from megatron_lite.data.preparation.joining import ShortDocumentJoiner
from megatron_lite.errors import ConfigError


def reference(lengths, least):
    """Return the documents of each joined one: greedy, the rest with the last."""
    groups, group = [], []
    for number in range(len(lengths)):
        group.append(number)
        if sum(lengths[i] for i in group) >= least:
            groups.append(group)
            group = []
    if group and groups:
        groups[-1] += group
    elif group:
        groups.append(group)
    return groups


@settings(max_examples=200, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(1, 6), max_size=5), max_size=5),
    least=st.integers(1, 12),
    one_sequence=st.booleans(),
)
def test_equals_a_greedy_reference(batches, least, one_sequence):
    """Each document has as many tokens as its number of sequences plus an end token that does not count."""
    joiner, out, number = ShortDocumentJoiner(least, one_sequence=one_sequence), [], 0
    lengths = [length for batch in batches for length in batch]
    for batch in batches:
        sequences = np.array(batch, np.int64)
        sizes = np.ones(sum(batch), np.int64)
        sizes[np.cumsum(sequences) - 1] += 1
        order = np.arange(number, number + len(batch)).astype(np.uint64)
        ids = np.repeat(order.astype(np.uint16), sequences + 1)
        out.append(joiner.add(Batch(ids, sizes, sequences), sequences, order))
        number += len(batch)
    out += [last] if (last := joiner.finish()) is not None else []
    groups = reference(lengths, least)
    found = [number for batch, _ in out for number in batch.ids.tolist()]
    assert found == [number for number, length in enumerate(lengths) for _ in range(length + 1)]
    tokens = [count for batch, _ in out for count in batch.document_tokens.tolist()]
    assert tokens == [sum(lengths[i] + 1 for i in group) for group in groups]
    assert [key for _, order in out for key in order.tolist()] == [group[0] for group in groups]
    counts = [count for batch, _ in out for count in batch.sequences.tolist()]
    assert counts == [1 if one_sequence else sum(lengths[i] for i in group) for group in groups]
    assert joiner.joined == len(lengths) - len(groups)
    assert joiner.short == (bool(lengths) and sum(lengths) < least)


@pytest.mark.slow
def test_joined_dataset(make, look, tokenizer):
    """The .bin is the one without joining, for any number of workers; documents are long enough and counted."""
    plain = make("plain", append_eod=True)
    joined = make("joined", append_eod=True, min_tokens=100, join_short=True)
    assert look.files(joined)[0] == look.files(plain)[0]
    assert look.files(make("two", append_eod=True, min_tokens=100, join_short=True, workers=2)) == look.files(joined)
    lengths = [len(ids) for ids in look.documents(joined)]
    assert min(lengths) >= 100 and len(lengths) < 200
    report = read_manifest(f"{joined}_text_document").report
    assert report["documents"] + report["joined"] == len(look.documents(plain))
    assert (report["too_few_tokens"], report["short"]) == (0, 0)
    shuffled = make("shuffled", append_eod=True, min_tokens=100, join_short=True, shuffle=True)
    assert sorted(look.documents(shuffled)) == sorted(look.documents(joined))
    dropped = make("dropped", append_eod=True, min_tokens=100)
    assert look.documents(dropped) == [ids for ids in look.documents(plain) if len(ids) > 100]


def test_a_corpus_below_the_minimum_is_one_document(make, look):
    prefix = make(min_tokens=10**6, join_short=True, unit_bytes=1 << 30)
    assert len(look.documents(prefix)) == 1
    assert read_manifest(f"{prefix}_text_document").report["short"] == 1


def test_prepended_end_of_document_tokens(make, look, tokenizer):
    from megatron_lite.tokenizer.build import build_tokenizer

    eod = build_tokenizer(tokenizer).eod
    plain = look.documents(make("plain"))
    for options, first, last in (
        ({"prepend_eod": True}, [eod], []),
        ({"append_eod": True}, [], [eod]),
        ({"prepend_eod": True, "append_eod": True}, [eod], [eod]),
    ):
        prefix = make("out", overwrite=True, **options)
        assert look.documents(prefix) == [[*first, *ids, *last] for ids in plain]
        entry = read_manifest(f"{prefix}_text_document").tokenizer
        assert (entry["bos"], entry["eod"]) == (first[0] if first else None, last[0] if last else None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"join_short": True}, "--join-short has no length"),
        ({"join_short": True, "min_tokens": 3, "json_keys": ("text", "title")}, "joins documents of one key; .* has 2"),
        ({"prepend_eod": True, "prepend_bos": True}, "--prepend-eod and --prepend-bos both choose"),
    ],
)
def test_contradicting_options(make, options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)
