"""Tests of the count of XLA devices, from variables and device files."""

import pytest

from megatron_lite.backend.xla_devices import count_xla_devices


@pytest.mark.parametrize(
    ("files", "variables", "count"),
    [
        ([], {}, None),
        (["vfio/vfio"], {}, None),
        ([], {"PJRT_DEVICE": "CPU"}, 1),
        ([], {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"}, 8),
        ([], {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "many"}, None),
        (["accel0", "accel1", "accel2", "accel3"], {"TPU_ACCELERATOR_TYPE": "v4-32"}, 4),
        (["accel0", "accel1", "accel2", "accel3"], {"TPU_ACCELERATOR_TYPE": "v3-8"}, 8),
        (["vfio/vfio", "vfio/0", "vfio/1"], {"PJRT_DEVICE": "TPU"}, 2),
    ],
)
def test_devices_of_a_host(files, variables, count, tmp_path):
    (tmp_path / "vfio").mkdir()
    for name in files:
        (tmp_path / name).touch()
    assert count_xla_devices(variables, tmp_path) == count
