"""What a DICOM object is: an image, or something that belongs to images (PS3.4 annex B, PS3.3 C.7.3.1.1.1)."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


_STORAGE = "1.2.840.10008.5.1.4.1.1."

#: SOP classes that are no volumes, by the part after the storage root; a dot at the end means the whole branch.
_RELATED_CLASSES: tuple[tuple[str, str], ...] = (
    ("66.4", "segmentation"),
    ("66.7", "segmentation"),
    ("66.8", "segmentation"),
    ("66.5", "segmentation"),
    ("66.1", "registration"),
    ("66.2", "registration"),
    ("66.3", "registration"),
    ("66.6", "other_object"),
    ("66", "raw_data"),
    ("67", "parametric_map"),
    ("30", "parametric_map"),
    ("88.67", "dose_report"),
    ("88.68", "dose_report"),
    ("88.73", "dose_report"),
    ("88.74", "dose_report"),
    ("88.76", "dose_report"),
    ("88.59", "key_object"),
    ("88.", "structured_report"),
    ("11.", "presentation_state"),
    ("481.1", "rt_image"),
    ("481.2", "rt_dose"),
    ("481.3", "structure_set"),
    ("481.", "rt_plan"),
    ("9.", "waveform"),
    ("104.", "encapsulated_document"),
    ("4.2", "spectroscopy"),
    ("4.3", "other_object"),
    ("78.", "other_object"),
    ("79.1", "other_object"),
    ("77.1.5.3", "other_object"),
    ("131", "other_object"),
    ("200.", "other_object"),
    ("201.", "other_object"),
)
_RELATED_MODALITIES = {
    "SEG": "segmentation",
    "RTSTRUCT": "structure_set",
    "RTDOSE": "rt_dose",
    "RTPLAN": "rt_plan",
    "RTRECORD": "rt_plan",
    "RTIMAGE": "rt_image",
    "SR": "structured_report",
    "KO": "key_object",
    "PR": "presentation_state",
    "REG": "registration",
    "FID": "registration",
    "DOC": "encapsulated_document",
    "PLAN": "other_object",
    "ECG": "waveform",
    "HD": "waveform",
    "EPS": "waveform",
    "RESP": "waveform",
    "AU": "waveform",
    "RWV": "parametric_map",
}
_DIRECTORY = "1.2.840.10008.1.3.10"
_SECONDARY_CAPTURE = _STORAGE + "7"
_WHOLE_SLIDE = _STORAGE + "77.1.6"

#: Modalities of pictures: without a place in the patient they are 2D images, not slices that lost their position.
PICTURES = frozenset(
    _words("""
    CR DX MG RG RF XA US IVUS ES OP GM XC IO PX DG TG LP LS ST BDUS OPM OAM AR KER VA OSS BMD OT HC DD SM CP CS
    DF DM DS EC FA FS LEN SRF
""")
)
#: Modalities whose images are slices; without position and orientation they are refused.
SLICES = frozenset(("CT", "MR", "PT", "NM", "OPT", "MA", "MS"))
#: Values that are physical quantities whatever the display's polarity says.
QUANTITIES = frozenset(("CT", "PT"))
MODALITIES = PICTURES | SLICES | frozenset(_RELATED_MODALITIES) | frozenset(("OCT", "BI", "ASMT"))

#: Body Part Examined: terms of PS3.16 annex L and common spellings. Anything else could be free text, which may name
#: a patient, and does not leave this package.
BODY_PARTS = frozenset(
    _words("""
    ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BLADDER BODY BOWEL BRAIN BREAST BRONCHUS BUTTOCK
    CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CHEST_ABDOMEN
    CHEST_ABD_PELVIS CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA CORONARYARTERY CSPINE CTSPINE DUODENUM EAR
    ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FETUS FINGER FOOT GALLBLADDER HAND HEAD HEADNECK HEAD_NECK
    HEART HIP HUMERUS ILEUM ILIUM IAC JAW JAWREGION JEJUNUM KIDNEY KNEE LARYNX LEG LIVER LSPINE LSSPINE LUNG
    MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NECK_CHEST NOSE ORBIT OVARY
    PANCREAS PAROTID PATELLA PELVIS PENIS PHARYNX PITUITARY PROSTATE RECTUM RIB SCALP SCAPULA SCLERA SCROTUM
    SELLA SHOULDER SKULL SPINE SPLEEN SSPINE STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THORAX THUMB THYMUS
    THYROID TIBIA TIBIAFIBULA TLSPINE TMJ TOE TONGUE TRACHEA TSPINE UPPERARM URETER URETHRA UTERUS VAGINA VULVA
    WHOLEBODY WRIST ZYGOMA LOWEREXTREMITY UPPEREXTREMITY FOREARM HINDFOOT FOREFOOT ANUS APPENDIX BILEDUCT
    BRACHIALPLEXUS LUMBARSPINE CERVICALSPINE THORACICSPINE
""")
)


def related_kind(sop_class: str, modality: str) -> str:
    """Return the kind of an object that is no volume, or an empty string for an image."""
    if sop_class == _DIRECTORY:
        return "dicomdir"
    if sop_class.startswith(_STORAGE):
        branch = sop_class[len(_STORAGE) :]
        for start, kind in _RELATED_CLASSES:
            if branch == start or branch.startswith(start if start.endswith(".") else start + "."):
                return kind
        return ""
    return _RELATED_MODALITIES.get(modality, "")


def is_secondary_capture(sop_class: str) -> bool:
    """Tell whether the class is a secondary capture, single or multi-frame."""
    return sop_class == _SECONDARY_CAPTURE or sop_class.startswith(_SECONDARY_CAPTURE + ".")


def is_whole_slide(sop_class: str) -> bool:
    """Tell whether the class is a tiled microscopy image."""
    return sop_class == _WHOLE_SLIDE


def modality_of(text: str) -> str:
    """Return a modality that DICOM defines, `OT` for any other text."""
    name = text.upper()
    return name if name in MODALITIES else "OT"


def body_part_of(text: str) -> str:
    """Return a body part that DICOM defines, in capitals without blanks; empty for any other text."""
    name = "".join(character for character in text.upper() if character.isalnum() or character == "_")
    return name if name in BODY_PARTS else ""
