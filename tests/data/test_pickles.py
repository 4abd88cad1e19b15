"""Pickles of CIFAR-100 are read without pickle: what they hold comes out, what they ask for is not done."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from slimconv_lit.data import CIFAR100DataModule, samples
from slimconv_lit.data.files import DataError
from slimconv_lit.data.pickles import read_pickle

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
ENTRY = {"data": PIXELS, "fine_labels": [5, 99, 0], "filenames": ["a", "é"], "batch_label": "one", "more": (1, None, 2)}


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_pickle_wrote_comes_out(protocol, order, tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps(ENTRY | {"data": np.array(PIXELS, order=order)}, protocol=protocol))
    found = read_pickle(tmp_path / "x")
    np.testing.assert_array_equal(found.pop("data"), PIXELS)
    assert found == {key: value for key, value in ENTRY.items() if key != "data"}


def test_what_python_2_and_numpy_1_wrote_comes_out(tmp_path):
    # The official files are of this make: bytes for texts, numpy.core, a state of eight for the type.
    program = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x01K\x04\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x04\x01\x02\xff\x00tbU\x0bfine_labels]q\x08(K\x07K\x08eu."
    )
    (tmp_path / "x").write_bytes(program)
    found = read_pickle(tmp_path / "x")
    theirs = pickle.loads(program, encoding="latin1")
    np.testing.assert_array_equal(found["data"], theirs["data"])
    assert found["data"].tolist() == [[1, 2, 255, 0]]
    assert found["fine_labels"] == theirs["fine_labels"] == [7, 8]


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "a call": (pickle.dumps(Call(os.mkdir, "ran")), "posix.mkdir|nt.mkdir"),
    "eval": (pickle.dumps({"data": Call(eval, "__import__('os').mkdir('ran')")}), "builtins.eval"),
    "old opcodes": (b"(S'ran'\nios\nmkdir\n.", "it uses STRING"),
    "an object": (pickle.dumps(OSError("x")), "builtins.OSError"),
    "an array of objects": (pickle.dumps({"data": np.array([Call(os.mkdir, "ran")], dtype=object)}), "else than bytes"),
    "an array of floats": (pickle.dumps(np.zeros(3), protocol=2), "else than bytes"),
    "a place in the memo that is far": (b"\x80\x02]r\xff\xff\xff\x7f.", None),
    "a large array": (b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "BYTEARRAY8|expected|not enough"),
    "a deep key": (b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.", "a tuple where a text"),
    "truncated": (pickle.dumps(ENTRY)[:-40], ""),
    "nothing": (b"", ""),
    "no pickle": (b"<html>404</html>", ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_pickle_asks_for_is_not_done(name, in_tmp):
    program, said = HOSTILE[name]
    (in_tmp / "x").write_bytes(program)
    if said is None:
        assert read_pickle(in_tmp / "x") == []
    else:
        with pytest.raises(DataError, match=rf"^x is no pickle of plain values.*({said})"):
            read_pickle(Path("x"))
    assert not os.path.exists("ran")


@pytest.mark.parametrize(
    "changes",
    [
        {"data": PIXELS[:, 1:]},
        {"fine_labels": [1, 2]},
        {"fine_labels": [1, 2, 100]},
        {"fine_labels": [1, 2, True]},
        {"data": [1, 2]},
        {"data": Call(os.mkdir, "ran")},
    ],
    ids=["pixels", "labels", "large label", "label of another type", "no array", "a call"],
)
def test_files_of_another_kind_are_named(changes, in_tmp):
    folder = samples.build_once(in_tmp, "cifar100", lambda target: (target / "cifar-100-python").mkdir())
    path = folder / "cifar-100-python" / "train"
    path.write_bytes(pickle.dumps(ENTRY | changes, protocol=2))
    with pytest.raises(DataError, match=str(path)):
        CIFAR100DataModule(root=str(in_tmp), sample=True).setup("fit")
    assert not os.path.exists("ran")
