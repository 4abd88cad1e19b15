"""What SlimConv keeps for the backward pass and makes again, against the same layers called one by one."""

import copy
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from slimconv_lit import SlimConv2d, slimify, use_kernel
from slimconv_lit.ops.slim_conv import pool
from tests.ops.test_slim_conv import ARRANGEMENTS, randomised


def one_by_one(operator):
    """A copy whose layers are called one by one, because they are watched."""
    watched = copy.deepcopy(operator)
    for module in watched.modules():
        module.register_forward_hook(lambda *_: None)
    return watched


def gradients(operator, x, weight=None):
    """What the operator writes, and the gradients of x and of the parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    written = operator(x)
    torch.manual_seed(7)
    weight = torch.randn_like(written, dtype=torch.float64).to(written.dtype)
    return written, torch.autograd.grad((written * weight).sum(), [x, *operator.parameters()])


def kept_for_backward(model, x):
    """Bytes that autograd keeps in a forward pass of `model`, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        # With the tensor, so that its place is not taken by another.
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(x)
    return sum(size for place, (size, _) in kept.items() if place not in own), output


# ---- the same as before --------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    arrangement=st.sampled_from(ARRANGEMENTS),
    folds=st.integers(2, 8),
    width=st.integers(1, 3),
    rest=st.integers(0, 3),
    groups=st.sampled_from([1, 2, "depthwise"]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    size=st.tuples(st.integers(1, 7), st.integers(2, 7)),
    training=st.booleans(),
    frozen=st.sampled_from(["", "gate", "top", "bottom", "x"]),
    last=st.booleans(),
)
def test_equals_the_layers_one_by_one(
    arrangement, folds, width, rest, groups, stride, dilation, size, training, frozen, last
):
    channels = 2 * folds * width * (groups if isinstance(groups, int) else 1)
    channels += rest if groups == 1 else 0
    operator = SlimConv2d(
        channels, stride=stride, dilation=dilation, groups=channels if groups == "depthwise" else groups,
        k=2 * folds / 3, arrangement=arrangement, min_hidden=2,
    )  # fmt: skip
    torch.manual_seed(folds)
    randomised(operator).double().train(training)
    for name, part in operator.named_children():
        part.requires_grad_(name != frozen)
    watched = one_by_one(operator)
    x = torch.randn(3, channels, *size, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if last else x
    results = []
    for each in (operator, watched):
        own = x.clone(memory_format=torch.preserve_format).requires_grad_(frozen != "x")
        written = each(own)
        written.square().sum().backward()
        results.append([written, own.grad, *(p.grad for p in each.parameters())])
    for ours, wanted in zip(*results, strict=True):
        assert (ours is None) == (wanted is None)
        if ours is not None:
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    # The running statistics have seen the batch once.
    for name, value in watched.state_dict().items():
        torch.testing.assert_close(operator.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_gradients_and_their_gradients(arrangement, training):
    torch.manual_seed(0)
    operator = SlimConv2d(9, stride=2, k=2, arrangement=arrangement, min_hidden=2)
    randomised(operator).double().train(training)
    # Numeric differences must not see running statistics that change, or cross the kink of a ReLU.
    for module in operator.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
            nn.init.constant_(module.bias, 3.0)
    x = torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*operator.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(operator, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("arrangement", ["flip", "shuffle_3b"])
def test_autocast_gives_what_it_gives_one_by_one(arrangement):
    torch.manual_seed(0)
    operator = randomised(SlimConv2d(32, k="8/3", arrangement=arrangement))
    watched, x = one_by_one(operator), torch.randn(2, 32, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (ours, our_grads), (wanted, wanted_grads) = gradients(operator, x), gradients(watched, x)
    assert ours.dtype == wanted.dtype == torch.bfloat16
    assert torch.equal(ours, wanted)
    for own, (name, parameter), theirs in zip(
        our_grads[1:], operator.named_parameters(), wanted_grads[1:], strict=True
    ):
        assert own.dtype == parameter.dtype == torch.float32
        assert (own - theirs).norm() <= 0.05 * theirs.norm() + 1e-3, name
    assert our_grads[0].dtype == torch.float32
    # A kernel that is cast for one operator is cast for its gradient too.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (operator(x) + operator(x)).float().sum().backward()
    assert all(p.grad is not None for p in operator.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pools_in_half_precision_without_overflow(dtype):
    x = torch.full((1, 2, 64, 64), 100, dtype=dtype)
    assert torch.equal(pool(x), torch.full((1, 2, 1, 1), 100, dtype=dtype))
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(pool(x), functional.adaptive_avg_pool2d(x, 1))
    assert torch.autograd.gradcheck(pool, x)


def test_keeps_the_memory_format():
    operator = SlimConv2d(16).to(memory_format=torch.channels_last)
    for training in (True, False):
        x = torch.randn(2, 16, 5, 6).to(memory_format=torch.channels_last)
        written, (of_x, *_) = gradients(operator.train(training), x)
        assert written.is_contiguous(memory_format=torch.channels_last)
        assert of_x.is_contiguous(memory_format=torch.channels_last)


# ---- what it costs -------------------------------------------------------------------------------------------------


def test_sc_resnet50_keeps_no_more_for_backward_than_resnet50():
    x = torch.randn(2, 3, 128, 128).to(memory_format=torch.channels_last)
    kept = {}
    for k in (None, "4/3", "8/3"):
        model = torchvision.models.resnet50(num_classes=10)
        if k:
            slimify(model, k=k)
        kept[k], _ = kept_for_backward(model.to(memory_format=torch.channels_last), x)
    assert kept["4/3"] <= kept[None]
    assert kept["8/3"] <= 0.94 * kept[None]


class LargestMade(TorchDispatchMode):
    """Notes how often something of a size or larger is made anew."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        read = {v.untyped_storage().data_ptr() for v in tree_iter((args, kwargs)) if isinstance(v, torch.Tensor)}
        for value in tree_iter(output):
            large = isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() >= self.size
            if large and value.untyped_storage().data_ptr() not in read:
                self.made.append(func.overloadpacket.__name__)
        return output


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_weighted_copies_of_x_are_never_made(arrangement):
    operator = SlimConv2d(32, stride=2, arrangement=arrangement)
    x = torch.randn(2, 32, 24, 24, requires_grad=True)
    with LargestMade(x.untyped_storage().nbytes()) as forward:
        written = operator(x)
    assert forward.made == []
    with LargestMade(x.untyped_storage().nbytes()) as backward:
        written.sum().backward()
    # The gradient of x; where nothing watches, the pooling's part is added in place.
    assert backward.made == ["empty_like", "add"]


# ---- who watches sees everything -----------------------------------------------------------------------------------


def test_hooks_and_changed_layers_are_called():
    operator, x = SlimConv2d(16), torch.randn(2, 16, 5, 5)
    layers = [module for module in operator.modules() if module is not operator]
    for layer in layers:
        called = []
        handle = layer.register_forward_hook(lambda *_, called=called: called.append(1))
        operator(x)
        handle.remove()
        assert called == [1], layer
    before = operator(x)
    operator.bottom[1] = nn.InstanceNorm2d(4)
    nn.utils.parametrizations.weight_norm(operator.top[0])
    operator.bottom[3].bias = nn.Parameter(torch.ones(4))
    operator(x).sum().backward()
    assert operator.bottom[3].bias.grad is not None
    assert operator.top[0].parametrizations.weight.original0.grad is not None
    assert not torch.allclose(operator(x), before)
    operator.bottom[3] = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False)
    with torch.no_grad():
        wanted = operator(x)
    torch.testing.assert_close(operator(x), wanted)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    operator(x)
    handle.remove()
    assert {operator.gate.squeeze, operator.top[0], operator.bottom[0], operator.bottom[4]} <= set(called)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(training):
    torch.manual_seed(0)
    operator = randomised(SlimConv2d(16, k=2)).train(training)
    eager, x = copy.deepcopy(operator), torch.randn(2, 16, 7, 7)
    torch.compiler.reset()
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(*(tree_iter(gradients(each, x)) for each in (compiled, eager)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


# ---- kernels of our own --------------------------------------------------------------------------------------------


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which comes with torch on Linux")


@needs_triton
def test_kernels_through_tritons_interpreter():
    file = Path(__file__).with_name("test_reconstruct_triton.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^2\d passed", ran.stdout, re.MULTILINE), ran.stdout


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_kernels_compile_for_a_gpu_that_is_not_here(name, tmp_path, monkeypatch):
    # Else it would find what it has compiled before.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton, kernels = import_module("triton"), import_module("slimconv_lit.ops.reconstruct_triton")
    kernel, single = getattr(kernels, name), triton.language.float32
    known = {"N": 2, "T": 64, "P": 2, "BLOCK_S": 32, "BLOCK_T": 64, "LAST": True, "SUM": single, "x_c": 1}
    kinds = dict.fromkeys(("x_b", "x_s", "B", "C", "S"), "i32") | dict.fromkeys(known, "constexpr") | {"of_w": "*fp32"}
    signature = {name: kinds.get(name, "*bf16") for name in kernel.arg_names}
    place = {name: (i,) for i, name in enumerate(signature)}
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {place[name]: value for name, value in known.items()},
        {place[name]: [["tt.divisibility", 16]] for name in signature.keys() - known.keys()},
    )
    target = import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    written = triton.compile(source, target).asm["ptx"]
    # Of maps, 16 bytes at once.
    assert "ld.global.v4.b32" in written
    assert "st.global.v4.b32" in written


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_kernels_are_refused_where_they_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="there is no kernel 'tritn'; there are torch and triton"):
        use_kernel("tritn")
    if find_spec("triton"):
        with pytest.raises(ValueError, match="needs a GPU, and torch sees none here"):
            use_kernel("triton")
    monkeypatch.setitem(sys.modules, "slimconv_lit.ops.reconstruct_triton", None)
    with pytest.raises(ValueError, match="needs the package triton"):
        use_kernel("triton")
    with use_kernel("torch"):
        SlimConv2d(8)(torch.randn(2, 8, 3, 3)).sum().backward()


def test_torch_func_goes_through_the_layers_one_by_one():
    operator = randomised(SlimConv2d(16)).double().eval()
    learned, x = dict(operator.named_parameters()), torch.randn(3, 16, 5, 6, dtype=torch.float64)

    def total(learned, x):
        return torch.func.functional_call(operator, learned, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(total), (None, 0))(learned, x)
    together = torch.autograd.grad(sum(total(learned, image) for image in x), list(learned.values()))
    for found, wanted in zip(each.values(), together, strict=True):
        torch.testing.assert_close(found.sum(0), wanted)
    torch.testing.assert_close(torch.func.vmap(lambda image: operator(image[None])[0])(x), operator(x))

    step = torch.randn_like(x)
    along = torch.func.jvp(operator, (x,), (step,))[1]
    with forward_ad.dual_level():
        dual = operator(forward_ad.make_dual(x, step))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along)
    near = (operator(x + 1e-6 * step) - operator(x - 1e-6 * step)) / 2e-6
    torch.testing.assert_close(along, near, rtol=1e-5, atol=1e-6)
