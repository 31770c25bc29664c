"""One real SLURM of four nodes for all tests of this folder; where it cannot be, they say what to install."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A started SLURM of four nodes. SPAR_REQUIRE_SLURM makes a failure of the skip, so that CI cannot lose it."""
    if missing := missing_programs():
        reason = f"no {', '.join(missing)}; on Debian: apt-get install slurmctld slurmd slurm-client munge"
        (pytest.fail if os.environ.get("SPAR_REQUIRE_SLURM") else pytest.skip)(reason)
    with Cluster(nodes=4) as cluster:
        yield cluster
