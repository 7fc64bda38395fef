"""AGRPO in one file: the policy gradient of a masked diffusion language model, step by step.

A masked diffusion model (LLaDA, Dream) writes an answer by unmasking a few tokens per denoising
step. AGRPO (arXiv 2510.04019) takes each step as one action of a Markov decision process. Given
the text so far, the tokens of one step are drawn independently. So the step's log-probability
is a plain sum of token log-probabilities: exact, from one forward pass, no ELBO.

    repeat:
      q      <- questions, G copies of each                                      § 8 Train
      o      <- denoise q in m steps; remember when each token appeared, log pi  § 2 Rollout
      A_i    <- r_i - mean of the group's r,  r = checker(o)                     § 3 Advantages
      pairs  <- (row, step) ~ p, evenly spaced through p's CDF;   w = 1 / (n p)  § 4 Timesteps
      J      <- mean over rows of (1/m) sum_j w_j min(rho A, clip(rho) A)        § 5 Loss
                rho = pi_theta(a_t | x_t) / pi_old(a_t | x_t), x_t masked again
      theta  <- one optimizer step on -J                                         § 6 Update

§ 1 to § 6 are the algorithm: tensors in, tensors out, to be lifted into other code; they need
torch and kernels.py alone. § 7 makes a transformers model the policy, § 8 trains it, § 9 is
the smallest whole run: `python agrpo.py --model FOLDER`, kernels.py and tasks.py beside it.
`bash run.sh` starts lab/run.py: the same loop, and what a long run wants (it can be resumed,
keeps tables and logs, refuses bad flags). lab/models.py knows more kinds of models.

Left out on purpose: a value network, a separate reference model, key-value caches (a policy may
bring one, see Block), sharding one model over GPUs. And training by low-confidence unmasking:
it draws everywhere and keeps the likeliest tokens, so those it discards are part of the action;
with them scored the gradient is exact but very noisy. max_prob chooses before it draws.

Letters   B rows   P prompt   C completion   L = P + C   V vocabulary   W = C / m tokens a step
          m denoising steps   k of them scored   G rollouts per question   N (row, step) pairs
"""
import argparse
import inspect
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from statistics import mean
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist

import tasks
from kernels import logprobs_and_entropy, support_logprobs_and_entropy

# === § 1 The denoising MDP ====================================================================
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
            raise ValueError(f"block_length {block} does not divide C {C}: choose {good}")
        if m not in step_counts(C, block):
            raise ValueError(f"m {m} does not fit C {C} and block_length {block}: choose from "
                             f"{step_counts(C, block)}")
        if self.unmasking not in UNMASKING:
            raise ValueError(f"unmasking {self.unmasking} is unknown: choose {UNMASKING}")
        # Beyond these, float32 logits over T would overflow, or all be alike.
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(f"temperature {self.temperature} cannot work: give 0 for greedy, "
                             "or 0.001 to 1000")
        if not 0 < self.top_p <= 1 or self.top_k < 0 or self.top_p < 1 and not self.top_k:
            raise ValueError(f"top_p {self.top_p} with top_k {self.top_k} cannot work: give a "
                             "top_p in (0, 1], and below 1 a top_k, as 150")

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

    For policies that look at less than the whole text: the gradient is that of whatever
    function the policy is. (lab/policies.py has such; that of § 7 ignores all of this.)
    """
    start: int
    end: int
    kept: dict                         # what a policy keeps until the block ends; {} at first


def enter_block(q, how, t):
    """The block of step t. Nothing is kept yet: it must not outlive the parameters it is of."""
    start = q.shape[1] + how.block_start(t)
    return Block(start, start + how.block_length, {})


def logits_at(policy, q, q_mask, x_t, where, block):
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


# === § 2 Rollout ==============================================================================

def uniforms(*shape):
    """float64 in [0, 1): in float32, sums and quotients of it would round up to 1.0."""
    return torch.rand(*shape, dtype=torch.float64)


def row_random(keys):
    """As `uniforms`, from a generator per row, seeded by the row's key.

    What a row draws depends on its key alone, not on the batch it sits in, on the processes, or
    on what ran before. So a resumed run needs no random states.
    """
    def generator(key):
        digest = blake2b(repr(key).encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    rows = [generator(key) for key in keys]
    return lambda B, *shape: torch.stack(
        [torch.rand(*shape, generator=g, dtype=torch.float64) for g in rows])


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
            logits = logits_at(policy, q[row], q_mask[row], o[row], where, block)
        else:
            logits = logits_at(policy, q[row], q_mask[row], o[row], masked, block)
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


# === § 3 Advantages ===========================================================================

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


# === § 4 Timesteps ============================================================================
# The gradient is a sum over the m steps of every row, a forward and backward pass each. AGRPO
# estimates it from a few of these pairs (row, step):
#     sum_i sum_t g_it  ~  sum_j w_j g_j,   j drawn from p over all pairs,   w_j = 1 / (n p_j)
# The mean is the full sum for every p > 0 where the row acted. The variance differs. The draws
# need not be independent: all that counts is that a pair is drawn n p times on average.
# p may look at rewards and tokens: given the batch, the estimate of its sum stays unbiased.

FOLLOW = ("surprise", "entropy", "uniform")


def per_step(traj, values):
    """Sum a value per token over the tokens of each step: (B, C) -> (B, m)."""
    sums = values.new_zeros(len(values), traj.how.m + 1).scatter_add(1, traj.step_of, values)
    return sums[:, :-1]                                         # column m: places never drawn


def timestep_probs(traj, size, follow="surprise", floor=0.1):
    """p (B, m) float64 over all pairs of the batch, size (B,) times how much a step decided.

    size       how much a row's gradient counts: |A|. A row of size 0 is never drawn.
    entropy    of the step's distributions: the paper's choice
    surprise   sqrt(sum over its tokens of (1 - p)^2): ours. At the logits, grad log p is
               onehot - p, about that long, also where the model was sure of another token.
    A share `floor` is uniform over the pairs, which bounds the weights.
    """
    if follow not in FOLLOW:
        raise ValueError(f"follow {follow} is unknown: choose {FOLLOW}")
    acted = (per_step(traj, torch.ones_like(traj.entropy)) > 0) & (size > 0)[:, None]
    uniform = acted.double() / acted.sum().clamp(min=1)
    if follow == "uniform":
        return uniform
    if follow == "entropy":
        weight = per_step(traj, traj.entropy.clamp(min=0))      # below 0 by rounding
    else:
        weight = per_step(traj, (1 - traj.logp_old.exp()).square()).sqrt()
    weight = weight * size.double()[:, None]
    # A total so small that its quotients lose digits says nothing: then every pair alike.
    total = weight.sum()
    return uniform if total < 1e-100 else (1 - floor) * weight / total + floor * uniform


def sample_timesteps(p, n, offset):
    """n pairs (row, step) at evenly spaced points of the CDF of p (B, m); offset in [0, 1).

    One CDF for the whole batch, so that each row gets as many draws as it is worth. Returns
    rows (N,), steps (N,), w (N,), N <= n. A draw weighs 1 / (n p); a pair drawn twice is one of
    twice the weight, so w < 1 + 1 / (n p) <= 1 + M / (n floor), M pairs having p > 0. Where p
    is all zeros, none.
    """
    n = n if p.any() else 0
    points = (torch.arange(n, dtype=torch.float64, device=p.device) + offset) / n
    at = inverse_cdf(p.view(1, -1), points[None])[0]                        # (n,)
    draws = torch.bincount(at, minlength=p.numel()).view_as(p)              # (B, m)
    rows, steps = draws.nonzero().unbind(dim=1)
    return rows, steps, draws[rows, steps] / (n * p[rows, steps])


# === § 5 Loss =================================================================================

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
    logits = logits_at(policy, traj.q[rows], traj.q_mask[rows], x_t, where, block)
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
    # The min is the bound exactly in these two cases: there J is a constant, as where A = 0.
    # Taking log_ratio out keeps a ratio that overflows from sending 0 * inf back.
    clipped = ((A > 0) & (ratio > 1 + eps)) | ((A < 0) & (ratio < 1 - eps)) | (A == 0)
    free = log_ratio.masked_fill(clipped, 0.0).exp() * A
    bound = (1 + eps * A.sign()) * A
    return torch.where(clipped, bound, free), ratio


def kl_to_reference(logp, logp_old, logp_ref):
    """rho k3 per token: an estimate of KL(pi || ref), and its gradient that of the KL.

    k3 = e^d - d - 1 >= 0, d = logp_ref - logp (Schulman). Without rho in front its gradient
    would be that of KL(ref || pi) (arXiv 2512.02556). Multiplied out, rho e^d = ref / old is a
    constant: the gradient is rho (logp - logp_ref) grad logp, and nothing overflows in e^d.
    """
    return (logp_ref - logp_old).exp() - (logp - logp_old).exp() * (1 + logp_ref - logp)


# === § 6 Update ===============================================================================

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
    if ratio_per not in ("token", "step"):
        raise ValueError(f"ratio_per {ratio_per} is unknown: choose token or step")
    rows, steps, w = pairs
    B, m, N, W = len(A), traj.how.m, len(rows), traj.how.W
    by_step, forwards = ratio_per == "step", 0
    ratio, kl = traj.logp_old.new_ones(N, 1 if by_step else W), traj.logp_old.new_zeros(N, W)
    A_pair = A[rows, None]                                                  # (N, 1)

    # One forward never mixes blocks: a policy may see each differently.
    block = traj.how.block_start(steps)
    for b in block.unique():
        for part in (block == b).nonzero()[:, 0].split(micro_batch):
            logp, logp_old = step_logprobs(policy, traj, rows[part], steps[part])
            # The action's probability is the product over its tokens.
            action, action_old = (x.sum(dim=1, keepdim=True) if by_step else x
                                  for x in (logp, logp_old))
            J, rho = clipped_objective(action, action_old, A_pair[part].to(logp), eps)
            J, ratio[part] = J.sum(dim=1), rho.double()
            if beta > 0:
                with torch.no_grad(), policy.reference():
                    logp_ref, _ = step_logprobs(policy, traj, rows[part], steps[part])
                k3 = kl_to_reference(logp, logp_old, logp_ref)
                J, kl[part] = J - beta * k3.sum(dim=1), k3.detach().double()
            loss = -(w[part].to(logp) * J).sum() / (B * m)
            loss.backward()
            forwards += 1
    return Seen(ratio, A_pair, kl, forwards)


def processes():
    """(index of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """The values of all processes, in their order."""
    values = [value] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def policy_gradient(policy, traj, A, cfg, rand):
    """AGRPO's estimate, one pass over a batch of rollouts: § 4 to § 6. Returns Seen.

    cfg.k pairs a live row, on average. rand(B, 1): uniforms in [0, 1), of which one is used.
    """
    # A = 0 has no gradient but that of the KL: no forward is spent on it.
    size, (index, _) = A.abs() + cfg.beta, processes()
    # One CDF over the rows of all processes, which have as many each: so any number of them
    # draws the same pairs, and each keeps those of its own rows.
    all_rows = lambda x: torch.cat(gather(x.cpu())).to(x.device)
    everyone = traj._replace(step_of=all_rows(traj.step_of), logp_old=all_rows(traj.logp_old),
                             entropy=all_rows(traj.entropy))
    p = timestep_probs(everyone, all_rows(size), cfg.follow)                # (all rows, m)
    n = max(1, round(cfg.k * p.any(dim=1).sum().item()))
    offset = gather(rand(len(A), 1)[0, 0].item())[0]
    rows, steps, w = sample_timesteps(p, n, offset)
    mine = rows // len(A) == index
    pairs = rows[mine] % len(A), steps[mine], w[mine]
    return add_gradient(policy, traj, A, pairs, cfg.eps, cfg.micro_batch, cfg.ratio_per,
                        cfg.beta)


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


# === § 7 A transformers model as the policy ===================================================

HALF = (torch.bfloat16, torch.float16)


class Policy:
    """The callable that `logits_at` wants: float32 logits, the LM head on the asked positions.

    Logits of every position would be 1.2 GB at B = 8, L = 584, V = 126464.
    """

    def __init__(self, model, tokenizer, mask_id, device="cpu"):
        self.model, self.tokenizer, self.device = model, tokenizer, torch.device(device)
        self.dtype = next(model.parameters()).dtype
        self.mask_id, self.eos_id = mask_id, tokenizer.eos_token_id
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.pad_id = tokenizer.pad_token_id
        # What fills the text after an answer; and ids that stand for nothing.
        self.fill_ids = {self.eos_id, self.pad_id}
        self.head, tokens = model.get_output_embeddings(), set(tokenizer.get_vocab().values())
        self.never_ids = {mask_id} | set(range(len(self.head.weight))) - tokens
        # Dream predicts position i at i - 1, and takes its mask in four dimensions. LLaDA takes
        # no mask: it would read padding as text.
        self.is_dream, self.ignores_mask = (family in model.config.model_type.lower()
                                            for family in ("dream", "llada"))
        self.shift = int(self.is_dream)
        # bf16 logits would move rho by a factor of up to 1.19, and the clip is 0.2 wide. So the
        # head computes in float32, under autocast too. A tied one gets a copy of its own.
        for name, p in list(self.head.named_parameters(recurse=False)):
            if p.dtype in HALF:
                p = torch.nn.Parameter(p.detach().float(), requires_grad=False)
                setattr(self.head, name, p)
        self.head.forward = torch.autocast(self.device.type, enabled=False)(self.head.forward)

    def __call__(self, ids, mask, positions, block=None):
        """ids, mask (N, L), positions (N, W) -> logits (N, W, V). Sees the whole text."""
        if not self.ignores_mask:
            return self.logits(ids, mask, positions)
        return one_length_at_a_time(mask, lambda rows, n: self.logits(
            ids[rows, n:], mask[rows, n:], positions[rows] - n))

    def logits(self, ids, mask, positions):
        """One forward pass of the model, on all it can see."""
        # Rows in the same state share its pass: the G copies of a question all begin so.
        states, state = torch.cat([ids, mask], dim=1).unique(dim=0, return_inverse=True)
        ids, mask = states.chunk(2, dim=1)                                  # (states, L)
        mask = mask[:, None, None, :].bool() if self.is_dream else mask

        def asked(head, args):         # in front of the head: (states, L, d) -> (N, W, d)
            return args[0][state[:, None], positions - self.shift].to(head.weight.dtype)
        with self.head.register_forward_pre_hook(asked), self.autocast():
            return self.model(input_ids=ids, attention_mask=mask).logits

    def autocast(self):
        """Where the base has 16 bits, its float32 adapters compute in 16 bits too."""
        half = self.dtype in HALF
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)

    def reference(self):
        """A context in which this is the base model."""
        return self.model.disable_adapter()

    def encode(self, chats):
        """Lists of chat messages -> q, q_mask (B, P), left-padded. Raises TaskError."""
        texts = [self.render(chat) for chat in chats]
        batch = self.tokenizer(texts, add_special_tokens=False, padding=True,
                               padding_side="left", return_tensors="pt")
        q, q_mask = batch["input_ids"], batch["attention_mask"]
        # A word that the tokenizer lacks would make another problem of it than the one graded.
        unknown = self.tokenizer.unk_token_id
        if unknown not in {None, *self.fill_ids} and (q == unknown).any():
            text = texts[(q == unknown).any(dim=1).int().argmax()]
            raise tasks.TaskError(f"--model lacks a token for a part of {text[-60:]!r}: "
                                  "choose problems its vocabulary can write, or another model")
        return q.to(self.device), q_mask.to(self.device)

    def render(self, chat):
        """Chat messages as text."""
        if not self.tokenizer.chat_template:
            return "\n\n".join(turn["content"] for turn in chat) + "\n\n"
        return self.tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False,
                                                  add_generation_prompt=True)

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


def load_policy(cfg):
    """The model in the folder --model with LoRA on its blocks. Raises ValueError."""
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    # lab/tiny is found from anywhere. No other name is looked for, least of all on a hub.
    folder = Path(cfg.model).expanduser()
    folder = folder if folder.exists() else Path(__file__).resolve().parent / cfg.model
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {cfg.model}: no config.json there; give the folder of a "
                         "masked language model, as save_pretrained writes it")
    code = dict(trust_remote_code=cfg.trust_remote_code)
    try:
        config = hf.AutoConfig.from_pretrained(folder, **code)
        for name, value in config.to_dict().items():            # rollout and loss must be one
            if "drop" in name and isinstance(value, float) or name == "use_cache":
                setattr(config, name, type(value)(0))           # function: no dropout
        kind = hf.AutoModel if hasattr(config, "auto_map") else hf.AutoModelForMaskedLM
        base = kind.from_pretrained(folder, config=config, dtype=getattr(torch, cfg.dtype),
                                    **code).to(cfg.device)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, **code)
        policy = Policy(base, tokenizer, find_mask_id(config, tokenizer), cfg.device)
    except Exception as e:             # a model's own code, damaged files: they raise anything
        first, *_ = str(e).strip().splitlines() or [type(e).__name__]
        first += "; --trust_remote_code true runs it" if "contains custom code" in first else ""
        raise ValueError(f"--model {cfg.model} could not be loaded: {first}") from e
    torch.manual_seed(cfg.seed)        # LoRA's A is random, the same in every process
    if cfg.lora_r:
        policy.model = get_peft_model(base, LoraConfig(
            r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=block_linears(base)))
    # In eval mode some models' own code has no gradient. So in train mode, without dropout.
    for module in policy.model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return policy


def find_mask_id(config, tokenizer):
    """As the config says, the tokenizer, or a token's name: members of one family differ."""
    added = {text.strip("<|[]>").lower(): i for text, i in tokenizer.get_added_vocab().items()}
    said = (getattr(config, "mask_token_id", None), tokenizer.mask_token_id, added.get("mask"),
            added.get("mdm_mask"))
    return next(i for i in said if i is not None)


def block_linears(model):
    """Names of the linear layers in the blocks, a number in their path: not of the LM head."""
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and re.search(r"\.\d+\.", name)]


# === § 8 Train ================================================================================

@dataclass
class Config:
    """What is learnt, and how: the defaults are the tiny model's. Lengths in tokens."""
    # --- what to learn
    task: str = "countdown"            # one of tasks.TASKS
    options: dict = field(             # the task's own, each a flag
        default_factory=lambda: dict(max_number=16, division=False))
    model: str = "lab/tiny"            # folder of a masked language model
    trust_remote_code: bool = False    # run the Python code that comes with the model
    device: str = "cpu"                # cpu, cuda, cuda:1
    dtype: str = "float32"             # of the base model; adapters and head are float32
    out: str = "runs/agrpo"            # folder for the trained weights
    seed: int = 0                      # of LoRA's weights, the questions' order, every draw
    # --- the denoising MDP
    C: int = 12                        # completion length
    m: int = 2                         # denoising steps: C / m tokens a step
    block_length: int = 0              # blocks are written one after the other [C]
    unmasking: str = "random"          # random, max_prob or entropy
    temperature: float = 1.0           # of the rollouts
    top_k: int = 0                     # likeliest tokens to draw among, 0: all
    top_p: float = 1.0                 # nucleus within these, 1: all
    # --- the policy gradient
    questions: int = 20                # per update, over all processes
    G: int = 8                         # rollouts per question
    k: float = 0.5                     # timesteps per rollout that are scored, on average
    follow: str = "surprise"           # what p follows: surprise, entropy (paper) or uniform
    mu: int = 1                        # passes, an optimizer step each, over the same rollouts
    eps: float = 0.2                   # clip width
    ratio_per: str = "token"           # rho of a token (official code) or of a whole step
    beta: float = 0.0                  # weight of the KL to the base model
    divide_by_std: bool = False        # advantages as in GRPO; biased
    # --- optimisation: AdamW, betas 0.9 and 0.99
    updates: int = 500                 # of the weights, mu steps each
    lr: float = 1.5e-3                 # peak; 1 % warm-up, then cosine to 0
    weight_decay: float = 0.01         # official code
    max_grad_norm: float = 1.0         # official code
    lora_r: int = 32                   # rank; 0 trains all parameters
    lora_alpha: int = 64               # its output counts alpha / r times
    micro_batch: int = 320             # pairs per forward and backward of the loss
    rollout_batch: int = 256           # rows per forward of a rollout
    # --- evaluation
    eval_n: int = 500                  # held-out problems
    eval_every: int = 50               # updates

    @property
    def how(self):
        """The rollouts' decoding."""
        return Decoding(self.C, self.m, self.block_length or self.C, self.unmasking,
                        self.temperature, self.top_k, self.top_p)


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


class Update(NamedTuple):
    """What happened in an update, to this process's rows."""
    number: int                        # from 1
    traj: Trajectory                   # rollouts, (B, ..)
    texts: list                        # B
    grades: list                       # B of tasks.Grade
    A: torch.Tensor                    # (B,)
    seen: list                         # a Seen for each of the mu passes
    lr: float
    norms: list                        # of the gradient before clipping, mu
    seconds: tuple                     # of the rollouts, of loss and step


def train(policy, data, cfg, params, optimizer, first=0, gradient=policy_gradient):
    """The loop at the top of this file, from update `first` on. Yields an Update after each.

    Whoever iterates prints, evaluates and saves.
    """
    index, size = processes()
    for update in range(first, cfg.updates):
        start = time.time()
        # Each process takes its share of the questions. A key names the place: the question
        # itself may stand at two places of an update, and gets other rollouts at each.
        drawn = list(enumerate(questions(len(data), cfg.questions, update, cfg.seed)))
        asked = drawn[index * len(drawn) // size:(index + 1) * len(drawn) // size]
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
            lr = learning_rate(cfg, update * cfg.mu + n)
            for group in optimizer.param_groups:
                group["lr"] = lr
            norms.append(optimizer_step(params, optimizer, cfg.max_grad_norm))
        yield Update(update + 1, traj, texts, grades, A, seen, lr, norms,
                     (rolled - start, time.time() - rolled))


@torch.no_grad()
def evaluate(policy, data, cfg, how, n=500):
    """Grades of an answer to each of the first n held-out problems; processes share them."""
    index, size = processes()
    mine, grades = list(range(min(n, len(data))))[index::size], []
    if mine:
        keys = [(cfg.seed, "evaluation", how.m, i) for i in mine]
        _, _, grades = write_answers(policy, [data[i] for i in mine], keys, cfg, how)
    found = {i: grade for part in gather(list(zip(mine, grades))) for i, grade in part}
    return [found[i] for i in sorted(found)]


# === § 9 The smallest whole run ===============================================================

def parse(argv=None):
    """Flags -> Config: each field is one, and each option of the task."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
    # The comment behind a field is its help.
    helps = dict(re.findall(r"^    (\w+): .*# (.+)$", inspect.getsource(Config), re.M))

    def add_flag(name, default):
        kind = json.loads if isinstance(default, bool) else type(default)   # true, false
        parser.add_argument(f"--{name}", type=kind, default=default,
                            help=helps.get(name, "of the task").replace("%", "%%"))
    for f in fields(Config):
        if f.name != "options":
            add_flag(f.name, f.default)
    options = tasks.TASKS[parser.parse_known_args(argv)[0].task].options
    for name, default in options.items():
        add_flag(name, Config().options.get(name, default))
    flags = vars(parser.parse_args(argv))
    return Config(options={name: flags.pop(name) for name in options}, **flags)


def main(argv=None):
    """The whole experiment: base accuracy, updates, trained accuracy, weights."""
    cfg = parse(argv)
    for name in "questions G k mu eps lr micro_batch rollout_batch eval_n eval_every".split():
        if not getattr(cfg, name) > 0:
            raise ValueError(f"--{name} {getattr(cfg, name)}: give a number above 0")
    if cfg.beta and not cfg.lora_r:
        raise ValueError("--beta needs adapters to switch off: give --lora_r 32")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:                # as torchrun sets it
        if cfg.device != "cpu":
            cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(cfg.device)
        dist.init_process_group("gloo" if cfg.device == "cpu" else "nccl")
    index, size = processes()
    if cfg.questions % size:
        raise ValueError(f"--questions {cfg.questions} is no multiple of {size} processes")
    test = tasks.load(cfg.task, "test", **cfg.options)
    data = tasks.load(cfg.task, "train", seed=cfg.seed, held_out=test, **cfg.options)
    policy = load_policy(cfg)
    params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)
    right = lambda: mean(g.correct for g in evaluate(policy, test, cfg, cfg.how, cfg.eval_n))
    say = print if index == 0 else lambda text: None            # one process speaks
    base = right()
    say(f"{cfg.task}, held out: {base:.1%} right in {cfg.m} steps")
    for now in train(policy, data, cfg, params, optimizer):
        rho = now.seen[0].ratio
        if now.number == 1 and len(rho):
            say(f"max |rho - 1| before the first step: {(rho - 1).abs().max():.1e}")
        if now.number % 10 == 0:
            say(f"update {now.number:4d}  reward {mean(g.reward for g in now.grades):.2f}  "
                f"right {mean(g.correct for g in now.grades):4.0%}  pairs {len(rho):4d}  "
                f"seconds {now.seconds[0]:.2f} + {now.seconds[1]:.2f}   {now.texts[0]!r}")
        if now.number % cfg.eval_every == 0 and now.number < cfg.updates:
            say(f"held out: {right():.1%}")
    if index == 0:
        policy.model.save_pretrained(cfg.out)
    say(f"held out: {base:.1%} -> {right():.1%} right; weights in {cfg.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as e:               # bad input, a model gone wrong
        print(f"agrpo: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
