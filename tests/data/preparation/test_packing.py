"""Packing: best fit against a reference loop, windows against the documents, every token exactly once."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.format.manifest import check_files, read_manifest
from megatron_lite.data.preparation import packed_dataset, packing
from megatron_lite.data.preparation.packed_dataset import pack_dataset
from megatron_lite.data.preparation.packing import PackingWindow, best_fit, cut, lay_out, windows
from megatron_lite.errors import DataError

EOD = 0
TOKENIZER = {"type": "NullTokenizer", "fingerprint": "x", "vocab_size": 1000, "eod": EOD}


def plain_best_fit(lengths, seq_length):
    """Return the bins of best-fit decreasing, one piece at a time: longest first, into the fullest bin with space."""
    spaces, contents = [], []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(spaces, length)
        space, content = (spaces.pop(at), contents.pop(at)) if at < len(spaces) else (seq_length, [])
        left = space - length
        at = bisect_right(spaces, left)
        spaces.insert(at, left)
        contents.insert(at, [*content, length])
    return sorted(contents)


@settings(deadline=None)
@given(data=st.data(), seq_length=st.integers(1, 40))
def test_best_fit_equals_a_reference_loop(data, seq_length):
    lengths = data.draw(st.lists(st.integers(1, seq_length), min_size=1, max_size=80))
    bins = best_fit(np.array(lengths), seq_length)
    found = [sorted((lengths[piece] for piece in np.flatnonzero(bins == number)), reverse=True) for number in set(bins)]
    assert max(map(sum, found)) <= seq_length
    assert sorted(found) == plain_best_fit(lengths, seq_length)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packing")


def write(folder, documents):
    """Write documents of sentences of given lengths; tokens are distinct, and each document ends with EOD."""
    following = 1
    with IndexedDatasetWriter(folder / "corpus", np.int32) as writer:
        for sentences in documents:
            for place, length in enumerate(sentences):
                tokens = np.arange(following, following + length)
                following += length
                if length and not any(sentences[place + 1 :]):
                    tokens[-1] = EOD
                writer.add_sequence(tokens)
            writer.end_document()
    return IndexedDataset(folder / "corpus")


CORPUS = st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=40).filter(
    lambda documents: any(map(any, documents))
)


@pytest.mark.slow
@given(documents=CORPUS, seq_length=st.integers(1, 40), window=st.integers(1, 400), chunk=st.integers(1, 50))
def test_every_token_occurs_once_and_short_documents_are_not_cut(
    folder, monkeypatch, documents, seq_length, window, chunk
):
    monkeypatch.setattr(packing, "DOCUMENTS", chunk)
    monkeypatch.setattr(packed_dataset, "DOCUMENTS", chunk)
    monkeypatch.setattr(packed_dataset, "windows", lambda data, length: windows(data, length, window))
    data = write(folder, documents)
    (folder / "packed.manifest.json").unlink(missing_ok=True)
    made = pack_dataset(data, str(folder / "packed"), seq_length, TOKENIZER, seed=window, overwrite=True)
    packed = IndexedDataset(folder / "packed")
    assert set(packed.sizes.tolist()) == {seq_length}
    bins = np.stack([packed.document(number) for number in range(packed.num_documents)])
    texts = [text for text in map(data.document, range(data.num_documents)) if len(text)]
    flat = bins.ravel()
    place = {token: at for at, token in enumerate(flat.tolist()) if token != EOD}
    assert len(place) == np.count_nonzero(flat) == sum(map(np.count_nonzero, texts))
    pieces = [text[start : start + seq_length] for text in texts for start in range(0, len(text), seq_length)]
    for piece in pieces:
        if piece[0] != EOD:
            at = place[piece[0]]
            assert flat[at : at + len(piece)].tolist() == piece.tolist()
            assert at // seq_length == (at + len(piece) - 1) // seq_length
    if min(np.count_nonzero(piece) for piece in pieces):
        for content in bins:
            text = np.trim_zeros(content, "b")
            assert not (text[1:] + text[:-1] == EOD).any(), "padding lies at the end only"
    assert made.bins * seq_length == made.tokens + made.padding
    assert made.tokens == sum(map(len, texts))
    assert made.documents == len(texts)
    assert made.cut == sum(len(text) > seq_length for text in texts)
    assert made.open_ends == np.count_nonzero(bins[:, -1])
    assert made.unmarked == 0
    check_files(folder / "packed", read_manifest(folder / "packed"))


def test_bins_keep_the_position_of_one_of_their_tokens():
    """The distribution of document lengths is the same in every part of the packed file."""
    rng = np.random.RandomState(0)
    lengths, last = cut(rng.randint(1, 200, 20000), 100)
    window = PackingWindow(0, lengths, last)
    targets, filled = lay_out(window, 100, rng)
    assert filled.sum() == lengths.sum()
    parts = np.array_split(lengths[np.argsort(targets)], 5)
    means = [part.mean() for part in parts]
    assert max(means) < 1.2 * min(means)
    distance = np.abs(targets - (np.cumsum(lengths) - lengths) * (filled.shape[0] * 100 / lengths.sum()))
    assert np.median(distance) < 0.2 * lengths.sum()


def test_cut_unpacked_is_the_mean_of_documents_cut_by_concatenation(folder):
    rng = np.random.RandomState(1)
    sizes = rng.randint(1, 90, 300)
    data = write(folder, [[size] for size in sizes])
    made = pack_dataset(data, str(folder / "counted"), 64, TOKENIZER)
    cuts = []
    for _ in range(300):
        ends = np.cumsum(rng.permutation(sizes))
        borders = np.arange(0, ends[-1], 64)
        starts = ends - np.diff(ends, prepend=0)
        cuts.append(sum(np.searchsorted(borders, ends - 1, side="right") > np.searchsorted(borders, starts, "right")))
    assert made.cut_unpacked == pytest.approx(np.mean(cuts), rel=0.02)


def test_packing_is_deterministic_and_overwrites_nothing(folder):
    data = write(folder, [[7, 3], [30], [5], [11]])
    output = str(folder / "twice")
    assert pack_dataset(data, output, 16, TOKENIZER)
    content = (folder / "twice.bin").read_bytes(), (folder / "twice.manifest.json").read_bytes()
    assert pack_dataset(data, output, 16, TOKENIZER) is None
    assert pack_dataset(data, output, 8, TOKENIZER, overwrite=True)
    assert pack_dataset(data, output, 16, TOKENIZER, overwrite=True)
    assert content == ((folder / "twice.bin").read_bytes(), (folder / "twice.manifest.json").read_bytes())
    for call, message in (
        (lambda: pack_dataset(data, output, 8, TOKENIZER), "Refusing to overwrite"),
        (lambda: pack_dataset(data, data.prefix, 8, TOKENIZER, overwrite=True), "both the input and the output"),
        (lambda: pack_dataset(IndexedDataset(output), str(folder / "again"), 8, TOKENIZER), "already packed"),
        (lambda: pack_dataset(data, str(folder / "other"), 0, TOKENIZER), "--seq-length 0"),
        (lambda: pack_dataset(data, str(folder), 16, TOKENIZER), "is a folder, not the common prefix"),
        (lambda: pack_dataset(data, str(folder / "other"), 16, {**TOKENIZER, "eod": 5}), "end-of-document token 5"),
    ):
        with pytest.raises(DataError, match=message):
            call()


def test_interrupted_packing_leaves_no_files(folder):
    def stop(_):
        raise KeyboardInterrupt

    data = write(folder, [[7, 3], [30], [5], [11]])
    before = sorted(folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        pack_dataset(data, str(folder / "stopped"), 16, TOKENIZER, advance=stop)
    assert sorted(folder.iterdir()) == before


def test_the_manifest_names_the_source(folder):
    data = write(folder, [[12], [13]])
    pack_dataset(data, str(folder / "named"), 16, TOKENIZER)
    saved = json.loads((folder / "named.manifest.json").read_text(encoding="utf-8"))
    assert saved["tokenizer"] == TOKENIZER
    assert saved["flags"] == {"packed": {"seq_length": 16, "seed": 1234}}
    assert saved["inputs"] == [{"path": f"{data.prefix}.bin", "bytes": data.num_bytes}]
