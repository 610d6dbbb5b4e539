"""Tests of the profiler: time by kind, table, recorded iterations, files that cannot be written."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import torch
from support.interop_models import run_config

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.group import LocalGroup
from megatron_lite.backend.select import select_backend
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.profiling import ProfileConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.metrics.profiler import IDLE, OTHER, Interval, Profiler, kind_of, summarize, table


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "communication"),
        ("gloo:all_reduce", "communication"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("cunn_SoftMaxForward", "loss"),
        ("void at::native::vectorized_layer_norm_kernel", "norms"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("triton_poi_fused_gelu_2", OTHER),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kind_of(name) == kind


def test_overlapping_kernels_are_busy_once():
    found = summarize(
        [Interval("gemm", 0.0, 2.0), Interval("nccl", 1.0, 3.0), Interval("gemm", 3.5, 4.0), Interval("add", 1.2, 1.3)],
        seconds=5.0,
    )
    assert found.kinds == pytest.approx({"matrix products": 2.5, "communication": 2.0, OTHER: 0.1, IDLE: 1.5})
    assert list(found.kinds)[-1] == IDLE
    assert found.longest[0] == ("gemm", 2, 2.5)
    text = table(found, "profile of rank 0, iterations 3 to 4")
    assert "matrix products" in text and "50.0%" in text and "gemm" in text
    assert summarize([], 1.0).kinds == {IDLE: 1.0}


class Reporter:
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.fixture
def profiler(tmp_path):
    def make(save=tmp_path, **fields):
        config = run_config()
        config = replace(
            config,
            profile=ProfileConfig(trace=True, after=1, last=3, **fields),
            checkpoint=replace(config.checkpoint, save=str(save)),
        )
        backend = select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch())
        return Profiler(config, backend, LocalGroup("world"), Reporter())

    return make


def iterate(profiler, iterations):
    for iteration in iterations:
        profiler.before_iteration(iteration)
        torch.ones(64, 64) @ torch.ones(64, 64)
        profiler.after_iteration(iteration)
    return profiler._reporter.messages


def test_the_window_is_traced(profiler, tmp_path):
    made = profiler()
    assert not iterate(made, [1, 2])
    printed, trace = iterate(made, [3, 4])
    assert printed.startswith("profile of rank 0, iterations 2 to 3:") and "matrix products" in printed
    path = tmp_path / "profile" / "rank0-2-3.json.gz"
    assert str(path) in trace
    with gzip.open(path, "rt") as file:
        assert any(event.get("name") == "aten::mm" for event in json.load(file)["traceEvents"])
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_resumed_run_traces_the_rest_of_the_window(profiler):
    assert iterate(profiler(), [3, 4])[0].startswith("profile of rank 0, iteration 3:")
    assert not iterate(profiler(), [4, 5])


def test_other_ranks_record_nothing(profiler):
    assert not iterate(profiler(ranks=(1,)), [1, 2, 3])


def test_a_device_without_a_memory_history_says_so(profiler):
    messages = iterate(profiler(memory=True), [2, 3])
    assert "records no history" in messages[-1]


def test_a_folder_that_cannot_be_written_does_not_stop_training(profiler, tmp_path):
    (tmp_path / "file").write_text("")
    (warning,) = iterate(profiler(save=tmp_path / "file"), [2, 3])
    assert warning.startswith("WARNING: the profile of rank 0 could not be written")


def test_an_interrupted_recording_ends(profiler):
    with profiler() as made:
        made.before_iteration(2)
    with profiler() as made:  # the profiler of torch is free again
        iterate(made, [2, 3])
