"""Estimates of the policy gradient from the field, as recipes, beside AGRPO's.

An estimator adds the gradient of -J of one batch of rollouts to .grad, as agrpo.policy_gradient
does: (policy, traj, A, cfg, rand) -> Seen. So agrpo.train(..., gradient=it) trains with it.

Nearly all differ in one choice only: which masked states of the finished o are scored, and with
what weights. A recipe returns that choice as `States`; `score_states` does the rest. With a
ratio of 1 every clipped loss has the gradient  w A grad log p(token | q, x): so --mu 1.

eos       which tokens count: "first", those up to and including the first EOS, or "all"
constant  factors of a row, like 1 / L, are left out: they are a length bias of their own

JustGRPO (LeapLabTHU/JustGRPO) needs no recipe: it is AGRPO with block_length 1, m = C, every
step and --divide_by_std. Not reducible to `States`: VRPO, DMPO, StableDRL (pairs of answers or
a second model), MDPO (a reward per step), IGPO, value models, learned or sampled orders.
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import agrpo
from tasks import TaskError

NOTHING = agrpo.Seen(*torch.zeros(3, 0, 1), 0)


class States(NamedTuple):
    """K masked states of each row's finished o, and how much each token in them counts."""
    hidden: torch.Tensor               # (B, K, C) bool: what is [MASK] in the state
    w: torch.Tensor                    # (B, K, C) weight of each token's log-probability
    A: torch.Tensor                    # (B,) advantages; a row of A = 0 costs no forward
    weigh: Optional[Callable] = None   # (logp (n, K, C), rows (n,)) -> w of these rows
    q: Optional[torch.Tensor] = None   # (B, P) another prompt than the rollout's


def score_states(policy, traj, cfg, states):
    """Add the gradient of -J,  J = 1 / (m B) sum w A log p(o | q, x),  to .grad. Returns Seen.

    A token is scored in its own block, as it was written: one forward for each state and block
    in which some token has a weight. Good enough for small models.
    """
    hidden, w, A, weigh, q = states
    (B, K, C), length = hidden.shape, traj.how.block_length
    q = traj.q if q is None else q
    passed = [A.new_zeros(0, dtype=torch.long)]                 # the row of each forward
    for rows in (A != 0).nonzero()[:, 0].split(max(1, cfg.micro_batch // K)):
        each = rows.repeat_interleave(K)                                    # (n K,)
        o, counts = traj.o[each], (w[rows] != 0).flatten(0, 1)              # (n K, C)
        x = torch.where(hidden[rows].flatten(0, 1), policy.mask_id, o)
        parts = []
        for start in range(0, C, length):
            at = slice(start, start + length)
            some = counts[:, at].any(dim=1).nonzero()[:, 0]                 # (N,)
            if len(some) == 0:
                parts.append(w.new_zeros(len(each), length))
                continue
            of, where = each[some], torch.arange(C, device=q.device)[at].expand(len(some), -1)
            block = agrpo.Block(q.shape[1] + start, q.shape[1] + start + length, {})
            logits = agrpo.logits_at(policy, q[of], traj.q_mask[of], x[some], where, block)
            logp, _ = agrpo.score(logits, o[some, at], traj.how)
            parts.append(logp.new_zeros(len(each), length).index_copy(0, some, logp))
            passed.append(of)
        logp = torch.cat(parts, dim=1).view(-1, K, C)
        # Weights that depend on the model are constants to the gradient.
        weight = weigh(logp.detach().double(), rows) if weigh else w[rows]
        if logp.requires_grad:
            J = (weight * A[rows, None, None] * logp).sum() / (traj.how.m * B)
            (-J).backward()
    A = A[torch.cat(passed), None]
    return agrpo.Seen(torch.ones_like(A), A, torch.zeros_like(A), len(passed) - 1)


def must_be_on_policy(cfg):
    """Refuses, in a sentence, what the loss of most estimators does not have."""
    for flag, most, what in (("beta", 0, "KL"), ("mu", 1, "ratio")):
        if getattr(cfg, flag, most) > most:
            raise TaskError(f"--{flag} {getattr(cfg, flag):g}: this estimator has no {what}, "
                            "leave it out, or take AGRPO, by row, official or every step")


def estimate(recipe, policy, traj, A, cfg, rand):
    """A recipe as an estimator."""
    must_be_on_policy(cfg)
    if traj.support is not None:
        raise TaskError("this estimator scores all tokens: use --top_k 0 --top_p 1")
    return score_states(policy, traj, cfg, recipe(policy, traj, A, cfg, rand))


def whole(k):
    """k timesteps of each row: as many as that."""
    if k != int(k):
        raise TaskError(f"--k {k:g}: this estimator scores as many states of every row, give a "
                        "whole number; only AGRPO spreads k over the batch")
    return int(k)


def tokens_a_step(traj):
    """How many tokens each step drew, (B, m) float64: 0 after an early exit."""
    return agrpo.per_step(traj, torch.ones_like(traj.entropy))


def counted(policy, traj, eos):
    """Which tokens count (B, C): all, or those up to and including the first EOS."""
    is_eos = (traj.o == policy.eos_id).long()
    before = is_eos.cumsum(dim=1) - is_eos                      # EOS tokens to the left of it
    return before == 0 if eos == "first" else torch.ones_like(before, dtype=torch.bool)


def places(rand, among, l):
    """l of the places `among` at random. among (B, K or 1, C), l (B, K) -> (B, K, C)."""
    B, K = l.shape
    draw = rand(B, K, among.shape[-1]).to(among.device) + ~among            # the others: last
    rank = draw.argsort(dim=-1).argsort(dim=-1)
    return (rank < l[..., None]) & among


# --- On the states of the rollout -------------------------------------------------------------

def alive(A, cfg):
    """Rows that have a gradient (B,)."""
    return (A != 0) | (cfg.beta > 0)


def every_pair(traj, rows):
    """rows, steps (N,): every step that acted of the `rows` (B,) bool."""
    return (tokens_a_step(traj) * rows[:, None]).nonzero().unbind(dim=1)


def add_gradient(policy, traj, A, cfg, pairs):
    """Of the clipped loss with all that the flags say of it."""
    return agrpo.add_gradient(policy, traj, A, pairs, cfg.eps, cfg.micro_batch, cfg.ratio_per,
                              cfg.beta)


def every_step(policy, traj, A, cfg, rand):
    """The exact gradient: every step that acted, once."""
    rows, steps = every_pair(traj, alive(A, cfg))
    pairs = rows, steps, torch.ones_like(rows, dtype=torch.float64)
    return add_gradient(policy, traj, A, cfg, pairs)


def by_row(policy, traj, A, cfg, rand):
    """AGRPO with k timesteps of every row, evenly spaced through the row's own CDF."""
    p = row_probs(traj, cfg.follow) * alive(A, cfg)[:, None]
    offset = offsets(len(p), whole(cfg.k), "systematic", rand)
    return add_gradient(policy, traj, A, cfg, sample_rows(p, offset))


def official(policy, traj, A, cfg, rand):
    """AGRPO as its authors' code has it: entropy p_t, strata dealt over the batch, the mean up
    to each row's last non-EOS step, EOS tokens after it dropped (probablyabot/agrpo)."""
    no_text = (traj.o == policy.eos_id) | (traj.step_of == traj.how.m)
    n = traj.step_of.masked_fill(no_text, -1).amax(dim=1, keepdim=True) + 1  # (B, 1)
    p = row_probs(traj, "entropy", floor=1e-8) * alive(A, cfg)[:, None]
    p = p * (torch.arange(traj.how.m, device=p.device) < n)
    p = p / p.sum(dim=1, keepdim=True).clamp(min=1e-100)
    offset = offsets(len(p), whole(cfg.k), "batch-strata", rand)
    rows, steps, w = sample_rows(p, offset)
    return add_gradient(policy, traj, A, cfg, (rows, steps, w * traj.how.m / n[rows, 0]))


def scored_at_one(policy, traj, A, cfg, rand):
    """AGRPO's pairs, but scored at T = 1 whatever the rollout's temperature was: as d1, wd1,
    SPG, TraceRL, d2 and EGSPO do. Equal to AGRPO where the temperature is 1."""
    p = agrpo.timestep_probs(traj, A.abs(), cfg.follow)
    n = max(1, round(cfg.k * p.any(dim=1).sum().item()))
    rows, steps, w = agrpo.sample_timesteps(p, n, rand(len(A), 1)[0, 0].item())
    # Each pair as a row of its own, of which the mean over the batch knows nothing.
    w = w[:, None, None] * len(rows) / len(A)
    pairs = agrpo.Trajectory(*(None if x is None else x[rows] for x in traj[:-1]),
                             replace(traj.how, temperature=1.0))
    step_of, steps = pairs.step_of[:, None], steps[:, None, None]           # (N, 1, C)
    states = States(step_of >= steps, (step_of == steps) * w, A[rows])
    return estimate(lambda *_: states, policy, pairs, A[rows], cfg, rand)


def step_merge(policy, traj, A, cfg, rand, N=0, eos="all"):
    """Neighbouring steps as one: N states [k], each scores the tokens of m / N steps. Unbiased
    at N = m only. d2-StepMerge (kuleshov-group/d2; eos "first"), CJ-GRPO
    (yjyddq/EOSER-ASS-RL)."""
    N = min(N or whole(cfg.k), traj.how.m)
    cut = torch.arange(N + 1, device=traj.o.device)[:, None] * traj.how.m // N  # (N + 1, 1)
    step_of = traj.step_of[:, None]
    segment = (step_of >= cut[:-1]) & (step_of < cut[1:])                   # (B, N, C)
    segment &= counted(policy, traj, eos)[:, None]
    return States(step_of >= cut[:-1], segment.double(), A)


def tracerl(policy, traj, A, cfg, rand, N=0, eos="all"):
    """step-merge; A over the population's standard deviation; only groups of which 20 - 80 %
    did well; a short segment weighs as a full one (Gen-Verse/dLLM-RL)."""
    states = step_merge(policy, traj, A, cfg, rand, N, eos)
    group = A.view(-1, cfg.G)
    well = (group > 0).double().mean(dim=1, keepdim=True)       # the mean of a reward of 0 or 1
    group = group / group.std(dim=1, keepdim=True, correction=0).clamp(min=1e-6)
    A = (group * ((well >= 0.2) & (well <= 0.8))).flatten()
    tokens = (states.w > 0).sum(dim=2, keepdim=True)                        # (B, N, 1)
    full = tokens.amax(dim=1, keepdim=True)
    return states._replace(w=states.w * full / tokens.clamp(min=1), A=A)


def of_the_steps(traj, k):
    """What each of k different steps of a row counts, (B, 1, 1): a row may have fewer."""
    n = (tokens_a_step(traj) > 0).double().sum(dim=1)[:, None, None]
    return n / n.clamp(max=k)


def egspo(policy, traj, A, cfg, rand):
    """The k steps of largest mean entropy, each once, weight n / k: AGRPO's per-step gradients
    without the weights that make them unbiased (vishnutez/egspo-dllm-rl)."""
    tokens = tokens_a_step(traj)                                            # (B, m)
    entropy = agrpo.per_step(traj, traj.entropy) / tokens.clamp(min=1)
    t = entropy.masked_fill(tokens == 0, -1.0).topk(whole(cfg.k), dim=1).indices[..., None]
    step_of = traj.step_of[:, None]
    return States(step_of >= t, (step_of == t) * of_the_steps(traj, cfg.k), A)


def rldf(policy, traj, A, cfg, rand, sure=0.6, eos="first"):
    """k steps without replacement, by softmax of their tokens' mean -log p; scored are the
    step's tokens and later ones of p >= 0.6; no 1 / p_t (ant-research/Drift)."""
    tokens = tokens_a_step(traj)
    surprise = -agrpo.per_step(traj, traj.logp_old) / tokens.clamp(min=1)   # (B, m)
    # The k largest of softmax logits + Gumbel noise are a draw without replacement.
    gumbel = -(-rand(*surprise.shape).clamp(min=1e-12).log()).log().to(surprise)
    noisy = (surprise + gumbel).masked_fill(tokens == 0, -torch.inf)
    t = noisy.topk(whole(cfg.k), dim=1).indices[..., None]                  # (B, k, 1)
    hidden, now = traj.step_of[:, None] >= t, traj.step_of[:, None] == t
    drawn = counted(policy, traj, eos) & (traj.step_of < traj.how.m)
    w = hidden * drawn[:, None] * of_the_steps(traj, cfg.k)

    def weigh(logp, rows):
        return w[rows] * (now[rows] | hidden[rows] & (logp.exp() >= sure))
    return States(hidden, w, A, weigh)


# --- On states of their own: likelihoods of the finished text ---------------------------------

def one_step(policy, traj, A, cfg, rand, p_mask=0.15, eos="first"):
    """diffu-GRPO: everything masked, one forward for all tokens, 15 % of the prompt hidden too
    (dllm-reasoning/d1, arXiv 2504.12216)."""
    hide = (rand(*traj.q.shape).to(traj.q.device) < p_mask) & (traj.q_mask > 0)
    q = traj.q.masked_fill(hide, policy.mask_id)
    w = counted(policy, traj, eos)[:, None].double()                        # (B, 1, C)
    return States(torch.ones_like(w, dtype=torch.bool), w, A, q=q)


def wd1(policy, traj, A, cfg, rand, eos="first"):
    """one-step with softmax(A) - softmax(-A) over the group in place of A, times G / 2, which
    is A again where A is small (xiaohangt/wd1)."""
    group = A.view(-1, cfg.G)
    c = group.softmax(dim=1) - (-group).softmax(dim=1)
    return one_step(policy, traj, (c * cfg.G / 2).flatten(), cfg, rand, eos=eos)


def coupled(policy, traj, A, cfg, rand, eos="first"):
    """coupled-GRPO: all masked, a random share t, and its complement, so that every token is
    scored twice; A leave-one-out (apple/ml-diffucoder)."""
    t = 0.2 + 0.6 * rand(len(A), 1)[0, 0].item()                # one for the whole batch
    s = rand(*traj.o.shape).to(traj.o.device) < t
    hidden = torch.stack([torch.ones_like(s), s, ~s], dim=1)                # (B, 3, C)
    share = torch.tensor([1.0, t, 1 - t], dtype=torch.float64, device=s.device)[:, None]
    w = hidden * counted(policy, traj, eos)[:, None] / (2 * share) / 1.5
    return States(hidden, w, A * cfg.G / (cfg.G - 1))


def elbo(policy, traj, A, cfg, rand, eos="all"):
    """LLaDA's bound on the likelihood (arXiv 2502.09992, eq. 14): l ~ U{1..L} random tokens
    masked and weighed by L / l; k draws. UniGRPO's first step is this with k = 1."""
    among = counted(policy, traj, eos)
    L, k = among.sum(dim=1, keepdim=True, dtype=torch.float64), whole(cfg.k)    # (B, 1)
    l = 1 + (rand(len(L), k).to(L.device) * L).long()                       # (B, k)
    hidden = places(rand, among[:, None], l)
    return States(hidden, hidden * (L / (l * k))[..., None], A)


def complements(policy, traj, rand, eos):
    """l random tokens masked, then the others: l = 0..L evenly spread over the batch's rows."""
    among = counted(policy, traj, eos)
    B, L = len(among), among.sum(dim=1, keepdim=True, dtype=torch.float64)
    u = (torch.arange(B) / B + rand(B, 1)[0]) % 1
    l = (u[:, None].to(L.device) * (L + 1)).long()                          # (B, 1)
    s = places(rand, among[:, None], l)
    hidden = torch.cat([s, among[:, None] & ~s], dim=1)                     # (B, 2, C)
    return hidden, torch.cat([l, L - l], dim=1)[..., None], L[..., None]


def espo(policy, traj, A, cfg, rand, eos="all"):
    """ELBO on a state and its complement, one l per row (ML-GSAI/ESPO)."""
    hidden, size, L = complements(policy, traj, rand, eos)
    return States(hidden, hidden * (L + 1) / (2 * size.clamp(min=1)), A)


def gdsd(policy, traj, A, cfg, rand, eos="all"):
    """ESPO's states, every token weighed alike (GaryBall/GDSD)."""
    hidden, _, _ = complements(policy, traj, rand, eos)
    return States(hidden, hidden.double() / 2, A)


def gdpo(policy, traj, A, cfg, rand, N=2, eos="first"):
    """The bound's integral over the masked share by Gauss-Legendre quadrature, one mask a node;
    its floor loses 9 - 13 % of the weight at L = 12 (arXiv 2510.08554)."""
    among = counted(policy, traj, eos)
    nodes, share = torch.tensor(np.array(np.polynomial.legendre.leggauss(N))).to(traj.o.device)
    tau, share = (1 + nodes) / 2, share / 2                     # from [-1, 1] to [0, 1]
    l = (tau * among.sum(dim=1, keepdim=True)).long().clamp(min=1)          # (B, N)
    hidden = places(rand, among[:, None], l)
    return States(hidden, hidden * (share / tau)[:, None], A)


def spg(policy, traj, A, cfg, rand, K=2, power=1.5, eos="first"):
    """Sandwiched: a lower bound of the likelihood where A > 0, half of it and half of an upper
    one where A < 0; before a random block clean, after it masked (facebookresearch/SPG)."""
    among, length = counted(policy, traj, eos), traj.how.block_length
    L = among.sum(dim=1, keepdim=True, dtype=torch.float64)                 # (B, 1)
    block = torch.arange(traj.how.C, device=L.device) // length             # (C,)
    blocks = (L - 1) // length + 1                              # in which tokens count
    b = (rand(len(L), K).to(L.device) * blocks).long()[..., None]           # (B, K, 1)
    inside = among[:, None] & (block == b)
    l = 1 + (rand(len(L), K).to(L.device) * inside.sum(dim=2)).long()       # (B, K)
    s = places(rand, inside, l)
    lower = s * (L / (l * K))[..., None]

    def weigh(logp, rows):
        v = s[rows] * logp.exp() ** power / l[rows, :, None]    # the share l / L; L cancels
        share = v / v.sum(dim=1, keepdim=True).clamp(min=1e-300)
        scored = s[rows].any(dim=1).sum(dim=1)[:, None, None]
        upper = L[rows, :, None] / scored * share
        return lower[rows].where(A[rows, None, None] > 0, (lower[rows] + upper) / 2)
    return States(s | (block > b), lower, A, weigh)


RECIPES = {"step-merge": step_merge, "TraceRL": tracerl, "EGSPO": egspo, "RLDF": rldf,
           "one-step": one_step, "wd1": wd1, "coupled": coupled, "ELBO": elbo, "ESPO": espo,
           "GDSD": gdsd, "GDPO": gdpo, "SPG": spg}
ESTIMATORS = {"every step": every_step, "AGRPO": agrpo.policy_gradient, "by row": by_row,
              "official": official, "scored at T = 1": scored_at_one,
              **{name: partial(estimate, recipe) for name, recipe in RECIPES.items()}}
STATES = {"one-step": 1, "wd1": 1, "coupled": 3, "ESPO": 2, "GDSD": 2, "GDPO": 2, "SPG": 2}


def forwards(name, cfg):
    """Forward passes a row that an estimator may take: k where it is not its own."""
    return cfg.m if name == "every step" else STATES.get(name, cfg.k)


# --- The last step drawn again ----------------------------------------------------------------

def last_drawn_again(policy, traj, K, rand):
    """Each row K times (B K, ..): as it is, then with other tokens from its last step.

    A rollout has these logits at hand. Here they cost a forward pass.
    """
    how, last = traj.how, traj.how.m - 1
    many = agrpo.Trajectory(*(None if x is None else x.repeat_interleave(K, dim=0)
                              for x in traj[:-1]), how)
    rows = (traj.step_of == last).any(dim=1).nonzero()[:, 0]    # others had ended before
    if len(rows) == 0:
        return many
    step_of = traj.step_of[rows]
    x = torch.where(step_of < last, traj.o[rows], policy.mask_id)
    where = (step_of == last).nonzero()[:, 1].view(len(rows), -1)           # (R, W)
    with torch.no_grad():
        logits = agrpo.logits_at(policy, traj.q[rows], traj.q_mask[rows], x, where,
                                 agrpo.enter_block(traj.q, how, last))
    u = rand(len(traj.o), K, how.W).to(where.device)[rows]
    for i in range(1, K):
        tokens, support = agrpo.sample_tokens(logits, u[:, i], how)
        logp, _ = agrpo.score(logits, tokens, how, support)
        at = (rows * K + i)[:, None], where
        many.o[at], many.logp_old[at] = tokens, logp.double()
    return many


def last_step(policy, traj, A, cfg, rand, rewards, K=8):
    """AGRPO with K draws of each row's last step, all from the state that it was in.

    The steps before get the row's mean reward, the last step K actions, each against the mean
    of the others. rewards(traj, o (B K, C)) -> (B K,). A is not used.
    """
    must_be_on_policy(cfg)
    m, last = traj.how.m, traj.how.m - 1
    many = last_drawn_again(policy, traj, K, rand)
    r = rewards(traj, many.o).view(-1, K)                                   # (B, K)
    A = agrpo.group_advantages(r.mean(dim=1), cfg.G)
    # r_k - the others' mean; and the factor that the group's mean costs the steps before.
    A_last = agrpo.group_advantages(r.flatten(), K).view(-1, K) * K / (K - 1) * (1 - 1 / cfg.G)
    # A last step is the mean of K actions: as long as one over sqrt(K), if they are unlike.
    size = A.abs()[:, None].repeat(1, m)
    size[:, last] = A_last.square().mean(dim=1).sqrt() / K ** 0.5
    follow, one = dict(follow=cfg.follow, floor=0.0), torch.ones_like(A)
    weight = agrpo.timestep_probs(traj, one, **follow) * size
    live = (agrpo.timestep_probs(traj, one, "uniform") * size > 0).double()
    p = 0.9 * weight / weight.sum().clamp(min=1e-100) + 0.1 * live / live.sum().clamp(min=1)
    n = max(1, round(cfg.k * live.any(dim=1).sum().item()))
    rows, steps, w = agrpo.sample_timesteps(p, n, rand(len(A), 1)[0, 0].item())
    # Of a last step the K copies, which share one state: one forward of it, and one in the log.
    early, late = steps < last, steps == last
    copies = (rows[late, None] * K + torch.arange(K, device=rows.device)).flatten()
    a = add_gradient(policy, traj, A, cfg, (rows[early], steps[early], w[early]))
    b = add_gradient(policy, many, A_last.flatten(), cfg, (
        copies, torch.full_like(copies, last), w[late].repeat_interleave(K)))
    return agrpo.Seen(*(torch.cat([x, y[::K]]) for x, y in list(zip(a, b))[:3]),
                      a.forwards + b.forwards)


# --- Timestep samplers, and their variance ----------------------------------------------------

# By row: k points of every row, through the row's own CDF.
#   iid           no spreading
#   batch-strata  B k strata dealt out over the whole batch, so a row's points may coincide: the
#                 official code (after arXiv 2409.02908, app. G.2: one point per row)
#   strata        one point in each k-th of [0, 1), drawn independently
#   systematic    one offset, k evenly spaced points
# Together: k points a live row on average, evenly spaced through one CDF of |A| times p.
#   group         of the rows of one question
#   batch         of all rows: AGRPO
BY_ROW, TOGETHER = ("iid", "batch-strata", "strata", "systematic"), ("group", "batch")
SAMPLERS = [(follow, points) for follow in agrpo.FOLLOW for points in BY_ROW]
SAMPLERS += [("surprise", "group"), ("entropy", "batch"), ("surprise", "batch"),
             ("true norm", "systematic"), ("true norm", "batch")]


def within_rows(x):
    """Every row of x (B, m) divided by its sum; zeros stay."""
    return (x / x.sum(dim=1, keepdim=True)).nan_to_num()


def row_probs(traj, follow, floor=0.1):
    """agrpo.timestep_probs within each row: p (B, m) of which every row sums to 1."""
    one = torch.ones(len(traj.o), dtype=torch.float64, device=traj.o.device)
    weight, uniform = (within_rows(agrpo.timestep_probs(traj, one, what, floor=0.0))
                       for what in (follow, "uniform"))
    mixed = (1 - floor) * weight + floor * uniform
    return torch.where(weight.any(dim=1, keepdim=True), mixed, uniform)


def offsets(B, k, points, rand=agrpo.uniforms):
    """Where in each k-th of a row's CDF its points stand (B, k), for the samplers by row."""
    if points == "systematic":
        return rand(B, 1).expand(B, k)
    u = rand(B, k)
    if points == "strata":
        return u
    if points == "batch-strata":
        deal = rand(B, k).flatten().argsort().view(B, k)        # a random permutation
        u = (deal + u) / (B * k)
    return k * u - torch.arange(k)


def sample_rows(p, offset):
    """k steps of every row of p (B, m), at (j + offset) / k of its CDF; offset (B, k).

    Returns rows, steps, w (N,), N <= B k; a step drawn twice is one of twice the weight. A row
    of zeros yields nothing.
    """
    k = offset.shape[1]
    points = (torch.arange(k, device=p.device) + offset.to(p)) / k
    t = agrpo.inverse_cdf(p, points).clamp(max=p.shape[1] - 1)  # for the rows of zeros
    draws = torch.zeros_like(p).scatter_add(1, t, torch.ones_like(points))
    rows, steps = (draws * (p > 0)).nonzero().unbind(dim=1)
    return rows, steps, draws[rows, steps] / (k * p[rows, steps])


def sampler_probs(traj, A, G, norms):
    """{sampler: its CDFs, (B, m) by row, (number of CDFs, B, m) together}

    norms (B, m): lengths of the pairs' gradients, for the oracle.
    """
    group = torch.arange(len(A), device=A.device) // G
    sizes = dict(batch=A.abs()[None], group=A.abs() * (group == group[::G, None]))
    rows = {follow: row_probs(traj, follow) * (A != 0)[:, None] for follow in agrpo.FOLLOW}
    found = {}
    for follow, points in SAMPLERS:
        if follow == "true norm":
            p = norms[None] / norms.sum() if points == "batch" else within_rows(norms)
        elif points in TOGETHER:
            p = torch.stack([agrpo.timestep_probs(traj, of, follow) for of in sizes[points]])
        else:
            p = rows[follow]
        found[follow, points] = p
    return found


def draw_weights(p, k, points, draws):
    """The weight (draws, B m) that a sampler gives every (row, step): 0 where not drawn, 1 on
    average. p: its CDFs, as of sampler_probs."""
    B, m = p.shape[-2:]
    weights = p.new_zeros(draws, B, m)
    if points in BY_ROW:               # all draws as one large batch, but strata are one's own
        offset = torch.cat([offsets(B, whole(k), points) for _ in range(draws)])
        rows, steps, w = sample_rows(p.repeat(draws, 1), offset)
        weights.view(-1, m)[rows, steps] = w
        return weights.flatten(1)
    for draw in weights:
        for cdf in p:
            n = max(1, round(k * cdf.any(dim=1).sum().item()))
            rows, steps, w = agrpo.sample_timesteps(cdf, n, agrpo.uniforms(1).item())
            draw[rows, steps] = w
    return weights.flatten(1)


def pair_gradients(policy, traj, A):
    """g_i = A grad log pi(a_t | x_t), one backward pass for each pair i = (row, t) with A != 0.

    Returns pairs (N,), the flat index row m + t, and the Gram matrix g_i . g_j (N, N) float64.
    """
    m = traj.how.m
    params = [p for p in policy.model.parameters() if p.requires_grad]
    rows, steps = every_pair(traj, A != 0)
    g = torch.empty(len(rows), sum(p.numel() for p in params))
    for i in range(len(rows)):
        logp, _ = agrpo.step_logprobs(policy, traj, rows[i:i + 1], steps[i:i + 1])
        action = A[rows[i]].to(logp) * logp.sum()
        grads = torch.autograd.grad(action, params, materialize_grads=True)
        g[i] = torch.cat([x.flatten() for x in grads])
    # Short float32 sums, added up in float64.
    gram = sum((part @ part.T).double() for part in g.split(1 << 15, dim=1))
    return rows * m + steps, gram
