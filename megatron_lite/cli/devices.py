"""CLI command `devices`: lists the devices of this host and the installed kernels of other packages."""

from __future__ import annotations

from megatron_lite.cli.parser import Parser

SUMMARY = "list the devices of this host for --device, and installed kernels; what is missing, and why"


def run(argv: list[str]) -> int:
    """Print one line for each kind of device, and one for each package of kernels."""
    parser = Parser(prog="megatron-lite devices", description=SUMMARY[0].upper() + SUMMARY[1:] + ".")
    parser.parse_args(argv)

    from megatron_lite.backend.devices import automatic_kind, list_devices
    from megatron_lite.backend.kernels import CANDIDATES

    for device in list_devices():
        print(f"--device {device.kind:<5} {device.found or f'none: {device.missing}'}")
    print(f"--device auto  {automatic_kind()}\n")
    print("Kernels of other packages, for --device cuda (docs/kernels.md):")
    rows: dict[str, list[str]] = {}
    installed: dict[str, bool] = {}
    for function, candidates in CANDIDATES.items():
        for candidate in candidates:
            if candidate.modules:
                rows.setdefault(candidate.name, []).append(function)
                installed[candidate.name] = candidate.installed or installed.get(candidate.name, False)
    for name, functions in rows.items():
        print(f"{name:<14} {'installed' if installed[name] else 'not installed'} ({', '.join(functions)})")
    return 0
