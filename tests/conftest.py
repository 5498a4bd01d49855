"""Puts the modules on the path, and reads the golden files: what the authors' public code made of random weights."""
import contextlib
import json
import os
import pathlib
import resource
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")               # on matrices this small a second thread only waits

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support is in beta")


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def golden():
    def read(name):
        z = np.load(ROOT / "tests" / "golden" / f"{name}.npz")
        return {k: z[k] for k in z.files}, json.loads(str(z["cfg"]))
    return read


@pytest.fixture
def small_files():
    """In `with small_files():` a file that grows beyond 30 KB fails, as on a full disk."""
    @contextlib.contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return limit
