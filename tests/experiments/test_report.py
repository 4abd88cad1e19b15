"""The comparison page: what it holds, what it escapes, and how a real browser shows it."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

from slimconv_lit.cli import main
from slimconv_lit.experiments.report import page, read_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]


def make_run(folder, *, lr=0.1, top1=0.9, network="cifar_resnet20", params=1000, pictures=("validation",)):
    (folder / "pictures").mkdir(parents=True)
    config = {"model": {"init_args": {"lr": lr, "backbone": "cifar_resnet20"}}, "trainer": {"max_epochs": 2}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    results = {"network": network, "test/top1": top1, "params": params, "macs": 20_000, "seconds": 1.5}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.csv").write_text("epoch,step,train/loss,val/top1\n0,1,2.0,\n0,1,,0.5\n1,3,1.5,\n1,3,,0.75\n")
    for name in pictures:
        Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "pictures" / f"{name}.png")
    return folder


class Text(HTMLParser):
    """The rows of all tables, and the pictures."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.images, self.tags, self.in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")


def test_scores_differences_curves_and_pictures(tmp_path):
    first = make_run(tmp_path / "a" / "1", params=2000, pictures=("validation", "confusion"))
    second = make_run(tmp_path / "b" / "1", lr=0.2, top1=0.8, network="cifar_resnet20 + SlimConv2d k=2")
    text = page([read_run(first, "a/1"), read_run(second, "b/1")], {"b/1": ("3 (2 to 4)", "0.5 (0.4 to 0.6)")})
    seen = Text(text)
    rows = {row[0]: row[1:] for row in seen.rows}
    assert rows["test/top1"] == ["0.9000", "0.8000"]
    assert rows["params"] == ["2,000 (1.000)", "1,000 (0.500)"]
    assert rows["latency, ms"] == ["no checkpoint", "3 (2 to 4)"]
    assert rows["model.init_args.lr"] == ["0.1", "0.2"]
    assert "trainer.max_epochs" not in rows, "the same in both"
    assert seen.tags.count("svg") == 2, "one chart for each metric"
    assert [image["alt"] for image in seen.images] == [
        "validation of a/1",
        "validation of b/1",
        "confusion of a/1",
    ] or [image["alt"] for image in seen.images] == ["confusion of a/1", "validation of a/1", "validation of b/1"]
    decoded = base64.b64decode(seen.images[0]["src"].partition("base64,")[2])
    assert decoded == (first / "pictures" / "confusion.png").read_bytes()


def test_one_file_without_scripts_or_addresses(tmp_path):
    text = page([read_run(make_run(tmp_path / "a"), "a")], {})
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text.replace("xlink:href", "href"))


def test_names_of_runs_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    folder = make_run(tmp_path / "x", network=evil)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": evil, evil: "<img src=x onerror=alert(1)>"}))
    other = make_run(tmp_path / "y")
    # Neither a script nor a formula.
    (folder / "metrics.csv").write_text(f"epoch,step,{evil},$\\frac{{\n0,1,2,1\n0,2,3,1\n")
    text = page([read_run(folder, evil), read_run(other, "y")], {})
    assert "<script" not in text
    assert "onerror=alert(1)>" not in text
    assert "&lt;script&gt;" in text


def test_what_is_missing_is_left_out(tmp_path):
    folder = make_run(tmp_path / "a", pictures=())
    for name in ("results.json", "metrics.csv"):
        (folder / name).unlink()
    seen = Text(page([read_run(folder, "a")], {}))
    assert ["network", "not tested"] in seen.rows
    assert "svg" not in seen.tags


def test_real_runs_from_the_command_line(in_tmp, capsys):
    for name, operator in (("plain", "null"), ("slim", "SlimConv2d")):
        words = ["--config=quickstart.yaml", *SHORT, f"--model.operator={operator}", f"--name={name}"]
        assert main(["fit", *words]) == 0
    capsys.readouterr()
    assert main(["compare", "--rounds=3", "runs/plain", "slim", "--run_root=runs", "--output=out/page.html"]) == 0
    told, page = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert page.startswith("in out/page.html")
    header, _, *networks, star = told.splitlines()
    assert re.split(" {2,}", header)[2:5] == ["test/top1 %", "params", "macs"]
    assert re.search(r"^plain/\S+ +cifar_resnet20 \* .* 269,434 .* 1\.000", networks[0])
    assert re.search(r"^slim/\S+ +cifar_resnet20 \+ SlimConv2d k=4/3 \* .* 130,896 .* 0\.486", networks[1])
    assert star == "* of a part of the data only: limit_train_batches=2"
    rows = {row[0]: row[1:] for row in Text((in_tmp / "out" / "page.html").read_text()).rows}
    assert rows["network"] == ["cifar_resnet20", "cifar_resnet20 + SlimConv2d k=4/3"]
    text = (in_tmp / "out" / "page.html").read_text()
    assert all(score.endswith("*") for score in rows["test/top1"]), "two batches are no training"
    assert re.search(r"<p>\* Of a part of the data only\. plain/\S+: limit_train_batches=2; slim/\S+: limit_", text)
    assert rows["latency / first"][0] == "1 (1 to 1)"
    assert float(rows["latency, ms"][1].split()[0]) > 0
    assert rows["model.init_args.operator.class_path"] == ["not set", "slimconv_lit.SlimConv2d"]


def test_mistakes(in_tmp, capsys):
    (in_tmp / "empty").mkdir()
    assert main(["compare", "empty"]) == 2
    assert "'empty' holds no run" in capsys.readouterr().err
    assert main(["compare", "nowhere"]) == 2
    assert "'nowhere' is not a folder, and nor is 'runs/nowhere'" in capsys.readouterr().err
    folder = make_run(in_tmp / "a")
    (folder / "results.json").write_text("{")
    assert main(["compare", "a"]) == 2
    assert "a is damaged" in capsys.readouterr().err
    (folder / "results.json").write_text('{"params": "<script>alert(1)</script>"}')
    assert main(["compare", "a"]) == 2
    assert "something else than numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.csv", "step,val/x\n1,2,3\n", "metrics.csv, row 1: a field without a name"),
        ("metrics.csv", "step,val/x\ninf,2\n", "metrics.csv, row 1: val/x=2.0 at step inf"),
        ("metrics.csv", "step,val/x\n1,1e308\n2,-1e308\n", "metrics.csv, row 1: val/x=1e+308 at step 1.0"),
        ("metrics.csv", f"step,val/x\n1,{'2' * 200_000}\n", "field larger than field limit"),
        ("results.json", "[]", "'list' object has no attribute"),
        ("results.json", f'{{"params": 1{"0" * 400}, "macs": 3}}', "something else than numbers"),
        ("results.json", '{"network": "\\ud800"}', "surrogates not allowed"),
        ("config.yaml", f"a: 0x{'f' * 20_000}\n", "more than 10,000 characters"),
    ],
)
def test_a_file_that_cannot_be_shown_is_told_in_one_line(name, text, said, tmp_path, capsys):
    folder = make_run(tmp_path / "a")
    (folder / name).write_text(text)
    assert main(["compare", str(folder), "--rounds=0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: compare: {folder} is damaged: ")
    assert said in line


@pytest.mark.parametrize("what", ["folder", "link", "linked folder"])
def test_pictures_that_are_none_of_the_run_are_not_shown(what, tmp_path, capsys):
    folder, secret = make_run(tmp_path / "a"), make_run(tmp_path / "elsewhere") / "pictures" / "validation.png"
    picture = folder / "pictures" / "validation.png"
    picture.unlink()
    match what:
        case "folder":
            picture.mkdir()
        case "link":
            picture.symlink_to(secret)
        case _:
            picture.parent.rmdir()
            picture.parent.symlink_to(secret.parent)
    page = tmp_path / "page.html"
    assert main(["compare", str(folder), "--rounds=0", f"--output={page}"]) == 2
    assert f"error: compare: {picture} is no picture of this run" in capsys.readouterr().err
    assert not page.exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_without_errors_or_overflow(width, tmp_path):
    runs = [read_run(make_run(tmp_path / str(i), lr=i), f"a_rather_long_name/2026-01-0{i}_12-00-00") for i in (1, 2)]
    text = page(runs, {})
    # A window cannot be narrower than 500 pixels; a frame can, and its rules for narrow screens apply.
    frame = f'<iframe width={width} height=800 style="border:0" srcdoc="{html.escape(text)}"></iframe>'
    size = "document.title = 'wide ' + document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    (tmp_path / "page.html").write_text(f"{frame}<script>onload = () => {{ {size} }}</script>")
    flags = ["--headless", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,900", "--dump-dom"]
    flags += ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, "the page wrote an error to the console"
    assert int(re.search(r"<title>wide (\d+)</title>", done.stdout)[1]) <= width
