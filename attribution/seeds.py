"""Seeds that depend on what they are for, and on nothing else."""

from __future__ import annotations

from attribution.files import content_key


def seed_from(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on the parts alone."""
    return int(content_key(*parts), 16) >> 1
