"""Metrics, comparisons and their intervals."""
