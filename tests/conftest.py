"""Shapes in signatures are checked while the tests run: the hook must be in place before the first import."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network
os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

# An int will do for a float, as in the type checker's eyes.
check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyping.install_import_hook(["attribution", "stages", "miniworld"], "tests.conftest.check_types")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
