"""Checkpoint to nnU-Net; nnssl and nnU-Net checkpoints in and out."""
