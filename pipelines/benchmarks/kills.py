"""Does anything get lost when a command is killed with SIGKILL, and does it end as if it had not been?

python pipelines/benchmarks/kills.py --kills 40 --saves 40

Runs index, preprocess, pretrain, finetune segmentation and predict once without interruption, and then each `--kills`
times more: killed at a random moment between its start and its end, looked over for files that are not whole, continued
in the verb's own way, and compared with the uninterrupted one: bytes of the manifest, hash of the store, weights and
metrics bit for bit, masks voxel for voxel. Only the process itself is killed; those that it had started must end by
themselves. Then a checkpoint is saved over itself and killed in the middle of it, by plain torch.save and by medssl.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import print_table, write_results
from _kills import Child, broken_files, found_apart, leftovers
from _kills_saves import save_trials
from _kills_verbs import Verb, make_inputs, make_verbs, warm_up

SECONDS_UNTIL_HUNG = 900.0


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=40, help="per verb")
    parser.add_argument("--saves", type=int, default=40, help="kills per way to save a checkpoint")
    parser.add_argument("--verbs", default="", help="only these, by comma; those before them run once")
    parser.add_argument("--steps", type=int, default=30, help="of the pretraining")
    parser.add_argument("--megabytes", type=int, default=48, help="of the checkpoint that is saved")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop the trials of verbs after so long")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    warm_up()
    trials: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        saves = save_trials(scratch, options.saves, options.megabytes, rng) if options.saves else []
        print_table(saves)
        verbs = make_verbs(scratch, make_inputs(scratch), options.steps)
        seconds = {verb.name: _whole(verb, scratch) for verb in verbs}
        wanted = options.verbs.split(",") if options.verbs else list(seconds)
        end = time.monotonic() + 60 * options.minutes
        # The verbs take turns, so that what the time does not suffice for is missing from all alike.
        for number in range(options.kills):
            for verb in verbs:
                if verb.name in wanted and time.monotonic() < end:
                    trials.append(_trial(verb, scratch, number, seconds[verb.name], rng))
            summary = [_summary(verb, trials, seconds[verb.name]) for verb in verbs]
            write_results("kills", {"settings": vars(options), "saves": saves, "verbs": summary, "trials": trials})
    print_table(summary)
    print(f"\n{sum(row['as if not killed'] for row in summary)} of {len(trials)} killed and resumed runs lost nothing")
    if any(row["faults"] for row in trials):
        sys.exit(1)


def _whole(verb: Verb, scratch: Path) -> float:
    """Run a verb without interruption and return how long it took."""
    started = time.monotonic()
    child = Child(lambda: verb.run(scratch / f"whole_{verb.name}", False, 0))
    child.wait()
    child.survivors()
    return time.monotonic() - started


def _trial(verb: Verb, scratch: Path, number: int, seconds: float, rng: random.Random) -> dict[str, Any]:
    """Kill a verb at a random moment, look at what it left, let it go on, and compare."""
    out = scratch / "killed"
    while True:
        moment = rng.uniform(0, seconds)
        killed = Child(lambda: verb.run(out, False, number))
        if killed.wait(moment):
            break
        # It was faster than the uninterrupted one and ended first: that is no kill.
        shutil.rmtree(out)
    faults = found_apart(lambda: [f"not whole: {name}" for name in broken_files(out)])
    left = len(leftovers(out))
    # It goes on at once: what the killed one had started may still be at work.
    continued = Child(lambda: verb.run(out, True, number))
    try:
        if continued.wait(SECONDS_UNTIL_HUNG):
            faults.append("hung when it went on")
        else:
            faults += found_apart(lambda: _faults(verb, out, scratch / f"whole_{verb.name}"))
    except RuntimeError as error:
        faults.append(f"could not go on: {error}")
    for child in (killed, continued):
        faults += ["a process lived on" for _ in child.survivors()]
    shutil.rmtree(out)
    row = {"verb": verb.name, "killed after (s)": round(moment, 2), "temporary files": left, "faults": faults}
    print(*row.values(), flush=True)
    return row


def _faults(verb: Verb, out: Path, whole: Path) -> list[str]:
    return [
        *(f"differs: {name}" for name in verb.differences(out, whole)),
        *(f"not whole: {name}" for name in broken_files(out)),
        *(f"left behind: {name}" for name in leftovers(out)),
    ]


def _summary(verb: Verb, trials: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    rows = [row for row in trials if row["verb"] == verb.name]
    return {
        "verb": verb.name,
        "kills": len(rows),
        "as if not killed": sum(not row["faults"] for row in rows),
        "files not whole": sum(any(f.startswith("not whole") for f in row["faults"]) for row in rows),
        "processes lived on": sum("a process lived on" in row["faults"] for row in rows),
        "goes on by": verb.goes_on,
        "uninterrupted (s)": round(seconds, 2),
    }


if __name__ == "__main__":
    main()
