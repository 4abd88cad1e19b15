import pytest
import torch

from slimconv_lit.config_files import checkpoint_config, compose, load_config, merge
from slimconv_lit.lookup import CONFIGS, find_checkpoint, find_config


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_current_folder_comes_before_the_checkout(in_tmp):
    assert find_config("quickstart.yaml") == CONFIGS / "quickstart.yaml"
    assert find_config("quickstart") == CONFIGS / "quickstart.yaml"
    write(in_tmp, quickstart="trainer: {}")
    assert find_config("quickstart.yaml").resolve() == in_tmp / "quickstart.yaml"


def test_a_mistyped_config_name(in_tmp):
    with pytest.raises(FileNotFoundError, match=r"'quikstart.yaml'; did you mean 'quickstart.yaml'"):
        find_config("quikstart.yaml")


def test_parts_and_bases_count_from_the_file_that_names_them(in_tmp):
    write(
        in_tmp,
        a__b="base: c.yaml\ndata: ../parts/d.yaml\nmodel:\n  base: ../parts/m.yaml\n  init_args:\n    lr: 0.5",
        a__c="trainer:\n  max_epochs: 3\n  devices: 1\nmodel:\n  class_path: Gone",
        parts__d="class_path: D\ninit_args:\n  batch_size: 4",
        parts__m="class_path: M\ninit_args:\n  lr: 1e-4\n  momentum: 0.9",
    )
    assert load_config(in_tmp / "a" / "b.yaml") == {
        "trainer": {"max_epochs": 3, "devices": 1},
        "data": {"class_path": "D", "init_args": {"batch_size": 4}},
        "model": {"class_path": "M", "init_args": {"lr": 0.5, "momentum": 0.9}},
    }
    # 1e-4 is a number here, though not to YAML 1.1.
    assert load_config(in_tmp / "parts" / "m.yaml")["init_args"]["lr"] == 1e-4


def test_a_file_may_start_from_one_of_the_checkout_s(in_tmp):
    write(in_tmp, mine="base: quickstart.yaml\ntrainer:\n  max_epochs: 1")
    config = load_config(in_tmp / "mine.yaml")
    assert config["trainer"]["max_epochs"] == 1
    assert config["data"]["class_path"].endswith("DigitsDataModule")
    write(in_tmp, mine="base: quikstart.yaml")
    with pytest.raises(FileNotFoundError, match=r"mine.yaml: it names .*; did you mean 'quickstart.yaml'"):
        load_config(in_tmp / "mine.yaml")


def test_a_missing_part_names_the_file_that_asks_for_it(in_tmp):
    write(in_tmp, x="data: parts/none.yaml", y="just text")
    with pytest.raises(FileNotFoundError, match=r"x.yaml: it names 'parts/none.yaml'"):
        load_config(in_tmp / "x.yaml")
    with pytest.raises(ValueError, match=r"y.yaml: expected `key: value` lines"):
        load_config(in_tmp / "y.yaml")


def test_another_class_does_not_inherit_arguments():
    slim = {"operator": {"class_path": "slimconv_lit.SlimConv2d", "init_args": {"k": 2, "min_hidden": 4}}}
    same = merge(slim, {"operator": {"class_path": "SlimConv2d", "init_args": {"k": 4}}})
    assert same["operator"]["init_args"] == {"k": 4, "min_hidden": 4}
    other = merge(slim, {"operator": {"class_path": "OctConv2d", "init_args": {"alpha": 1}}})
    assert other["operator"]["init_args"] == {"alpha": 1}
    assert merge(slim, {"operator": None}) == {"operator": None}


def test_lists_grow_from_file_to_file(in_tmp):
    write(
        in_tmp,
        one="trainer:\n  callbacks: [a]",
        two="base: one.yaml\ntrainer:\n  callbacks+: [b]",
        three="base: two.yaml\ntrainer:\n  callbacks+: [c, d]",
        other="trainer:\n  callbacks: [e]",
        more="trainer:\n  callbacks+: [f]",
    )
    read = {name: load_config(in_tmp / f"{name}.yaml")["trainer"] for name in ("three", "other", "more")}
    assert read["three"] == {"callbacks": ["a", "b", "c", "d"]}
    assert merge(read["three"], read["other"]) == {"callbacks": ["e"]}
    assert merge(read["three"], read["more"]) == {"callbacks": ["a", "b", "c", "d", "f"]}
    # Without a list to add to, the parser adds to its own.
    assert merge(read["more"], read["more"]) == {"callbacks+": ["f", "f"]}
    assert merge(read["more"], read["other"]) == {"callbacks": ["e"]}


def test_what_a_checkpoint_carries(in_tmp):
    torch.save({"state_dict": {}, "hyper_parameters": {"_class_path": "M", "_instantiator": "x", "lr": 1}}, "x.ckpt")
    assert checkpoint_config(in_tmp / "x.ckpt") == {"model": {"class_path": "M", "init_args": {"lr": 1}}}
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1}, "class_paths": {"model": "M"}}, "y.ckpt")
    assert checkpoint_config(in_tmp / "y.ckpt") == {"model": {"class_path": "M", "init_args": {"lr": 1}}}


def test_last_and_best_are_those_of_the_newest_run_that_has_them(in_tmp):
    for run in (
        "a/2026-01-02_00-00-00",
        "b/2026-01-03_00-00-00",
        "b/2026-01-01_00-00-00",
        "b/2026-01-04_00-00-00-test",
    ):
        (in_tmp / "runs" / run / "checkpoints").mkdir(parents=True)
        if "test" not in run:
            (in_tmp / "runs" / run / "checkpoints" / "last.ckpt").touch()
    assert find_checkpoint("last", in_tmp / "runs").parts[-4:-2] == ("b", "2026-01-03_00-00-00")
    assert find_checkpoint("last", in_tmp / "runs", "a").parts[-4] == "a"
    with pytest.raises(FileNotFoundError, match=r"--ckpt_path best: there is no .*best.ckpt"):
        find_checkpoint("best", in_tmp / "runs")
    with pytest.raises(FileNotFoundError, match=r"there is no file 'x\.ckpt'"):
        find_checkpoint("x.ckpt", in_tmp / "runs")


def test_a_verb_without_weights_is_refused():
    with pytest.raises(ValueError, match="test needs --ckpt_path"):
        compose("test", ["--config", "quickstart.yaml"])
    with pytest.raises(ValueError, match="test needs --ckpt_path"):
        compose("test", ["--config", "quickstart.yaml", "--weights_only=true"])
    for start in ("--model.backbone_options={weights: DEFAULT}", "--model.weights=x.pth"):
        assert compose("test", ["--config", "quickstart.yaml", start])


def test_a_folder_as_data_is_what_predict_reads(in_tmp):
    (in_tmp / "photos").mkdir()
    model = "--model.weights=w.pt"
    for folder in ("photos", "no/such/folder"):
        words = compose("predict", ["--data", folder, model])
        assert f"--data.predict_dir={folder}" in words
    for value in ("DigitsDataModule", "data/cifar100.yaml", '{"class_path": "a/b"}'):
        assert f"--data={value}" in compose("predict", [f"--data={value}", model])
    assert "--data=photos" in compose("fit", ["--data", "photos"])
