"""Encoders, decoders and heads, built by name."""
