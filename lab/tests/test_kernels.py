"""
Claims about kernels.py, each against float64 autograd. The same tests run in Triton's interpreter (no GPU)
and on the device (marked `gpu`); the compiled code is inspected without either.

    pytest lab/tests/test_kernels.py
    python lab/tests/test_kernels.py     # registers, spills and loads of the compiled kernels, as a table
"""

import collections
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import kernels  # noqa: E402
from kernels import logprobs_and_entropy, logprobs_and_entropy_reference, support_logprobs_and_entropy  # noqa: E402

CUDA = torch.cuda.is_available()
INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
V_LLADA = 126464                       # 15.4 forward blocks

# The bars: log-probability relative to 1 + |logp|, entropy absolute, dlogits times T / (|g_logp| + |g_H|).
# The interpreter truncates float32 to bfloat16 and float16 where a GPU rounds, so it gets twice the room.
LOGP_BAR, H_BAR = 1e-6, 5e-6
DX_BAR = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if CUDA else 2**-7, torch.float16: 2**-11 if CUDA else 2**-10}

needs_triton = pytest.mark.skipif(not kernels.HAVE_TRITON, reason="Triton is not installed")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]


@pytest.fixture(params=[
    pytest.param("cpu", id="interpreter", marks=[
        needs_triton, pytest.mark.skipif(CUDA, reason="the same test runs on the CUDA device")]),
    pytest.param("cuda", id="gpu", marks=on_gpu)])
def device(request):
    return request.param


def random_logits(*shape, dtype=torch.float32, scale=1.0, seed=0, device="cpu"):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(device)


def random_labels(*shape, V, device="cpu"):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1)).to(device)


def run(impl, logits, labels, positions=None, T=1.0, g=None):
    """(logp, H, dlogits) of one implementation; g = (g_logp, g_H), both random if not given."""
    logits = logits.detach().requires_grad_()
    logp, H = logprobs_and_entropy(logits, labels, positions, T, impl)
    g = incoming(labels) if g is None else g
    return logp.detach(), H.detach(), torch.autograd.grad((logp, H), logits, [x.to(logp.dtype) for x in g])[0]


def incoming(labels):
    return random_logits(2, *labels.shape, seed=2, device=labels.device).unbind()


def assert_bars(logits, labels, positions=None, T=1.0):
    """The kernel against the reference in float64. Equal infinities count as equal, NaN never does."""
    logp, H, dx = run("triton", logits, labels, positions, T)
    logp64, H64, dx64 = run("reference", logits.double(), labels, positions, T)
    assert logp.dtype == H.dtype == torch.float32 and dx.dtype == logits.dtype and dx.shape == logits.shape
    assert logp.shape == H.shape == labels.shape
    finite = logp64 > -INF
    assert torch.equal(logp == -INF, ~finite)
    error = (logp - logp64)[finite].abs() / (1 + logp64[finite].abs())
    assert error.numel() == 0 or error.max() <= LOGP_BAR
    assert (H - H64).abs().le(H_BAR).all()
    g_logp, g_H = incoming(labels)
    scale = torch.zeros(logits.shape[:-1], device=logits.device)          # 0 for rows not selected: exact there
    rows = slice(None) if positions is None else positions
    scale.view(-1)[rows] = (g_logp.abs() + g_H.abs()).reshape(-1) / T
    assert ((dx.double() - dx64).abs() <= DX_BAR[logits.dtype] * scale.unsqueeze(-1)).all()


# § The bars

@pytest.mark.parametrize("V", [37, 1000, 50257, V_LLADA])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("scale", [1, 100, 1e4])
@pytest.mark.parametrize("T", [0.6, 1.0])
def test_errors_are_below_the_bars(device, V, dtype, scale, T):
    assert_bars(random_logits(2, V, dtype=dtype, scale=scale, device=device), random_labels(2, V=V, device=device), T=T)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_the_logits_costs_no_digits(device, offset):
    """log-sum-exp in one number would lose them: H would err by nats."""
    x = random_logits(2, 50257, scale=3, device=device) + offset
    assert_bars(x, random_labels(2, V=50257, device=device), T=0.6)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_running_sums_survive_every_change_of_the_max(device, order):
    """Rising logits move the max in every block, falling ones never after the first."""
    x = torch.linspace(-30, 30, 70000, device=device)
    x = (x if order == "rising" else x.flip(0)).repeat(2, 1)
    assert_bars(x, random_labels(2, V=70000, device=device), T=0.6)


@pytest.mark.parametrize("N", [0, 1, 100])
def test_any_number_of_rows(device, N):
    assert_bars(random_logits(N, 37, device=device), random_labels(N, V=37, device=device))


# § Views and row lists

LAYOUTS = {"a slice of rows": lambda x: x[1::2, :, :], "a slice of positions": lambda x: x[:, 1:4],
           "a transpose": lambda x: x.transpose(0, 1), "a slice of the vocabulary": lambda x: x[:, :, 8:1000],
           "one row, expanded": lambda x: x[1, 2].expand(3, 4, -1), "two dimensions": lambda x: x[2, ::2],
           "unaligned": lambda x: x[:, :, 1:998]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_views_need_no_copy(device, layout, dtype):
    x = LAYOUTS[layout](random_logits(4, 5, 1003, dtype=dtype, device=device))
    assert_bars(x, random_labels(*x.shape[:-1], V=x.shape[-1], device=device), T=0.6)


def test_a_row_list_selects_and_leaves_the_other_gradients_zero(device):
    x = random_logits(4, 7, 300, device=device)[1:, 2:6]                                  # a view of [3, 4]
    positions = torch.tensor([11, 0, 6], device=device)
    labels = random_labels(3, V=300, device=device)
    assert_bars(x, labels, positions, T=0.6)
    assert_bars(x[1], labels[:2], positions[1:] // 3, T=0.6)                              # two dimensions too
    assert_bars(x, labels[:0], positions[:0])
    logp, H, dx = run("triton", x, labels, positions)
    everywhere = logprobs_and_entropy(x, labels[0].expand(3, 4), impl="triton")
    assert everywhere[0][2, 3] == logp[0] and everywhere[1][2, 3] == H[0]
    assert {tuple(row) for row in dx.abs().sum(-1).nonzero().tolist()} == {(2, 3), (0, 0), (1, 2)}


def test_labels_and_incoming_gradients_may_be_strided(device):
    x = random_logits(6, 50, device=device)
    labels = random_labels(6, 2, V=50, device=device)[:, 0]
    g = [w[:, 1] for w in random_logits(2, 6, 2, device=device)]
    for ours, right in zip(run("triton", x, labels, g=g), run("reference", x.double(), labels, g=g)):
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=5e-6)


@pytest.mark.parametrize("layout", ["[N, V]", "[B, L, V]"])
def test_row_offsets_pass_two_to_the_31(device, layout, monkeypatch):
    """With 32-bit offsets, row 17 500 of 126464 logits would be sought 8 GB before the tensor: a crash."""
    if device == "cpu":
        # The interpreter copies every argument back to where it came from; here that is the same memory.
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)
    monkeypatch.setattr(torch, "zeros", torch.empty)     # of dx too: pages that nobody touches cost nothing
    flat = torch.empty(18_000, V_LLADA, dtype=torch.bfloat16, device=device)
    row = 17_500
    assert row // 1000 * 1000 * V_LLADA > 2**31          # b * stride_b alone, as well as r * stride_l
    flat[row] = random_logits(V_LLADA, dtype=torch.bfloat16, device=device)
    labels, positions = torch.tensor([7], device=device), torch.tensor([row], device=device)
    logp, H, dx = run("triton", flat if layout == "[N, V]" else flat.view(18, 1000, V_LLADA), labels, positions)
    right = run("reference", flat[row:row + 1].double(), labels)
    assert abs(logp - right[0]) < 1e-5 and abs(H - right[1]) < H_BAR
    g = sum(w.abs() for w in incoming(labels))
    assert (dx.view(-1, V_LLADA)[row] - right[2][0]).abs().max() <= DX_BAR[flat.dtype] * g


# § Infinite and impossible logits

def test_truncated_rows(device):
    """Top-k of 20 and of 1, a first block that is all -inf, and one that only the last token survives."""
    V = 3 * kernels.FORWARD_BLOCK + 5
    x = random_logits(5, V, scale=3, device=device)
    keep = torch.zeros(5, V, dtype=torch.bool, device=device)
    keep[0, torch.randperm(V, generator=torch.Generator().manual_seed(3))[:20].to(device)] = True
    keep[1, 100], keep[2, 2 * kernels.FORWARD_BLOCK + 7:], keep[3, -1], keep[4, :9] = True, True, True, True
    labels = keep.int().argmax(-1)
    assert_bars(x.masked_fill(~keep, -INF), labels, T=0.6)
    logp, H, dx = run("triton", x.masked_fill(~keep, -INF), labels)
    assert (dx[~keep] == 0).all() and dx.isfinite().all()
    assert H[1] == H[3] == 0 and logp[1] == logp[3] == 0                                  # a certain token


def test_a_label_of_probability_zero_is_minus_inf_and_sends_no_gradient(device):
    x = random_logits(3, 600, device=device)
    x[:, :300] = -INF
    labels = torch.tensor([0, 299, 300], device=device)
    assert_bars(x, labels)
    ones, zeros = torch.ones(3, device=device), torch.zeros(3, device=device)
    logp, _, dx = run("triton", x, labels, g=(ones, zeros))
    assert logp[0] == logp[1] == -INF and (dx[:2] == 0).all() and (dx[2] != 0).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")                                     # numpy's, about overflow
def test_very_negative_is_as_good_as_minus_inf(device):
    """Masking with the smallest float must not overflow into NaN, also not when it comes first."""
    x = random_logits(2, 20000, device=device)
    x[:, :10000] = torch.finfo(torch.float32).min
    assert_bars(x, torch.tensor([10000, 19999], device=device), T=0.6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")                                     # numpy's, about the NaNs
def test_nan_stays_nan_and_stays_in_its_row(device):
    x = random_logits(4, 9000, device=device)
    x[0, 8500], x[1], x[2, 3] = float("nan"), -INF, INF
    logp, H, dx = run("triton", x, torch.tensor([1, 2, 4, 5], device=device))
    assert logp[:3].isnan().all() and H[:3].isnan().all() and dx[:3].isnan().any(-1).all()
    assert logp[3].isfinite() and H[3].isfinite() and dx[3].isfinite().all()


def test_a_label_outside_the_vocabulary_is_nan_where_it_is_not_checked(device):
    labels = torch.tensor([-100, 40, 39], device=device)
    logp, H = kernels._Fused.apply(random_logits(3, 40, device=device), labels, None, 1.0)
    assert logp[:2].isnan().all() and logp[2].isfinite() and H.isfinite().all()


# § Autograd

def test_each_result_alone_has_its_own_gradient(device):
    """`.sum()` also sends its gradient as one number with stride 0."""
    x, labels = random_logits(3, 500, device=device), random_labels(3, V=500, device=device)
    for which in (0, 1):
        grads = []
        for impl, logits in (("triton", x.clone()), ("reference", x.double())):
            logits.requires_grad_()
            logprobs_and_entropy(logits, labels, temperature=0.6, impl=impl)[which].sum().backward()
            grads.append(logits.grad.double())
        assert grads[1].abs().max() > 1e-3                                                # the test can fail
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-6 / 0.6)


def test_logits_are_left_alone_and_backward_can_run_twice(device):
    x = random_logits(2, 500, device=device).requires_grad_()
    before = x.detach().clone()
    out = sum(r.sum() for r in logprobs_and_entropy(x, random_labels(2, V=500, device=device), impl="triton"))
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(x, before) and torch.equal(first, second) and first.data_ptr() != x.data_ptr()


def test_what_would_be_a_wrong_gradient_is_an_error(device):
    x, labels = random_logits(2, 50, device=device).requires_grad_(), random_labels(2, V=50, device=device)
    y = x * 1
    out = logprobs_and_entropy(y, labels, impl="triton")[0].sum()
    y.mul_(2)                                                                             # changed in between
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logprobs_and_entropy(x, labels, impl="triton")[0].sum(), x, create_graph=True)


# § The reference

@pytest.mark.parametrize("T", [0.6, 1.0])
def test_the_reference_is_the_definition(T):
    """Against torch.distributions, and against the naive version."""
    x, labels = random_logits(5, 40, scale=3).double().requires_grad_(), random_labels(5, V=40)
    ours = logprobs_and_entropy_reference(x, labels, temperature=T)
    categorical = torch.distributions.Categorical(logits=x / T)
    theirs = categorical.log_prob(labels), categorical.entropy()
    for a, b, c in zip(ours, theirs, kernels.naive(x, labels, T)):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.float(), c, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*(torch.autograd.grad(r.sum(), x, retain_graph=True)[0] for r in (a, b)))


def test_the_reference_by_hand():
    """p = 1/2, 1/4, 1/4 and, at T = 1/2, its square: 2/3, 1/6, 1/6."""
    x = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64).log()                 # the fourth is -inf
    logp, H = logprobs_and_entropy_reference(x, torch.tensor([1]))
    assert math.isclose(logp, math.log(1 / 4)) and math.isclose(H, 1.5 * math.log(2))
    logp, H = logprobs_and_entropy_reference(x, torch.tensor([1]), temperature=0.5)
    assert math.isclose(logp, math.log(1 / 6)) and math.isclose(H, 2 / 3 * math.log(3 / 2) + math.log(6) / 3)


def test_gradients_of_the_reference_against_finite_differences():
    x, labels = random_logits(2, 3, 6).double().requires_grad_(), random_labels(2, 3, V=6)
    assert torch.autograd.gradcheck(lambda x: logprobs_and_entropy_reference(x, labels, temperature=0.6), x)
    positions = torch.tensor([5, 0])
    assert torch.autograd.gradcheck(lambda x: logprobs_and_entropy_reference(x, labels.view(-1)[:2], positions), x)


def test_minus_inf_logits_equal_a_smaller_vocabulary():
    x, labels = random_logits(3, 12).double(), torch.tensor([2, 3, 5])
    small = run("reference", x[:, :6], labels)
    x[:, 6:] = -INF
    full = run("reference", x, labels)
    for a, b in zip((full[0], full[1], full[2][:, :6]), small):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (full[2][:, 6:] == 0).all()


# § Truncated supports

def test_a_support_equals_minus_inf_everywhere_else():
    """top-k of different lengths, padded with -1, one label outside; float32 and float64, any order."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = random_logits(4, 50, scale=2, dtype=dtype)
        support = x.float().topk(6).indices.int()
        support[1, 3:], support[2, 1:] = -1, -1
        labels = torch.stack([support[0, 5], support[1, 0], support[2, 0], support[3, 2]]).long()
        labels[3] = x[3].float().argmin()                                                 # outside
        masked = torch.full_like(x, -INF)
        for row, ids in enumerate(support):
            ids = ids[ids >= 0].long()
            masked[row, ids] = x[row, ids]
        x.requires_grad_(), masked.requires_grad_()
        got = support_logprobs_and_entropy(x, support, labels, 0.6)
        right = logprobs_and_entropy_reference(masked, labels, temperature=0.6)
        assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got, right)
        assert got[0][3] == -INF and got[0][2] == 0 and got[1][2] == 0
        for a, b in zip(got, right):
            ours, = torch.autograd.grad(a.sum(), x, retain_graph=True)
            theirs, = torch.autograd.grad(b.sum(), masked, retain_graph=True)
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, theirs)


def test_a_label_of_minus_one_is_not_a_padded_slot():
    logp, H = support_logprobs_and_entropy(random_logits(1, 9), torch.tensor([[3, 4, -1]]), torch.tensor([-1]))
    assert logp.item() == -INF and H.isfinite()


def test_no_rows_and_no_support():
    logp, H = support_logprobs_and_entropy(random_logits(0, 9), torch.zeros(0, 3).long(), torch.zeros(0).long())
    assert logp.shape == H.shape == (0,)
    logp, H = support_logprobs_and_entropy(random_logits(1, 9), torch.tensor([[-1, -1]]), torch.tensor([3]))
    assert logp.item() == -INF and H.isnan()


# § Calling it

def test_what_does_not_fit_is_a_value_error():
    x, y = random_logits(2, 3, 8), random_labels(2, 3, V=8)
    two, first = torch.tensor([0, 1]), y[0, :2]
    cases = [(dict(impl="cuda"), "impl is 'cuda'"),
             (dict(temperature=0.0), "temperature is 0.0"),
             (dict(temperature=-1), "temperature is -1"),
             (dict(temperature=float("nan")), "temperature is nan"),
             (dict(logits=x[0, 0]), "logits are"),
             (dict(logits=x.long()), "logits are torch.int64"),
             (dict(logits=x[:, :, :0]), "logits are"),
             (dict(logits=x[:, :, ::2]), "stride 2"),
             (dict(labels=y[0]), "labels are"),
             (dict(labels=y.int()), "labels are torch.int32"),
             (dict(labels=y + 8), "labels reach"),
             (dict(labels=y - 9), "labels reach"),
             (dict(positions=y), "labels are"),
             (dict(labels=y[0], positions=two), "labels are"),
             (dict(labels=first, positions=two + 5), "positions reach from 5 to 6; expected 0 to 5"),
             (dict(labels=first, positions=two * 0), "twice")]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            logprobs_and_entropy(**{"logits": x, "labels": y, **change})
    with pytest.raises(ValueError, match="float64|not installed"):
        logprobs_and_entropy(x.double(), y, impl="triton")
    for support, labels, T, message in (
            (y, y[0], 1, "expected"), (y[0], y[0], 1, "expected"), (y, y[:, 0], 0, "temperature")):
        with pytest.raises(ValueError, match=message):
            support_logprobs_and_entropy(x[:, 0], support, labels, T)


def test_auto_takes_the_reference_on_the_cpu_and_says_so_once(capsys):
    kernels._say_once.cache_clear()
    x, y = random_logits(2, 8), random_labels(2, V=8)
    for _ in range(2):
        assert torch.equal(logprobs_and_entropy(x, y)[0], logprobs_and_entropy_reference(x, y)[0])
    assert capsys.readouterr().err.count("reference path on cpu") == 1


def python(*args, **env):
    """A fresh interpreter; variables set to None are removed from its environment."""
    env = {k: v for k, v in {**os.environ, "PYTHONPATH": str(ROOT), **env}.items() if v is not None}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)


def test_it_imports_and_runs_without_triton():
    done = python("-c", "import sys; sys.modules['triton'] = None; import torch, kernels\n"
                        "x, y = torch.randn(3, 8, requires_grad=True), torch.tensor([1, 2, 3])\n"
                        "logp, H = kernels.logprobs_and_entropy(x, y); (logp + H).sum().backward()\n"
                        "assert not kernels.HAVE_TRITON and x.grad.isfinite().all()\n"
                        "try: kernels.logprobs_and_entropy(x, y, impl='triton')\n"
                        "except ValueError as e: print(e)")
    assert done.returncode == 0 and "not installed" in done.stdout and "reference path" in done.stderr, done.stderr


@needs_triton
def test_cpu_tensors_without_the_interpreter_are_a_value_error():
    done = python("-c", "import torch, kernels\n"
                        "try: kernels.logprobs_and_entropy(torch.zeros(1, 8), torch.tensor([1]), impl='triton')\n"
                        "except ValueError as e: print(e)", TRITON_INTERPRET=None)
    assert "TRITON_INTERPRET=1" in done.stdout, done.stderr


@pytest.mark.skipif(CUDA, reason="with a CUDA device it runs the whole benchmark")
def test_the_program_checks_itself_without_a_gpu():
    done = python("kernels.py", TRITON_INTERPRET=None)
    assert done.returncode == 0 and "No CUDA device" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("error of") == (6 if kernels.HAVE_TRITON else 0)


# § The compiled code, without a GPU

BLOCKS = {"forward": (kernels.FORWARD_BLOCK, kernels.FORWARD_WARPS),
          "backward": (kernels.BACKWARD_BLOCK, kernels.BACKWARD_WARPS)}
VARIANTS = [(kernel, sm, dtype, rows, aligned)
            for kernel in BLOCKS for sm in (80, 90, 100) for dtype in ("bf16", "fp16", "fp32")
            for rows, aligned in ((False, True), (True, True), (True, False))]


def compiled_report():
    """Compile ahead of time; per variant: registers, stack and local bytes, and memory instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    report = []
    for kernel, sm, dtype, rows, aligned in VARIANTS:
        fn = getattr(kernels, f"_{kernel}_kernel")
        block, warps = BLOCKS[kernel]
        constants = {"BLOCK": block} if rows else {"BLOCK": block, "rows_ptr": None}
        types = {"x_ptr": f"*{dtype}", "dx_ptr": f"*{dtype}", "y_ptr": "*i64", "rows_ptr": "*i64",
                 "V": "i32", "L": "i32", "stride_b": "i64", "stride_l": "i32", "inv_T": "fp32"}
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in fn.arg_names}
        # What a launch passes on: pointers are aligned; V = 126464 and the strides divide by 16, other V may not.
        divisible = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(fn.arg_names) if n not in constants
                     and (n.endswith("_ptr") or aligned and n in ("V", "stride_b", "stride_l"))}
        source = ASTSource(fn, signature, constants, divisible)
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32),
                                  options={"num_warps": warps, "enable_fp_fusion": True})
        entry = {"kernel": kernel, "sm": sm, "dtype": dtype, "rows": rows, "aligned": aligned}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            if (tools / "cuobjdump").exists():
                usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", cubin.name], text=True)
                entry |= {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
            if (tools / "nvdisasm").exists():
                sass = subprocess.check_output([tools / "nvdisasm", "-c", cubin.name], text=True)
                entry["memory"] = collections.Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)\S*)", sass))
        report.append(entry)
    return report


@pytest.fixture(scope="module")
def compiled():
    if not kernels.HAVE_TRITON:
        pytest.skip("Triton is not installed")
    done = python(__file__, "--json", TRITON_INTERPRET=None)       # Triton compiles nothing while it interprets
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_both_kernels_compile_for_three_generations_of_gpus(compiled):
    assert len(compiled) == len(VARIANTS)                          # an error would have ended the process


def test_no_kernel_spills_registers(compiled):
    if "reg" not in compiled[0]:
        pytest.skip("this Triton has no cuobjdump")
    for entry in compiled:
        assert entry["stack"] == entry["local"] == 0, entry
        # What kernels.py says next to its block sizes; unaligned rows need more addresses.
        assert entry["reg"] <= (128 if not entry["aligned"] else 64 if entry["kernel"] == "forward" else 96), entry


def test_aligned_logits_move_16_bytes_at_a_time(compiled):
    if "memory" not in compiled[0]:
        pytest.skip("this Triton has no nvdisasm")
    for entry in compiled:
        memory = collections.Counter(entry["memory"])
        assert not any(name.startswith(("LDL", "STL")) for name in memory), entry
        if entry["aligned"]:
            block, warps = BLOCKS[entry["kernel"]]
            wide = block * (4 if entry["dtype"] == "fp32" else 2) // (32 * warps * 16)      # per thread and tile
            loads = sum(n for name, n in memory.items() if name.startswith("LDG") and "128" in name)
            stores = sum(n for name, n in memory.items() if name.startswith("STG") and "128" in name)
            assert loads == wide and stores == (wide if entry["kernel"] == "backward" else 0), entry


# § The benchmark

@needs_triton
def test_the_benchmark_names_the_bars_that_hold(capsys):
    from lab.bench_kernels import print_bars
    us = {"ours": 100, "eager": 1500, "compile": 98}                                      # no Liger
    print_bars({(torch.bfloat16, N, name, phase): (t, 0.78, 0.1) for N in (2048, 8192) for name, t in us.items()
                for phase in ("forward", "backward", "both")})
    verdicts = [line.split()[-1] for line in capsys.readouterr().out.split("\n") if line]
    assert verdicts == ["holds", "MISSED", "holds", "holds", "MISSED", "holds", "measured", "holds", "holds"]


# § On a GPU

@pytest.mark.parametrize("N", [24, 2048, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("where", [pytest.param("cuda", marks=on_gpu)])
def test_large_launches_meet_the_bars_and_repeat_exactly(where, dtype, N):
    x = torch.randn(N, V_LLADA, device=where, dtype=dtype)
    labels = torch.randint(V_LLADA, (N,), device=where)
    first = run("triton", x, labels, T=0.6)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run("triton", x, labels, T=0.6)))
    for rows in torch.arange(N, device=where).split(512):            # float64 fits in pieces only
        g = [w[rows] for w in incoming(labels)]
        logp, H, dx = run("reference", x[rows].double(), labels[rows], T=0.6, g=g)
        assert ((first[0][rows] - logp) / (1 + logp.abs())).abs().max() <= LOGP_BAR
        assert (first[1][rows] - H).abs().max() <= H_BAR
        scale = (g[0].abs() + g[1].abs()).unsqueeze(1) / 0.6
        assert ((first[2][rows] - dx).abs() / scale).max() <= DX_BAR[dtype]


@pytest.mark.parametrize("where", [pytest.param("cuda", marks=on_gpu)])
def test_no_second_copy_of_the_logits_is_made(where):
    N = 512
    x = torch.randn(N, V_LLADA, device=where, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(V_LLADA, (N,), device=where)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, H = logprobs_and_entropy(x, labels, impl="triton")
    assert torch.cuda.max_memory_allocated() - before <= 32 * N + 2**20
    g = torch.ones_like(logp)
    before = torch.cuda.memory_allocated()
    torch.autograd.grad((logp, H), x, (g, g))
    assert torch.cuda.max_memory_allocated() - before <= x.nbytes + 2**20


if __name__ == "__main__":
    entries = compiled_report()
    if "--json" in sys.argv:
        print(json.dumps(entries))
    else:
        for entry in entries:
            print(*(f"{value!s:9s}" if not isinstance(value, dict) else dict(value) for value in entry.values()))


# agrpo.py calls this file in the rollout and in the loss: with either implementation the same numbers must come out.


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.6, unmasking="low_confidence"), dict(unmasking="entropy")], ids=str)
def test_a_rollout_and_its_gradient_agree_between_kernel_and_reference(device, how, monkeypatch):
    import agrpo

    rng = torch.Generator().manual_seed(0)
    P, C, V = 2, 4, 37
    table = torch.randn(P + C, V, 8, generator=rng).to(device)
    out = torch.randn(P + C, 8, V, generator=rng).to(device).requires_grad_()

    def policy(ids, attention_mask, flat):
        h = torch.tanh(table[torch.arange(P + C, device=device), ids].sum(1))
        return torch.einsum("nd,ldv->nlv", h, out).flatten(0, 1)[flat]
    q = torch.full((6, P), 5, device=device)
    results = {}
    for impl in ("triton", "reference"):
        monkeypatch.setattr(agrpo, "logprobs_and_entropy", lambda *args, impl=impl, **more:
                            logprobs_and_entropy(*args, impl=impl, **more))
        traj = agrpo.rollout(policy, q, torch.ones_like(q), C=C, m=2, block_length=4, mask_id=0, eos_id=1,
                             rand=agrpo.row_random(range(6)), **how)
        out.grad = None
        agrpo.accumulate_gradient(policy, traj, torch.arange(6, device=device) - 2.5, k=2, rows_total=6, mask_id=0, eos_id=1,
                                  temperature=how.get("temperature", 1.0), rand=agrpo.row_random(range(6)))
        results[impl] = traj, out.grad
    (a, grad_a), (b, grad_b) = results["triton"], results["reference"]
    assert torch.equal(a.o, b.o) and torch.equal(a.step_of, b.step_of)
    assert ((a.logp_old - b.logp_old).abs() / (1 + b.logp_old.abs())).max() <= LOGP_BAR
    assert (a.entropy - b.entropy).abs().max() <= H_BAR
    assert (grad_a - grad_b).norm() / grad_b.norm() <= 1e-5 and grad_b.norm() > 0


@pytest.mark.skipif(CUDA, reason="with a CUDA device it builds a model of 8 billion parameters")
def test_the_benchmark_of_a_whole_update_runs_on_a_toy_without_a_gpu():
    done = subprocess.run([sys.executable, str(ROOT / "kernels.py"), "--bench"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[1].strip() for line in done.stdout.splitlines()[1:]] == [
        "head on the scored rows", "head everywhere", "everywhere / scored"]
