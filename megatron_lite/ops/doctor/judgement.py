"""Node check rules: finds bad hosts and other problems in the reports of all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from megatron_lite.formatting import format_ranges, format_size
from megatron_lite.ops.doctor.measured import model_of, slow_devices, slow_links, slow_storage, wrong_clocks
from megatron_lite.ops.doctor.report import DEVICE, GPU_STATE, GROUPS, LINK_STEP, MATRIX_PRODUCT, STORAGE, Report
from megatron_lite.ops.doctor.verdict import Problem, Severity, Thresholds, Verdict, name_hosts

HARDWARE = frozenset({"ECC errors", "memory repair", MATRIX_PRODUCT})
"""Kinds for which a host is excluded whatever the other hosts have, also the only one of a job. A GPU that torch or
nvidia-smi does not find may be a fault of the container or of the environment."""


def judge(
    reports: Mapping[int, Report],
    *,
    missing: Sequence[int] = (),
    expected: Mapping[str, int] | None = None,
    join_seconds: float = 0.0,
    seconds: float = 0.0,
    lost: Iterable[int] = (),
    thresholds: Thresholds | None = None,
) -> Verdict:
    """Return the findings of a node check.

    Args:
        reports: by rank, complete or not.
        missing: ranks that did not join.
        expected: number of ranks by host, from the launcher; None or empty: unknown.
        join_seconds: for which rank 0 waited for the ranks.
        seconds: that the check took.
        lost: ranks whose process ended before its report was complete.
        thresholds: of the rules; None: the default.
    """
    limits = thresholds or Thresholds()
    ranks = [reports[rank] for rank in sorted(reports)]
    hosts = list(dict.fromkeys(report.host for report in ranks))
    unfinished = list(_unfinished(ranks, set(lost)))
    findings = [
        *_missing(ranks, missing, expected or {}, join_seconds),
        *unfinished,
        # Ranks that waited for a lost one are no problem of their own.
        *_failures(ranks, communication=not any(finding.excludes for finding in unfinished)),
        *_unmeasured(ranks),
        *_versions(ranks),
        *_gpu_states(ranks, limits),
        *slow_devices(ranks, limits),
        *_nodes(ranks, len(hosts), limits),
        *slow_storage(ranks, limits),
        *wrong_clocks(ranks, limits),
        *slow_links(ranks, limits),
    ]
    findings.sort(key=lambda finding: finding.severity == "warning")
    everyone = list(dict.fromkeys([*hosts, *(host for finding in findings for host in finding.hosts)]))
    return Verdict(
        findings=tuple(findings),
        excluded=_excluded(findings, len(everyone)),
        num_hosts=len(hosts),
        num_ranks=len(ranks),
        seconds=seconds,
        first_ranks={report.host: report.rank for report in reversed(ranks)},
    )


def _excluded(findings: Sequence[Problem], num_hosts: int) -> dict[str, str]:
    """Return the bad hosts with their reasons.

    What more than half of the hosts have is no fault of theirs: a full file system, a network that is down.
    """
    concerned: dict[str, set[str]] = {}
    for finding in findings:
        if finding.excludes:
            concerned.setdefault(finding.kind, set()).update(finding.hosts)
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        few = 2 * len(concerned.get(finding.kind, ())) <= num_hosts
        if finding.excludes and (few or finding.kind in HARDWARE):
            for host in finding.hosts:
                reasons.setdefault(host, []).append(finding.text)
    return {host: "; ".join(texts) for host, texts in reasons.items()}


def _missing(
    ranks: Sequence[Report], missing: Sequence[int], expected: Mapping[str, int], seconds: float
) -> Iterator[Problem]:
    if not missing:
        return
    joined = Counter(report.host for report in ranks)
    hosts = tuple(host for host, count in expected.items() if joined[host] < count)
    which = f"rank{'s' * (len(missing) > 1)} {format_ranges(missing)}"
    where = f", expected on {name_hosts(hosts)}" if hosts else "; the host is not known without srun"
    yield Problem(
        kind="missing ranks",
        text=f"{which} did not join within {seconds:.0f} s{where}",
        fix="See the output of these ranks, and check the network between their host and that of rank 0",
        hosts=hosts,
        excludes=True,
    )


def _unfinished(ranks: Sequence[Report], lost: set[int]) -> Iterator[Problem]:
    """Name ranks that ended or hang; those that only wait for such a rank are left out."""
    open_ranks = [report for report in ranks if not report.done]
    first = [report for report in open_ranks if not report.waits or report.rank in lost]
    for report in first:
        ended = report.rank in lost
        yield Problem(
            kind="lost rank" if ended else "hanging rank",
            text=f"{report.place} {'ended' if ended else 'hangs'} in: {report.step or 'start'}",
            fix="See its output and the kernel log of the host (dmesg)",
            hosts=(report.host,),
            excludes=True,
        )
    if waiting := [report for report in open_ranks if not first]:
        steps = ", ".join(dict.fromkeys(report.step for report in waiting))
        hosts = tuple(dict.fromkeys(report.host for report in waiting))
        yield Problem(
            kind="hanging communication",
            text=f"{_name_ranks(waiting)} hang in: {steps}",
            fix="Set NCCL_DEBUG=INFO, and check NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and the cables of these hosts",
            hosts=hosts,
        )


def _unmeasured(ranks: Sequence[Report]) -> Iterator[Problem]:
    """Report that the time was over before the measurements were; no host is at fault."""
    if short := [report for report in ranks if report.unmeasured]:
        steps = ", ".join(dict.fromkeys(report.unmeasured for report in short))
        yield Problem(
            kind="not enough time",
            text=f"{_name_ranks(short)}: the time of the check was over in: {steps}; later steps were not measured",
            fix="Give `megatron-lite doctor` a longer --timeout, or --fast",
        )


def _name_ranks(ranks: Sequence[Report]) -> str:
    numbers = format_ranges([report.rank for report in ranks])
    return f"rank{'s' * (len(ranks) > 1)} {numbers} ({name_hosts(report.host for report in ranks)})"


_FAILURE_FIXES = {
    DEVICE: "Check nvidia-smi on the host, and the GPUs that the job asks for (--gpus-per-node)",
    GPU_STATE: "Run nvidia-smi on the host; the driver may have to be reloaded",
    STORAGE: "Give --save a folder with space that every host may write to, or mount it on this host",
}


def _failures(ranks: Sequence[Report], *, communication: bool) -> Iterator[Problem]:
    """Name failed steps; equal failures of communication are one problem, and left out without `communication`."""
    waited: dict[tuple[str, str], list[Report]] = {}
    for report in ranks:
        for step, text in report.failures.items():
            if step == GROUPS or step.startswith(LINK_STEP):
                waited.setdefault((step, text), []).append(report)
                continue
            yield Problem(
                kind={GPU_STATE: "GPU driver", DEVICE: "GPU driver"}.get(step, step),
                text=f"{report.place}: {step} failed: {text}",
                fix=_FAILURE_FIXES.get(step, "See the output of this rank"),
                hosts=(report.host,),
                excludes=True,
            )
    for (step, text), failed in waited.items() if communication else ():
        hosts = tuple(dict.fromkeys(report.host for report in failed))
        yield Problem(
            kind="communication",
            text=f"{_name_ranks(failed)}: {step} failed: {text}",
            fix="Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the nodes, and NCCL_DEBUG=INFO",
            hosts=hosts,
        )


def _versions(ranks: Sequence[Report]) -> Iterator[Problem]:
    """Name the hosts whose versions or device differ from the most frequent ones."""
    for name in dict.fromkeys(name for report in ranks for name in (*report.versions, "device")):
        found: dict[str, list[Report]] = {}
        for report in ranks:
            value = model_of(report) if name == "device" else report.versions.get(name, "")
            if value or DEVICE not in report.failures:
                found.setdefault(value, []).append(report)
        if len(found) < 2:
            continue
        usual = max(found, key=lambda value: len(found[value]))
        for value, holders in found.items():
            if value != usual:
                hosts = tuple(dict.fromkeys(report.host for report in holders))
                yield Problem(
                    kind=f"different {name}",
                    text=f"{name} is {value or 'missing'} on {name_hosts(hosts)}, {usual or 'missing'} on the other "
                    f"{len(ranks) - sum(len(reports) for text, reports in found.items() if text != usual)} ranks",
                    fix="Ask for one kind of node (--constraint, --gpus-per-node)"
                    if name == "device"
                    else f"Use the same environment on every host, or update {name} there",
                    hosts=hosts,
                    severity="warning" if name in ("driver", "device") else "problem",
                )


def _gpu_states(ranks: Sequence[Report], limits: Thresholds) -> Iterator[Problem]:
    for report in ranks:
        gpu = report.gpu
        if gpu is None:
            continue

        def finding(kind: str, text: str, fix: str, severity: Severity = "problem", at: Report = report) -> Problem:
            excludes = severity == "problem"
            text = f"{at.place}: {text}"
            return Problem(kind=kind, text=text, fix=fix, hosts=(at.host,), severity=severity, excludes=excludes)

        reset = "Report the node: its GPU must be reset or replaced"
        if gpu.ecc_errors:
            yield finding("ECC errors", f"{gpu.ecc_errors} uncorrected ECC errors since the last reboot", reset)
        if gpu.repairs:
            yield finding("memory repair", gpu.repairs, reset)
        if gpu.throttling:
            fix = "Report the node: check its cooling and power supply"
            yield finding("throttling", f"the hardware slows the clock: {gpu.throttling}", fix, "warning")
        if gpu.memory_total and not gpu.mig and gpu.memory_free < limits.free_memory * gpu.memory_total:
            used = format_size(gpu.memory_total - gpu.memory_free)
            text = f"{used} of {format_size(gpu.memory_total)} GPU memory are in use by other processes"
            yield finding("occupied memory", text, "End these processes (nvidia-smi lists them)")


def _nodes(ranks: Sequence[Report], num_hosts: int, limits: Thresholds) -> Iterator[Problem]:
    for report in ranks:
        node = report.node
        if node is None:
            continue
        if node.shm_free < limits.shm:
            yield Problem(
                kind="small /dev/shm",
                text=f"{report.host}: /dev/shm has {format_size(node.shm_free)} free of {format_size(node.shm_total)}",
                fix="Remove files left there, or start the container with --shm-size 8g: NCCL and data loading use it",
                hosts=(report.host,),
                severity="warning",
            )
        if node.loopback and num_hosts > 1:
            yield Problem(
                kind="loopback address",
                text=f"{report.host}: its own name resolves to {node.loopback}, an address that no other host reaches",
                fix="Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the nodes, or map "
                "the name to the network address in /etc/hosts",
                hosts=(report.host,),
                severity="warning",
            )
