"""Masks of SBD are read as scipy reads them, and damaged ones without what makes scipy crash."""

import zlib

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from slimconv_lit.data.matlab import read_field


def write(path, mask, compressed=True, struct="GTcls", **others):
    fields = {"Boundaries": np.zeros((2, 1), dtype=object), "Segmentation": mask, "CategoriesPresent": np.uint8([[9]])}
    savemat(path, {**others, struct: fields}, do_compression=compressed)
    return path


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 5), (7, 9), (375, 500)])
def test_it_reads_what_scipy_reads(shape, compressed, tmp_path):
    mask = np.random.default_rng(0).integers(0, 21, shape, dtype=np.uint8)
    path = write(tmp_path / "a.mat", mask, compressed, before=np.eye(3), name="text")
    found = read_field(path, "GTcls", "Segmentation")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(found, loadmat(path)["GTcls"][0]["Segmentation"][0])


@pytest.mark.parametrize(
    ("mask", "own", "said"),
    [
        (np.zeros((3, 4)), {}, "is no mask"),
        (np.zeros((3, 4, 3), np.uint8), {}, "is no mask"),
        (np.zeros((0, 4), np.uint8), {}, "is no mask"),
        ("text", {}, "is no mask"),
        (np.zeros((3, 4), np.uint8), {"struct": "GTinst"}, "no struct GTcls"),
        (np.zeros((5000, 5000), np.uint8), {}, "more than 16,777,216 bytes"),
    ],
    ids=str,
)
def test_what_is_no_mask(mask, own, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_field(write(tmp_path / "a.mat", mask, **own), "GTcls", "Segmentation")


def test_other_files(tmp_path):
    path = write(tmp_path / "a.mat", np.ones((30, 40), np.uint8))
    whole = path.read_bytes()
    for end in (0, 60, 127, 128, 140, 200, len(whole) - 9):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"no file of MATLAB's version 5|truncated|no struct|incomplete|invalid"):
            read_field(path, "GTcls", "Segmentation")
    savemat(path, {"GTcls": np.ones((3, 4))}, format="4")
    with pytest.raises(ValueError, match="no file of MATLAB's version 5"):
        read_field(path, "GTcls", "Segmentation")
    bomb = zlib.compress(bytes(2**26))
    path.write_bytes(whole[:128] + (15).to_bytes(4, "little") + len(bomb).to_bytes(4, "little") + bomb)
    with pytest.raises(ValueError, match="unpacks to more than"):
        read_field(path, "GTcls", "Segmentation")
