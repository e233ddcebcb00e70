"""Sliding window, series to mask, writers."""
