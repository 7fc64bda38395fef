"""AGRPO's claims, executable, in the order of agrpo.py's sections: read them as worked examples.

The main witness is a toy model small enough to enumerate: three tokens and [MASK], in float64. `enumerate_mdp` walks
every trajectory (every choice of positions, every token) with its own plain code and differentiates the expected
reward. `every_rollout` drives agrpo.rollout down every trajectory by choosing its random numbers. The estimator's
exact mean over all of them must be the gradient, to nine digits.
"""
import itertools
import math

import pytest
import torch

import agrpo

MASK, EOS, A_, B_ = 0, 1, 2, 3                       # the toy vocabulary
P = 2                                                # its prompt length


class Toy(torch.nn.Module):
    """A bidirectional model of L positions and V tokens: logits[l] = W[l] tanh(sum_i a[i, x_i]), in float64."""

    def __init__(self, C, V=4, width=6, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = torch.nn.Parameter(torch.randn(P + C, V, width, generator=g, dtype=torch.float64))
        self.W = torch.nn.Parameter(0.2 * torch.randn(P + C, width, V, generator=g, dtype=torch.float64))
        self.forwards = self.rows = 0

    def every_logit(self, ids):
        h = torch.tanh(self.a[torch.arange(ids.shape[1]), ids].sum(dim=1))           # (N, width)
        return torch.einsum("nd,ldv->nlv", h, self.W)                                # (N, L, V)

    def forward(self, ids, attention_mask, flat):
        self.forwards, self.rows = self.forwards + 1, self.rows + len(ids)
        return self.every_logit(ids).flatten(0, 1)[flat]


def prompt(rows):
    return torch.tensor([[A_, B_]]).expand(rows, P), torch.ones(rows, P, dtype=torch.long)


def reward_of(o):
    """Different for (nearly) every text, and nothing a symmetry could cancel."""
    return sum((i + 1.5) * math.sin(1.3 * token * (i + 1)) for i, token in enumerate(o)) + (2.0 if o[0] == A_ else 0.0)


# ---- the independent enumeration --------------------------------------------------------------------------------------


def token_probs(logits, temperature, top_k, top_p):
    """{token: probability} after temperature, top-k and top-p, written out; the probabilities carry gradient."""
    x = logits / temperature
    ids = sorted((i for i in range(len(x)) if i != MASK), key=lambda i: -x[i].item())
    ids = ids[:top_k] if top_k else ids
    p = torch.softmax(torch.stack([x[i] for i in ids]), dim=0)
    if top_p < 1:
        n = 1 + sum(1 for j in range(1, len(ids)) if p[:j].sum().item() < top_p)
        ids = ids[:n]
        p = p[:n] / p[:n].sum()
    return dict(zip(ids, p))


def enumerate_mdp(model, *, C, m, block_length, unmasking="random", temperature=1.0, top_k=0, top_p=1.0):
    """Yield (probability with gradient, finished tokens) of every trajectory."""
    W, per_block = C // m, m // (C // block_length)

    def walk(o, t, probability):
        if t == m:
            yield probability, o
            return
        start = t // per_block * block_length
        if t % per_block == 0 and t and all(o[i] == EOS for i in range(start - block_length, start)):
            yield probability, o[:start] + [EOS] * (C - start)
            return
        ids = torch.tensor([[A_, B_] + o])
        logits = model.every_logit(ids)[0, P:]
        here = [i for i in range(start, start + block_length) if o[i] == MASK]
        full = {i: torch.stack(list(token_probs(logits[i], 1.0, 0, 1.0).values())).detach() for i in here}
        dist = {i: token_probs(logits[i], temperature, top_k, top_p) for i in here}
        full_of = {i: {v: p.item() for v, p in token_probs(logits[i], 1.0, 0, 1.0).items()} for i in here}
        if unmasking == "low_confidence":                # draw everywhere, keep the W most confident
            for drawn in itertools.product(*(dist[i] for i in here)):
                p = math.prod((dist[i][v] for i, v in zip(here, drawn)), start=probability)
                keep = sorted(zip(here, drawn), key=lambda iv: -full_of[iv[0]][iv[1]])[:W]
                yield from walk([dict(keep).get(i, v) for i, v in enumerate(o)], t + 1, p)
            return
        if unmasking == "random":
            choices = list(itertools.combinations(here, W))
        elif unmasking == "max_prob":
            choices = [sorted(here, key=lambda i: -full[i].max().item())[:W]]
        else:
            choices = [sorted(here, key=lambda i: -(full[i] * full[i].log()).sum().item())[:W]]
        for at in choices:
            for drawn in itertools.product(*(dist[i] for i in at)):
                p = math.prod((dist[i][v] for i, v in zip(at, drawn)), start=probability / len(choices))
                yield from walk([dict(zip(at, drawn)).get(i, v) for i, v in enumerate(o)], t + 1, p)

    yield from walk([MASK] * C, 0, torch.ones((), dtype=torch.float64))


def true_gradient(model, **mdp):
    """d/d theta of E[r], flattened; checks that the probabilities sum to one."""
    J, total = 0.0, 0.0
    for p, o in enumerate_mdp(model, **mdp):
        J, total = J + p * reward_of(o), total + p.item()
    assert abs(total - 1) < 1e-12
    return torch.cat([g.flatten() for g in torch.autograd.grad(J, [model.a, model.W])])


# ---- agrpo.rollout, driven down every trajectory ----------------------------------------------------------------------


def select(traj, rows):
    return agrpo.Trajectory(*(x if x is None else x[rows] for x in traj))


def every_rollout(model, *, C, m, block_length, grid=14, **how):
    """Each trajectory of agrpo.rollout once, with its probability (N,), found by a grid over its random numbers."""
    u_per_step = block_length if how.get("unmasking") == "low_confidence" else C // m
    orders = list(itertools.permutations(range(C))) if how.get("unmasking", "random") == "random" else [range(C)]
    free = u_per_step * m if u_per_step == C // m else None
    if free is None:                                     # low_confidence: step t of a block draws at what is left of it
        per_block = m // (C // block_length)
        used = [(t, j) for t in range(m) for j in range(block_length - t % per_block * (C // m))]
    else:
        used = [(t, j) for t in range(m) for j in range(u_per_step)]
    points = torch.cartesian_prod(*[(torch.arange(grid) + 0.5).double() / grid] * len(used)).view(-1, len(used))
    rows = len(orders) * len(points)
    u = torch.zeros(rows, m, u_per_step, dtype=torch.float64)
    for n, (t, j) in enumerate(used):
        u[:, t, j] = points[:, n].repeat(len(orders))
    order = torch.tensor([list(o) for o in orders]).double().repeat_interleave(len(points), dim=0)
    script = iter([order, u])
    q, q_mask = prompt(rows)
    traj = agrpo.rollout(model, q, q_mask, C=C, m=m, block_length=block_length, mask_id=MASK, eos_id=EOS,
                         rand=lambda *shape: next(script), **how)
    # A trajectory is its positions and tokens; within a random step the order of the slots does not matter.
    by_pos = traj.pos.masked_fill(traj.pos < 0, C).sort(dim=2)
    key = torch.cat([by_pos.values, traj.tok.gather(2, by_pos.indices)], dim=2).flatten(1)
    _, inverse = key.unique(dim=0, return_inverse=True)
    first = torch.zeros(inverse.max() + 1, dtype=torch.long).scatter_(0, inverse.flip(0), torch.arange(rows).flip(0))
    traj = select(traj, first)
    probability = traj.logp_old.sum(dim=(1, 2)).exp()
    if how.get("unmasking", "random") == "random":
        left, ways = C, 1.0                              # positions: uniform over the subsets of what a block has left
        ways = torch.ones(len(first), dtype=torch.float64)
        per_block = m // (C // block_length)
        for t in range(m):
            left = block_length - t % per_block * (C // m)
            ways = torch.where(traj.n > t, ways / math.comb(left, C // m), ways)
        probability = probability * ways
    return traj, probability


def estimator_mean(model, traj, probability, *, k, timesteps="uniform", points="low-discrepancy", **more):
    """Exact mean of agrpo's gradient estimate over trajectories and over the sampler's random offset.

    As a function of a row's offset the drawn steps are piecewise constant, so the mean is a finite sum: the row's
    j-th piece, entered at its middle, weighted by its length. The estimate is linear in A: the weights go there.
    """
    rewards = torch.tensor([reward_of(o) for o in traj.o.tolist()], dtype=torch.float64)
    m = traj.pos.shape[1]
    p = agrpo.timestep_probs(traj.n, m, agrpo.step_importance(traj, timesteps))
    edges = p.cumsum(dim=1)
    # one point: u = offset itself; evenly spaced points: u_j = (j + offset) / k, so an edge at c is met at (c k) mod 1
    edges = edges if points == "iid" else (edges * k) % 1
    edges = torch.cat([torch.zeros(len(p), 1), edges.clamp(0, 1).sort(dim=1).values, torch.ones(len(p), 1)], dim=1)
    model.zero_grad()
    for piece in range(edges.shape[1] - 1):
        middle, length = edges[:, piece:piece + 2].mean(dim=1, keepdim=True), edges[:, piece + 1] - edges[:, piece]
        agrpo.accumulate_gradient(model, traj, rewards * probability * length, k=k, rows_total=1, mask_id=MASK, eos_id=EOS,
                                  timesteps=timesteps, points=points, micro_batch=1000,
                                  rand=lambda B, *shape: middle.expand(B, *shape), **more)
    return -m * torch.cat([model.a.grad.flatten(), model.W.grad.flatten()])       # undo J's 1 / m and the loss's sign


def same(a, b, tolerance=1e-9):
    return ((a - b).norm() / b.norm()).item() < tolerance


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# ======================================================================================================================
# § The denoising MDP
# ======================================================================================================================


def test_steps_must_divide_and_the_refusal_names_what_would():
    assert agrpo.steps_per_block(384, 128, 12) == 4
    with pytest.raises(ValueError, match=r"--m 5 .*\[1, 2, 3, 4, 6, 12\]"):
        agrpo.steps_per_block(12, 5, 12)
    with pytest.raises(ValueError, match=r"--block_length 5 does not divide --C 12"):
        agrpo.steps_per_block(12, 4, 5)
    with pytest.raises(ValueError, match=r"--m 2 .*\[3, 6, 12\]"):
        agrpo.steps_per_block(12, 2, 4)
    with pytest.raises(ValueError, match="at least 1"):
        agrpo.steps_per_block(12, 0, 12)


def test_a_state_holds_what_was_revealed_before_its_step():
    o, step_of = torch.tensor([[A_, B_, EOS]]), torch.tensor([[1, 0, 2]])
    states = [agrpo.mask_again(o, step_of, torch.tensor([t]), MASK)[0].tolist() for t in range(3)]
    assert states == [[MASK, MASK, MASK], [MASK, B_, MASK], [A_, B_, MASK]]


# ======================================================================================================================
# § Rollout
# ======================================================================================================================


def test_inverse_cdf_never_leaves_the_support():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    u = torch.tensor([[0.0, 0.249, 0.25, 0.999, 1.0 - 2 ** -53, 1.0]], dtype=torch.float64)
    assert agrpo.inverse_cdf(p, u).tolist() == [[1, 1, 3, 3, 3, 3]]
    short = torch.full((1, 10), 0.1, dtype=torch.float32).cumsum(1).diff(prepend=torch.zeros(1, 1)) * (1 - 1e-3)
    assert agrpo.inverse_cdf(short, torch.ones(1, 1))[0, 0] == 9            # a CDF that ends at 0.999, asked for 1.0
    many = torch.rand(1000, 7) ** 8 + 1e-30
    drawn = agrpo.inverse_cdf(many, torch.rand(1000, 500, dtype=torch.float64))
    assert drawn.min() >= 0 and drawn.max() <= 6


def test_tokens_are_drawn_in_proportion():
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 0.0, 1.0, -math.inf]).expand(40_000, 4)
    for temperature, top_k, top_p, want in [
            (1.0, 0, 1.0, torch.tensor([2.0, 0.0, 1.0, -math.inf]).softmax(0)),
            (0.5, 0, 1.0, torch.tensor([4.0, 0.0, 2.0, -math.inf]).softmax(0)),
            (1.0, 2, 1.0, torch.tensor([2.0, -math.inf, 1.0, -math.inf]).softmax(0)),
            (1.0, 99, 1.0, torch.tensor([2.0, 0.0, 1.0, -math.inf]).softmax(0)),        # top_k above the vocabulary
            (1.0, 0, 0.7, torch.tensor([2.0, -math.inf, 1.0, -math.inf]).softmax(0)),   # 0.665 < 0.7: the next crosses
            (1.0, 0, 0.6, torch.tensor([1.0, 0.0, 0.0, 0.0]))]:
        tok, logp, entropy, support = agrpo.sample_tokens(logits, agrpo.uniforms(40_000), temperature, top_k, top_p)
        share = torch.bincount(tok, minlength=4) / 40_000
        assert (share - want).abs().max() < 0.01, (temperature, top_k, top_p)
        assert torch.allclose(logp, want[tok].log(), atol=1e-6)
        assert torch.allclose(entropy, -(want * want.clamp(min=1e-30).log()).sum(), atol=1e-6)
        if support is not None:
            assert sorted(i for i in support[0].tolist() if i >= 0) == want.nonzero()[:, 0].tolist()


def test_large_logits_at_low_temperature_do_not_overflow():
    logits = torch.tensor([[200.0, 199.0, -50.0]]).expand(2000, 3)
    tok, logp, *_ = agrpo.sample_tokens(logits, (torch.arange(2000).double() + 0.5) / 2000, temperature=0.6)
    assert abs((tok == 0).float().mean().item() - 1 / (1 + math.exp(-1 / 0.6))) < 1e-3 and logp.isfinite().all()


@pytest.mark.parametrize("unmasking", ["random", "entropy", "max_prob", "low_confidence"])
def test_a_rollout_reveals_every_position_once_in_block_order(unmasking):
    model, (q, q_mask) = Toy(C=6), prompt(50)
    traj = agrpo.rollout(model, q, q_mask, C=6, m=6, block_length=3, mask_id=MASK, eos_id=99, unmasking=unmasking)
    assert (traj.o != MASK).all()
    assert (traj.step_of.sort(dim=1).values == torch.arange(6)).all()
    assert (traj.step_of[:, :3] < 3).all() and (traj.step_of[:, 3:] >= 3).all()
    assert (traj.n == 6).all()


def test_a_row_whose_block_is_all_eos_leaves_and_the_rest_is_eos():
    model, (q, q_mask) = Toy(C=4), prompt(300)
    torch.manual_seed(0)
    traj = agrpo.rollout(model, q, q_mask, C=4, m=4, block_length=2, mask_id=MASK, eos_id=EOS)
    early = (traj.o[:, :2] == EOS).all(dim=1)
    assert 0 < early.sum() < 300
    assert (traj.n[early] == 2).all() and (traj.n[~early] == 4).all()
    assert (traj.o[early] == EOS).all() and (traj.step_of[early][:, 2:] == 4).all()      # 4 = m: never acted on
    assert (traj.pos[early][:, 2:] == -1).all() and (traj.logp_old[early][:, 2:] == 0).all()


def test_all_eos_rollouts_and_short_prompts_go_through():
    model, (q, q_mask) = Toy(C=4), prompt(8)
    with torch.no_grad():
        model.W[:, :, EOS] = 0
        model.W[:, :, [MASK, A_, B_]] *= 0
        model.W[:, :, EOS] += 50 * torch.tanh(model.a[torch.arange(6), torch.tensor([A_, B_, 0, 0, 0, 0])].sum(0))
    traj = agrpo.rollout(model, q, q_mask, C=4, m=2, block_length=2, mask_id=MASK, eos_id=EOS)
    assert (traj.o == EOS).all() and (traj.n == 1).all()        # done after the first block, prompt (2) <= block (2)
    adv, dead = agrpo.group_advantages(torch.zeros(8), 4)
    for norm in ("constant", "official"):
        assert agrpo.accumulate_gradient(model, traj, adv, k=1, rows_total=8, mask_id=MASK, eos_id=EOS,
                                         length_norm=norm) == []
    agrpo.accumulate_gradient(model, traj, torch.ones(8), k=1, rows_total=8, mask_id=MASK, eos_id=EOS, length_norm="official")
    assert model.a.grad is None                                 # the official norm has no step left to score


def test_a_row_does_not_depend_on_the_batch_it_is_in():
    model, keys = Toy(C=4), [(0, i) for i in range(10)]
    how = dict(C=4, m=2, block_length=4, mask_id=MASK, eos_id=EOS)
    whole = agrpo.rollout(model, *prompt(10), rand=agrpo.row_random(keys), **how)
    parts = [agrpo.rollout(model, *prompt(5), rand=agrpo.row_random(keys[i:i + 5]), **how) for i in (0, 5)]
    assert torch.equal(whole.o, torch.cat([part.o for part in parts]))
    assert len(whole.o.unique(dim=0)) > 3


# ======================================================================================================================
# § Advantages
# ======================================================================================================================


def test_advantages_by_hand():
    adv, dead = agrpo.group_advantages(torch.tensor([1.0, 2.0, 3.0, 6.0, 0.1, 0.1, 0.1, 0.1]), G=4)
    assert adv.tolist() == [-2.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    assert dead.tolist() == [False] * 4 + [True] * 4
    adv, _ = agrpo.group_advantages(torch.tensor([0.0, 2.0]), G=2, normalise_std=True)
    assert torch.allclose(adv, torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + 1e-4))
    for G in (3, 5, 6, 7):                                      # a mean of equal floats need not equal them
        for r in range(1, 40):
            assert (agrpo.group_advantages(torch.full((G,), r / 10, dtype=torch.float64), G)[0] == 0).all()


def test_dead_groups_contribute_exactly_nothing():
    model, (q, q_mask) = Toy(C=4), prompt(8)
    traj = agrpo.rollout(model, q, q_mask, C=4, m=4, block_length=4, mask_id=MASK, eos_id=EOS)
    adv, dead = agrpo.group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0] + [0.3] * 4), G=4)
    grads = []
    for rows in (slice(0, 4), slice(0, 8)):
        model.zero_grad()
        model.rows = 0
        agrpo.accumulate_gradient(model, select(traj, rows), adv[rows], k=0, rows_total=8, mask_id=MASK, eos_id=EOS)
        grads.append(model.a.grad.clone())
        assert model.rows == 16                                 # no forward is spent on the dead group
    assert torch.equal(*grads)


# ======================================================================================================================
# § Timestep sampler
# ======================================================================================================================

SAMPLERS = list(itertools.product(["uniform", "importance"], ["low-discrepancy", "row-strata", "batch-strata", "iid"]))


@pytest.mark.parametrize("timesteps, points", SAMPLERS)
def test_weights_are_unbiased_and_bounded(timesteps, points):
    torch.manual_seed(0)
    B, m, k, floor, n = 4, 6, 3, 0.1, torch.tensor([6, 6, 3, 1])
    importance = torch.tensor([[1, 0, 2, 1e-8, 3, 1], [0.0] * 6, [5, 1, 1, 9, 9, 9], [2] * 6])[..., None]
    p = agrpo.timestep_probs(n, m, None if timesteps == "uniform" else importance, floor)
    assert torch.allclose(p.sum(dim=1), torch.ones(4).double()) and (p[2, 3:] == 0).all() and (p[3, 1:] == 0).all()
    total, trials = torch.zeros(B, m).double(), 4000
    for _ in range(trials):
        rows, steps, w = agrpo.sample_timesteps(p, agrpo.timestep_points(B, k, points))
        assert (steps < n[rows]).all() and len(set(zip(rows.tolist(), steps.tolist()))) == len(rows)
        draws = w * k * p[rows, steps]
        assert torch.allclose(draws, draws.round()) and (w <= draws * n[rows] / (k * floor) + 1e-9).all()
        total[rows, steps] += w
    assert ((total / trials - (p > 0).double()).abs() < 0.25).all()          # E[w] = 1 at every step that acted


def test_equal_draws_are_merged():
    p = torch.tensor([[0.9, 0.1], [0.0, 0.0]], dtype=torch.float64)
    rows, steps, w = agrpo.sample_timesteps(p, torch.tensor([[0.1, 0.4, 0.7, 0.95], [0.1, 0.4, 0.7, 0.95]]))
    assert rows.tolist() == [0, 0] and steps.tolist() == [0, 1]             # a row that never acted yields nothing
    assert torch.allclose(w, torch.tensor([3 / (4 * 0.9), 1 / (4 * 0.1)]).double())


def test_points_fall_where_the_names_say():
    torch.manual_seed(0)
    for _ in range(50):
        systematic = agrpo.timestep_points(5, 4)
        assert torch.allclose(systematic.diff(dim=1), torch.full((5, 3), 0.25).double())
        assert (agrpo.timestep_points(5, 4, "row-strata").mul(4).floor() == torch.arange(4)).all()
        assert agrpo.timestep_points(5, 4, "batch-strata").mul(20).floor().flatten().sort().values.tolist() == list(range(20))
    with pytest.raises(ValueError, match="--points sobol is unknown"):
        agrpo.timestep_points(5, 4, "sobol")


def test_u_of_one_and_a_short_cdf_do_not_index_out_of_range():
    p = torch.full((1, 7), 1 / 7, dtype=torch.float32).double() * (1 - 1e-7)
    rows, steps, w = agrpo.sample_timesteps(p, torch.tensor([[1.0, 1.0 - 2 ** -53, 0.0]]).double())
    assert steps.tolist() == [0, 6]
    p = agrpo.timestep_probs(torch.tensor([3]), 7)                          # u = 1 stays within the steps that acted
    assert agrpo.sample_timesteps(p, torch.ones(1, 1))[1].tolist() == [2]


def test_spreading_the_points_within_a_row_lowers_the_variance():
    model, (q, q_mask) = Toy(C=6, seed=3), prompt(64)
    torch.manual_seed(0)
    traj = agrpo.rollout(model, q, q_mask, C=6, m=6, block_length=6, mask_id=MASK, eos_id=EOS)
    adv, _ = agrpo.group_advantages(torch.tensor([reward_of(o) for o in traj.o.tolist()], dtype=torch.float64), 64)

    def gradient(**sampler):
        model.zero_grad()
        agrpo.accumulate_gradient(model, traj, adv, rows_total=64, mask_id=MASK, eos_id=EOS, micro_batch=1000, **sampler)
        return torch.cat([model.a.grad.flatten(), model.W.grad.flatten()])
    exact, error = gradient(k=0), {}
    for points in ("iid", "batch-strata", "row-strata", "low-discrepancy"):
        error[points] = sum((gradient(k=3, points=points, timesteps="uniform") - exact).square().sum().item()
                            for _ in range(300))
    assert error["low-discrepancy"] < 0.75 * error["iid"] and error["row-strata"] < 0.85 * error["iid"], error


# ======================================================================================================================
# § Per-step log-probabilities
# ======================================================================================================================


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.6), dict(top_k=2), dict(top_p=0.7, temperature=0.8),
                                 dict(top_k=99), dict(unmasking="entropy"), dict(unmasking="low_confidence", top_k=2),
                                 dict(unmasking="max_prob", top_p=0.9)], ids=str)
def test_ratio_is_one_before_the_first_update(how):
    """What the rollout cached is what one forward pass per (row, step) gives again, on the sampler's own support."""
    model, (q, q_mask) = Toy(C=4), prompt(100)
    traj = agrpo.rollout(model, q, q_mask, C=4, m=2, block_length=2, mask_id=MASK, eos_id=EOS, **how)
    rows, steps = (torch.arange(2) < traj.n[:, None]).nonzero().unbind(dim=1)
    logp, entropy, filled = agrpo.step_logprobs(model, traj, rows, steps, mask_id=MASK,
                                                temperature=how.get("temperature", 1.0))
    assert filled.any(dim=1).all() and (logp[filled] <= 1e-12).all()
    assert torch.allclose(logp, traj.logp_old[rows, steps], atol=1e-12)
    assert torch.allclose(entropy, traj.entropy[rows, steps], atol=1e-12)


def test_the_head_runs_on_the_scored_rows_only():
    model, (q, q_mask), asked = Toy(C=4), prompt(3), []

    def policy(ids, attention_mask, flat):
        asked.append(len(flat))
        return model(ids, attention_mask, flat)
    traj = agrpo.rollout(policy, q, q_mask, C=4, m=2, block_length=4, mask_id=MASK, eos_id=EOS)
    agrpo.step_logprobs(policy, traj, torch.tensor([0, 2]), torch.tensor([1, 0]), mask_id=MASK)
    assert asked == [6, 6, 4]                                    # C / m = 2 positions of 3 rows, twice; of 2 rows, once


# ======================================================================================================================
# § Clipped loss
# ======================================================================================================================


def test_clip_and_kl_by_hand():
    """eps = 0.2. A > 0: J = min(rho, 1.2) A; A < 0: J = max(rho, 0.8) A. The gradient stops where the clip binds."""
    table = [  # rho,  A,   J,    dJ / dlogp
        (1.0, 2.0, 2.0, 2.0), (1.1, 2.0, 2.2, 2.2), (1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0),
        (1.0, -2.0, -2.0, -2.0), (0.9, -2.0, -1.8, -1.8), (0.5, -2.0, -1.6, 0.0), (1.5, -2.0, -3.0, -3.0)]
    for rho, A, J, slope in table:
        logp = torch.tensor([[math.log(rho) - 1.0]], dtype=torch.float64, requires_grad=True)
        one, old = torch.ones(1, dtype=torch.float64), torch.full((1, 1), -1.0, dtype=torch.float64)
        loss, ratio, _ = agrpo.clipped_loss(logp, old, A * one, 3 * one, torch.tensor([[True]]), eps=0.2)
        loss.backward()
        assert loss.item() == pytest.approx(-3 * J) and logp.grad.item() == pytest.approx(-3 * slope)
        assert ratio.item() == pytest.approx(rho)
    # k3 at pi = 0.5, ref = 0.25: r = 1/2, r - log r - 1 = 0.1931; at equal policies 0
    k3 = agrpo.k3(torch.tensor(0.5).log(), torch.tensor(0.25).log())
    assert k3.item() == pytest.approx(0.5 + math.log(2) - 1, abs=1e-6) and agrpo.k3(torch.tensor(-1.0), torch.tensor(-1.0)) == 0
    logp = torch.tensor([[0.5]]).log()
    loss, _, kl = agrpo.clipped_loss(logp, logp, torch.zeros(1), torch.ones(1), torch.tensor([[True]]), beta=0.1,
                                     logp_ref=torch.tensor([[0.25]]).log())
    assert loss.item() == pytest.approx(0.1 * 0.193147, abs=1e-6) and kl.item() == pytest.approx(0.193147, abs=1e-6)


def test_empty_slots_count_nothing():
    logp = torch.tensor([[-1.0, 0.0]], requires_grad=True)
    loss, *_ = agrpo.clipped_loss(logp, torch.tensor([[-1.0, 0.0]]), torch.tensor([2.0]), torch.ones(1),
                                  torch.tensor([[True, False]]))
    loss.backward()
    assert loss.item() == -2.0 and logp.grad.tolist() == [[-2.0, 0.0]]


def test_a_ratio_per_step_is_the_product_of_its_tokens():
    logp, old = torch.tensor([[-0.5, -1.0]], requires_grad=True), torch.tensor([[-0.6, -1.05]])
    loss, ratio, _ = agrpo.clipped_loss(logp, old, torch.ones(1), torch.ones(1), torch.ones(1, 2, dtype=torch.bool),
                                        per_step=True)
    assert ratio.item() == pytest.approx(math.exp(0.15)) and loss.item() == pytest.approx(-math.exp(0.15))


def test_the_kl_term_has_the_gradient_of_the_kl():
    """E over tokens of d(rho k3) = d KL(pi || ref), token by token enumerated; k3 without rho has another gradient."""
    torch.manual_seed(0)
    x, ref = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64).log_softmax(0)
    logp = x.log_softmax(0)
    want, = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), x, retain_graph=True)
    one = torch.ones(5, dtype=torch.float64)
    loss, *_ = agrpo.clipped_loss(logp[:, None], logp.detach()[:, None], 0 * one, logp.detach().exp(), torch.ones(5, 1) > 0,
                                  beta=1.0, logp_ref=ref[:, None])
    assert torch.allclose(torch.autograd.grad(loss, x)[0], want, atol=1e-12)


# ======================================================================================================================
# § Update: the gradient is the policy gradient
# ======================================================================================================================

EXACT = {  # every setting documented as exact
    "random": dict(C=3, m=3, block_length=3),
    "several tokens a step": dict(C=4, m=2, block_length=4, grid=7),
    "blocks and early exit": dict(C=4, m=4, block_length=2, grid=7),
    "temperature": dict(C=3, m=3, block_length=3, temperature=0.7),
    "top-k": dict(C=3, m=3, block_length=3, top_k=2),
    "top-p": dict(C=3, m=3, block_length=3, top_p=0.8),
    "top-k above V, top-p": dict(C=3, m=3, block_length=3, top_k=50, top_p=0.9),
    "entropy": dict(C=3, m=3, block_length=3, unmasking="entropy"),
    "max_prob": dict(C=4, m=2, block_length=4, unmasking="max_prob", grid=10),
    "low_confidence": dict(C=3, m=3, block_length=3, unmasking="low_confidence", grid=6),
    "low_confidence, blocks, truncated": dict(C=4, m=4, block_length=2, unmasking="low_confidence", top_k=2, grid=6),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_mean_of_the_estimator_is_the_policy_gradient(name):
    how = EXACT[name]
    model = Toy(C=how["C"], seed=1)
    want = true_gradient(model, **{k: v for k, v in how.items() if k != "grid"})
    traj, probability = every_rollout(model, **how)
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)          # the rollout's own probabilities: all there
    for timesteps, points, k in [("uniform", "iid", 1), ("entropy", "iid", 1), ("uniform", "low-discrepancy", 2),
                                 ("entropy", "low-discrepancy", 2), ("surprise", "low-discrepancy", 2),
                                 ("surprise", "iid", 1), ("entropy", "row-strata", 3)]:
        got = estimator_mean(model, traj, probability, k=k, timesteps=timesteps, points=points,
                             temperature=how.get("temperature", 1.0))
        assert same(got, want), (timesteps, points, k, cosine(got, want))
    every_step = estimator_mean(model, traj, probability, k=0, temperature=how.get("temperature", 1.0))
    assert same(every_step, want)
    assert same(estimator_mean(model, traj, probability, k=1, per_step=True, temperature=how.get("temperature", 1.0)), want)


def test_scoring_only_the_revealed_tokens_of_low_confidence_is_biased():
    how = dict(C=3, m=3, block_length=3, unmasking="low_confidence")
    model = Toy(C=3, seed=1)
    want = true_gradient(model, **how)
    traj, everything = every_rollout(model, grid=6, **how)                  # exact probabilities of whole trajectories
    kept = traj.step_of.gather(1, traj.pos.clamp(min=0).flatten(1)).view(traj.pos.shape) == torch.arange(3)[:, None]
    revealed = traj._replace(pos=torch.where(kept, traj.pos, -1))           # score what was revealed, nothing else
    got = estimator_mean(model, revealed, everything, k=0)
    assert 0.2 < cosine(got, want) < 0.999
    # score_discarded=False records just these
    q, q_mask = prompt(50)
    torch.manual_seed(0)
    rolled = agrpo.rollout(model, q, q_mask, mask_id=MASK, eos_id=EOS, score_discarded=False, **how)
    assert rolled.pos.shape == (50, 3, 1)
    assert (rolled.step_of.gather(1, rolled.pos.flatten(1)) == torch.arange(3)).all()


def test_the_official_length_norm_is_another_objective():
    how = dict(C=4, m=4, block_length=2, grid=7)
    model = Toy(C=4, seed=1)
    want = true_gradient(model, C=4, m=4, block_length=2)
    traj, probability = every_rollout(model, **how)
    got = estimator_mean(model, traj, probability, k=0, length_norm="official")
    assert 0.2 < cosine(got, want) < 0.999
    # by hand: steps up to the last non-EOS token, averaged over them
    last = [max((int(s) for s, v in zip(step_of, o) if v != EOS and s < 4), default=-1)
            for step_of, o in zip(traj.step_of, traj.o)]
    assert agrpo.last_written_step(traj, EOS).tolist() == last
    r = torch.tensor([reward_of(o) for o in traj.o.tolist()], dtype=torch.float64)
    rows, steps = (torch.arange(4) <= torch.tensor(last)[:, None]).nonzero().unbind(dim=1)
    logp, _, _ = agrpo.step_logprobs(model, traj, rows, steps, mask_id=MASK)
    J = (logp.sum(dim=1) * (r * probability / (torch.tensor(last) + 1).clamp(min=1))[rows]).sum()
    by_hand = 4 * torch.cat([g.flatten() for g in torch.autograd.grad(J, [model.a, model.W])])
    assert same(got, by_hand)


def test_with_group_advantages_the_mean_is_g_minus_one_over_g_of_the_gradient():
    model = Toy(C=2, seed=2)
    how = dict(C=2, m=2, block_length=2)
    traj, probability = every_rollout(model, **how)
    r = torch.tensor([reward_of(o) for o in traj.o.tolist()], dtype=torch.float64)
    N = len(r)
    for G in (2, 3):
        groups = torch.cartesian_prod(*[torch.arange(N)] * G)               # every group of G rollouts there can be
        adv, _ = agrpo.group_advantages(r[groups].flatten(), G)
        weight = probability[groups].prod(dim=1)[:, None] * adv.view(-1, G) / G
        coefficient = torch.zeros(N, dtype=torch.float64).index_add(0, groups.flatten(), weight.flatten())
        model.zero_grad()
        agrpo.accumulate_gradient(model, traj, coefficient, k=0, rows_total=1, mask_id=MASK, eos_id=EOS, micro_batch=999)
        got = -2 * torch.cat([model.a.grad.flatten(), model.W.grad.flatten()])
        assert same(got, (G - 1) / G * true_gradient(model, **how))


def test_accumulation_in_any_micro_batch_is_one_big_batch():
    model, (q, q_mask) = Toy(C=4), prompt(12)
    torch.manual_seed(0)
    traj = agrpo.rollout(model, q, q_mask, C=4, m=4, block_length=4, mask_id=MASK, eos_id=EOS, top_k=2)
    adv, grads = torch.randn(12).double(), []
    for micro_batch in (1, 5, 7, 1000):
        model.zero_grad()
        seen = agrpo.accumulate_gradient(model, traj, adv, k=2, rows_total=12, mask_id=MASK, eos_id=EOS,
                                         micro_batch=micro_batch, rand=agrpo.row_random([(1, i) for i in range(12)]))
        grads.append(torch.cat([model.a.grad.flatten(), model.W.grad.flatten()]))
        assert len(seen) == math.ceil(sum(len(s[0]) for s in seen) / micro_batch)
    assert all(same(g, grads[-1], 1e-12) for g in grads)
    model.zero_grad()                                           # a mean over the rows of all batches: twice as many, half
    agrpo.accumulate_gradient(model, traj, adv, k=2, rows_total=24, mask_id=MASK, eos_id=EOS, micro_batch=1000,
                              rand=agrpo.row_random([(1, i) for i in range(12)]))
    assert same(2 * torch.cat([model.a.grad.flatten(), model.W.grad.flatten()]), grads[-1], 1e-12)


def test_a_second_pass_is_clipped_against_the_rollout_not_the_last_pass():
    """mu > 1: rho compares with the policy of the rollout, so pushing far enough stops the gradient of every token."""
    model, (q, q_mask) = Toy(C=2), prompt(16)
    torch.manual_seed(0)
    traj = agrpo.rollout(model, q, q_mask, C=2, m=2, block_length=2, mask_id=MASK, eos_id=EOS)
    traj = select(traj, [0] * 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(60):
        seen = agrpo.accumulate_gradient(model, traj, torch.ones(16), k=0, rows_total=16, mask_id=MASK, eos_id=EOS,
                                         micro_batch=1000)
        norm = agrpo.optimizer_step(list(model.parameters()), optimizer, 1e9)
    assert seen[0][0].min() > 1.2 and norm == 0


def test_a_gradient_that_is_not_finite_moves_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.tensor([1.0, math.nan])
    assert not math.isfinite(agrpo.optimizer_step([p], optimizer, 1.0)) and p.tolist() == [1.0, 1.0]
    p.grad = torch.tensor([3.0, 4.0])
    assert agrpo.optimizer_step([p], optimizer, 1.0) == pytest.approx(5.0) and (p < 1).all()


def test_learning_on_the_toy_raises_the_expected_reward():
    model = Toy(C=3, seed=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def expected():
        return sum((p * reward_of(o)).item() for p, o in enumerate_mdp(model, C=3, m=3, block_length=3))
    before = expected()
    for i in range(40):
        keys = [(i, row) for row in range(64)]
        traj = agrpo.rollout(model, *prompt(64), C=3, m=3, block_length=3, mask_id=MASK, eos_id=EOS, rand=agrpo.row_random(keys))
        adv, _ = agrpo.group_advantages(torch.tensor([reward_of(o) for o in traj.o.tolist()]).double(), 64)
        agrpo.accumulate_gradient(model, traj, adv, k=1, rows_total=64, mask_id=MASK, eos_id=EOS, micro_batch=1000,
                                  rand=agrpo.row_random([(*key, "t") for key in keys]))
        agrpo.optimizer_step(list(model.parameters()), optimizer, 1.0)
    best = max(reward_of(o) for o in itertools.product([EOS, A_, B_], repeat=3))
    assert expected() > before + 0.8 * (best - before)
