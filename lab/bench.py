"""How fast is it, and what does it move? Three benchmarks in one command.

    bash run.sh bench                      the kernel, then one update of every policy
    bash run.sh bench kernel               correct? then time, bandwidth and memory on a GPU
    bash run.sh bench update --shape llada-8b
    bash run.sh bench update --model FOLDER --trust_remote_code
    bash run.sh bench count                bytes and FLOPs of an 8B model, and on a GPU its time

kernel   kernels.py beside eager PyTorch, torch.compile, Liger and TRL if installed, and
         a plain copy, on random logits of LLaDA's vocabulary, then the bars it has to clear.
         Without a GPU only whether it is correct, in Triton's interpreter.
update   seconds of one rollout and of one loss (forward and backward of B k pairs) by each
         policy, with the same random weights, pairs and draws, in turn; and the official code's
         way: LM head in the model's dtype on all positions, one forward a timestep, no two rows
         in one. For nobody does a row end early or a group have no gradient. Then the same
         beside the official way at equal variance: with as few timesteps of ours, --equal_k.
count    a rollout step and a loss pass of an 8B model on tensors without memory: bytes read and
         written, FLOPs by dtype, and what a model of an H100 takes for them; with float32
         adapters as peft leaves them and under agrpo.py's bf16 autocast. On a GPU the
         milliseconds that they do take stand beside that.
"""
import contextlib
import copy
import itertools
import math
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    # Read when triton is first imported, as flop_counter does.
    os.environ.setdefault("TRITON_INTERPRET", "1")
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import agrpo
import kernels
import models
import run
from kernels import logprobs_and_entropy
from tasks import TaskError

# --- kernel -----------------------------------------------------------------------------------

V, T = 126464, 0.6
SIZES = 24, 96, 512, 2048, 8192        # rows: a training micro-batch, a rollout step, and up
PASSES = {"forward": 1, "backward": 2, "both": 3}      # over the logits, at least
# What the kernel promises: a share of the copy's speed, a factor over another implementation,
# for rows of bfloat16 and of float32, which is what agrpo.py passes; there eager PyTorch moves
# fewer times our bytes.
BARS = [("forward", "copy", 0.75, 0.75), ("backward", "copy", 0.80, 0.80),
        ("forward", "eager", 12, 6), ("backward", "eager", 10, 6),
        ("forward", "compile", 1.0, 1.0), ("backward", "compile", 0.95, 0.95),
        ("both", "liger", 1.2, 1.2), ("both", "trl", 1.0, 1.0)]
DTYPES = torch.bfloat16, torch.float32


def bench_kernel(args, cfg):
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
    for dtype, N, (name, call) in itertools.product(DTYPES, SIZES, implementations().items()):
        row = f"{str(dtype)[6:]:9s}{N:5d} {name:8s}"
        torch._dynamo.reset()                           # every shape is compiled for itself
        try:
            measured = measure_kernel(triton, call, dtype, N)
        except torch.OutOfMemoryError:
            print(row, "out of memory")
            continue
        for phase, (us, p20, p80, mb) in measured.items():
            gbs = PASSES[phase] * N * V * dtype.itemsize / 1e3 / us
            results[dtype, N, name, phase] = us, gbs / copy_gbs, mb
            between = f"[{p20:.1f}, {p80:.1f}]"
            print(f"{row} {phase:8s}{us:9.1f} {between:20s}{gbs:6.0f}{gbs / copy_gbs:9.0%}"
                  f"{mb:10.2f}")
    print_bars(results)


def check_kernel(device):
    """Errors against float64 on ragged, strided, truncated rows; ends if a bar is missed."""
    # The interpreter truncates float32 to bfloat16 where a GPU rounds: twice the error.
    rounding = 2**-8 if device == "cuda" else 2**-7
    for dtype, dx_bar in zip(DTYPES, (rounding, 1e-6)):
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
        for name, error, bar in (
                ("logp", (logp - logp64) / (1 + logp64.abs()), 1e-6), ("H", H - H64, 5e-6),
                ("dlogits", (dx - dx64) * T / g.abs().sum(0)[:, None], dx_bar)):
            worst = error.abs().max().item()
            print(f"{str(dtype)[6:]:9s} error of {name:8s}{worst:8.1e}   bar {bar:.1e}")
            if not worst <= bar:
                raise SystemExit("a bar is missed")


def implementations():
    """{name: f(logits, labels) -> tuple of (N,)}, what is installed of it."""
    import torch._functorch.config
    torch._functorch.config.donated_buffer = False      # it refuses retain_graph=True
    eager = partial(kernels.naive, temperature=T)
    calls = {"ours": partial(logprobs_and_entropy, temperature=T, impl="triton"),
             "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss
        # Log-probability only, T = 1. Its forward overwrites the logits with their gradient,
        # so only forward and backward together compare.
        cross_entropy = LigerCrossEntropyLoss(reduction="none")
        calls["liger"] = lambda x, labels: (cross_entropy(x, labels),)
    except ImportError:
        print("Liger-Kernel is not installed: not measured")
    try:
        # No pip package: kernels/torch-ext of huggingface/trl, put on PYTHONPATH.
        from trl_losses import selective_log_softmax_and_entropy
        calls["trl"] = partial(selective_log_softmax_and_entropy, temperature=T)
    except ImportError:
        print("trl-losses, TRL's fused kernel, is not installed: not measured")
    return calls


def measure_kernel(triton, call, dtype, N):
    """{phase: (median us, p20, p80, peak MB beyond what was there, results included)}"""
    # Two buffers take turns, and do_bench empties the L2 cache before every call.
    torch.manual_seed(0)
    buffers = [torch.randn(N, V, device="cuda", dtype=dtype, requires_grad=True)
               for _ in range(2)]
    labels, turn = torch.randint(V, (N,), device="cuda"), itertools.cycle(range(2))
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
    for phase in (forward, backward, both):
        times = triton.testing.do_bench(phase, quantiles=[0.5, 0.2, 0.8])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()[stat + "current"]
        result = phase()                                # lives until the peak is read
        extra = torch.cuda.memory_stats()[stat + "peak"] - before
        del result
        measured[phase.__name__] = (*(1000 * ms for ms in times), extra / 1e6)
    return measured


def print_bars(results):
    """results {(dtype, rows, name, phase): (us, share of the copy, extra MB)}"""
    nothing = (math.nan,) * 3
    for i, dtype in enumerate(DTYPES):
        found = {key[1:]: x for key, x in results.items() if key[0] == dtype}
        lines = []
        for phase, other, *bars in BARS:
            what, ours = f"{other} / ours, 2048 rows", found.get((2048, "ours", phase), nothing)
            value = found.get((2048, other, phase), nothing)[0] / ours[0]
            if other == "copy":
                what = "share of the copy, worse of 2048 and 8192 rows"
                value = min(ours[1], found.get((8192, "ours", phase), nothing)[1])
            lines.append((f"{phase}: {what}", value, bars[i]))
        # Memory: 32 bytes a row in the forward, a gradient of the logits in the backward, 1 MB.
        for phase, a_row in (("forward", 32), ("backward", V * dtype.itemsize)):
            left = min(N * a_row / 1e6 + 1 - found.get((N, "ours", phase), nothing)[2]
                       for N in SIZES)
            lines.append((f"{phase}: MB left of the memory allowed", left, 0))
        print()
        for what, value, bar in lines:
            verdict = "holds" if value >= bar else "MISSED"
            verdict = "not measured" if math.isnan(value) else verdict
            print(f"{str(dtype)[6:]:9s} {what:58s}{value:8.2f}   must be >= {bar:<5} {verdict}")


# --- A model with random weights --------------------------------------------------------------

# hidden size, intermediate size, layers, heads, heads of keys and values, vocabulary
SHAPES = {"tiny": (64, 192, 2, 4, 4, 1000), "small": (512, 1536, 8, 8, 8, 16384),
          "qwen-0.6b": (1024, 3072, 28, 16, 8, 151936),
          "llada-8b": (4096, 12288, 32, 32, 32, V)}
MASK, EOS = 2, 1


def build(shape, dtype, device):
    """(model, tokenizer): a Qwen3 of random weights whose tokens all see each other."""
    from transformers import AutoModelForCausalLM, Qwen3Config
    numbers = SHAPES.get(shape) or tuple(int(n) for n in shape.split(",") if n.isdigit())
    if len(numbers) != 6:
        raise TaskError(f"--shape {shape}: choose from {', '.join(SHAPES)}, or give six "
                              "numbers with commas between them, which --help names")
    hidden, intermediate, layers, heads, kv_heads, vocabulary = numbers
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads,
        vocab_size=vocabulary, tie_word_embeddings=False, use_cache=False,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=EOS)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
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


# --- update -----------------------------------------------------------------------------------

class OfficialWay(agrpo.Policy):
    """The head in the model's own dtype on every position, as the official code calls it."""

    def __init__(self, model, tokenizer, mask_id, device="cpu"):
        super().__init__(model, tokenizer, mask_id, device)
        head = model.get_output_embeddings()
        head.weight.data = head.weight.data.to(self.dtype)

    def __call__(self, ids, mask, positions, block=None):
        with self.autocast():
            logits = self.model(input_ids=ids, attention_mask=mask).logits  # (N, L, V)
        row = torch.arange(len(ids), device=ids.device)[:, None]
        return logits[row, positions - self.shift].float()


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


def policies(args, cfg):
    """{name: policy}, each on modules of its own, all on the same weights."""
    if args.model:
        model, tokenizer = models.load_model(replace(cfg, model=args.model))
    else:
        model, tokenizer = build(args.shape, getattr(torch, cfg.dtype), cfg.device)
    kinds = {"official way": OfficialWay, "Policy": agrpo.Policy}
    file = Path(__file__).with_name("policies.py")
    for name in filter(None, args.policies.split(",")):
        kinds[name] = models.import_file(f"{file}:{name}", "--policies")
    made, shared = {}, {id(p): p for p in model.parameters()}               # not copied
    for name, kind in kinds.items():
        try:
            own = copy.deepcopy(model, dict(shared))
            policy = made[name] = kind(own, tokenizer, MASK, cfg.device)
        except TaskError as e:
            print(f"{name} is left out: {e}")
            continue
        models.add_adapters(policy, cfg)
        policy.eos_id, policy.fill_ids = -1, {-1}                           # nothing ends early
    return made


# With these shares of its timesteps AGRPO has the variance of the official sampler, as `bash
# run.sh lab variance` found: the tiny model at k = 4, random weights at k = 24 of m = 128.
EQUAL = 0.15, 0.5


def bench_update(args, cfg):
    if cfg.k % 1:
        raise TaskError(f"--k {cfg.k:g}: each row has as many timesteps here, give a whole one")
    few = [args.equal_k] if args.equal_k else [share * cfg.k for share in EQUAL]
    everyone = policies(args, cfg)
    model = everyone["Policy"].model
    size = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    weights = model.get_input_embeddings().weight
    where = f"cpu ({torch.get_num_threads()} threads)"
    if weights.is_cuda:
        where = torch.cuda.get_device_name()
    print(f"one update on {where}, torch {torch.__version__}: {args.model or args.shape}, "
          f"{size / 1e6:.0f} M parameters, {cfg.dtype}, LoRA r {cfg.lora_r}"
          + ", activations recomputed" * cfg.recompute
          + f"\nB {args.B}, P {args.P}, C {cfg.C}, m {cfg.m}, block {cfg.block_length}, "
          f"k {cfg.k:g}, micro_batch {cfg.micro_batch}, top_k {cfg.top_k}, rounds "
          f"{args.rounds}")

    # The same question ids, pairs and draws for everybody: k evenly spaced steps of each row,
    # so that with k blocks each has B pairs. First all rows' first step, then their second.
    rng = torch.Generator().manual_seed(0)
    q = torch.randint(3, len(weights), (args.B, args.P), generator=rng).to(cfg.device)
    A = torch.linspace(-1, 1, args.B, dtype=torch.float64).to(cfg.device)
    pairs = [x.reshape(args.B, -1).t().flatten() for x in evenly(args.B, cfg.m, round(cfg.k))]
    pairs, *fewer = ([x.to(cfg.device) for x in each]
                     for each in (pairs, *(evenly(args.B, cfg.m, k) for k in few)))
    runs = {name: [] for name in everyone}
    for _ in range(weights.is_cuda + args.rounds):      # the first on a GPU warms it up
        for name, policy in everyone.items():
            runs[name].append(one_update(policy, q, A, pairs, fewer, cfg))
    runs = {name: found[-args.rounds:] for name, found in runs.items()}
    print_updates({name: [timed for timed, _ in found] for name, found in runs.items()})
    for i, k in enumerate(few):
        print_equal({name: [(rollout, equal[i]) for (rollout, *_), equal in found]
                     for name, found in runs.items()}, k)


def evenly(B, m, k):
    """About B k pairs, as many of each row, evenly spaced through its steps: rows, steps, w."""
    p = torch.full((B, m), 1 / (B * m), dtype=torch.float64)
    return agrpo.sample_timesteps(p, max(1, round(B * k)), 0.5)


def now():
    """Seconds, when what the GPU was given is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def one_update(policy, q, A, pairs, fewer, cfg):
    """Seconds of rollout and of loss, max |rho - 1|, GiB at the peak beside the weights; and
    seconds of the loss of each of `fewer` pairs, which the official way has not."""
    if q.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start, rand = now(), agrpo.row_random(range(len(q)))
    traj = agrpo.rollout(policy, q, torch.ones_like(q), cfg.how, rand)
    rolled = now()
    if isinstance(policy, OfficialWay):
        ratio = one_pass_a_timestep(policy, traj, A, pairs, cfg.micro_batch)
    else:
        ratio = agrpo.add_gradient(policy, traj, A, pairs, cfg.eps, cfg.micro_batch).ratio
    end = now()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if q.is_cuda else 0.0
    equal = [end - rolled] * len(fewer)
    if not isinstance(policy, OfficialWay):
        for i, few in enumerate(fewer):
            began = now()
            agrpo.add_gradient(policy, traj, A, few, cfg.eps, cfg.micro_batch)
            equal[i] = now() - began
    policy.model.zero_grad(set_to_none=True)
    timed = rolled - start, end - rolled, (ratio - 1).abs().max().item(), peak
    return timed, equal


def print_updates(runs):
    """A line a policy: median [least, most] seconds, and the speed relative to the first."""
    def spread(values):
        return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"

    print(f"\n{'':19s}{'rollout, s':24s}{'loss, s':24s}{'times as fast: rollout':>22s}"
          f"{'loss':>6s}{'update':>8s}{'max|rho-1|':>12s}{'GiB':>6s}")
    first = None
    for name, found in runs.items():
        rollout, loss, off, peak = zip(*found)
        update = [a + b for a, b in zip(rollout, loss)]
        medians = [statistics.median(x) for x in (rollout, loss, update)]
        first = first or medians
        a, b, c = (base / ours for base, ours in zip(first, medians))
        print(f"{name:19s}{spread(rollout):24s}{spread(loss):24s}{a:22.2f}{b:6.2f}{c:8.2f}"
              f"{max(off):12.0e}{max(peak):6.1f}")


def print_equal(runs, equal_k):
    """The same with as many pairs as the first's variance takes: {name: [(rollout, loss)]}"""
    print(f"\nat equal variance, {equal_k:.3g} timesteps a row but for the first: seconds of "
          f"rollout and loss, times as fast\n{'':19s}{'rollout':>8s}{'loss':>8s}{'loss':>14s}"
          f"{'update':>8s}")
    first = None
    for name, found in runs.items():
        rollout, loss, update = (statistics.median(x) for x in zip(
            *((a, b, a + b) for a, b in found)))
        first = first or (loss, update)
        print(f"{name:19s}{rollout:8.2f}{loss:8.2f}{first[0] / loss:14.2f}"
              f"{first[1] / update:8.2f}")


# --- count ------------------------------------------------------------------------------------

# A model of an H100: bytes and FLOPs a second that large operators reach. Assumed.
BANDWIDTH = 3.0e12
PEAK = {2: 600e12, 4: 50e12}                            # by bytes a number; no TF32
FREE = (torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default)


class Count(TorchDispatchMode):
    """Adds up what every operator reads and writes, and its FLOPs. Views cost nothing."""

    def __init__(self):
        super().__init__()
        self.bytes, self.ms, self.flops = 0, 0.0, Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace != "aten" or op.is_view or op in FREE:
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


def bench_count(args, cfg):
    from torch._subclasses.fake_tensor import FakeTensorMode
    shape, here = "llada-8b" if args.shape == "small" else args.shape, torch.cuda.is_available()
    beside = f"; measured on {torch.cuda.get_device_name()}, median of five" if here else ""
    print(f"{shape}, bfloat16, LoRA r 64, plain policy, 584 tokens a row, 3 of them scored.\n"
          f"ms: assuming {BANDWIDTH / 1e12} TB/s, {PEAK[2] / 1e12:.0f} TFLOP/s in 16 bits and "
          f"{PEAK[4] / 1e12:.0f} in float32{beside}\n\n{'':61s}{'GB':>6s}{'TFLOP 16 bit':>14s}"
          f"{'float32':>9s}{'ms':>6s}" + here * f"{'measured':>10s}")
    policy = counted_policy(shape, "meta")
    real = counted_policy(shape, "cuda") if here else None
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        # Tensors on "meta" have no autocast. These have no memory either, but a device.
        policy.model.to_empty(device="cpu")
    kinds = ("no adapters", "float32 adapters", "the same under bf16 autocast")
    # Without adapters there is nothing to differentiate.
    for what, rows, backward, names in (("rollout step, 16 rows", 16, False, kinds),
                                        ("loss pass, 4 rows", 4, True, kinds[1:])):
        for name in names:
            work = partial(one_pass, rows=rows, name=name, backward=backward)
            with fake, Count() as count:
                work(policy)
            measured = f"{median_ms(partial(work, real)):10.0f}" if here else ""
            half, single = count.flops[2] / 1e12, count.flops[4] / 1e12
            print(f"{what:25s}{name:36s}{count.bytes / 1e9:6.0f}{half:14.1f}{single:9.2f}"
                  f"{count.ms:6.0f}{measured}")


def counted_policy(shape, device):
    model, words = build(shape, torch.bfloat16, device)
    policy = agrpo.Policy(model, words, MASK, "cpu" if device == "meta" else device)
    models.add_adapters(policy, run.parse(["--lora_r", "64"]))
    return policy


def one_pass(policy, rows, name, backward, L=584, W=3):
    """One forward of rows of L tokens, W of them scored, and if asked its backward."""
    autocast = name.endswith("autocast")
    for module in policy.model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = not autocast      # on as peft leaves it
    ids = torch.randint(1000, (rows, L), device=policy.device)
    row, at = torch.arange(rows, device=policy.device)[:, None], ids[:, :W] % L

    def asked(head, args):             # Policy.logits, but for its search for equal rows
        return args[0][row, at].to(head.weight.dtype)
    nothing = contextlib.nullcontext()
    adapters = policy.reference() if name == "no adapters" else nothing
    with torch.set_grad_enabled(backward), adapters:
        with policy.head.register_forward_pre_hook(asked), \
                policy.autocast() if autocast else nothing:
            logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if backward:
            logits.sum().backward()
    policy.model.zero_grad()


def median_ms(work):
    """Median milliseconds of five calls, after two that warm up."""
    times = []
    for _ in range(7):
        start = now()
        work()
        times.append(1e3 * (now() - start))
    return statistics.median(times[2:])


# --- What is typed ----------------------------------------------------------------------------

LIKE_LLADA = ("--C 96 --m 32 --block_length 12 --k 8 --temperature 0.6 --top_k 150 "
              "--top_p 0.99 --micro_batch 8 --lora_r 64").split()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    whats = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    parser = run.Parser(
        prog="bash run.sh bench [kernel] [update] [count]", description=__doc__,
        epilog=f"further flags: those of python lab/run.py --help; here {' '.join(LIKE_LLADA)}")
    parser.add_argument("--shape", default="small", help="of random weights [small]: "
                        + ", ".join(SHAPES) + ", or "
                        "HIDDEN,INTERMEDIATE,LAYERS,HEADS,KV_HEADS,VOCABULARY")
    parser.add_argument("--model", default="", help="a folder or hub id instead of a shape")
    parser.add_argument("--policies", default="BlockCausal,FrozenBlockCausal,FrozenContext",
                        help="classes of lab/policies.py [%(default)s]")
    parser.add_argument("--equal_k", type=float, help="timesteps a row with which AGRPO's "
                        "draws are no noisier than the official way's at --k "
                        f"[{' and '.join(map(str, EQUAL))} of --k]")
    for name, default, about in (("B", 8, "rows"), ("P", 200, "tokens of a prompt"),
                                 ("rounds", 3, "updates of each policy")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} [{default}]")
    args, rest = parser.parse_known_args(argv[len(whats):])
    half = ["--dtype", "bfloat16"] * torch.cuda.is_available()
    cfg = run.parse([*LIKE_LLADA, *half, *rest])
    kinds = {"kernel": bench_kernel, "update": bench_update, "count": bench_count}
    cfg.micro_batch = cfg.micro_batch or args.B             # 0: all rows at once
    for what in whats or ["kernel", "update"]:
        if what not in kinds:
            raise TaskError(f"{what} is no benchmark: choose from {', '.join(kinds)}")
        kinds[what](args, cfg)


if __name__ == "__main__":
    sys.exit(run.in_one_sentence(main))
