"""AGRPO's claims, executable, in the order of agrpo.py's sections: read them as worked examples.

The main witness is a toy model small enough to enumerate: three tokens and [MASK], in float64.
`enumerate_mdp` walks every trajectory (every choice of positions, every token) with plain code of
its own and differentiates the expected reward. `every_rollout` drives agrpo.rollout down every
trajectory by choosing its random numbers. The estimator's exact mean over all of them must be that
gradient, to nine digits.
"""
import itertools
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import agrpo
import tasks

MASK, EOS, A_, B_ = 0, 1, 2, 3                       # the toy vocabulary
P = 2                                                # its prompt length


class Toy(torch.nn.Module):
    """A bidirectional model of L positions and V tokens: logits[l] = W[l] tanh(sum_i a[i, x_i])."""
    mask_id, eos_id, dtype = MASK, EOS, torch.float64

    def __init__(self, C, V=4, width=6, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(P + C, V, width, generator=g, dtype=torch.float64)
        W = torch.randn(P + C, width, V, generator=g, dtype=torch.float64)
        self.a, self.W = torch.nn.Parameter(a), torch.nn.Parameter(0.2 * W)
        self.asked = []                              # (rows, positions a row) of each forward pass

    def every_logit(self, ids):
        h = torch.tanh(self.a[torch.arange(ids.shape[1]), ids].sum(dim=1))           # (N, width)
        return torch.einsum("nd,ldv->nlv", h, self.W)                                # (N, L, V)

    def forward(self, ids, mask, positions, block):
        self.asked.append(tuple(positions.shape))
        return self.every_logit(ids)[torch.arange(len(ids))[:, None], positions]

    def gradient(self):
        flat = torch.cat([self.a.grad.flatten(), self.W.grad.flatten()])
        self.zero_grad()
        return flat


def prompt(rows):
    return torch.tensor([[A_, B_]]).expand(rows, P), torch.ones(rows, P, dtype=torch.long)


def reward_of(o):
    """Different for (nearly) every text, and nothing a symmetry could cancel."""
    value = sum((i + 1.5) * math.sin(1.3 * token * (i + 1)) for i, token in enumerate(o))
    return value + (2.0 if o[0] == A_ else 0.0)


def rewards_of(traj):
    return torch.tensor([reward_of(o) for o in traj.o.tolist()], dtype=torch.float64)


def sample(model, rows, how, seed=0):
    torch.manual_seed(seed)
    return agrpo.rollout(model, *prompt(rows), how)


# ---- the independent enumeration --------------------------------------------------------------


def token_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """{token: probability} after temperature, top-k and top-p, written out; with gradient."""
    x = logits / temperature
    ids = sorted((i for i in range(len(x)) if i != MASK), key=lambda i: -x[i].item())
    ids = ids[:top_k] if top_k else ids
    p = torch.softmax(torch.stack([x[i] for i in ids]), dim=0)
    if top_p < 1:
        kept = 1 + sum(1 for j in range(1, len(ids)) if p[:j].sum().item() < top_p)
        ids, p = ids[:kept], p[:kept] / p[:kept].sum()
    return dict(zip(ids, p))


def enumerate_mdp(model, how):
    """Yield (probability with gradient, finished tokens) of every trajectory."""
    def walk(o, t, probability):
        if t == how.m:
            yield probability, o
            return
        start = t * (how.C // how.m) // how.block_length * how.block_length
        new_block = t * (how.C // how.m) == start
        if new_block and start and all(v == EOS for v in o[start - how.block_length:start]):
            yield probability, o[:start] + [EOS] * (how.C - start)
            return
        logits = model.every_logit(torch.tensor([[A_, B_] + o]))[0, P:]
        here = [i for i in range(start, start + how.block_length) if o[i] == MASK]
        for at in choices(logits, here):
            share = probability / len(choices(logits, here))
            dist = [token_probs(logits[i], how.temperature, how.top_k, how.top_p) for i in at]
            for drawn in itertools.product(*dist):
                p = math.prod((d[v] for d, v in zip(dist, drawn)), start=share)
                filled = dict(zip(at, drawn))
                yield from walk([filled.get(i, v) for i, v in enumerate(o)], t + 1, p)

    def choices(logits, here):
        """Every set of positions a step may reveal, all equally likely."""
        W = how.C // how.m
        if how.unmasking == "random":
            return list(itertools.combinations(here, W))
        p = {i: torch.stack(list(token_probs(logits[i]).values())).detach() for i in here}
        doubt = {i: -p[i].max() if how.unmasking == "max_prob" else -(p[i] * p[i].log()).sum()
                 for i in here}
        return [sorted(here, key=lambda i: doubt[i].item())[:W]]

    yield from walk([MASK] * how.C, 0, torch.ones((), dtype=torch.float64))


def true_gradient(model, how):
    """d/d theta of E[r], flattened; the probabilities sum to one."""
    J, total = 0.0, 0.0
    for p, o in enumerate_mdp(model, how):
        J, total = J + p * reward_of(o), total + p.item()
    assert abs(total - 1) < 1e-12
    return torch.cat([g.flatten() for g in torch.autograd.grad(J, [model.a, model.W])])


# ---- agrpo.rollout, driven down every trajectory ------------------------------------------------


def select(traj, rows):
    return traj._replace(**{name: x[rows] for name, x in traj._asdict().items()
                            if isinstance(x, torch.Tensor)})


def every_rollout(model, how, grid):
    """Each trajectory of agrpo.rollout once, with its probability: a grid over its random numbers."""
    random = how.unmasking == "random"
    orders = list(itertools.permutations(range(how.C))) if random else [range(how.C)]
    middles = (torch.arange(grid).double() + 0.5) / grid
    u = torch.cartesian_prod(*[middles] * how.C).view(-1, how.m, how.C // how.m)
    order = torch.tensor([list(o) for o in orders]).double().repeat_interleave(len(u), dim=0)
    script = iter([order, u.repeat(len(orders), 1, 1)])
    traj = agrpo.rollout(model, *prompt(len(order)), how, lambda *shape: next(script))
    _, which = torch.cat([traj.o, traj.step_of], dim=1).unique(dim=0, return_inverse=True)
    traj = select(traj, [which.tolist().index(i) for i in range(which.max() + 1)])
    # Tokens by their own log-probabilities; positions uniform among the subsets of what was left.
    probability = traj.logp_old.sum(dim=1).exp()
    steps_a_block = how.m * how.block_length // how.C
    for t in range(how.m if random else 0):
        left = how.block_length - t % steps_a_block * (how.C // how.m)
        took_it = (traj.step_of == t).any(dim=1)
        probability[took_it] /= math.comb(left, how.C // how.m)
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    return traj, probability


def all_pairs(traj):
    rows, steps = (agrpo.per_step(traj, torch.ones_like(traj.entropy)) > 0).nonzero().unbind(dim=1)
    return rows, steps, torch.ones(len(rows), dtype=torch.float64)


def estimator_mean(model, traj, weight, follow, k, **more):
    """Exact mean of agrpo's estimate of sum_row weight * sum_t grad log pi, over sampler offsets.

    The drawn steps are piecewise constant in a row's offset: u_j = (j + offset) / k meets an edge c
    of the CDF at offset (c k) mod 1. So the mean is a finite sum, each piece weighted by its length.
    """
    p = agrpo.timestep_probs(traj, follow)
    edges = (p.cumsum(dim=1) * k) % 1
    ends = torch.zeros(len(p), 1), torch.ones(len(p), 1)
    edges = torch.cat([ends[0], edges.clamp(0, 1).sort(dim=1).values, ends[1]], dim=1)
    for j in range(edges.shape[1] - 1):
        middle, length = edges[:, j:j + 2].mean(dim=1, keepdim=True), edges[:, j + 1] - edges[:, j]
        pairs = agrpo.sample_timesteps(p, k, middle)
        agrpo.add_gradient(model, traj, weight * length, pairs, micro_batch=1000, **more)
    return -len(p) * traj.how.m * model.gradient()              # undo the means and the loss's sign


def same(a, b, tolerance=1e-9):
    return ((a - b).norm() / b.norm()).item() < tolerance


# ================================================================================================
# § 1 The denoising MDP
# ================================================================================================


def test_steps_must_divide_and_the_refusal_names_what_would():
    assert agrpo.Decoding(384, 128, 12).W == 3 and agrpo.step_counts(12, 4) == [12, 6, 3]
    for shape, words in [((12, 5, 12), r"--m 5 .*\[12, 6, 4, 3, 2, 1\]"), ((12, 2, 4), r"--m 2 .*\[12, 6, 3\]"),
                         ((12, 4, 5), r"--block_length 5 does not divide --C 12"), ((12, 0, 12), "--m 0")]:
        with pytest.raises(ValueError, match=words):
            agrpo.Decoding(*shape)
    for wrong in (dict(unmasking="low_confidence"), dict(top_p=0.9), dict(temperature=-1.0), dict(top_p=0.0),
                  dict(temperature=math.nan)):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))} "):
            agrpo.Decoding(4, 4, 4, **wrong)


def test_a_state_holds_what_was_revealed_before_its_step():
    """The picture in § 1: C = 3, one token a step, revealed in the order 1, 0, 2."""
    how, seen = agrpo.Decoding(3, 3, 3), []
    traj = agrpo.Trajectory(*prompt(1), torch.tensor([[A_, B_, EOS]]), torch.tensor([[1, 0, 2]]),
                            *torch.zeros(2, 1, 3).double(), None, how)
    model = Toy(C=3)
    model.every_logit, plain = lambda ids: seen.append(ids[0, P:].tolist()) or plain(ids), model.every_logit
    for t, want in enumerate([[MASK, MASK, MASK], [MASK, B_, MASK], [A_, B_, MASK]]):
        agrpo.step_logprobs(model, traj, torch.tensor([0]), torch.tensor([t]))
        assert seen[-1] == want


def test_mask_and_ids_without_a_token_are_never_drawn():
    model = Toy(C=4, V=6)
    model.never_ids = {5}
    model.W.data[:, :, [MASK, 5]] += 10                         # the model would love to
    o = sample(model, 200, agrpo.Decoding(4, 2, 4)).o
    assert set(o.unique().tolist()) == {EOS, A_, B_, 4}


@pytest.mark.parametrize("how", [dict(temperature=0.0), dict(), dict(top_k=2)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_end_with_a_sentence_in_every_path(how, bad):
    model, logits = Toy(C=2), torch.tensor([0.0, 1.0, bad, 2.0])
    model.every_logit = lambda ids: logits.expand(*ids.shape, 4)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sample(model, 3, agrpo.Decoding(2, 2, 2, **how))


# ================================================================================================
# § 2 Rollout
# ================================================================================================


def test_inverse_cdf_never_leaves_the_support():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    u = torch.tensor([[0.0, 0.249, 0.25, 0.999, 1.0 - 2 ** -53, 1.0]], dtype=torch.float64)
    assert agrpo.inverse_cdf(p, u).tolist() == [[1, 1, 3, 3, 3, 3]]
    short = torch.full((1, 10), 0.0999)                         # ends at 0.999, asked for 1.0
    assert agrpo.inverse_cdf(short, torch.ones(1, 1))[0, 0] == 9


def test_tokens_are_drawn_in_proportion():
    logits = torch.tensor([2.0, 0.0, 1.0, -math.inf])
    u = ((torch.arange(10_000).double() + 0.5) / 10_000)[:, None]
    inf = math.inf
    for T, top_k, top_p, kept in [
            (1.0, 0, 1.0, [2.0, 0.0, 1.0, -inf]), (0.5, 0, 1.0, [4.0, 0.0, 2.0, -inf]),
            (1.0, 2, 1.0, [2.0, -inf, 1.0, -inf]), (1.0, 99, 1.0, [2.0, 0.0, 1.0, -inf]),
            (1.0, 4, 0.7, [2.0, -inf, 1.0, -inf]),              # 0.665 < 0.7: the next token crosses
            (1.0, 4, 0.6, [2.0, -inf, -inf, -inf]),
            (0.5, 4, 0.8, [4.0, -inf, -inf, -inf])]:            # 0.867 at T = 0.5, 0.665 at T = 1
        how, want = agrpo.Decoding(1, 1, 1, "random", T, top_k, top_p), torch.tensor(kept).softmax(0)
        many = logits.expand(10_000, 1, 4)
        tokens, support = agrpo.sample_tokens(many, u, how)
        share = torch.bincount(tokens[:, 0], minlength=4) / 10_000
        assert (share - want).abs().max() < 1e-3, how
        logp, H = agrpo.score(many, tokens, how, support)
        assert torch.allclose(logp, want[tokens].log(), atol=1e-6)
        assert torch.allclose(H, torch.special.entr(want).sum(), atol=1e-6)


def test_large_logits_at_low_temperature_do_not_overflow():
    how, logits = agrpo.Decoding(1, 1, 1, temperature=0.6), torch.tensor([200.0, 199.0, -50.0])
    u = ((torch.arange(2000).double() + 0.5) / 2000)[:, None]
    tokens, _ = agrpo.sample_tokens(logits.expand(2000, 1, 3), u, how)
    assert (tokens == 0).double().mean().item() == pytest.approx(1 / (1 + math.exp(-1 / 0.6)), abs=1e-3)


@pytest.mark.parametrize("unmasking", agrpo.UNMASKING)
def test_a_rollout_reveals_every_position_once_in_block_order(unmasking):
    model = Toy(C=6)
    model.eos_id = 99
    traj = sample(model, 50, agrpo.Decoding(6, 6, 3, unmasking))
    assert (traj.o != MASK).all() and (traj.step_of.sort(dim=1).values == torch.arange(6)).all()
    assert (traj.step_of[:, :3] < 3).all() and (traj.step_of[:, 3:] >= 3).all()
    assert set(model.asked) == ({(50, 1)} if unmasking == "random" else {(50, 3), (50, 2), (50, 1)})


def test_greedy_max_prob_is_low_confidence_decoding():
    """Draw the likeliest token everywhere, keep the most confident: LLaDA's evaluation, by hand."""
    model, o = Toy(C=6, seed=5), [MASK] * 6
    for _ in range(3):
        p = model.every_logit(torch.tensor([[A_, B_] + o]))[0, P:, 1:].softmax(-1)
        open_places = sorted((i for i in range(6) if o[i] == MASK), key=lambda i: -p[i].max().item())
        for i in open_places[:2]:
            o[i] = 1 + p[i].argmax().item()
    assert sample(model, 1, agrpo.Decoding(6, 3, 6, "max_prob", 0.0)).o[0].tolist() == o


def test_a_row_whose_block_is_all_filling_leaves_and_the_rest_is_eos():
    model = Toy(C=4, V=5)
    model.fill_ids = {EOS, 4}                                   # 4 is padding: it fills a text too
    traj = sample(model, 600, agrpo.Decoding(4, 4, 2))
    early = torch.isin(traj.o[:, :2], torch.tensor([EOS, 4])).all(dim=1)
    assert 0 < early.sum() < 600 and (traj.o[early][:, 0] == 4).any()
    assert (traj.o[early][:, 2:] == EOS).all() and (traj.step_of[early][:, 2:] == 4).all()
    assert (traj.step_of[~early] < 4).all() and (traj.logp_old[early][:, 2:] == 0).all()
    rows = [n for n, _ in model.asked]
    assert rows == [600, 600, 600 - early.sum(), 600 - early.sum()]     # and cost nothing


def test_a_row_does_not_depend_on_the_batch_it_is_in():
    model, how, keys = Toy(C=4), agrpo.Decoding(4, 2, 4), [(0, i) for i in range(10)]
    whole = agrpo.rollout(model, *prompt(10), how, agrpo.row_random(keys))
    parts = [agrpo.rollout(model, *prompt(5), how, agrpo.row_random(keys[i:i + 5])) for i in (0, 5)]
    assert torch.equal(whole.o, torch.cat([part.o for part in parts]))
    assert len(whole.o.unique(dim=0)) > 3


# ================================================================================================
# § 3 Advantages
# ================================================================================================


def test_advantages_by_hand():
    A = agrpo.group_advantages(torch.tensor([1.0, 2.0, 3.0, 6.0, 0.1, 0.1, 0.1, 0.1]), G=4)
    assert A.tolist() == [-2.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    A = agrpo.group_advantages(torch.tensor([0.0, 2.0]), G=2, divide_by_std=True)
    assert torch.allclose(A, torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + 1e-4))
    for G, r in itertools.product((3, 5, 6, 7), range(1, 40)):  # a mean of equal floats may differ
        assert (agrpo.group_advantages(torch.full((G,), r / 10, dtype=torch.float64), G) == 0).all()


def test_with_group_advantages_the_mean_is_g_minus_one_over_g_of_the_gradient():
    how, model = agrpo.Decoding(2, 2, 2), Toy(C=2, seed=2)
    traj, probability = every_rollout(model, how, grid=14)
    r, N = rewards_of(traj), len(traj.o)
    for G in (2, 3):
        groups = torch.cartesian_prod(*[torch.arange(N)] * G)   # every group of G rollouts there can be
        A = agrpo.group_advantages(r[groups].flatten(), G).view(-1, G)
        weight = probability[groups].prod(dim=1)[:, None] * A / G
        per_row = torch.zeros(N, dtype=torch.float64).index_add(0, groups.flatten(), weight.flatten())
        got = estimator_mean(model, traj, per_row, "uniform", k=2)
        assert same(got, (G - 1) / G * true_gradient(model, how))


# ================================================================================================
# § 4 Timesteps
# ================================================================================================


def made_up(step_of, logp_old, entropy, m):
    """A trajectory of which only the steps matter."""
    rows = len(step_of)
    return agrpo.Trajectory(*prompt(rows), *torch.full((1, rows, len(step_of[0])), A_), torch.tensor(step_of),
                            torch.tensor(logp_old).double(),
                            torch.tensor(entropy, dtype=torch.float64), None,
                            agrpo.Decoding(len(step_of[0]), m, len(step_of[0])))


def test_timestep_probabilities_by_hand():
    """m = 2 steps of two tokens; the second row ended after its first step."""
    half = math.log(0.5)
    traj = made_up([[0, 1, 1, 0], [0, 0, 2, 2]], [[half, 0, 0, half], [half, half, 0, 0]],
                   [[1.0, 3.0, 2.0, 0.0], [0.5, 0.5, 0, 0]], m=2)
    assert agrpo.timestep_probs(traj, "uniform").tolist() == [[0.5, 0.5], [1.0, 0.0]]
    # entropy sums 1 and 5, mixed with 10 % uniform
    assert agrpo.timestep_probs(traj, "entropy")[0].tolist() == pytest.approx([0.9 / 6 + 0.05, 4.5 / 6 + 0.05])
    # surprise: sqrt(0.5^2 + 0.5^2) and 0, so the floor alone is left for the second step
    assert agrpo.timestep_probs(traj, "surprise").tolist() == [pytest.approx([0.95, 0.05]), [1.0, 0.0]]
    uneven = made_up([[0, 0, 1, 1]], [[half, 0, math.log(0.9), math.log(0.8)]], [[0] * 4], m=2)
    first, second = 0.5, math.hypot(0.1, 0.2)                   # 1 - p of each token, then the norm
    assert agrpo.timestep_probs(uneven, "surprise")[0, 0].item() == pytest.approx(0.9 * first / (first + second) + 0.05)


def test_importances_too_small_to_divide_give_uniform_weights():
    for tiny in (0.0, 1e-320, 1e-305):
        traj = made_up([[0, 1, 2]], [[0.0] * 3], [[tiny, 0.0, tiny]], m=3)
        assert agrpo.timestep_probs(traj, "entropy")[0].tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_every_step_that_acted_has_mean_weight_one(k):
    p = torch.tensor([[0.05, 0.3, 0.05, 0.5, 0.05, 0.05], [0.2, 0.5, 0.3, 0, 0, 0]], dtype=torch.float64)
    n, total = 4000, torch.zeros(2, 6, dtype=torch.float64)
    for offset in (torch.arange(n).double() + 0.5) / n:
        rows, steps, w = agrpo.sample_timesteps(p, k, offset.expand(2, 1))
        assert len(set(zip(rows.tolist(), steps.tolist()))) == len(rows) <= 2 * k
        total[rows, steps] += w / n
    assert torch.allclose(total, (p > 0).double(), atol=5e-3)


def test_k_points_are_evenly_spaced_and_equal_draws_merged():
    p = torch.tensor([[0.9, 0.1], [0.0, 0.0]], dtype=torch.float64)
    rows, steps, w = agrpo.sample_timesteps(p, 4, torch.tensor([[0.7], [0.7]]))     # .175 .425 .675 .925
    assert rows.tolist() == [0, 0] and steps.tolist() == [0, 1]     # a row of zeros yields nothing
    assert w.tolist() == pytest.approx([3 / (4 * 0.9), 1 / (4 * 0.1)])
    # k = m, uniform: each step exactly once with weight 1, the sum over all steps
    rows, steps, w = agrpo.sample_timesteps(torch.full((1, 7), 1 / 7).double(), 7, torch.tensor([[0.3]]))
    assert steps.tolist() == list(range(7)) and w.tolist() == pytest.approx([1.0] * 7)
    assert agrpo.sample_timesteps(torch.full((1, 7), 1 / 7).double(), 1, torch.ones(1, 1))[1].tolist() == [6]


# ================================================================================================
# § 5 Loss
# ================================================================================================

HOWS = [dict(), dict(temperature=0.6), dict(top_k=2), dict(top_k=4, top_p=0.7, temperature=0.8),
        dict(top_k=99), dict(unmasking="entropy"), dict(unmasking="max_prob", top_k=2)]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_ratio_is_one_before_the_first_update(how):
    """What the rollout kept is what one forward per (row, step) gives again, on the same support."""
    model = Toy(C=4)
    traj = sample(model, 100, agrpo.Decoding(4, 2, 2, **how))
    rows, steps, _ = all_pairs(traj)
    for t in (0, 1):
        logp, logp_old = agrpo.step_logprobs(model, traj, rows[steps == t], steps[steps == t])
        assert torch.allclose(logp, logp_old, atol=1e-12) and (logp < 0).any()


def test_the_head_runs_on_the_scored_positions_only():
    model = Toy(C=4)
    traj = sample(model, 3, agrpo.Decoding(4, 2, 4))
    agrpo.step_logprobs(model, traj, torch.tensor([0, 2]), torch.tensor([1, 0]))
    assert model.asked == [(3, 2), (3, 2), (2, 2)]              # W = 2 positions of 3 rows, of 2 rows


def test_clip_by_hand():
    """eps = 0.2. A > 0: J = min(rho, 1.2) A; A < 0: J = max(rho, 0.8) A. No gradient where it binds."""
    table = [  # rho, A,  J,  dJ / dlogp
        (1.0, 2.0, 2.0, 2.0), (1.1, 2.0, 2.2, 2.2), (1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0),
        (1.0, -2.0, -2.0, -2.0), (0.9, -2.0, -1.8, -1.8), (0.5, -2.0, -1.6, 0.0), (1.5, -2.0, -3.0, -3.0),
        (1.5, 0.0, 0.0, 0.0)]
    for rho, A, J, slope in table:
        logp = torch.tensor([[math.log(rho) - 1.0]], dtype=torch.float64, requires_grad=True)
        objective, ratio = agrpo.clipped_objective(logp, torch.full((1, 1), -1.0), torch.tensor([[A]]))
        objective.sum().backward()
        assert (objective.item(), logp.grad.item(), ratio.item()) == pytest.approx((J, slope, rho))


def test_a_ratio_that_overflows_has_a_finite_gradient_where_the_clip_holds():
    logp = torch.tensor([[0.0, -1.0]], requires_grad=True)
    objective, ratio = agrpo.clipped_objective(logp, torch.tensor([[-200.0, -1.0]]), torch.ones(1, 1))
    objective.sum().backward()
    assert ratio.tolist() == [[math.inf, 1.0]] and logp.grad.tolist() == [[0.0, 1.0]]
    objective, _ = agrpo.clipped_objective(logp, torch.tensor([[-200.0, -1.0]]), torch.zeros(1, 1))
    assert objective.tolist() == [[0.0, 0.0]]


def test_the_kl_term_is_the_kl_and_has_its_gradient():
    """By hand: pi = 1/2, ref = 1/4 gives k3 = 1/2 + log 2 - 1. And E_pi of rho k3 over all tokens."""
    kl = agrpo.kl_to_reference(*torch.tensor([0.5, 0.5, 0.25]).log())
    assert kl.item() == pytest.approx(0.5 + math.log(2) - 1, abs=1e-6)
    g = torch.Generator().manual_seed(0)
    x, ref = torch.randn(2, 5, generator=g, dtype=torch.float64)
    logp, ref = x.requires_grad_().log_softmax(0), ref.log_softmax(0)
    want = (logp.exp() * (logp - ref)).sum()
    got = (logp.detach().exp() * agrpo.kl_to_reference(logp, logp.detach(), ref)).sum()
    assert got.item() == pytest.approx(want.item())
    gradients = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in (got, want)]
    assert torch.allclose(*gradients, atol=1e-12)


# ================================================================================================
# § 6 Update: the gradient is the policy gradient
# ================================================================================================

EXACT = {  # every setting documented as exact, and the grid that meets all of its trajectories
    "random": (agrpo.Decoding(3, 3, 3), 14),
    "several tokens a step": (agrpo.Decoding(4, 2, 4), 7),
    "blocks and early exit": (agrpo.Decoding(4, 4, 2), 7),
    "temperature": (agrpo.Decoding(3, 3, 3, temperature=0.7), 14),
    "top-k": (agrpo.Decoding(3, 3, 3, top_k=2), 14),
    "top-k above V, top-p": (agrpo.Decoding(3, 3, 3, temperature=0.8, top_k=50, top_p=0.8), 14),
    "entropy": (agrpo.Decoding(3, 3, 3, "entropy"), 14),
    "max_prob": (agrpo.Decoding(4, 2, 4, "max_prob"), 10),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_mean_of_the_estimator_is_the_policy_gradient(name):
    how, grid = EXACT[name]
    model = Toy(C=how.C, seed=1)
    want = true_gradient(model, how)
    traj, probability = every_rollout(model, how, grid)
    weight = rewards_of(traj) * probability
    for follow, k in [("uniform", 1), ("uniform", 2), ("entropy", 1), ("entropy", 2), ("surprise", 1), ("surprise", 2)]:
        assert same(estimator_mean(model, traj, weight, follow, k), want), (follow, k)
    assert same(estimator_mean(model, traj, weight, "surprise", 1, ratio_per="step"), want)
    agrpo.add_gradient(model, traj, weight, all_pairs(traj), micro_batch=7)      # every step, once
    assert same(-len(weight) * how.m * model.gradient(), want)


def test_dropping_late_eos_would_be_biased():
    """The check has teeth: each row's sum cut at its last token that is not EOS is another gradient."""
    how, model = agrpo.Decoding(4, 4, 2), Toy(C=4, seed=1)
    traj, probability = every_rollout(model, how, grid=7)
    rows, steps, w = all_pairs(traj)
    last = traj.step_of.masked_fill((traj.o == EOS) | (traj.step_of == 4), -1).amax(dim=1)
    agrpo.add_gradient(model, traj, rewards_of(traj) * probability, (rows, steps, w * (steps <= last[rows])))
    got, want = -len(traj.o) * 4 * model.gradient(), true_gradient(model, how)
    assert 0.2 < torch.cosine_similarity(got, want, dim=0) < 0.999


def test_dead_groups_cost_no_forward_and_change_nothing():
    model, how = Toy(C=4), agrpo.Decoding(4, 4, 4)
    traj, cfg = sample(model, 8, how), agrpo.Config(k=4, follow="uniform")
    A = agrpo.group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0] + [0.3] * 4).double(), G=4)
    model.asked.clear()
    agrpo.policy_gradient(model, traj, A, cfg, lambda *shape: torch.full(shape, 0.5).double())
    assert sum(rows for rows, _ in model.asked) == 16           # 4 rows x 4 steps
    with_dead = model.gradient()
    agrpo.policy_gradient(model, select(traj, range(4)), A[:4], cfg, lambda *shape: torch.full(shape, 0.5).double())
    assert same(model.gradient(), 2 * with_dead)                # they count in the mean over rows


def test_accumulation_in_any_micro_batch_is_one_big_batch():
    model, how = Toy(C=4), agrpo.Decoding(4, 4, 2, top_k=2)
    traj, A = sample(model, 12, how), torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
    pairs, grads = agrpo.sample_timesteps(agrpo.timestep_probs(traj), 3, torch.rand(12, 1)), []
    for micro_batch in (1, 5, 7, 1000):
        seen = agrpo.add_gradient(model, traj, A, pairs, micro_batch=micro_batch)
        grads.append(model.gradient())
        assert len(seen.ratio) == len(pairs[0]) and seen.forwards >= len(pairs[0]) / micro_batch
    assert all(same(g, grads[-1], 1e-12) for g in grads)
    assert agrpo.add_gradient(model, traj, A, [x[:0] for x in pairs]).forwards == 0


def test_with_beta_the_reference_is_asked_and_its_kl_is_subtracted():
    """J - beta KL, over every trajectory: the KL of each state's distribution, differentiated."""
    how, model, other = agrpo.Decoding(2, 2, 2), Toy(C=2, seed=1), Toy(C=2, seed=9)

    @contextmanager
    def reference():
        mine = [p.data for p in (model.a, model.W)]
        model.a.data, model.W.data = other.a.data, other.W.data
        yield
        model.a.data, model.W.data = mine
    model.reference = reference
    traj, probability = every_rollout(model, how, grid=14)
    rows, steps, w = all_pairs(traj)
    seen = agrpo.add_gradient(model, traj, 0 * probability, (rows, steps, w * probability[rows]), beta=0.3)
    got, want = model.gradient(), 0.0
    for row, t in zip(rows.tolist(), steps.tolist()):
        x = torch.where(traj.step_of[row] < t, traj.o[row], MASK)
        at = P + traj.step_of[row].tolist().index(t)
        pi, ref = (m.every_logit(torch.cat([prompt(1)[0][0], x])[None])[0, at, 1:].log_softmax(0)
                   for m in (model, other))
        want = want + 0.3 * probability[row] * (pi.exp() * (pi - ref.detach())).sum()
    gradients = torch.autograd.grad(want, [model.a, model.W])
    assert same(len(probability) * how.m * got, torch.cat([g.flatten() for g in gradients]))
    assert 0.3 * (seen.kl.sum(1) * probability[rows]).sum() == pytest.approx(want.item())   # and is logged


def test_a_ratio_per_step_is_the_product_of_its_tokens():
    model = Toy(C=4)
    traj = sample(model, 12, agrpo.Decoding(4, 2, 4))
    model.W.data += 0.1 * torch.randn(model.W.shape, generator=torch.Generator().manual_seed(0)).double()
    token, step = (agrpo.add_gradient(model, traj, torch.ones(12), all_pairs(traj), ratio_per=per)
                   for per in ("token", "step"))
    assert token.ratio.shape == (24, 2) and (token.ratio - 1).abs().max() > 0.01
    assert torch.allclose(step.ratio, token.ratio.prod(dim=1, keepdim=True))


def test_a_second_pass_is_clipped_against_the_rollout_not_the_last_pass():
    """Pushing one rollout far enough stops the gradient of every token: rho compares with pi_old."""
    model = Toy(C=2)
    traj = select(sample(model, 1, agrpo.Decoding(2, 2, 2)), [0] * 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(60):
        seen = agrpo.add_gradient(model, traj, torch.ones(16), all_pairs(traj))
        norm = agrpo.optimizer_step(list(model.parameters()), optimizer, 1e9)
    assert seen.ratio.min() > 1.2 and norm == 0


def test_a_gradient_that_is_not_finite_moves_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.tensor([1.0, math.nan])
    assert not math.isfinite(agrpo.optimizer_step([p], optimizer, 1.0)) and p.tolist() == [1.0, 1.0]
    p.grad = torch.tensor([3.0, 4.0])
    assert agrpo.optimizer_step([p], optimizer, 1.0) == pytest.approx(5.0) and (p < 1).all()


# ================================================================================================
# § 7 A transformers model as the policy
# ================================================================================================

CFG = agrpo.parse(["--device", "cpu"])               # the shipped tiny model, at its own settings


@pytest.fixture(scope="module")
def tiny():
    return agrpo.load_policy(CFG)


def test_a_policy_gives_the_models_own_logits_at_the_asked_positions(tiny):
    """Padding is hidden, whatever stands in it; the head runs on the asked positions alone."""
    q, q_mask = tiny.encode([[dict(role="user", content=text)] for text in ("Numbers: 1 2 3", "Target: 5")])
    assert q_mask.sum(dim=1).tolist() == sorted(q_mask.sum(dim=1).tolist(), reverse=True) and q_mask[1, 0] == 0
    at = torch.tensor([[q.shape[1] - 1, q.shape[1] - 3]] * 2)
    got = tiny(q, q_mask, at, None)
    alone = q[1, q_mask[1] > 0][None]
    head, tiny.positions = tiny.model.get_output_embeddings(), torch.arange(alone.shape[1])[None]
    every = tiny.model(input_ids=alone).logits                  # (1, L, V), the model asked directly
    assert got.shape == (2, 2, head.weight.shape[0])
    assert torch.allclose(got[1], every[0, [-1, -3]], atol=1e-4)
    junk = torch.where(q_mask == 0, 7, q)
    assert torch.allclose(tiny(junk, q_mask, at, None), got, atol=1e-4)
    tiny.ignores_mask = True                                    # a model that does not heed its mask
    assert torch.allclose(tiny(junk, q_mask, at, None), got, atol=1e-4)
    assert torch.allclose(tiny(junk.flip(0), q_mask.flip(0), at, None), got.flip(0), atol=1e-4)
    tiny.ignores_mask, tiny.shift = False, 1                    # Dream: position i is predicted at i - 1
    assert torch.allclose(tiny(q, q_mask, at + 1, None), got, atol=1e-4)
    tiny.shift = 0


def test_lora_trains_the_blocks_and_its_reference_is_the_base_model(tiny):
    q, q_mask = tiny.encode([[dict(role="user", content="Numbers: 1 2 3")]])
    at, trained = torch.tensor([[3, 4]]), [n for n, p in tiny.model.named_parameters() if p.requires_grad]
    assert all("lora_" in n and ".layers." in n for n in trained) and len(trained) == 2 * 16
    base = tiny(q, q_mask, at, None)
    weights = [p for n, p in tiny.model.named_parameters() if "lora_B" in n]
    for p in weights:
        p.data += 0.1
    with tiny.reference():
        assert torch.equal(tiny(q, q_mask, at, None), base)
    assert not torch.allclose(tiny(q, q_mask, at, None), base, atol=1e-2)
    for p in weights:
        p.data.zero_()


# ================================================================================================
# § 8 Train
# ================================================================================================


@pytest.fixture
def toy_task():
    """Prompts and texts of the toy: the reward compares the answer's first token with the example."""
    def grade(text, example):
        right = text.split()[0] == str(example["want"])
        return tasks.Grade(3.0 * right + 0.01 * len(set(text)), right, 0.0, "", text, {})
    prompt_of = lambda example: [dict(role="user", content="")]
    tasks.TASKS["toy"] = tasks.Task("toy", prompt_of, grade)
    yield [dict(want=A_), dict(want=B_), dict(want=EOS)]
    del tasks.TASKS["toy"]


def toy_policy(C):
    policy = Toy(C)
    words = lambda o: [" ".join(map(str, row)) for row in torch.as_tensor(o).tolist()]
    policy.tokenizer = SimpleNamespace(batch_decode=words, decode=lambda o, **more: str(o))
    policy.encode, policy.decode, policy.fill_ids = lambda chats: prompt(len(chats)), words, {EOS}
    return policy


TOY = agrpo.Config(task="toy", C=4, m=2, block_length=4, questions=6, G=4, k=1, updates=2, rollout_batch=5)


def watched(data, cfg):
    """What agrpo.train hands to the gradient: (traj, A, the timesteps' offsets) of each pass."""
    policy, seen = toy_policy(cfg.C), []

    def gradient(policy, traj, A, cfg, rand):
        seen.append((traj, A, rand(len(A), 1)))
        return agrpo.add_gradient(policy, traj, A, all_pairs(traj))
    params = list(policy.parameters())
    log = list(agrpo.train(policy, data, cfg, params, torch.optim.SGD(params, lr=0.0), gradient=gradient))
    return seen, log


def test_every_row_has_draws_of_its_own(toy_task):
    """Copies, places of one update that hold the same problem, updates and passes: none share any."""
    seen, _ = watched(toy_task, replace(TOY, mu=2))             # 6 places, 3 problems: each stands twice
    offsets = torch.cat([offset for *_, offset in seen]).flatten()
    assert len(offsets.unique()) == len(offsets) == 2 * 2 * 24
    orders = {tuple(row) for traj, *_ in seen[::2] for row in torch.cat([traj.logp_old, traj.o], 1).tolist()}
    assert len(orders) > 30                                     # of 48 rows; a few may coincide


def test_advantages_belong_to_their_rows(toy_task):
    """Rollouts come in batches of five rows; each row's advantage is still its own group's."""
    (traj, A, _), *_ = watched(toy_task, TOY)[0]
    order = list(agrpo.questions(3, 6, 0, 0))
    for group in range(6):
        rows = range(4 * group, 4 * group + 4)
        texts = [" ".join(map(str, traj.o[i].tolist())) for i in rows]
        r = [tasks.grade("toy", text, toy_task[order[group]]).reward for text in texts]
        assert [A[i].item() for i in rows] == pytest.approx([x - sum(r) / 4 for x in r])


def test_processes_share_the_questions_and_draw_what_one_would(toy_task, monkeypatch):
    whole = watched(toy_task, TOY)[0][0][0].o.view(6, 4, -1)
    for index in (0, 1):
        monkeypatch.setattr(agrpo, "processes", lambda: (index, 2))
        monkeypatch.setattr(agrpo, "gather", lambda value: [value])
        assert torch.equal(watched(toy_task, TOY)[0][0][0].o.view(3, 4, -1), whole[index::2])


def test_learning_on_the_toy_raises_the_expected_reward(toy_task):
    cfg = replace(TOY, updates=40, lr=0.05, questions=12, G=8, rollout_batch=512)
    policy = toy_policy(cfg.C)
    params = list(policy.parameters())
    data = [dict(want=A_)]
    before = agrpo.evaluate(policy, data * 300, cfg, cfg.how, 300)
    log = list(agrpo.train(policy, data, cfg, params, torch.optim.Adam(params)))
    after = agrpo.evaluate(policy, data * 300, cfg, cfg.how, 300)
    assert before < 0.6 and after > 0.95 and log[-1]["reward"] > log[0]["reward"]
    assert log[5]["lr"] == agrpo.learning_rate(cfg, 5) and log[0]["ratio_min"] == log[0]["ratio_max"] == 1


def test_the_numbers_of_the_log_by_hand():
    """Two groups of two, the second dead; one row ended early; of four ratios two are clipped."""
    traj = made_up([[0, 1], [0, 1], [0, 1], [0, 2]], [[0.0, 0.0]] * 4, [[1.0, 2.0]] * 4, m=2)
    traj.o[:2, 1] = EOS
    grades = [tasks.Grade(r, r > 2, 0.5, "", "", {}) for r in (4.0, 1.0, 1.0, 1.0)]
    A = torch.tensor([1.5, -1.5, 0.0, 0.0])
    ratio, of_pair = torch.tensor([[0.5], [1.5], [0.5], [1.0]]), torch.tensor([[1.5], [1.5], [-1.5], [-1.5]])
    seen = agrpo.Seen(ratio, of_pair, torch.full((4, 1), 0.25), 3)
    found = agrpo.statistics(SimpleNamespace(fill_ids={EOS}), traj, grades, A, seen, agrpo.Config(m=2, G=2))
    assert found == dict(
        reward=7 / 4, correct=1 / 4, format=0.5, dead_groups=0.5, length=6 / 4, entropy=10 / 7, late_eos=2 / 3,
        kl=0.25, clip_low=1 / 4, clip_high=1 / 4, ratio_min=0.5, ratio_max=1.5, pairs=4, forwards=3)


def test_evaluation_is_greedy_max_prob_and_as_the_rollouts_sample():
    first, *greedy = CFG.cells()
    assert first == CFG.how and [how.m for how in greedy] == [12, 6, 4, 3, 2, 1]
    assert {(how.temperature, how.unmasking) for how in greedy} == {(0.0, "max_prob")}


def test_rows_in_the_same_state_share_one_forward_pass(tiny, monkeypatch):
    """Same logits and gradient as one by one; the model sees each state once."""
    q, q_mask = tiny.encode([[dict(role="user", content=f"Numbers: {n} 2 3")] for n in (1, 4)])
    ids, mask = q[[0, 1, 0, 0]], q_mask[[0, 1, 0, 0]]
    at = torch.tensor([[0, 3], [2, 1], [4, 3], [0, 3]])
    weights = [p for p in tiny.model.parameters() if p.requires_grad]

    def logits_and_gradient(*batches):
        parts = [tiny(*(x[batch] for x in (ids, mask, at))) for batch in batches]
        (torch.cat(parts).square() * torch.arange(1, 5)[:, None, None]).mean().backward()
        grads = torch.cat([p.grad.flatten() for p in weights])
        for p in weights:
            p.grad = None
        return torch.cat(parts), grads

    seen, forward = [], tiny.model.forward
    monkeypatch.setattr(tiny.model, "forward", lambda **kw: seen.append(len(kw["input_ids"])) or forward(**kw))
    together, one_by_one = logits_and_gradient(slice(4)), logits_and_gradient([0], [1], [2], [3])
    assert seen == [2, 1, 1, 1, 1]
    for x, y in zip(together, one_by_one):
        assert torch.allclose(x, y, atol=1e-5)


def test_every_epoch_asks_every_question_once_in_a_new_order():
    first, second = (list(agrpo.questions(7, 7, epoch, 0)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert list(agrpo.questions(7, 5, 0, 0)) + list(agrpo.questions(7, 5, 1, 0))[:2] == first


def test_warm_up_then_cosine():
    cfg = agrpo.Config(updates=200, mu=2, lr=1.0)
    rates = [agrpo.learning_rate(cfg, step) for step in range(400)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[202] == pytest.approx(0.5, abs=0.01)
    assert 0 < rates[-1] < 1e-3 and all(a >= b for a, b in zip(rates[3:], rates[4:]))
