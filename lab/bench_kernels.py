"""
How fast is kernels.py? Time, bandwidth and memory of the fused kernel, eager PyTorch, torch.compile and
Liger-Kernel (if installed) on random logits of LLaDA's vocabulary, then the bars the kernel has to clear.

    python kernels.py     # on a machine with a CUDA device: checks correctness, then runs this

Each row of the table: the median of triton.testing.do_bench with its 20th and 80th percentile; GB/s of the
bytes that must move (logits read once in the forward and once in the backward, their gradient written
once), whatever did move; the share of a measured copy; and the peak of memory beyond what was there before
the call, results included. do_bench empties the L2 cache before every call, and two buffers take turns.
"""

import functools
import itertools
import subprocess

import torch
import triton

from kernels import logprobs_and_entropy, naive

V, T = 126464, 0.6
SIZES = 24, 96, 512, 2048, 8192       # N: a training micro-batch, a rollout step, and up
PASSES = {"forward": 1, "backward": 2, "both": 3}


def implementations():
    """{name: f(logits, labels) -> tuple of [N]}, what is installed of it."""
    eager = functools.partial(naive, temperature=T)
    fns = {"ours": functools.partial(logprobs_and_entropy, temperature=T, impl="triton"),
           "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss
        # Log-probability only, T = 1. Its forward overwrites the logits with their gradient: it comes last,
        # and only forward + backward together can be compared.
        cross_entropy = LigerCrossEntropyLoss(reduction="none")
        fns["liger"] = lambda x, y: (cross_entropy(x, y),)
    except ImportError:
        print("Liger-Kernel is not installed: not measured")
    return fns


def measure(fn, buffers, labels):
    """{phase: (median us, p20, p80, extra peak MB)}"""
    turn = itertools.cycle(range(len(buffers)))
    outputs = [fn(x, labels) for x in buffers]
    grads = [torch.randn_like(out) for out in outputs[0]]

    def forward():
        return fn(buffers[next(turn)], labels)

    def backward():
        i = next(turn)
        return torch.autograd.grad(outputs[i], buffers[i], grads, retain_graph=True)

    def both():
        x = buffers[next(turn)]
        return torch.autograd.grad(fn(x, labels), x, grads)

    measured = {}
    for run in (forward, backward, both):
        times = triton.testing.do_bench(run, quantiles=[0.5, 0.2, 0.8])
        torch.cuda.reset_peak_memory_stats()
        before, result = torch.cuda.memory_allocated(), run()      # `result` lives until the peak is read
        extra = torch.cuda.max_memory_allocated() - before
        measured[run.__name__] = *(1000 * ms for ms in times), extra / 1e6
    return measured


def benchmark(device="cuda"):
    import torch._functorch.config
    torch._functorch.config.donated_buffer = False       # else torch.compile refuses retain_graph=True
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(smi, capture_output=True, text=True).stdout.split("\n")[0]
    print(f"{torch.cuda.get_device_name()}, driver {driver}, torch {torch.__version__}, triton {triton.__version__}")
    source = torch.randn(2**29, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    copy_gbs = 2 * source.nbytes / 1e6 / copy_ms
    del source, target
    fns = implementations()
    print(f"copy: {copy_gbs:.0f} GB/s; V = {V}, T = {T}\n\n{'dtype':9s} {'N':5s} {'':17s} {'us':>9s} {'[p20, p80]':22s}"
          f" {'GB/s':>6s} {'of copy':>8s} {'extra MB':>9s}")
    results = {}
    for dtype, N in itertools.product((torch.bfloat16, torch.float32), SIZES):
        buffers = [torch.randn(N, V, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
        labels = torch.randint(V, (N,), device=device)
        torch._dynamo.reset()                            # every shape is compiled for itself
        for name, fn in fns.items():
            try:
                measured = measure(fn, buffers, labels)
            except torch.OutOfMemoryError:
                print(f"{str(dtype)[6:]:9s} {N:<5d} {name:8s} out of memory")
                continue
            for phase, (us, p20, p80, mb) in measured.items():
                gbs = PASSES[phase] * buffers[0].nbytes / 1e3 / us
                results[dtype, N, name, phase] = us, gbs / copy_gbs, mb
                print(f"{str(dtype)[6:]:9s} {N:<5d} {name:8s} {phase:8s} {us:9.1f} {f'[{p20:.1f}, {p80:.1f}]':22s}"
                      f" {gbs:6.0f} {gbs / copy_gbs:8.0%} {mb:9.2f}")
    print_bars(results)


def print_bars(results):
    """What the kernel promises, in bfloat16 unless it says otherwise: holds, MISSED or not measured."""
    nan = float("nan")

    def faster(name, phase):                             # how many times, N = 2048
        theirs, ours = (results.get((torch.bfloat16, 2048, n, phase), [nan])[0] for n in (name, "ours"))
        return theirs / ours

    def share(phase):                                    # of the copy, at the worse of the two large N
        return min(results[torch.bfloat16, N, "ours", phase][1] for N in (2048, 8192))

    def spare(phase, allowed):                           # MB left of what is allowed, at the worst shape
        return min(allowed(dtype, N) / 1e6 + 1 - result[2]
                   for (dtype, N, name, ph), result in results.items() if (name, ph) == ("ours", phase))

    print()
    for what, value, bar in (
            ("forward, share of the copy, N >= 2048", share("forward"), 0.75),
            ("backward, share of the copy, N >= 2048", share("backward"), 0.80),
            ("forward, eager / ours", faster("eager", "forward"), 12),
            ("backward, eager / ours", faster("eager", "backward"), 10),
            ("forward, torch.compile / ours", faster("compile", "forward"), 1.0),
            ("backward, torch.compile / ours", faster("compile", "backward"), 0.95),
            ("forward + backward, Liger / ours", faster("liger", "both"), 1.2),
            ("forward, MB left of 32 N bytes + 1 MB", spare("forward", lambda dtype, N: 32 * N), 0),
            ("backward, MB left of a gradient + 1 MB", spare("backward", lambda dtype, N: N * V * dtype.itemsize), 0)):
        verdict = "not measured" if value != value else "holds" if value >= bar else "MISSED"
        print(f"{what:42s} {value:8.2f}   must be >= {bar:<5} {verdict}")
