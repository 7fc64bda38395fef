"""`python kernels.py --bench`: one whole update at LLaDA-8B's shape, the head on the scored rows and the head everywhere.

Random bf16 weights are built on the device, in a Llama-shaped model without the causal mask (LLaDA's own shape: 32 layers of
4096, 126464 tokens, 8.0 B parameters); LoRA r 64, B = 8 rows, C = 384, m = 128, k = 24. Times of random weights are those of
trained ones, except that nothing ends early here. Without a GPU a toy shape runs, to show that the command works.
"""
import statistics
import time
from types import SimpleNamespace

import torch

import agrpo
from lab import models

LARGE = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=32, vocab_size=126464)
TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000)


def build(shape, device):
    """A policy with random weights and fresh LoRA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=False, use_cache=False, bos_token_id=None, eos_token_id=1, pad_token_id=1)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
    ids = SimpleNamespace(mask_token_id=2, eos_token_id=1, pad_token_id=1, get_added_vocab=dict)
    policy = agrpo.Policy(model, ids, device)
    policy.mask_kind = "4d"                          # a 4D mask is taken as it is: full attention, no causal triangle
    models.add_adapters(policy, SimpleNamespace(lora_r=64, lora_alpha=64, seed=0, activation_checkpointing=True))
    return policy


def everywhere(policy):
    """The same policy with the head on every position, then the rows asked for: what costs (B, L, V)."""
    def whole(ids, attention_mask, flat):
        rows = torch.arange(ids.numel(), device=ids.device) + policy.shift
        return policy(ids, attention_mask, rows)[flat]
    return whole


def update(policy, call, B, P, C, m, k, micro_batch, V):
    """Seconds of rollout and of loss, peak bytes."""
    device = policy.device
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    q = torch.randint(3, V, (B, P), device=device)
    wait()
    start = time.time()
    traj = agrpo.rollout(call, q, torch.ones_like(q), C=C, m=m, block_length=4 * C // m, mask_id=policy.mask_id,
                         eos_id=-1, temperature=0.6, top_k=150, top_p=0.99)
    wait()
    rolled = time.time()
    adv = torch.linspace(-1, 1, B, device=device)
    agrpo.accumulate_gradient(call, traj, adv, k=k, rows_total=B, mask_id=policy.mask_id, eos_id=-1, temperature=0.6,
                              micro_batch=micro_batch)
    wait()
    policy.model.zero_grad(set_to_none=True)
    return rolled - start, time.time() - rolled, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def benchmark(repeats=3):
    cuda = torch.cuda.is_available()
    shape = LARGE if cuda else TOY
    size = dict(B=8, P=200, C=384, m=128, k=24, micro_batch=8) if cuda else dict(B=2, P=5, C=12, m=4, k=2, micro_batch=4)
    print(f"one update on {torch.cuda.get_device_name() if cuda else 'cpu, toy shape (no GPU: the numbers mean nothing)'}, torch "
          f"{torch.__version__}: " + ", ".join(f"{name} {value}" for name, value in size.items()))
    policy, medians = build(shape, "cuda" if cuda else "cpu"), []
    for name, call in (("head on the scored rows", policy), ("head everywhere", everywhere(policy))):
        try:
            runs = [update(policy, call, **size, V=shape["vocab_size"]) for _ in range(repeats)]
        except torch.OutOfMemoryError:
            print(f"  {name:24s} out of memory")
            continue
        medians.append([statistics.median(column) for column in zip(*runs)])
        print(f"  {name:24s} rollout {medians[-1][0]:8.3f} s   loss {medians[-1][1]:8.3f} s   peak {medians[-1][2] / 2**30:6.2f} GiB")
    if len(medians) == 2:
        ratio = [b / max(a, 1e-9) for a, b in zip(*medians)]
        print(f"  everywhere / scored      rollout {ratio[0]:8.2f} x   loss {ratio[1]:8.2f} x"
              + (f"   peak {ratio[2]:6.2f} x" if cuda else ""))
