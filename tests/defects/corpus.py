"""All cases of the corpus, for the tests and for `pipelines/benchmarks/archive_peers.py`."""

from __future__ import annotations

from tests.defects.dicom_cases import DICOM
from tests.defects.image_cases import IMAGES

CORPUS = [*DICOM, *IMAGES]
