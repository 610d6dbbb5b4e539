"""Tests of the hardware table."""

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.planner.hardware import ACCELERATORS, accelerator, device_of, device_of_resource, hardware


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA L4", ("l4", 121)),
        ("NVIDIA L40", ("l40", 181)),
        ("NVIDIA L40S", ("l40s", 362)),
        ("NVIDIA A40", ("a40", 150)),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A100-SXM4-80GB", ("a100-80gb", 312)),
        ("NVIDIA A100-SXM4-40GB", ("a100-40gb", 312)),
        ("NVIDIA A10", ("a10", 125)),
        ("NVIDIA H100 80GB HBM3", ("h100-80gb", 989)),
        ("NVIDIA H100 PCIe", ("h100-pcie", 756)),
        ("NVIDIA GH200 480GB", ("gh200", 989)),
        ("NVIDIA H200", ("h200", 989)),
        ("NVIDIA GeForce RTX 4090", ("rtx-4090", 165)),
        ("Tesla V100-SXM2-16GB", ("v100-16gb", 125)),
        ("Tesla V100-SXM2-32GB", ("v100-32gb", 125)),
        ("Tesla T4", ("t4", 65)),
        ("XLA TPU v3-32", ("tpu-v3", 61.5)),
        ("XLA TPU v5litepod-16", ("tpu-v5e", 197)),
        ("XLA CPU", None),
    ],
)
def test_device_by_the_words_of_the_drivers_name(name, expected):
    found = device_of(name)
    assert (None if found is None else (found.name, found.tflops)) == expected


@pytest.mark.parametrize(
    ("resource", "name"),
    [
        ("gpu:a100:8", "a100"),
        ("gpu:v100s:4", "v100"),
        ("gpu:mi250:8", "mi250x"),
        ("a100_80", "a100"),
        ("gpu:gh200", "gh200"),
        ("gpu:rtx_4090:2", "rtx-4090"),
        ("gpu:rtx_a6000", None),
        ("cpu", None),
        ("4", None),
    ],
)
def test_device_of_a_slurm_resource(resource, name):
    found = device_of_resource(resource)
    assert (None if found is None else found.family.lower()) == name


def test_names_are_unique_and_complete():
    names = [entry.name for entry in ACCELERATORS]
    assert len(set(names)) == len(names)
    assert {"h100-80gb", "a100-80gb", "v100-32gb", "tpu-v3", "h200"} <= set(names)


def test_a_short_name_is_the_common_variant():
    assert [accelerator(name).name for name in ("h100", "A100", "v100", "H100_80GB")] == [
        "h100-80gb",
        "a100-80gb",
        "v100-32gb",
        "h100-80gb",
    ]


def test_peaks_by_dtype():
    v100, h100 = accelerator("v100"), accelerator("h100")
    assert (v100.peak("bf16"), v100.peak("fp16"), v100.peak("fp8")) == (0, 125e12, 0)
    assert (h100.peak("fp8"), h100.peak("fp32"), h100.peak("fp32", tf32=True)) == (1979e12, 67e12, 495e12)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"--gpu h10-80gb is unknown. Use --gpu h100-80gb; all names: a10, a100-40gb"):
        accelerator("h10-80gb")
    with pytest.raises(ConfigError, match=r"--gpu quantum is unknown. Use one of a10, "):
        accelerator("quantum")


def test_node_size_and_network_can_be_given():
    machine = hardware("v100-32gb", per_node=4, network_gbit=100)
    assert (machine.per_node, machine.device.network_gbps, hardware("v100-32gb").per_node) == (4, 12.5, 8)
