"""External shuffle: a permutation of the documents that depends on the seed only."""

from __future__ import annotations

import pytest

from megatron_lite.data.preparation import shuffle
from megatron_lite.data.preparation.progress import ProgressDisplay


@pytest.mark.slow
def test_permutation_depends_on_the_seed_only(make, look, monkeypatch):
    plain = look.documents(make("plain"))
    one = make("one", shuffle=True)
    shuffled = look.documents(one)
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)
    assert look.files(make("two", shuffle=True, workers=2)) == look.files(one)
    assert look.documents(make("seed", shuffle=True, seed=7)) != shuffled
    # Buckets of any size give the same order.
    monkeypatch.setattr("megatron_lite.data.preparation.shuffle.BUCKET_BYTES", 1500)
    monkeypatch.setattr("megatron_lite.data.preparation.shuffle.CHUNK_TOKENS", 60)
    assert look.documents(make("small", shuffle=True)) == shuffled


def test_documents_move_far_on_average(make, look):
    plain, shuffled = look.documents(make("plain")), look.documents(make("mixed", shuffle=True))
    distance = [abs(i - shuffled.index(document)) for i, document in enumerate(plain)]
    assert sum(distance) / len(distance) == pytest.approx(len(plain) / 3, rel=0.2)


def test_empty_documents_and_several_keys(make, look):
    prefix = make("out", shuffle=True, empty_documents="keep", json_keys=("text", "title"))
    texts, titles = look.documents(prefix), look.documents(prefix, "_title_document")
    plain = make("plain", empty_documents="keep", json_keys=("text", "title"))
    pairs = list(zip(look.documents(plain), look.documents(plain, "_title_document"), strict=True))
    assert sorted(zip(texts, titles, strict=True)) == sorted(pairs), "a document's keys stay together"


def test_stages_are_displayed(make, monkeypatch):
    stages = []

    class Recorder(ProgressDisplay):
        def stage(self, what, pieces):
            stages.append([what, pieces, 0])

        def piece(self):
            stages[-1][2] += 1

    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 4000)
    make(progress=Recorder(), shuffle=True, json_keys=("text", "title"))
    (first, buckets, shuffled), (second, shards, joined) = stages
    assert (first, second) == ("shuffle", "join")
    assert buckets == shuffled > 1
    assert shards == joined == buckets


def test_unsorted_shards_are_deleted_before_buckets_are_joined(make, look, tmp_path, monkeypatch):
    whole = look.files(make("whole", shuffle=True))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_lite.data.preparation.run._Run._assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            make("cut", shuffle=True)
    assert len(list((tmp_path / "cut.partial").glob("*.bin"))) == 1, "the only bucket"
    assert look.files(make("cut", shuffle=True)) == whole
