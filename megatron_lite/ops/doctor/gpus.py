"""nvidia-smi queries: memory, ECC errors, throttling and MIG mode of each GPU of a host."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from megatron_lite.ops.doctor.report import Gpu

SECONDS = 20.0
"""Time limit of one call: nvidia-smi hangs while the driver does not answer."""
CORE_FIELDS = ("uuid", "name", "driver_version", "memory.total", "memory.free")
STATE_FIELDS = (
    "mig.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.sw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
)
"""Left out where an old driver does not know one of them."""
REMAP_FIELDS = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")


def query_gpus() -> dict[str, Gpu] | None:
    """Return the GPUs of this host by uuid; None: nvidia-smi is not installed.

    Raises:
        OSError: nvidia-smi fails or does not answer; the text is its error.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        rows = _query("--query-gpu", (*CORE_FIELDS, *STATE_FIELDS))
    except OSError as error:
        if "not a valid field" not in str(error):
            raise
        rows = _query("--query-gpu", CORE_FIELDS)
    repairs: dict[str, str] = {}
    try:
        remapped = _query("--query-remapped-rows", REMAP_FIELDS)
    except OSError:  # before Ampere
        remapped = []
    for row in remapped:
        states = [name for name in ("pending", "failure") if _is_set(row[f"remapped_rows.{name}"])]
        if states:
            repairs[row["gpu_uuid"]] = f"row remapping: {', '.join(states)}"
    return {row["uuid"]: _gpu(row, repairs.get(row["uuid"], "")) for row in rows}


def find_gpu(gpus: Mapping[str, Gpu], uuid: str) -> Gpu | None:
    """Return the GPU with a uuid, which torch gives without its prefix; None: it is not listed, as a MIG instance."""
    bare = uuid.removeprefix("GPU-")
    return next((gpu for name, gpu in gpus.items() if name.removeprefix("GPU-") == bare), None)


def _query(option: str, names: Sequence[str]) -> list[dict[str, str]]:
    command = ["nvidia-smi", f"{option}={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"no answer within {SECONDS:g} s") from error
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(lines[0])
    rows = [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if row]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def _gpu(row: Mapping[str, str], repairs: str) -> Gpu:
    retired = ["retired pages: pending"] if _is_set(row.get("retired_pages.pending", "")) else []
    slowed = [
        name.rpartition(".")[2].replace("_", " ")
        for name in STATE_FIELDS
        if "throttle" in name and row.get(name, "").strip() == "Active"
    ]
    errors = row.get("ecc.errors.uncorrected.volatile.total", "").strip()
    return Gpu(
        uuid=row["uuid"],
        name=row["name"],
        driver=row["driver_version"],
        memory_total=_bytes(row["memory.total"]),
        memory_free=_bytes(row["memory.free"]),
        ecc_errors=int(errors) if errors.isdigit() else None,
        repairs=", ".join(filter(None, [repairs, *retired])),
        throttling=", ".join(slowed),
        mig=row.get("mig.mode.current", "").strip() == "Enabled",
    )


def _is_set(text: str) -> bool:
    """Return whether a state is set: drivers write Yes or a number."""
    return text.strip() not in ("", "No", "0", "[N/A]", "N/A", "[Not Supported]")


def _bytes(mebibytes: str) -> int:
    return int(mebibytes) * 2**20 if mebibytes.strip().isdigit() else 0
