"""CLI command `sync`: copies logs and checkpoints of a run to a folder or a hub repository, beside a running job."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.backend.environment import read_launch
from megatron_lite.cli.parser import Parser
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count, format_size

if TYPE_CHECKING:
    from megatron_lite.ops.sync import Destination, Plan

SUMMARY = "copy logs and checkpoints of a run to a folder or a Hugging Face repository"
_FOLDER_STARTS = ("/", "./", "../", "~")
_REPOSITORY = re.compile(r"[^/\s.~][^/\s]*/[^/\s]+")


def run(argv: list[str]) -> int:
    """Copy what is new since the last sync."""
    parser = Parser(prog="megatron-lite sync", description=SUMMARY[0].upper() + SUMMARY[1:] + ".")
    parser.add_argument("run", type=Path, metavar="RUN", help="the --save folder of a run")
    parser.add_argument(
        "--to",
        required=True,
        metavar="REPO|DIR",
        help="USER/NAME on the hub, or a folder: one that exists, or a path that begins with / ./ ../ or ~",
    )
    parser.add_argument(
        "--checkpoints",
        default="latest",
        metavar="WHICH",
        help="latest (default), best (--save-best), none, kept (all that the run has), or iterations, as 1000,2000",
    )
    parser.add_argument("--weights", action="store_true", help="also the checkpoints of --weights-only-every")
    parser.add_argument(
        "--logs",
        action="append",
        default=[],
        metavar="FILE",
        help="a log file outside of RUN, as Slurm's output, or a quoted pattern; repeatable",
    )
    parser.add_argument("--delete", action="store_true", help="delete earlier copies of what is not selected any more")
    parser.add_argument("--checksum", action="store_true", help="folder: compare contents, not size and time")
    parser.add_argument("--private", action="store_true", help="hub: make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="print what would be copied and deleted")
    options = parser.parse_args(argv)

    from megatron_lite.cli.progress import byte_progress
    from megatron_lite.ops.sync import Selection, make_plan, sync

    selection = Selection(
        run=options.run,
        checkpoints=options.checkpoints,
        weights=options.weights,
        logs=tuple(options.logs),
        delete=options.delete,
    )
    destination = _destination(options)
    if options.dry_run:
        _print(make_plan(selection, destination), destination)
        return 0
    with byte_progress(f"syncing to {destination.name}") as progress:
        summary = sync(selection, destination, process=read_launch().process, notify=_note, progress=progress)
    print(summary)
    return 0


def _destination(options: argparse.Namespace) -> Destination:
    """Return the folder or the repository of --to.

    Raises:
        ConfigError: it is neither, or a placeholder; or as Hub and Hub.check_access.
    """
    from megatron_lite.ops.sync_folder import FolderDestination

    given = options.to
    to = given.removeprefix("hf:")
    if to == given and to and (to.startswith(_FOLDER_STARTS) or Path(to).exists()):
        try:
            folder = Path(to).expanduser()
        except RuntimeError as error:
            raise ConfigError(
                f"--to {to}: this machine has no user {to[1:].partition('/')[0]}",
                fix="Give the path without ~, or --to ~/DIR for a folder of your own",
            ) from error
        return FolderDestination(folder, options.run, checksum=options.checksum)
    name = to.strip("/").rpartition("/")[2] or "NAME"
    if to == given and not _REPOSITORY.fullmatch(to):
        raise ConfigError(
            f"--to {given or repr(given)} is neither a folder that exists nor a repository USER/NAME",
            fix=f"Give --to ./{to.strip('/') or name} for a new folder, or --to USER/{name} for a repository of the "
            "Hugging Face Hub",
        )
    if to.startswith("USER/"):
        raise ConfigError(
            f"--to {given} names no repository: USER is a placeholder",
            fix=f"Give --to NAME/{name} with your user name on the Hugging Face Hub, or a folder, as --to ./{name}",
        )
    return _hub(to, options.run, private=options.private, offline=options.dry_run)


def _hub(name: str, run: Path, *, private: bool, offline: bool) -> Destination:
    # Job scripts switch the hub off for training (HF_HUB_OFFLINE); it is read at import.
    os.environ.pop("HF_HUB_OFFLINE", None)
    from megatron_lite.interop.hub import Hub
    from megatron_lite.interop.hub_destination import HubDestination

    hub = Hub(name, flag="--to", private=private, notify=_note)
    if not offline:
        hub.check_access()
    return HubDestination(hub, run)


def _print(plan: Plan, destination: Destination) -> None:
    for batch, files in plan.copies:
        for file in files:
            print(f"copy    {file.name} ({format_size(file.size)})")
        if batch.folder:
            print(f"        {batch.folder} appears when all of its files are there")
    for name in plan.deleted:
        print(f"delete  {name}")
    count = sum(len(files) for _, files in plan.copies)
    print(
        f"{format_count(count, 'file')} to copy to {destination.name} ({format_size(plan.size)}), "
        f"{plan.unchanged:,} unchanged, {len(plan.deleted):,} to delete (--dry-run: nothing was done)"
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
