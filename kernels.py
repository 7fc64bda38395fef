"""
Log-probability and entropy of masked positions: a Triton kernel, forward and backward, and its benchmark.

AGRPO needs two numbers of every row x of logits it scores (V = 126464 of them for LLaDA):

    log p_y = log softmax(x / T)[y]        how likely was the token that was revealed
    H       = -sum_v p_v log p_v           how unsure was the model there

and the gradient of both. That is easy arithmetic; the cost is moving x. Bytes per bf16 logit:

    plain PyTorch (`naive` below): float, / T, log_softmax, exp, product, sum,
    each reading and writing all of [N, V]                                     50 forward, 98 backward
    one fused pass (this file): read x; in the backward also write dx           2 forward,  4 backward

A GPU adds faster than it reads, so bytes are time: N = 2048 rows take at least 120 us and 241 us at the
4.3 TB/s an H200 copies at. Left out: a fused LM head (for few rows that matmul costs what reading its
weights costs, whatever follows), autotuning, ignored labels, second derivatives. And where sampling kept
only the top-k tokens no V-wide kernel is needed: `support_logprobs_and_entropy`. The kernel is for
untruncated sampling, top-p alone, and the entropy of the full distribution.

    python kernels.py             # with a GPU: correctness, then tables. Without: correctness, in the interpreter
    python kernels.py --bench     # one update at LLaDA-8B's shape: what the head on selected rows saves

Letters: N rows to score, V vocabulary, B x L batch and sequence of 3-d logits, T temperature.
Order (naive, kernel, autograd, benchmark) after Triton's tutorials 02 (softmax) and 05 (layer norm).
"""

import functools
import os
import sys
import types

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"   # Triton reads it when it is first imported, so: before that

# transformers looks for a package named `kernels`, and finds and imports this file: nothing may happen here.
try:
    import triton
    import triton.language as tl
    HAVE_TRITON = True
except ImportError:                        # macOS: the kernels below are then functions nobody calls
    triton, tl = types.SimpleNamespace(jit=lambda f: f), types.SimpleNamespace(constexpr=None)
    HAVE_TRITON = False

DEBUG = os.environ.get("KERNELS_DEBUG") == "1"   # check the values of labels on a GPU too (which waits for it)
# Logits and warps (of 32 threads) per tile: 32 logits a thread in both kernels, that is 4 loads of 16 bytes
# in flight in bf16, 8 in float32. Compiled for sm_80 to sm_100 without spills, at most 64 registers a
# thread in the forward (32 warps on an SM) and 96 in the backward (20 warps).
FORWARD_BLOCK, FORWARD_WARPS = 8192, 8
BACKWARD_BLOCK, BACKWARD_WARPS = 4096, 4


# § 1. The naive version: what one writes first, and the baseline of the benchmark.

def naive(logits, labels, temperature=1.0):
    """The definition, line by line: [N, V], [N] -> [N], [N]. Entropy NaN if a logit is -inf (0 * -inf)."""
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


# § 2. The reference: plain PyTorch, but careful. The path without a GPU; in float64 the tests' oracle.

def logprobs_and_entropy_reference(logits, labels, positions=None, temperature=1.0):
    """Same contract as `logprobs_and_entropy`, in plain PyTorch. float64 logits give float64 results."""
    _check(logits, labels, positions, temperature)
    if positions is not None:                            # gather the rows to score: [n, V]
        L = logits.shape[-2]
        logits = logits[positions // L, positions % L] if logits.dim() == 3 else logits[positions]
    x = logits if logits.dtype == torch.float64 else logits.float()
    # z = (x - M) / T <= 0. Shift before dividing: no exp overflows, and logits around 1e4 keep their
    # digits. M is a constant to autograd, as any shift gives the same softmax.
    z = (x - x.detach().amax(-1, keepdim=True)) / temperature
    e = z.exp()
    s = e.sum(-1)                                        # between 1 and V
    u = (e * z.masked_fill(z == -torch.inf, 0)).sum(-1)  # sum of e^z z, where 0 * -inf would be NaN
    z_y = z.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    # A token of probability 0 is a constant -inf: no gradient flows from it.
    logp = torch.where(z_y == -torch.inf, z_y.detach(), z_y - s.log())
    return logp, s.log() - u / s                         # both terms of H are >= 0: nothing cancels


# § 3. Forward kernel. One program per row; it walks over V in tiles and keeps three running numbers.

@triton.jit
def _forward_kernel(x_ptr, y_ptr, rows_ptr, logp_ptr, H_ptr, M_ptr, log_s_ptr,
                    V, L, stride_b, stride_l, inv_T, BLOCK: tl.constexpr):
    # Which row is mine? The grid is (N,): program i computes output i from logits row r = b * L + l.
    # int64, because r * V passes 2^31 at 17 thousand rows. Strides, so that a view needs no copy; where
    # they and V divide by 16, Triton loads 16 bytes at a time.
    i = tl.program_id(0).to(tl.int64)
    r = i if rows_ptr is None else tl.load(rows_ptr + i)
    x_row = x_ptr + (r // L) * stride_b + (r % L) * stride_l
    # Online softmax (Milakov & Gimelshein, arXiv 1805.02867): the max M, s = sum e^z and u = sum e^z z
    # over what was read so far, z = (x - M) / T. In base 2, because the hardware has 2^x and tl.exp adds
    # 3 instructions to every element: z here is log2(e) times the z of the reference, and so is u.
    log2e_T = 1.4426950408889634 * inv_T
    M, s, u = -float("inf"), 0.0, 0.0
    for start in range(0, V, BLOCK):
        # Read a tile. Columns past V become -inf, probability 0 (as 0 they would be more tokens).
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        # The new max. While all is -inf there is nothing to shift by, and -inf - -inf would be NaN.
        M_new = tl.maximum(M, tl.max(x, axis=0))
        shift = tl.where(M_new == -float("inf"), 0.0, M_new)
        # z, but at least -200: 2^-200 is 0 in float32 like 2^-inf, and 0 * -200 is 0 where 0 * -inf is
        # NaN. A NaN among the logits must stay one; maximum drops NaNs unless told not to.
        z = tl.maximum((x - shift) * log2e_T, -200.0, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(z)
        # The max rose by d (in units of z): every old z falls by d, every old e^z shrinks by 2^-d. From
        # -inf it rose by inf, and 2^-200 is 0 just as well.
        d = tl.minimum((shift - M) * log2e_T, 200.0)
        u = (u - d * s) * tl.exp2(-d) + tl.sum(e * z, axis=0)
        s = s * tl.exp2(-d) + tl.sum(e, axis=0)
        M = M_new
    # The label's logit, read once more. A label outside 0..V-1 gives NaN: loud, and nothing is read there.
    y = tl.load(y_ptr + i)
    x_y = tl.load(x_row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)
    log_s = tl.log(s)
    tl.store(logp_ptr + i, (x_y - M) * inv_T - log_s)
    tl.store(H_ptr + i, log_s - 0.6931471805599453 * u / s)     # times ln 2: u back to natural units
    # For the backward. M and log s apart: their sum, log-sum-exp, loses the digits of log s if M is large.
    tl.store(M_ptr + i, M)
    tl.store(log_s_ptr + i, log_s)


# § 4. Backward kernel. With p = softmax(z) and 1[y] the one-hot vector of the label,
#        d log p_y / dz = 1[y] - p          dH / dz = -p (log p + H)          dz / dx = 1 / T
#      M, log s and H are known, so nothing is left to sum over V: rows are cut into tiles, a program each.

@triton.jit
def _backward_kernel(x_ptr, y_ptr, rows_ptr, logp_ptr, H_ptr, M_ptr, log_s_ptr, g_logp_ptr, g_H_ptr, dx_ptr,
                     V, L, stride_b, stride_l, inv_T, BLOCK: tl.constexpr):
    # Which row, which tile? The grid is (N, ceil(V / BLOCK)).
    i = tl.program_id(0).to(tl.int64)
    r = i if rows_ptr is None else tl.load(rows_ptr + i)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_row = x_ptr + (r // L) * stride_b + (r % L) * stride_l
    x = tl.load(x_row + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    # log2 p, again from x: had the forward stored p, that would be another [N, V] to write and read.
    # Same floor as there: where x is -inf, p = 0 and the gradient is 0, not NaN.
    log2e = 1.4426950408889634
    log2_p = (x - tl.load(M_ptr + i)) * (log2e * inv_T) - tl.load(log_s_ptr + i) * log2e
    log2_p = tl.maximum(log2_p, -200.0, propagate_nan=tl.PropagateNan.ALL)
    # The two incoming gradients, with dz / dx = 1 / T folded in. A label of probability 0 sends none.
    g_logp = tl.where(tl.load(logp_ptr + i) == -float("inf"), 0.0, tl.load(g_logp_ptr + i)) * inv_T
    g_H = tl.load(g_H_ptr + i) * inv_T
    # dx = g_logp (1[y] - p) - g_H p (log p + H), with all that multiplies p collected first.
    times_p = g_logp + g_H * tl.load(H_ptr + i) + (g_H * 0.6931471805599453) * log2_p
    is_label = cols == tl.load(y_ptr + i).to(tl.int32)
    dx = tl.where(is_label, g_logp, 0.0) - tl.exp2(log2_p) * times_p
    # Into a fresh dense tensor, never over x: somebody may still need the logits.
    tl.store(dx_ptr + r * V + cols, dx, mask=cols < V)


# § 5. Autograd function: memory and launches, nothing else.

class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, positions, temperature):
        labels = labels.contiguous()
        positions = None if positions is None else positions.contiguous()
        # float32 whatever the logits are: bf16 has 3 digits, a ratio of two probabilities needs 6.
        logp, H, M, log_s = (torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(4))
        V = logits.shape[-1]
        # [N, V] counts as [1, N, V]: r // L is 0 for every row, so stride_b does not matter.
        stride_b = logits.stride(0) if logits.dim() == 3 else 0
        ctx.scalars = V, logits.shape[-2], stride_b, logits.stride(-2), 1 / temperature
        if labels.numel():                                       # a grid of 0 programs is an error
            with torch.cuda.device_of(logits):                   # Triton launches on the current device
                _forward_kernel[(labels.numel(),)](
                    logits, labels, positions, logp, H, M, log_s, *ctx.scalars,
                    BLOCK=min(FORWARD_BLOCK, triton.next_power_of_2(V)), num_warps=FORWARD_WARPS)
        ctx.save_for_backward(logits, labels, positions, logp, H, M, log_s)
        return logp, H

    @staticmethod
    def backward(ctx, g_logp, g_H):
        if torch.is_grad_enabled():                              # PyTorch would silently take it for constant
            raise RuntimeError("backward with create_graph=True: this kernel has no second derivative; "
                               "use impl='reference'")
        # If only one result was used, PyTorch passes zeros for the other. `.contiguous()`: the gradient
        # of `.sum()` arrives as a single number with stride 0.
        logits, labels, positions, *saved = ctx.saved_tensors
        V, block = logits.shape[-1], min(BACKWARD_BLOCK, triton.next_power_of_2(logits.shape[-1]))
        # Without positions every element is written; with them the rows not selected have gradient 0.
        new = torch.empty if positions is None else torch.zeros
        dx = new(logits.shape, dtype=logits.dtype, device=logits.device)
        if labels.numel():
            with torch.cuda.device_of(logits):
                _backward_kernel[(labels.numel(), triton.cdiv(V, block))](
                    logits, labels, positions, *saved, g_logp.contiguous(), g_H.contiguous(), dx, *ctx.scalars,
                    BLOCK=block, num_warps=BACKWARD_WARPS)
        return dx, None, None, None


# § 6. The function to call.

def logprobs_and_entropy(logits, labels, positions=None, temperature=1.0, impl="auto"):
    """
    Log-probability of `labels` and entropy under softmax(logits / temperature), with gradients of both.

    logits       [N, V] or [B, L, V], float32, bfloat16 or float16 (the reference: float64 too); any outer
                 strides, stride 1 over V. -inf is legal: probability 0, gradient 0
    labels       int64, [N] or [B, L]; [n] if positions are given. Values 0..V-1
    positions    None, or int64 [n]: score only these rows, given as b * L + l, none of them twice
    temperature  a number > 0
    impl         "triton", "reference", or "auto": triton for CUDA tensors where it is installed
    returns      (logp, H), float32 in the shape of labels. A label whose logit is -inf has logp -inf and
                 sends no gradient; a row of only -inf, or with a NaN, gives NaN
    raises       ValueError for shapes, dtypes, a temperature or an impl that do not fit. Values of labels
                 and positions are checked on the CPU; on a GPU only with KERNELS_DEBUG=1, because looking
                 at them makes the CPU wait (a label outside 0..V-1 gives NaN there)
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl is {impl!r}; it can be 'auto', 'triton' or 'reference'")
    if impl == "auto":
        impl = "triton" if HAVE_TRITON and logits.is_cuda and logits.dtype != torch.float64 else "reference"
        _say_once(f"kernels.py: log-probabilities and entropies by the {impl} path on {logits.device.type}")
    if impl == "reference":
        return logprobs_and_entropy_reference(logits, labels, positions, temperature)
    if not HAVE_TRITON:
        raise ValueError("impl='triton', but Triton is not installed; use impl='reference'")
    if logits.dtype == torch.float64:
        raise ValueError("impl='triton' computes in float32; use impl='reference' for float64 logits")
    if not logits.is_cuda and isinstance(_forward_kernel, triton.JITFunction):
        raise ValueError(f"impl='triton' with logits on {logits.device.type}: it needs a GPU, or (for tests) "
                         "TRITON_INTERPRET=1 in the environment before Triton is first imported")
    _check(logits, labels, positions, temperature)
    return _Fused.apply(logits, labels, positions, float(temperature))


@functools.cache
def _say_once(message):
    print(message, file=sys.stderr)


def _check(logits, labels, positions, temperature):
    """A ValueError that says what does not fit. Looks at values only where that makes nobody wait."""
    V, expected = logits.shape[-1], logits.shape[:-1] if positions is None else positions.shape
    if logits.dim() not in (2, 3) or not logits.is_floating_point() or V == 0:
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; expected floats, [N, V] or [B, L, V]")
    if logits.stride(-1) != 1 and V > 1 and logits.numel():
        raise ValueError(f"logits have stride {logits.stride(-1)} over V; expected 1, call .contiguous()")
    if labels.shape != expected or (positions is not None and positions.dim() != 1):
        raise ValueError(f"labels are {list(labels.shape)}; expected {list(expected)}, positions [n] or None")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    for name, ids, end in (("labels", labels, V), ("positions", positions, logits.shape[:-1].numel())):
        if ids is None:
            continue
        if ids.dtype != torch.int64 or ids.device != logits.device:
            raise ValueError(f"{name} are {ids.dtype} on {ids.device}; expected torch.int64 on {logits.device}")
        if (DEBUG or not ids.is_cuda) and ids.numel() and not 0 <= ids.min() <= ids.max() < end:
            raise ValueError(f"{name} reach from {ids.min()} to {ids.max()}; expected 0 to {end - 1}")
    if positions is not None and (DEBUG or not positions.is_cuda) and len(positions.unique()) < len(positions):
        raise ValueError("positions hold a row twice: its gradient would be written twice, not added")


# § 7. Truncated sampling: the support has at most top-k tokens, so after one gather all is [N, S].

def support_logprobs_and_entropy(logits, support, labels, temperature=1.0):
    """
    As `logprobs_and_entropy`, under softmax(logits / temperature) restricted to `support`. Plain PyTorch.

    logits   [N, V], any float dtype                      labels  int64 [N], token ids
    support  int32 or int64 [N, S]: token ids, none twice in a row, -1 in unused slots
    returns  (logp, H), float32 (float64 for float64 logits), [N]. A label outside the support has logp
             -inf and sends no gradient; without any support H is NaN
    raises   ValueError for shapes or a temperature that do not fit
    """
    if logits.dim() != 2 or support.dim() != 2 or not logits.shape[:1] == support.shape[:1] == labels.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (logits, support, labels))
        raise ValueError(f"logits, support, labels are {shapes}; expected [N, V], [N, S], [N]")
    # Unused slots read token 0 and are then -inf, which has probability 0 and gradient 0.
    x = logits.gather(1, support.long().clamp(min=0)).masked_fill(support < 0, -torch.inf)    # [N, S]
    is_label = support == labels.unsqueeze(1)
    slot = is_label.int().argmax(1)                      # where in the support the label is; 0 if nowhere
    logp, H = logprobs_and_entropy_reference(x, slot, temperature=temperature)
    return logp.masked_fill(~is_label.any(1), -torch.inf), H


# § 8. `python kernels.py`: correctness on a ragged shape, then speed (lab/bench_kernels.py).

def check(device, T=0.6):
    """Errors against the float64 reference on ragged, strided, truncated logits; exits if a bar is missed."""
    # The interpreter truncates float32 to bfloat16 where a GPU rounds: twice the error.
    for dtype, dx_bar in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8 if device == "cuda" else 2**-7)):
        rng = torch.Generator().manual_seed(0)           # V is odd: the last tile is not full, few rows are aligned
        x = (4 * torch.randn(2, 5, 50257, generator=rng)).to(device, dtype)[:, 1:4]        # a view, [2, 3, V]
        x[0, 0, 100:], x[1, 2, :9000] = -torch.inf, -torch.inf                             # truncated rows
        y = torch.tensor([[50, 50256, 50], [0, 1, 50256]], device=device)
        g = torch.randn(2, 2, 3, generator=rng).to(device)                                 # gradients of logp, H
        results = []
        for impl, logits in (("triton", x), ("reference", x.double())):
            logits.requires_grad_()
            out = logprobs_and_entropy(logits, y, temperature=T, impl=impl)
            results.append([*out, *torch.autograd.grad(out, logits, list(g.to(out[0].dtype)))])
        (logp, H, dx), (logp64, H64, dx64) = results
        errors = {"logp": ((logp - logp64) / (1 + logp64.abs()), 1e-6), "H": (H - H64, 5e-6),
                  "dlogits": ((dx - dx64) * T / g.abs().sum(0).unsqueeze(-1), dx_bar)}
        for name, (error, bar) in errors.items():
            print(f"correctness, {dtype}, V = 50257: error of {name:7s} {error.abs().max():.1e}, bar {bar:.1e}")
            if not error.abs().max() <= bar:
                raise SystemExit("a bar is missed")


if __name__ == "__main__":
    if "--bench" in sys.argv[1:]:                        # not the kernel alone: a whole update of an 8B model
        from lab.bench_update import benchmark
        benchmark()
    elif torch.cuda.is_available():
        check("cuda")
        from lab.bench_kernels import benchmark
        benchmark()
    else:
        print("No CUDA device. With one, this prints time, bandwidth and memory of eager PyTorch, torch.compile,\n"
              "Liger-Kernel (if installed) and this file for N = 24 to 8192 rows of 126464 logits.")
        if HAVE_TRITON:
            print("Here: only the correctness part, in Triton's interpreter on the CPU.")
            check("cpu")
        else:
            print("Triton is not installed either: nothing to check, the plain PyTorch reference is what runs.")
