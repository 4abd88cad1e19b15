"""Archives and pictures that are not what they say."""

import hashlib
import io
import struct
import tarfile
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image
from torchvision.datasets import imagenet

from slimconv_lit.cli import main
from slimconv_lit.data import ImageNetDataModule, files
from slimconv_lit.data.coco2014 import read_ids
from slimconv_lit.data.files import Archive, DataError, inspect_image, read_image, read_list


def member(name, content=b"", kind=tarfile.REGTYPE, link="", mode=0o644):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode = kind, len(content), link, mode
    return info, content


def write_tar(path, *members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def unpack(path, root):
    sum_ = hashlib.md5(path.read_bytes()).hexdigest()
    Archive("https://example.org", path.name, sum_, "tree/last.txt").unpack(root, download=False)


GOOD = member("tree/first.txt", b"1"), member("tree/last.txt", b"2")


def test_an_official_archive(tmp_path):
    unpack(write_tar(tmp_path / "a.tar.gz", *GOOD, member("/absolute.txt", b"3"), mode="w:gz"), tmp_path)
    assert (tmp_path / "tree" / "last.txt").read_text() == "2"
    assert (tmp_path / "absolute.txt").read_text() == "3", "the filter takes the slash off"


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (member("../outside.txt", b"x"), "outside"),
        (member("tree/../../outside.txt", b"x"), "outside"),
        (member("tree/link", kind=tarfile.SYMTYPE, link="/etc"), "tree/link is a link"),
        (member("tree/link", kind=tarfile.SYMTYPE, link="first.txt"), "tree/link is a link"),
        (member("tree/link", kind=tarfile.LNKTYPE, link="tree/first.txt"), "tree/link is a link"),
        (member("tree/device", kind=tarfile.CHRTYPE), "tree/device is a link or a device"),
        (member("tree/pipe", kind=tarfile.FIFOTYPE), "tree/pipe is a link or a device"),
    ],
    ids=["up", "up and down", "link out", "link in", "hard link", "device", "pipe"],
)
def test_members_that_would_lie_elsewhere(hostile, said, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(DataError, match=said) as error:
        unpack(write_tar(root / "a.tar", *GOOD, hostile), root)
    assert str(root / "a.tar") in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["root", "a.tar"], "nothing has been unpacked"


def test_bombs(tmp_path, monkeypatch):
    zeros = bytes(2**20)
    small = write_tar(tmp_path / "a.tar.gz", *GOOD, *(member(f"{i}", zeros) for i in range(80)), mode="w:gz")
    assert small.stat().st_size < 2**20
    with pytest.raises(DataError, match=r"a.tar.gz: 63: up to here there are 66 files in it"):
        unpack(small, tmp_path)
    # It says that there is more than any disk holds.
    lying = member("lies", zeros)
    lying[0].size = 10**15
    with (tmp_path / "b.tar").open("wb") as file:
        file.write(lying[0].tobuf())
    with pytest.raises(DataError, match="lies: up to here"):
        unpack(tmp_path / "b.tar", tmp_path)
    monkeypatch.setattr(files, "_MOST_FILES", 100)
    many = write_tar(tmp_path / "c.tar", *GOOD, *(member(f"{i}") for i in range(100)))
    with pytest.raises(DataError, match="more than 100 files"):
        unpack(many, tmp_path)
    assert not list(tmp_path.glob("*.unpacking"))


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b\x08\x00broken"])
def test_no_archive(content, tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar\.gz is truncated or no archive"):
        unpack(tmp_path / "a.tar.gz", tmp_path)


def test_a_download_that_is_not_the_official_archive(tmp_path):
    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"broken off" if "half" in self.path else bytes(1000))

        do_HEAD = do_GET

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("half.tar", "other.tar"):
            archive = Archive(f"http://127.0.0.1:{server.server_port}/{name}", name, "0" * 32, "tree/last.txt")
            with pytest.raises(DataError, match=rf"{name} did not give .*{name} whole.*fetches it anew"):
                archive.unpack(tmp_path, download=True)
        server.shutdown()
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("whole", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_imagenet_s_archives_that_are_not_the_official_ones(whole, in_tmp, capsys):
    # Of the validation images, the archive that names their classes is missing.
    write_tar(in_tmp / whole, *GOOD)
    assert main(["fit", "--config=cls_imagenet.yaml", "--data.root=.", "--trainer.accelerator=cpu"]) == 2
    wrong = {"val": "ILSVRC2012_devkit_t12.tar.gz"}.get(whole[15:18], whole)
    told = capsys.readouterr().err
    assert f"error: The archive {wrong} is not present in the root directory or is corrupted. You need" in told
    assert "https://www.image-net.org" in told
    assert "Traceback" not in told
    assert {path.name for path in in_tmp.iterdir()} <= {whole, "runs"}


def test_archives_in_an_archive(tmp_path, monkeypatch):
    inner = write_tar(tmp_path / "n1.tar", member("link", kind=tarfile.SYMTYPE, link="../../.."))
    root = tmp_path / "root"
    root.mkdir()
    outer = write_tar(root / "ILSVRC2012_img_train.tar", member("n1.tar", inner.read_bytes()))
    monkeypatch.setitem(imagenet.ARCHIVE_META, "train", (outer.name, hashlib.md5(outer.read_bytes()).hexdigest()))
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar: n1\.tar: link is a link"):
        ImageNetDataModule(root=str(root)).prepare_data()
    assert list(root.iterdir()) == [outer]


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_picture_that_would_fill_the_memory(tmp_path):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    for look in (read_image, inspect_image):
        with pytest.raises(DataError, match=r"bomb\.png is not decoded.*3600000000 pixels.*smaller or take it out"):
            look(path)


def test_a_program_in_the_place_of_a_picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "page.eps")
    path = (tmp_path / "page.eps").rename(tmp_path / "photo.jpg")
    with pytest.raises(DataError, match="it is none of JPEG"):
        read_image(path)


def test_pictures_of_imagenet_are_read_in_the_same_way(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "a.JPEG").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.JPEG cannot be decoded"):
        ImageNetDataModule(root=str(tmp_path)).dataset("val")[0]


def test_lists_that_are_no_text_are_told_by_their_names(tmp_path):
    path = tmp_path / "val.txt"
    path.write_bytes(b"\xff\xd8 \n7\n")
    # Nothing is called so, which those say who look for the images.
    assert read_list(path) == ["\ufffd\ufffd", "7"]
    with pytest.raises(DataError, match=r"val\.txt must have the id of an image on each line"):
        read_ids(path)
