"""`bash run.sh plan`: what a run needs, worked out from the model's config alone; nothing is downloaded or loaded.

    bash run.sh plan gsm8k                                 LLaDA-8B-Instruct on GSM8K, with the preset of such a run
    bash run.sh plan gsm8k --micro_batch 8 --lora_r 128    the flags are those of agrpo.py
    bash run.sh plan --model path/to/model                 a local folder: its config.json is read

Parameters, LoRA, logits, forwards and tokens are counts. Activations are an estimate: what a dense gated block keeps for
its backward pass. Add some memory for the CUDA context, fragmentation, and the matrix products' work space.
"""
import json
import math
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from lab.cli import UserError, local_folder

# Dimensions of models that are not on this machine yet. The totals agree with the sizes of their published files.
LLADA = dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, embedding_size=126464)
DREAM = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
             intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False)
KNOWN_CONFIGS = {                                    # LLaDA: arXiv 2502.09992, appendix. Dream: it started from Qwen2.5-7B
    "GSAI-ML/LLaDA-8B-Instruct": LLADA, "GSAI-ML/LLaDA-8B-Base": LLADA, "GSAI-ML/LLaDA-1.5": LLADA,
    "Dream-org/Dream-v0-Instruct-7B": DREAM, "Dream-org/Dream-v0-Base-7B": DREAM,
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Shape(NamedTuple):
    layers: int
    d: int                             # width of the residual stream
    V: int                             # rows of the embedding and of the head
    tied: bool                         # head and embedding are one matrix
    adapted: list                      # (in, out) of the linear layers of one block that LoRA goes on
    parameters: int                    # of the whole model, without biases
    active: int                        # those that one token meets: of a mixture, its own experts only


def shape_of(config):
    """The Shape of a transformer with gated MLPs, from its config as a dict; None if that names no such dimensions."""
    def first(*names):
        return next((config[name] for name in names if config.get(name) is not None), None)

    d, layers = first("d_model", "hidden_size"), first("n_layers", "num_hidden_layers")
    heads, V = first("n_heads", "num_attention_heads"), first("embedding_size", "vocab_size")
    f = first("mlp_hidden_size", "intermediate_size")
    if None in (d, layers, heads, V) or f is None and not config.get("num_experts"):
        return None
    kv = (first("n_kv_heads", "num_key_value_heads") or heads) * (first("head_dim") or d // heads)
    q = heads * (first("head_dim") or d // heads)
    tied = first("weight_tying", "tie_word_embeddings")
    tied = "auto_map" not in config and "d_model" not in config if tied is None else tied     # transformers' own default
    attention, mlp, more, idle = [(d, q), (d, kv), (d, kv), (q, d)], [(d, f), (d, f), (f, d)], 0, 0
    if config.get("model_type") == "modernbert":     # the same matrices, in fewer layers
        attention, mlp = [(d, 3 * d), (d, d)], [(d, 2 * f), (f, d)]
        more = d * d                                 # the dense layer in front of the head
    if config.get("num_experts"):                    # experts and router are not adapted
        expert = first("expert_intermediate_size", "moe_intermediate_size")
        mlp, more = [], layers * config["num_experts"] * (3 * d * expert + d)
        idle = layers * (config["num_experts"] - config["num_experts_per_tok"]) * 3 * d * expert
    total = layers * sum(a * b for a, b in attention + mlp) + more + (2 * layers + 1) * d + V * d * (1 if tied else 2)
    return Shape(layers, d, V, tied, attention + mlp, total, total - idle)


def read_config(model, revision=None):
    """A model's config as a dict, and where it is from: its folder, the hub's cache on this disk, or the table above."""
    local = local_folder(model)
    if local is not None:
        return json.loads((local / "config.json").read_text()), f"{local}/config.json"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    if isinstance(cached, str):
        return json.loads(Path(cached).read_text()), "its config.json in the hub's cache"
    if model in KNOWN_CONFIGS:
        return KNOWN_CONFIGS[model], "dimensions known here, nothing downloaded"
    raise UserError(f"--model {model}: its dimensions are not known here; put its config.json into a folder and give that")


# --- Is there room? ---------------------------------------------------------------------------------------------------


def check_room(cfg, config, local):
    """Refuse a model that cannot fit before it is downloaded or read: disk, memory, GPU. `config`: a dict."""
    shape = shape_of(config)
    if shape is None:
        return
    have = room(cfg)
    stored, loaded = 2 * shape.parameters, BYTES[cfg.dtype] * shape.parameters            # the hub's copies are bfloat16
    resident = loaded if not cfg.load_in_4bit else loaded / 3
    name = f"--model {cfg.model}"
    if local is None and not is_cached(cfg) and stored > have["disk"]:
        raise UserError(f"{name} needs {gb(stored)} of disk under {have['cache']}, which has {gb(have['disk'])} free: make "
                        "room, or point HF_HOME to a larger disk")
    if loaded > have["memory"]:
        raise UserError(f"{name} needs {gb(loaded)} of memory to be read in, and {gb(have['memory'])} is free: close other "
                        "programs, or take a larger machine")
    if have["gpu"] and resident > have["gpu"]:
        raise UserError(f"{name} needs {gb(resident)} on the GPU for its weights alone, which has {gb(have['gpu'])}: add "
                        "--load_in_4bit, or take a smaller model (bash run.sh plan adds it up)")


def room(cfg):
    """Bytes free on the disk of the hub's cache and in memory (inf where unknown), and of the GPU in all (0: none)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    gpu = torch.cuda.get_device_properties(cfg.device).total_memory if cfg.device.startswith("cuda") else 0
    return dict(cache=HF_HUB_CACHE, disk=shutil.disk_usage(folder).free, memory=free_memory(), gpu=gpu)


def free_memory():
    """Bytes that a new program may take: the machine's, or what is left of a container's share. inf where unknown."""
    free = math.inf
    try:
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
        used, limit = (Path(f"/sys/fs/cgroup/memory.{kind}").read_text().strip() for kind in ("current", "max"))
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        if limit != "max":                           # file pages count as used, and are given back when needed
            free = min(free, int(limit) - int(used) + int(stat["inactive_file"]))
    except (OSError, IndexError, KeyError, ValueError):
        pass                                         # macOS, or no cgroup
    return free


def is_cached(cfg):
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(cfg.model, name, revision=cfg.revision), str) for name in names)


def gb(n):
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


# --- What a run needs -------------------------------------------------------------------------------------------------


def longest_prompt(cfg):
    """Tokens of the longest of 100 training prompts, where both are on this machine; else --max_prompt. And which it is."""
    import agrpo
    import tasks

    if tasks.TASKS[cfg.task].make is None and not cfg.train_file:
        return cfg.max_prompt, "--max_prompt; set it lower for a closer plan"
    data = agrpo.load_data(cfg, "train")
    chats = [tasks.TASKS[cfg.task].prompt(data[i]) for i in range(min(100, len(data)))]
    local = local_folder(cfg.model)
    if local is None or not (local / "tokenizer.json").exists():
        return max(sum(len(turn["content"]) for turn in chat) for chat in chats) // 3 + 32, "at three characters a token"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local, trust_remote_code=cfg.trust_remote_code)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) if tokenizer.chat_template
             else chat[-1]["content"] for chat in chats]
    return max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])), "the longest of 100"


def needs(cfg, shape, prompt):
    """Counts of a run with these flags on a model of this Shape, all prompts this long."""
    lora = sum(cfg.lora_r * (i + o) for i, o in shape.adapted) * shape.layers
    rows, L = cfg.questions * cfg.G, prompt + cfg.C
    return dict(
        lora=lora, lora_layers=len(shape.adapted) * shape.layers, rows=rows, L=L,
        write_forwards=math.ceil(rows / cfg.rollout_batch) * cfg.m, write_tokens=rows * cfg.m * L,
        learn_forwards=cfg.mu * math.ceil(rows * cfg.k / cfg.micro_batch), learn_tokens=cfg.mu * rows * cfg.k * L)


def weight_bytes(cfg, shape, lora):
    """(base model, its head once more in float32, what is trained with its gradients and Adam's two moments)"""
    b, head = BYTES[cfg.dtype], shape.V * shape.d
    if not lora:                                     # the base model itself is trained
        return 0, 0, 16 * shape.parameters
    blocks = shape.parameters - (head if shape.tied else 2 * head)
    base = head * b + blocks * (0.56 if cfg.load_in_4bit else b)                 # 4 bits, and a scale for each 64 of them
    return base, 0 if shape.tied and b == 4 else 4 * head, 16 * lora             # a tied head is copied to be float32


def kept_bytes(cfg, shape, L):
    """Activations kept for the backward pass of one micro-batch.

    Per block and token, counted with saved_tensors_hooks on LLaDA's and Dream's code: below float32, LoRA adds a float32
    copy of each linear layer's input. Recomputing keeps each block's input, and all of one block, with its gradients.
    """
    b, d, tokens = BYTES[cfg.dtype], shape.d, cfg.micro_batch * L
    f = max(out for _, out in shape.adapted)
    block = tokens * (32 * d + 16 * f if b == 4 else 40 * d + 10 * f)
    return tokens * d * b * shape.layers + 2 * block if cfg.activation_checkpointing else shape.layers * block


def logit_bytes(cfg, shape):
    """One tensor of logits in (the loss, a rollout step, an evaluation step), on the rows that are drawn or scored."""
    W, block = cfg.C // cfg.m, cfg.block_length
    loss = cfg.micro_batch * (block if cfg.unmasking == "low_confidence" else W)
    step = cfg.rollout_batch * (W if cfg.unmasking == "random" else block)
    return tuple(4 * shape.V * rows for rows in (loss, step, cfg.eval_batch * cfg.eval_block))


def peak_bytes(cfg, shape, x):
    """An estimate for the device: the weights, and whichever phase needs most. Four tensors of logits live at once."""
    loss, step, evaluation = logit_bytes(cfg, shape)
    b, d, f = BYTES[cfg.dtype], shape.d, max(out for _, out in shape.adapted)
    forward = x["L"] * (12 * d + 4 * f) * b                                      # of a row without a backward pass
    return sum(weight_bytes(cfg, shape, x["lora"])) + max(
        kept_bytes(cfg, shape, x["L"]) + 4 * loss, cfg.rollout_batch * forward + 4 * step,
        cfg.eval_batch * forward + 4 * evaluation)


def report(cfg, shape, source):
    """Yield the lines of the plan."""
    prompt, guess = longest_prompt(cfg)
    x, have = needs(cfg, shape, prompt), room(cfg)
    base, head, trained = weight_bytes(cfg, shape, x["lora"])
    yield f"{cfg.task} on {cfg.model} ({source})"
    if x["lora"]:
        yield (f"parameters   {shape.parameters / 1e6:,.1f} M: {gb(base)} in {'4 bits' if cfg.load_in_4bit else cfg.dtype}, and the "
               f"LM head {gb(head)} in float32")
        yield (f"LoRA r {cfg.lora_r:<5} {x['lora'] / 1e6:,.1f} M on {x['lora_layers']} linear layers: {gb(trained)} with gradients and "
               "Adam's moments")
    else:
        yield f"parameters   {shape.parameters / 1e6:,.1f} M, all trained: {gb(trained)} with gradients and Adam's moments"
    how = "recomputed block by block" if cfg.activation_checkpointing else "all kept (--activation_checkpointing saves most)"
    yield f"activations  {gb(kept_bytes(cfg, shape, x['L']))} for {cfg.micro_batch} rows of {prompt} + {cfg.C} tokens, {how}"
    yield f"             (prompts of {prompt} tokens: {guess})"
    loss, step, evaluation = map(gb, logit_bytes(cfg, shape))
    yield f"logits       {loss} in the loss, {step} in a rollout step, {evaluation} in an evaluation step"
    here = f"a GPU of {gb(have['gpu'])}" if have["gpu"] else f"no GPU, {gb(have['memory'])} of memory free"
    yield f"memory       about {gb(peak_bytes(cfg, shape, x))} at the peak, and some to spare; here: {here}"
    yield (f"an update    {x['rows']} rollouts: {x['write_forwards']:,} forwards of {cfg.rollout_batch} rows write them, at most "
           f"{x['learn_forwards']:,} forwards and backwards of {cfg.micro_batch} learn from them")
    # a forward; a backward to the activations, and to the weights if they are trained; the forward again if recomputed
    passes = 2 + (not x["lora"]) + bool(cfg.activation_checkpointing)
    work = 2 * shape.active * (x["write_tokens"] + passes * x["learn_tokens"])
    yield (f"             {x['write_tokens'] / 1e6:,.1f} M tokens through the model to write, at most {x['learn_tokens'] / 1e6:,.1f} M "
           f"to learn: {work / 1e15:,.3g} PFLOP")
    if work > 1e15:                                  # below that, overheads decide
        yield (f"             {work / 4e14 / 60:,.1f} minutes at 400 TFLOP/s, {cfg.updates * work / 4e14 / 3600:,.0f} hours for "
               f"{cfg.updates} updates on one GPU")
    if local_folder(cfg.model) is None and not is_cached(cfg):
        yield f"disk         {gb(2 * shape.parameters)} to download into {have['cache']}; {gb(have['disk'])} free"


def main(argv):
    import agrpo

    if argv and not argv[0].startswith("-"):
        argv = ["--task", *argv]
    if not any(flag.startswith("--model") for flag in argv):                     # what needs planning is the large one
        argv = [*argv, "--model", agrpo.LLADA]
    cfg = agrpo.configure(argv)
    config, source = read_config(cfg.model, cfg.revision)
    shape = shape_of(config)
    if shape is None:
        raise UserError(f"--model {cfg.model}: {source} names no dimensions that are known here (hidden_size, "
                        "num_hidden_layers, ...)")
    print(*report(cfg, shape, source), sep="\n")
    return 0


if __name__ == "__main__":
    from lab import cli
    sys.exit(cli.in_one_sentence(lambda: main(sys.argv[1:])))
