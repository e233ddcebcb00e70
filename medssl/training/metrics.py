"""Figures of a run: one JSON object a line, and the same as TensorBoard events."""

from __future__ import annotations

import errno
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from medssl.errors import MedsslError
from medssl.files import write_text

logger = logging.getLogger(__name__)

NAME = "metrics.jsonl"
EVENTS = "tensorboard"


class MetricsWriter:
    """Appends figures to `metrics.jsonl` and to TensorBoard events.

    Args:
        run: The RUN.
        step: Steps that the run has behind it; later rows, from a run that was killed after its last checkpoint, are
            removed, so that no step stands there twice.
    """

    def __init__(self, run: Path, step: int = 0) -> None:
        self.path = run / NAME
        kept = [json.dumps(row) for row in read_metrics(run) if row["step"] <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a")
        self._events = EventWriter.open(run / EVENTS, step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one row; figures that are not finite are written as null.

        Args:
            step: Steps that are done.
            values: Figures by name.
        """
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if self._events is not None:
                self._events.scalars(step, values)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise MedsslError(
                    f"No space left on the disk of {self.path.parent}. Free some, then --resume."
                ) from error
            raise

    def picture(self, step: int, name: str, png: bytes, size: tuple[int, int]) -> None:
        """Add a picture to the TensorBoard events.

        Args:
            step: Steps that are done.
            name: What it shows.
            png: The encoded picture.
            size: Width and height in pixels.
        """
        if self._events is not None:
            self._events.picture(step, name, png, size)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a RUN's `metrics.jsonl`; a last line that a kill cut off is left out."""
    path = run / NAME
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


class EventWriter:
    """Writes TensorBoard event files.

    TensorBoard's own writer puts the machine's name into the file's name, and a RUN is handed on; ours does not.
    """

    def __init__(self, stream: IO[bytes], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._stream = stream
        self._writer = RecordWriter(stream)
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # Tells TensorBoard to forget what an earlier file says of later steps.
        self._put(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    @classmethod
    def open(cls, folder: Path, step: int) -> EventWriter | None:
        """Start a new event file, or return None where TensorBoard is not installed."""
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("events.out.tfevents.*")))
        try:
            return cls((folder / f"events.out.tfevents.{int(time.time()):010d}.medssl.{number}").open("wb"), step)
        except ImportError:
            logger.info("TensorBoard is not installed: only %s is written.", NAME)
            return None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._put(Event(wall_time=time.time(), step=step, summary=summary))

    def picture(self, step: int, name: str, png: bytes, size: tuple[int, int]) -> None:
        """Add an encoded picture of a given width and height."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(width=size[0], height=size[1], colorspace=3, encoded_image_string=png)
        self._put(
            Event(wall_time=time.time(), step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))
        )

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._stream.flush()
