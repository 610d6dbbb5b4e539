"""CLI command `export`: writes a checkpoint as Hugging Face, Megatron-LM or DeepSpeed files; pushes to the hub."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_lite.cli import export_megatron
from megatron_lite.cli.import_ import DTYPES, add_verification
from megatron_lite.cli.model_arguments import note
from megatron_lite.cli.parser import Parser, whole
from megatron_lite.cli.tokenizer_arguments import FILE_FIELDS, add_tokenizer_arguments, tokenizer_fields
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_size

if TYPE_CHECKING:
    from megatron_lite.interop.export import ExportPlan, ExportReport
    from megatron_lite.interop.hub import Hub
    from megatron_lite.runs.evaluations import Evaluation

SUMMARY = "export a checkpoint as a Hugging Face model (and push it), or as Megatron-LM or DeepSpeed files"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run(argv: list[str]) -> int:
    """Export the checkpoint that `argv` names."""
    parser = _parser()
    options = parser.parse_args(argv)
    export_megatron.check(options, parser)
    if options.to != "hf":
        return export_megatron.run(options)
    _check(options, parser)
    hub = _hub(options)
    if options.revisions_from_run:
        return _push_revisions(options, hub)
    plan = _plan(options, options.load_iteration)
    with _output(options.output) as output:
        report = _export(plan, options, output)
        if options.push_to:
            _push(report, plan, options, hub, options.revision)
    return 0


def _check(options: argparse.Namespace, parser: Parser) -> None:
    if not options.output and not options.push_to:
        parser.error("say where to: --output DIR, or --push-to USER/NAME")
    if not options.push_to:
        for name in ("private", "dry_run", "revisions_from_run"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')} goes with --push-to")
    if options.revisions_from_run and (options.output or options.load_iteration or options.revision != "main"):
        parser.error(
            "--revisions-from-run exports every checkpoint as its own revision: leave --output, "
            "--load-iteration and --revision out"
        )
    if options.evaluation is not None:
        from megatron_lite.interop.model_card import read_evaluation

        read_evaluation(options.evaluation)


def _hub(options: argparse.Namespace) -> Hub | None:
    """Return the repository to push to, once it is known that it can be written; a dry run asks nobody."""
    if not options.push_to or options.dry_run:
        return None
    from megatron_lite.interop.hub import Hub

    hub = Hub(options.push_to, private=options.private, notify=note)
    hub.check_access()
    return hub


def _plan(options: argparse.Namespace, iteration: int) -> ExportPlan:
    import torch

    from megatron_lite.interop.export import ExportOptions, plan_export

    chosen = ExportOptions(
        architecture=options.architecture,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        averaged=options.ema,
        max_shard_size=options.max_shard_size,
        tokenizer=tokenizer_fields(options) if options.tokenizer else None,
        verify=options.verify,
        tolerance=options.tolerance,
    )
    return plan_export(options.load, iteration, chosen)


def _export(plan: ExportPlan, options: argparse.Namespace, output: Path) -> ExportReport:
    from megatron_lite.cli.progress import stage_progress
    from megatron_lite.interop.export import export_checkpoint

    with stage_progress() as advance:
        report = export_checkpoint(plan, output, card=_card_writer(plan, options, output), advance=advance)
    where = f"as {report.path}" if options.output else "for the hub"
    print(
        f"exported {plan.path} {where}: {plan.architecture.name}, {len(report.files)} files, {format_size(report.size)}"
    )
    print(str(report.verification) if report.verification else "the logits were not compared with transformers'")
    return report


def _card_writer(plan: ExportPlan, options: argparse.Namespace, output: Path) -> Any:
    from megatron_lite.interop.model_card import CardFacts, write_card

    name = options.push_to.partition("/")[2] if options.push_to else output.name
    metrics = plan.manifest.provenance.config.get("metrics", {}).get("metrics_file")
    facts = CardFacts(
        name=name,
        architecture=plan.architecture.name,
        model=plan.stored.model,
        manifest=plan.manifest,
        metrics=Path(metrics) if metrics else plan.path.parent / "metrics.jsonl",
        evaluations=_evaluations(plan, options),
        seq_length=plan.stored.seq_length,
        dtype=str(plan.dtype).removeprefix("torch."),
    )

    def write(folder: Path, verification: Any) -> None:
        if options.card:
            write_card(folder, facts, verification)

    return write


def _evaluations(plan: ExportPlan, options: argparse.Namespace) -> list[Evaluation]:
    """Return the results of --evaluation and those that are recorded in the folder of the run."""
    from megatron_lite.interop.model_card import read_evaluation
    from megatron_lite.runs.evaluations import checkpoint_identity, read_evaluations

    identity = checkpoint_identity(plan.path)
    recorded = [one for one in read_evaluations(plan.path.parent) if one.checkpoint == identity]
    return [*recorded, *(read_evaluation(options.evaluation) if options.evaluation is not None else ())]


def _push(report: ExportReport, plan: ExportPlan, options: argparse.Namespace, hub: Hub | None, revision: str) -> None:

    if hub is None:
        print(f"would push to {options.push_to}, revision {revision}:")
        for name in report.files:
            print(f"  {format_size((report.path / name).stat().st_size):>10}  {name}")
        return
    address = hub.push(report.path, revision, f"Iteration {plan.manifest.iteration}")
    print(f"pushed to {options.push_to}, revision {revision}: {address}")


def _push_revisions(options: argparse.Namespace, hub: Hub | None) -> int:
    """Export and push every complete checkpoint of a run, each as the revision iter_N; what is there is passed over."""
    from megatron_lite.runs.catalog import iteration_of, list_checkpoints

    found = list_checkpoints(Path(options.load))
    if not found:
        raise ConfigError(
            f"{options.load} contains no complete checkpoint for --revisions-from-run to export",
            fix="Give the --save folder of a run",
        )
    plans = [_plan(options, iteration_of(path) or 0) for path in found]
    there = hub.revisions() if hub is not None else set()
    for plan in plans:
        revision = f"iter_{plan.manifest.iteration}"
        if revision in there:
            print(f"{options.push_to} has revision {revision} already")
            continue
        with _output(None) as output:
            _push(_export(plan, options, output), plan, options, hub, revision)
    return 0


@contextmanager
def _output(given: Path | None) -> Iterator[Path]:
    """Yield the folder to export into: the one given, or a temporary one."""
    if given is not None:
        yield given
        return
    with TemporaryDirectory(prefix="megatron-lite-export-") as folder:
        yield Path(folder) / "model"


def _size(text: str) -> int:
    """Return the bytes of 5GB, 200MB, 1GiB or a plain number."""
    number, unit = text.strip().upper(), ""
    for name in _UNITS:
        if number.endswith(name):
            number, unit = number.removesuffix(name), name
    try:
        size = int(float(number) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 200MB")
    return size


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-lite export",
        description="Write a checkpoint, of any layout, as a Hugging Face model: config.json, safetensors, tokenizer "
        "and model card. transformers loads the result, and its logits are compared, before it gets its name. "
        "With --to megatron or deepspeed, write it as files that Megatron-LM or Megatron-DeepSpeed load, for any "
        "tensor and pipeline size.",
    )
    parser.add_argument("load", metavar="LOAD", help="a run's --save folder, or one checkpoint in it")
    parser.add_argument(
        "--to",
        choices=("hf", "megatron", "deepspeed"),
        default="hf",
        help="format: Hugging Face, Megatron-LM classic, DeepSpeed layer files (default: hf)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--load-iteration", type=whole(), default=0, metavar="N", help="which checkpoint (default: latest)"
    )
    parser.add_argument(
        "--ema", action="store_true", help="export the moving average of the weights, from a run with --ema-decay"
    )
    parser.add_argument(
        "--architecture", default="", metavar="CLASS", help="class of transformers (default: follows from the model)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="", help="of the weights (default: as they were saved)")
    parser.add_argument(
        "--max-shard-size", type=_size, default=5 * 10**9, metavar="SIZE", help="of a weights file (default: 5GB)"
    )
    add_verification(parser)
    parser.add_argument(
        "--no-tokenizer", dest="tokenizer", action="store_false", help="leave the tokenizer's files out"
    )
    add_tokenizer_arguments(parser, *FILE_FIELDS, note="if the tokenizer's files have moved")
    export_megatron.add_layout_arguments(parser.add_argument_group("Megatron-LM and DeepSpeed"))
    card = parser.add_argument_group("model card")
    card.add_argument("--no-card", dest="card", action="store_false", help="write no README.md")
    card.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="output of `megatron-lite evaluate --json`, for the model card"
    )
    hub = parser.add_argument_group("hub")
    hub.add_argument("--push-to", default="", metavar="USER/NAME", help="upload to this repository of the hub")
    hub.add_argument("--private", action="store_true", help="make it private, if it does not exist yet")
    hub.add_argument("--revision", default="main", metavar="NAME", help="branch to push to (default: main)")
    hub.add_argument(
        "--dry-run", action="store_true", help="export and list files and sizes, but push nothing and ask nobody"
    )
    hub.add_argument(
        "--revisions-from-run",
        action="store_true",
        help="push every checkpoint of the run as revision iter_N; those that are there are passed over",
    )
    return parser
