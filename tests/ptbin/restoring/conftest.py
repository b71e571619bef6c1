"""Restore's processes, forked from one that has what these tests make them import."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.warm_children import Warm, warm

MODULES = (
    "torch._functorch._aot_autograd.graph_compile",  # most of torch.export, and what compares outputs
    "networkx",  # torch.export's, late
    "transformers.models.llama.modeling_llama",
)


@pytest.fixture(scope="session")
def warm_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with warm(tmp_path_factory.mktemp("warm"), *MODULES) as process:
        yield process
