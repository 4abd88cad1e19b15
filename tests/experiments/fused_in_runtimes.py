"""Exports a fused network to three runtimes and compares them with it, in other numbers of images than were traced.

python -m tests.experiments.fused_in_runtimes FOLDER
"""

import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch

from slimconv_lit import SlimConv2d, create_backbone, fuse
from slimconv_lit.experiments import formats


def main(folder):
    torch.manual_seed(0)
    network = create_backbone("cifar_resnet20", partial(SlimConv2d, k="8/3"), 10).eval()
    expected = deepcopy(network).double()
    fuse(network)
    program = formats.trace(network, torch.randn(2, 3, 32, 32), free_size=False)
    formats.write_aoti(program, folder / "net.pt2", {})
    formats.write_onnx(program, folder / "net.onnx", {})
    formats.write_openvino(folder / "net.onnx", folder / "net.xml", {})
    for run in (
        formats.open_aoti(folder / "net.pt2"),
        formats.open_onnx(folder / "net.onnx"),
        formats.open_openvino(folder / "net.xml"),
    ):
        for count in (1, 2, 3):
            images = torch.randn(count, 3, 32, 32)
            with torch.no_grad():
                (found,), wanted = run(images), expected(images.double())
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
            print(count, "alike")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
