"""DICOM files to volumes: headers, series, geometry, pixels."""
