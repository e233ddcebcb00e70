"""Does any damaged DICOM or NIfTI header escape, hang or take memory without bound?

    python pipelines/benchmarks/fuzz.py --mutations 100000 [--seconds S] [--seed N] [--workers N]

Small whole files (enhanced, mosaic, PET, ultrasound, compressed, deflated, NIfTI-1 and -2, gzip) are damaged in one to
four places and read as `medssl index` reads them: header, plan, decoding, in limited processes. Seed and number decide
the damage, whatever the number of workers. Found is: an end that is no documented code, an accepted volume that cannot
be one, a hang past the limit, and memory above the limit; each is told with its number, and the exit status is 1.
`--show NUMBER FILE` writes one damaged file. Results are written for whole runs without `--no-results`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

from _common import print_table, write_results  # noqa: E402
from _fuzz import Input, Read, damaged, read_damaged, sources  # noqa: E402

from medssl.archive.codes import CODES  # noqa: E402
from medssl.archive.sandbox import Limits, Pool  # noqa: E402
from medssl.archive.sandbox_worker import Outcome  # noqa: E402

#: Address space of a process; what it really used is measured besides.
ADDRESS_SPACE_MB = 1536
BATCH = 50


@dataclass
class Report:
    """What came of all inputs.

    Attributes:
        ends: Inputs by end.
        kinds: Inputs by file that was damaged.
        unforeseen: Inputs that a library or our reader ended with an exception that names no code of its own, by place.
        findings: (number, what) of each escape, hang and excess of memory.
        late: Inputs that ended in time only when they were tried again.
        peak_mb: Largest memory of a process.
        seconds: Time of the run.
    """

    ends: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    unforeseen: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str]] = field(default_factory=list)
    late: int = 0
    peak_mb: float = 0.0
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Return how many inputs were read."""
        return self.ends.total()


def fuzz(
    mutations: int, *, seed: int = 0, seconds: float = float("inf"), workers: int = 1, hang: float = 10.0,
    memory_mb: float = 1024.0,
) -> Report:  # fmt: skip
    """Read damaged files and report how they ended.

    Args:
        mutations: Most inputs.
        seed: Decides the damage together with the input's number.
        seconds: Time after which no more inputs are begun.
        workers: Processes.
        hang: Seconds that one input may take: of the clock, or tried again with more, of the processor.
        memory_mb: Resident memory that a process may reach, in MiB.
    """
    report = Report()
    names = list(sources())
    begun = time.monotonic()

    def inputs(folder: str) -> Iterator[Input]:
        for number in range(mutations):
            if time.monotonic() - begun > seconds:
                return
            yield Input(number, seed, folder)

    def enter(item: Input, outcome: Outcome) -> None:
        read = outcome.value if isinstance(outcome.value, Read) else Read(outcome.code, "", 0.0, 0.0)
        report.ends[read.end] += 1
        report.kinds[names[item.number % len(names)]] += 1
        report.peak_mb = max(report.peak_mb, read.peak_mb)
        if outcome.code in ("decode_failed", "decode_crashed"):
            report.unforeseen[outcome.detail] += 1
        finding = _finding(read, memory_mb, hang)
        if finding:
            report.findings.append((item.number, finding))

    limits, patient = (Limits(memory_mb=ADDRESS_SPACE_MB, seconds=seconds) for seconds in (hang, 20 * hang))
    late = []
    with tempfile.TemporaryDirectory() as folder, Pool(workers, limits) as pool:
        for item, outcome in pool.map(read_damaged, inputs(folder), batch=BATCH):
            if outcome.code == "decode_timeout":
                late.append(item)
            else:
                enter(item, outcome)
        # On a busy machine the start of a process alone may take the time of one input: these get more of the clock,
        # and their processor time is what counts.
        for item, outcome in pool.map(read_damaged, late, limits=patient):
            report.late += outcome.code != "decode_timeout"
            enter(item, outcome)
    report.findings.sort()
    report.seconds = time.monotonic() - begun
    return report


def _finding(read: Read, memory_mb: float, hang: float) -> str:
    if read.end not in CODES and read.end not in ("volume", "related"):
        return f"escape: the end '{read.end}' is no documented code"
    if read.fault:
        return f"escape: {read.fault}"
    if read.end == "decode_timeout" or read.seconds > hang:
        return "hang"
    if read.end == "decode_memory" or (read.peak_mb > memory_mb and read.grown_mb > 0):
        return f"memory: {read.peak_mb:.0f} MiB"
    return ""


def main() -> None:
    """Run, print, write the results; exit with 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--no-results", action="store_true", help="write no results")
    parser.add_argument("--show", nargs=2, metavar=("NUMBER", "FILE"), help="write this damaged file and end")
    arguments = parser.parse_args()
    if arguments.show:
        Path(arguments.show[1]).write_bytes(damaged(arguments.seed, int(arguments.show[0]))[1])
        return
    report = fuzz(arguments.mutations, seed=arguments.seed, seconds=arguments.seconds, workers=arguments.workers)
    print_table([{"end": end, "inputs": count} for end, count in report.ends.most_common()])
    print(f"\n{report.count} inputs in {report.seconds:.0f} s, at most {report.peak_mb:.0f} MiB in a process.")
    print(f"{report.late} were late, and in time when tried again.")
    for place, count in report.unforeseen.most_common(20):
        print(f"  {count:6d} contained: {place}")
    for number, what in report.findings:
        print(f"seed {arguments.seed} number {number}: {what}")
    if not arguments.no_results:
        payload = {
            "seed": arguments.seed,
            "asked": arguments.mutations,
            "read": report.count,
            "seconds": round(report.seconds, 1),
            "workers": arguments.workers,
            "in_time_only_when_tried_again": report.late,
            "peak_mb": round(report.peak_mb, 1),
            "ends": dict(report.ends.most_common()),
            "kinds": dict(report.kinds),
            "unforeseen": dict(report.unforeseen.most_common()),
            "findings": report.findings,
        }
        print(f"Written: {write_results('fuzz', payload).relative_to(REPOSITORY)}")
    sys.exit(bool(report.findings))


if __name__ == "__main__":
    main()
