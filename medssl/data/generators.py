"""Random number generators as a function of (seed, sample index, name); torch-free, since readers need them too."""

from __future__ import annotations

import hashlib

import numpy as np


def stream_key(seed: int, index: int, name: str) -> bytes:
    """Return the 16 bytes that identify one stream of random numbers.

    Args:
        seed: The run's seed.
        index: Index of the sample in the endless stream, or of whatever the stream belongs to.
        name: What the numbers are for; two names never share numbers.
    """
    return hashlib.blake2b(f"{seed}|{index}|{name}".encode(), digest_size=16).digest()


def generator(seed: int, index: int, name: str) -> np.random.Generator:
    """Return the generator of one stream; it is counter-based, so making it costs microseconds and no state is kept."""
    return generator_of(stream_key(seed, index, name))


def generator_of(key: bytes) -> np.random.Generator:
    """Return the generator of a key of `stream_key`."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
