"""Manifest to volume store: orient, crop, resample, normalise, fingerprint."""
