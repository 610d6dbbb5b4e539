"""CLI command `plan`: predicts time, memory, disk, cost and node failures of a training command."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lite.cli.standard_output import discard_output, flush_output
from megatron_lite.config.arguments import asks_for_help, parse_command, raise_all
from megatron_lite.config.table import flags_by_spelling, spelling
from megatron_lite.config.values import is_utf8, read_float, read_int, shortened, shown_bytes
from megatron_lite.errors import ConfigError, ConfigErrors, MegatronLiteError

if TYPE_CHECKING:
    from megatron_lite.config.arguments import ParsedRun
    from megatron_lite.planner.calibration import Calibration
    from megatron_lite.planner.hardware import Hardware
    from megatron_lite.planner.job import Assumptions

SUMMARY = "time, memory, disk, cost and failures of a training command, before it is queued"
DEFAULT_GPU = "h100-80gb"
DEFAULT_GPUS = {"cpu": "cpu", "xla": "tpu-v4"}
"""Data sheets of --device cpu and xla, if --gpu is not given."""
MAX_DEVICES = 10**6
USAGE = f"""usage: megatron-lite plan FLAG [VALUE] … [--world-size N] [OPTION …]
       megatron-lite plan [OPTION …] torchrun --nproc-per-node 8 pretrain_gpt.py FLAG [VALUE] …
       megatron-lite plan [OPTION …] 'srun … bash -c "…"'

Takes the flags of pretrain_gpt.py, or the job's complete command with its
launcher (quote it if it contains quotes itself), and needs neither a GPU nor
the data. Exit code 1: the run does not fit, cannot finish, or exceeds
--budget-hours; or the command line has an error.

machine
  --gpu NAME               data sheet to use (default: {DEFAULT_GPU}, cpu with --device
                           cpu, {DEFAULT_GPUS["xla"]} with --device xla); an unknown name lists all
  --gpus-per-node N        (default: those of the vendor's reference system)
  --network-gbit X         Gbit/s of one GPU to other nodes (likewise)
  --write-gbytes X         GB/s of all nodes to the file system (default: 1 for
                           each node, at most 16)
  --calibrate FILE         fit the efficiencies to a run's metrics.jsonl; best
                           with --timing-log-level 1
operation
  --job-hours X            time limit of one job (default: --exit-duration-in-mins)
  --restart-minutes X      from the end of a job to the next iteration (default: 10)
  --node-mttf-hours X      mean time between failures of a node (default: 6,000)
cost
  --budget-hours X         GPU hours that are allowed
  --gpu-watts X            (default: power limit of the data sheet)
  --pue X                  energy of the center per energy of the GPUs (default: 1.2)
  --carbon-intensity X     grams of CO2 per kWh
  --gpu-hour-price X       in any currency

  --search                 instead of the plan, the fastest layouts that fit: tp, cp,
                           pp, virtual stages, schedule, micro-batch,
                           recomputation and ZeRO-1 for this model, batch and
                           --world-size
  --json                   print one JSON object instead of tables"""


Option = tuple[Callable[[str], Any], str]


def _number(read: Callable[[str], float], kind: str, least: float, most: float) -> Option:
    """Return the reader of a number between bounds, which keep every result of a plan finite, and its description."""

    def bounded(text: str) -> float:
        number = read(text)
        if not least <= number <= most:
            raise ValueError
        return number

    return bounded, f"{kind} from {least:,} to {most:,}"


def _real(least: float, most: float) -> Option:
    return _number(read_float, "a number", least, most)


OPTIONS: dict[str, Option] = {
    "--gpu": (str, f"a name such as {DEFAULT_GPU}"),
    "--gpus-per-node": _number(read_int, "a whole number", 1, MAX_DEVICES),
    "--network-gbit": _real(0.001, 10**6),
    "--write-gbytes": _real(0.001, 10**6),
    "--calibrate": (Path, "the path of a run's metrics.jsonl"),
    "--job-hours": _real(0.01, 10**6),
    "--restart-minutes": _real(0, 10**4),
    "--node-mttf-hours": _real(0.001, 10**9),
    "--budget-hours": _real(0.001, 10**12),
    "--gpu-watts": _real(1, 10**5),
    "--pue": _real(1, 10),
    "--carbon-intensity": _real(0.1, 10**4),
    "--gpu-hour-price": _real(0.0001, 10**6),
}
"""Options with a value: what reads it, and its description."""
SWITCHES = ("--json", "--search")
PLAIN_VALUE = re.compile(r"[\d.]+|yes|no|true|false|on|off", re.IGNORECASE)
"""Values that name no launcher."""
SEARCH_OPTIONS = frozenset({"--gpu", "--gpus-per-node", "--network-gbit", "--calibrate"})
"""Options that --search uses."""


@dataclass
class Request:
    """Options of the command, separated from the training command.

    Attributes:
        values: by option.
        words: the training command.
        errors: options with a missing or invalid value.
        as_json: --json was given.
        search: --search was given.
    """

    values: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    errors: list[ConfigError] = field(default_factory=list)
    as_json: bool = False
    search: bool = False

    def get(self, option: str, default: Any) -> Any:
        """Return the value of an option, or its default."""
        return self.values.get(option, default)


def run(argv: list[str]) -> int:
    """Plan the training command `argv`; return 1 if it does not fit, cannot finish or exceeds the budget."""
    if asks_for_help(argv):
        print(USAGE)
        return 0
    from megatron_lite.cli.plan_search import print_search
    from megatron_lite.cli.plan_tables import print_plan

    request = read_request(argv)
    record, problems = (_search(request), False) if request.search else make_plan(request)
    try:
        if request.as_json:
            print(json.dumps(record, indent=2, allow_nan=False))
        elif request.search:
            print_search(record)
        else:
            print_plan(record)
        flush_output()
    except BrokenPipeError:  # `megatron-lite plan … | head`: the exit code is still the answer
        discard_output()
    return 1 if problems else 0


def _search(request: Request) -> dict[str, Any]:
    """Return the best layouts as a JSON record; nothing that a search does not use may be asked for."""
    from megatron_lite.cli.plan_search import search_record

    unused = [name for name in request.values if name not in SEARCH_OPTIONS]
    if unused:
        request.errors.append(
            ConfigError(
                f"{' and '.join(unused)} {'have' if len(unused) > 1 else 'has'} no effect with --search",
                fix=f"Remove {' and '.join(unused)}, or remove --search",
            )
        )
    parsed, machine, calibration = _inputs(request)
    return search_record(parsed, machine, is_calibrated=calibration is not None)


def read_request(argv: Sequence[str]) -> Request:
    """Separate the options of the command from the training command.

    A launcher has options of the same names (srun --gpus-per-node): from its name to the training script they are its
    own.
    """
    request, words = Request(), list(argv)
    ranks: list[str] = []  # --world-size before the launcher
    script = next((place for place, word in enumerate(words) if word.endswith(".py")), -1)
    place, in_launcher = 0, False
    while place < len(words):
        word = words[place]
        name, equals, value = word.partition("=")
        option = name.replace("_", "-")
        place += 1
        if in_launcher:
            in_launcher = place <= script
            request.words.append(word)
        elif word in SWITCHES:
            request.as_json |= word == "--json"
            request.search |= word == "--search"
            place += _refuse_value(request, word, words[place:], "no value")
        elif option in OPTIONS:
            if not equals:
                value = words[place] if place < len(words) and not words[place].startswith("--") else ""
                place += bool(value)
            _read(request, option, value)
            place += _refuse_value(request, word, words[place:], "one value")
        elif spelling(name) == "--world-size" and not request.words:
            ranks = [word] if equals else words[place - 1 : place + 1]
            place += not equals
        elif (near := _nearest_option(word)) is not None:
            request.errors.append(ConfigError(f"Unknown option {name} of plan", fix=f"Write {near}"))
            place += not equals and place < len(words) and not words[place].startswith("--")
        else:
            in_launcher = not word.startswith("-") and not request.words and place <= script
            request.words.append(word)
    request.words += ranks
    return request


def _refuse_value(request: Request, word: str, rest: Sequence[str], values: str) -> bool:
    """Refuse a value too many of an option; return whether there is one.

    Amid training flags every word after an option and its value is one: the flag before the option would take it as its
    own. Before the training command it may be the launcher, unless it is a number or a truth value.
    """
    is_value = bool(rest) and not rest[0].startswith("-") and bool(request.words or PLAIN_VALUE.fullmatch(rest[0]))
    if is_value:
        request.errors.append(
            ConfigError(f"{word} takes {values}, but {shortened(rest[0])} follows", fix=f"Remove {shortened(rest[0])}")
        )
    return is_value


def _nearest_option(word: str) -> str | None:
    """Return the option that a misspelled word resembles; None: the word is a training flag, or resembles none."""
    name = spelling(word)
    if not name.startswith("--") or name in flags_by_spelling():
        return None
    whole = [option for option in OPTIONS if name[2:] in option[2:].split("-")]
    near = difflib.get_close_matches(name, [*OPTIONS, *SWITCHES], n=1, cutoff=0.8)
    return whole[0] if len(whole) == 1 else next(iter(near), None)


def _read(request: Request, name: str, value: str) -> None:
    read, kind = OPTIONS[name]
    if name in request.values:
        request.errors.append(ConfigError(f"{name} is given twice", fix=f"Remove one {name}"))
        return
    if not value:
        request.errors.append(ConfigError(f"{name} has no value", fix=f"Give {name} {kind}"))
        return
    try:
        if not is_utf8(value):
            raise ValueError
        request.values[name] = read(value)
    except ValueError:
        shown = repr(shortened(value)) if is_utf8(value) else shown_bytes(value)
        request.errors.append(ConfigError(f"Cannot read {name} {shown}", fix=f"Give {name} {kind}"))


def make_plan(request: Request) -> tuple[dict[str, Any], bool]:
    """Return the plan as a JSON record, and whether the run does not fit, cannot finish or exceeds the budget.

    Raises:
        ConfigError, ConfigErrors: of all that is wrong with options and training command.
    """
    from megatron_lite.cli.plan_record import plan_record

    parsed, machine, calibration = _inputs(request)
    return plan_record(parsed, machine, assumptions_of(request), request.get("--budget-hours", 0.0), calibration)


def _inputs(request: Request) -> tuple[ParsedRun, Hardware, Calibration | None]:
    """Return the training command, the machine and its calibration.

    Raises:
        ConfigError, ConfigErrors: of all that is wrong with options and training command.
    """
    errors = list(request.errors)
    parsed = _collected(errors, lambda: _parsed(request))
    device = parsed.config.runtime.device if parsed else "auto"
    calibration = _collected(errors, lambda: _calibration(request))
    machine = _collected(errors, lambda: calibration.machine if calibration else _machine(request, device))
    raise_all(errors)
    assert machine is not None and parsed is not None
    return parsed, machine, calibration


def _collected(errors: list[ConfigError], read: Callable[[], Any]) -> Any:
    """Return what `read` returns; None: it raised errors, which were added to the list."""
    try:
        return read()
    except ConfigErrors as several:
        errors += several.errors
    except ConfigError as error:
        errors.append(error)
    except MegatronLiteError as error:
        errors.append(ConfigError(error.problem, rule=error.rule, fix=error.fix))
    return None


def _parsed(request: Request) -> ParsedRun:
    parsed = parse_command(request.words)
    if parsed.config.training.skip_train:
        raise ConfigError(
            "The command evaluates only (--skip-train), and has no iteration to plan",
            fix="Remove --skip-train to plan the training",
        )
    return parsed


def _machine(request: Request, device: str = "auto") -> Hardware:
    """Return the machine of the options; without --gpu, of the training command's --device."""
    from megatron_lite.planner.hardware import hardware

    return hardware(
        request.get("--gpu", DEFAULT_GPUS.get(device, DEFAULT_GPU)),
        per_node=request.get("--gpus-per-node", 0),
        network_gbit=request.get("--network-gbit", 0.0),
    )


def _calibration(request: Request) -> Calibration | None:
    """Return the machine fitted to a run: without --gpu, the device of that run."""
    path = request.get("--calibrate", None)
    if path is None:
        return None
    from megatron_lite.planner.calibration import calibrate, run_of
    from megatron_lite.planner.hardware import device_of

    config, device, measurements = run_of(path)
    known = device_of(device)
    if "--gpu" not in request.values:
        name = known.name if known is not None else "cpu"
        request = replace(request, values={**request.values, "--gpu": name})
    return calibrate(config, _machine(request), measurements)


def assumptions_of(request: Request) -> Assumptions:
    """Return the assumptions of a plan, from the options."""
    from megatron_lite.planner.job import Assumptions

    default = Assumptions()
    return Assumptions(
        write_rate=request.get("--write-gbytes", 0.0) * 1e9,
        restart_seconds=request.get("--restart-minutes", default.restart_seconds / 60.0) * 60.0,
        node_hours=request.get("--node-mttf-hours", default.node_hours),
        job_seconds=request.get("--job-hours", 0.0) * 3600.0,
        watts=request.get("--gpu-watts", 0.0),
        pue=request.get("--pue", default.pue),
        carbon=request.get("--carbon-intensity", 0.0),
        price=request.get("--gpu-hour-price", 0.0),
    )
