"""Fixtures that more than one package needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the real data sets, or a skip where they are absent."""
    folder = Path(os.environ.get("MEDSSL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real data is absent: set MEDSSL_DATA to the folder that holds it")
    return folder
