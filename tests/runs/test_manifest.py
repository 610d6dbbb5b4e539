"""Bytes of manifest.json: frozen format, detection of every damage, other formats and versions."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.errors import CheckpointError
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.manifest import (
    CorruptCheckpointError,
    Manifest,
    Provenance,
    SavedFile,
    SavedPart,
    SavedPiece,
    SavedTensor,
    decode_manifest,
    encode_manifest,
    read_manifest,
)

PATH = Path("iter_0000003/manifest.json")
MANIFEST = Manifest(
    iteration=3,
    tensors={
        "w": SavedTensor(
            (4, 2),
            "bfloat16",
            (SavedPiece(Rectangle((0, 0), (3, 2)), "b", 0), SavedPiece(Rectangle((3, 0), (1, 2)), "a", 1)),
        ),
        "empty": SavedTensor((0,), "float32", ()),
    },
    files={"b": SavedFile((SavedPart(0, 12, 0xABC),)), "a": SavedFile((SavedPart(0, 5, 1), SavedPart(5, 7, 2)))},
    scalars={"iteration": 3, "scale": 0.5},
    provenance=Provenance({"model": {"num_layers": 2}}, {"code": "f00"}, ((1, 4), (9, 10))),
    writer={"ranks": 2},
)
BODY = b"""{
"format": "megatron_lite",
"format_version": 2,
"iteration": 3,
"writer": {"ranks": 2},
"scalars": {"iteration": 3, "scale": 0.5},
"provenance": {"config": {"model": {"num_layers": 2}}, "fingerprints": {"code": "f00"}, "skipped_samples": [[1, 4], [9, 10]], "data_history": [], "sources": {}},
"files": {"a": [[5, "00000001"], [7, "00000002"]], "b": [[12, "00000abc"]]},
"tensors": {"empty": [[0], "float32", []], "w": [[4, 2], "bfloat16", [[[0, 0], [3, 2], "b", 0], [[3, 0], [1, 2], "a", 1]]]}"""  # noqa: E501


def closed(body):
    """A manifest of some bytes, with the checksum that they have."""
    return body + b',\n"crc32": "%08x"\n}\n' % zlib.crc32(body)


def test_the_format_is_frozen():
    assert encode_manifest(MANIFEST) == closed(BODY)
    assert json.loads(closed(BODY))["crc32"] == f"{zlib.crc32(BODY):08x}"


def test_decoding_inverts_encoding():
    assert decode_manifest(encode_manifest(MANIFEST), PATH) == MANIFEST
    empty = Manifest(0, {}, {}, {}, Provenance(), {})
    assert decode_manifest(encode_manifest(empty), PATH) == empty
    older = BODY.replace(b', "data_history": [], "sources": {}', b"")
    assert older != BODY and decode_manifest(closed(older), PATH) == MANIFEST


def test_the_size_is_the_sum_of_the_parts():
    assert [MANIFEST.files[name].size for name in "ab"] == [12, 12] and MANIFEST.size == 24
    assert SavedFile(()).size == 0


def test_any_wrong_byte_is_detected():
    for place in range(len(closed(BODY))):
        data = bytearray(closed(BODY))
        data[place] ^= 1
        with pytest.raises(CorruptCheckpointError, match=r"iter_0000003/manifest\.json is damaged: its \d+ bytes"):
            decode_manifest(bytes(data), PATH)


@pytest.mark.parametrize("length", [0, 1, 20, 21, 22, len(closed(BODY)) - 1])
def test_a_truncated_manifest_is_detected(length):
    with pytest.raises(CorruptCheckpointError, match=f"damaged: its {length} bytes"):
        decode_manifest(closed(BODY)[:length], PATH)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b'"megatron_lite"', b'"something_else"', "'something_else' version 2"),
        (
            b'"format_version": 2',
            b'"format_version": 3',
            "'megatron_lite' version 3; this version of megatron_lite reads version 2",
        ),
        (
            b'"format_version": 2',
            b'"format_version": 1',
            "'megatron_lite' version 1; this version of megatron_lite reads version 2",
        ),
        (
            b'"format": "megatron_lite",\n',
            b"",
            "None version 2; this version of megatron_lite reads format megatron_lite version 2",
        ),
    ],
)
def test_other_formats_and_versions_are_named_and_not_called_damage(old, new, found):
    with pytest.raises(CheckpointError, match="this version of megatron_lite reads") as caught:
        decode_manifest(closed(BODY.replace(old, new)), PATH)
    assert f"{PATH} has format {found}" in str(caught.value)
    assert not isinstance(caught.value, CorruptCheckpointError)


@pytest.mark.parametrize("value", [object(), {1: object()}, b"bytes"])
def test_values_that_are_not_json_are_refused(value):
    with pytest.raises(
        CheckpointError, match=r"manifest.json, which is JSON: scalars.x(.1)? is of type (object|bytes)"
    ):
        encode_manifest(replace(MANIFEST, scalars={"x": value}))


def test_an_entry_that_contains_itself_is_named():
    entry = {}
    entry["inner"] = entry
    with pytest.raises(CheckpointError, match=r"is JSON: scalars contains itself"):
        encode_manifest(replace(MANIFEST, scalars={"x": entry}))
    with pytest.raises(CheckpointError, match=r"the key scalars\.x\.\(1, 2\) is of type tuple"):
        encode_manifest(replace(MANIFEST, scalars={"x": {(1, 2): 3}}))


def test_reading_from_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json: No such file"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(encode_manifest(MANIFEST))
    assert read_manifest(tmp_path) == MANIFEST
