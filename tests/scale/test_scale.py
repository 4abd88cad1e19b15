"""Two and four processes train what one trains, and see each image once; driver.py runs them."""

import csv
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.plugins import TorchSyncBatchNorm
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import nn

from slimconv_lit import ClassificationTask, SlimConv2d, create_backbone
from slimconv_lit.cli import main
from slimconv_lit.data import DigitsDataModule
from slimconv_lit.data.base import EpochSampler
from slimconv_lit.data.files import DataError
from slimconv_lit.distributed import prepare_devices
from slimconv_lit.sync_batchnorm import CPUSyncBatchNorm, SyncBatchNorms

MANY = {"ddp2": 2, "ddp4": 4, "fsdp2": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which the driver has run."""
    folder = tmp_path_factory.mktemp("scale")
    command, root = [sys.executable, "-m", "tests.scale.driver", str(folder)], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    (folder / "driver.log").write_text(done.stdout)
    logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + logs
    return folder


def run_of(runs, name):
    (folder,) = (runs / "runs" / name).iterdir()
    return folder


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = ("train/loss", "train/top1", "val/top1", "val/loss", "test/top1")
    return {key: [float(row[key]) for row in rows if row.get(key)] for key in keys}


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", [*MANY, "told"])
def test_the_curves_are_those_of_one_process(runs, name):
    one, many = run_of(runs, "one"), run_of(runs, name)
    alone, together = metrics(one), metrics(many)
    assert [len(values) for values in alone.values()] == [3, 3, 3, 3, 1]
    for key in alone:
        assert together[key] == pytest.approx(alone[key], rel=1e-3), key
    # It has learned something, so that to agree says something.
    assert alone["train/loss"][2] < 0.9 * alone["train/loss"][0]
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(many)[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["norms2", "norms4"])
def test_synchronised_batch_norms_see_the_whole_batch(runs, name):
    one, many = run_of(runs, "norms"), run_of(runs, name)
    alone, together = metrics(one), metrics(many)
    for key in alone:
        assert together[key] == pytest.approx(alone[key], rel=1e-5), key
    assert weights(one).keys() == weights(many).keys()
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(many)[key], value, rtol=1e-5, atol=1e-7)
    # What was put in the norms' place is out of it again, so that the network is counted and tested as it was.
    counts = [json.loads((folder / "results.json").read_text()) for folder in (one, many)]
    assert counts[0]["params"] == counts[1]["params"]
    assert counts[0]["macs"] == counts[1]["macs"]


def test_synchronised_batch_norms_of_sharded_networks(runs):
    one, many = run_of(runs, "norms"), run_of(runs, "norms_fsdp")
    # Each process with its own norms, it is 12 % more.
    assert metrics(many)["train/loss"][0] == pytest.approx(metrics(one)["train/loss"][0], rel=1e-3)
    assert weights(many).keys() == weights(one).keys()


@pytest.mark.parametrize("name", ["one", *MANY])
def test_metrics_are_of_each_image_once(runs, name):
    with (run_of(runs, name) / "per_class.csv").open() as file:
        assert [int(row["images"]) for row in csv.DictReader(file)] == [4, 4, 3]


@pytest.mark.parametrize("name", MANY)
def test_the_first_process_alone_writes_and_prints(runs, name):
    assert {path.name for path in run_of(runs, name).iterdir()} == {path.name for path in run_of(runs, "one").iterdir()}
    first, *others = [(runs / f"{name}.{rank}.log").read_text() for rank in range(MANY[name])]
    assert f"in runs/{name}/" in first
    assert not [log for log in others if "runs/" in log or "timm:" in log]
    assert json.loads((run_of(runs, name) / "results.json").read_text())["macs"] > 0
    # A recipe for any number of devices.
    trainer = yaml.safe_load((run_of(runs, name) / "config.yaml").read_text())["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == ("auto", 1)


def test_processes_that_are_told_to_end_stop_at_one_step_and_another_number_goes_on(runs):
    first, second = ((runs / f"told.{rank}.log").read_text() for rank in range(2))
    assert "--ckpt_path last" in first
    assert "runs/told" not in second
    assert "Traceback" not in first + second
    (refused,) = [line for line in first.splitlines() if line.startswith("error: ")]
    assert "last.ckpt has 2 batches of 8 images of an epoch behind it (2 devices with 4 each); with 1 x 4" in refused
    assert refused.endswith("Go on with --data.batch_size=8")


def test_killed_processes_go_on_as_if_they_never_were(runs):
    # The driver has compared weights, momenta, random states and metrics bit by bit: benchmarks/kills.py.
    lines = (runs / "driver.log").read_text().splitlines()
    each = [json.loads(line) for line in lines if line.startswith('{"steps done"')]
    assert len(each) == 2
    for kill in each:
        # In the middle of an epoch of 12.
        assert 6 <= kill["went on from"] <= kill["steps done"] < 12
        assert not kill["differs"]


def test_a_sharded_run_s_checkpoint_that_cannot_be_written_or_is_damaged_is_told(runs, in_tmp, capsys):
    told = (runs / "unwritten.0.log").read_text()
    assert "last.ckpt cannot be written: No space left on device" in told
    assert "Traceback" not in told
    checkpoint = in_tmp / "last.ckpt"
    checkpoint.write_bytes((run_of(runs, "fsdp2") / "checkpoints" / "last.ckpt").read_bytes()[:-100])
    assert main(["test", f"--ckpt_path={checkpoint}"]) == 2
    assert f"error: {checkpoint} is truncated or damaged" in capsys.readouterr().err


def test_a_sharded_run_s_checkpoint_is_whole_and_tested_by_one_process(runs, in_tmp):
    checkpoint = run_of(runs, "fsdp2") / "checkpoints" / "best.ckpt"
    words = [f"--data.root={runs / 'data'}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["test", f"--ckpt_path={checkpoint}", *words]) == 0
    (folder,) = in_tmp.glob("runs/fsdp2/*-test")
    own, sharded = (json.loads((f / "results.json").read_text()) for f in (folder, run_of(runs, "fsdp2")))
    assert own == {key: value for key, value in sharded.items() if key != "seconds"}


def test_four_processes_predict_what_one_predicts_in_the_same_order(runs):
    tables = []
    for world in (1, 4):
        folder = run_of(runs, f"cls{world}")
        assert not list(folder.glob("predictions.?.csv"))
        with (folder / "predictions.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    alone, together = tables
    assert [row["name"] for row in together] == ["0/00.jpg", "0/00.png", *(f"0/{n:02d}.jpg" for n in range(1, 6))]
    for row, other in zip(alone, together, strict=True):
        assert (row["name"], row["class"]) == (other["name"], other["class"])
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=1e-5)


def test_two_processes_write_each_mask_once(runs):
    for part in ("masks", "overlays"):
        alone, together = (
            {path.name: path.read_bytes() for path in (run_of(runs, name) / "predictions" / part / "0").iterdir()}
            for name in ("seg1", "seg2")
        )
        assert len(alone) == len(together) == 7
        # Which of 00.jpg and 00.png has the short name is a matter of who was first.
        assert sorted(alone.values()) == sorted(together.values())
        assert {name: alone[name] for name in alone if name[:2] > "00"}.items() <= together.items()


def test_two_processes_write_each_detection_once_and_in_order(runs):
    alone, together = (json.loads((run_of(runs, f"det{n}") / "predictions.json").read_text()) for n in (1, 2))
    assert len({row["file_name"] for row in alone}) == 7
    for row, other in zip(alone, together, strict=True):
        assert {k: row[k] for k in ("file_name", "image_id")} == {k: other[k] for k in ("file_name", "image_id")}
        assert row["score"] == pytest.approx(other["score"], abs=1e-3)


@pytest.mark.parametrize("world", [2, 4])
def test_the_devices_batches_together_are_those_of_one(world):
    def batches(size, **own):
        sampler = EpochSampler(26, seed=3, **own)
        sampler.set_epoch(5)
        keys = list(sampler)
        return [keys[start : start + size] for start in range(0, len(keys), size)]

    alone = batches(8)
    shared = [batches(8 // world, num_replicas=world, rank=rank) for rank in range(world)]
    together = [[key for part in parts for key in part] for parts in zip(*shared, strict=True)]
    assert [sorted(batch) for batch in together[:-1]] == [sorted(batch) for batch in alone[:-1]]
    # 26 are not divisible by 4: the first two of the order are dealt once more.
    extra = alone[0][: -26 % world]
    assert sorted(together[-1]) == sorted(alone[-1] + extra)


def test_fewer_images_than_devices_are_an_error(monkeypatch):
    monkeypatch.setattr(DigitsDataModule, "replica", {"num_replicas": 400, "rank": 0})
    with pytest.raises(DataError, match="360 images cannot be shared among 400 devices: use at most 360"):
        DigitsDataModule().test_dataloader()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config=trainer/fsdp.yaml", "--model.ema_decay=0.9"], "--model.ema_decay=null"),
        (["--config=trainer/fsdp.yaml", "--trainer.callbacks=slimconv_lit.callbacks.Sparsity"], "take ddp"),
    ],
    ids=["average", "sparsity"],
)
def test_what_the_devices_cannot_do_is_told_at_once(words, said, in_tmp, capsys):
    assert main(["fit", "--config=quickstart.yaml", "--trainer.accelerator=cpu", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(in_tmp.rglob("runs/*"))


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_norms_with_an_activation_keep_it_while_they_are_synchronised(alone):
    network, images = create_backbone("timm:test_efficientnet", SlimConv2d, 10, 3).train(), torch.randn(4, 3, 64, 64)
    plain, sync = deepcopy(network), SyncBatchNorms(on_gpu=False)
    for mode in (True, False):
        assert sync.apply(network.train(mode)) is network
        outputs = [net(images) for net in (plain.train(mode), network)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        for output in outputs:
            output.square().sum().backward()
        for old, new in zip(plain.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(old.grad, new.grad, rtol=1e-3, atol=1e-4)
        for old, new in zip(plain.buffers(), network.buffers(), strict=True):
            torch.testing.assert_close(old, new, rtol=1e-4, atol=1e-5)
        assert [type(part) for part in sync.revert(network).modules()] == [type(part) for part in plain.modules()]
        assert {"_unsynchronised", "process_group"}.isdisjoint(key for part in network.modules() for key in vars(part))


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_the_accelerator_decides_which_norms_are_synchronised_how(accelerator):
    # Lightning's DDP hands the network over before it is on the GPU.
    made = {"cpu": CPUAccelerator, "cuda": CUDAAccelerator}[accelerator]()
    strategy = SimpleNamespace(_layer_sync=TorchSyncBatchNorm())
    prepare_devices(
        SimpleNamespace(strategy=strategy, accelerator=made, callbacks=[]),
        ClassificationTask("cifar_resnet20", num_classes=10),
    )
    network = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4), nn.BatchNorm1d(4, track_running_stats=False))
    kinds = [type(norm) for norm in strategy._layer_sync.apply(network)]
    torchs = [nn.SyncBatchNorm, SyncBatchNormAct, nn.SyncBatchNorm]
    assert kinds == (torchs if accelerator == "cuda" else [CPUSyncBatchNorm] * 3)
    strategy._layer_sync.revert(network)
    assert [type(norm) for norm in network] == [nn.BatchNorm2d, BatchNormAct2d, nn.BatchNorm1d]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_synchronised_norms_of_any_precision(alone, precision):
    network = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None, affine=False)).to(precision)
    plain, images = deepcopy(network), torch.randn(3, 4, 5, 5, dtype=precision)
    SyncBatchNorms(on_gpu=False).apply(network)
    torch.testing.assert_close(network(images), plain(images), rtol=2e-2, atol=2e-2)
    for old, new in zip(plain.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(old, new, rtol=2e-2, atol=2e-2)


def _half_a_batch(rank, address, path):
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    # Weights, not the network: the command line's modules have torch refuse to unpickle code.
    weights, images = torch.load(path)
    network = create_backbone("cifar_resnet20", SlimConv2d, 10, 3)
    network.load_state_dict(weights)
    # In the order of Lightning's DDP.
    network = SyncBatchNorms(on_gpu=True).apply(network).cuda().train()
    torch.save(network(images.cuda()[rank::2]).cpu(), f"{path}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's own synchronise GPUs only")
def test_torch_s_synchronised_batch_norms_see_the_whole_batch(tmp_path):
    # Two processes share the one GPU.
    network, images = create_backbone("cifar_resnet20", SlimConv2d, 10, 3).train(), torch.randn(8, 3, 32, 32)
    torch.save((network.state_dict(), images), tmp_path / "it")
    expected = network.cuda()(images.cuda()).cpu()
    torch.multiprocessing.spawn(_half_a_batch, (f"file://{tmp_path}/meet", str(tmp_path / "it")), nprocs=2)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"it.{rank}"), expected[rank::2], rtol=1e-3, atol=1e-3)
