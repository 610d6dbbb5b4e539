"""Merging of datasets and of their manifests."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.format.manifest import check_files, manifest_path, read_manifest, write_manifest
from megatron_lite.data.preparation.merge import find_prefixes, merge_datasets
from megatron_lite.data.preparation.packed_dataset import pack_dataset
from megatron_lite.errors import DataError


def test_merged_documents_and_manifest(make, look, tmp_path):
    parts = [f"{make(name, append_eod=name == 'b', empty_documents='keep')}_text_document" for name in ("a", "b")]
    merged = merge_datasets(parts, str(tmp_path / "m"))
    made = look.documents(tmp_path / "m", "")
    assert made == [document for part in parts for document in look.documents(part, "")]
    assert (merged.documents, merged.tokens) == (len(made), sum(map(len, made)))
    manifest = read_manifest(tmp_path / "m")
    check_files(tmp_path / "m", manifest)
    assert manifest.documents == merged.documents
    with pytest.raises(DataError, match="--overwrite"):
        merge_datasets(parts, str(tmp_path / "m"))
    merge_datasets(parts[:1], str(tmp_path / "m"), overwrite=True)
    assert look.documents(tmp_path / "m", "") == look.documents(parts[0], "")


def test_datasets_without_manifest_are_merged(make, look, tmp_path):
    part = f"{make('a')}_text_document"
    manifest_path(part).unlink()
    assert not merge_datasets([part, part], str(tmp_path / "m")).warnings
    assert look.documents(tmp_path / "m", "") == look.documents(part, "") * 2
    assert read_manifest(tmp_path / "m") is None
    (warning,) = merge_datasets([f"{make('b')}_text_document", part], str(tmp_path / "n")).warnings
    assert "a_text_document has no manifest" in warning


def test_refusals(make, tmp_path, tokenizer, corpus):
    part = f"{make('a')}_text_document"
    with pytest.raises(DataError, match="both an input and the output"):
        merge_datasets([part], part, overwrite=True)
    numbers = tmp_path / "n.jsonl"
    numbers.write_text('{"text": "1 2"}')
    small = make("n", inputs=(str(numbers),), tokenizer=TokenizerConfig(type="NullTokenizer", vocab_size=9))
    with pytest.raises(DataError, match="different tokenizers"):
        merge_datasets([part, f"{small}_text_document"], str(tmp_path / "m"))
    large = make("l", inputs=(str(numbers),), tokenizer=TokenizerConfig(type="NullTokenizer", vocab_size=70000))
    manifest_path(part).unlink()
    with pytest.raises(DataError, match="tokens of type"):
        merge_datasets([part, f"{large}_text_document"], str(tmp_path / "m"))
    assert not list(tmp_path.glob("m.*"))


def test_datasets_of_a_folder(make, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DataError, match=r"contains no dataset"):
        find_prefixes(folder)
    with pytest.raises(DataError, match=r"does not exist|is not a directory"):
        find_prefixes(tmp_path / "absent")
    prefix = f"{make('a')}_text_document"
    for name in ("z", "b"):
        for ending in ("bin", "idx"):
            shutil.copy(f"{prefix}.{ending}", folder / f"{name}.{ending}")
    assert find_prefixes(folder) == [str(folder / "b"), str(folder / "z")]
    (folder / "z.idx").unlink()
    with pytest.raises(DataError, match=r"z.idx is missing"):
        find_prefixes(folder)


def test_damage_is_found_by_the_manifest(make):
    prefix = f"{make('a')}_text_document"
    manifest = read_manifest(prefix)
    check_files(prefix, manifest)
    tokens = Path(f"{prefix}.bin")
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    check_files(prefix, manifest, contents=False)
    with pytest.raises(DataError, match="the checksum of bytes"):
        check_files(prefix, manifest)
    tokens.write_bytes(content[:-2])
    with pytest.raises(DataError, match="the manifest says"):
        check_files(prefix, manifest, contents=False)
    write_manifest(prefix, dataclasses.replace(manifest, tokens=1))
    assert read_manifest(prefix).tokens == 1
    manifest_path(prefix).write_text("{")
    with pytest.raises(DataError, match=r"The dataset manifest .* is damaged: Expecting"):
        read_manifest(prefix)


def packed(make, tmp_path, *lengths):
    """Return datasets of the same documents, packed for each length; None: not packed."""
    source = f"{make('a', append_eod=True)}_text_document"
    about = read_manifest(source).tokenizer
    names = [str(tmp_path / f"packed{number}") if length else source for number, length in enumerate(lengths)]
    for name, length in zip(names, lengths, strict=True):
        if length:
            pack_dataset(IndexedDataset(source), name, length, about)
    return names


def test_packed_datasets_of_one_length_stay_packed(make, tmp_path):
    assert not merge_datasets(packed(make, tmp_path, 64, 64), str(tmp_path / "m")).warnings
    assert read_manifest(tmp_path / "m").packed_length == 64


@pytest.mark.parametrize(("lengths", "message"), [((64, 32), "packed for 32 tokens"), ((64, None), "is not packed")])
def test_datasets_packed_differently_cause_a_warning(make, tmp_path, lengths, message):
    (warning,) = merge_datasets(packed(make, tmp_path, *lengths), str(tmp_path / "m")).warnings
    assert read_manifest(tmp_path / "m").packed_length == 0
    assert "packed0 is packed for 64 tokens" in warning
    assert message in warning


def test_two_merges_with_one_output(make, tmp_path):
    part = f"{make('a')}_text_document"
    with IndexedDatasetWriter(tmp_path / "m", IndexedDataset(part).dtype) as writer:
        writer.append(part)
        with pytest.raises(DataError, match=r"Cannot write the dataset .*/m: process \d+ on .* is writing it"):
            merge_datasets([part, part], str(tmp_path / "m"))
    assert len(IndexedDataset(tmp_path / "m")) == len(IndexedDataset(part))
    assert not list(tmp_path.glob("m.*.tmp"))
    merge_datasets([part, part], str(tmp_path / "m"), overwrite=True)
    assert len(IndexedDataset(tmp_path / "m")) == 2 * len(IndexedDataset(part))
