"""AGRPO in one file: the policy gradient of a masked diffusion language model, exact step by step.

Paper: "Simple Policy Gradients for Reasoning with Diffusion Language Models", arXiv 2510.04019. A masked diffusion
model (LLaDA, Dream) writes an answer by unmasking a few tokens per denoising step. AGRPO sees each step as one
action of a Markov decision process. The tokens of one step are drawn independently given the text so far, so the
step's log-probability is a plain sum of token log-probabilities: exact, from one forward pass, no ELBO.

    repeat:
      q   <- prompts, G copies of each                                                    § Train
      o   <- denoise q in m steps; remember per step: positions, tokens, log pi, entropy   § Rollout
      r   <- checker(o);   A_i = r_i - mean of the group's r                               § Advantages
      for each of mu passes:
        t_1..t_k ~ p_t, evenly spaced through p's CDF in every row;   w = 1 / (k p_t)      § Timestep sampler
        log pi_theta(a_t | x_t): mask o again as it was at step t, one forward pass        § Per-step log-probabilities
        J = mean over rows of  (1/m) sum_j w_j min(rho A, clip(rho, 1-eps, 1+eps) A)       § Clipped loss
        theta <- one optimizer step on -J, summed over micro-batches                       § Update

Left out on purpose: sequence-level likelihoods and ELBOs (the point of the paper), a value network, a separate
reference model (switch the adapters off instead), KV caches, FSDP and DeepSpeed.
Different from the official code (github.com/probablyabot/agrpo), each where it matters and said there: the k
timesteps are spread within a row, the sum runs over every step that acted and is divided by the constant m
(`--length_norm official` gives theirs), a step drawn twice costs one forward, the LM head runs on the scored rows
only, the order of unmasking never biases the gradient unless you ask for it.

Notation (the same letters in the paper's formulas, the code and the flags):
    q, o        prompt ids (left-padded), completion ids                       (B, P), (B, C)
    t, m        denoising step 0..m-1, number of steps
    k           Monte-Carlo timesteps per rollout (never `top_k`)
    G, mu       rollouts per prompt, passes over one batch of rollouts
    beta, eps   KL weight, clip width
    B P C L V   rows, prompt, completion, P + C, vocabulary
    S           slots of a step: how many tokens one step scores, C / m unless said otherwise
    step_of     the step that revealed each token, m where none did            (B, C)
    logp, logp_old, logp_ref, ratio, adv, w                                     w: weight of a timestep

Read top to bottom; `grep '^# §' agrpo.py` lists the sections. Everything down to § Update is tensors in, tensors out.
"""
import math
import os
import sys
import time
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Optional

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch

import tasks
from kernels import logprobs_and_entropy, support_logprobs_and_entropy
from lab import cli, evaluation, logbook, models, processes      # flags, files, loading: no need to read it first

# ====================================================================================================================
# § Config
# ====================================================================================================================
# One dataclass, every field a flag. A default of None is filled from PRESETS below, by scale and task.


def _(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    # --- what to run
    task: str = _("countdown", "countdown, sudoku, gsm8k, math, or a task of your own in tasks.TASKS")
    mode: str = _("train", "train, or eval (needs no optimizer; give --adapter to evaluate a trained one)")
    model: Optional[str] = _(None, "hub id or local folder [lab/tiny, or LLaDA-8B-Instruct on a GPU of 40 GB or more]")
    revision: Optional[str] = _(None, "hub revision (commit hash) to pin, advised with remote code")
    trust_remote_code: bool = _(False, "run the Python code that comes with the model")
    adapter: Optional[str] = _(None, "folder of a trained adapter to evaluate, e.g. runs/countdown/adapter")
    out: Optional[str] = _(None, "output folder [runs/TASK, then runs/TASK-2, ...]")
    resume: bool = _(False, "continue the run in --out (default: the newest run of this task)")
    seed: int = _(0, "seeds LoRA's initialisation, the order of prompts and every random draw")
    # --- the task's data (tasks.py)
    train_file: Optional[str] = _(None, "local file or folder in place of the task's training data")
    test_file: Optional[str] = _(None, "local file or folder in place of the task's held-out data")
    numbers: Optional[int] = _(None, "countdown: how many numbers")
    max_number: Optional[int] = _(None, "countdown: largest number")
    max_target: Optional[int] = _(None, "countdown: largest target")
    division: Optional[bool] = _(None, "countdown: whether a target may need a division")
    empties: Optional[int] = _(None, "sudoku: empty cells")
    max_prompt: int = _(512, "prompts of more tokens are left out, and counted")
    # --- the denoising MDP
    C: Optional[int] = _(None, "completion length in tokens")
    m: Optional[int] = _(None, "denoising steps per completion: C / m tokens are revealed each step")
    block_length: Optional[int] = _(None, "semi-autoregressive block; divides C")
    unmasking: Optional[str] = _(None, "which positions a step reveals: random, entropy, max_prob, low_confidence [random]")
    score_discarded: bool = _(True, "low_confidence: score the sampled tokens it discards too (exact; False is biased)")
    temperature: Optional[float] = _(None, "sampling temperature of the rollouts")
    top_k: Optional[int] = _(None, "sample among the top_k likeliest tokens (0: all)")
    top_p: Optional[float] = _(None, "sample in the nucleus of this mass (1: all)")
    # --- the policy gradient
    G: int = _(8, "rollouts per prompt (the group)")
    questions: Optional[int] = _(None, "prompts per update, over all processes: questions x G rollouts")
    k: Optional[int] = _(None, "Monte-Carlo timesteps per rollout, k << m")
    timesteps: str = _("surprise", "p_t follows: surprise (how unlikely the step's tokens were), entropy (paper), uniform")
    points: str = _("low-discrepancy", "how k points are drawn: low-discrepancy, iid, row-strata, batch-strata (official)")
    mu: int = _(1, "passes (optimizer steps) over one batch of rollouts, each with fresh timesteps")
    eps: float = _(0.2, "clip width of the ratio")
    ratio: str = _("token", "importance ratio per token (as in the official code) or per step (product of its tokens)")
    beta: float = _(0.0, "weight of the KL to the base model (0: never computed)")
    normalise_std: bool = _(False, "divide advantages by the group's standard deviation (GRPO; biased, see Dr. GRPO)")
    length_norm: str = _("constant", "constant: sum over steps / m, exact. official: mean up to the last non-EOS step")
    # --- optimisation
    updates: Optional[int] = _(None, "training steps: each one batch of rollouts, mu optimizer steps")
    lr: Optional[float] = _(None, "peak learning rate; cosine to 0 after the warm-up")
    warmup: float = _(0.01, "share of the updates that warm the learning rate up")
    weight_decay: float = _(0.01, "AdamW, betas 0.9 / 0.99")
    max_grad_norm: float = _(1.0, "gradient clipping")
    lora_r: Optional[int] = _(None, "LoRA rank on every linear layer of the blocks (0: train all parameters)")
    lora_alpha: Optional[int] = _(None, "LoRA alpha")
    micro_batch: Optional[int] = _(None, "(row, timestep) pairs per forward and backward of the loss")
    rollout_batch: Optional[int] = _(None, "rows per forward of a rollout")
    dtype: Optional[str] = _(None, "dtype of the base model: float32, bfloat16, float16 (adapters and head: float32)")
    load_in_4bit: bool = _(False, "quantise the base model with bitsandbytes, if installed")
    activation_checkpointing: Optional[bool] = _(None, "recompute activations in the backward pass to save memory")
    device: Optional[str] = _(None, "cpu, cuda, cuda:1 ... [cuda if there is one]")
    # --- evaluation: greedy, low-confidence unmasking, as LLaDA does it; and once more as the rollouts sample
    eval_n: int = _(500, "held-out problems per evaluation")
    eval_every: Optional[int] = _(None, "evaluate every so many updates (0: first and last only)")
    steps: Optional[str] = _(None, "numbers of denoising steps to evaluate at, e.g. 12,6,3 [every one that divides]")
    eval_sampled: Optional[bool] = _(None, "also evaluate as the rollouts sample, and make that the headline number")
    eval_C: Optional[int] = _(None, "completion length in evaluation")
    eval_block: Optional[int] = _(None, "block length in evaluation")
    eval_batch: Optional[int] = _(None, "rows per forward in evaluation")
    seeds: int = _(1, "--mode eval: seeds of the sampled evaluation, counted from --seed")
    beside_base: bool = _(False, "--mode eval with --adapter: evaluate the base model too")
    # --- what is written
    save_every: int = _(10, "updates between checkpoints (a killed run resumes from the last)")
    sample_every: int = _(20, "updates between printed samples")
    tracker: Optional[str] = _(None, "wandb, tensorboard, ... through accelerate; metrics.jsonl is always written")


LLADA = "GSAI-ML/LLaDA-8B-Instruct"
TINY = str(Path(__file__).resolve().parent / "lab" / "tiny")
# Sources: llada = the official train.yaml, lr to be swept (theirs came with 24 optimizer steps per training step);
# tiny = measured here, see README.
PRESETS = {
    "tiny": dict(C=32, m=8, k=4, temperature=1.0, questions=20, lr=1e-3, lora_r=32, lora_alpha=64, updates=200,
                 micro_batch=320, rollout_batch=512, eval_batch=512, eval_every=50, eval_sampled=True, dtype="float32",
                 activation_checkpointing=False),
    "tiny/countdown": dict(C=12, m=2, k=1, max_number=16, division=False, lr=1.5e-3, updates=500),
    "tiny/sudoku": dict(C=20, m=2, k=1, empties=10, unmasking="max_prob"),
    "llada": dict(C=384, m=128, block_length=12, temperature=0.6, top_k=150, top_p=0.99, k=24, questions=16,
                  updates=300, lr=1e-5, lora_r=64, lora_alpha=64, micro_batch=4, rollout_batch=16, eval_batch=16,
                  eval_every=50, eval_C=256, eval_block=32, steps="128", eval_sampled=False, dtype="bfloat16",
                  activation_checkpointing=True),
}


# ====================================================================================================================
# § The denoising MDP
# ====================================================================================================================
# State  x_t: the prompt q and the tokens revealed before step t; every other completion position is [MASK].
# Action a_t: the tokens drawn at step t, independently given x_t, so  log pi(a_t | x_t) = sum of log p(token | x_t).
# Reward  r : a checker's verdict on the finished text; nothing before.
#
# With a reward only at the end, the policy gradient is  E[ sum_{t<n} grad log pi(a_t | x_t) * A ],  n = steps taken.
# One trajectory is stored action by action: slot s of step t of row b holds one scored token.


class Trajectory(NamedTuple):
    """A batch of finished denoising runs: all that the loss needs, on the device of the rollout."""
    q: torch.Tensor                    # (B, P) int64, left-padded prompt
    q_mask: torch.Tensor               # (B, P) int64, 0 at padding
    o: torch.Tensor                    # (B, C) int64, finished completion
    step_of: torch.Tensor              # (B, C) int64, step that revealed the token; m: never acted on (early exit)
    pos: torch.Tensor                  # (B, m, S) int64, positions scored at each step; -1: empty slot
    tok: torch.Tensor                  # (B, m, S) int64, tokens drawn there
    logp_old: torch.Tensor             # (B, m, S) log-probability under the very distribution they were drawn from
    entropy: torch.Tensor              # (B, m, S) entropy of that distribution, nats
    support: Optional[torch.Tensor]    # (B, m, S, top_k) int32 token ids it was truncated to, -1 past the end; or None
    n: torch.Tensor                    # (B,) int64, steps in which the row acted


def steps_per_block(C, m, block_length):
    """How many of the m steps each block gets. Raises ValueError, naming values that work, unless all divide."""
    if C < 1 or m < 1 or block_length < 1:
        raise ValueError(f"--C {C}, --m {m} and --block_length {block_length} must all be at least 1")
    if C % block_length:
        good = [b for b in range(1, C + 1) if C % b == 0]
        raise ValueError(f"--block_length {block_length} does not divide --C {C}: choose one of {good}")
    blocks = C // block_length
    if m % blocks or block_length % (m // blocks):
        good = [blocks * d for d in range(1, block_length + 1) if block_length % d == 0]
        raise ValueError(f"--m {m} steps cannot reveal {blocks} block(s) of --block_length {block_length} in equal "
                         f"shares: choose m from {good}")
    return m // blocks


def mask_again(o, step_of, t, mask_id):
    """x_t's completion part: tokens revealed before step t, [MASK] elsewhere. o, step_of (N, C), t (N,) -> (N, C)."""
    return torch.where(step_of < t[:, None], o, mask_id)


def denoise(policy, q, q_mask, x_t, pos, mask_id):
    """One forward pass: the model's next-token logits at the chosen masked positions.

    policy: callable (ids (N, L), attention mask (N, L), flat positions b * L + l (M,)) -> logits (M, V). It runs the
            LM head on those M rows only; all rows would cost 1.2 GB at B = 8, L = 584, V = 126464.
    q, q_mask (N, P); x_t (N, C); pos (N, S) int64 in 0..C-1, or -1 for an empty slot.
    Returns (M, V), M = filled slots in row-major order; [MASK] itself can never be drawn, nor scored.
    """
    (N, P), C = q.shape, x_t.shape[1]
    x = torch.cat([q, x_t], dim=1)                                               # (N, L)
    attention = torch.cat([q_mask, torch.ones_like(x_t)], dim=1)                 # (N, L)
    flat = torch.arange(N, device=q.device)[:, None] * (P + C) + P + pos         # (N, S)
    return policy(x, attention, flat[pos >= 0]).index_fill(1, torch.tensor([mask_id], device=q.device), -math.inf)


# ====================================================================================================================
# § Rollout
# ====================================================================================================================


def uniforms(*shape):
    """The default source of randomness: float64 in [0, 1). float32 would round up to 1.0 now and then."""
    return torch.rand(*shape, dtype=torch.float64)


def inverse_cdf(p, u):
    """Index of the outcome that u falls on: the first i with p_0 + ... + p_i > u * sum(p).

    p (N, K) >= 0, not normalised, at least one positive per row; u (N, J) in [0, 1]. Returns (N, J) int64.
    Never an outcome of probability zero and never past the end, though the CDF may fall short of 1 by rounding or u
    be 1.0: u * total is kept strictly below the total, where the CDF has its last true increase.
    """
    cdf = p.double().cumsum(dim=-1)                                              # (N, K)
    total = cdf[:, -1:]
    if not total.isfinite().all():
        raise FloatingPointError("probabilities are not finite")
    x = torch.minimum(u.double() * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, x.contiguous(), right=True)                   # (N, J)


def sample_tokens(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one token per row from softmax(logits / temperature), truncated to the top_k and then to the nucleus.

    logits (N, V), -inf allowed; u (N,) uniforms; temperature 0 is greedy.
    Returns tokens (N,), logp (N,), entropy (N,), support (N, K) int32 or None. logp and entropy are those of the
    truncated distribution itself. The nucleus keeps the token that crosses top_p. With top_k set, only one `topk` is
    V-wide; with top_p alone the support is as wide as the widest nucleus, so set top_k too on large vocabularies.
    """
    if temperature == 0:                                                         # evaluation only: no gradient of it
        tok = logits.argmax(dim=-1)
        return tok, *logprobs_and_entropy(logits, tok), None
    if top_k <= 0 and top_p >= 1:
        z = logits.double()
        p = ((z - z.amax(-1, keepdim=True)) / temperature).exp()                 # (N, V) shift first: exp overflows
        tok = inverse_cdf(p, u[:, None])[:, 0]
        # in plain torch: lp = (logits / T).log_softmax(-1); logp = lp.gather(...), entropy = -(lp.exp() * lp).sum(-1)
        return tok, *logprobs_and_entropy(logits, tok, temperature=temperature), None
    V = logits.shape[-1]
    v, ids = logits.topk(min(top_k, V) if top_k > 0 else V, dim=-1)              # (N, K), sorted
    p = ((v.double() - v[:, :1].double()) / temperature).softmax(dim=-1)         # (N, K)
    kept = p > 0
    if top_p < 1:
        kept &= (p.cumsum(-1) - p) < top_p                                       # mass before me < top_p: a prefix
    K = int(kept.sum(-1).amax()) if len(kept) else 1
    p, ids, kept = p[:, :K], ids[:, :K], kept[:, :K]
    tok = ids.gather(1, inverse_cdf(p * kept, u[:, None]))[:, 0]
    support = torch.where(kept, ids, -1).int()                                   # ids, not a (B, C, V) boolean mask
    return tok, *support_logprobs_and_entropy(logits, support, tok, temperature), support


@torch.no_grad()
def rollout(policy, q, q_mask, *, C, m, block_length, mask_id, eos_id, temperature=1.0, top_k=0, top_p=1.0,
            unmasking="random", score_discarded=True, rand=uniforms):
    """Write a completion of C tokens in m denoising steps, block after block. Returns a Trajectory.

    q, q_mask (B, P) int64. `policy` as in `denoise`. `rand(*shape)` gives float64 uniforms, first dimension B.
    unmasking, the rule that picks which C / m masked positions of the block a step reveals:
      random          uniformly, independent of the model: exact, and the training default
      entropy         where softmax(logits) has the least entropy  \\  a score of x_t alone, not of the tokens drawn:
      max_prob        where its largest probability is largest     /   exact with the revealed tokens scored
      low_confidence  draw everywhere in the block, keep the tokens of highest probability (LLaDA's evaluation). The
                      tokens thrown away influenced which were kept, so the action is all of them: score_discarded
                      scores all (exact); False scores the kept ones only (biased: cosine to the gradient 0.79-0.98).
    A row whose whole block came out as EOS is finished: the rest is EOS, and the row leaves the batch. Nothing was
    drawn there, so dropping those steps is exact. EOS tokens the model did draw are actions like any other.
    """
    B, T, W = q.shape[0], steps_per_block(C, m, block_length), C // m            # T steps a block, W tokens a step
    if unmasking not in ("random", "entropy", "max_prob", "low_confidence"):
        raise ValueError(f"--unmasking {unmasking} is unknown: choose random, entropy, max_prob or low_confidence")
    everywhere, dev = unmasking == "low_confidence", q.device
    o, step_of = q.new_full((B, C), mask_id), q.new_full((B, C), m)
    order = rand(B, C).to(dev)                                                   # random unmasking: smallest first
    u = rand(B, m, block_length if everywhere else W).to(dev)                    # one uniform per token drawn
    row, n, actions = torch.arange(B, device=dev), q.new_zeros(B), []            # row (A,): rows still writing
    for t in range(m):
        block = slice(t // T * block_length, (t // T + 1) * block_length)
        if t % T == 0 and t > 0:                                                 # a block was finished: who is done?
            done = (o[row, block.start - block_length:block.start] == eos_id).all(dim=1)
            o[row[done], block.start:] = eos_id
            row = row[~done]
        if len(row) == 0:
            break
        A = len(row)
        at = (step_of[row, block] == m).nonzero()[:, 1].view(A, -1) + block.start          # (A, c) still masked
        if unmasking == "random":                                                # positions first, then only those
            at = at.gather(1, order[row].gather(1, at).argsort(dim=1)[:, :W])    # (A, W)
        logits = denoise(policy, q[row], q_mask[row], o[row], at, mask_id)       # (A * c, V)
        if unmasking in ("entropy", "max_prob"):
            best, H = logprobs_and_entropy(logits, logits.argmax(dim=-1))        # of softmax(logits), T = 1
            keep = (best if unmasking == "max_prob" else -H).view(A, -1).topk(W, dim=1).indices       # (A, W)
            logits = logits.view(*at.shape, -1)[torch.arange(A, device=dev)[:, None], keep].flatten(0, 1)
            at = at.gather(1, keep)
        c = at.shape[1]
        tok, logp, H, support = sample_tokens(logits, u[row, t, :c].flatten(), temperature, top_k, top_p)
        tok, reveal, scored = tok.view(A, c), slice(None), slice(None)           # all that was drawn
        if everywhere:
            confidence, _ = logprobs_and_entropy(logits, tok.flatten())          # LLaDA's: at T = 1
            keep = confidence.view(A, c).topk(W, dim=1).indices
            reveal = (torch.arange(A, device=dev)[:, None], keep)                # only the most confident stay
            scored = slice(None) if score_discarded else reveal
        shown = at[reveal]                                                       # (A, W)
        o[row[:, None], shown], step_of[row[:, None], shown] = tok[reveal], t
        actions.append((row, t, at[scored], tok[scored], logp.view(A, c)[scored], H.view(A, c)[scored],
                        None if support is None else support.view(A, c, -1)[scored]))
        n[row] = t + 1
    S = block_length if everywhere and score_discarded else W
    return Trajectory(q, q_mask, o, step_of, *pack_actions(actions, B, m, S, dev), n)


def pack_actions(actions, B, m, S, device):
    """Per-step lists of (rows (A,), t, pos, tok, logp, entropy (A, s), support (A, s, K)) -> tensors (B, m, S, ...)."""
    dtype = actions[0][4].dtype if actions else torch.float32
    pos, tok = torch.full((B, m, S), -1, device=device), torch.zeros((B, m, S), dtype=torch.long, device=device)
    logp, entropy = torch.zeros((2, B, m, S), dtype=dtype, device=device)
    widths = [a[6].shape[-1] for a in actions if a[6] is not None]               # differ if there is only a top_p
    support = torch.full((B, m, S, max(widths)), -1, dtype=torch.int32, device=device) if widths else None
    for row, t, *parts, sup in actions:
        s = parts[0].shape[1]
        for whole, part in zip((pos, tok, logp, entropy), parts):
            whole[row, t, :s] = part
        if sup is not None:
            support[row, t, :s, :sup.shape[-1]] = sup
    return pos, tok, logp, entropy, support


# ====================================================================================================================
# § Advantages
# ====================================================================================================================


def group_advantages(rewards, G, normalise_std=False):
    """A_i = r_i - mean_j r_j over the G rollouts of one prompt.

    rewards (B,), groups contiguous. Returns adv (B,), dead (B,) bool: rows of groups whose rewards are all equal.
    Dead rows get exactly 0 (a mean of equal floats need not equal them). The mean includes r_i itself, so the expected
    gradient is (G-1)/G times the policy gradient: the leave-one-out baseline differs by that constant only.
    Dividing by the standard deviation (GRPO) favours prompts of little spread: a bias (Dr. GRPO, arXiv 2503.20783).
    """
    r = rewards.view(-1, G)                                                      # (questions, G)
    dead = (r == r[:, :1]).all(dim=1, keepdim=True).expand_as(r)
    adv = r - r.mean(dim=1, keepdim=True)
    if normalise_std:
        adv = adv / (r.std(dim=1, keepdim=True) + 1e-4)
    return adv.masked_fill(dead, 0.0).flatten(), dead.flatten()


# ====================================================================================================================
# § Timestep sampler
# ====================================================================================================================
# sum_{t<n} g_t is estimated from k << n of its terms:  sum_j w_j g_{t_j},  t_j ~ p,  w_j = 1 / (k p_{t_j}).
# Its mean is the full sum for any p that is positive where g_t is not zero. Where the k points fall within the row
# decides the variance (README, "Does it work as claimed").


def step_importance(traj, timesteps):
    """What p_t follows, summed over the tokens of a step by `timestep_probs`: (B, m, S or 1), or None for uniform.

    entropy   the paper's: a step with nothing to decide has a small gradient
    surprise  ours: sqrt(sum_a (1 - p_a)^2) over the step's tokens a. At the logits the gradient of log p_a is e_a - p,
              whose norm lies between 1 - p_a and sqrt(2) (1 - p_a). Entropy starves steps that were sure of another
              token: their gradient is large, and so then is their weight (variance: README, "Does it work as claimed").
    p_t may depend on the tokens drawn: given the trajectory, the estimate of its sum over steps stays unbiased.
    """
    if timesteps == "surprise":                      # logp_old is 0 in empty slots: surprise 0
        return (1 - traj.logp_old.double().exp()).square().sum(-1, keepdim=True).sqrt()
    return traj.entropy if timesteps == "entropy" else None


def timestep_probs(n, m, importance=None, floor=0.1):
    """p_t over the n steps a row took. n (B,); importance (B, m, S) >= 0, summed over slots, or None for uniform.

    Mixed with a share `floor` of uniform, so that w <= n / (k * floor): a bare entropy would give a step of entropy
    1e-8 a weight of 1e8. Returns (B, m) float64, rows summing to 1 (to 0 where n = 0).
    """
    acted = (torch.arange(m, device=n.device) < n[:, None]).double()             # (B, m)
    uniform = acted / n[:, None].clamp(min=1)
    if importance is None:
        return uniform
    s = importance.double().sum(dim=-1).clamp(min=0) * acted                     # (B, m)
    total = s.sum(dim=1, keepdim=True)
    mixed = (1 - floor) * s / total.clamp(min=1e-300) + floor * uniform
    return torch.where(total > 0, mixed, uniform)


def timestep_points(B, k, points="low-discrepancy", rand=uniforms):
    """k numbers in [0, 1) per row, each uniform by itself. Returns (B, k) float64.

    low-discrepancy  one random offset per row, k evenly spaced points (systematic sampling): the least variance here
    row-strata       one point in each k-th of [0, 1), drawn independently
    batch-strata     the official code: B * k strata dealt out over the whole batch, so a row's k points may coincide
                     (after arXiv 2409.02908, app. G.2, where there is one point per row)
    iid              no spreading
    """
    if points == "low-discrepancy":
        return (torch.arange(k) + rand(B, 1)) / k
    if points == "row-strata":
        return (torch.arange(k) + rand(B, k)) / k
    if points == "batch-strata":
        deal = rand(B, k).flatten().argsort().double()                           # a random permutation
        return ((deal + rand(B, k).flatten()) / (B * k)).view(B, k)
    if points == "iid":
        return rand(B, k)
    raise ValueError(f"--points {points} is unknown: choose low-discrepancy, iid, row-strata or batch-strata")


def sample_timesteps(p, u):
    """Timesteps at the points u, through the inverse CDF of p; equal draws of a row merged into one.

    p (B, m) float64, u (B, k). Returns rows (N,), steps (N,), w (N,) float64 with N <= B * k pairs and
    w = draws / (k p_t): a step drawn twice is one forward pass of twice the weight. Rows with p = 0 yield nothing.
    """
    (B, m), k = p.shape, u.shape[1]
    live = (p.sum(dim=1) > 0).nonzero()[:, 0]
    t = inverse_cdf(p[live], u.to(p.device)[live])                               # (B', k)
    pair, draws = (live[:, None] * m + t).unique(return_counts=True)             # sorted: row by row
    rows, steps = pair // m, pair % m
    return rows, steps, draws / (k * p[rows, steps])


def last_written_step(traj, eos_id):
    """The last step that revealed a non-EOS token, -1 if none did. Only the official length norm needs it. (B,)"""
    return traj.step_of.masked_fill((traj.o == eos_id) | (traj.pos.shape[1] == traj.step_of), -1).amax(dim=1)


# ====================================================================================================================
# § Per-step log-probabilities
# ====================================================================================================================


def step_logprobs(policy, traj, rows, steps, *, mask_id, temperature=1.0):
    """log pi_theta of the tokens drawn at given (row, step) pairs: one forward pass, exact.

    rows, steps (N,). Returns logp (N, S) with gradient and entropy (N, S), both 0 in empty slots, and filled (N, S).
    Under the distribution the tokens were drawn from: same temperature, same truncated support.
    """
    pos, tok = traj.pos[rows, steps], traj.tok[rows, steps]                      # (N, S)
    x_t = mask_again(traj.o[rows], traj.step_of[rows], steps, mask_id)           # (N, C)
    logits = denoise(policy, traj.q[rows], traj.q_mask[rows], x_t, pos, mask_id)            # (M, V)
    filled = pos >= 0
    if traj.support is None:
        # in plain torch: (logits / T).log_softmax(-1).gather(1, tok[filled][:, None])
        lp, H = logprobs_and_entropy(logits, tok[filled], temperature=temperature)          # (M,)
    else:
        lp, H = support_logprobs_and_entropy(logits, traj.support[rows, steps][filled], tok[filled], temperature)
    logp, entropy = lp.new_zeros(pos.shape), H.new_zeros(pos.shape)
    logp[filled], entropy[filled] = lp, H.detach()
    return logp, entropy, filled


# ====================================================================================================================
# § Clipped loss
# ====================================================================================================================


def k3(logp, logp_ref):
    """Estimate of KL(pi || ref) from a token of pi, never negative: e^d - d - 1, d = logp_ref - logp (Schulman)."""
    d = logp_ref - logp
    return d.exp() - d - 1


def clipped_loss(logp, logp_old, adv, w, filled, eps=0.2, beta=0.0, logp_ref=None, per_step=False):
    """-J,  J = sum_pairs w * sum_tokens [ min(rho A, clip(rho, 1-eps, 1+eps) A) - beta rho k3 ],  rho = pi / pi_old.

    logp, logp_old, logp_ref (N, S); filled (N, S) bool, False slots count nothing; adv, w (N,).
    per_step: one rho per step, the product over its tokens, in place of one per token (PPO on the MDP's own action).
    Returns loss (scalar, a SUM: divide by the number of rows), ratio (N, S) or (N, 1) detached, kl (N, S) detached.
    At rho = 1 the gradient of J is w A grad log pi, either way. The rho before k3 makes its gradient that of
    KL(pi || ref); k3 alone has the gradient of KL(ref || pi) (arXiv 2512.02556; the official code does the same).
    """
    log_ratio = (logp - logp_old) * filled                                       # (N, S), 0 in empty slots
    if per_step:
        log_ratio = log_ratio.sum(dim=1, keepdim=True)                           # (N, 1)
    ratio = log_ratio.exp()
    A = adv[:, None]
    J = torch.minimum(ratio * A, ratio.clamp(1 - eps, 1 + eps) * A)
    J = (J if per_step else J * filled).sum(dim=1)                               # (N,)
    kl = torch.zeros_like(logp)
    if logp_ref is not None:
        kl = k3(logp, logp_ref) * filled
        J = J - beta * ((logp - logp_old).exp() * kl).sum(dim=1)
    return -(w * J).sum(), ratio.detach(), kl.detach()


# ====================================================================================================================
# § Update
# ====================================================================================================================


def accumulate_gradient(policy, traj, adv, *, k, rows_total, mask_id, eos_id, temperature=1.0, timesteps="surprise",
                        points="low-discrepancy", eps=0.2, beta=0.0, per_step=False, length_norm="constant",
                        micro_batch=32, rand=uniforms, reference=None):
    """Add the gradient of -J of one batch of trajectories to .grad of the policy's parameters.

    J = 1/B sum_rows 1/m sum_j w_j (...): `rows_total` is B over all batches and processes, so that dead rows, dropped
    here when beta = 0, still count in the mean. A backward per micro-batch keeps one graph alive at a time.
    k = 0 takes every step once, no sampling. reference: context manager under which `policy` is the reference.
    Returns a list of (ratio, kl, filled, A) per micro-batch, for the log; its length counts forwards.
    """
    m, n, norm = traj.pos.shape[1], traj.n, torch.full_like(traj.n, traj.pos.shape[1])
    if length_norm == "official":                    # mean over steps up to the last non-EOS token; later ones dropped
        n = norm = last_written_step(traj, eos_id) + 1
    if beta == 0:
        n = n * (adv != 0)                           # A = 0: the gradient is exactly zero, spend no forward on it
    if k == 0:
        rows, steps = (torch.arange(m, device=n.device) < n[:, None]).nonzero().unbind(dim=1)
        w = torch.ones(len(rows), dtype=torch.float64, device=n.device)
    else:
        p = timestep_probs(n, m, step_importance(traj, timesteps))
        rows, steps, w = sample_timesteps(p, timestep_points(len(n), k, points, rand))
    w = w / (norm[rows] * rows_total)
    seen = []
    for i in range(0, len(rows), micro_batch):
        r, t = rows[i:i + micro_batch], steps[i:i + micro_batch]
        logp, _, filled = step_logprobs(policy, traj, r, t, mask_id=mask_id, temperature=temperature)
        logp_ref = None
        if beta > 0:
            with torch.no_grad(), reference():
                logp_ref, _, _ = step_logprobs(policy, traj, r, t, mask_id=mask_id, temperature=temperature)
        loss, ratio, kl = clipped_loss(logp, traj.logp_old[r, t], adv[r].to(logp), w[i:i + micro_batch].to(logp),
                                       filled, eps, beta, logp_ref, per_step)
        loss.backward()                              # gradient accumulation: the sum over micro-batches is the whole
        seen.append((ratio, kl, filled, adv[r].to(logp)))
    return seen


def optimizer_step(params, optimizer, max_grad_norm, all_reduce=None):
    """The one optimizer step of a pass. Sums gradients over processes, clips, steps; returns the gradient norm.

    A gradient that is not finite, or zero (dead groups only: no news), moves nothing, not even by Adam's momentum.
    `all_reduce(tensor)` sums in place over processes, or None.
    """
    if all_reduce is not None:                       # every process joins, also one with dead groups only
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in params])
        all_reduce(flat)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)
    norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm).item()
    if 0 < norm < math.inf:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ====================================================================================================================
# § Evaluation
# ====================================================================================================================


@torch.no_grad()
def evaluate(policy, data, cfg, m, greedy, share=(0, 1), skip=(), write=lambda records: None):
    """Grade one completion per held-out problem. Returns one record (dict) per problem of this process's share.

    greedy: temperature 0 and low-confidence unmasking, LLaDA's evaluation; else exactly as the rollouts sample.
    skip: problems that are graded already; write(records): called with each batch's.
    """
    how = dict(C=cfg.eval_C, block_length=cfg.eval_block, temperature=0.0, unmasking="low_confidence",
               score_discarded=False) if greedy else \
        dict(C=cfg.C, block_length=cfg.block_length, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
             unmasking=cfg.unmasking)
    records, todo = [], [i for i in range(min(cfg.eval_n, len(data))) if i not in skip][share[0]::share[1]]
    for batch in policy.batches([policy.encode(cfg.task, data[i]) for i in todo], cfg.eval_batch):
        rand = row_random([(cfg.seed, "evaluation", m, todo[i]) for i in batch.index])
        traj = rollout(policy, batch.q, batch.q_mask, m=m, mask_id=policy.mask_id, eos_id=policy.eos_id, rand=rand,
                       **how)
        texts = policy.decode(traj.o)
        grades = tasks.grade_batch(cfg.task, texts, [data[todo[i]] for i in batch.index])
        graded = [dict(index=todo[i], m=m, greedy=greedy, text=text, correct=g.correct, reward=g.reward,
                       reason=g.reason, parsed=g.parsed, **g.metrics) for i, text, g in zip(batch.index, texts, grades)]
        write(graded)
        records += graded
    return records


# ====================================================================================================================
# § Plumbing
# ====================================================================================================================


def row_random(keys):
    """A `rand` for the functions above that draws each row from a generator of its own, seeded by that row's key.

    A row's randomness then depends on (seed, update, prompt, copy) alone: not on the batch it sits in, the number of
    processes, or what ran before. That is also why a resumed run needs no saved random states.
    """
    def seeded(key):
        return torch.Generator().manual_seed(int.from_bytes(blake2b(repr(key).encode(), digest_size=7).digest(), "big"))
    generators = [seeded(key) for key in keys]
    return lambda B, *shape: torch.stack([torch.rand(*shape, generator=g, dtype=torch.float64) for g in generators])


class Batch(NamedTuple):
    index: list                        # which of the examples
    q: torch.Tensor                    # (B, P)
    q_mask: torch.Tensor               # (B, P)


class Policy:
    """A masked diffusion LM as the callable that `denoise` wants: logits, in float32, on chosen rows only.

    The rows are chosen in front of the LM head by a hook that replaces the head's input: works for every model that
    names its head (`get_output_embeddings`), changes no digit, and LoRA or a bias on the head keeps working.
    """

    def __init__(self, model, tokenizer, device="cpu"):
        self.model, self.tokenizer, self.device = model, tokenizer, torch.device(device)
        self.name = model.config._name_or_path
        self.mask_id, self.eos_id, self.pad_id = models.special_ids(model, tokenizer)
        # Dream predicts position i at i - 1, as the autoregressive model it grew from did.
        self.shift = 1 if str(model.config.model_type).lower() == "dream" else 0
        self.mask_kind, self.ignores_mask = "2d", False
        self.dtype = next(model.parameters()).dtype
        self.where = self.hook = None
        self.hook_head()

    def hook_head(self):
        """Again after something was put around the head."""
        if self.hook is not None:
            self.hook.remove()
        self.hook = models.head_in_float32(self.model).register_forward_pre_hook(self._select)

    def _select(self, head, args):
        x = args[0].flatten(0, 1)
        if self.where is not None:
            x = x[self.where]
        return (x.to(head.weight.dtype), *args[1:])

    def __call__(self, ids, attention_mask, flat):
        """ids, attention_mask (N, L); flat (M,) positions b * L + l. Returns logits (M, V) float32 (float64 if so)."""
        kind = {"2d": attention_mask, "4d": attention_mask[:, None, None, :].bool(), "none": None}[self.mask_kind]
        self.where = flat - self.shift
        try:
            logits = self.model(input_ids=ids, attention_mask=kind).logits
        finally:
            self.where = None
        return logits if logits.dtype == torch.float64 else logits.float()

    def decode(self, o):
        return self.tokenizer.batch_decode(o.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def encode(self, task, example):
        """Prompt ids of one problem: chat template as text, then tokens (`tokenize=True` differs between versions)."""
        messages = tasks.TASKS[task].prompt(example)
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        models.refuse_unknown(self, text, ids)
        return ids

    def pad(self, prompts, index=None):
        """Left-pad lists of ids to one Batch."""
        P = max(len(ids) for ids in prompts)
        q = torch.tensor([[self.pad_id] * (P - len(ids)) + ids for ids in prompts], device=self.device)
        q_mask = torch.tensor([[0] * (P - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        return Batch(list(range(len(prompts))) if index is None else index, q, q_mask)

    def batches(self, prompts, rows, copies=1):
        """Yield Batches of at most `rows` rows, `copies` contiguous rows per prompt (list of ids), one prompt never split.

        A model that ignores its attention mask would see the padding as text: it gets prompts of one length at a time.
        """
        order = range(len(prompts))
        if self.ignores_mask:
            order = sorted(order, key=lambda i: len(prompts[i]))
        batch = []
        for i in order:
            full = (len(batch) + 1) * copies > max(rows, copies)
            if batch and (full or self.ignores_mask and len(prompts[i]) != len(prompts[batch[0]])):
                yield self._copies(prompts, batch, copies)
                batch = []
            batch.append(i)
        if batch:
            yield self._copies(prompts, batch, copies)

    def _copies(self, prompts, batch, copies):
        index = [i for i in batch for _ in range(copies)]
        return self.pad([prompts[i] for i in index], index)


# ====================================================================================================================
# § Train and CLI
# ====================================================================================================================


def questions(n, per_update, update, seed):
    """Indices of one update's prompts: a walk through the n training examples, shuffled anew each epoch."""
    shuffled = {}
    for i in range(update * per_update, (update + 1) * per_update):
        epoch, at = divmod(i, n)
        if epoch not in shuffled:
            shuffled[epoch] = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        yield int(shuffled[epoch][at])


def collect_rollouts(policy, data, cfg, update, share=(0, 1)):
    """G rollouts of each of this process's prompts, and their grades.

    Returns batches, a list of (keys, Trajectory) with one key per row; grades and texts, one per row over all batches;
    and how many prompts were too long and left out.
    """
    mine = list(questions(len(data), cfg.questions, update, cfg.seed))[share[0]::share[1]]
    prompts = {i: policy.encode(cfg.task, data[i]) for i in mine}
    kept = [i for i in mine if len(prompts[i]) <= cfg.max_prompt]
    batches, texts, asked = [], [], []
    for batch in policy.batches([prompts[i] for i in kept], cfg.rollout_batch, copies=cfg.G):
        keys = [(cfg.seed, update, kept[j], row % cfg.G) for row, j in enumerate(batch.index)]
        traj = rollout(policy, batch.q, batch.q_mask, C=cfg.C, m=cfg.m, block_length=cfg.block_length,
                       mask_id=policy.mask_id, eos_id=policy.eos_id, temperature=cfg.temperature, top_k=cfg.top_k,
                       top_p=cfg.top_p, unmasking=cfg.unmasking, score_discarded=cfg.score_discarded,
                       rand=row_random(keys))
        batches.append((keys, traj))
        texts += policy.decode(traj.o)
        asked += [data[kept[j]] for j in batch.index]
    return batches, tasks.grade_batch(cfg.task, texts, asked), texts, len(mine) - len(kept)


def train(cfg, policy, data, book):
    """The loop of the docstring's pseudocode. `book` (lab/logbook.py) prints, writes, saves and resumes. -> exit code"""
    params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)
    total, warm = cfg.updates * cfg.mu, max(1, round(cfg.warmup * cfg.updates * cfg.mu))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(       # linear warm-up, then cosine to 0
        (i + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, i + 1 - warm) / (total - warm + 1)))))
    measure = lambda m, greedy: book.evaluation(
        evaluate(policy, data["test"], cfg, m, greedy, book.share), m, greedy)
    for update in book.start(optimizer, schedule, measure):
        start = time.time()
        batches, grades, texts, dropped = collect_rollouts(policy, data["train"], cfg, update, book.share)
        rewards = torch.tensor([g.reward for g in grades], dtype=torch.float64, device=policy.device)
        adv, dead = group_advantages(rewards, cfg.G, cfg.normalise_std)          # (B,)
        rows_total, rolled, seen, norms = book.total(len(rewards)), time.time(), [], []
        for p in range(cfg.mu):
            row = 0
            for keys, traj in batches:
                seen += accumulate_gradient(
                    policy, traj, adv[row:row + len(keys)], k=cfg.k, rows_total=rows_total, mask_id=policy.mask_id,
                    eos_id=policy.eos_id, temperature=cfg.temperature, timesteps=cfg.timesteps, points=cfg.points,
                    eps=cfg.eps, beta=cfg.beta, per_step=cfg.ratio == "step", length_norm=cfg.length_norm,
                    micro_batch=cfg.micro_batch, rand=row_random([(*key, "timesteps", p) for key in keys]),
                    reference=getattr(policy.model, "disable_adapter", None))
                row += len(keys)
            if p == 0:
                book.check_ratio(seen)
            lr = schedule.get_last_lr()[0]                                       # logged: the one this step uses
            norms.append(optimizer_step(params, optimizer, cfg.max_grad_norm, book.all_reduce))
            schedule.step()
        book.update_done(update, batches, grades, texts, dead, seen, dropped, lr=lr,
                         grad_norm=max(norms, key=lambda norm: (not math.isfinite(norm), norm)),
                         rollout_seconds=rolled - start, loss_seconds=time.time() - rolled)
    return book.finish()


def load_data(cfg, split):
    options = {name: getattr(cfg, name) for name in ("numbers", "max_number", "max_target", "division", "empties")
               if getattr(cfg, name) is not None}
    file = cfg.train_file if split == "train" else cfg.test_file
    return tasks.load(cfg.task, split, seed=cfg.seed if split == "train" else 0, file=file, **options)


def run(cfg):
    accelerator = processes.join(cfg)                # one process, or several on gloo or nccl
    book = logbook.Logbook(cfg, accelerator)
    with accelerator.local_main_process_first():     # it downloads; the others find everything there
        data = {split: load_data(cfg, split) for split in (["train", "test"] if cfg.mode == "train" else ["test"])}
        model, tokenizer = models.load_model(cfg)
    policy = Policy(model, tokenizer, cfg.device)
    notes = models.preflight(policy, policy.encode(cfg.task, data["test"][0]))
    notes += models.load_adapter(policy, cfg) if cfg.mode == "eval" else models.add_adapters(policy, cfg)
    book.header(policy, data, notes)
    if cfg.mode == "train":
        return train(cfg, policy, data, book)
    return evaluation.run(cfg, policy, data["test"], book, evaluate)


def configure(argv=None):
    cfg = cli.parse(Config, argv)
    cli.fill(cfg, PRESETS, {"large": LLADA, "small": TINY})
    cli.check(cfg, steps_per_block)
    return cfg


def main(argv=None):
    return cli.in_one_sentence(lambda: run(configure(argv)))


if __name__ == "__main__":
    sys.exit(main())
