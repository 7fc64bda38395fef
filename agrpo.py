"""AGRPO in one file: the policy gradient of a masked diffusion language model, step by step.

A masked diffusion model (LLaDA, Dream) writes an answer by unmasking a few tokens per denoising
step. AGRPO (arXiv 2510.04019) takes each step as one action of a Markov decision process. Given
the text so far, the tokens of one step are drawn independently. So the step's log-probability
is a plain sum of token log-probabilities: exact, from one forward pass, no ELBO.

    repeat:
      q      <- questions, G copies of each                                      § 8 Train
      o      <- denoise q in m steps; remember when each token appeared, log pi  § 2 Rollout
      A_i    <- r_i - mean of the group's r,  r = checker(o)                     § 3 Advantages
      t_1..t_k ~ p_t, evenly spaced through p's CDF;   w = 1 / (k p_t)           § 4 Timesteps
      J      <- mean over rows of (1/m) sum_j w_j min(rho A, clip(rho) A)        § 5 Loss
                rho = pi_theta(a_t | x_t) / pi_old(a_t | x_t), x_t masked again
      theta  <- one optimizer step on -J                                         § 6 Update

§ 1 to § 6 are the algorithm: tensors in, tensors out, to be lifted into other code. § 7 makes a
transformers model the policy, § 8 is the training loop, § 9 all that a person types and sees.
Needs kernels.py and tasks.py beside it, and nothing else of this repository. Copied as text,
§ 1 to § 6 need torch and kernels.py alone.

Left out on purpose: a value network, a separate reference model, key-value caches (a policy may
bring one, see Block), sharding one model over GPUs. And training by low-confidence unmasking:
it draws everywhere and keeps the likeliest tokens, so those it discards are part of the action;
with them scored the gradient is exact but very noisy. max_prob chooses before it draws.

Letters   B rows   P prompt   C completion   L = P + C   V vocabulary   W = C / m tokens a step
          m denoising steps   k of them scored   G rollouts per question   N (row, step) pairs
"""
import argparse
import contextlib
import fcntl
import importlib.util
import inspect
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Optional

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import torch.distributed as dist

import tasks
from kernels import logprobs_and_entropy, support_logprobs_and_entropy

# ==============================================================================================
# § 1 The denoising MDP
# ==============================================================================================
#   state   x_t  the prompt, the tokens revealed before step t, [MASK] everywhere else
#   action  a_t  the W tokens revealed at step t:  log pi(a_t | x_t) = sum log p(token | x_t)
#                (which positions, is settled before: by chance or from x_t alone, § 2)
#   reward  r    a checker's verdict on the finished text, once, at the end
#
# One rollout, C = 6 tokens in m = 3 steps, so W = 2:
#
#       x_0     _   _   _   _   _   _
#       x_1     _   +   _   =   _   _            a_0 = { +, = }
#       x_2     3   +   _   =   7   _            a_1 = { 3, 7 }
#       o       3   +   4   =   7  EOS           a_2 = { 4, EOS }
#   step_of     1   0   2   0   1   2
#
# So the finished text and `step_of` hold every state and every action of the trajectory.

UNMASKING = ("random", "max_prob", "entropy")


@dataclass(frozen=True)
class Decoding:
    """How a completion is written: m steps, block after block, C / m tokens a step."""
    C: int
    m: int
    block_length: int              # it is written in blocks of so many tokens, left to right
    unmasking: str = "random"      # which positions a step reveals, one of UNMASKING
    temperature: float = 1.0       # 0 is greedy: for evaluation
    top_k: int = 0                 # draw among the likeliest top_k tokens only; 0: among all
    top_p: float = 1.0             # and of those, among the likeliest that hold this mass

    def __post_init__(self):
        C, m, block = self.C, self.m, self.block_length
        if C < 1 or block < 1 or C % block:
            good = [b for b in range(1, C + 1) if C % b == 0]
            raise ValueError(f"--block_length {block} does not divide --C {C}: choose {good}")
        if m not in step_counts(C, block):
            raise ValueError(f"--m {m} does not fit --C {C} and --block_length {block}: "
                             f"choose from {step_counts(C, block)}")
        if self.unmasking not in UNMASKING:
            raise ValueError(f"--unmasking {self.unmasking} is unknown: choose {UNMASKING}")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"--temperature {self.temperature}, --top_k {self.top_k}, --top_p "
                             f"{self.top_p}: temperature and top_k from 0, top_p in (0, 1]")
        if self.top_p < 1 and not self.top_k:
            raise ValueError(f"--top_p {self.top_p} needs a --top_k, as 150: each token's "
                             "support is stored")

    @property
    def W(self):
        return self.C // self.m

    def block_start(self, t):
        """Where in the completion the block of step t begins; t an int or a tensor."""
        return t * self.W // self.block_length * self.block_length


def step_counts(C, block_length):
    """The numbers of steps that reveal C tokens in equal shares, most first."""
    return [C // W for W in range(1, block_length + 1) if block_length % W == 0]


class Trajectory(NamedTuple):
    """A batch of finished rollouts: each token, the step that drew it, how likely it was."""
    q: torch.Tensor                    # (B, P) prompt ids, left-padded
    q_mask: torch.Tensor               # (B, P) 0 at padding
    o: torch.Tensor                    # (B, C) completion ids
    step_of: torch.Tensor              # (B, C) 0..m-1; m: never drawn, the row had ended before
    logp_old: torch.Tensor             # (B, C) float64, log-probability when drawn
    entropy: torch.Tensor              # (B, C) float64, of what it was drawn from, nats
    support: Optional[torch.Tensor]    # (B, C, top_k) int32 ids it was drawn among; -1: none
    how: Decoding


class Block(NamedTuple):
    """The block being written, as positions in prompt + completion.

    A policy may look at less than the whole text, and keep what it knows of the text around the
    block in `kept`, empty at first: the gradient is that of whatever function the policy is.
    (lab/policies.py has such; the plain policy of § 7 ignores all of this.)
    """
    start: int
    end: int
    kept: dict


def enter_block(q, how, t):
    """The block that step t writes, with nothing known of it yet."""
    start = q.shape[1] + how.block_start(t)
    return Block(start, start + how.block_length, {})


def denoise(policy, q, q_mask, x_t, where, block):
    """One forward pass: logits at positions `where` (N, W) of x_t (N, C) -> (N, W, V).

    Raises FloatingPointError where a position has no finite largest logit.
    """
    ids = torch.cat([q, x_t], dim=1)                                        # (N, L)
    mask = torch.cat([q_mask, torch.ones_like(x_t)], dim=1)
    logits = policy(ids, mask, where + q.shape[1], block)
    # [MASK] is no token, and some models have logits for ids that stand for nothing: never_ids.
    never = sorted({policy.mask_id, *getattr(policy, "never_ids", ())})
    logits = logits.index_fill(-1, torch.tensor(never, device=ids.device), -math.inf)
    # The largest logit is NaN if any is. Unseen, a greedy draw would go on in silence.
    if not logits.detach().amax(dim=-1).isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    return logits


def score(logits, tokens, how, support=None):
    """Log-probability and entropy of `tokens` (N, W) under what they are drawn from.

    Rollout and loss both call this, so their ratio is 1 until the parameters move.
    """
    flat, labels = logits.flatten(0, 1), tokens.flatten()
    T = how.temperature or 1.0                                              # greedy: at T = 1
    if support is None:
        logp, H = logprobs_and_entropy(flat, labels, temperature=T)
    else:
        logp, H = support_logprobs_and_entropy(flat, support.flatten(0, 1), labels,
                                               temperature=T)
    return logp.view_as(tokens), H.view_as(tokens)


# ==============================================================================================
# § 2 Rollout
# ==============================================================================================

def uniforms(*shape):
    """float64 in [0, 1): in float32, sums and quotients of it would round up to 1.0."""
    return torch.rand(*shape, dtype=torch.float64)


def inverse_cdf(p, u):
    """The outcome that each u falls on: the first i with p_0 + ... + p_i > u * sum(p).

    p (N, K) >= 0, need not sum to 1; u (N, J) in [0, 1]. Returns (N, J) int64: never an outcome
    of probability 0 nor one past the end, though the CDF may fall short of 1 by rounding. (In a
    row of zeros there is no other: it gives K.)
    """
    cdf = p.double().cumsum(dim=-1)
    total = cdf[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))     # where u = 1 falls, not past it
    return torch.searchsorted(cdf, torch.minimum(u * total, below), right=True)


def sample_tokens(logits, u, how):
    """One token per position. logits (N, W, V), u (N, W) -> tokens (N, W), support or None.

    The nucleus keeps the token that crosses top_p. With top_k only the `topk` reads all V
    logits.
    """
    if how.temperature == 0:
        return logits.argmax(dim=-1), None
    ids = None
    if how.top_k:
        logits, ids = logits.topk(min(how.top_k, logits.shape[-1]), dim=-1)    # likeliest first
    p = (logits.double() / how.temperature).softmax(dim=-1)
    if how.top_p < 1:
        mass_before = p.cumsum(dim=-1) - p
        p = p * (mass_before < how.top_p)
    drawn = inverse_cdf(p.flatten(0, 1), u.flatten()[:, None]).view(*u.shape, 1)
    if ids is None:
        return drawn[..., 0], None
    return ids.gather(-1, drawn)[..., 0], torch.where(p > 0, ids, -1).int()


def confidence(logits, unmasking):
    """How sure the model is of a position at T = 1, before it draws: (N, W, V) -> (N, W)."""
    likeliest = logits.argmax(dim=-1)
    logp, H = logprobs_and_entropy(logits.flatten(0, 1), likeliest.flatten())
    return (logp if unmasking == "max_prob" else -H).view_as(likeliest)


@torch.no_grad()
def rollout(policy, q, q_mask, how, rand=uniforms):
    """Write B completions to the prompts q, q_mask (B, P). Returns a Trajectory.

    policy   (ids (N, L), attention mask (N, L), positions (N, W), Block) -> logits (N, W, V);
             policy.mask_id, policy.eos_id; if it has them, never_ids (ids that are never drawn)
             and fill_ids (ids that fill the text after the answer, eos_id among them)
    rand     uniforms in [0, 1), float64, of the shape asked for; the first dimension is B
    """
    B, W, block_length, dev = len(q), how.W, how.block_length, q.device
    o = q.new_full((B, how.C), policy.mask_id)
    step_of = q.new_full((B, how.C), how.m)
    logp_old, entropy = torch.zeros(2, B, how.C, dtype=torch.float64, device=dev)
    support = None
    # By these the positions are sorted, and each token is drawn.
    order, u = rand(B, how.C).to(dev), rand(B, how.m, W).to(dev)
    fill = torch.tensor(sorted(getattr(policy, "fill_ids", [policy.eos_id])), device=dev)
    row = torch.arange(B, device=dev)                           # rows still being written, (R,)

    for t in range(how.m):
        start = how.block_start(t)
        if t * W == start:
            block = enter_block(q, how, t)
            # A row whose last block is nothing but EOS has ended. Its other steps draw nothing,
            # so leaving them out is exact. An EOS that was drawn is an action like any other.
            if start > 0:
                ended = torch.isin(o[row, start - block_length:start], fill).all(dim=1)
                o[row[ended], start:] = policy.eos_id
                row = row[~ended]
        if len(row) == 0:
            break

        # Where: W of the positions still masked in this block. Never by the drawn tokens: a
        # choice among those would be part of the action, and its probability unknown. max_prob
        # and entropy choose by theta, but without chance: where no order flips, that choice has
        # no gradient. All rows have equally many left.
        still = step_of[row, start:start + block_length] == how.m
        masked = start + still.nonzero()[:, 1].view(len(row), -1)               # (R, left)
        if how.unmasking == "random":
            chosen = order[row].gather(1, masked).argsort(dim=1)[:, :W]
            where = masked.gather(1, chosen)                                    # (R, W)
            logits = denoise(policy, q[row], q_mask[row], o[row], where, block)
        else:
            logits = denoise(policy, q[row], q_mask[row], o[row], masked, block)
            chosen = confidence(logits, how.unmasking).topk(W, dim=1).indices
            where = masked.gather(1, chosen)
            logits = logits[torch.arange(len(row), device=dev)[:, None], chosen]

        # What: a token at each, independently. Remember how likely it was.
        tokens, support_t = sample_tokens(logits, u[row, t], how)
        logp, H = score(logits, tokens, how, support_t)
        at = (row[:, None], where)
        o[at] = tokens
        step_of[at] = t
        logp_old[at] = logp.double()
        entropy[at] = H.double()
        if support_t is not None:
            if support is None:
                support = support_t.new_full((B, how.C, support_t.shape[-1]), -1)
            support[at] = support_t
    return Trajectory(q, q_mask, o, step_of, logp_old, entropy, support, how)


# ==============================================================================================
# § 3 Advantages
# ==============================================================================================

def group_advantages(rewards, G, divide_by_std=False):
    """A_i = r_i - mean_j r_j over the G rollouts of one question. rewards (B,) float -> (B,).

    Groups are contiguous. Exactly 0 where all rewards of a group are equal: a dead group.
    The mean includes r_i: the expected gradient is (G-1)/G of the policy gradient, a constant.
    Dividing by the standard deviation (GRPO) favours questions of little spread (Dr. GRPO,
    arXiv 2503.20783), so it is off.
    """
    r = rewards.view(-1, G)                                                 # (questions, G)
    A = r - r.mean(dim=1, keepdim=True)
    if divide_by_std:
        A = A / (r.std(dim=1, keepdim=True) + 1e-4)
    dead = (r == r[:, :1]).all(dim=1, keepdim=True)
    return A.masked_fill(dead, 0.0).flatten()


# ==============================================================================================
# § 4 Timesteps
# ==============================================================================================
# The gradient is a sum over all m steps, a forward and backward pass each. AGRPO estimates it
# from k << m of them:   sum_t g_t  ~  sum_j w_j g_{t_j},   t_j ~ p,   w_j = 1 / (k p_{t_j}).
# The mean is the full sum for every p > 0 where the row acted. The variance differs. The draws
# need not be independent: all that counts is that step t is drawn k p_t times on average.
# p may look at the drawn tokens: given the trajectory, the estimate of its sum stays unbiased.

FOLLOW = ("surprise", "entropy", "uniform")


def per_step(traj, values):
    """Sum a value per token over the tokens of each step: (B, C) -> (B, m)."""
    sums = values.new_zeros(len(values), traj.how.m + 1).scatter_add(1, traj.step_of, values)
    return sums[:, :-1]                                         # column m: places never drawn


def timestep_probs(traj, follow="surprise", floor=0.1):
    """p_t (B, m) float64, by how much a step decided; a share `floor` uniform bounds weights.

    entropy    of the step's distributions: the paper's choice
    surprise   sqrt(sum over its tokens of (1 - p)^2): ours. At the logits, grad log p is
               onehot - p, about that long, also where the model was sure of another token.
    """
    acted = (per_step(traj, torch.ones_like(traj.entropy)) > 0).double()
    uniform = acted / acted.sum(dim=1, keepdim=True).clamp(min=1)
    if follow == "uniform":
        return uniform
    if follow == "entropy":
        weight = per_step(traj, traj.entropy.clamp(min=0))      # below 0 by rounding
    else:
        weight = per_step(traj, (1 - traj.logp_old.exp()).square()).sqrt()
    total = weight.sum(dim=1, keepdim=True)
    # A total so small that its quotients lose digits says nothing: then every step alike.
    mixed = (1 - floor) * weight / total + floor * uniform
    return torch.where(total > 1e-100, mixed, uniform)


def sample_timesteps(p, k, offset):
    """k steps per row of p (B, m), at evenly spaced points of its CDF; offset (B, 1) in [0, 1).

    Returns rows (N,), steps (N,), w (N,), N <= B k. A draw weighs 1 / (k p_t), at most
    n / (k floor) in a row of n steps. A step drawn twice is one pair of twice the weight, which
    may exceed that bound. A row of zeros yields nothing.
    """
    u = (torch.arange(k, device=p.device) + offset.to(p)) / k               # (B, k)
    t = inverse_cdf(p, u).clamp(max=p.shape[1] - 1)             # for the rows of zeros
    draws = torch.zeros_like(p).scatter_add(1, t, torch.ones_like(u))
    rows, steps = (draws * (p > 0)).nonzero().unbind(dim=1)
    return rows, steps, draws[rows, steps] / (k * p[rows, steps])


# ==============================================================================================
# § 5 Loss
# ==============================================================================================

def step_logprobs(policy, traj, rows, steps):
    """log pi_theta of what pairs (row, step) revealed, by one forward pass; and log pi_old.

    rows, steps (N,): steps that acted, all of one block, unless the policy ignores blocks.
    Returns (N, W) with gradient, (N, W).
    """
    # x_t again: the tokens revealed before step t, [MASK] elsewhere. And where step t acted.
    step_of = traj.step_of[rows]                                            # (N, C)
    x_t = torch.where(step_of < steps[:, None], traj.o[rows], policy.mask_id)
    where = (step_of == steps[:, None]).nonzero()[:, 1].view(len(rows), -1)
    block = enter_block(traj.q, traj.how, int(steps[0]))
    logits = denoise(policy, traj.q[rows], traj.q_mask[rows], x_t, where, block)
    # Under the very distribution they were drawn from: its temperature, its truncated support.
    at = (rows[:, None], where)                                             # (N, W)
    support = None if traj.support is None else traj.support[at]
    logp, _ = score(logits, traj.o[at], traj.how, support)
    return logp, traj.logp_old[at].to(logp)


def clipped_objective(logp, logp_old, A, eps=0.2):
    """J = min(rho A, clip(rho, 1 - eps, 1 + eps) A),  rho = pi / pi_old, to be maximised.

    logp, logp_old (N, W) per token, or (N, 1) summed over the step's tokens: the product of
    their ratios is that of the MDP's action. A (N, 1). Returns J, and rho without gradient.
    """
    log_ratio = logp - logp_old
    ratio = log_ratio.detach().exp()
    # Where the clip holds, or A = 0, J is a constant. Taking log_ratio out there keeps a ratio
    # that overflows from sending 0 * inf back.
    clipped = ((A > 0) & (ratio > 1 + eps)) | ((A < 0) & (ratio < 1 - eps)) | (A == 0)
    free = log_ratio.masked_fill(clipped, 0.0).exp() * A
    bound = (1 + eps * A.sign()) * A
    return torch.where(clipped, bound, free), ratio


def kl_to_reference(logp, logp_old, logp_ref):
    """rho k3 per token: an estimate of KL(pi || ref), and its gradient that of the KL.

    k3 = e^d - d - 1 >= 0, d = logp_ref - logp (Schulman). Without rho in front its gradient
    would be that of KL(ref || pi) (arXiv 2512.02556).
    """
    d = logp_ref - logp
    return (logp - logp_old).exp() * (d.exp() - d - 1)


# ==============================================================================================
# § 6 Update
# ==============================================================================================

class Seen(NamedTuple):
    """What a pass over the pairs looked like, for the log: a row per pair."""
    ratio: torch.Tensor                # (N, W), or (N, 1) per step
    A: torch.Tensor                    # (N, 1)
    kl: torch.Tensor                   # (N, W)
    forwards: int                      # micro-batches


def add_gradient(policy, traj, A, pairs, eps=0.2, micro_batch=32, ratio_per="token", beta=0.0):
    """Add the gradient of -J to .grad of the policy's parameters. Returns Seen.

        J = 1/B sum_rows 1/m sum_j w_j sum_tokens [min(rho A, clip(rho) A) - beta rho k3]

    1/m is a scale only: the official code takes the mean over the steps, not the sum.
    A (B,); pairs: rows, steps, w, each (N,). One backward per micro-batch, so that one graph is
    alive at a time; gradients add up to that of the whole. With beta, policy.reference() is a
    context in which the policy is the reference. Before the first optimizer step Seen.ratio
    is 1; if not, rollout and loss were two functions (dropout?).
    """
    B, m = len(A), traj.how.m
    nothing = traj.logp_old.new_zeros(0, dtype=torch.float32)
    seen = [Seen(nothing, nothing, nothing, 0)]                 # there may be no pairs
    # One forward never mixes blocks: a policy may see each differently.
    block = traj.how.block_start(pairs[1])
    for part in [part for b in block.unique()
                 for part in (block == b).nonzero()[:, 0].split(micro_batch)]:
        rows, steps, w = (x[part] for x in pairs)
        logp, logp_old = step_logprobs(policy, traj, rows, steps)           # (N, W)
        A_pair = A[rows, None].to(logp)
        if ratio_per == "step":
            action, action_old = logp.sum(1, keepdim=True), logp_old.sum(1, keepdim=True)
            J, ratio = clipped_objective(action, action_old, A_pair, eps)
        else:
            J, ratio = clipped_objective(logp, logp_old, A_pair, eps)
        J, kl = J.sum(dim=1), torch.zeros_like(logp)
        if beta > 0:
            with torch.no_grad(), policy.reference():
                logp_ref, _ = step_logprobs(policy, traj, rows, steps)
            kl = kl_to_reference(logp, logp_old, logp_ref)
            J = J - beta * kl.sum(dim=1)
        loss = -(w.to(logp) * J).sum() / (B * m)
        loss.backward()
        seen.append(Seen(ratio, A_pair, kl.detach(), 1))
    return merge(seen)


def merge(seen):
    """The Seen of several passes or micro-batches as one."""
    ratio, A, kl, forwards = zip(*seen)
    return Seen(torch.cat(ratio), torch.cat(A), torch.cat(kl), sum(forwards))


def optimizer_step(params, optimizer, max_grad_norm):
    """Average gradients over processes, clip, step. Returns the norm before clipping."""
    params = [p for p in params if p.requires_grad]
    for p in params:                                            # no live group leaves no .grad
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)
    norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm).item()
    if 0 < norm < math.inf:            # no news, or broken: move nothing, not even by momentum
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ==============================================================================================
# § 7 A transformers model as the policy
# ==============================================================================================

UserError = tasks.TaskError            # bad input: a ValueError of one sentence, told in § 9
HALF = (torch.bfloat16, torch.float16)


class Policy:
    """The callable that `denoise` wants: float32 logits, the head on the asked positions only.

    Logits of every position would be 1.2 GB at B = 8, L = 584, V = 126464. So a hook in front
    of the LM head hands it the asked positions of its input and nothing else.
    """
    block_causal = False               # does a token see only its own block and those before?
    note = ""                          # printed where --policy names this class
    row = positions = None             # set by `logits` for the hook: see there

    def __init__(self, model, tokenizer, mask_id, device="cpu"):
        self.model, self.tokenizer, self.device = model, tokenizer, torch.device(device)
        self.dtype = next(model.parameters()).dtype
        self.mask_id, self.eos_id = mask_id, tokenizer.eos_token_id
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.pad_id = tokenizer.pad_token_id
        # What fills the text after an answer; and ids that stand for nothing.
        self.fill_ids = {self.eos_id, self.pad_id}
        head, tokens = model.get_output_embeddings(), set(tokenizer.get_vocab().values())
        self.never_ids = {mask_id} | set(range(len(head.weight))) - tokens
        # Dream predicts position i at i - 1 and takes its attention mask in four dimensions.
        self.is_dream = "dream" in model.config.model_type.lower()
        self.shift = int(self.is_dream)
        self.ignores_mask = False                               # found out by look_at
        # bf16 logits would move rho by a factor of up to 1.19, and the clip is 0.2 wide. So the
        # head computes in float32, under autocast too. A tied one gets a copy of its own.
        for name, p in list(head.named_parameters(recurse=False)):
            if p.dtype in HALF:
                setattr(head, name, torch.nn.Parameter(p.detach().float(), requires_grad=False))
        head.forward = torch.autocast(self.device.type, enabled=False)(head.forward)
        head.register_forward_pre_hook(self._asked_positions_only)

    def _asked_positions_only(self, head, args):
        hidden = args[0]                                                    # (states, L, d)
        row = torch.arange(len(hidden), device=hidden.device) if self.row is None else self.row
        return hidden[row[:, None], self.positions].to(head.weight.dtype)   # (N, W, d)

    def __call__(self, ids, mask, positions, block=None):
        """ids, mask (N, L), positions (N, W) -> logits (N, W, V). Sees the whole text."""
        if not self.ignores_mask:
            return self.logits(ids, mask, positions)
        return one_length_at_a_time(mask, lambda rows, n: self.logits(
            ids[rows, n:], mask[rows, n:], positions[rows] - n))

    def logits(self, ids, mask, positions):
        """One forward pass of the model, on all it can see."""
        # Rows in the same state share its pass: the G copies of a question all begin so.
        states, self.row = torch.cat([ids, mask], dim=1).unique(dim=0, return_inverse=True)
        ids, mask = states.chunk(2, dim=1)                                  # (states, L)
        self.positions = positions - self.shift
        logits = self.run_model(ids, mask)
        self.row = None
        return logits

    def run_model(self, ids, mask):
        """The model itself; its head hands on what `_asked_positions_only` picks."""
        mask = mask[:, None, None, :].bool() if self.is_dream else mask
        with self.autocast():
            return self.model(input_ids=ids, attention_mask=mask).logits

    def autocast(self):
        """Where the base has 16 bits, its float32 adapters compute in 16 bits too."""
        half = self.dtype in HALF
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)

    def reference(self):
        """A context in which this is the base model."""
        return self.model.disable_adapter()

    def encode(self, chats):
        """Lists of chat messages -> q, q_mask (B, P), left-padded. Raises UserError."""
        texts = [self.render(chat) for chat in chats]
        batch = self.tokenizer(texts, add_special_tokens=False, return_tensors="pt",
                               padding=True, padding_side="left", return_attention_mask=True)
        q, q_mask = batch["input_ids"], batch["attention_mask"]
        # A word that the tokenizer lacks would make another problem of it than the one graded.
        # (Where [UNK] is EOS or padding too, it tells nothing.)
        unknown = self.tokenizer.unk_token_id
        lacking = (q == (-1 if unknown is None else unknown)).any(dim=1)
        if lacking.any() and unknown not in self.fill_ids:
            text = texts[lacking.int().argmax()]
            raise UserError(f"--model lacks a token for a part of {text[-60:]!r}: choose "
                            "problems its vocabulary can write, or another model")
        return q.to(self.device), q_mask.to(self.device)

    def render(self, chat):
        """Chat messages as text. (`tokenize=True` differs between versions of transformers.)"""
        if not self.tokenizer.chat_template:
            return "\n\n".join(turn["content"] for turn in chat) + "\n\n"
        options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
        try:
            return self.tokenizer.apply_chat_template(chat, **options)
        except Exception:              # whatever a template raises
            if chat[0]["role"] != "system" or len(chat) < 2:
                raise
            # A template without a system role: that text goes in front of the question.
            both = chat[0]["content"] + "\n\n" + chat[1]["content"]
            return self.render([dict(chat[1], content=both), *chat[2:]])

    def decode(self, o):
        return self.tokenizer.batch_decode(o, skip_special_tokens=True,
                                           clean_up_tokenization_spaces=False)


def one_length_at_a_time(mask, read):
    """For a model that would read padding as text: rows of one length, their padding cut off.

    read(rows, n) -> logits of these rows, whose first n tokens are padding. -> all, in order
    """
    padding, parts, order = (mask == 0).sum(dim=1), [], []
    for n in padding.unique().tolist():
        rows = (padding == n).nonzero()[:, 0]
        parts.append(read(rows, n))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


# Naming one of these runs the Python code that comes with it, of this commit (None: newest).
# For any other name that takes --trust_remote_code.
KNOWN = {
    "GSAI-ML/LLaDA-8B-Instruct": "08b83a6feb34df1a6011b80c3c00c7563e963b07",
    "GSAI-ML/LLaDA-8B-Base": "0f2787f2d87eac5eed8a087d5ecd24277e6255b2",
    "Dream-org/Dream-v0-Instruct-7B": "05334cb9faaf763692dcf9d8737c642be2b2a6ae",
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": None,
}
BLOCK_DIFFUSION = "bd3lm|llada2|sdar|trado|fast_dllm"           # in name, type or class


def load_policy(cfg):
    """The model of --model as a Policy, with LoRA; its `notes` say what was found of it.

    Raises UserError.
    """
    model, tokenizer = load_model(cfg)
    config, name = model.config, f"--model {cfg.model}"
    # Which id is [MASK]? The config says it, or the tokenizer, or a token of that name. It is
    # never a constant: members of one family differ.
    added = {text.strip("<|[]>").lower(): i for text, i in tokenizer.get_added_vocab().items()}
    said = [getattr(config, "mask_token_id", None), tokenizer.mask_token_id, added.get("mask"),
            added.get("mdm_mask"), -1]
    mask_id = cfg.mask_id if cfg.mask_id >= 0 else next(i for i in said if i is not None)
    eos_id, ids = tokenizer.eos_token_id, len(model.get_input_embeddings().weight)
    if eos_id is None or not 0 <= mask_id < ids:
        raise UserError(f"{name}: [MASK] and EOS are {mask_id} and {eos_id} of {ids} ids; a "
                        "masked diffusion model has both: --mask_id N says which")
    kind = import_file(cfg.policy, "--policy") if cfg.policy else Policy
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise UserError(f"--policy {cfg.policy} must name a class that derives from "
                        "agrpo.Policy: FILE.py:Class")
    # Full attention in a model that was trained without moves log pi by 0.2 - 0.8 nats a token.
    about = " ".join([cfg.model, config.model_type, *(config.architectures or ())])
    if re.search(BLOCK_DIFFUSION, about, re.I) and not kind.block_causal:
        raise UserError(f"{name} is a block-diffusion model, under full attention log pi is "
                        "wrong: add --policy lab/policies.py:FrozenBlockCausal, if that reads "
                        "its code, and the --block_length it was trained with")
    policy = kind(model, tokenizer, mask_id, cfg.device)
    policy.shift = policy.shift if cfg.shift < 0 else cfg.shift
    # Look before there are adapters: what is found is said of the model as it came.
    policy.notes = [look_at(policy, name), add_adapters(policy, cfg)]
    if cfg.policy:
        policy.notes.append(f"--policy {cfg.policy}: {kind.note}")
    return policy


def load_model(cfg):
    """(model, tokenizer), every weight read from the files. Raises UserError."""
    import huggingface_hub
    import transformers
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

    transformers.logging.set_verbosity_error()
    name, folder = f"--model {cfg.model}", local_folder(cfg.model)
    source, where = str(folder or cfg.model), {}
    if folder is None:                 # hub out of reach: the cache, or an error at once
        where = dict(revision=cfg.revision or KNOWN.get(cfg.model),
                     local_files_only=not tasks.hub_answers(huggingface_hub))
    # A local folder may bear a known name and hold anything.
    remote = cfg.trust_remote_code or folder is None and cfg.model in KNOWN
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=remote, **where)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=remote, **where)
        # Rollout and loss must be one function: no dropout.
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        config.reference_compile = False        # ModernBERT would compile each layer on a GPU
        own = own_class(config, source, where) if remote else None
        options = dict(config=config, dtype=getattr(torch, cfg.dtype), output_loading_info=True)
        if own:                        # through the base class: Dream's method loses the report
            load = PreTrainedModel.from_pretrained.__func__
            model, report = load(own, source, **options, **where)
        else:
            model, report = AutoModelForMaskedLM.from_pretrained(source, **options, **where)
        model.to(cfg.device)
    except Exception as e:             # a model's own code, damaged files: they raise anything
        text, hint = str(e), "" if folder else "; check name and network, or give a folder"
        if "trust_remote_code" in text:
            text = "it brings its own Python code: read it, then add --trust_remote_code"
        elif "Unrecognized configuration class" in text:
            text = "it is no masked language model that transformers knows, as ModernBERT is"
        raise UserError(f"{name} could not be loaded: {first_line(text)}{hint}") from e
    # What the files lack, transformers would make up.
    lost = sorted(set(report["missing_keys"]) & dict(model.named_parameters()).keys())
    if lost or model.get_output_embeddings() is None:
        raise UserError(f"{name} lacks {', '.join(lost[:3]) or 'an LM head'}: its files are "
                        "incomplete, or not of a masked language model")
    if torch.cuda.is_available():
        torch.backends.cuda.enable_mem_efficient_sdp(True)      # LLaDA's code turns it off
        # TF32 leaves every 16-bit number as it is, and the float32 head has such inputs.
        torch.backends.cuda.matmul.allow_tf32 = cfg.dtype != "float32"
    model.config.use_cache = False
    return without_dropout(model), tokenizer


def without_dropout(model):
    """In train mode, where alone some code has gradients or recomputes activations."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def local_folder(model):
    """The folder that --model names, or None for a hub id. Refuses a folder without a model."""
    folder = Path(model).expanduser()
    if model == "lab/tiny" and not folder.exists():
        folder = Path(__file__).resolve().parent / folder       # called from elsewhere
    if not folder.exists() and model.count("/") == 1 and model[0] not in "./~":
        return None
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {model}: no config.json there; give a folder saved by "
                        "save_pretrained, or a hub id")
    return folder


def own_class(config, source, where):
    """The class that comes with a checkpoint: the one `architectures` names, for auto_map may
    name one without a head. None if it brings none."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = getattr(config, "auto_map", None) or {}
    kinds = ("AutoModelForMaskedLM", "AutoModel", "AutoModelForCausalLM")
    found = [auto_map[kind] for kind in kinds if kind in auto_map]
    if not found:
        return None
    if int(transformers.__version__.split(".")[0]) >= 5:        # its weights would be random
        raise ImportError("its code is for transformers 4: pip install 'transformers<5'")
    module = found[0].rpartition(".")[0]
    for name in [f"{module}.{kind}" for kind in config.architectures or ()] + found:
        with contextlib.suppress(AttributeError):
            return get_class_from_dynamic_module(name, source, **where)


@torch.no_grad()
def look_at(policy, name):
    """What the model does with padding and later tokens, before an hour is spent. -> a note"""
    q, _ = policy.encode([[dict(role="user", content="1 2 3")]])
    text = torch.cat([q[0, -64:], q.new_full((4,), policy.mask_id)])
    P, at = len(text), torch.arange(1, len(text) - 1, device=q.device)[None]
    seen = torch.ones_like(text)[None]
    alone = policy.logits(text[None], seen, at)
    if not alone.isfinite().all():
        raise UserError(f"{name} gives logits that are not finite: its weights are damaged")
    # Once more, padded with itself, backwards. Is the gap one of rounding?
    longer = torch.cat([text.flip(0), text])[None]
    padded = policy.logits(longer, torch.cat([0 * seen, seen], dim=1), at + P)
    gap = (padded - alone).abs().max() / alone.abs().max()
    policy.ignores_mask = not gap < (0.05 if policy.dtype in HALF else 1e-3)
    # And with another last token.
    text[-1] = policy.eos_id
    reach = (policy.logits(text[None], seen, at) - alone).abs().max() / alone.abs().max()
    if reach == 0:
        raise UserError(f"{name} is causal: a later token moves no earlier logit, so it cannot "
                        "denoise; choose a masked diffusion model")
    return (f"[MASK] is {policy.mask_id}, EOS {policy.eos_id}; padding moves logits by "
            f"{gap:.0e} of the largest, a later token by {reach:.0e}"
            + "; so prompts go unpadded, one length at a time" * policy.ignores_mask)


def add_adapters(policy, cfg):
    """LoRA on the blocks' linear layers, not on the head: fresh or from --adapter. -> a note

    Raises UserError.
    """
    from peft import LoraConfig, get_peft_model

    base, layers = policy.model, block_linears(policy.model)
    if cfg.lora_r == 0:
        base.requires_grad_(True)
    elif cfg.adapter:
        policy.model = saved_adapter(base, cfg)
    else:
        # B starts at zero, so this is the base model; A is random, the same in every process.
        torch.manual_seed(cfg.seed)
        lora = LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=layers)
        policy.model = get_peft_model(base, lora) if layers else base
        hit = len(lora_layers(policy.model))
        if not layers or hit != len(layers):
            raise UserError(f"--model {cfg.model}: LoRA hit {hit} of {len(layers)} linear "
                            "layers in numbered blocks; --lora_r 0 trains all weights")
    for layer in lora_layers(policy.model):
        # In 16 bits peft would cast an adapter's input up, and autocast down again.
        if policy.dtype in HALF:
            layer.cast_input_dtype_enabled = False
        elif small_and_plain(layer):
            layer.forward = partial(lora_forward, layer)
    if cfg.recompute and hasattr(getattr(base, "model", None), "set_activation_checkpointing"):
        base.model.set_activation_checkpointing("whole_layer")  # LLaDA's own switch
    elif cfg.recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    trained, total = sum(n for n, on in sizes if on), sum(n for n, _ in sizes)
    kinds = " ".join(dict.fromkeys(n.rpartition(".")[2] for n in layers))
    what = f"LoRA on {len(layers)} layers ({kinds})" if cfg.lora_r else "no LoRA"
    return f"{what}: {trained:,} of {total:,} parameters are trained"


# LoraProduct is for matrices of at most so many numbers. A rule that looks at the number of
# tokens too would be faster still, but let rollout and loss round differently.
SMALL = 2 ** 17


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


class LoraProduct(torch.autograd.Function):
    """x (W + s B A)' + bias: LoRA in one product, where x W' + s (x A') B' takes three.

    With a small W and many tokens that is faster, a forward of lab/tiny by a third. The
    gradients are those of the three, so nothing of W's size is kept for them. For float32: in
    16 bits the sum would swallow the small B A.
    """
    @staticmethod
    def forward(ctx, x, W, bias, A, B, s):
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return torch.nn.functional.linear(x, W + s * (B @ A), bias)

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        dx = dy @ (W + ctx.s * (B @ A))
        x, dy = x.flatten(0, -2), ctx.s * dy.flatten(0, -2)                 # (tokens, ...)
        return dx, None, None, (dy @ B).T @ x, dy.T @ (x @ A.T), None


def lora_forward(layer, x):
    """What a LoRA layer of peft computes: by LoraProduct, while its one adapter is in use."""
    if layer.disable_adapters or layer.merged or layer.active_adapters != ["default"]:
        return type(layer).forward(layer, x)
    base, A, B = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    s = layer.scaling["default"]
    return LoraProduct.apply(x, base.weight, base.bias, A.weight, B.weight, s)


def small_and_plain(layer):
    """Is W + s B A cheap to add up, and all that the layer computes? (DoRA's is more.)"""
    base = layer.base_layer
    return (isinstance(base, torch.nn.Linear) and base.weight.numel() <= SMALL
            and not layer.lora_variant and layer.lora_B["default"].bias is None)


def saved_adapter(base, cfg):
    """The base model with the adapter of --adapter. Raises UserError."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    folder = str(Path(cfg.adapter).expanduser())
    misfit = f"it does not fit --model {cfg.model}"
    try:
        if not Path(folder, "adapter_config.json").is_file():   # peft would ask the hub
            raise ValueError("no adapter_config.json there")
        # peft takes what fits and is silent about the rest: so compare the names.
        there = load_peft_weights(folder, device="cpu", local_files_only=True)
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        if there.keys() != get_peft_model_state_dict(model).keys():
            raise ValueError(misfit)
        if not all(x.isfinite().all() for x in there.values()):
            raise ValueError("its weights are not finite, its training diverged")
        return without_dropout(model)                           # it may bring its own
    except Exception as e:                                      # damaged files raise anything
        why = misfit if "size mismatch" in str(e) else first_line(e)
        raise UserError(f"--adapter {cfg.adapter}: {why}; give the adapter/ folder of a run, "
                        "and the model it was trained on") from e


def block_linears(model):
    """Names of the linear layers in the blocks: a path with a number in it. The head has none.

    In a mixture of experts these and their router stay as they are: few tokens reach each.
    """
    modules = dict(model.named_modules())
    # "layers.3.mlp" is a mixture if "layers.3.mlp.experts" exists.
    mixtures = [name.removesuffix("experts") for name in modules if name.endswith(".experts")]
    frozen = tuple(mixture + part + "." for mixture in mixtures
                   for part in ("experts", "gate", "router"))
    return [name for name, module in modules.items()
            if isinstance(module, torch.nn.Linear) and any(map(str.isdigit, name.split(".")))
            and not (name + ".").startswith(frozen)]


def first_line(error):
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


# ==============================================================================================
# § 8 Train
# ==============================================================================================

def row_random(keys):
    """`rand` with a generator per row, seeded by the row's key.

    What a row draws depends on its key alone, not on the batch it sits in, on the processes, or
    on what ran before. So a resumed run needs no random states.
    """
    def generator(key):
        digest = blake2b(repr(key).encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    rows = [generator(key) for key in keys]
    return lambda B, *shape: torch.stack(
        [torch.rand(*shape, generator=g, dtype=torch.float64) for g in rows])


def questions(n, per_update, update, seed):
    """Indices of the examples of one update: a walk through all n, shuffled anew each epoch."""
    # The i-th question of the run is the at-th of its epoch. An update may span two epochs.
    order = {}
    for i in range(update * per_update, (update + 1) * per_update):
        epoch, at = divmod(i, n)
        if epoch not in order:
            shuffle = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order[epoch] = torch.randperm(n, generator=shuffle)
        yield int(order[epoch][at])


def learning_rate(cfg, step):
    """Linear warm-up over 1 % of the optimizer steps, then cosine to 0."""
    total = cfg.updates * cfg.mu
    warm = max(1, round(0.01 * total))                          # it may be all there is: + 1
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step + 1 - warm) / (total - warm + 1)))
    return cfg.lr * min((step + 1) / warm, cosine)


def processes():
    """(index of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """The values of all processes, in their order."""
    values = [value] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def write_answers(policy, examples, keys, cfg, how):
    """Rollouts of the examples, one for each key: G keys an example are G copies of it.

    At most rollout_batch rows at a time. Returns the Trajectory, the texts and their grades.
    """
    # The prompts, each copied next to itself: a group is contiguous.
    copies = len(keys) // len(examples)
    q, q_mask = policy.encode([tasks.TASKS[cfg.task].prompt(example) for example in examples])
    q, q_mask = (x.repeat_interleave(copies, dim=0) for x in (q, q_mask))
    parts = []
    for i in range(0, len(keys), cfg.rollout_batch):
        rows = slice(i, i + cfg.rollout_batch)
        parts.append(rollout(policy, q[rows], q_mask[rows], how, row_random(keys[rows])))
    # Back into one batch.
    *tensors, _ = zip(*parts)
    traj = Trajectory(*(None if x[0] is None else torch.cat(x) for x in tensors), how)
    texts = policy.decode(traj.o)
    asked = [example for example in examples for _ in range(copies)]
    return traj, texts, tasks.grade_batch(cfg.task, texts, asked)


def policy_gradient(policy, traj, A, cfg, rand):
    """AGRPO's estimate, one pass over a batch of rollouts: § 4 to § 6. Returns Seen."""
    # A = 0 has no gradient but that of the KL: no forward is spent on it.
    alive = (A != 0) | (cfg.beta > 0)
    p = timestep_probs(traj, cfg.follow) * alive[:, None]
    pairs = sample_timesteps(p, cfg.k, rand(len(p), 1))
    return add_gradient(policy, traj, A, pairs, cfg.eps, cfg.micro_batch, cfg.ratio_per,
                        cfg.beta)


def train(policy, data, cfg, params, optimizer, first=0, gradient=policy_gradient):
    """The loop at the top of this file, from update `first` on.

    Yields what happened in each update; whoever iterates prints, evaluates and saves.
    """
    index, size = processes()
    for update in range(first, cfg.updates):
        start = time.time()
        # Each process takes its share of the questions. A key names the place: the question
        # itself may stand at two places of an update, and gets other rollouts at each.
        drawn = enumerate(questions(len(data), cfg.questions, update, cfg.seed))
        asked = list(drawn)[index::size]
        keys = [(cfg.seed, update, place, copy) for place, _ in asked for copy in range(cfg.G)]
        examples = [data[i] for _, i in asked]
        traj, texts, grades = write_answers(policy, examples, keys, cfg, cfg.how)
        rolled = time.time()

        # What was better than its group becomes likelier, what was worse less likely.
        rewards = torch.tensor([g.reward for g in grades], dtype=torch.float64)
        A = group_advantages(rewards.to(traj.q.device), cfg.G, cfg.divide_by_std)
        seen, norms = [], []
        for n in range(cfg.mu):
            # A pass over the same rollouts, with timesteps and an optimizer step of its own.
            rand = row_random([(*key, "timesteps", n) for key in keys])
            seen.append(gradient(policy, traj, A, cfg, rand))
            if update == first and n == 0:
                check_ratio(policy, seen[0].ratio)
            lr = learning_rate(cfg, update * cfg.mu + n)
            for group in optimizer.param_groups:
                group["lr"] = lr
            norms.append(optimizer_step(params, optimizer, cfg.max_grad_norm))
        # The log has the largest norm of the passes; one that is not finite is the largest.
        worst = max(norms, key=lambda norm: (not math.isfinite(norm), norm))
        yield dict(update=update + 1, **statistics(policy, traj, grades, A, merge(seen), cfg),
                   lr=lr, grad_norm=worst, rollout_seconds=rolled - start,
                   loss_seconds=time.time() - rolled,
                   sample=describe(policy, traj, 0, texts[0], grades[0]))


def check_ratio(policy, ratio):
    """Before the first optimizer step pi_theta is pi_old: any other ratio is a fault.

    In 16 bits a GPU rounds a product of few rows otherwise than one of many, and a single token
    may be off by 0.2 (measured at 8B): there the mean decides, and a larger maximum is a sign.
    """
    off = (ratio - 1).abs() if len(ratio) else torch.zeros(1)
    worst, mean = torch.tensor(gather((off.amax().item(), off.mean().item()))).amax(dim=0)
    found = f"max|ratio - 1| before the first optimizer step: {worst:.1e}"
    decides, tolerance = worst, 1e-3
    if policy.dtype in HALF:
        decides, tolerance, found = mean, 0.1, f"{found}, its mean {mean:.1e}"
    if not decides < tolerance:
        raise UserError(f"{found}, not below {tolerance}: rollout and loss disagree; see the "
                        "model's code")
    say(found)
    if worst > 0.5:
        say("    warning: that is more than rounding; if --dtype float32 gives more than 1e-3, "
            "see the model's code")


def statistics(policy, traj, grades, A, seen, cfg):
    """The numbers of the log: means over the rows, tokens and pairs of all processes."""
    # Tokens that were drawn; those of the last quarter of the steps; those behind the answer.
    drawn, ratio = traj.step_of < cfg.m, seen.ratio
    late = drawn & (traj.step_of >= cfg.m - max(1, cfg.m // 4))
    filling = torch.isin(traj.o, torch.tensor(sorted(policy.fill_ids), device=traj.o.device))
    each = dict(
        reward=[g.reward for g in grades], correct=[g.correct for g in grades],
        format=[g.format for g in grades], length=(~filling).sum(dim=1),
        dead_groups=(A.view(-1, cfg.G) == 0).all(dim=1), entropy=traj.entropy[drawn],
        late_eos=filling[late], kl=seen.kl, clip_low=(ratio < 1 - cfg.eps) & (seen.A < 0),
        clip_high=(ratio > 1 + cfg.eps) & (seen.A > 0))
    # The mean over all processes is the sum of their sums over the sum of their counts.
    each = {name: torch.as_tensor(x).double() for name, x in each.items()}
    extremes = (ratio.min().item(), ratio.max().item()) if len(ratio) else (1.0, 1.0)
    sums = {name: (x.sum().item(), x.numel()) for name, x in each.items()}
    parts, low, high, pairs, forwards = zip(
        *gather((sums, *extremes, len(ratio), seen.forwards)))
    means = {}
    for name in sums:
        total, n = map(sum, zip(*[part[name] for part in parts]))
        means[name] = total / max(1, n)
    return dict(means, ratio_min=min(low), ratio_max=max(high), pairs=sum(pairs),
                forwards=sum(forwards))


def describe(policy, traj, row, text, grade):
    """One rollout, half-way and finished, and what the checker made of it."""
    half, tokenizer = traj.how.m // 2, policy.tokenizer
    tokens = tokenizer.batch_decode([[i] for i in traj.o[row].tolist()])
    shown = [token if t < half else "_" for token, t in zip(tokens, traj.step_of[row])]
    prompt = tokenizer.decode(traj.q[row][traj.q_mask[row] > 0], skip_special_tokens=True)
    return dict(prompt=prompt, half=" ".join(shown), text=text, parsed=grade.parsed,
                reason=grade.reason, reward=grade.reward)


@torch.no_grad()
def grade_held_out(policy, data, cfg, how, n):
    """Grades of an answer to each of the first n held-out problems; processes share them."""
    index, size = processes()
    mine, grades = list(range(min(n, len(data))))[index::size], []
    if mine:
        keys = [(cfg.seed, "evaluation", how.m, i) for i in mine]
        _, _, grades = write_answers(policy, [data[i] for i in mine], keys, cfg, how)
    found = {i: grade for part in gather(list(zip(mine, grades))) for i, grade in part}
    return [found[i] for i in sorted(found)]


def evaluate(policy, data, cfg, how, n=500):
    """Share of the first n held-out problems that are answered right."""
    grades = grade_held_out(policy, data, cfg, how, n)
    return sum(g.correct for g in grades) / len(grades)


# ==============================================================================================
# § 9 Run
# ==============================================================================================
# What a person types, sees and keeps. Nothing of the method is below this line.

@dataclass
class Config:
    # --- what to run
    task: str = "countdown"            # countdown, sudoku, gsm8k, or FILE.py that registers one
    preset: str = ""                   # tiny, llada or qwen: a model and its settings [tiny]
    model: str = ""                    # hub id or folder [the preset's]
    revision: str = ""                 # commit of a hub id, to pin it
    trust_remote_code: bool = False    # run the Python code that comes with the model
    policy: str = ""                   # FILE.py:Class, what the model sees [the whole text]
    adapter: str = ""                  # folder of LoRA weights to start from
    mask_id: int = -1                  # id of [MASK], for a model that does not say
    shift: int = -1                    # 1: position i is predicted at i - 1 [1 for Dream]
    out: str = ""                      # folder of the run [runs/TASK-SEED]
    seed: int = 0                      # of LoRA's weights, the questions' order, every draw
    device: str = ""                   # cpu, cuda, cuda:1 [cuda if there is one]
    dtype: str = "float32"             # of the base model; adapters and head are float32
    wandb: str = ""                    # Weights & Biases project to log to, too
    # --- data
    train_file: str = ""               # JSONL, CSV or parquet in place of the task's own data
    test_file: str = ""                # the same, held out; its problems are never trained on
    max_prompt: int = 512              # tokens; longer prompts are left out
    options: dict = field(default_factory=dict)     # the task's own, each a flag
    # --- the denoising MDP
    C: int = 32                        # completion length, tokens
    m: int = 8                         # denoising steps: C / m tokens a step
    block_length: int = 0              # blocks are written one after the other [C]
    unmasking: str = "random"          # random, max_prob or entropy
    temperature: float = 1.0           # of the rollouts
    top_k: int = 0                     # likeliest tokens to draw among, 0: all
    top_p: float = 1.0                 # nucleus within these, 1: all
    # --- the policy gradient
    questions: int = 20                # per update, over all processes
    G: int = 8                         # rollouts per question
    k: int = 4                         # timesteps per rollout that are scored
    follow: str = "surprise"           # what p_t follows: surprise, entropy (paper) or uniform
    mu: int = 1                        # passes, an optimizer step each, over the same rollouts
    eps: float = 0.2                   # clip width
    ratio_per: str = "token"           # rho of a token (official code) or of a whole step
    beta: float = 0.0                  # weight of the KL to the base model
    divide_by_std: bool = False        # advantages as in GRPO; biased
    # --- optimisation: AdamW, betas 0.9 and 0.99
    updates: int = 200                 # 0: only evaluate
    lr: float = 1e-3                   # peak; 1 % warm-up, then cosine to 0
    weight_decay: float = 0.01         # official code
    max_grad_norm: float = 1.0         # official code
    lora_r: int = 32                   # rank; 0 trains all parameters
    lora_alpha: int = 64               # its output counts alpha / r times
    micro_batch: int = 320             # pairs per forward and backward of the loss
    rollout_batch: int = 256           # rows per forward of a rollout
    recompute: bool = False            # activations in the backward pass: slower, less memory
    # --- evaluation
    eval_n: int = 500                  # held-out problems
    eval_every: int = 50               # updates
    eval_C: int = 0                    # completion length [C]
    eval_block: int = 0                # block length [block_length, or eval_C]
    eval_sampled: bool = True          # as the rollouts sample too, not only greedy
    steps: str = ""                    # of the greedy evaluations, as 12,6,2 [all that fit]
    save_every: int = 10               # updates between checkpoints

    @property
    def how(self):
        """The rollouts' decoding."""
        return Decoding(self.C, self.m, self.block_length, self.unmasking, self.temperature,
                        self.top_k, self.top_p)

    def cells(self):
        """The evaluations, first the one that a run is known by: as the rollouts sample, then
        greedy max_prob, which is LLaDA's low-confidence decoding, at each of --steps."""
        greedy = [Decoding(self.eval_C, int(m), self.eval_block, "max_prob", temperature=0.0)
                  for m in self.steps.split(",")]
        return [self.how] * self.eval_sampled + greedy


# tiny: measured here, see README. llada: the paper's settings, but its learning rate belongs to
# 24 optimizer steps an update and is to be swept for one. qwen: a guess for a consumer GPU.
PRESETS = {
    "tiny": dict(model="lab/tiny"),
    "llada": dict(
        model="GSAI-ML/LLaDA-8B-Instruct", dtype="bfloat16", recompute=True, C=384, m=128,
        block_length=12, temperature=0.6, top_k=150, top_p=0.99, questions=16, k=24,
        updates=300, lr=1e-5, lora_r=64, lora_alpha=64, micro_batch=4, rollout_batch=16,
        eval_C=256, eval_block=32, steps="128", eval_sampled=False),
    "qwen": dict(
        model="dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", dtype="bfloat16", C=256, m=64,
        block_length=32, temperature=0.8, top_k=150, top_p=0.99, questions=16, k=8, updates=300,
        lr=5e-5, micro_batch=8, rollout_batch=32, recompute=True, steps="64",
        eval_sampled=False),
}
TINY = {
    "countdown": dict(C=12, m=2, k=1, lr=1.5e-3, updates=500, max_number=16, division=False),
    "sudoku": dict(C=20, m=2, k=1, empties=10, unmasking="max_prob"),
}
CHOICES = dict(preset=(*PRESETS,), unmasking=UNMASKING, follow=FOLLOW,
               ratio_per=("token", "step"), dtype=("float32", "bfloat16", "float16"))
AT_LEAST = dict(seed=0, C=1, m=1, questions=1, G=2, k=1, mu=1, beta=0, updates=0,
                weight_decay=0, lora_r=0, lora_alpha=1, micro_batch=1, rollout_batch=1,
                eval_n=1, eval_every=1, save_every=1, max_prompt=1, temperature=0, mask_id=-1,
                shift=-1)
MOST = 1e15                            # of each of these
ABOVE_0 = ("lr", "eps", "max_grad_norm")


def parse(argv=None):
    """Flags -> Config: what was typed, over the preset's values, over Config's defaults.

    Every field is a flag, the comment behind it its help; so is every option of the task.
    Raises UserError.
    """
    parser = Parser(add_help=False, usage="agrpo.py [--flag VALUE ...]",
                    epilog="Presets and tasks set other values: a run's first lines say which.")
    comments = dict(re.findall(r"^    (\w+): .*# (.+)$", inspect.getsource(Config), re.M))
    for f in fields(Config):
        if f.name != "options":
            add_flag(parser, f.name, f.default, comments[f.name])
    # Which task, decides what further flags there are.
    task = find_task(vars(parser.parse_known_args(argv)[0]).get("task", Config.task))
    for name, default in tasks.TASKS[task].options.items():
        add_flag(parser, name, default, f"an option of {task}")
    parser.add_argument("-h", "--help", action="help")
    typed = dict(vars(parser.parse_args(argv)), task=task)

    # Naming a preset's model asks for its settings.
    of_model = {values["model"]: preset for preset, values in PRESETS.items()}
    preset = typed.setdefault("preset", of_model.get(typed.get("model"), "tiny"))
    if preset == "tiny" and "model" not in typed and task not in TINY:
        raise UserError(f"--task {task} needs a model that reads its problems: add --preset "
                        "llada, --preset qwen or --model, and the flags of the run if this is "
                        "about its --adapter")
    values = {**PRESETS[preset], **(TINY.get(task, {}) if preset == "tiny" else {}), **typed}
    options = {name: values.pop(name) for name in tasks.TASKS[task].options if name in values}
    cfg = Config(**values, options=options)
    # What was left open follows from the rest, so that config.json has every value.
    cfg.block_length = cfg.block_length or cfg.C
    cfg.eval_C = cfg.eval_C or cfg.C
    cfg.eval_block = cfg.eval_block or (cfg.block_length if cfg.eval_C == cfg.C else cfg.eval_C)
    cfg.steps = cfg.steps or ",".join(map(str, step_counts(cfg.eval_C, cfg.eval_block)))
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg.out = str(Path(cfg.out or f"runs/{task}-{cfg.seed}").expanduser())
    check(cfg, typed)
    return cfg


class Parser(argparse.ArgumentParser):
    def __init__(self, **more):
        super().__init__(allow_abbrev=False, **more,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def add_flag(parser, name, default, help):
    kind = type(default)
    more = dict(type=boolean, nargs="?", const=True) if kind is bool else dict(type=kind)
    spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
    shown = "" if default == "" or help.endswith("]") else f" [{default}]"
    help = (help + shown).replace("%", "%%")
    parser.add_argument(*spellings, dest=name, default=argparse.SUPPRESS, help=help,
                        choices=CHOICES.get(name), metavar=kind.__name__.upper(), **more)


def check(cfg, typed):
    """Refuse what cannot work, in a sentence that says what would. Raises UserError."""
    value, gpus = asdict(cfg), torch.cuda.device_count()
    gpu = re.fullmatch(r"cuda:?(\d*)", cfg.device)
    # (is it broken?, what to say). Numbers first: the later rules count on them.
    rules = [(typed[name] == "", f"--{name} is empty: leave it out, or give a value")
             for name in typed]
    rules += [(not least <= value[name] < MOST,
               f"--{name} {value[name]} cannot work: give a number from {least} to {MOST:.0e}")
              for name, least in AT_LEAST.items()]
    rules += [(not 0 < value[name] < math.inf,
               f"--{name} {value[name]} cannot work: give a number above 0")
              for name in ABOVE_0]
    try:
        cfg.how
    except ValueError as e:
        rules.append((True, str(e)))
    rules += [
        (cfg.seed >= 2 ** 32, f"--seed {cfg.seed} is too large: use one below 2 ** 32"),
        (cfg.shift > 1, f"--shift {cfg.shift} is none: 0, or 1 for a model like Dream"),
        (cfg.device != "cpu" and not (gpu and int(gpu[1] or 0) < gpus),
         f"--device {cfg.device} is not here (torch sees {gpus} GPUs): choose cpu or cuda:N"),
        (cfg.updates > 0 and cfg.temperature == 0,
         "--temperature 0 is greedy, all rollouts of a group would be equal: train at 1.0"),
        (cfg.k > cfg.m, f"--k {cfg.k} is more than the --m {cfg.m} steps of a rollout"),
        (cfg.beta > 0 and not cfg.lora_r, "--beta needs adapters to switch off: --lora_r 32"),
        (cfg.adapter and not cfg.lora_r, "--adapter needs --lora_r above 0"),
        (not cfg.lora_r and cfg.dtype != "float32",
         f"--lora_r 0: small steps of all weights vanish in {cfg.dtype}; use --dtype float32"),
        (not re.fullmatch(r"\d+(,\d+)*", cfg.steps),
         f"--steps {cfg.steps} must be numbers with commas between, as in 12,6,3")]
    for broken, sentence in rules:
        if broken:
            raise UserError(sentence)
    try:
        cfg.cells()
    except ValueError as e:            # said of --m: evaluations have flags of their own
        own = dict(m="--steps", C="--eval_C", block_length="--eval_block")
        raise UserError(re.sub(r"--(\w+)", lambda flag: own[flag[1]], str(e))) from None


def find_task(name):
    """The name of a task in tasks.TASKS. FILE.py is imported: the first one it registers, or
    the one that FILE.py:NAME names. Raises UserError."""
    file, _, wanted = name.partition(":")
    if not file.endswith(".py"):
        tasks.TASKS[name]                                       # or TASKS says what there is
        return name
    # Its own are those that were not there before, or were another one of that name.
    before = dict(tasks.TASKS)
    import_file(file, "--task")
    new = [task for task in tasks.TASKS if tasks.TASKS[task] is not before.get(task)]
    if not new or wanted and wanted not in new:
        raise UserError(f"--task {name} registers no task of that name (but {new}): set "
                        "tasks.TASKS[NAME] in it")
    return wanted or new[0]


def import_file(path, flag):
    """Import FILE.py, or get Class of FILE.py:Class. It runs: the user named it."""
    file, _, name = path.partition(":")
    file = Path(file).expanduser()
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"{flag} {path}: {file} is no Python file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    # `import agrpo` in it must be this module, also where this was started as a program.
    sys.modules.setdefault("agrpo", sys.modules[__name__])
    try:
        spec.loader.exec_module(module)
        return getattr(module, name) if name else module
    except Exception as e:             # it is the user's code
        raise UserError(f"{flag} {path} fails: {type(e).__name__}: {first_line(e)}") from e


# --- what is kept -----------------------------------------------------------------------------

def write(path, data):
    """Bytes to a file that is either the old one or the new one, whenever the process dies."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as e:
        partial.unlink(missing_ok=True)                         # a full disk gets its room back
        raise OSError(e.errno, e.strerror, str(path)) from e


def to_json(value, indent=None):
    """A line of strict JSON: a number that is not finite becomes null."""
    # Python writes NaN and Infinity, which no other reader knows; and reads what it wrote.
    strict = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return (json.dumps(strict, indent=indent) + "\n").encode()


@contextlib.contextmanager
def folder_of_my_own(out):
    """Make the folder, and lock it until this process ends, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        handle = os.open(out, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"--out {out} cannot be written to ({e.strerror})") from e
    # The system drops this lock when the process dies, even by SIGKILL: no stale lock files.
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"--out {out} is in use by another run: choose another") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()                                         # if nothing was written
        os.close(handle)


def digest(data):
    """16 bytes that other bytes would not have."""
    return blake2b(data, digest_size=16).digest()


def flags(cfg):
    """Every flag and its value, the task's own among them."""
    fields = asdict(cfg)
    options = fields.pop("options")
    return {**fields, **options}


def fingerprint(model, adapters=False):
    """The first numbers of the base model's tensors, hashed: another model has another."""
    some = [p.detach().flatten()[:8].double().cpu() for name, p in model.named_parameters()
            if adapters or "lora_" not in name]
    return digest(torch.cat(some).numpy().tobytes()).hex()


def save_checkpoint(cfg, state, trained, optimizer):
    """All that the same command needs to go on, to the same numbers."""
    if processes()[0] == 0:
        # In memory first, with a digest of its bytes behind it: torch.load reads past that.
        file = io.BytesIO()
        torch.save(dict(state=state, config=flags(cfg), trained=trained,
                        optimizer=optimizer.state_dict()), file)
        file.write(digest(file.getvalue()))
        write(Path(cfg.out, "checkpoint.pt"), file.getbuffer())
        write(Path(cfg.out, "samples.jsonl"), b"".join(map(to_json, state["samples"])))


def load_checkpoint(path, cfg, base, trained, optimizer):
    """Put the last checkpoint back. Returns its state, or None if there is none yet.

    Raises UserError if it is damaged, or of other flags or another base model.
    """
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        if digest(data[:-16]) != data[-16:]:
            raise ValueError("its bytes are damaged")
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        config, params, state = saved["config"], saved["trained"], saved["state"]
    except Exception as e:             # whatever the readers of zip and pickle raise
        raise UserError(f"{path} cannot be read ({first_line(e)}): move it away") from e
    # These may change between two calls: they do not change what is learnt. (The base model is
    # compared by its weights.)
    free = ("out", "device", "save_every", "wandb", "preset", "revision", "model")
    for name, value in flags(cfg).items():
        if name not in free and config.get(name) != value:
            raise UserError(f"{path} was made with --{name} {config.get(name)}, not {value}: "
                            "repeat its flags (config.json has them), or choose another --out")
    if state["base_model"] != base or params.keys() != trained.keys():
        raise UserError(f"{path} is not of --model {cfg.model}: choose another --out")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(params[name])
    optimizer.load_state_dict(saved["optimizer"])
    return state


def save_weights(policy, folder):
    """The adapter, as plain peft loads it, or with --lora_r 0 a model that --model can name."""
    # Whole under another name first, as in `write`.
    partial = folder.with_name(folder.name + ".partial")
    try:
        policy.model.save_pretrained(partial)
        policy.tokenizer.save_pretrained(partial)
    except Exception as e:                                      # safetensors has its own errors
        raise OSError(getattr(e, "errno", None), first_line(e), str(folder)) from e
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# --- what is printed --------------------------------------------------------------------------

def say(text):
    """Print, from the first process, to a terminal that may be gone."""
    if processes()[0] != 0:
        return
    try:
        print(text, flush=True)
    except OSError:                                             # nobody reads any more: go on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cut(text, width=100):
    """One safe line of at most `width` columns, the middle left out."""
    text, half = tasks.printable(" ".join(text.split())), width // 2 - 2
    return text if len(text) <= width else text[:half] + " .. " + text[-half:]


def versions():
    return {name: metadata.version(name) for name in ("torch", "transformers", "peft")}


def header(cfg, policy, training, held_out):
    """Versions, device, what differs from the defaults, and the counts that follow."""
    # One line on where this runs.
    where = f"{torch.get_num_threads()} threads"
    if cfg.device != "cpu":
        where = torch.cuda.get_device_name(cfg.device)
    say(f"AGRPO | {', '.join(f'{name} {v}' for name, v in versions().items())} | {cfg.device}, "
        f"{where}, {processes()[1]} process(es) | seed {cfg.seed} | {cfg.out}")
    # What differs from Config's defaults, seven a line.
    plain = asdict(Config())
    changed = [f"{name} {v}" for name, v in flags(cfg).items() if v != plain.get(name, "")]
    for i in range(0, len(changed), 7):
        say("    " + ", ".join(changed[i:i + 7]))
    say("\n".join(policy.notes))
    say(f"{cfg.questions} questions x G {cfg.G} = {cfg.questions * cfg.G} rollouts an update, "
        f"{cfg.how.W} tokens a step; {cfg.m} forwards write one, k = {cfg.k} learn from it")
    say(f"training: {training}\nheld out: {held_out}")


def wilson(correct, n, z=1.96):
    """95 % interval of a proportion (Wilson score), sensible at 0 and n too: (low, high)."""
    p, d = correct / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(policy, data, cfg, how):
    """One row of the table of evaluations."""
    grades = grade_held_out(policy, data, cfg, how, cfg.eval_n)
    return summarise(grades, how, len(grades))


def summarise(grades, how, n):
    """Accuracy, its interval for n problems, means of reward and other metrics."""
    def mean(values):
        return sum(values) / len(grades)

    accuracy = mean(g.correct for g in grades)
    low, high = wilson(accuracy * n, n)
    more = {name: mean(g.metrics[name] for g in grades) for name in grades[0].metrics}
    return dict(m=how.m, greedy=how.temperature == 0, n=n, accuracy=accuracy, low=low,
                high=high, reward=mean(g.reward for g in grades), **more)


def table_row(*found):
    """The same evaluation of the base, and of the trained model beside it."""
    text = f"{found[0]['m']:6d} {'greedy' if found[0]['greedy'] else 'rollout':<8}"
    for x in found:
        text += f"   {x['accuracy']:6.1%} [{x['low']:5.1%}, {x['high']:5.1%}]"
    # And the means of the task's own metrics, as the share of tagged answers.
    known = ("m", "greedy", "n", "accuracy", "low", "high", "reward")
    for name in [name for name in found[0] if name not in known]:
        text += f"   {name} " + " -> ".join(f"{x[name]:.2f}" for x in found)
    return text


def table_head(trained):
    """What stands above the rows: with the column of the trained model, or without."""
    return "\n steps sampling   base [95 % interval]" + "     trained" * trained


def table(policy, data, cfg, state, who):
    """Fill state[who], who "base" or "final", with a row for each evaluation; print them."""
    for i, how in enumerate(cfg.cells()):
        if i == len(state[who]):
            state[who].append(measure(policy, data, cfg, how))
        if i == 0:
            say(table_head(who == "final"))
        say(table_row(state["base"][i], *state["final"][i:i + 1]))


COLUMNS = dict(update=9, reward=8, right=7, dead=6, H=6, ratio=12, clip=9, norm=8, len=5,
               roll=8, loss=8, memory=8, left=8)


def show_sample(sample):
    """A rollout as `describe` has it, and the names of the columns that go on below."""
    for name, key in (("prompt", "prompt"), ("half-way", "half"), ("answer", "text")):
        say(f"    {name:10s} {cut(sample[key])}")
    verdict = f"{cut(sample['reason'], 40)}, reward {sample['reward']:.2f}"
    say(f"    {'checker':10s} read {cut(sample['parsed'], 40)!r}: {verdict}")
    say("".join(f"{name:>{width}}" for name, width in COLUMNS.items()))


def console(now, cfg, left):
    """A line of the log; left: seconds."""
    values = [f"{now['update']}/{cfg.updates}", f"{now['reward']:.2f}", f"{now['correct']:.0%}",
              f"{now['dead_groups']:.0%}", f"{now['entropy']:.2f}",
              f"{now['ratio_min']:.3g}-{now['ratio_max']:.3g}",
              f"{now['clip_low']:.0%}/{now['clip_high']:.0%}", f"{now['grad_norm']:.3g}",
              f"{now['length']:.0f}"]
    values += [f"{now[part]:.2f}s" for part in ("rollout_seconds", "loss_seconds")]
    values += [f"{now['memory_bytes'] / 2**20:.0f}M", f"{left // 60:.0f}:{left % 60:02.0f}"]
    say("".join(f"{value:>{width}}" for value, width in zip(values, COLUMNS.values())))


def warnings(now, past):
    """(kind, sentence) of the ways in which training fails, with the likely cause."""
    norm, H, dead, late = (now[x] for x in ("grad_norm", "entropy", "dead_groups", "late_eos"))
    # A spike is measured against the median of the last 20 norms; dead updates have none.
    norms = sorted([x["grad_norm"] for x in past if 0 < x["grad_norm"] < math.inf][-20:])
    H_first, clipped = past[0]["entropy"] if past else 0.0, now["clip_low"] + now["clip_high"]
    spike = len(norms) >= 10 and 10 * norms[len(norms) // 2] < norm < math.inf
    # kind: (is it so?, the sentence)
    signs = dict(
        broken=(not math.isfinite(norm), "a gradient that is not finite: it changed nothing"),
        spike=(spike, f"gradient norm {norm:.3g} is over 10 times its median: k too small, or "
                      "weights without a bound"),
        entropy=(H < 0.05 * H_first, f"entropy {H:.3g} fell from {H_first:.3g}: the policy has "
                                     "stopped exploring; lower --lr, or stop here"),
        eos=(late > 0.9, f"{late:.0%} of the last steps' tokens are EOS: shorten --C or "
                         "--block_length"),
        dead=(dead > 0.8, f"{dead:.0%} of the groups are dead, all rewards equal: problems too "
                          "easy or too hard, or --G too small"),
        clip=(clipped > 0.3, f"{clipped:.0%} of the tokens are clipped: lower --lr or --mu"))
    return [(kind, sentence) for kind, (shown, sentence) in signs.items() if shown]


def draw_curve(path, history, evals, title):
    """Accuracy against updates: of the training rollouts, and held out with its interval."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    ax.plot([h["update"] for h in history], [h["correct"] for h in history], lw=0.8, alpha=0.5,
            label="training rollouts")
    x, y, low, high = ([e[key] for e in evals] for key in ("update", "accuracy", "low", "high"))
    ax.plot(x, y, "o-", label="held-out")
    ax.fill_between(x, low, high, alpha=0.2)
    ax.axhline(y[0], ls="--", c="gray", label="base model")
    ax.set(xlabel="update", ylabel="accuracy", ylim=(0, 1), title=title)
    ax.legend()
    picture = io.BytesIO()
    fig.savefig(picture, dpi=120)
    plt.close(fig)
    write(path, picture.getvalue())


# --- a run ------------------------------------------------------------------------------------

@contextlib.contextmanager
def heard_signals():
    """Ctrl-C, SIGTERM, SIGHUP: a list of those that came, for the update in hand is finished.

    The second one is a KeyboardInterrupt: it stops at once.
    """
    heard = []

    def receive(number, frame):
        if heard:
            raise KeyboardInterrupt
        heard.append(number)
        with contextlib.suppress(OSError):                      # print may be under way
            os.write(2, b"\nstopping after this update, to save it (again: at once)\n")
    # Not those that were ignored before, as SIGHUP is under nohup.
    ours = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(n) != signal.SIG_IGN]
    before = [signal.signal(n, receive) for n in ours]
    try:
        yield heard
    finally:
        for number, handler in zip(ours, before):
            signal.signal(number, handler)


def join_processes(cfg):
    """Meet the other processes of this run, if torchrun or accelerate launch started some."""
    # They set these variables; without them there is one process.
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if cfg.device != "cpu":
        cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(cfg.device)
    # One process may learn for long while another, with dead groups only, waits for it.
    backend, patience = "gloo" if cfg.device == "cpu" else "nccl", timedelta(hours=2)
    dist.init_process_group(backend, timeout=patience)
    if cfg.questions % processes()[1]:
        raise UserError(f"--questions {cfg.questions} cannot be shared equally by "
                        f"{processes()[1]} processes: choose a multiple")


def must_agree(what):
    """Refuse processes that differ in flags, base model or checkpoint."""
    for other in gather(what):
        for name in what:
            if other[name] != what[name]:
                raise UserError(f"two processes have --{name} {other[name]} and {what[name]}: "
                                "start all with the same flags and files, on a disk all see")


def load_test(cfg):
    """The held-out examples. Raises UserError."""
    return tasks.load(cfg.task, "test", file=cfg.test_file or None, **cfg.options)


def load_training(cfg, test):
    """The training examples, none of which is a held-out problem. Raises UserError."""
    return tasks.load(cfg.task, "train", seed=cfg.seed, file=cfg.train_file or None,
                      held_out=test, **cfg.options)


def make_optimizer(cfg, params):
    """AdamW; `train` sets its learning rate before each step."""
    return torch.optim.AdamW(params, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)


def short_enough(policy, data, cfg, split):
    """The examples whose prompts are not too long. Says how many are. Raises UserError."""
    # Prompt and completion must fit into the model; LLaDA's config has its own word for it.
    sizes = ("max_position_embeddings", "max_sequence_length")
    longest = min(getattr(policy.model.config, name, None) or math.inf for name in sizes)
    most = max(0, min(cfg.max_prompt, longest - max(cfg.C, cfg.eval_C)))
    # Made examples are alike, so the first 100 stand for all.
    generated = data.source.startswith("generated")
    some = [data[i] for i in range(min(len(data), 100) if generated else len(data))]
    _, mask = policy.encode([tasks.TASKS[cfg.task].prompt(example) for example in some])
    length = mask.sum(dim=1).tolist()
    kept = [example for example, n in zip(some, length) if n <= most]
    if len(kept) == len(some):
        return data
    what = f"{len(some) - len(kept)} of {len(some)} {split} prompts have over {most} tokens"
    if generated or not kept:
        way_out = ("raise --max_prompt" if most == cfg.max_prompt else
                   f"lower --C, for --model has room for {longest} tokens in all")
        raise UserError(f"{what}, up to {max(length)}: {way_out}")
    say(f"{what}: left out")
    return kept


def peak_memory(device):
    """Bytes at the peak: allocated on the GPU, or resident."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(cfg):
    """Train, or go on where the folder's checkpoint stands, to the same numbers -> exit code"""
    # The first process has the folder; each has the data and the model.
    join_processes(cfg)
    mine = folder_of_my_own(Path(cfg.out)) if processes()[0] == 0 else contextlib.nullcontext()
    with mine, heard_signals() as heard:
        test = data = load_test(cfg)
        if cfg.updates:
            data = load_training(cfg, test)
        policy, source = load_policy(cfg), test.source
        header(cfg, policy, data.source, source)
        test = short_enough(policy, test, cfg, "held-out")
        data = short_enough(policy, data, cfg, "training")
        state = learn(cfg, policy, data, test, heard)
        if state["update"] == cfg.updates:
            finish(cfg, policy, state, source)
            return 0
        say(f"stopped after update {state['update']}, saved in {cfg.out}; the same command "
            "goes on")
        return 130


def begin(cfg, policy, test):
    """From the checkpoint, or from the base model and its table -> state, weights, optimizer

    Raises UserError.
    """
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(cfg, trained.values())
    base_model, start = fingerprint(policy.model), time.time()
    # Another flag or another model in one process would be averaged into everyone's gradient.
    must_agree(dict(flags(cfg), device="", model=base_model))
    state = load_checkpoint(Path(cfg.out, "checkpoint.pt"), cfg, base_model, trained, optimizer)
    must_agree(dict(out=state and state["update"]))
    if state:
        say(f"going on after update {state['update']} of {cfg.updates}")
    else:
        state = dict(update=0, seconds=0.0, base_model=base_model, base=[], final=[], evals=[],
                     history=[], samples=[])
        table(policy, test, cfg, state, "base")
        state["evals"].append(dict(update=0, **state["base"][0]))
        state["seconds"] = time.time() - start
        save_checkpoint(cfg, state, trained, optimizer)
    if processes()[0] == 0:
        config = dict(asdict(cfg), versions=versions())
        write(Path(cfg.out, "config.json"), to_json(config, indent=2))
        # A killed run may have logged updates that its checkpoint does not know.
        write(Path(cfg.out, "metrics.jsonl"), b"".join(map(to_json, state["history"])))
    return state, trained, optimizer


def learn(cfg, policy, data, test, heard):
    """Begin, train until done or a signal was heard, saving on the way -> state

    Raises UserError.
    """
    log = logger(cfg)
    state, trained, optimizer = begin(cfg, policy, test)
    first, history = state["update"], state["history"]
    start, before = time.time(), state["seconds"]
    for now in train(policy, data, cfg, list(trained.values()), optimizer, first):
        sample, update = now.pop("sample"), now["update"]
        now["memory_bytes"] = peak_memory(cfg.device)
        left = (time.time() - start) / (update - first) * (cfg.updates - update)
        report(now, sample, state, cfg, left)
        if update % cfg.eval_every == 0 and update < cfg.updates:
            found = measure(policy, test, cfg, cfg.cells()[0])
            state["evals"].append(dict(update=update, **found))
            now["held_out"] = found["accuracy"]
            say(f"    held-out{table_row(found)}   n {found['n']}")
        log(now)
        history.append(now)
        state.update(update=update, seconds=before + time.time() - start)
        # Ctrl-C may have reached one process alone; all stop after the same update.
        stopping = any(gather(bool(heard)))
        if update % cfg.save_every == 0 or update == cfg.updates or stopping:
            save_checkpoint(cfg, state, trained, optimizer)
        if [math.isfinite(x["grad_norm"]) for x in history[-3:]] == [False] * 3:
            raise UserError("three gradients in a row were not finite: start again with a "
                            f"lower --lr, another --out ({cfg.out} has the weights before)")
        if stopping:
            break
    if state["update"] < cfg.updates:
        return state
    # The last table, saved too: a finished run called again prints it without a forward.
    if cfg.updates == 0:
        state["final"] = state["base"]
    unfinished = not state["final"]
    table(policy, test, cfg, state, "final")
    if unfinished:
        state["seconds"] = before + time.time() - start
        save_checkpoint(cfg, state, trained, optimizer)
    return state


def report(now, sample, state, cfg, left):
    """Print an update: its sample and its numbers only now and then, its warnings always."""
    update, every = now["update"], max(1, cfg.updates // 50)    # lines that fit a screen or two
    if update == 1 or update % (10 * every) == 0:
        state["samples"].append(dict(update=update, **sample))
        show_sample(sample)
    if update == 1 or update % every == 0:
        console(now, cfg, left)
    # A warning that was given in the last 20 updates is not given again.
    signs = warnings(now, state["history"])
    given = {kind for x in state["history"][-20:] for kind in x["warnings"]}
    now["warnings"] = [kind for kind, _ in signs]
    for kind, sentence in signs:
        if kind not in given:
            say(f"    warning: {sentence}")


def logger(cfg):
    """A function that keeps the numbers of an update: in metrics.jsonl and, if asked, W&B."""
    if processes()[0] != 0:
        return lambda now: None
    if cfg.wandb:
        import wandb
        wandb.init(project=cfg.wandb, config=asdict(cfg), dir=cfg.out)

    def log(now):
        with open(Path(cfg.out, "metrics.jsonl"), "ab") as f:
            f.write(to_json(now))
        if cfg.wandb:
            wandb.log(now, step=now["update"])
    return log


def finish(cfg, policy, state, source):
    """The weights, the curve, summary.json, and what they say."""
    out, history = Path(cfg.out), state["history"]
    # The first row of each table is what the run is known by: decoded as the rollouts are.
    base, last = state["base"][0], state["final"][0]
    evals = state["evals"] + [dict(update=cfg.updates, **last)] * (cfg.updates > 0)
    best = max(evals, key=lambda e: e["accuracy"])
    roll, loss = (sum(x[name] for x in history) for name in ("rollout_seconds", "loss_seconds"))
    peak = max([peak_memory(cfg.device)] + [x["memory_bytes"] for x in history])
    summary = dict(
        task=cfg.task, model=cfg.model, seed=cfg.seed, base_accuracy=base["accuracy"],
        final_accuracy=last["accuracy"], best_accuracy=best["accuracy"],
        best_update=best["update"], eval_n=last["n"], test_data=source, updates=state["update"],
        skipped_updates=sum(not math.isfinite(x["grad_norm"]) for x in history),
        seconds=state["seconds"], rollout_seconds=roll, loss_seconds=loss,
        peak_memory_bytes=peak, base=state["base"], final=state["final"], evals=evals)
    weights = out / ("adapter" if cfg.lora_r else "model")
    if processes()[0] == 0:
        save_weights(policy, weights)
        draw_curve(out / "curve.png", history, evals, f"{cfg.task}, m = {cfg.m}, k = {cfg.k}")
        write(out / "summary.json", to_json(summary, indent=2))
    if history and not any(x["pairs"] for x in history):
        say("    warning: no rollout was learnt from, every group was dead: other problems?")
    say(f"best held-out {best['accuracy']:.1%} (update {best['update']}), last "
        f"{last['accuracy']:.1%}; {state['seconds']:.0f} s, of these rollouts {roll:.0f} and "
        f"learning {loss:.0f}; peak {peak / 2**20:.0f} MiB")
    say(f"written to {out}: metrics.jsonl config.json samples.jsonl summary.json curve.png "
        f"{weights.name}/")
    say(f"held-out accuracy {base['accuracy']:.1%} -> {last['accuracy']:.1%} (m = {last['m']}, "
        f"n = {last['n']})")


def in_one_sentence(program):
    """Run a program. Bad input, a full disk or Ctrl-C end it with a sentence. -> exit code"""
    goes_on = "the last checkpoint is whole, the same command goes on from it"
    try:
        return program()
    except UserError as e:
        sentence = str(e)
    except FloatingPointError as e:
        sentence = f"{e}: its weights have diverged; start again with a lower --lr"
    except torch.OutOfMemoryError as e:
        sentence = f"{first_line(e)}: lower --micro_batch and --rollout_batch, or --recompute"
    except ImportError as e:
        sentence = f"{e}: pip install it"
    except BrokenPipeError:
        return 141
    except OSError as e:
        file, gone = e.filename or "the output", isinstance(e, FileNotFoundError)
        advice = "its folder was deleted, start again" if gone else f"make room; {goes_on}"
        sentence = f"cannot write {file} ({e.strerror or e}): {advice}"
    except RuntimeError as e:
        lost = re.search("closed by peer|reset by peer|timed? ?out|gloo|nccl", str(e), re.I)
        if not (lost and dist.is_initialized()):
            raise
        sentence = f"another process of this run has died, its message says why; {goes_on}"
    except KeyboardInterrupt:
        print(f"agrpo: stopped at once; {goes_on}", file=sys.stderr)
        return 130
    print(f"agrpo: {sentence}", file=sys.stderr)
    return 2


def main(argv=None):
    code = in_one_sentence(lambda: run(parse(argv)))
    if dist.is_initialized():
        if code == 0:
            dist.barrier()                                      # none leaves before the others
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
