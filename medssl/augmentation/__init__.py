"""Batched transforms with parameters per sample, masking, and policies by modality and purpose."""
