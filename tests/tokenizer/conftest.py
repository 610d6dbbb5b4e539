"""Fixture: a tiny byte-level BPE, trained once."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lite.tokenizer.training import train_byte_level_bpe

SENTENCE = "the cat sat on the mat while naïve führer façade 東京 is a city; don't we'll 1234 5678 == != ()\n\n\t"
WORDS = SENTENCE.split(" ")
TEXTS = [" ".join(WORDS[i % len(WORDS) :] + WORDS[: (i * 7) % len(WORDS)]) for i in range(60)]


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_byte_level_bpe(TEXTS, folder, vocab_size=400)
    return folder


@pytest.fixture
def each():
    """Return a function that gives the ids of encode_flat as a list for each text."""

    def encode(tokenizer, texts):
        batch = tokenizer.encode_flat(texts)
        return [part.tolist() for part in np.split(batch.ids, np.cumsum(batch.lengths)[:-1])]

    return encode
