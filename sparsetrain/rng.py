"""Random streams that are named, not shared: the same seed and names give the same numbers on every rank and device."""

import hashlib

import torch


def derive_seed(seed: int, *names: int | str) -> int:
    """A 63-bit seed that is a fixed function of `seed` and `names`.

    Two different tuples of names give unrelated streams, and no stream depends on how many others were drawn before it
    (Python's `hash` is salted per process, so SHA-256 is used).

    Args:
        seed: the run's seed.
        names: what the stream is for, such as ("order", epoch); ints and strings are told apart.

    >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 3), derive_seed(0, 1) == derive_seed(0, "1")
    (True, False)
    """
    digest = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *names: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream called `names`; the global generators are left alone.

    Draw on the CPU and move the result: a CUDA generator of the same seed gives other numbers.
    """
    return torch.Generator().manual_seed(derive_seed(seed, *names))
