"""Other estimates of the policy gradient, and what it takes to measure the variance of AGRPO's.

An estimator adds the gradient of -J of one batch of trajectories to .grad, as agrpo.accumulate_gradient does:
(policy, cfg, traj, adv (B,), rows_total, rand) -> list of (ratio, kl, filled, A) per micro-batch. The others are on
policy only (--mu 1), where the clipped ratio's gradient is A grad log pi; they differ in what stands for log pi.
"""
from dataclasses import replace

import torch

import agrpo
from lab.cli import UserError


def agrpo_estimate(policy, cfg, traj, adv, rows_total, rand):
    """k = m stands for all: every step once, no sampling."""
    return agrpo.accumulate_gradient(
        policy, traj, adv, k=0 if cfg.k == cfg.m else cfg.k, rows_total=rows_total, mask_id=policy.mask_id,
        eos_id=policy.eos_id, temperature=cfg.temperature, timesteps=cfg.timesteps, points=cfg.points, eps=cfg.eps,
        beta=cfg.beta, per_step=cfg.ratio == "step", length_norm=cfg.length_norm, micro_batch=cfg.micro_batch,
        rand=rand, reference=getattr(policy.model, "disable_adapter", None))


def one_step(policy, cfg, traj, adv, rows_total, rand, p_mask=0.15):
    """diffu-GRPO (d1, arXiv 2504.12216): log pi(o | q) ~ sum_i log p(o_i | q', all masked), one forward pass for all
    tokens; q' is q with 15 % of its tokens masked, drawn anew each update; tokens after the first EOS left out."""
    live = (adv != 0).nonzero()[:, 0]
    hide = (rand(*traj.q.shape).to(traj.q.device) < p_mask) & (traj.q_mask > 0)
    q = torch.where(hide, policy.mask_id, traj.q)                                # (B, P)
    is_eos = (traj.o == policy.eos_id).long()
    here = torch.arange(traj.o.shape[1], device=q.device)
    pos = torch.where(is_eos.cumsum(1) - is_eos == 0, here, -1)                  # (B, C), up to the first EOS
    x_t, w = torch.full_like(traj.o, policy.mask_id), torch.full_like(adv, 1 / (cfg.m * rows_total))
    return score(policy, cfg, traj, adv, live, q[live], x_t[live], pos[live], w[live])


def elbo(policy, cfg, traj, adv, rows_total, rand):
    """LLaDA's bound on the likelihood (arXiv 2502.09992, eq. 14): mask l ~ U{1..C} random tokens of o, weigh the masked
    ones by C / l, which is 1 / t; k draws per row."""
    (B, C), k, dev = traj.o.shape, cfg.k, traj.o.device
    live = (adv != 0).nonzero()[:, 0].repeat_interleave(k)                       # (N,)
    l = 1 + (rand(B, k) * C).long().to(dev)                                      # (B, k)
    rank = rand(B, k, C).to(dev).argsort(-1).argsort(-1)                         # (B, k, C), a random order
    masked = (rank < l[..., None])[adv != 0].flatten(0, 1)                       # (N, C)
    pos = torch.where(masked, torch.arange(C, device=dev), -1)
    x_t = torch.where(masked, policy.mask_id, traj.o[live])
    w = C / (l[adv != 0].flatten().double() * k * cfg.m * rows_total)
    return score(policy, cfg, traj, adv, live, traj.q[live], x_t, pos, w)


def score(policy, cfg, traj, adv, rows, q, x_t, pos, w):
    """Adds -w A grad sum log p(o at pos | q, x_t): agrpo's loss at ratio 1 on states of one's own.
    rows, w (N,); q (N, P); x_t (N, C); pos (N, C), -1 where nothing is scored."""
    seen = []
    for i in torch.arange(len(rows)).split(cfg.micro_batch):
        filled, A = pos[i] >= 0, adv[rows[i]]
        logits = agrpo.denoise(policy, q[i], traj.q_mask[rows[i]], x_t[i], pos[i], policy.mask_id)
        lp, _ = agrpo.logprobs_and_entropy(logits, traj.o[rows[i]][filled], temperature=cfg.temperature)
        logp = lp.new_zeros(filled.shape)
        logp[filled] = lp
        loss, ratio, kl = agrpo.clipped_loss(logp, logp.detach(), A.to(logp), w[i].to(logp), filled, cfg.eps)
        loss.backward()
        seen.append((ratio, kl, filled, A.to(logp)))
    return seen


def inverse_entropy(policy, cfg, traj, *more):
    """A misconfigured sampler: p_t falls with the step's entropy, so that the steps that decide are drawn rarely, with
    large weights."""
    H = traj.entropy.double().sum(dim=-1, keepdim=True)
    return agrpo_estimate(policy, replace(cfg, timesteps="entropy"), traj._replace(entropy=1 / (H + 1e-2) ** 2), *more)


ESTIMATORS = {"agrpo": agrpo_estimate, "one-step": one_step, "ELBO": elbo, "inverse entropy": inverse_entropy}


# ---- the variance of AGRPO's timestep samplers ----------------------------------------------------------------------

WEIGHTS = ("uniform", "entropy", "root entropy", "score norm", "surprise")
POINTS = ("iid", "batch-strata", "row-strata", "low-discrepancy")
SAMPLERS = [(weight, points) for weight in WEIGHTS for points in POINTS] + [
    ("true norm", "low-discrepancy"), ("surprise", "group"), ("entropy", "pooled"), ("surprise", "pooled")]


def timestep_weights(policy, cfg, traj, norms):
    """What p_t is proportional to, as agrpo.timestep_probs takes it: (B, m, 1). norms (B, m): the true |g_t|."""
    H = traj.entropy.double().sum(-1, keepdim=True).clamp(min=0)
    return {"uniform": None, "entropy": H, "root entropy": H.sqrt(), "surprise": agrpo.step_importance(traj, "surprise"),
            "score norm": score_norms(policy, cfg, traj)[..., None], "true norm": norms[..., None]}


@torch.no_grad()
def score_norms(policy, cfg, traj):
    """sqrt(sum over the step's tokens of (1 - sum_v p_v^2)), (B, m): the same before the token is drawn,
    E|e_a - p|^2 = 1 - sum p^2."""
    if traj.support is not None:
        raise UserError("variance needs untruncated sampling: --top_k 0 --top_p 1")
    square = torch.zeros_like(traj.entropy)
    for t in range(traj.pos.shape[1]):
        x_t = agrpo.mask_again(traj.o, traj.step_of, torch.full_like(traj.n, t), policy.mask_id)
        logits = agrpo.denoise(policy, traj.q, traj.q_mask, x_t, traj.pos[:, t], policy.mask_id)
        square[:, t][traj.pos[:, t] >= 0] = 1 - (logits / cfg.temperature).softmax(-1).square().sum(-1)
    return square.sum(-1).sqrt()


def pair_gradients(policy, cfg, traj, adv):
    """g_i = A grad log pi(a_t | x_t), one backward pass for each pair i = (row, t) of rows with A != 0.
    Returns pairs (N,), the flat index row * m + t, and the Gram matrix G_ij = g_i . g_j (N, N)."""
    m, params = traj.pos.shape[1], [p for p in policy.model.parameters() if p.requires_grad]
    rows, steps = ((torch.arange(m) < traj.n[:, None]) & (adv != 0)[:, None]).nonzero().unbind(dim=1)
    X = torch.empty(len(rows), sum(p.numel() for p in params))
    for i in range(len(rows)):
        logp, _, _ = agrpo.step_logprobs(policy, traj, rows[i:i + 1], steps[i:i + 1], mask_id=policy.mask_id,
                                         temperature=cfg.temperature)
        grads = torch.autograd.grad(adv[rows[i]].to(logp) * logp.sum(), params, materialize_grads=True)
        X[i] = torch.cat([g.flatten() for g in grads])
    return rows * m + steps, sum((part @ part.T).double() for part in X.split(1 << 15, dim=1))   # short float32 sums


def draw_weights(p, adv, G, k, points, draws):
    """The weights (draws, B * m) that a sampler gives every (row, step): 0 where not drawn, 1 on average.
    group, pooled (ours): k points per row, but through one CDF of |A| p over all rows and steps of a group of G rows, or
    of the batch, so that rows of large |A| get more of them."""
    (B, m), live = p.shape, adv != 0

    def weights(p, u):
        c = torch.zeros_like(p)
        rows, steps, w = agrpo.sample_timesteps(p, u)
        c[rows, steps] = w
        return c
    if points not in ("group", "pooled"):
        u = torch.cat([agrpo.timestep_points(B, k, points) for _ in range(draws)])
        return weights((p * live[:, None]).repeat(draws, 1), u).view(draws, B * m)
    found, together = [], G if points == "group" else B
    for q, rows in zip((p * adv.abs()[:, None]).split(together), live.split(together)):
        q = q.reshape(1, -1).repeat(draws, 1)                                    # (draws, together * m)
        found.append(weights(q / q[:1].sum(), agrpo.timestep_points(draws, k * int(rows.sum()))) if rows.any() else q)
    return torch.cat(found, dim=1)
