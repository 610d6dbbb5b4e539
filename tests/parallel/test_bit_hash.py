"""Tests of the bit hash: exact, sensitive to every bit and index, over chunk borders."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.parallel import bit_hash
from megatron_lite.parallel.bit_hash import BitHash

HASH = BitHash(torch.device("cpu"))


def by_hand(tensor, chunk):
    numbers = bit_hash._odd_numbers(chunk).tolist()
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    total = 0
    bits = tensor.view(-1).view(integers).tolist()
    for start in range(0, max(1, len(bits)), chunk):
        part = sum(bit * number for bit, number in zip(bits[start : start + chunk], numbers, strict=False))
        total = total * bit_hash._STEP + part
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hash_is_the_weighted_sum_modulo_2_to_the_64(dtype, monkeypatch):
    monkeypatch.setattr(bit_hash, "CHUNK", 7)
    tensor = (torch.arange(60, dtype=torch.float32).view(3, 20) * 1e-3 - 0.02).to(dtype)
    assert BitHash(tensor.device)(tensor).item() == by_hand(tensor, 7)


@given(st.integers(1, 200), st.data())
def test_a_flipped_bit_or_swapped_elements_change_the_hash(length, data):
    tensor = torch.randn(length, generator=torch.Generator().manual_seed(length))
    before = HASH(tensor).item()
    assert HASH(tensor.clone()).item() == before
    element, bit = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 31))
    flipped = tensor.clone()
    flipped.view(torch.int32)[element] ^= -(2**31) if bit == 31 else 1 << bit
    assert HASH(flipped).item() != before
    if length > 1:
        other = (element + 1) % length
        swapped = tensor.clone()
        swapped[[element, other]] = tensor[[other, element]]
        assert HASH(swapped).item() != before


def test_an_empty_tensor_has_a_hash():
    assert HASH(torch.empty(0)).item() == 0
