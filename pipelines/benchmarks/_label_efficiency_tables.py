"""Tables, figure and JSON of `label_efficiency.py`."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from _common import RESULTS, print_table, write_results

from medssl.evaluation.bootstrap import estimate


def tabulate(
    options: argparse.Namespace, split: dict[str, list[str]], scores: dict[Any, Any], stock: dict[Any, Any]
) -> None:
    """Choose each arm's rate, compare arms on the validation cases, write JSON and figure."""
    rows, differences, kept = [], [], {}
    for labels in options.labels:
        cases_of = {}
        for arm in options.arms:
            rate, looked = chosen_rate(options, split, scores, arm, labels)
            values = per_case(options, split, scores, arm, labels, rate)
            cases_of[arm] = kept[arm, labels] = values
            rows.append(row(arm, labels, values, rate=rate, selection=looked))
        for arm in options.arms:
            if arm != "scratch":
                differences.append(difference(f"{arm} - scratch", labels, cases_of[arm] - cases_of["scratch"]))
    for name in dict.fromkeys(name for name, _ in stock):
        labels = options.stock_labels
        seeds = [seed for seed in options.seeds if (name, seed) in stock]
        values = np.array([[stock[name, seed]["dice"][case] for case in split["validation"]] for seed in seeds])
        facts = [stock[name, seed] for seed in seeds]
        extra = {key: facts[0][key] for key in ("patch_size", "batch_size")}
        rows.append(
            row(
                f"nnU-Net, {name}",
                labels,
                values,
                steps=[fact["steps"] for fact in facts],
                cpu_s=[fact["cpu_s"] for fact in facts],
                **extra,
            )
        )
        for arm in options.arms:
            if (arm, labels) in kept:
                same = kept[arm, labels][[options.seeds.index(seed) for seed in seeds]]
                differences.append(difference(f"{arm} - nnU-Net, {name}", labels, same - values))
    print_table(
        [
            {key: shown(key, line.get(key)) for key in ("arm", "labels", "dice", "seeds", "rate", "steps")}
            for line in rows
        ]
    )
    print()
    print_table(
        [
            {key: shown(key, line[key]) for key in ("what", "labels", "difference", "seeds", "better")}
            for line in differences
        ]
    )
    draw(options, rows)
    payload = {
        "protocol": {
            **{name: value for name, value in vars(options).items() if name not in ("workdir", "data", "recipe")},
            "recipe": options.recipe.name,
            "cases": {name: len(names) for name, names in split.items()},
            "split": split,
            "pretraining": json.loads((options.workdir / "pretraining.json").read_text()),
            "fine_tuning": {
                key: float(np.median([score[key] for score in scores.values()]))
                for key in ("train_wall_s", "train_cpu_s")
            },
        },
        "arms": rows,
        "differences": differences,
    }
    print(f"\nWritten: {write_results(options.name, payload)}")


def chosen_rate(
    options: argparse.Namespace, split: dict[str, list[str]], scores: dict[Any, Any], arm: str, labels: int
) -> tuple[float, dict[str, float]]:
    """Return the rate with the best mean Dice on the selection cases, and what each rate had there."""
    looked, seeds = {}, options.seeds[: options.rate_seeds]
    for rate in options.rates:
        found = [
            score["dice"]
            for run, score in scores.items()
            if (run.arm, run.labels, run.rate) == (arm, labels, rate) and run.seed in seeds
        ]
        looked[f"{rate:g}"] = float(np.mean([[dice[case] for case in split["selection"]] for dice in found]))
    return max(options.rates, key=lambda rate: looked[f"{rate:g}"]), looked


def per_case(
    options: argparse.Namespace, split: dict[str, list[str]], scores: dict[Any, Any], arm: str, labels: int, rate: float
) -> np.ndarray:
    """Return the Dice of the validation cases. Shape: (seeds, cases)."""
    by_seed = {
        run.seed: score["dice"]
        for run, score in scores.items()
        if (run.arm, run.labels, run.rate) == (arm, labels, rate)
    }
    return np.array([[by_seed[seed][case] for case in split["validation"]] for seed in options.seeds])


def row(arm: str, labels: int, values: np.ndarray, **extra: Any) -> dict[str, Any]:
    """Describe an arm: mean over cases with its interval, and the mean of each seed."""
    return {
        "arm": arm,
        "labels": labels,
        "dice": estimate(values.mean(axis=0).tolist()).to_json(),
        "seeds": values.mean(axis=1).tolist(),
        **extra,
        "per_case": values.tolist(),
    }


def difference(what: str, labels: int, values: np.ndarray) -> dict[str, Any]:
    """Describe a paired difference in Dice. Shape of values: (seeds, cases)."""
    over_seeds = values.mean(axis=0)
    return {
        "what": what,
        "labels": labels,
        "difference": estimate(over_seeds.tolist()).to_json(),
        "seeds": values.mean(axis=1).tolist(),
        "better": f"{int((over_seeds > 0).sum())}/{over_seeds.size}",
    }


def shown(key: str, value: Any) -> str:
    """Return a cell: Dice in points of a hundred."""
    if value is None:
        return ""
    if key in ("dice", "difference"):
        sign = "+" if key == "difference" else ""
        ends = "" if value["low"] is None else f" [{100 * value['low']:{sign}.1f}, {100 * value['high']:{sign}.1f}]"
        return f"{100 * value['mean']:{sign}.1f}{ends}"
    if key == "seeds":
        return " ".join(f"{100 * number:.1f}" for number in value)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def draw(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Draw Dice against the number of labels: intervals as bars, seeds as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), dpi=110, layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(line["arm"] for line in rows))
    for number, name in enumerate(names):
        lines = [line for line in rows if line["arm"] == name]
        places = np.array(
            [options.labels.index(line["labels"]) if line["labels"] in options.labels else 0 for line in lines]
        )
        places = places + (number - (len(names) - 1) / 2) * 0.09
        means = np.array([line["dice"]["mean"] for line in lines])
        low = np.array(
            [line["dice"]["low"] if line["dice"]["low"] is not None else line["dice"]["mean"] for line in lines]
        )
        high = np.array(
            [line["dice"]["high"] if line["dice"]["high"] is not None else line["dice"]["mean"] for line in lines]
        )
        axis.errorbar(places, means, [means - low, high - means], marker="o", capsize=3, label=name, color=f"C{number}")
        for place, line in zip(places, lines, strict=True):
            axis.scatter([place] * len(line["seeds"]), line["seeds"], s=8, color=f"C{number}", alpha=0.5)
    axis.set_xticks(range(len(options.labels)), [str(labels) for labels in options.labels])
    axis.set_xlabel("labelled cases")
    axis.set_ylabel("Dice on validation cases")
    axis.legend(fontsize=7)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{options.name}.png", metadata={"Software": None})
