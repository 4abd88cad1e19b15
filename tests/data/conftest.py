import tarfile
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def unpack(tmp_path):
    """Unpacks the members of one shared archive that `wanted(name)` accepts, or skips where the archive is absent."""

    def unpack(archive, wanted):
        if not (SHARED / archive).is_file():
            pytest.skip(f"needs ../shared/data/{archive}, which only development machines have")
        with tarfile.open(SHARED / archive) as tar:
            for member in tar:
                if member.isfile() and wanted(member.name):
                    tar.extract(member, tmp_path, filter="data")
        return tmp_path

    return unpack


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory):
    """One root for all tests, so that every sample is built once."""
    return str(tmp_path_factory.mktemp("data"))
