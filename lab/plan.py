"""Does a run fit, and how long will it take? Worked out from the model's config.json alone.

    bash run.sh plan --preset llada --task gsm8k
    bash run.sh plan --preset llada --task gsm8k --micro_batch 8 --recompute false
    bash run.sh plan --model FOLDER            a folder with nothing but a config.json will do

Nothing is downloaded. Parameters, LoRA, tokens and FLOPs are counts. Activations are what a
gated transformer block keeps for its backward pass, measured with the allocator's log on blocks
like LLaDA's, Dream's, Qwen3's, LLaDA-MoE's and ModernBERT's. Not in the sum: a GPU's context
(about 0.5 GB), its allocator's fragments, and those of the C library's heap on a CPU.
"""
import json
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

import agrpo
import models
import run
import tasks
from tasks import TaskError

# Models that need not be here. LLaDA: arXiv 2502.09992, appendix. Dream is a Qwen2.5-7B.
LLADA = dict(d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=12288,
             embedding_size=126464)
DREAM = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
             num_key_value_heads=4, intermediate_size=18944, vocab_size=152064,
             tie_word_embeddings=False)
LLADA_MOE = dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, num_experts=64,
                 num_experts_per_tok=8, expert_intermediate_size=1024, vocab_size=157184,
                 tie_word_embeddings=False)
QWEN3 = dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
             num_key_value_heads=8, head_dim=128, intermediate_size=3072, vocab_size=151936,
             tie_word_embeddings=True, model_type="qwen3")
DIMENSIONS = {"GSAI-ML/LLaDA-8B": LLADA, "GSAI-ML/LLaDA-1.5": LLADA,
              "Dream-org/Dream-v0": DREAM, "inclusionAI/LLaDA-MoE-7B-A1B": LLADA_MOE,
              "dllm-hub/Qwen3-0.6B": QWEN3}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SMALL_GPU = 24e9                       # what the presets are planned for where there is no GPU
PYTHON = 0.45e9                        # resident after the imports, measured
# Measured: FLOP/s of a large product in 16 bits on an H200, whose arithmetic is an H100's, and
# what writing and learning (8B, recomputed) reach of it. Passes of a few tokens reach less.
H200, REACHED = 6.9e14, (0.55, 0.38)


class Shape(NamedTuple):
    """What a plan needs to know of a transformer with gated MLPs."""
    layers: int
    d: int                             # width of the residual stream
    q: int                             # width of all query heads
    V: int                             # rows of the embedding and of the head
    tied: bool                         # head and embedding are one matrix
    adapted: list                      # (in, out) of a block's linear layers that LoRA goes on
    blocks: int                        # parameters of all blocks
    active: int                        # of these, those that one token meets
    kept: int                          # numbers a token and block that the backward pass needs
    kept32: int                        # the same, of those that are float32 in any case
    alive: int                         # numbers a token at the peak of a mere forward

    @property
    def parameters(self):
        return self.blocks + self.d + self.V * self.d * (1 if self.tied else 2)


def shape_of(config):
    """The Shape that a config, a dict, describes. Biases are left out. Raises TaskError."""
    def first(*names, default=None):
        return next((config[name] for name in names if config.get(name) is not None), default)

    d, layers = first("d_model", "hidden_size"), first("n_layers", "num_hidden_layers")
    heads, V = first("n_heads", "num_attention_heads"), first("embedding_size", "vocab_size")
    f, experts = first("mlp_hidden_size", "intermediate_size"), first("num_experts", default=0)
    if None in (d, layers, heads, V) or not (f or experts):
        raise TaskError("the model's config.json lacks dimensions: it needs hidden_size, "
                        "num_hidden_layers, num_attention_heads, vocab_size, ...")
    width, kind = first("head_dim", default=d // heads), first("model_type", default="")
    q, kv = heads * width, first("n_kv_heads", "num_key_value_heads", default=heads) * width
    tied = first("weight_tying", "tie_word_embeddings", default="hidden_size" in config)

    adapted = [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]
    rest, idle, head = 2 * d, 0, 0
    if experts:                        # these and their router get no LoRA, a shared one does
        size = first("expert_intermediate_size", "moe_intermediate_size")
        used = first("num_experts_per_tok", default=1)
        shared = first("num_shared_experts", default=0) * size
        rest, idle = rest + experts * (3 * d * size + d), (experts - used) * 3 * d * size
        adapted, f = adapted[:4], used * size + shared
        if shared:
            adapted += [(d, shared), (d, shared), (shared, d)]

    # Kept: what both norms read (in float32) and write; q, k, v, the attention's output; in the
    # MLP the gate before and after its activation, the other factor, the product.
    kept32, kept, alive = 2 * d, 2 * d + 4 * q + 4 * f, 4 * d + 3 * f
    if experts or "qwen3" in kind:     # q and k have norms of their own
        kept32 += q + kv
    if experts:                        # a copy for each expert, and what each makes of it
        kept, alive = kept + 2 * used * d, alive + used * d + f
    if kind == "modernbert":           # the same in fewer matrices, and one before the head
        adapted = [(d, 3 * d), (d, d), (d, 2 * f), (f, d)]
        kept, alive, head = kept + 4 * q, 5 * d + 4 * f, d * d
    block = sum(i * o for i, o in adapted) + rest
    total, active = layers * block + head, layers * (block - idle) + head
    return Shape(layers, d, q, V, tied, adapted, total, active, kept, kept32, alive)


def read_config(cfg):
    """The model's config as a dict, and where it is from. Raises TaskError."""
    folder = models.local_folder(cfg.model)
    path = folder and folder / "config.json"
    if folder is None:
        path = try_to_load_from_cache(cfg.model, "config.json", revision=cfg.revision or None)
    if not isinstance(path, (str, Path)):                       # not in the cache
        for name, config in DIMENSIONS.items():
            if cfg.model.startswith(name):
                return config, "dimensions known here"
        raise TaskError(f"--model {cfg.model}: its dimensions are not known here; "
                        "give a folder with its config.json")
    try:
        return json.loads(Path(path).read_text()), str(path)
    except (OSError, ValueError) as e:
        raise TaskError(f"{path} cannot be read as JSON ({e}): fetch it again") from e


# --- Counts -----------------------------------------------------------------------------------

def longest_prompt(cfg):
    """(tokens of the longest of 100 training prompts, how that is known)"""
    task, folder = tasks.TASKS[cfg.task], models.local_folder(cfg.model)
    if task.make is None and not cfg.train_file:
        return cfg.max_prompt, "--max_prompt; a lower one makes the plan closer"
    data = tasks.load(cfg.task, "train", file=cfg.train_file or None, **cfg.options)
    chats = [task.prompt(data[i]) for i in range(min(100, len(data)))]
    if folder is None or not (folder / "tokenizer.json").exists():
        longest = max(sum(len(turn["content"]) for turn in chat) for chat in chats)
        return longest // 3 + 32, "at three characters a token"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
    reader = SimpleNamespace(tokenizer=tokenizer)               # render needs no model
    texts = [agrpo.Policy.render(reader, chat) for chat in chats]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return max(map(len, ids)), "the longest of 100"


def lora_size(cfg, shape):
    return shape.layers * sum(cfg.lora_r * (i + o) for i, o in shape.adapted)


def in_one(cfg, shape):
    """Are a layer and its LoRA one product? (Or is there no LoRA.)"""
    small = all(i * o <= models.SMALL for i, o in shape.adapted)
    return not cfg.lora_r or cfg.dtype == "float32" and small


def phases(cfg, shape, prompt):
    """{phase: bytes at its peak beside the weights} of learning, writing and evaluating."""
    W, b, learnt = cfg.how.W, BYTES[cfg.dtype], cfg.micro_batch * (prompt + cfg.C)
    kept = shape.layers * (shape.kept32 * 4 + shape.kept * b)   # a token, for the backward pass
    # LoRA's output stands beside its layer's, where the two are not one product.
    alive = shape.alive + (not in_one(cfg, shape)) * max(out for _, out in shape.adapted)
    if cfg.recompute:
        # Only each block's input stays; one block at a time has all, and gradients beside.
        kept = shape.layers * shape.d * b + 1.1 * kept / shape.layers
    # On a GPU the fused kernel reads logits where they are. Others make copies: a draw without
    # top_k in float64, the reference formulas on the CPU in float32.
    fused = cfg.device != "cpu"
    shown = 4 * shape.V * (2 if fused else 5)
    drawn = 4 * shape.V * (2 if fused and cfg.top_k else 5)
    still = cfg.block_length if cfg.unmasking != "random" else 0

    def forward(C, logits):
        return cfg.rollout_batch * max((prompt + C) * alive * b, logits)
    return dict(learn=learnt * kept + cfg.micro_batch * W * shown,
                write=forward(cfg.C, max(W * drawn, still * shown)),
                evaluate=forward(cfg.eval_C, cfg.eval_block * shown))


def with_batches(cfg, shape, prompt, space):
    """cfg, and where a batch is 0 as many rows as fit into `space` bytes beside the weights."""
    a_row = phases(replace(cfg, micro_batch=1, rollout_batch=1), shape, prompt)
    a_row = dict(micro_batch=a_row["learn"],
                 rollout_batch=max(a_row["write"], a_row["evaluate"]))
    sizes = models.most_rows(cfg)
    for name in sizes:                                          # halved as a run does it
        while 1 < sizes[name] > space / a_row[name]:
            sizes[name] //= 2
    return replace(cfg, **{name: getattr(cfg, name) or n for name, n in sizes.items()})


def weight_bytes(cfg, shape):
    """(base model, its head again in float32, what is trained, with gradient and Adam's two)"""
    b, head, lora = BYTES[cfg.dtype], shape.V * shape.d, lora_size(cfg, shape)
    if not cfg.lora_r:
        return 0, 0, 16 * shape.parameters
    if b == 4:
        return 4 * shape.parameters, 0, 16 * lora
    return b * (shape.blocks + shape.d + head), 4 * head, 16 * lora


def work(cfg, shape, prompt):
    """FLOPs of one update: (writing the rollouts, learning from them at most)."""
    rows, L = cfg.questions * cfg.G, prompt + cfg.C
    lora = lora_size(cfg, shape) * (cfg.lora_r > 0)
    token = 2 * (shape.active + lora) + 4 * L * shape.q * shape.layers      # L to attend to
    # In one product with W + s B A, only the backward pass multiplies by A and B alone.
    forward = token - 2 * lora * in_one(cfg, shape)
    logits = 2 * shape.V * shape.d
    # The head sees a step's tokens, or all that are masked in the block: half of it on average.
    steps = cfg.block_length // cfg.how.W
    seen = cfg.C if cfg.unmasking == "random" else cfg.C * (steps + 1) / 2
    # Forward; backward to the activations, and to the weights where they are trained; forward
    # once more if it is recomputed.
    passes = 2 + (not cfg.lora_r) + cfg.recompute
    pairs = cfg.mu * rows * min(cfg.k, cfg.m)
    return (rows * (cfg.m * L * forward + seen * logits),
            pairs * (L * token + cfg.how.W * logits) * passes)


# --- What is here -----------------------------------------------------------------------------

def free_memory():
    """Bytes that a new program may take here or in this container; inf if unknown."""
    free, group = math.inf, Path("/sys/fs/cgroup")
    try:
        available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1]
        free = 1024 * int(available.split()[0])
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, IndexError, ValueError):                   # macOS, or no limit
        return free


def speed(cfg, shape):
    """FLOP/s of this device on a product of the model's size, the best of half a second.

    A CPU gets a small one in float32: some multiply 16 bits a thousand times as slowly.
    """
    gpu = cfg.device != "cpu"
    rows, most = (4096, 2048) if gpu else (512, 512)
    a = torch.randn(rows, min(shape.d, most), device=cfg.device,
                    dtype=getattr(torch, cfg.dtype) if gpu else torch.float32)
    b = torch.randn(a.shape[1], 4 * a.shape[1], device=cfg.device, dtype=a.dtype)
    best, begun = math.inf, time.perf_counter()
    while time.perf_counter() - begun < 0.5:
        start = time.perf_counter()
        (a @ b)[0, 0].item()           # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * a.shape[0] * b.numel() / best


MEMORY = dict(GB=1e9, MB=1e6)
WORK = dict(PFLOP=1e15, TFLOP=1e12, GFLOP=1e9)
TIME = dict(hours=3600, minutes=60, seconds=1)


def amount(n, units=MEMORY):
    """12.3 of the largest unit that n is a few of."""
    name = next((name for name, size in units.items() if n >= size), list(units)[-1])
    return f"{n / units[name]:,.1f} {name}"


def report(cfg, shape, source):
    """Yield the lines of the plan."""
    prompt, known = longest_prompt(cfg)
    base, head, trained = weight_bytes(cfg, shape)
    gpu, L, fixed = cfg.device != "cpu", prompt + cfg.C, cfg.micro_batch and cfg.rollout_batch
    have = torch.cuda.get_device_properties(cfg.device).total_memory if gpu else free_memory()
    # A run keeps a tenth free. Without a GPU the plan is for one of this size.
    space = 0.9 * (have if gpu else SMALL_GPU) - base - head - trained
    cfg = with_batches(cfg, shape, prompt, space)
    peak = phases(cfg, shape, prompt)
    yield f"{cfg.task} on {cfg.model} ({source})"
    weights = f": {amount(base)} in {cfg.dtype}" if cfg.lora_r else ", all trained"
    if head:
        weights += f", the head once more in float32 {amount(head)}"
    yield f"weights     {shape.parameters / 1e6:,.1f} M parameters{weights}"
    adapters = ""
    if cfg.lora_r:
        adapters = (f": LoRA, {lora_size(cfg, shape) / 1e6:,.1f} M on "
                    f"{shape.layers * len(shape.adapted)} layers")
    yield f"trained     {amount(trained)} with gradients and Adam's moments{adapters}"
    how = "recomputed" if cfg.recompute else "kept (--recompute saves most of it)"
    yield (f"learning    {amount(peak['learn'])}: {cfg.micro_batch} rows of {prompt} + {cfg.C} "
           f"tokens, activations {how}")
    yield f"            (prompts of {prompt} tokens: {known})"
    yield (f"writing     {amount(peak['write'])}, evaluating {amount(peak['evaluate'])}: "
           f"{cfg.rollout_batch} rows at a time")
    if not fixed:
        yield ("            (as many rows as fit " + ("here)" if gpu else
               f"into a GPU of {amount(SMALL_GPU)}: a run tries it out)"))
    need = base + head + trained + max(peak.values()) + (0 if gpu else PYTHON)
    verdict = "it fits" if need < 0.95 * have else "TOO LITTLE"
    where = "on the GPU" if gpu else "free, no GPU"
    yield f"memory      {amount(need)} at the peak; here: {amount(have)} {where}: {verdict}"
    # Measured: it reuses large pieces badly. A fixed threshold gives each back to the system.
    if not gpu and max(peak.values()) > 0.4e9:
        yield "            (the heap may hold 2 - 3 times that; MALLOC_MMAP_THRESHOLD_=65536 in"
        yield "            the environment holds it to the sum, at 1.7 times the time)"

    rows, (write, learn) = cfg.questions * cfg.G, work(cfg, shape, prompt)
    pairs = cfg.mu * rows * min(cfg.k, cfg.m)
    yield (f"an update   {rows} rollouts: {rows * cfg.m * L:,} tokens through the model to "
           f"write, at most {pairs * L:,.0f} to learn")
    yield f"            {amount(write, WORK)} + {amount(learn, WORK)}"
    for name, rate, reached in (("time here", speed(cfg, shape), REACHED if gpu else (1, 1)),
                                ("on an H200", H200, REACHED)):
        rates = [rate * share for share in reached]
        seconds = write / rates[0] + learn / rates[1]
        here = name == "time here"
        if here and not gpu and seconds > 3600:
            yield f"{name:<12}more than an hour an update: choose a GPU or a smaller model"
        elif here or seconds > 1:                               # below, overheads decide
            yield (f"{name:<12}{amount(seconds, TIME)} an update, "
                   f"{amount(seconds * cfg.updates, TIME)} for {cfg.updates}, at "
                   f"{rates[0] / 1e12:,.2f} and {rates[1] / 1e12:,.2f} TFLOP/s"
                   + " in float32" * (here and not gpu))

    # A checkpoint holds what is trained and Adam's two, without the gradients.
    disk = f"{amount(trained * 12 / 16)} for a checkpoint"
    if models.local_folder(cfg.model) is None:
        disk += f", {amount(2 * shape.parameters)} for the model unless it is there"
    there = next(p for p in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if p.exists())
    yield f"disk        {disk}; {amount(shutil.disk_usage(there).free)} free"


def parse(argv):
    """Flags -> Run."""
    parser = run.Parser(prog="bash run.sh plan", description=__doc__,
                          epilog="the flags are those of python lab/run.py --help")
    return run.parse(parser.parse_known_args(argv)[1])


def main(cfg):
    config, source = read_config(cfg)
    for line in report(cfg, shape_of(config), source):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run.in_one_sentence(lambda: main(parse(sys.argv[1:]))))
