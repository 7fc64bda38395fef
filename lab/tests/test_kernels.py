"""Claims about kernels.py, each against float64. The same tests run in Triton's interpreter if
there is no GPU, else on it (marked `gpu`); the compiled code is inspected without either.

    pytest lab/tests/test_kernels.py
    python lab/tests/test_kernels.py     # registers, spills and loads of the compiled kernels
"""
import collections
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]

import agrpo
import kernels
from kernels import (logprobs_and_entropy, logprobs_and_entropy_reference,
                     support_logprobs_and_entropy)
import bench

CUDA = torch.cuda.is_available()
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
V_LLADA = 126464                       # 15.4 tiles of the forward

# The bars: logp relative to 1 + |logp|, H absolute, dlogits times T / (|g_logp| + |g_H|). The
# interpreter truncates float32 to 16 bits where a GPU rounds: there they are twice as wide.
LOGP_BAR, H_BAR = 1e-6, 5e-6
ROOM = 1 if CUDA else 2
DX_BAR = {torch.float32: 1e-6, torch.bfloat16: ROOM * 2**-8, torch.float16: ROOM * 2**-11}

needs_triton = pytest.mark.skipif(not kernels.HAVE_TRITON, reason="Triton is not installed")
no_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device")
same_on_gpu = pytest.mark.skipif(CUDA, reason="the same test runs on the CUDA device")
# numpy's, interpreting
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INTERPRETER = pytest.param("cpu", id="interpreter", marks=[needs_triton, same_on_gpu])
GPU = pytest.param("cuda", id="gpu", marks=[pytest.mark.gpu, no_cuda])


@pytest.fixture(params=[INTERPRETER, GPU])
def device(request):
    return request.param


def randn(*shape, dtype=torch.float32, scale=1.0, seed=0, device="cpu"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(dtype).to(device)


def random_labels(logits, n=None):
    rng = torch.Generator().manual_seed(1)
    n = len(logits) if n is None else n
    return torch.randint(logits.shape[1], (n,), generator=rng).to(logits.device)


def incoming(labels):
    """Gradients of logp and of H."""
    return randn(2, len(labels), seed=2, device=labels.device).unbind()


def run(impl, logits, labels, positions=None, T=1.0, g=None, call=logprobs_and_entropy):
    """logp, H, dlogits by one implementation."""
    logits = logits.detach().requires_grad_()
    logp, H = call(logits, labels, positions, T, impl)
    g = [x.to(logp.dtype) for x in (g or incoming(labels))]
    return logp.detach(), H.detach(), torch.autograd.grad((logp, H), logits, g)[0]


def assert_near(found, right, g, T, dtype, rows=slice(None)):
    """Both are logp, H, dlogits, `right` in float64; g reached `rows`, the others get exactly
    0. Infinities must be equal, NaN never is."""
    (logp, H, dx), (logp64, H64, dx64) = found, right
    possible = logp64 > -INF
    assert torch.equal(logp > -INF, possible)
    error = (logp - logp64)[possible].abs() / (1 + logp64[possible].abs())
    assert (error <= LOGP_BAR).all()
    assert ((H - H64).abs() <= H_BAR).all()
    allowed = torch.zeros(len(dx), device=dx.device)
    allowed[rows] = DX_BAR[dtype] * (g[0].abs() + g[1].abs()) / T
    assert ((dx.double() - dx64).abs() <= allowed[:, None]).all()


def assert_bars(logits, labels, positions=None, T=1.0, call=logprobs_and_entropy):
    """The kernel against the reference in float64. Returns what the kernel found."""
    found = logp, H, dx = run("triton", logits, labels, positions, T, call=call)
    right = run("reference", logits.double(), labels, positions, T, call=call)
    assert logp.dtype == H.dtype == torch.float32 and right[0].dtype == torch.float64
    assert dx.dtype == logits.dtype and dx.shape == logits.shape
    assert logp.shape == H.shape == labels.shape
    rows = slice(None) if positions is None else positions
    assert_near(found, right, incoming(labels), T, logits.dtype, rows)
    return found


# § The bars

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.mark.parametrize("V", [37, 1000, 50257, V_LLADA])
@each_dtype
@pytest.mark.parametrize("scale, T", [(1, 1.0), (1, 0.6), (100, 0.6), (1e4, 1.0), (1e4, 0.6)])
def test_errors_are_below_the_bars(device, V, dtype, scale, T):
    x = randn(2, V, dtype=dtype, scale=scale, device=device)
    assert_bars(x, random_labels(x), T=T)


def special(device, dtype=torch.float32):
    """Values that cost digits, every size of a row and of a launch, every stride."""
    def rows(N, V, scale=1):
        return randn(N, V, dtype=dtype, scale=scale, device=device)
    climb = torch.linspace(-30, 30, 70000, device=device, dtype=dtype)
    return {
        # With log-sum-exp in one number H would err by nats.
        "far up": rows(2, 50257, 3) + 1e4, "far down": rows(2, 50257, 3) - 1e4,
        # The max moves in every tile, or never after the first.
        "rising": climb.repeat(2, 1), "falling": climb.flip(0).repeat(2, 1),
        "no row": rows(0, 37), "many rows": rows(100, 37), "one token": rows(3, 1),
        "two tokens": rows(3, 2), "one tile": rows(1, 8192), "a token more": rows(2, 8193),
        "every second row": rows(8, 1003)[1::2], "columns": rows(8, 1003)[:, 8:1000],
        "unaligned": rows(8, 1003)[:, 1:998], "expanded": rows(1, 1003).expand(5, -1),
        "transposed": rows(8, 20).t()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", special("cpu"))
def test_any_values_sizes_and_strides(device, dtype, kind):
    x = special(device, dtype)[kind]
    assert_bars(x, random_labels(x).repeat_interleave(2)[::2], T=0.6)       # strided labels too


@pytest.mark.parametrize("kind", ["far up", "far down"])
def test_the_reference_in_float32_keeps_the_digits_of_large_logits(kind):
    x = special("cpu")[kind]
    labels = random_labels(x)
    logp, H = logprobs_and_entropy_reference(x, labels, temperature=0.6)
    logp64, H64 = logprobs_and_entropy_reference(x.double(), labels, temperature=0.6)
    assert ((logp - logp64) / (1 + logp64.abs())).abs().max() < 1e-6
    assert (H - H64).abs().max() < 5e-6


def test_a_row_list_selects_and_leaves_the_other_gradients_zero(device):
    x = randn(9, 600, device=device)[:, :300]
    positions = torch.tensor([8, 0, 5], device=device)
    labels = random_labels(x, 3)
    assert_bars(x, labels[:0], positions[:0])
    assert_bars(x, labels, positions, T=0.6)
    logp, H, dx = assert_bars(x, labels, positions)
    selected = logprobs_and_entropy(x[positions], labels, impl="triton")
    assert torch.equal(logp, selected[0]) and torch.equal(H, selected[1])
    assert dx.abs().sum(dim=1).nonzero().flatten().tolist() == [0, 5, 8]


@pytest.mark.parametrize("how", ["a row list", "a large stride"])
def test_row_offsets_pass_two_to_the_31(device, how, monkeypatch):
    """With 32-bit offsets row 17 500 of 126464 logits would be sought 8 GB before the tensor: a
    crash. The tensor is virtual: of its 4.5 GB only one row is ever touched."""
    if device == "cpu":
        # The interpreter copies its arguments back to where they came from, which is there.
        back = "triton.runtime.interpreter.GridExecutor._restore_args_dev"
        monkeypatch.setattr(back, lambda *_: None)
    monkeypatch.setattr(torch, "zeros", torch.empty)        # dx is virtual, too
    flat = torch.empty(18_000, V_LLADA, dtype=torch.bfloat16, device=device)
    flat[17_500] = randn(V_LLADA, dtype=torch.bfloat16, device=device)
    labels, last = torch.tensor([7], device=device), torch.tensor([17_500], device=device)
    g = incoming(labels)
    right = run("reference", flat[17_500:17_501].double(), labels)
    if how == "a row list":
        logp, H, dx = run("triton", flat, labels, last)
    else:                                                   # rows 0, 8750, 17 500
        logp, H, dx = run("triton", flat[::8_750], labels.expand(3), g=[w.expand(3) for w in g])
        last = torch.tensor([2], device=device)
    monkeypatch.undo()
    assert_near((logp[-1:], H[-1:], dx[last]), right, g, 1.0, flat.dtype)


# § Infinite and impossible logits

@pytest.mark.parametrize("nothing", [-INF, torch.finfo(torch.float32).min])
def test_truncated_rows(device, nothing):
    """20 tokens anywhere, one token, a first tile of nothing, the last token alone, 9 tokens.
    Masking with the smallest float is as good, it does not overflow into NaN."""
    V = 3 * kernels.FORWARD_BLOCK + 5
    keep = torch.zeros(5, V, dtype=torch.bool, device=device)
    anywhere = torch.randperm(V, generator=torch.Generator().manual_seed(3))[:20]
    keep[0, anywhere.to(device)] = True
    keep[1, 100] = keep[3, -1] = True
    keep[2, 2 * kernels.FORWARD_BLOCK + 7:] = True
    keep[4, :9] = True
    x = randn(5, V, scale=3, device=device).masked_fill(~keep, nothing)
    logp, H, dx = assert_bars(x, keep.int().argmax(dim=1), T=0.6)
    assert (dx[~keep] == 0).all() and dx.isfinite().all()
    assert H[1] == H[3] == 0 and logp[1] == logp[3] == 0             # a certain token


def test_a_label_of_probability_zero_is_minus_inf_and_sends_no_gradient(device):
    x = randn(3, 600, device=device)
    x[:, :300] = -INF
    labels = torch.tensor([0, 299, 300], device=device)
    assert_bars(x, labels)
    only_logp = torch.ones(3, device=device), torch.zeros(3, device=device)
    logp, _, dx = run("triton", x, labels, g=only_logp)
    assert logp[0] == logp[1] == -INF and (dx[:2] == 0).all() and (dx[2] != 0).any()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_nan_plus_inf_and_only_minus_inf_are_nan_in_their_row(device, impl):
    x = randn(5, 9000, device=device)
    x[0, 8500], x[1], x[2, 3], x[3, 8999] = NAN, -INF, INF, INF
    logp, H, dx = run(impl, x, torch.tensor([1, 2, 4, 8999, 5], device=device))
    assert logp[:4].isnan().all() and H[:4].isnan().all() and dx[:4].isnan().any(dim=1).all()
    assert logp[4].isfinite() and H[4].isfinite() and dx[4].isfinite().all()


def test_a_label_outside_the_vocabulary_is_nan_where_nobody_looks_at_it(device):
    labels = torch.tensor([-100, 40, 39], device=device)
    logp, H, _, _ = kernels._forward(randn(3, 40, device=device), labels, None, 1.0)
    assert logp[:2].isnan().all() and logp[2].isfinite() and H.isfinite().all()


# § Autograd

@pytest.mark.parametrize("result", [0, 1], ids=["logp", "H"])
def test_each_result_alone_has_its_own_gradient(device, result):
    """`.sum()` also sends its gradient as one number with stride 0."""
    x = randn(3, 500, device=device)
    grads = []
    for impl, logits in (("triton", x.clone()), ("reference", x.double())):
        logits.requires_grad_()
        out = logprobs_and_entropy(logits, random_labels(x), temperature=0.6, impl=impl)
        out[result].sum().backward()
        grads.append(logits.grad.double())
    assert grads[1].abs().max() > 1e-3
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6 / 0.6)


STORED = {"densely": lambda x: x.clone(memory_format=torch.contiguous_format),
          "column by column": lambda x: x.t().contiguous().t() if x.dim() == 2 else x.clone(),
          "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0]}


@pytest.mark.parametrize("stored", STORED)
def test_saved_tensors_may_come_back_in_another_layout(device, stored):
    """As saved_tensors_hooks do that offload or compress. Strides of the forward would read
    other rows: here a view of every second row."""
    x = randn(8, 300, device=device)[::2, :150]
    labels, positions = random_labels(x, 3), torch.tensor([3, 0, 2], device=device)
    right = run("reference", x.double(), labels, positions)[2]
    with torch.autograd.graph.saved_tensors_hooks(STORED[stored], lambda x: x):
        dx = run("triton", x, labels, positions)[2]
    torch.testing.assert_close(dx.double(), right, rtol=0, atol=5e-6)


def test_backward_repeats_and_what_would_be_a_wrong_gradient_is_an_error(device):
    x = randn(2, 500, device=device).requires_grad_()
    y = x * 1
    before = y.detach().clone()
    out = sum(r.sum() for r in logprobs_and_entropy(y, random_labels(x), impl="triton"))
    first, second = (torch.autograd.grad(out, y, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(y, before) and torch.equal(first, second)
    assert first.data_ptr() != y.data_ptr()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out, x, retain_graph=True, create_graph=True)
    with torch.no_grad():
        y.mul_(2)                                                    # changed in between
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                                    reason="no C++ compiler")
COMPILED = [pytest.param("cpu", "reference", "inductor", marks=needs_compiler),
            pytest.param("cpu", "auto", "aot_eager"),
            pytest.param("cpu", "triton", "aot_eager", marks=INTERPRETER.marks),
            pytest.param("cuda", "triton", "inductor", marks=GPU.marks)]


@pytest.mark.parametrize("device, impl, backend", COMPILED)
def test_a_compiled_caller_is_one_graph_with_the_same_numbers(device, impl, backend):
    """fullgraph=True: a call that torch.compile had to step out of would be an error."""
    def loss(x, labels, positions, support, T):
        whole = logprobs_and_entropy(x * 2, labels, None, T, impl)
        listed = logprobs_and_entropy(x[:, 1::2], labels[positions] // 2, positions, T, impl)
        top = support_logprobs_and_entropy(x * 2, support, labels, T, impl)
        return sum((logp.exp() + H * 0.1).sum() for logp, H in (whole, listed, top))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    positions = torch.tensor([2, 0], device=device)
    sizes = (3, 0.6), (5, 0.7)                 # a second size and float become dynamic
    for N, T in sizes[:1] if "cpu" in device and backend == "inductor" else sizes:     # slow
        x = randn(N, 500, device=device).requires_grad_()
        args = x, random_labels(x), positions, x.topk(9).indices, T
        results = [f(*args) for f in (loss, compiled)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(r, x)[0] for r in results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_operators_are_what_pytorch_was_told(device, dtype):
    """The shapes, dtypes and strides of their fakes, no result that is an argument, gradients
    that a traced graph repeats."""
    x = randn(8, 300, dtype=dtype, device=device)[::2, :150]
    labels, positions = random_labels(x, 3), torch.tensor([3, 0, 2], device=device)
    torch.library.opcheck(kernels._forward, (x, random_labels(x), None, 0.6))
    torch.library.opcheck(kernels._forward, (x.requires_grad_(), labels, positions, 0.6))
    of_row = [*kernels._forward(x.detach(), labels, positions, 0.6), *incoming(labels)]
    torch.library.opcheck(kernels._backward, (x.detach(), labels, positions, of_row, 0.6))


# § The reference

@pytest.mark.parametrize("T", [0.6, 1.0])
def test_the_reference_is_the_definition(T):
    """By torch.distributions, and the naive version."""
    x = randn(5, 40, scale=3).double().requires_grad_()
    labels = random_labels(x)
    ours = logprobs_and_entropy_reference(x, labels, temperature=T)
    categorical = torch.distributions.Categorical(logits=x / T)
    theirs = categorical.log_prob(labels), categorical.entropy()
    for a, b, c in zip(ours, theirs, kernels.naive(x, labels, T)):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.float(), c, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(r.sum(), x, retain_graph=True)[0] for r in (a, b)]
        torch.testing.assert_close(*grads)


def test_the_reference_by_hand():
    """p = 1/2, 1/4, 1/4, 0 and, at T = 1/2, its square: 2/3, 1/6, 1/6."""
    x = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64).log()
    logp, H = logprobs_and_entropy_reference(x, torch.tensor([1]))
    assert math.isclose(logp, math.log(1 / 4)) and math.isclose(H, 1.5 * math.log(2))
    logp, H = logprobs_and_entropy_reference(x, torch.tensor([1]), temperature=0.5)
    assert math.isclose(logp, math.log(1 / 6))
    assert math.isclose(H, 2 / 3 * math.log(3 / 2) + math.log(6) / 3)


@pytest.mark.parametrize("positions", [None, torch.tensor([5, 0])], ids=["all", "listed"])
def test_gradients_of_the_reference_against_finite_differences(positions):
    x = randn(6, 7).double().requires_grad_()
    labels = random_labels(x, None if positions is None else 2)
    assert torch.autograd.gradcheck(
        lambda x: logprobs_and_entropy_reference(x, labels, positions, temperature=0.6), x)


def test_the_plain_case_in_the_comments_is_right():
    """A row of five tiles; its max is in the second."""
    lines = (ROOT / "kernels.py").read_text().splitlines()
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(f"#     {start}"))
                   for start in ("M, s, u = ", "logp, H = "))
    x = randn(40000, scale=3).double()
    found = dict(vars(torch), x=x, y=17)
    exec("\n".join(line[6:] for line in lines[first:last + 1]), found)
    for ours, right in zip((found["logp"], found["H"]),
                           logprobs_and_entropy_reference(x[None], torch.tensor([17]))):
        torch.testing.assert_close(ours, right[0], rtol=1e-12, atol=1e-12)


# § Truncated supports

@each_dtype
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_support_equals_minus_inf_everywhere_else(device, impl, dtype):
    x = randn(6, 5000, scale=3, dtype=dtype, device=device)
    support = x.float().topk(150).indices.int()
    support[0, 40:] = support[1, 1:] = -1
    labels = support[torch.arange(6), torch.tensor([0, 0, 9, 149, 5, 5])].long()
    labels[5] = x[5].argmin()                                        # outside: logp = -inf
    kept = torch.zeros(6, 5001, dtype=torch.bool, device=device)     # -1 goes to column 5000
    kept = kept.scatter(1, support.long() % 5001, True)[:, :5000]

    def restricted(x, labels, positions, T, impl):
        return support_logprobs_and_entropy(x, support, labels, T, impl)
    right = run("reference", x.double().masked_fill(~kept, -INF), labels, T=0.6)
    assert right[0][1] == right[1][1] == 0 and right[0][5] == -INF
    found = run(impl, x, labels, T=0.6, call=restricted)
    assert found[0].dtype == found[1].dtype == torch.float32 and found[2].dtype == dtype
    assert_near(found, right, incoming(labels), 0.6, dtype)
    exact = run("reference", x.double(), labels, T=0.6, call=restricted)
    torch.testing.assert_close(exact, right, rtol=0, atol=1e-12)


def test_supports_at_the_edges():
    """A label of -1 is not an unused slot; no slot at all; no rows."""
    x, none = randn(1, 9), torch.tensor([[-1, -1]])
    logp, H = support_logprobs_and_entropy(x, torch.tensor([[3, -1]]), torch.tensor([-1]))
    assert logp.item() == -INF and H.item() == 0
    logp, H = support_logprobs_and_entropy(x, none, torch.tensor([3]))
    assert logp.item() == -INF and H.isnan()
    logp, H = support_logprobs_and_entropy(x[:0], none[:0], torch.tensor([3])[:0])
    assert logp.shape == H.shape == (0,)


# § Calling it

X, Y = randn(6, 8), torch.arange(6)
BAD = [(dict(impl="cuda"), "impl is 'cuda'"), (dict(temperature=0.0), "temperature is 0.0"),
       (dict(temperature=-1), "temperature is -1"), (dict(temperature=NAN), "ture is nan"),
       (dict(logits=X[0]), "logits are"), (dict(logits=X.long()), "logits are torch.int64"),
       (dict(logits=X[:, :0]), "logits are"), (dict(logits=X[None]), "logits are"),
       (dict(labels=Y[:2]), r"labels are .*\[2\].*\[6\]"), (dict(labels=Y[None]), "labels are"),
       (dict(labels=Y.int()), "labels are torch.int32"), (dict(labels=Y + 3), "reach 3 to 8"),
       (dict(labels=Y - 1), "labels reach -1"), (dict(positions=Y[None]), "positions are"),
       (dict(positions=Y[:2]), "labels are"), (dict(positions=Y + 1), "positions reach 1 to 6"),
       (dict(positions=Y // 2), "a row twice"),
       (dict(logits=X.double(), impl="triton"), "float64")]


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_what_does_not_fit_is_a_value_error(change, message):
    with pytest.raises(ValueError, match=message):
        logprobs_and_entropy(**{"logits": X, "labels": Y, **change})


def test_what_does_not_fit_a_support_is_a_value_error():
    support = Y[:, None]
    for args in ((X, Y, Y), (X, support[:3], Y), (X, support, Y[:3])):
        with pytest.raises(ValueError, match="expected"):
            support_logprobs_and_entropy(*args)
    for more, message in ((dict(temperature=0), "temperature"), (dict(impl="cuda"), "impl is")):
        with pytest.raises(ValueError, match=message):
            support_logprobs_and_entropy(X, support, Y, **more)


def test_auto_takes_the_reference_on_the_cpu_and_says_so_once(capsys):
    kernels.say_once.cache_clear()
    for _ in range(2):
        auto, reference = logprobs_and_entropy(X, Y), logprobs_and_entropy_reference(X, Y)
        assert torch.equal(auto[0], reference[0]) and torch.equal(auto[1], reference[1])
    assert capsys.readouterr().err.count("reference path on cpu") == 1


def python(*args, **env):
    """A fresh process; variables set to None are removed from its environment."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True,
                          cwd=ROOT, env=env, timeout=600)


WITHOUT = """
import importlib, sys, torch, kernels
x, y = torch.randn(3, 8, requires_grad=True), torch.tensor([1, 2, 3])
for triton_is_there in (True, False):
    if not triton_is_there:
        sys.modules["triton"] = None
        importlib.reload(kernels)
    logp, H = kernels.logprobs_and_entropy(x, y)
    (logp + H).sum().backward()
    assert x.grad.isfinite().all()
    try: kernels.logprobs_and_entropy(x, y, impl="triton")
    except ValueError as e: print(e)
"""


def test_without_triton_or_its_interpreter_the_cpu_takes_the_reference():
    done = python("-c", WITHOUT, TRITON_INTERPRET=None)
    assert done.stdout.count("TRITON_INTERPRET=1") == 2, done.stderr
    assert done.stderr.count("reference path") == 2


@needs_triton
@same_on_gpu
def test_the_first_lines_to_type_run_without_a_gpu():
    typed = [line[8:] for line in kernels.__doc__.splitlines() if line.startswith("    >>> ")]
    typed[-1] = f"print(*({typed[-1]}))"
    assert "$ TRITON_INTERPRET=1 python" in kernels.__doc__
    done = python("-c", "\n".join(typed), TRITON_INTERPRET="1")
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", done.stdout)]
    assert len(numbers) == 8, done.stdout + done.stderr
    assert all(abs(a - b) < 2e-4 for a, b in zip(numbers[:4], numbers[4:])), done.stdout


# § The compiled code, without a GPU

BLOCKS = {"forward": (kernels.FORWARD_BLOCK, kernels.FORWARD_WARPS),
          "backward": (kernels.BACKWARD_BLOCK, kernels.BACKWARD_WARPS)}
# V divides by 16 or not, all rows or a list of them, and a support: one narrow tile.
KINDS = ("aligned", "unaligned", "listed", "support")
VARIANTS = [(kernel, sm, dtype, kind) for kernel in BLOCKS for sm in (80, 90, 100)
            for dtype in ("bf16", "fp16", "fp32") for kind in KINDS
            if sm == 90 and (dtype == "fp32" or kind == "aligned")
            or kind == "aligned" and dtype != "fp16"]


def compile_ahead(kernel, sm, dtype, kind):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    fn = getattr(kernels, f"_{kernel}_kernel")
    block, warps = BLOCKS[kernel]
    constants = {"BLOCK": 1024 if kind == "support" else block}
    if kind != "listed":
        constants["positions_ptr"] = None
    types = {"x_ptr": f"*{dtype}", "dx_ptr": f"*{dtype}", "y_ptr": "*i64",
             "positions_ptr": "*i64", "V": "i32", "stride": "i32", "inv_T": "fp32"}
    signature = {name: types.get(name, "*fp32") for name in fn.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    # What a launch passes on: pointers are aligned; V = 126464 and its stride divide by 16.
    divides = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names)
               if name not in constants
               and (name.endswith("_ptr") or kind == "aligned" and name in ("V", "stride"))}
    return triton.compile(ASTSource(fn, signature, constants, divides),
                          target=GPUTarget("cuda", sm, 32),
                          options={"num_warps": warps, "enable_fp_fusion": True})


def compiled_report():
    """Of each variant: registers, stack and local bytes, and the memory instructions."""
    import triton
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    report = []
    for variant in VARIANTS:
        entry = dict(zip(("kernel", "sm", "dtype", "kind"), variant))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compile_ahead(*variant).asm["cubin"])
            cubin.flush()
            usage = [tools / "cuobjdump", "-res-usage", cubin.name]
            usage = subprocess.check_output(usage, text=True)
            sass = subprocess.check_output([tools / "nvdisasm", "-c", cubin.name], text=True)
        for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage):
            entry[name.lower()] = int(value)
        entry["memory"] = collections.Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)\S*)", sass))
        report.append(entry)
    return report


@pytest.fixture(scope="module")
def compiled():
    if not kernels.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    done = python(__file__, "--json", TRITON_INTERPRET=None)     # it compiles or it interprets
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_kernels_do_not_spill_and_move_16_bytes_at_a_time(compiled):
    assert len(compiled) == len(VARIANTS)
    for entry in compiled:
        kernel, aligned = entry["kernel"], entry["kind"] == "aligned"
        assert entry["stack"] == entry["local"] == 0, entry
        assert not any(name.startswith(("LDL", "STL")) for name in entry["memory"]), entry
        most = {"forward": 64, "backward": 96}[kernel]           # 32 and 20 warps on an SM
        assert entry["reg"] <= (most if aligned else 128), entry
        wide = collections.Counter()
        for name, n in entry["memory"].items():
            wide[name[:3]] += n * ("128" in name)
        # 16 bytes each for a thread and a tile; the forward stores single numbers.
        numbers, warps = BLOCKS[kernel]
        of_tile = numbers * (4 if entry["dtype"] == "fp32" else 2) // (32 * warps * 16)
        stored = of_tile * (kernel == "backward")
        assert not aligned or (wide["LDG"], wide["STG"]) == (of_tile, stored), entry


# § In agrpo.py, which calls this file in the rollout and in the loss

@pytest.mark.parametrize("how", [
    dict(), dict(temperature=0.6, top_k=9, top_p=0.9), dict(unmasking="max_prob")], ids=str)
def test_rollout_and_gradient_agree_between_kernel_and_reference(device, how, monkeypatch):
    B, P, C, V = 6, 2, 4, 37
    table = randn(P + C, V, 8, device=device)
    out = randn(P + C, 8, V, seed=1, device=device).requires_grad_()

    def policy(ids, mask, positions, block):
        hidden = table[torch.arange(P + C, device=device), ids].sum(dim=1).tanh()
        logits = torch.einsum("nd,ldv->nlv", hidden, out)
        return logits[torch.arange(len(ids), device=device)[:, None], positions]
    policy.mask_id, policy.eos_id = 0, 1
    how = agrpo.Decoding(C=C, m=2, block_length=C, **how)
    rows = torch.arange(B, device=device)
    q = torch.full((B, P), 5, device=device)

    def learn(impl):
        for name in ("logprobs_and_entropy", "support_logprobs_and_entropy"):
            monkeypatch.setattr(agrpo, name, partial(getattr(kernels, name), impl=impl))
        out.grad = None
        traj = agrpo.rollout(policy, q, q * 0 + 1, how, agrpo.row_random(range(B)))
        agrpo.add_gradient(policy, traj, rows - 2.5, (rows, rows % 2, rows * 0 + 1.0))
        return traj, out.grad
    (a, grad_a), (b, grad_b) = learn("triton"), learn("reference")
    assert torch.equal(a.o, b.o) and torch.equal(a.step_of, b.step_of)
    assert ((a.logp_old - b.logp_old).abs() / (1 + b.logp_old.abs())).max() <= LOGP_BAR
    assert (a.entropy - b.entropy).abs().max() <= H_BAR
    assert (grad_a - grad_b).norm() <= 1e-5 * grad_b.norm() and grad_b.norm() > 0


# § The benchmark, lab/bench.py

@needs_triton
@same_on_gpu
def test_the_benchmark_checks_the_kernel_where_there_is_no_gpu():
    done = python(ROOT / "lab" / "bench.py", "kernel", TRITON_INTERPRET=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("error of") == 6 and "no CUDA device" in done.stdout


def test_the_benchmark_names_the_bars_that_hold(capsys):
    us = {"ours": 100, "eager": 1500, "compile": 98}                 # no Liger, no TRL
    bench.print_bars({(torch.bfloat16, N, name, phase): (t, 0.78, 0.1) for N in bench.SIZES
                      for name, t in us.items() for phase in ("forward", "backward", "both")})
    verdicts = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line]
    assert verdicts[:8] == ["holds", "MISSED", "holds", "holds", "MISSED", "holds", "measured",
                            "measured"]
    assert verdicts[8:10] == ["holds", "holds"] and verdicts[10:] == ["measured"] * 10


def test_the_benchmark_times_an_update_of_every_policy(capsys):
    size = "--B 2 --P 5 --C 12 --m 4 --block_length 6 --k 2 --rounds 1 --lora_r 4"
    bench.main(["update", "--shape", "tiny", "--device", "cpu", *size.split()])
    shown = capsys.readouterr().out.splitlines()
    # Below the seconds stand tables of equal variance: with 0.15 and 0.5 of k.
    equal = [i for i, line in enumerate(shown) if line.startswith("at equal variance")]
    assert [shown[i].split()[3] for i in equal] == ["0.3", "1"]
    end = equal[0]
    lines = {line[:18].strip(): line[18:].split() for line in shown[:end]}
    for name in ("official way", "Policy", "BlockCausal", "FrozenBlockCausal", "FrozenContext"):
        assert float(lines[name][-2]) < 1e-5                         # max |rho - 1|
    assert [float(x) for x in lines["official way"][-5:-2]] == [1, 1, 1]


def test_the_benchmark_counts_bytes_and_flops(capsys):
    x, w = torch.zeros(4, 8), torch.zeros(8, 16)
    with bench.Count() as count:
        (x @ w).view(8, 8)
    assert count.bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16) and count.flops[4] == 2 * 4 * 8 * 16
    bench.main(["count", "--shape", "256,512,2,2,2,1000"])
    rows = [line[61:].split() for line in capsys.readouterr().out.splitlines()[-5:]]
    none, single, half = (float(row[0]) for row in rows[:3])
    assert none <= half <= single


# § On a GPU

@pytest.mark.parametrize("N", [24, 2048, 8192])
@each_dtype
@pytest.mark.parametrize("where", [GPU])
def test_large_launches_meet_the_bars_and_repeat_exactly(where, dtype, N):
    x = torch.randn(N, V_LLADA, device=where, dtype=dtype)
    labels = torch.randint(V_LLADA, (N,), device=where)
    first = run("triton", x, labels, T=0.6)
    for _ in range(3):
        again = run("triton", x, labels, T=0.6)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    for rows in torch.arange(N, device=where).split(512):        # float64 fits in pieces only
        g = [w[rows] for w in incoming(labels)]
        right = run("reference", x[rows].double(), labels[rows], T=0.6, g=g)
        assert_near([found[rows] for found in first], right, g, 0.6, dtype)


@pytest.mark.parametrize("where", [GPU])
def test_no_second_copy_of_the_logits_is_made(where):
    N = 512
    x = torch.randn(N, V_LLADA, device=where, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(V_LLADA, (N,), device=where)

    def extra(call):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = call()
        return result, torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    out, used = extra(lambda: logprobs_and_entropy(x, labels, impl="triton"))
    assert used <= 32 * N + 2**20
    g = [torch.ones_like(r) for r in out]
    _, used = extra(lambda: torch.autograd.grad(out, x, g))
    assert used <= x.nbytes + 2**20


if __name__ == "__main__":
    print(json.dumps(compiled_report(), indent=None if "--json" in sys.argv else 1))
