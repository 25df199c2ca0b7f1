"""One thread per process: several test processes share the machine, and OpenMP threads that wait would spin against them."""

import os

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenised data of the tests goes with the tests; processes that they start inherit this."""
    os.environ["ACCESSORY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
