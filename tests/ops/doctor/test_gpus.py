"""nvidia-smi queries, with its recorded output."""

from __future__ import annotations

import stat

import pytest

from megatron_lite.ops.doctor import gpus
from megatron_lite.ops.doctor.gpus import find_gpu, query_gpus

A100 = """\
GPU-5fb7a4c1-90cf-1a75-3f3c-6a1b6a6e4c7f, NVIDIA A100-SXM4-80GB, 535.161.08, 81920, 81050, Disabled, 0, [N/A], \
Not Active, Not Active, Not Active
GPU-8e0f6f0b-54f2-2b5b-9b0c-8d1a0f2b7c11, NVIDIA A100-SXM4-80GB, 535.161.08, 81920, 40211, Enabled, 3, [N/A], Active, \
Not Active, Active
"""
REMAPPED = """\
GPU-5fb7a4c1-90cf-1a75-3f3c-6a1b6a6e4c7f, No, No
GPU-8e0f6f0b-54f2-2b5b-9b0c-8d1a0f2b7c11, Yes, No
"""
V100 = "GPU-1d2e, Tesla V100-SXM2-32GB, 470.57.02, 32510, 32507\n"
UNKNOWN = 'Field "mig.mode.current" is not a valid field to query.\n'
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.\n"
)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Install an nvidia-smi whose answers a test sets: text and exit code by a word of its arguments."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def install(*answers):
        lines = ["#!/bin/sh"]
        for number, (word, text, code) in enumerate(answers):
            (tmp_path / str(number)).write_text(text)
            lines.append(f'case "$*" in *{word}*) cat {tmp_path / str(number)}; exit {code};; esac')
        program = tmp_path / "nvidia-smi"
        program.write_text("\n".join([*lines, "sleep 60"]))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    return install


def test_states_of_two_gpus(nvidia_smi):
    nvidia_smi(("query-gpu", A100, 0), ("remapped", REMAPPED, 0))
    good, bad = query_gpus().values()
    assert (good.name, good.driver, good.memory_total) == ("NVIDIA A100-SXM4-80GB", "535.161.08", 80 * 2**30)
    assert (good.ecc_errors, good.repairs, good.throttling, good.mig) == (0, "", "", False)
    assert (bad.ecc_errors, bad.repairs, bad.mig) == (3, "row remapping: pending", True)
    assert bad.throttling == "hw thermal slowdown, hw power brake slowdown"
    assert find_gpu({good.uuid: good}, good.uuid.removeprefix("GPU-")) == good
    assert find_gpu({good.uuid: good}, "MIG-1") is None


def test_an_old_driver_without_the_states(nvidia_smi):
    nvidia_smi(("mig.mode", UNKNOWN, 2), ("remapped", "", 2), ("query-gpu", V100, 0))
    (gpu,) = query_gpus().values()
    assert gpu.memory_free == 32507 * 2**20 and gpu.ecc_errors is None


def test_a_driver_that_does_not_answer(nvidia_smi, monkeypatch):
    nvidia_smi(("query-gpu", NO_DRIVER, 9))
    with pytest.raises(OSError, match="NVIDIA-SMI has failed because"):
        query_gpus()
    nvidia_smi()
    monkeypatch.setattr(gpus, "SECONDS", 0.2)
    with pytest.raises(OSError, match=r"no answer within 0\.2 s"):
        query_gpus()


def test_a_host_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert query_gpus() is None
