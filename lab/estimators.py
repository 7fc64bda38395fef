"""Estimates of the policy gradient from the field, as recipes on one `score`, beside AGRPO's.

An estimator adds the gradient of -J of one batch of rollouts to .grad, as agrpo.policy_gradient
does: (policy, traj, A, cfg, rand) -> Seen. So agrpo.train(..., gradient=it) trains with it.

Nearly all differ in one choice only: which masked states of the finished o are scored, and with
what weights. A recipe returns that choice as `States`; `score` does the rest. They want --mu 1:
with a ratio of 1 every clipped loss has the gradient  w A grad log p(token | q, x).

eos       which tokens count: "first", those up to and including the first EOS, or "all"
constant  factors of a row, like 1 / L, are left out: they are a length bias of their own

JustGRPO (LeapLabTHU/JustGRPO) needs no recipe: it is AGRPO with block_length 1, m = C, every
step and --divide_by_std. Not reducible to `score`: VRPO, DMPO, StableDRL (pairs of answers or a
second model), MDPO (a reward per step), IGPO, value models, learned or sampled orders.
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo

NOTHING = agrpo.Seen(torch.zeros(0), torch.zeros(0), torch.zeros(0), 0)


class States(NamedTuple):
    """K masked states of each row's finished o, and how much each token in them counts."""
    hidden: torch.Tensor               # (B, K, C) bool: what is [MASK] in the state
    w: torch.Tensor                    # (B, K, C) weight of each token's log-probability
    A: torch.Tensor                    # (B,) advantages; a row of A = 0 costs no forward
    weigh: Optional[Callable] = None   # (logp (n, K, C), rows (n,)) -> w of these rows
    q: Optional[torch.Tensor] = None   # (B, P) another prompt than the rollout's


def score(policy, traj, cfg, states):
    """Add the gradient of -J,  J = 1 / (m B) sum w A log p(o | q, x),  to .grad. Returns Seen.

    Every place goes through the LM head, scored or not: good enough for small models.
    """
    hidden, w, A, weigh, q = states
    B, K, C = hidden.shape
    q = traj.q if q is None else q
    everywhere = torch.arange(C, device=q.device)
    block = agrpo.Block(q.shape[1], q.shape[1] + C, {})         # these recipes know no blocks
    seen = [NOTHING]
    for rows in (A != 0).nonzero()[:, 0].split(max(1, cfg.micro_batch // K)):
        each = rows.repeat_interleave(K)                                    # (n K,)
        tokens = traj.o[each]
        x = torch.where(hidden[rows].flatten(0, 1), policy.mask_id, tokens)
        where = everywhere.expand_as(x)
        logits = agrpo.denoise(policy, q[each], traj.q_mask[each], x, where, block)
        logp, _ = agrpo.score(logits, tokens, traj.how)
        logp = logp.view(-1, K, C)
        # Weights that depend on the model are constants to the gradient.
        weight = weigh(logp.detach().double(), rows) if weigh else w[rows]
        J = (weight * A[rows, None, None] * logp).sum() / (traj.how.m * B)
        (-J).backward()
        ratio = torch.ones_like(x, dtype=torch.float32)
        seen.append(agrpo.Seen(ratio, A[each, None].float(), 0 * ratio, 1))
    return agrpo.merge(seen)


def estimate(recipe, policy, traj, A, cfg, rand):
    """A recipe as an estimator."""
    if traj.support is not None:
        raise agrpo.UserError("these estimators score all tokens: use --top_k 0 --top_p 1")
    return score(policy, traj, cfg, recipe(policy, traj, A, cfg, rand))


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

def every_pair(traj, A):
    """rows, steps (N,): every step that acted of every row of A != 0."""
    return (tokens_a_step(traj) * (A != 0)[:, None]).nonzero().unbind(dim=1)


def every_step(policy, traj, A, cfg, rand):
    """The exact gradient: every step that acted, once."""
    rows, steps = every_pair(traj, A)
    pairs = (rows, steps, torch.ones_like(rows, dtype=torch.float64))
    return agrpo.add_gradient(policy, traj, A, pairs, cfg.eps, cfg.micro_batch)


def official(policy, traj, A, cfg, rand):
    """AGRPO as its authors' code has it: entropy p_t, strata dealt over the batch, the mean up
    to each row's last non-EOS step, EOS tokens after it dropped (probablyabot/agrpo)."""
    no_text = (traj.o == policy.eos_id) | (traj.step_of == traj.how.m)
    n = traj.step_of.masked_fill(no_text, -1).amax(dim=1, keepdim=True) + 1  # (B, 1)
    p = agrpo.timestep_probs(traj, "entropy", floor=1e-8)
    p = p * (torch.arange(traj.how.m, device=p.device) < n) * (A != 0)[:, None]
    p = p / p.sum(dim=1, keepdim=True).clamp(min=1e-100)
    offset = offsets(len(p), cfg.k, "batch-strata", rand)
    rows, steps, w = agrpo.sample_timesteps(p, cfg.k, offset)
    pairs = (rows, steps, w * traj.how.m / n[rows, 0])
    return agrpo.add_gradient(policy, traj, A, pairs, cfg.eps, cfg.micro_batch)


def scored_at_one(policy, traj, A, cfg, rand):
    """AGRPO's pairs, but scored at T = 1 whatever the rollout's temperature was: as d1, wd1,
    SPG, TraceRL, d2 and EGSPO do. Equal to AGRPO where the temperature is 1."""
    p = agrpo.timestep_probs(traj, cfg.follow)
    points = (torch.arange(cfg.k) + rand(len(p), 1)) / cfg.k
    t = agrpo.inverse_cdf(p, points.to(p.device))                           # (B, k)
    w = 1 / (cfg.k * p.gather(1, t))
    step_of = traj.step_of[:, None]
    states = States(step_of >= t[..., None], (step_of == t[..., None]) * w[..., None], A)
    at_one = replace(traj.how, temperature=1.0)
    return score(policy, traj._replace(how=at_one), cfg, states)


def step_merge(policy, traj, A, cfg, rand, N=0, eos="all"):
    """Neighbouring steps as one: N states [k], each scores the tokens of m / N steps. Unbiased
    at N = m only. d2-StepMerge (kuleshov-group/d2; eos "first"), CJ-GRPO
    (yjyddq/EOSER-ASS-RL)."""
    N = min(N or cfg.k, traj.how.m)
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


def egspo(policy, traj, A, cfg, rand):
    """The k steps of largest mean entropy, each once, weight n / k: AGRPO's per-step gradients
    without the weights that make them unbiased (vishnutez/egspo-dllm-rl)."""
    tokens = tokens_a_step(traj)                                            # (B, m)
    entropy = agrpo.per_step(traj, traj.entropy) / tokens.clamp(min=1)
    t = entropy.masked_fill(tokens == 0, -1.0).topk(cfg.k, dim=1).indices[..., None]
    n = (tokens > 0).double().sum(dim=1)[:, None, None]
    step_of = traj.step_of[:, None]
    return States(step_of >= t, (step_of == t) * n / cfg.k, A)


def rldf(policy, traj, A, cfg, rand, sure=0.6, eos="first"):
    """k steps without replacement, by softmax of their tokens' mean -log p; scored are the
    step's tokens and later ones of p >= 0.6; no 1 / p_t (ant-research/Drift)."""
    tokens = tokens_a_step(traj)
    surprise = -agrpo.per_step(traj, traj.logp_old) / tokens.clamp(min=1)   # (B, m)
    # The k largest of softmax logits + Gumbel noise are a draw without replacement.
    gumbel = -(-rand(*surprise.shape).clamp(min=1e-12).log()).log().to(surprise)
    noisy = (surprise + gumbel).masked_fill(tokens == 0, -torch.inf)
    t = noisy.topk(cfg.k, dim=1).indices[..., None]                         # (B, k, 1)
    hidden, now = traj.step_of[:, None] >= t, traj.step_of[:, None] == t
    w = counted(policy, traj, eos)[:, None].double() * traj.how.m / cfg.k

    def weigh(logp, rows):
        return w[rows] * (now[rows] | hidden[rows] & (logp.exp() >= sure))
    return States(hidden, hidden * w, A, weigh)


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
    L = among.sum(dim=1, keepdim=True, dtype=torch.float64)                 # (B, 1)
    l = 1 + (rand(len(L), cfg.k).to(L.device) * L).long()                   # (B, k)
    hidden = places(rand, among[:, None], l)
    return States(hidden, hidden * (L / (l * cfg.k))[..., None], A)


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


NODES = {2: ((0.2113, 0.7887), (1 / 2, 1 / 2)),                 # Gauss-Legendre on [0, 1]
         3: ((0.1127, 0.5, 0.8873), (5 / 18, 8 / 18, 5 / 18))}


def gdpo(policy, traj, A, cfg, rand, N=2, eos="first"):
    """The bound's integral over the masked share by quadrature, one mask per node; its floor
    loses 9 - 13 % of the weight at L = 12 (arXiv 2510.08554)."""
    among = counted(policy, traj, eos)
    tau, share = torch.tensor(NODES[N], dtype=torch.float64, device=traj.o.device)
    l = (tau * among.sum(dim=1, keepdim=True)).long().clamp(min=1)          # (B, N)
    hidden = places(rand, among[:, None], l)
    return States(hidden, hidden * (share / tau)[:, None], A)


def spg(policy, traj, A, cfg, rand, K=2, power=1.5, eos="first"):
    """Sandwiched: a lower bound of the likelihood where A > 0, half of it and half of an upper
    one where A < 0; before a random block clean, after it masked (facebookresearch/SPG)."""
    among, length = counted(policy, traj, eos), traj.how.block_length
    L = among.sum(dim=1, keepdim=True)                                      # (B, 1)
    block = torch.arange(traj.how.C, device=L.device) // length             # (C,)
    blocks = (L - 1) // length + 1
    b = (rand(len(L), K).to(L.device) * blocks).long()[..., None]           # (B, K, 1)
    inside = among[:, None] & (block == b)
    l = 1 + (rand(len(L), K).to(L.device) * inside.sum(dim=2)).long()       # (B, K)
    s = places(rand, inside, l)
    lower = s * (L.double() / (l * K))[..., None]

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
ESTIMATORS = {"every step": every_step, "AGRPO": agrpo.policy_gradient, "official": official,
              "scored at T = 1": scored_at_one,
              **{name: partial(estimate, recipe) for name, recipe in RECIPES.items()}}
STATES = {"one-step": 1, "wd1": 1, "coupled": 3, "ESPO": 2, "GDSD": 2, "GDPO": 2, "SPG": 2}


def forwards(name, cfg):
    """Forward passes a row that an estimator may take: k where it is not its own."""
    return cfg.m if name == "every step" else STATES.get(name, cfg.k)


# --- The variance of AGRPO's timestep samplers ------------------------------------------------

POINTS = ("iid", "batch-strata", "strata", "systematic")
SAMPLERS = [(follow, points) for follow in agrpo.FOLLOW for points in POINTS]
SAMPLERS += [("true norm", "systematic"), ("surprise", "pooled")]


def offsets(B, k, points, rand=agrpo.uniforms):
    """The offset (B, k) of agrpo.sample_timesteps for points other than evenly spaced ones.

    iid           no spreading
    batch-strata  B k strata dealt out over the whole batch, so a row's points may coincide:
                  the official code (after arXiv 2409.02908, app. G.2: one point per row)
    strata        one point in each k-th of [0, 1), drawn independently
    systematic    AGRPO's here: one offset, k evenly spaced points
    """
    if points == "systematic":
        return rand(B, 1).expand(B, k)
    u = rand(B, k)
    if points == "strata":
        return u
    if points == "batch-strata":
        deal = rand(B, k).flatten().argsort().view(B, k)        # a random permutation
        u = (deal + u) / (B * k)
    return k * u - torch.arange(k)


def draw_weights(p, A, k, points, draws):
    """The weight (draws, B m) that a sampler gives every (row, step): 0 where not drawn, 1 on
    average. pooled (ours): as many points, but through one CDF of |A| p of the whole batch."""
    p = p * (A != 0)[:, None]
    if points == "pooled":
        k, p = k * int((A != 0).sum()), (p * A.abs()[:, None]).view(1, -1)
        p, points = p / p.sum(), "systematic"
    p = p.repeat(draws, 1)                                                  # (draws B, m)
    B = len(p) // draws
    offset = torch.cat([offsets(B, k, points) for _ in range(draws)])
    rows, steps, w = agrpo.sample_timesteps(p, k, offset)
    weights = torch.zeros_like(p)
    weights[rows, steps] = w
    return weights.view(draws, -1)


def pair_gradients(policy, traj, A):
    """g_i = A grad log pi(a_t | x_t), one backward pass for each pair i = (row, t) with A != 0.

    Returns pairs (N,), the flat index row m + t, and the Gram matrix g_i . g_j (N, N) float64.
    """
    m = traj.how.m
    params = [p for p in policy.model.parameters() if p.requires_grad]
    rows, steps = every_pair(traj, A)
    g = torch.empty(len(rows), sum(p.numel() for p in params))
    for i in range(len(rows)):
        logp, _ = agrpo.step_logprobs(policy, traj, rows[i:i + 1], steps[i:i + 1])
        action = A[rows[i]].to(logp) * logp.sum()
        grads = torch.autograd.grad(action, params, materialize_grads=True)
        g[i] = torch.cat([x.flatten() for x in grads])
    # Short float32 sums, added up in float64.
    gram = sum((part @ part.T).double() for part in g.split(1 << 15, dim=1))
    return rows * m + steps, gram
