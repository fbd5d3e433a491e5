"""Whether processes use more than before."""

from collections.abc import Mapping
from dataclasses import dataclass

from loadtests.processes import ProcessKind, Usage

UsageByProcess = Mapping[int, tuple[ProcessKind, Usage]]


@dataclass(frozen=True, slots=True)
class GrowthLimits:
    """What counts as growth: more than a share of the memory and an amount, or more descriptors or threads.

    Allocators keep some freed memory, and a pool of threads fills up to its size with time.
    """

    memory_share: float = 0.10
    memory_mib: float = 24.0
    descriptors: int = 16
    threads: int = 8


def grown(before: UsageByProcess, after: UsageByProcess, limits: GrowthLimits) -> list[str]:
    """Descriptions of what has grown, for the processes that are in both."""
    problems = []
    for pid, (kind, was) in before.items():
        if pid not in after:
            continue
        now = after[pid][1]
        who = f"{kind} (pid {pid})"
        if now.memory_mib > was.memory_mib * (1 + limits.memory_share) + limits.memory_mib:
            problems.append(f"{who}: memory grew from {was.memory_mib:.0f} to {now.memory_mib:.0f} MiB")
        if now.descriptors > was.descriptors + limits.descriptors:
            problems.append(f"{who}: descriptors grew from {was.descriptors} to {now.descriptors}")
        if now.threads > was.threads + limits.threads:
            problems.append(f"{who}: threads grew from {was.threads} to {now.threads}")
    return problems


def ended(before: UsageByProcess, after: UsageByProcess) -> list[str]:
    """Processes that are gone. Ray starts and ends processes of other kinds by itself."""
    return [
        f"{kind} (pid {pid}) has ended"
        for pid, (kind, _) in before.items()
        if pid not in after and kind is not ProcessKind.OTHER
    ]
