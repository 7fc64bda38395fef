"""How fast is it, and what does it move? Three benchmarks in one command.

    python lab/bench.py                    # the kernel, then one update of every policy
    python lab/bench.py kernel             # correct? then time, bandwidth and memory on a GPU
    python lab/bench.py update --shape llada-8b
    python lab/bench.py update --model FOLDER --trust_remote_code
    python lab/bench.py count              # bytes and FLOPs of an 8B model, without running it

kernel   kernels.py beside eager PyTorch, torch.compile, Liger's cross entropy if installed, and
         a plain copy, on random logits of LLaDA's vocabulary: medians of triton's do_bench with
         20th and 80th percentile, then the bars the kernel has to clear. Without a GPU only
         whether it is correct, in Triton's interpreter.
update   seconds of one rollout and of one loss (forward and backward of B k pairs) by the plain
         policy and those of lab/policies.py, with the same random weights, pairs and draws, in
         turn; and by a baseline that does it the official code's way: LM head in the model's
         dtype on all positions, one forward a timestep. For nobody does a row end early or a
         group have no gradient. Without optimizer and grading, which are the same for all.
count    the operators of a rollout step and of a loss pass of an 8B model, on tensors without
         memory: bytes read and written, FLOPs by dtype, and what a model of an H100 takes for
         them; with float32 adapters as peft leaves them and under agrpo.py's bf16 autocast.
"""
import argparse
import contextlib
import copy
import functools
import itertools
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # read when triton is first imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import agrpo
import kernels
from kernels import logprobs_and_entropy

# ==============================================================================================
# kernel
# ==============================================================================================

V, T = 126464, 0.6
SIZES = 24, 96, 512, 2048, 8192        # rows: a training micro-batch, a rollout step, and up
PASSES = {"forward": 1, "backward": 2, "both": 3}      # over the logits, at least


def bench_kernel(args):
    if not kernels.HAVE_TRITON:
        print("Triton is not installed: kernels.py runs its reference, nothing to measure")
        return
    check_kernel("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        print("no CUDA device: that was Triton's interpreter; times are not measured")
        return
    import triton
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    copy_gbs = 2 * source.nbytes / 1e6 / ms
    del source, target
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
          f"{triton.__version__}, copy {copy_gbs:.0f} GB/s; V = {V}, T = {T}\n")
    print(f"{'dtype':9s}{'rows':>5s} {'':17s}{'us':>9s} {'[p20, p80]':20s}{'GB/s':>6s}"
          f"{'of copy':>9s}{'extra MB':>10s}")
    results = {}
    for dtype, N in itertools.product(BARS, SIZES):
        # Two buffers take turns, and do_bench empties the L2 cache before every call.
        buffers = [torch.randn(N, V, device="cuda", dtype=dtype, requires_grad=True)
                   for _ in range(2)]
        labels = torch.randint(V, (N,), device="cuda")
        torch._dynamo.reset()                           # every shape is compiled for itself
        for name, call in implementations().items():
            try:
                measured = measure_kernel(triton, call, buffers, labels)
            except torch.OutOfMemoryError:
                print(f"{str(dtype)[6:]:9s}{N:5d} {name:8s} out of memory")
                continue
            for phase, (us, p20, p80, mb) in measured.items():
                gbs = PASSES[phase] * buffers[0].nbytes / 1e3 / us
                share, spread = gbs / copy_gbs, f"[{p20:.1f}, {p80:.1f}]"
                results[dtype, N, name, phase] = us, share, mb
                print(f"{str(dtype)[6:]:9s}{N:5d} {name:8s} {phase:8s}{us:9.1f} {spread:20s}"
                      f"{gbs:6.0f}{share:9.0%}{mb:10.2f}")
    print_bars(results)


def check_kernel(device):
    """Errors against float64 on ragged, strided, truncated rows; ends if a bar is missed."""
    # The interpreter truncates float32 to bfloat16 where a GPU rounds: twice the error.
    rounding = 2**-8 if device == "cuda" else 2**-7
    for dtype, dx_bar in ((torch.float32, 1e-6), (torch.bfloat16, rounding)):
        rng = torch.Generator().manual_seed(0)
        x = (4 * torch.randn(6, 50257, generator=rng)).to(device, dtype)[::2]       # V is odd
        x[0, 100:], x[2, :9000] = -torch.inf, -torch.inf
        labels = torch.tensor([50, 50256, 9001], device=device)
        g = torch.randn(2, 3, generator=rng).to(device)             # gradients of logp and H
        results = []
        for impl, logits in (("triton", x), ("reference", x.double())):
            logits = logits.detach().requires_grad_()
            out = logprobs_and_entropy(logits, labels, temperature=T, impl=impl)
            results.append([*out, *torch.autograd.grad(out, logits, list(g.to(out[0].dtype)))])
        (logp, H, dx), (logp64, H64, dx64) = results
        errors = {"logp": ((logp - logp64) / (1 + logp64.abs()), 1e-6), "H": (H - H64, 5e-6),
                  "dlogits": ((dx - dx64) * T / g.abs().sum(0)[:, None], dx_bar)}
        for name, (error, bar) in errors.items():
            worst = error.abs().max().item()
            print(f"{str(dtype)[6:]:9s} error of {name:8s}{worst:8.1e}   bar {bar:.1e}")
            if not worst <= bar:
                raise SystemExit("a bar is missed")


@functools.cache
def implementations():
    """{name: f(logits, labels) -> tuple of (N,)}, what is installed of it."""
    import torch._functorch.config
    torch._functorch.config.donated_buffer = False      # it refuses retain_graph=True
    eager = functools.partial(kernels.naive, temperature=T)
    calls = {"ours": functools.partial(logprobs_and_entropy, temperature=T, impl="triton"),
             "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss
        # Log-probability only, T = 1. Its forward overwrites the logits with their gradient: so
        # it comes last, and only forward and backward together compare.
        cross_entropy = LigerCrossEntropyLoss(reduction="none")
        calls["liger"] = lambda x, labels: (cross_entropy(x, labels),)
    except ImportError:
        print("Liger-Kernel is not installed: not measured")
    return calls


def measure_kernel(triton, call, buffers, labels):
    """{phase: (median us, p20, p80, peak MB beyond what was there, results included)}"""
    turn = itertools.cycle(range(len(buffers)))
    outputs = [call(x, labels) for x in buffers]
    grads = [torch.randn_like(out) for out in outputs[0]]

    def forward():
        return call(buffers[next(turn)], labels)

    def backward():
        i = next(turn)
        return torch.autograd.grad(outputs[i], buffers[i], grads, retain_graph=True)

    def both():
        x = buffers[next(turn)]
        return torch.autograd.grad(call(x, labels), x, grads)

    measured, stat = {}, "requested_bytes.all."
    for run in (forward, backward, both):
        times = triton.testing.do_bench(run, quantiles=[0.5, 0.2, 0.8])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()[stat + "current"]
        result = run()                                  # lives until the peak is read
        extra = torch.cuda.memory_stats()[stat + "peak"] - before
        del result
        measured[run.__name__] = (*(1000 * ms for ms in times), extra / 1e6)
    return measured


def bars(eager_forward, eager_backward):
    """What the kernel promises: a share of the copy, a factor over another implementation."""
    return [("forward", "copy", 0.75), ("backward", "copy", 0.80),
            ("forward", "eager", eager_forward), ("backward", "eager", eager_backward),
            ("forward", "compile", 1.0), ("backward", "compile", 0.95), ("both", "liger", 1.2)]


# Rows of float32 are what agrpo.py passes; there eager PyTorch moves fewer times our bytes.
BARS = {torch.bfloat16: bars(12, 10), torch.float32: bars(6, 6)}


def print_bars(results):
    nan = (float("nan"),) * 3
    for dtype, promised in BARS.items():
        def get(N, name, phase):
            return results.get((dtype, N, name, phase), nan)
        print()
        for phase, other, bar in promised:
            ours = get(2048, "ours", phase)
            if other == "copy":
                what = "share of the copy, worse of 2048 and 8192 rows"
                value = min(ours[1], get(8192, "ours", phase)[1])
            else:
                what = f"{other} / ours, 2048 rows"
                value = get(2048, other, phase)[0] / ours[0]
            print_bar(dtype, f"{phase}: {what}", value, bar)
        # Memory: 32 bytes a row in the forward, a gradient of the logits in the backward, 1 MB.
        for phase, a_row in (("forward", 32), ("backward", V * dtype.itemsize)):
            left = [N * a_row / 1e6 + 1 - get(N, "ours", phase)[2] for N in SIZES]
            print_bar(dtype, f"{phase}: MB left of the memory allowed", min(left), 0)


def print_bar(dtype, what, value, bar):
    verdict = "not measured" if value != value else "holds" if value >= bar else "MISSED"
    print(f"{str(dtype)[6:]:9s} {what:58s}{value:8.2f}   must be >= {bar:<5} {verdict}")


# ==============================================================================================
# A model with random weights
# ==============================================================================================

# hidden size, intermediate size, layers, heads, heads of keys and values, vocabulary
SHAPES = {"tiny": (64, 192, 2, 4, 4, 1000), "small": (512, 1536, 8, 8, 8, 16384),
          "qwen-0.6b": (1024, 3072, 28, 16, 8, 151936),
          "llada-8b": (4096, 12288, 32, 32, 32, V)}
MASK, EOS = 2, 1


def build(shape, dtype, device):
    """(model, tokenizer): a Qwen3 of random weights whose tokens all see each other."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    numbers = SHAPES.get(shape) or tuple(int(n) for n in shape.split(",") if n.isdigit())
    if len(numbers) != 6:
        raise agrpo.UserError(f"--shape {shape}: choose from {', '.join(SHAPES)}, or give six "
                              "numbers with commas between them, which --help names")
    hidden, intermediate, layers, heads, kv_heads, vocabulary = numbers
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads,
        vocab_size=vocabulary, tie_word_embeddings=False, use_cache=False,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=EOS)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)
    model.model.register_forward_pre_hook(all_see_all, with_kwargs=True)
    words = SimpleNamespace(eos_token_id=EOS, pad_token_id=EOS,
                            get_vocab=lambda: {str(i): i for i in range(vocabulary)})
    return model, words


def all_see_all(module, args, kwargs):
    """A mask of four dimensions is taken as it is: no causal triangle is added to it."""
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        kwargs["attention_mask"] = mask[:, None, None, :].bool()
    return args, kwargs


def the_model(args):
    """(model, tokenizer, an id for [MASK]): of the folder, or random weights of the shape."""
    dtype = getattr(torch, args.dtype)
    if not args.model:
        return *build(args.shape, dtype, args.device), MASK
    cfg = agrpo.Config(model=args.model, dtype=args.dtype, device=args.device,
                       trust_remote_code=args.trust_remote_code)
    model, tokenizer = agrpo.load_model(cfg)
    return model, tokenizer, MASK                       # to a clock any id is [MASK]


# ==============================================================================================
# update
# ==============================================================================================

class OfficialWay(agrpo.Policy):
    """The head in the model's own dtype on every position, as the official code calls it."""

    def __init__(self, model, tokenizer, mask_id, device="cpu"):
        super().__init__(model, tokenizer, mask_id, device)
        head = model.get_output_embeddings()
        head.weight.data = head.weight.data.to(self.dtype)

    def __call__(self, ids, mask, positions, block=None):
        N, L = ids.shape
        everywhere = torch.arange(L, device=ids.device).expand(N, L)
        logits = self.logits(ids, mask, everywhere)                         # (N, L, V)
        return logits[torch.arange(N, device=ids.device)[:, None], positions].float()


def one_pass_a_timestep(policy, traj, A, pairs, micro_batch):
    """agrpo.add_gradient for a plain policy, but each forward is the rows' j-th timestep."""
    B = len(A)
    for pass_j in zip(*(x.split(B) for x in pairs)):
        for rows, steps, w in zip(*(x.split(micro_batch) for x in pass_j)):
            logp, logp_old = agrpo.step_logprobs(policy, traj, rows, steps)
            J, ratio = agrpo.clipped_objective(logp, logp_old, A[rows, None].to(logp), 0.2)
            loss = -(w.to(logp) * J.sum(dim=1)).sum() / (B * traj.how.m)
            loss.backward()
    return ratio


def policies(args):
    """{name: policy}, each on modules of its own, all on the same weights."""
    model, tokenizer, mask_id = the_model(args)
    kinds = {"official way": OfficialWay, "Policy": agrpo.Policy}
    file = Path(__file__).with_name("policies.py")
    for name in filter(None, args.policies.split(",")):
        kinds[name] = agrpo.import_file(f"{file}:{name}", "--policies")
    cfg = agrpo.Config(lora_r=args.lora_r, lora_alpha=args.lora_r, recompute=args.recompute)
    made = {}
    for name, kind in kinds.items():
        shared = {id(p): p for p in model.parameters()}                     # not copied
        try:
            policy = kind(copy.deepcopy(model, shared), tokenizer, mask_id, args.device)
        except agrpo.UserError as e:
            print(f"{name} is left out: {e}")
            continue
        agrpo.add_adapters(policy, cfg)
        policy.eos_id, policy.fill_ids = -1, {-1}                           # nothing ends early
        made[name] = policy
    return made


def bench_update(args):
    try:
        how = agrpo.Decoding(args.C, args.m, args.block_length, temperature=0.6,
                             top_k=args.top_k, top_p=0.99 if args.top_k else 1.0)
    except ValueError as e:
        raise agrpo.UserError(str(e)) from e
    if not 1 <= args.k <= args.m:
        raise agrpo.UserError(f"--k {args.k}: choose from 1 to --m {args.m}")
    everyone = policies(args)
    plain = everyone["Policy"]
    size = sum(p.numel() for p in plain.model.parameters() if not p.requires_grad)
    where = f"cpu ({torch.get_num_threads()} threads)"
    if torch.device(args.device).type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"one update on {where}, torch {torch.__version__}: {args.model or args.shape}, "
          f"{size / 1e6:.0f} M parameters, {args.dtype}, LoRA r {args.lora_r}"
          + ", activations recomputed" * args.recompute
          + f"\nB {args.B}, P {args.P}, C {args.C}, m {args.m}, block {args.block_length}, "
          f"k {args.k}, "
          f"micro_batch {args.micro_batch}, top_k {args.top_k}, rounds {args.rounds}")

    # The same question ids, pairs and draws for everybody: k steps of each row, none twice.
    rng = torch.Generator().manual_seed(0)
    vocabulary = plain.model.get_input_embeddings().weight.shape[0]
    q = torch.randint(3, vocabulary, (args.B, args.P), generator=rng).to(args.device)
    A = torch.linspace(-1, 1, args.B, dtype=torch.float64).to(args.device)
    steps = torch.rand(args.B, how.m, generator=rng).argsort(dim=1)[:, :args.k]
    rows, steps = torch.arange(args.B).repeat(args.k), steps.t().flatten()
    pairs = [x.to(args.device) for x in (rows, steps, torch.full(rows.shape, how.m / args.k))]
    seconds = {name: [] for name in everyone}
    warm_up = int(q.is_cuda)
    for _ in range(warm_up + args.rounds):
        for name, policy in everyone.items():
            seconds[name].append(one_update(policy, q, A, pairs, how, args.micro_batch))
    print_updates({name: runs[warm_up:] for name, runs in seconds.items()})


def one_update(policy, q, A, pairs, how, micro_batch):
    """Seconds of rollout and of loss, max |rho - 1|, peak GiB."""
    cuda = q.is_cuda
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    wait()
    start = time.perf_counter()
    traj = agrpo.rollout(policy, q, torch.ones_like(q), how, agrpo.row_random(range(len(q))))
    wait()
    rolled = time.perf_counter()
    if isinstance(policy, OfficialWay):
        ratio = one_pass_a_timestep(policy, traj, A, pairs, micro_batch)
    else:
        ratio = agrpo.add_gradient(policy, traj, A, pairs, micro_batch=micro_batch).ratio
    wait()
    end = time.perf_counter()
    policy.model.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return rolled - start, end - rolled, (ratio - 1).abs().max().item(), peak


def print_updates(seconds):
    """A line a policy: median [least, most] seconds, and the speed relative to the first."""
    print(f"\n{'':19s}{'rollout, s':24s}{'loss, s':24s}{'times as fast: rollout':>22s}"
          f"{'loss':>6s}{'update':>8s}{'max|rho-1|':>12s}{'GiB':>5s}")
    first = None
    for name, runs in seconds.items():
        rollout, loss, off, peak = zip(*runs)
        update = [a + b for a, b in zip(rollout, loss)]
        medians = [statistics.median(x) for x in (rollout, loss, update)]
        first = first or medians
        a, b, c = (base / ours for base, ours in zip(first, medians))
        print(f"{name:19s}{spread(rollout):24s}{spread(loss):24s}{a:22.2f}{b:6.2f}{c:8.2f}"
              f"{max(off):12.0e}{max(peak):5.0f}")


def spread(values):
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


# ==============================================================================================
# count
# ==============================================================================================

# A model of an H100: bytes and FLOPs a second that large operators reach. Assumed.
BANDWIDTH = 3.0e12
PEAK = {2: 600e12, 4: 50e12}                            # by bytes a number; no TF32


class Count(TorchDispatchMode):
    """Adds up what every operator reads and writes, and its FLOPs. Views cost nothing."""

    def __init__(self):
        super().__init__()
        self.bytes, self.ms, self.flops = 0, 0.0, Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace != "aten" or op.is_view or op in VIEWS:
            return out
        if op == torch.ops.aten.embedding.default:
            args = (out, *args[1:])                     # it reads a few rows of the table
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        # An expanded tensor is no larger than its memory.
        moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
        size, flops = tensors[0].itemsize, 0
        if op._overloadpacket in flop_registry:
            flops = flop_registry[op._overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.flops[size] += flops
        self.bytes += moved
        self.ms += 1e3 * max(moved / BANDWIDTH, flops / PEAK.get(size, PEAK[4]))
        return out


VIEWS = (torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default)


def bench_count(args):
    from torch._subclasses.fake_tensor import FakeTensorMode
    shape = "llada-8b" if args.shape == "small" else args.shape
    policy = agrpo.Policy(*build(shape, torch.bfloat16, "meta"), MASK, "cpu")
    agrpo.add_adapters(policy, agrpo.Config(lora_r=64, lora_alpha=64))
    print(f"{shape}, bfloat16, LoRA r 64, plain policy, 584 tokens a row, 3 of them scored.\n"
          f"ms: assuming {BANDWIDTH / 1e12} TB/s, {PEAK[2] / 1e12:.0f} TFLOP/s in 16 bits and "
          f"{PEAK[4] / 1e12:.0f} in float32\n\n{'':61s}{'GB':>6s}{'TFLOP 16 bit':>14s}"
          f"{'float32':>9s}{'ms':>6s}")
    with FakeTensorMode():
        # Tensors on "meta" have no autocast. These have no memory either, but a device.
        for module in policy.model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                fake = torch.empty(p.shape, dtype=p.dtype)
                setattr(module, name, torch.nn.Parameter(fake, p.requires_grad))
            for name, b in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(b.shape, dtype=b.dtype))
        for what, rows in (("rollout step, 16 rows", 16), ("loss pass, 4 rows", 4)):
            for name in ("no adapters", "float32 adapters", "the same under bf16 autocast"):
                if rows == 4 and name == "no adapters":
                    continue                            # then there is nothing to differentiate
                count = count_pass(policy, rows, name, backward=rows == 4)
                half, single = count.flops[2] / 1e12, count.flops[4] / 1e12
                print(f"{what:25s}{name:36s}{count.bytes / 1e9:6.0f}{half:14.1f}{single:9.2f}"
                      f"{count.ms:6.0f}")


def count_pass(policy, rows, name, backward, L=584, W=3):
    """One forward of rows of L tokens, W of them scored, and if asked its backward."""
    autocast = name.endswith("autocast")
    for module in policy.model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = not autocast      # on as peft leaves it
    policy.autocast = contextlib.nullcontext
    if autocast:
        policy.autocast = functools.partial(agrpo.Policy.autocast, policy)
    ids, mask = torch.zeros(2, rows, L, dtype=torch.int64).unbind()
    positions = torch.zeros(rows, W, dtype=torch.int64)
    context = policy.reference() if name == "no adapters" else contextlib.nullcontext()
    with torch.set_grad_enabled(backward), context, Count() as count:
        logits = policy(ids, mask, positions)
        if backward:
            logits.sum().backward()
    policy.model.zero_grad()
    return count


# ==============================================================================================

def main(argv=None):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", help="kernel, update, count [kernel update]")
    add = functools.partial(parser.add_argument, help="[%(default)s]")
    add("--shape", default="small", help="of random weights: " + ", ".join(SHAPES)
        + ", or HIDDEN,INTERMEDIATE,LAYERS,HEADS,KV_HEADS,VOCABULARY [%(default)s]")
    add("--model", default="", help="a folder or hub id instead of a shape")
    add("--trust_remote_code", action="store_true", help="run the code that comes with --model")
    add("--policies", default="BlockCausal,FrozenBlockCausal,FrozenContext",
        help="classes of lab/policies.py [%(default)s]")
    add("--device", default="cuda" if cuda else "cpu")
    add("--dtype", default="bfloat16" if cuda else "float32")
    for name, default in dict(B=8, P=200, C=96, m=32, block_length=12, k=6, micro_batch=8,
                              top_k=150, lora_r=64, rounds=3).items():
        add(f"--{name}", type=int, default=default)
    add("--recompute", action="store_true", help="activations in the backward pass")
    args = parser.parse_args(argv)
    kinds = {"kernel": bench_kernel, "update": bench_update, "count": bench_count}
    for what in args.what or ["kernel", "update"]:
        if what not in kinds:
            raise agrpo.UserError(f"{what} is no benchmark: choose from {', '.join(kinds)}")
        kinds[what](args)


if __name__ == "__main__":
    sys.exit(agrpo.in_one_sentence(main))
