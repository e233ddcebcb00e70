"""How lists reach the terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from medssl import screen

ROWS = [
    {"name": "s3d", "family": "reconstruction", "summary": "Hide blocks from the encoder altogether and restore them"}
]


@pytest.mark.parametrize(("width", "side_by_side"), [(120, True), (40, False)])
def test_a_list_shows_every_word_at_any_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, side_by_side: bool
) -> None:
    monkeypatch.setattr(screen, "_out", Console(width=width))
    screen.table("Methods", ROWS, False)
    shown = capsys.readouterr().out
    assert ("┃" in shown) is side_by_side
    for row in ROWS:
        for word in " ".join(row.values()).split():
            assert word in shown
