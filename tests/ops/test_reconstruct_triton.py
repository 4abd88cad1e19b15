"""The Triton kernels against the equations in float64: on a GPU, or on the CPU through Triton's interpreter.

The interpreter has to be asked for before Triton is imported, so `test_reconstruct.py` runs this file once more:

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_reconstruct_triton.py
"""

import copy
import os

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from slimconv_lit import SlimConv2d
from slimconv_lit.ops.reconstruct import fold, use_kernel
from tests.ops import reference
from tests.ops.test_reconstruct import gradients, kept_for_backward
from tests.ops.test_slim_conv import ARRANGEMENTS, randomised, relative

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)
    pytestmark = pytest.mark.gpu
kernels = pytest.importorskip("slimconv_lit.ops.reconstruct_triton")
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts bfloat16 off, where GPUs round.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}


@pytest.fixture(autouse=True)
def exact():
    """Products in full float32, and memory that is asked for is full of NaN: what is not written is seen."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = before


def drawn(*shape, dtype=torch.float32, last=False):
    x = torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def check(x, weights, folds, grads=None):
    """The folded maps and all gradients, by the kernels and by the equations."""
    x, weights = x.detach().requires_grad_(), [w.detach().requires_grad_() for w in weights]
    maps = kernels.fold_paths(x, weights, folds)
    grads = [torch.randn_like(one) for one in maps] if grads is None else grads
    got = torch.autograd.grad(maps, [x, *weights], grads)
    exact_x, *exact_weights = (t.detach().double().requires_grad_() for t in (x, *weights))
    wanted = [reference.fold(exact_x * w, folds) for w in exact_weights]
    of_wanted = torch.autograd.grad(wanted, [exact_x, *exact_weights], [grad.double() for grad in grads])
    for one, exact_one in zip([*maps, *got], [*wanted, *of_wanted], strict=True):
        assert one.shape == exact_one.shape
        assert relative(one.detach(), exact_one.detach()) < ROUNDING[one.dtype]
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in (x, *weights)]
    return maps, got


# Channels that N does not divide, widths that are no power of two, maps of one pixel, more than a tile of both.
SHAPES = [
    ((2, 64, 7, 7), 2, 2),
    ((1, 4, 1, 1), 2, 2),
    ((2, 100, 13, 3), 3, 1),
    ((2, 16, 31, 1), 4, 2),
    ((2, 45, 1, 33), 5, 3),
    ((1, 26, 24, 37), 6, 2),
    ((2, 21, 3, 2), 7, 1),
    ((3, 37, 5, 9), 8, 3),
    ((1, 263, 5, 8), 2, 2),
    ((0, 8, 3, 3), 2, 2),
]


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_equals_the_equations_forward_and_backward(dtype, last):
    for shape, folds, paths in SHAPES:
        x = drawn(*shape, dtype=dtype, last=last)
        maps, (of_x, *_) = check(x, [drawn(*shape[:2], 1, 1, dtype=dtype) for _ in range(paths)], folds)
        assert [one.dtype for one in maps] == [dtype] * paths
        layout = torch.channels_last if last else torch.contiguous_format
        for one in (*maps, of_x):
            assert one.is_contiguous(memory_format=layout), shape
        assert not of_x[:, shape[1] // folds * folds :].any()


def test_any_strides_and_mixed_types():
    w = drawn(2, 24, 1, 1)
    for last in (True, False):
        narrow = drawn(2, 30, 9, 10, last=last)[:, 2:26]
        for x in (narrow, narrow[..., ::2, 1::3], narrow.transpose(2, 3), narrow[:1].expand(2, -1, -1, -1)):
            check(x, [w, w.flip(1)], 4)
    x = drawn(2, 24, 5, 6, last=True)
    check(x, [w[:1].expand(2, -1, -1, -1), w[:, :1].expand(-1, 24, -1, -1)], 2)
    check(x, [w], 2, grads=[torch.ones(1, device=DEVICE).expand(2, 12, 5, 6)])
    # Autocast leaves maps that nothing has convolved in float32.
    maps, _ = check(x, [w.bfloat16(), w.flip(1).bfloat16()], 2)
    assert maps[0].dtype == torch.float32


def test_come_out_the_same_each_time():
    x, weights, grads = drawn(2, 8, 40, 40, last=True), [drawn(2, 8, 1, 1)] * 2, [drawn(2, 4, 40, 40, last=True)] * 2
    first = kernels.fold_paths_backward(x, weights, grads, 2)
    for _ in range(3):
        assert all(map(torch.equal, first, kernels.fold_paths_backward(x, weights, grads, 2)))


def test_gradients_and_their_gradients():
    x, *weights = drawn(2, 9, 2, 3, dtype=torch.float64), *(drawn(2, 9, 1, 1, dtype=torch.float64) for _ in range(2))
    tensors = [tensor.requires_grad_() for tensor in (x, *weights)]

    def function(x, *weights):
        return tuple(kernels.fold_paths(x, weights, 2))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_are_sound_operators_of_torch():
    # What the compiler makes of them has a test of its own.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, w = drawn(2, 9, 3, 5, last=True), drawn(2, 9, 1, 1)
    torch.library.opcheck(kernels.fold_paths, (x.requires_grad_(), [w, w * 2], 2), test_utils=tests)
    grads = [drawn(2, 4, 3, 5) for _ in range(2)]
    torch.library.opcheck(kernels.fold_paths_backward, (x.detach(), [w] * 2, grads, 2), test_utils=tests)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("training", [True, False])
def test_operator_equals_that_without_kernels(arrangement, training):
    for channels, folds, frozen in ((33, 2, ()), (50, 4, ("x",)), (24, 3, ("x", "gate"))):
        operator = randomised(SlimConv2d(channels, k=2 * folds / 3, arrangement=arrangement, min_hidden=3))
        operator = operator.to(DEVICE, torch.float64).train(training)
        operator.gate.requires_grad_("gate" not in frozen)
        x = drawn(3, channels, 6, 7, dtype=torch.float64, last=True).requires_grad_("x" not in frozen)
        with torch.no_grad(), use_kernel("triton"):
            unwatched = copy.deepcopy(operator)(x)
        results = []
        for name in ("torch", "triton"):
            own, own_x = copy.deepcopy(operator), x.detach().requires_grad_(x.requires_grad)
            with use_kernel(name):
                written = own(own_x)
                written.square().sum().backward()
            results.append([written, own_x.grad, *(p.grad for p in own.parameters()), *own.buffers()])
        for ours, wanted in zip(*results, strict=True):
            assert (ours is None) == (wanted is None)
            if ours is not None:
                torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(unwatched, results[0][0], rtol=1e-9, atol=1e-9)


def test_keeps_no_more_for_the_backward_pass():
    operator, x = SlimConv2d(32).to(DEVICE), drawn(2, 32, 12, 12, last=True).requires_grad_()
    kept = []
    for name in ("torch", "triton"):
        with use_kernel(name):
            kept.append(kept_for_backward(operator, x)[0])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("arrangement", ["flip", "none", "shuffle_3b"])
def test_training_step_under_autocast(arrangement):
    operator, x = randomised(SlimConv2d(32, k="8/3", arrangement=arrangement)).to(DEVICE), drawn(2, 32, 9, 9, last=True)
    found = {}
    for name in ("torch", "triton"):
        with use_kernel(name), torch.autocast(DEVICE, dtype=torch.bfloat16):
            found[name] = gradients(copy.deepcopy(operator), x)
    (ours, our_grads), (wanted, wanted_grads) = found["triton"], found["torch"]
    assert ours.dtype == wanted.dtype == torch.bfloat16
    assert relative(ours, wanted.double()) < 0.02
    for own, theirs in zip(our_grads, wanted_grads, strict=True):
        assert own.dtype == theirs.dtype
        assert (own - theirs).norm() <= 0.05 * theirs.norm() + 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph_with_one_pass_each_way(training):
    operator, x = randomised(SlimConv2d(16, k=2)).to(DEVICE).train(training), drawn(2, 16, 7, 7, last=True)
    called = []

    def note(graph, inputs):
        called.append([str(node.target) for node in graph.graph.nodes if "slimconv_lit" in str(node.target)])
        return make_boxed_func(graph)

    with use_kernel("triton"):
        wanted = gradients(copy.deepcopy(operator), x)
        for backend in (aot_autograd(fw_compiler=note), *(() if INTERPRETED else ("inductor",))):
            torch.compiler.reset()
            compiled = torch.compile(copy.deepcopy(operator), backend=backend, fullgraph=True)
            ours = gradients(compiled, x)
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert called == [["slimconv_lit.fold_paths.default"], ["slimconv_lit.fold_paths_backward.default"]]


def test_what_is_chosen_is_taken_for_the_block():
    x, w = drawn(2, 64, 3, 3, dtype=torch.float16), drawn(2, 64, 1, 1, dtype=torch.float16)
    operator = SlimConv2d(64, k="8/3").to(DEVICE, torch.float16)
    operator.gate.forward = lambda x: w
    found = []
    with use_kernel("triton"):
        found += operator.reconstruct(x)[:1]
        with use_kernel("torch"):
            found += operator.reconstruct(x)[:1]
        found += operator.reconstruct(x)[:1]
    found += operator.reconstruct(x)[:1]
    by_kernel, by_torch = found[:2]
    assert torch.equal(found[2], by_kernel)
    assert torch.equal(found[3], by_torch)
    # It rounds once, torch at each fold.
    exact = fold(x.double(), w.double(), 4)
    assert relative(by_kernel, exact) < 0.75 * relative(by_torch, exact)
