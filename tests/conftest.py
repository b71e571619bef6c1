"""What all of the suite shares: quiet, offline processes and freshly made checkpoints.

The factories themselves are in `tests.checkpoints`. Fixtures of one room live in that room's conftest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports Prefect, transformers or torch: no calls home, no model hubs, and one thread per
# process, since the suite starts many of them on few cores.
os.environ.update(
    {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "TRANSFORMERS_OFFLINE": "1",
    }
)
# Credentials of the person who runs the suite are none of its business.
for _name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[_name]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

from tests.checkpoints import FACTORIES, Checkpoint  # noqa: E402 - the settings above come first


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[[str], Checkpoint]:
    """`make_checkpoint("tied")`: that factory's file, in a folder of the test's own."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return lambda name: FACTORIES[name].make(folder)
