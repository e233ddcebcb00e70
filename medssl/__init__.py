"""medssl: self-supervised pretraining for medical images, from a hospital archive to an nnU-Net model."""

__version__ = "0.1.0"
