"""Where every random draw of the data floor comes from."""

import hashlib

import torch


def seeded_generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator that is a pure function of its three arguments.

    Its numbers are the same in every process, on every device and after every resume, so no generator state is ever
    saved. The seed is a BLAKE2b hash of `seed/purpose/epoch`: Python's own `hash` of a string differs from process
    to process, and adding the three numbers would make epoch 1 of seed 0 the same as epoch 0 of seed 1.
    """
    words = f"{seed}/{purpose}/{epoch}".encode()
    # torch's CPU engine (mt19937) keeps the low 32 bits of a seed only; give it those and no false promise of more.
    digest = hashlib.blake2b(words, digest_size=4).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))
