"""Log-probability and entropy of a token under softmax(x / T): a Triton kernel, step by step.

AGRPO needs two numbers of every row x of logits that it scores, and the gradient of both:

    log p_y = log softmax(x / T)[y]        how likely was the token that was revealed
    H       = -sum_v p_v log p_v           how unsure was the model there

    logits = model(ids).logits[rows, places]               # (N, V)
    logp, H = logprobs_and_entropy(logits, tokens)         # (N,), (N,), float32
    (-(A * logp).mean() - 0.01 * H.mean()).backward()      # both send a gradient

That is easy arithmetic; the cost is moving x, V = 126464 numbers a row for LLaDA. Bytes per
logit in bfloat16 (counted, operation by operation):
                                                                           forward  backward
    plain PyTorch (`naive` below): float, / T, log_softmax, exp, product and sum,
    each reading and writing all of (N, V)                                      50        98
    one fused pass: read x; in the backward read x again and write dx            2         4

A GPU adds faster than it reads, so bytes are time: on an H200 2,048 rows take 0.16 ms forward
and 0.26 backward, plain PyTorch 3.7 and 5.7 (lab/bench.py). Where sampling kept only the
likeliest K, rows are no wider: `support_logprobs_and_entropy`, the same kernel on (N, K).

Left out: a fused LM head (for few rows it costs what reading its weights costs, whatever
follows), autotuning, ignored labels, second derivatives. Needs torch; triton only on a GPU.

Letters   N rows   V vocabulary   K width of a support   T temperature   y the label: a token id
"""
import contextlib
import functools
import sys
import types

import torch

# transformers looks for a package called `kernels` and imports this file: nothing may run here.
# (Where you have that package, rename this file.)
try:
    import triton
    import triton.language as tl
    HAVE_TRITON = True
except ImportError:                    # macOS: the kernels are then functions that nobody calls
    triton, tl = types.SimpleNamespace(jit=lambda f: f), types.SimpleNamespace(constexpr=None)
    HAVE_TRITON = False


# § 1 Naive: what one writes first -------------------------------------------------------------

def naive(logits, labels, temperature=1.0):
    """The definition: (N, V), (N,) -> (N,), (N,). A logit of -inf makes H NaN, by 0 * -inf."""
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(dim=-1)


# § 2 Reference: careful PyTorch. Runs where there is no GPU; in float64, the tests' truth -----

def logprobs_and_entropy_reference(logits, labels, positions=None, temperature=1.0):
    """As `logprobs_and_entropy`, in plain PyTorch. float64 logits give float64 results."""
    check(logits, labels, positions, temperature)
    x = logits if positions is None else logits[positions]
    x = x if x.dtype == torch.float64 else x.float()
    # Shift before dividing: no exp overflows, and logits around 1e4 keep their digits. The max
    # is a constant to autograd, because every shift gives the same softmax.
    z = (x - x.detach().amax(dim=-1, keepdim=True)) / temperature           # (N, V), at most 0
    e = z.exp()
    s = e.sum(dim=-1)                                                       # from 1 to V
    u = (e * z.masked_fill(z == -torch.inf, 0)).sum(dim=-1)                 # without 0 * -inf
    z_y = z.gather(1, labels[:, None])[:, 0]
    logp = z_y - s.log()
    logp = torch.where(z_y == -torch.inf, logp.detach(), logp)              # p = 0: no gradient
    return logp, s.log() - u / s                    # H: both terms >= 0, so nothing cancels


# § 3 Forward ----------------------------------------------------------------------------------
#
# A kernel is a function that the GPU runs many times at once. One run is a *program*: it knows
# its number, `tl.program_id`, and nothing of the others. It works on *tiles*: blocks of numbers
# spread over the registers of its threads, where one line of code acts on all of them. Here:
#
#     logits (N, V)                                program       results
#     row 0    [ tile 0 | tile 1 | ... | tile 15 ]  ->  0     ->  logp[0]    H[0]    M[0]    ...
#     row 1    [ tile 0 | tile 1 | ... | tile 15 ]  ->  1     ->  logp[1]    H[1]    M[1]    ...
#       ...
#     row N-1  [ tile 0 | tile 1 | ... | tile 15 ]  ->  N-1   ->  logp[N-1]  H[N-1]  M[N-1]  ...
#
#     one tile = 8192 logits = 256 threads x 32 logits, read 16 bytes at a time
#
# `kernel[(N,)](...)` launches N programs, `kernel[(N, T)](...)` a table of them.
#
# A row of 126464 float32 is 506 KB; all registers of one of the GPU's cores (an SM) are 256 KB.
# So a program can't hold its row. It walks along it, a tile at a time, and keeps three running
# numbers (online softmax, Milakov & Gimelshein, arXiv 1805.02867), with z = (x - M) / T:
#
#     M = max x        s = sum e^z        u = sum e^z z
#     log p_y = z_y - log s               H = log s - u / s
#
# A *mask* says which numbers of a tile exist: the last tile reaches past V, and what is not
# there is read as `other`. A *constexpr* is known when the kernel is compiled, as the size of a
# tile must be. The hardware has 2^x, not e^x, so inside the kernel z and u live in base 2, and
# log2(e) = 1.44.. and ln(2) = 0.69.. stand there as numbers:
#
#     base 2      z2 = log2(e) z    e^z = 2^z2    u2 = log2(e) u    log2 p = z2 - log2 s
#     natural     z  = ln(2) z2                   u  = ln(2) u2     log p  = ln(2) log2 p

# Numbers a tile, and warps (32 threads each) a program: 32 logits a thread, which compiles for
# sm_80 to sm_100 without spilling out of the registers.
FORWARD_BLOCK, FORWARD_WARPS = 8192, 8
BACKWARD_BLOCK, BACKWARD_WARPS = 4096, 4


@triton.jit
def _forward_kernel(x_ptr, y_ptr, positions_ptr, logp_ptr, H_ptr, M_ptr, log_s_ptr,
                    V, stride, inv_T, BLOCK: tl.constexpr):
    # Which row is mine? In int64: row * stride passes 2^31 at 17 thousand rows. A stride, so
    # that a view needs no copy; where it and V divide by 16, loads are 16 bytes wide.
    i = tl.program_id(0).to(tl.int64)
    row = i if positions_ptr is None else tl.load(positions_ptr + i)
    x_row = x_ptr + row * stride
    log2e_T = 1.4426950408889634 * inv_T
    M, s, u = -float("inf"), 0.0, 0.0
    for start in range(0, V, BLOCK):
        # A tile. Past the end of the row is -inf, probability 0 (a 0 would be one more token).
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        # The new max. While all is -inf there is nothing to shift by: -inf - -inf is NaN.
        M_new = tl.maximum(M, tl.max(x, axis=0))
        shift = tl.where(M_new == -float("inf"), 0.0, M_new)
        # z, but at least -200: 2^-200 is 0 in float32, as 2^-inf is, and 0 * -200 is 0 where
        # 0 * -inf is NaN. A NaN stays one; `maximum` drops NaNs unless it is told not to.
        z = tl.maximum((x - shift) * log2e_T, -200.0, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(z)
        # The max rose by d, in units of z: every earlier z falls by d, every e^z by 2^-d.
        # From -inf it rose by inf, and 2^-200 is 0 just as well.
        d = tl.minimum((shift - M) * log2e_T, 200.0)
        u = (u - d * s) * tl.exp2(-d) + tl.sum(e * z, axis=0)
        s = s * tl.exp2(-d) + tl.sum(e, axis=0)
        M = M_new
    # The label's logit, read once more. Outside 0..V-1 nothing is read and logp is NaN: loud.
    y = tl.load(y_ptr + i)
    x_y = tl.load(x_row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)
    log_s = tl.log(s)
    tl.store(logp_ptr + i, (x_y - M) * inv_T - log_s)
    tl.store(H_ptr + i, log_s - 0.6931471805599453 * u / s)                 # u = ln(2) u2
    # For the backward. M and log s apart: in their sum a large M eats the digits of log s.
    tl.store(M_ptr + i, M)
    tl.store(log_s_ptr + i, log_s)


# § 4 Backward ---------------------------------------------------------------------------------
#
# From the softmax's own derivative, dp_v / dz_j = p_v (1[v = j] - p_j), and sum_v p_v = 1:
#
#     d log p_y / dz_j = 1[y = j] - p_j
#     dH / dz_j = -sum_v (log p_v + 1) dp_v / dz_j = -p_j (log p_j + H),       dz / dx = 1 / T
#
# M, log s and H are known by now, nothing is summed over V: each tile is a program of its own.

@triton.jit
def _backward_kernel(x_ptr, y_ptr, positions_ptr, logp_ptr, H_ptr, M_ptr, log_s_ptr, g_logp_ptr,
                     g_H_ptr, dx_ptr, V, stride, inv_T, BLOCK: tl.constexpr):
    # Which row, which tile? The grid of programs is (N, tiles of a row).
    i = tl.program_id(0).to(tl.int64)
    row = i if positions_ptr is None else tl.load(positions_ptr + i)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    # log2 p, from x again: had the forward kept p, that were another (N, V) to write and read.
    # Floored as there: where x is -inf, p = 0 and the gradient is 0, not NaN.
    log2e = 1.4426950408889634
    log2_p = (x - tl.load(M_ptr + i)) * (log2e * inv_T) - tl.load(log_s_ptr + i) * log2e
    log2_p = tl.maximum(log2_p, -200.0, propagate_nan=tl.PropagateNan.ALL)
    # The incoming gradients, dz / dx = 1 / T folded in. A label of probability 0 sends none.
    impossible = tl.load(logp_ptr + i) == -float("inf")
    g_logp = tl.where(impossible, 0.0, tl.load(g_logp_ptr + i)) * inv_T
    g_H = tl.load(g_H_ptr + i) * inv_T
    # dx = g_logp (1[y] - p) - g_H p (log p + H), with all that multiplies p collected first.
    times_p = g_logp + g_H * tl.load(H_ptr + i) + (g_H * 0.6931471805599453) * log2_p
    is_label = cols == tl.load(y_ptr + i).to(tl.int32)          # int32, as cols are
    dx = tl.where(is_label, g_logp, 0.0) - tl.exp2(log2_p) * times_p
    # Into a tensor of its own, never over x: somebody may still need the logits.
    tl.store(dx_ptr + row * V + cols, dx, mask=cols < V)


# § 5 Autograd: memory and launches, nothing else ----------------------------------------------

class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, positions, temperature):
        logits, labels = dense_rows(logits), labels.contiguous()
        positions = None if positions is None else positions.contiguous()
        N, V, ctx.temperature = len(labels), logits.shape[1], temperature
        # float32 whatever the logits are: bf16 has 3 digits, a ratio of probabilities needs 6.
        logp, H, M, log_s = (torch.empty(N, device=logits.device, dtype=torch.float32)
                              for _ in range(4))
        with torch.cuda.device_of(logits):          # Triton launches on the current device
            if N:                                   # a grid of 0 programs is an error
                _forward_kernel[(N,)](logits, labels, positions, logp, H, M, log_s,
                                      V, logits.stride(0), 1 / temperature,
                                      BLOCK=tile(V, FORWARD_BLOCK), num_warps=FORWARD_WARPS)
        ctx.save_for_backward(logits, labels, positions, logp, H, M, log_s)
        return logp, H

    @staticmethod
    def backward(ctx, g_logp, g_H):
        if torch.is_grad_enabled():                 # autograd would take dx for a constant
            raise RuntimeError("no second derivative here: use impl='reference'")
        # Autograd may hand back copies in another layout (saved-tensor hooks, offloading): so
        # the strides are these tensors' own, not those of the forward. The gradient of `.sum()`
        # comes as one number with stride 0, that of a result nobody used as zeros.
        logits, labels, positions, *of_row = ctx.saved_tensors
        logits, labels = dense_rows(logits), labels.contiguous()
        positions = None if positions is None else positions.contiguous()
        of_row = [x.contiguous() for x in (*of_row, g_logp, g_H)]
        N, V, block = len(labels), logits.shape[1], tile(logits.shape[1], BACKWARD_BLOCK)
        # With positions, the rows that were not asked for have gradient 0.
        new = torch.empty if positions is None else torch.zeros
        dx = new(logits.shape, dtype=logits.dtype, device=logits.device)
        with torch.cuda.device_of(logits):
            if N:
                _backward_kernel[(N, triton.cdiv(V, block))](
                    logits, labels, positions, *of_row, dx, V, logits.stride(0),
                    1 / ctx.temperature, BLOCK=block, num_warps=BACKWARD_WARPS)
        return dx, None, None, None


def dense_rows(x):
    """x (N, V) with stride 1 over V, whatever the stride over the rows."""
    return x if x.stride(1) == 1 else x.contiguous()


def tile(V, most):
    """Numbers a tile, a power of 2; at least 1024, so that narrow rows share one kernel."""
    return min(most, max(1024, triton.next_power_of_2(V)))


# § 6 The call ---------------------------------------------------------------------------------

@torch.compiler.disable               # in a compiled caller this stays outside of the graph
def logprobs_and_entropy(logits, labels, positions=None, temperature=1.0, impl="auto"):
    """Log-probability of `labels` and entropy under softmax(logits / temperature).

    logits       (N, V) float32, bfloat16 or float16; float64 goes the reference way. Rows may
                 have any stride. -inf is legal: probability 0, gradient 0
    labels       (N,) int64, 0..V-1; (n,) if positions are given
    positions    None, or (n,) int64: score these rows only, none of them twice; for callers
                 who have logits of all places (agrpo.py asks for those it needs)
    temperature  a number > 0
    impl         "triton", "reference", or "auto": triton for CUDA tensors where it is installed
    returns      logp, H in the shape of labels, float32, with gradients. A label whose logit is
                 -inf has logp -inf and sends no gradient. A row of only -inf, or with +inf or
                 NaN in it, gives NaN
    raises       ValueError for what does not fit. Values of labels and positions are looked at
                 on the CPU only: on a GPU that would wait for it
    """
    usable = HAVE_TRITON and logits.dtype != torch.float64
    if impl == "auto":
        impl = "triton" if usable and logits.is_cuda else "reference"
        say_once(f"log-probabilities and entropies by the {impl} path on {logits.device.type}")
    if impl == "reference":
        return logprobs_and_entropy_reference(logits, labels, positions, temperature)
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}; it can be 'auto', 'triton' or 'reference'")
    # In the interpreter, which runs kernels on the CPU for tests, they are of another class.
    if not usable or not logits.is_cuda and isinstance(_forward_kernel, triton.JITFunction):
        raise ValueError(f"impl='triton' for {logits.dtype} on {logits.device.type}: it takes "
                         "Triton, a GPU (or, for tests, TRITON_INTERPRET=1 in the environment "
                         "from the start) and at most 32 bits; use impl='reference'")
    check(logits, labels, positions, temperature)
    return _Fused.apply(logits, labels, positions, float(temperature))


def support_logprobs_and_entropy(logits, support, labels, temperature=1.0, impl="auto"):
    """The same, under softmax(logits / temperature) restricted to `support`: top-k, top-p.

    logits   (N, V)     labels (N,) int64, token ids; one outside of the support has logp -inf
    support  (N, K) int32 or int64, token ids, none twice in a row, -1 where a slot is unused
    returns  logp, H as above, (N,); a row without any support has logp -inf and H NaN
    raises   ValueError as above
    """
    shapes = [list(x.shape) for x in (logits, support, labels)]
    if [len(shape) for shape in shapes] != [2, 2, 1] or len({shape[0] for shape in shapes}) > 1:
        raise ValueError("logits, support, labels are {}, {}, {}; expected (N, V), (N, K), (N,)"
                         .format(*shapes))
    # One gather, and all is (N, K). An unused slot reads token 0, then is -inf: probability 0.
    x = logits.gather(1, support.long().clamp(min=0)).masked_fill(support < 0, -torch.inf)
    is_label = support == labels[:, None]
    slot = is_label.int().argmax(dim=1)             # where the label is; 0 if it is nowhere
    logp, H = logprobs_and_entropy(x, slot, temperature=temperature, impl=impl)
    return logp.masked_fill(~is_label.any(dim=1), -torch.inf), H


@functools.cache
def say_once(message):
    with contextlib.suppress(OSError):                   # nobody may be listening any more
        print(f"kernels.py: {message}", file=sys.stderr)


def check(logits, labels, positions, temperature):
    """A ValueError for what does not fit. Looks at values only where nobody has to wait."""
    shape = list(logits.shape)
    if len(shape) != 2 or shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {shape}; expected floats, (N, V)")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    n = shape[0] if positions is None else positions.numel()
    look = logits.device.type == "cpu"
    for name, ids, end in (("labels", labels, shape[1]), ("positions", positions, shape[0])):
        if ids is None:
            continue
        if ids.shape != (n,) or ids.dtype != torch.int64 or ids.device != logits.device:
            raise ValueError(f"{name} are {ids.dtype} {list(ids.shape)} on {ids.device}; "
                             f"expected torch.int64 [{n}] on {logits.device}")
        if look and n and not 0 <= ids.min() <= ids.max() < end:
            raise ValueError(f"{name} reach {ids.min()} to {ids.max()}; expected 0..{end - 1}")
    if positions is not None and look and len(positions.unique()) < n:
        raise ValueError("positions hold a row twice: its gradient would be written, not added")
