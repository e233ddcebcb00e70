"""The raw data set and the checkpoint of the tests of transfer."""

from __future__ import annotations

from tests.transfer.conftest import checkpoint, make_dataset

__all__ = ["checkpoint", "make_dataset"]
