"""Image files that are not DICOM: headers are checked against file size and limits before anything is allocated."""
