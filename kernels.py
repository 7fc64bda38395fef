"""Log-probability and entropy of a token under softmax(x / T): a first Triton kernel.

AGRPO needs two numbers of every row x of logits that it scores, and the gradient of both:

    log p_y = log softmax(x / T)[y]        how likely was the token that was revealed
    H       = -sum_v p_v log p_v           how unsure was the model there

    logp, H = logprobs_and_entropy(logits, tokens)         # (N, V), (N,) -> (N,), (N,)
    (-(A * logp).mean() - 0.01 * H.mean()).backward()      # both send a gradient

The cost is moving x, V = 126464 numbers a row for LLaDA. 2,048 bfloat16 rows on an H200 take
                              bytes a logit, forward and backward           ms (lab/bench.py)
    plain PyTorch (`naive`)   50, 98   every step reads and writes (N, V)       3.7,  5.7
    fused                      2,  4   reads x; reads x again and writes dx     0.16, 0.26

Against two separate calls, one a number, TRL measured 0.89 ms for a fused one, 12.8 for them
(huggingface/trl, kernels/README.md: forward, 8,192 bfloat16 rows of 151,936, one H100).

No GPU? Triton's interpreter runs a kernel in NumPy, and breakpoint() in a kernel stops there:
    $ TRITON_INTERPRET=1 python                            # set before triton is imported
    >>> import torch, kernels
    >>> x, y = torch.randn(2, 20000), torch.tensor([7, 19999])
    >>> kernels.logprobs_and_entropy(x, y, impl="triton"), kernels.naive(x, y)

Left out: a fused LM head (few rows gain nothing), autotuning, second derivatives. Needs torch.
Letters   N rows   V vocabulary   K width of a support   T temperature   y the label: a token id
"""
import contextlib
import functools
import sys
import types

import torch

# transformers imports what is called `kernels`: nothing may run here. (Have it? Rename this.)
try:
    import triton
    import triton.language as tl
    HAVE_TRITON = True
except ImportError:                    # macOS: the kernels are then functions that nobody calls
    triton, tl = types.SimpleNamespace(jit=lambda f: f), types.SimpleNamespace(constexpr=None)
    HAVE_TRITON = False


# § 1 In PyTorch: as one writes it first, then with care ---------------------------------------

def naive(logits, labels, temperature=1.0):
    """The definition: (N, V), (N,) -> (N,), (N,). A logit of -inf makes H NaN, by 0 * -inf."""
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(dim=-1)


def logprobs_and_entropy_reference(logits, labels, positions=None, temperature=1.0):
    """What runs without a GPU. float64 logits give float64 results, the truth to the tests."""
    check(logits, labels, positions, temperature)
    x = logits if positions is None else logits[positions]
    x = x if x.dtype == torch.float64 else x.float()
    # Shifted by the max no exp overflows. Any shift gives the same softmax: no gradient by it.
    z = (x - x.detach().amax(dim=-1, keepdim=True)) / temperature           # (N, V), at most 0
    e = z.exp()
    s = e.sum(dim=-1)                                                       # from 1 to V
    u = (e * z.masked_fill(z == -torch.inf, 0)).sum(dim=-1)                 # without 0 * -inf
    z_y = z.gather(1, labels[:, None])[:, 0]
    logp = z_y - s.log()
    logp = torch.where(z_y == -torch.inf, logp.detach(), logp)              # p = 0: no gradient
    return logp, s.log() - u / s                    # H: both terms >= 0, so nothing cancels


# § 2 Forward ----------------------------------------------------------------------------------
# A kernel is a function that the GPU runs many times at once. One run is a *program*: it knows
# its number, `tl.program_id(0)`, and nothing of the others. `kernel[(N,)](...)` launches N.
#
#     logits (N, V)                                 program       results
#     row 0    [ tile 0 | tile 1 | ... | tile 15 ]  ->  0     ->  logp[0]    H[0]
#       ...
#     row N-1  [ tile 0 | tile 1 | ... | tile 15 ]  ->  N-1   ->  logp[N-1]  H[N-1]
#
# A *tile* is a block of numbers in the registers of a program's threads: one line of code acts
# on all of them. Here 8192 logits = 256 threads x 32, a *constexpr*: known when the kernel is
# compiled. The last tile reaches past the row: a *mask* says which of its numbers exist.
#
# A row of 126464 float32 is 506 KB; all registers of one of the GPU's cores (an SM) are 256 KB.
# So a program walks along its row, and keeps three running numbers (online softmax, Milakov &
# Gimelshein, arXiv 1805.02867): M = max x and, with z = x - M, so that no e^z overflows,
# s = sum e^z and u = sum e^z z. The plain case, T = 1:
#
#     M, s, u = x[0], 0, 0
#     for tile in x.split(8192):
#         d = (tile.max() - M).clamp(min=0)         # the max rises by d, earlier z fall by d
#         M = M + d
#         z = tile - M
#         u = (u - d * s) * exp(-d) + (exp(z) * z).sum()
#         s = s * exp(-d) + exp(z).sum()
#     logp, H = x[y] - M - log(s), log(s) - u / s
#
# For speed: the hardware has 2^x, not e^x. So z and u live in base 2, with log2(e) = 1.44..
#     natural     z  = (x - M) / T             e^z           u                 log p
#     base 2      z2 = (x - M) log2(e) / T     2^z2 = e^z    u2 = log2(e) u    ln(2) log2 p
#
# For any values:
#     a logit is -inf          e^z z = 0 * -inf = NaN    so z >= -200: 2^-200 = 0, 0 * -200 = 0
#     nothing but -inf yet     x - M = -inf - -inf       so 0 in place of M
#     NaN, or +inf (z = NaN)   `maximum` drops a NaN     unless told not to: results are NaN
#     y outside of 0..V-1      is another row's number   so nothing is read, logp is NaN: loud

FORWARD_BLOCK, FORWARD_WARPS = 8192, 8          # numbers a tile, warps of 32 threads a program:
BACKWARD_BLOCK, BACKWARD_WARPS = 4096, 4        # the registers suffice, for sm_80 to sm_100


@triton.jit
def _forward_kernel(x_ptr, y_ptr, positions_ptr, logp_ptr, H_ptr, M_ptr, log_s_ptr,
                    V, stride, inv_T, BLOCK: tl.constexpr):
    # A tensor arrives as the address of its first number. Where does my row start? In int64:
    # row * stride passes 2^31 at 17 thousand rows. With a stride a view needs no copy; where it
    # and V divide by 16, loads are 16 bytes wide.
    i = tl.program_id(0).to(tl.int64)
    row = i if positions_ptr is None else tl.load(positions_ptr + i)
    x_row = x_ptr + row * stride
    log2e_T = 1.4426950408889634 * inv_T
    M, s, u = -float("inf"), 0.0, 0.0
    for start in range(0, V, BLOCK):
        # A tile. What is past the row counts as -inf, probability 0 (0 would be a token more).
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        # The new max; 0 while there is none. Then z, and e^z.
        M_new = tl.maximum(M, tl.max(x, axis=0))
        shift = tl.where(M_new == -float("inf"), 0.0, M_new)
        z = tl.maximum((x - shift) * log2e_T, -200.0, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(z)
        # By how much the max rose, in units of z: inf at first, where 200 does as well.
        d = tl.minimum((shift - M) * log2e_T, 200.0)
        u = (u - d * s) * tl.exp2(-d) + tl.sum(e * z, axis=0)
        s = s * tl.exp2(-d) + tl.sum(e, axis=0)
        M = M_new
    # The label's logit, read once more.
    y = tl.load(y_ptr + i)
    x_y = tl.load(x_row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)
    log_s = tl.log(s)
    tl.store(logp_ptr + i, (x_y - M) * inv_T - log_s)
    tl.store(H_ptr + i, log_s - 0.6931471805599453 * u / s)
    # For the backward. M and log s apart: in their sum a large M eats the digits of log s.
    tl.store(M_ptr + i, M)
    tl.store(log_s_ptr + i, log_s)


# § 3 Backward ---------------------------------------------------------------------------------
# From the softmax's own derivative, dp_v / dz_j = p_v (1[v = j] - p_j), and sum_v p_v = 1:
#
#     d log p_y / dz_j = 1[y = j] - p_j
#     dH / dz_j = -sum_v (log p_v + 1) dp_v / dz_j = -p_j (log p_j + H),       dz / dx = 1 / T

@triton.jit
def _backward_kernel(x_ptr, y_ptr, positions_ptr, logp_ptr, H_ptr, M_ptr, log_s_ptr, g_logp_ptr,
                     g_H_ptr, dx_ptr, V, stride, inv_T, BLOCK: tl.constexpr):
    # Nothing is summed any more: each tile is a program of its own, in a grid (N, tiles).
    i = tl.program_id(0).to(tl.int64)
    row = i if positions_ptr is None else tl.load(positions_ptr + i)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    # log2 p, from x again: had the forward kept p, that were another (N, V) to write and read.
    # At least -200, as there: where x is -inf, p = 0 and the gradient is 0, not NaN.
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
    tl.store(dx_ptr + row * V + cols, dx, mask=cols < V)        # not over x: others may need it


# § 4 Launches ---------------------------------------------------------------------------------
# A `custom_op` is one step to autograd and torch.compile, which do not look inside. They are
# told its gradient and, for plans without any values (`register_fake`), the shape of results.

@torch.library.custom_op("agrpo::forward", mutates_args=(), schema=
    "(Tensor x, Tensor y, Tensor? positions, float T) -> (Tensor, Tensor, Tensor, Tensor)")
def _forward(x, y, positions, T):
    x, y, positions = dense(x, y, positions)
    V, results = x.shape[1], new_results(x, y, positions, T)
    with torch.cuda.device_of(x):                   # Triton launches on the current device
        if len(y):                                  # a grid of 0 programs is an error
            _forward_kernel[(len(y),)](x, y, positions, *results, V, x.stride(0), 1 / T,
                                       BLOCK=tile(V, FORWARD_BLOCK), num_warps=FORWARD_WARPS)
    return results


@_forward.register_fake
def new_results(x, y, positions, T):        # logp, H, M, log s: a ratio takes float32's digits
    return tuple(y.new_empty(y.shape, dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("agrpo::backward", mutates_args=(), schema=
    "(Tensor x, Tensor y, Tensor? positions, Tensor[] of_row, float T) -> Tensor")
def _backward(x, y, positions, of_row, T):
    # Strides of now: saved tensors may come back in another layout, gradients with stride 0.
    x, y, positions, *of_row = dense(x, y, positions, *of_row)
    new = torch.empty if positions is None else torch.zeros         # 0 for rows not asked for
    dx = new(x.shape, dtype=x.dtype, device=x.device)
    V, block = x.shape[1], tile(x.shape[1], BACKWARD_BLOCK)
    with torch.cuda.device_of(x):
        if len(y):
            _backward_kernel[(len(y), triton.cdiv(V, block))](
                x, y, positions, *of_row, dx, V, x.stride(0), 1 / T,
                BLOCK=block, num_warps=BACKWARD_WARPS)
    return dx


def _save(ctx, inputs, output):
    *tensors, ctx.T = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, g_logp, g_H, *unused):           # M and log s go nowhere
    if torch.is_grad_enabled():                     # autograd would take dx for a constant
        raise RuntimeError("no second derivative here: use impl='reference'")
    x, y, positions, *of_row = ctx.saved_tensors
    return _backward(x, y, positions, [*of_row, g_logp, g_H], ctx.T), None, None, None


_forward.register_autograd(_gradient, setup_context=_save)
_backward.register_fake(lambda x, *_: x.new_empty(x.shape))


def dense(x, *others):                              # x: stride 1 along V, any from row to row
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, *(w if w is None else w.contiguous() for w in others)


def tile(V, most):                                  # at least 1024: narrow rows share a kernel
    return min(most, max(1024, triton.next_power_of_2(V)))


# § 5 The call ---------------------------------------------------------------------------------

def logprobs_and_entropy(logits, labels, positions=None, temperature=1.0, impl="auto"):
    """Log-probability of `labels` and entropy under softmax(logits / temperature).

    logits     (N, V) float32, bfloat16 or float16, rows at any stride; float64: the reference
    labels     (N,) int64, 0..V-1; (n,) with positions (n,) int64: these rows only, none twice
    impl       "triton", "reference", or "auto": triton for CUDA tensors where it is installed
    returns    logp, H in the shape of labels, float32, with gradients. A label whose logit is
               -inf: logp -inf, no gradient. A row with NaN or +inf, or of only -inf: NaN
    raises     ValueError for what does not fit. Values of labels and positions are looked at
               on the CPU only, where nobody has to wait, and not in torch.compile
    """
    usable = HAVE_TRITON and logits.dtype != torch.float64
    if impl == "auto":
        impl = "triton" if usable and logits.is_cuda else "reference"
        if not torch.compiler.is_compiling():
            say_once(f"{impl} path on {logits.device.type}")
    if impl == "reference":
        return logprobs_and_entropy_reference(logits, labels, positions, temperature)
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}; it can be 'auto', 'triton' or 'reference'")
    # In the interpreter the kernels are of another class, and run on the CPU.
    if not usable or not logits.is_cuda and isinstance(_forward_kernel, triton.JITFunction):
        raise ValueError(f"impl='triton' for {logits.dtype} on {logits.device}: needs Triton, "
                         "32 bits and a GPU (or TRITON_INTERPRET=1 from the start)")
    check(logits, labels, positions, temperature)
    return _forward(logits, labels, positions, float(temperature))[:2]


def support_logprobs_and_entropy(logits, support, labels, temperature=1.0, impl="auto"):
    """The same, under softmax(logits / temperature) restricted to `support`: top-k, top-p.

    logits   (N, V)     labels (N,) int64, token ids; one outside of the support has logp -inf
    support  (N, K) int32 or int64, token ids, none twice in a row, -1 where a slot is unused
    returns  logp, H as above, (N,); a row without any support has logp -inf and H NaN
    """
    shapes = [list(x.shape) for x in (logits, support, labels)]
    if [len(shape) for shape in shapes] != [2, 2, 1] or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"expected (N, V), (N, K), (N,); logits, support, labels are {shapes}")
    # All is (N, K) from here. An unused slot reads token 0, then is -inf: probability 0.
    x = logits.gather(1, support.long().clamp(min=0)).masked_fill(support < 0, -torch.inf)
    is_label = support == labels[:, None]
    slot = is_label.int().argmax(dim=1)             # where the label is; 0 if it is nowhere
    logp, H = logprobs_and_entropy(x, slot, temperature=temperature, impl=impl)
    return logp.masked_fill(~is_label.any(dim=1), -torch.inf), H


@functools.cache
def say_once(path):
    with contextlib.suppress(OSError):                   # nobody may be listening any more
        print(f"kernels.py: log-probabilities and entropies by the {path}", file=sys.stderr)


def check(logits, labels, positions, temperature):
    """A ValueError for what does not fit. Looks at values only where nobody has to wait."""
    shape = list(logits.shape)
    if len(shape) != 2 or shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {shape}; expected floats, (N, V)")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    n = shape[0] if positions is None else positions.numel()
    look = logits.device.type == "cpu" and not torch.compiler.is_compiling()
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
