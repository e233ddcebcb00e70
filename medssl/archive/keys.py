"""The pseudonyms of one volume or object: patient, study, series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medssl.archive.identity import identity_of
from medssl.archive.pseudonym import Pseudonyms


@dataclass(frozen=True)
class Keys:
    """Pseudonyms of an object.

    Attributes:
        patient: Of the patient.
        study: Of the study.
        series: Of the series.
        flags: What is doubtful about them.
    """

    patient: str = ""
    study: str = ""
    series: str = ""
    flags: tuple[str, ...] = ()

    def volume(self, pseudonyms: Pseudonyms, name: Sequence[str]) -> str:
        """Return the id of a volume of the series.

        Args:
            pseudonyms: Makes the id.
            name: What sets it apart from others of the series.
        """
        return pseudonyms.of("volume", self.series, *name)


def keys_of(pseudonyms: Pseudonyms, label: str, kind: str, values: Mapping[str, Any]) -> Keys:
    """Return the keys of a DICOM volume or of an image file.

    Args:
        pseudonyms: Makes the keys.
        label: The source's label.
        kind: `dicom` or the format of the image file.
        values: `paths`, and for DICOM the identifiers.
    """
    first = values["paths"][0]
    if kind == "dicom":
        return dicom_keys(pseudonyms, label, values, first)
    identity = identity_of(label, first)
    return Keys(
        pseudonyms.of("patient", *identity.patient),
        pseudonyms.of("study", *identity.study),
        pseudonyms.of("series", *identity.series),
        () if identity.known else ("patient_unknown",),
    )


def dicom_keys(pseudonyms: Pseudonyms, label: str, values: Mapping[str, Any], path: str) -> Keys:
    """Return the keys of a DICOM object.

    A blank patient ID is replaced by the study, then the series, then the folder: what is known to be of one patient.

    Args:
        pseudonyms: Makes the keys.
        label: The source's label.
        values: `patient_id`, `issuer`, `study_uid` and `series_uid`.
        path: Relative path of its first file.
    """
    patient_id, study, series = values["patient_id"], values["study_uid"], values["series_uid"]
    folder = path.rpartition("/")[0]
    if patient_id:
        patient = pseudonyms.of("patient", "dicom", values["issuer"], patient_id)
    elif study or series:
        patient = pseudonyms.of("patient", "uid", study or series)
    else:
        patient = pseudonyms.of("patient", "place", label, folder)
    place = (label, folder)
    study_key = pseudonyms.of("study", patient, *((study,) if study else place))
    series_key = pseudonyms.of("series", study_key, *((series,) if series else place))
    return Keys(patient, study_key, series_key, () if patient_id else ("patient_unknown",))
