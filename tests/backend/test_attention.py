"""Tests of the attention kernel that backends call: heads of queries in groups that share keys and values."""

import pytest
import torch
from torch.nn import functional as F

from megatron_lite.backend.base import scaled_dot_product_attention


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_grouped_heads_equal_repeated_heads(monkeypatch, groups):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(5, 2, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, groups, groups))
    grouped, kernel = [], F.scaled_dot_product_attention

    def record(*args, **options):
        grouped.append(options["enable_gqa"])
        return kernel(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    found = scaled_dot_product_attention(q, k, v, None, dropout=0.0, causal=True)
    k, v = (x.repeat_interleave(4 // groups, dim=2) for x in (k, v))
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, None, dropout=0.0, causal=True))
    assert grouped == [groups < 4, False]
