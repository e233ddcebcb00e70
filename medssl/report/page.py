"""One self-contained HTML page about a RUN: nothing is loaded from elsewhere, nothing tells of patients or machines."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl import __version__
from medssl.errors import UsageError
from medssl.files import write_text
from medssl.inference.embed import FEATURES
from medssl.inference.predict import NOTICE, TABLE
from medssl.report.classification import Scores, describe_classification
from medssl.report.facts import RunFacts, read_facts
from medssl.report.figures import curve_figures
from medssl.report.gates import TEMPLATE, describe_gates, write_prediction_report
from medssl.report.segments import Segments, describe_segments

logger = logging.getLogger(__name__)

NAME = "report.html"
MOST_RECONSTRUCTIONS = 4
WIDEST_PICTURE = 1400
LONGEST_LIST = 12
LARGEST_PICTURE = 400_000  # bytes; a larger PNG is stored as JPEG


@dataclass(frozen=True)
class Picture:
    """An embedded picture.

    Args:
        caption: Below it.
        data: A `data:` address.
        alt: What it shows.
    """

    caption: str
    data: str
    alt: str


def report(run: Path) -> Path:
    """Write `report.html` into a RUN and return its path.

    Works for pretraining, segmentation and classification RUNs, also unfinished ones: what is missing is listed on the
    page. The validation masks of a segmentation RUN are measured if that was not done yet. Of a folder of `medssl
    embed` the page is a map of its features, of one of `medssl predict` the verdicts of the gates.

    Args:
        run: The RUN, or the folder.

    Raises:
        UsageError: If the folder is no RUN.
    """
    if not run.is_dir():
        raise UsageError(f"{run} does not exist: give the --out folder of a training.")
    if (run / FEATURES).is_file():
        from medssl.report.embedding_map import embedding_report

        return embedding_report(run)
    if (run / TABLE).is_file():
        return write_prediction_report(run, NAME, _template(TEMPLATE))
    facts = read_facts(run)
    segments = describe_segments(facts) if facts.kind == "segmentation" else None
    classification = describe_classification(facts) if facts.kind == "classification" else None
    figures = curve_figures(facts.metrics)
    views = _pictures(facts, [run / "views.png"], "Crops as the network receives them before the first step.")
    made = _pictures(
        facts, _spread(sorted((run / "pictures").glob("step_*.png"))), "Reconstructions and their targets."
    )
    if facts.kind == "pretraining" and not made:
        facts.missing.append("pictures/: no reconstructions were drawn yet.")
    page = _template().render(
        facts=facts,
        title=_title(facts),
        lead=_lead(facts, segments, classification),
        tiles=_tiles(facts),
        segments=segments,
        classification=classification,
        gates=describe_gates(facts) if facts.kind == "segmentation" else None,
        figures=figures,
        views=views,
        reconstructions=made,
        data=_table(facts.data),
        environment=_table(facts.environment),
        transfer=_transfer(facts.transfer),
        notice=NOTICE,
        version=__version__,
    )
    write_text(run / NAME, page)
    return run / NAME


def _template(name: str = "report.html.j2") -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("medssl.report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _title(facts: RunFacts) -> str:
    method = facts.run.get("method") or facts.recipe_values.get("method")
    if facts.kind == "pretraining":
        return f"Pretraining{f' with {str(method).upper()}' if method else ''}"
    arm = facts.run.get("arm")
    task = "Classification" if facts.kind == "classification" else "Segmentation"
    return task + {"scratch": ", trained from scratch", "pretrained": ", fine-tuned"}.get(str(arm), "")


def _lead(facts: RunFacts, segments: Segments | None, classification: Scores | None) -> str:
    """Return what happened in a sentence or two."""
    if classification is not None and classification.headline:
        return f"{classification.headline} on {classification.count} validation cases."
    if segments is not None and segments.headline:
        seen = set(facts.data.get("train_cases") or ()) & set(facts.data.get("validation_cases") or ())
        if seen:
            return f"{segments.headline}, but {len(seen)} of the cases were trained on: these figures are too good."
        apart = ", none of which it was fine-tuned on" if facts.data.get("validation_cases") else ""
        return f"{segments.headline} on {segments.count} validation cases{apart}."
    losses = [row["loss"] for row in facts.metrics if isinstance(row.get("loss"), int | float)]
    if len(losses) < 2:
        return "There are no figures yet."
    head, tail = (
        sum(part) / len(part) for part in (losses[: max(1, len(losses) // 20)], losses[-max(1, len(losses) // 20) :])
    )
    return f"The loss went from {head:.4g} to {tail:.4g} in {facts.metrics[-1]['step']:,} steps."


def _tiles(facts: RunFacts) -> list[tuple[str, str]]:
    tiles: list[tuple[str, str]] = []
    last = facts.metrics[-1] if facts.metrics else {}
    planned = facts.run.get("steps") or facts.recipe_values.get("steps")
    if last:
        done = int(last["step"])
        tiles.append(("steps", f"{done:,}" if not planned or done >= int(planned) else f"{done:,} of {int(planned):,}"))
    times = [row["time"] for row in facts.metrics if isinstance(row.get("time"), int | float)]
    if times:
        tiles.append(("time", _duration(max(times))))
    counts = facts.data.get("counts")
    if isinstance(counts, Mapping):
        tiles.extend(
            (f"{name} cases" if facts.kind != "pretraining" and name != "cases" else name, f"{value:,}")
            for name, value in counts.items()
            if isinstance(value, int)
        )
    network = facts.recipe_values.get("network")
    if network:
        tiles.append(("network", str(network)))
    patch = facts.data.get("patch_size") or facts.recipe_values.get("patch_size")
    if isinstance(patch, Sequence) and not isinstance(patch, str):
        tiles.append(("patch (z, y, x)" if len(patch) == 3 else "patch (y, x)", "×".join(str(side) for side in patch)))
    devices = facts.environment.get("gpus")
    if facts.environment:
        names = [str(device.get("name")) for device in devices or [] if isinstance(device, Mapping)]
        tiles.append(("device", names[0] if names else "CPU"))
    return tiles[:8]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _spread(paths: Sequence[Path]) -> list[Path]:
    """Return the first, the last and some between."""
    if len(paths) <= MOST_RECONSTRUCTIONS:
        return list(paths)
    last = len(paths) - 1
    return [paths[round(place * last / (MOST_RECONSTRUCTIONS - 1))] for place in range(MOST_RECONSTRUCTIONS)]


def _pictures(facts: RunFacts, paths: Sequence[Path], alt: str) -> list[Picture]:
    from PIL import Image, UnidentifiedImageError

    found = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
        except FileNotFoundError:
            facts.missing.append(f"{path.name} is missing.")
            continue
        except (OSError, UnidentifiedImageError, ValueError) as error:
            facts.missing.append(f"{path.name} cannot be read: {type(error).__name__}.")
            continue
        if picture.width > WIDEST_PICTURE:
            picture = picture.resize((WIDEST_PICTURE, round(picture.height * WIDEST_PICTURE / picture.width)))
        step = path.stem.partition("step_")[2]
        caption = f"After {int(step):,} steps" if step.isdigit() else "Before the first step"
        found.append(Picture(caption, _embedded(picture), f"{caption}. {alt}"))
    return found


def _embedded(picture: Any) -> str:
    stream, kind = io.BytesIO(), "png"
    picture.save(stream, "PNG", optimize=True)
    if stream.tell() > LARGEST_PICTURE:
        stream, kind = io.BytesIO(), "jpeg"
        picture.save(stream, "JPEG", quality=85, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _table(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested plain data as pairs of a name and a short text; a mapping of single values is one row."""
    rows: list[tuple[str, str]] = []
    for name, value in content.items():
        title = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping) and any(isinstance(item, Mapping | list) for item in value.values()):
            rows.extend(_table(value, f"{title}: "))
        elif isinstance(value, Mapping):
            pairs = [f"{key} {_text(item)}" for key, item in value.items() if item is not None]
            more = f", and {len(pairs) - LONGEST_LIST} more" if len(pairs) > LONGEST_LIST else ""
            rows.append((title, ", ".join(pairs[:LONGEST_LIST]) + more))
        elif value not in (None, "", [], {}):
            rows.append((title, _text(value)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        if value and all(isinstance(item, Mapping) for item in value):
            return "; ".join(", ".join(f"{name} {_text(item)}" for name, item in entry.items()) for entry in value)
        shown = ", ".join(_text(item) for item in value[:LONGEST_LIST])
        return shown if len(value) <= LONGEST_LIST else f"{shown}, and {len(value) - LONGEST_LIST} more"
    return str(value)


def _transfer(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of the key report and its lists."""
    names = {
        "taken": "taken from the checkpoint",
        "repeated": "of them spread over the input channels",
        "left": "keys of the checkpoint that were left",
        "missing": "missing in the checkpoint, started at random",
        "mismatched": "of another shape, started at random",
        "not_wanted": "outside the wanted parts, started at random",
    }
    lists = [(names[name], len(content[name]), list(content[name])[:400]) for name in names if content.get(name)]
    return {"summary": str(content.get("summary", "")), "checkpoint": content.get("checkpoint"), "lists": lists}
