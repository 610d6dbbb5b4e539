import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.counts import flops_per_token
from megatron_lite.config.model import ModelConfig
from megatron_lite.metrics.throughput import Throughput


@given(
    layers=st.integers(1, 100),
    heads=st.integers(1, 64),
    head_dim=st.sampled_from([32, 64, 128]),
    s=st.integers(1, 4096),
)
def test_equals_narayanan_eq_3_without_recomputation(layers, heads, head_dim, s):
    h, v = heads * head_dim, 51200
    model = ModelConfig(num_layers=layers, hidden_size=h, num_attention_heads=heads, padded_vocab_size=v)
    with_recomputation = 96 * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    forward_again = 2 * layers * (12 * h**2 + 2 * s * h)
    assert flops_per_token(model, s) == pytest.approx(with_recomputation - forward_again, rel=1e-12)


def test_equals_palm_appendix_b():
    """6 N + 12 L H Q T, where N counts parameters of matrix products (no biases, norms or position table)."""
    model = ModelConfig(
        num_layers=3, hidden_size=96, num_attention_heads=4, ffn_hidden_size=200, padded_vocab_size=1024
    )
    multiplied = 3 * (4 * 96 * 96 + 2 * 96 * 200) + 96 * 1024
    assert flops_per_token(model, 77) == 6 * multiplied + 12 * 3 * 4 * 24 * 77


def test_flops_of_grouped_queries_and_gates():
    def flops(**changes):
        shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "ffn_hidden_size": 128}
        return flops_per_token(ModelConfig(**shape, padded_vocab_size=256, **changes), 32)

    assert flops() - flops(num_query_groups=2) == 6 * 2 * (2 * 64 * 6 * 8)
    assert flops(activation="swiglu") - flops() == 6 * 2 * 64 * 128
    assert flops(head_dim=16) - flops() == 6 * 2 * (4 * 64 * 64 + 2 * 32 * 64)


MODEL = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, padded_vocab_size=256)


def test_mfu_is_per_device_and_absent_without_a_peak():
    flops = flops_per_token(MODEL, 32)
    rates = Throughput(MODEL, devices=4, peak_flops=1e9).measure(
        seconds=2.0, tokens=1000, seq_length=32, remaining_tokens=0
    )
    assert rates.tokens_per_second == 500.0
    assert rates.tflops_per_device == pytest.approx(flops * 500 / 4 / 1e12)
    assert rates.mfu == pytest.approx(flops * 500 / 4 / 1e9)
    assert rates.eta_seconds == 0.0
    without = Throughput(MODEL, devices=4, peak_flops=None)
    assert without.measure(seconds=1.0, tokens=1, seq_length=32, remaining_tokens=0).mfu is None


def test_the_eta_depends_on_tokens_without_the_first_iteration():
    meter = Throughput(MODEL, devices=1, peak_flops=None, horizon=2)

    def eta(seconds, tokens, remaining):
        rates = meter.measure(seconds=seconds, tokens=tokens, seq_length=32, remaining_tokens=remaining)
        return rates.eta_seconds

    assert eta(60.0, 100, 100) == pytest.approx(60.0)  # compiled
    assert eta(1.0, 100, 1000) == pytest.approx(10.0)
    assert eta(3.0, 300, 1000) == pytest.approx(10.0)  # the batch grew: the same tokens per second
    assert eta(1.0, 300, 600) == pytest.approx(4.0)  # the last two
