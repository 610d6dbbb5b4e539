"""Energy and emissions of a run, from the files that CodeCarbon wrote (--codecarbon-dir)."""

from __future__ import annotations

import csv
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Energy:
    """Sums over the jobs and nodes of a run: kWh, kg of CO2 equivalents, and the number of nodes that measured."""

    kilowatt_hours: float
    kilograms: float
    nodes: int


def read_energy(folder: str) -> Energy | None:
    """Return the sums of all emissions-*.csv of a folder; None: there is none, or no row can be read."""
    energy, kilograms, nodes = 0.0, 0.0, 0
    for path in sorted(Path(folder).glob("emissions-*.csv")) if folder else ():
        jobs: dict[str, tuple[float, float]] = {}
        with suppress(OSError, csv.Error), path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                # The last row of a tracker holds its sums.
                with suppress(KeyError, TypeError, ValueError):
                    jobs[row["run_id"]] = float(row["energy_consumed"]), float(row["emissions"])
        energy += sum(values[0] for values in jobs.values())
        kilograms += sum(values[1] for values in jobs.values())
        nodes += bool(jobs)
    return Energy(energy, kilograms, nodes) if nodes else None
