"""Names for cached prefixes: SHA-256 chains over an injective encoding.

Equal names mean equal token prefixes under the same salt. The hash is cryptographic because a
collision would hand one user's keys and values to another.
"""

from __future__ import annotations

from hashlib import sha256

from dovetail.core.types import IntArray

__all__ = ["extend_chain", "root"]


def root(salt: str) -> bytes:
    """Start of a chain. Sequences share prefixes only under the same salt."""
    encoded = salt.encode("utf-8", "surrogatepass")
    return sha256(len(encoded).to_bytes(8, "little") + encoded).digest()


def extend_chain(chain: list[bytes], start: bytes, token_ids: IntArray, block_size: int) -> None:
    """Append the names of all full blocks of ``token_ids`` that ``chain`` lacks, in place.

    Each name covers its parent's 32 bytes and exactly ``block_size`` tokens of 4 bytes, so the
    encoding has no two readings.
    """
    parent = chain[-1] if chain else start
    for index in range(len(chain), len(token_ids) // block_size):
        block = token_ids[index * block_size : (index + 1) * block_size]
        parent = sha256(parent + block.tobytes()).digest()
        chain.append(parent)
