"""Shapes in signatures are checked while the tests run: the hook must be in place before the first import."""

from __future__ import annotations

import os
import signal

# A shell has its background jobs ignore Ctrl-C, and they their children, which some tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network
os.environ["MPLBACKEND"] = "Agg"
# With all threads each, several processes wait for each other.
os.environ.update({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {})

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

# An int will do for a float, as in the type checker's eyes.
check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyping.install_import_hook(["attribution", "stages", "miniworld"], "tests.conftest.check_types")


# Minutes in one file: who begins last would work on alone.
LONGEST = (
    "test_pipeline.py",
    "test_workers.py",
    "test_similarity_cuda.py",
    "test_similarity_cuda_codes.py",
    "test_gate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first where several processes share them; tests marked gpu are skipped without a device."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.name, len(order)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
