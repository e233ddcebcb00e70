"""SUVbw of PET, or a refusal: nothing is guessed (QIBA's profile of FDG-PET/CT, SUV by body weight).

SUVbw = activity concentration [Bq/ml] * body weight [g] / injected activity at the reference time [Bq], where the
reference time is the one the images are decay-corrected to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

from medssl.archive.dicom import tags as t
from medssl.archive.dicom.enhanced import clock
from medssl.archive.dicom.model import DicomHeader, Pet
from medssl.archive.dicom.tags import Tags
from medssl.errors import InputRefused

#: Longer than any tracer is imaged after its injection, in half-lives.
_MAX_HALF_LIVES = 12
#: Diagnostic activities lie far above; a smaller number is in MBq by mistake.
_LEAST_ACTIVITY = 1e5


def read_pet(header: Tags, frame_units: set[str] | None = None) -> Pet:
    """Return what SUVbw needs of one PET image, with all times as intervals after the injection.

    Args:
        header: The top level of the file.
        frame_units: Units that the frames of an enhanced image map to; None for a classic image.
    """
    tracer = header.item(t.RADIOPHARMACEUTICAL)
    weight = header.number(t.WEIGHT) or 0.0
    dose = (tracer.number(t.DOSE_TOTAL) if tracer else None) or 0.0
    half_life = (tracer.number(t.HALF_LIFE) if tracer else None) or 0.0
    plausible = math.isfinite(weight) and 0 < weight <= 650 and math.isfinite(dose) and dose >= _LEAST_ACTIVITY
    corrections = header.texts(t.CORRECTED_IMAGE)
    series = _moment(header.text(t.SERIES_DATE), header.text(t.SERIES_TIME))
    acquisition = _moment_of_datetime(header.text(t.ACQUISITION_DATETIME)) or _moment(
        header.text(t.ACQUISITION_DATE) or header.text(t.SERIES_DATE), header.text(t.ACQUISITION_TIME)
    )
    injection = None
    if tracer:
        injection = _moment_of_datetime(tracer.text(t.DOSE_START_DATETIME))
        if injection is None:
            # Only a time of day is told: the day of the series, as the standard's attribute implies.
            injection = _moment(header.text(t.SERIES_DATE), tracer.text(t.DOSE_START_TIME))
    if frame_units is not None:
        # An enhanced image names the moment it is decay-corrected to.
        reference = _seconds(injection, _moment_of_datetime(header.text(t.DECAY_DATETIME)))
        return Pet(
            units=next(iter(frame_units)) if len(frame_units) == 1 else "",
            suv_type="",
            correction="START",
            corrected=header.text(t.DECAY_CORRECTED) == "YES" and header.text(t.ATTENUATION_CORRECTED) == "YES",
            factor=weight * 1000 / dose if plausible else 0.0,
            half_life=half_life if math.isfinite(half_life) and half_life > 0 else 0.0,
            series_after_injection=reference,
            acquisition_after_injection=reference,
        )
    return Pet(
        units=header.text(t.PET_UNITS),
        suv_type=header.text(t.SUV_TYPE),
        correction=header.text(t.DECAY_CORRECTION),
        corrected="ATTN" in corrections and "DECY" in corrections,
        factor=weight * 1000 / dose if plausible else 0.0,
        half_life=half_life if math.isfinite(half_life) and half_life > 0 else 0.0,
        series_after_injection=_seconds(injection, series),
        acquisition_after_injection=_seconds(injection, acquisition),
    )


def suv_scale(headers: Sequence[DicomHeader]) -> tuple[float, tuple[str, ...]]:
    """Return the factor from rescaled values to SUVbw of one PET volume, and flags.

    Args:
        headers: All files of the volume.

    Raises:
        InputRefused: If the factor cannot be known.
    """
    pets = [header.pet for header in headers if header.pet is not None]
    if len(pets) != len(headers) or not pets:
        raise InputRefused("suv_unavailable", "no PET attributes")
    first = pets[0]
    if any(
        (pet.units, pet.correction, pet.suv_type) != (first.units, first.correction, first.suv_type) for pet in pets
    ):
        raise InputRefused("suv_unavailable", "units or decay correction differ between images")
    if first.units == "GML" and first.suv_type in ("", "BW"):
        return 1.0, ()
    if first.units != "BQML":
        raise InputRefused("suv_unavailable", f"units {_known(first.units)}")
    if not all(pet.corrected for pet in pets):
        raise InputRefused("suv_unavailable", "not corrected for attenuation and decay")
    if any(pet.factor <= 0 or not math.isclose(pet.factor, first.factor, rel_tol=1e-6) for pet in pets):
        raise InputRefused("suv_unavailable", "body weight or injected activity is missing, implausible, or varies")
    if first.correction == "ADMIN":
        return first.factor, ()
    if first.correction != "START":
        raise InputRefused("suv_unavailable", "decay correction is neither START nor ADMIN")
    delay, flags = _delay(pets)
    if first.half_life <= 0:
        raise InputRefused("suv_unavailable", "half-life is missing")
    if not 0 <= delay <= _MAX_HALF_LIVES * first.half_life:
        raise InputRefused("suv_unavailable", "the time from injection to scan is negative or implausible")
    return first.factor * 2 ** (delay / first.half_life), flags


def _delay(pets: Sequence[Pet]) -> tuple[float, tuple[str, ...]]:
    """Return the seconds from injection to the start of the scan, which the images are corrected to."""
    series = {pet.series_after_injection for pet in pets}
    acquisitions = [pet.acquisition_after_injection for pet in pets if pet.acquisition_after_injection is not None]
    start = series.pop() if len(series) == 1 else None
    if start is not None and acquisitions and start <= min(acquisitions) + 1:
        return start, ()
    # A series written later (post-processing) carries a later time: the first acquisition is then the reference.
    if len(acquisitions) == len(pets):
        return min(acquisitions), ("suv_from_acquisition_time",)
    raise InputRefused("suv_unavailable", "injection, series or acquisition time is missing")


def _known(units: str) -> str:
    return (
        units
        if units in ("CNTS", "GML", "CM2", "PCNT", "CPS", "PROPCNTS", "PROPCPS", "MLMG", "NONE", "")
        else "unknown"
    )


def _moment(date: str, time: str) -> float | None:
    seconds = clock(time)
    try:
        day = datetime.strptime(date.replace(".", ""), "%Y%m%d").toordinal()
    except ValueError:
        return None
    return None if seconds is None else day * 86400.0 + seconds


def _moment_of_datetime(text: str) -> float | None:
    return _moment(text[:8], text[8:]) if len(text) >= 10 else None


def _seconds(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 3)
