"""The laboratory: each estimator is what its recipe says, by hand or by enumeration on a toy;
each experiment runs from its flags to its files.

The toy has three tokens and [MASK], C = 3, in float64, so that every trajectory of random
unmasking can be written down: all texts times all orders.
"""
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import cartesian_prod, ones, tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo
import estimators
import experiments
import figures
import run
from tasks import TaskError

MASK, EOS, A_, B_ = 0, 1, 2, 3
C, P, V = 3, 2, 4
TEXTS = cartesian_prod(*[tensor([EOS, A_, B_])] * C)                            # (27, C)
ORDERS = {3: tensor(list(itertools.permutations(range(3)))),                    # m -> step_of
          1: torch.zeros(1, C, dtype=torch.long)}


class Any_:
    """A bidirectional model whose conditionals belong to no joint distribution."""
    mask_id, eos_id = MASK, EOS

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.a = torch.randn(P + C, V, 6, generator=draw, dtype=torch.float64).requires_grad_()
        self.b = torch.randn(P + C, 6, V, generator=draw, dtype=torch.float64).requires_grad_()
        self.params, self.rows = [self.a, self.b], 0
        self.model = SimpleNamespace(parameters=lambda: self.params)

    def __call__(self, ids, mask, positions, block):
        self.rows += len(ids)
        each = self.a[torch.arange(ids.shape[1]), ids]                          # (N, L, 6)
        hidden = torch.tanh(torch.einsum("nld,nl->nd", each, mask.double()))
        every = torch.einsum("nd,ldv->nlv", hidden, self.b)
        return every[torch.arange(len(ids))[:, None], positions]


class Causal(Any_):
    """Sees nothing behind the block that is being written."""

    def __call__(self, ids, mask, positions, block):
        seen = mask * (torch.arange(ids.shape[1]) < block.end)
        return super().__call__(ids, seen, positions, block)


class Joint(Any_):
    """The conditionals of one joint distribution over texts: they agree whatever the order."""

    def __init__(self):
        draw = torch.Generator().manual_seed(1)
        self.theta = torch.randn(len(TEXTS), generator=draw, dtype=torch.float64)
        self.params = [self.theta.requires_grad_()]

    def __call__(self, ids, mask, positions, block):
        x = ids[:, None, P:]
        possible = ((x == MASK) | (x == TEXTS)).all(dim=2)                      # (N, 27)
        joint = torch.where(possible, self.theta, -1e4)
        named = TEXTS.T[:, None] == torch.arange(V)[None, :, None]              # (C, V, 27)
        every = torch.where(named, joint[:, None, None], -1e4).logsumexp(dim=3)  # (N, C, V)
        return every[torch.arange(len(ids))[:, None], positions - P]


def reward(o):
    return sum((i + 1.5) * math.sin(1.3 * x * (i + 1)) for i, x in enumerate(o.tolist()))


def every_trajectory(policy, m):
    """All trajectories of random unmasking, A = reward x probability x rows, and the gradient
    of the expected reward over m, by differentiating the enumeration."""
    o, step_of = TEXTS.repeat(len(ORDERS[m]), 1), ORDERS[m].repeat_interleave(len(TEXTS), 0)
    B, q = len(o), tensor([[A_, B_]]).expand(len(o), P)
    logp = torch.zeros(B, C, dtype=torch.float64)
    how = agrpo.Decoding(C=C, m=m, block_length=C)
    traj = agrpo.Trajectory(q, torch.ones_like(q), o, step_of, logp, logp, None, how)
    for t in range(m):
        found, _ = agrpo.step_logprobs(policy, traj, torch.arange(B), torch.full((B,), t))
        where = (step_of == t).nonzero()[:, 1].view(B, -1)
        logp = logp.scatter(1, where, found)
    probability = logp.sum(dim=1).exp() / len(ORDERS[m])
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    rewards = tensor([reward(x) for x in o]).double()
    grads = torch.autograd.grad((probability * rewards).sum(), policy.params)
    traj = traj._replace(logp_old=logp.detach(), entropy=1 - logp.detach())
    return traj, rewards * probability.detach() * B, torch.cat([g.flatten() for g in grads]) / m


@pytest.fixture
def toy():
    """policy, traj, A, the gradient wanted"""
    policy = Any_()
    return policy, *every_trajectory(policy, 3)


def some_of(traj, rows):
    return agrpo.Trajectory(*(None if x is None else x[rows] for x in traj[:-1]), traj.how)


def gradient(policy, estimate):
    """What `estimate` adds to .grad, with the sign of J."""
    for p in policy.params:
        p.grad = None
    estimate()
    return -torch.cat([p.grad.flatten() for p in policy.params])


def config(**more):
    fields = dict(k=2, G=3, eps=0.2, micro_batch=50, follow="surprise", beta=0.0, mu=1,
                  ratio_per="token")
    return SimpleNamespace(**{**fields, **more})


def close(a, b, tolerance=1e-9):
    return ((a - b).norm() / b.norm()).item() < tolerance


def found_by(name, policy, traj, A, cfg, rand=agrpo.uniforms):
    return gradient(policy, lambda: estimators.ESTIMATORS[name](policy, traj, A, cfg, rand))


def by_states(policy, traj, states):
    return gradient(policy, lambda: estimators.score_states(policy, traj, config(), states))


def written(policy, o, step_of, **more):
    """A trajectory that `policy` wrote: its log pi are those of the states."""
    traj = one_row(o, step_of, prompt=[A_, B_], **more)
    for t in set(step_of) - {traj.how.m}:
        rows = torch.arange(len(traj.o))
        found, _ = agrpo.step_logprobs(policy, traj, rows, torch.full_like(rows, t))
        where = (traj.step_of == t).nonzero()[:, 1].view(len(rows), -1)
        traj = traj._replace(logp_old=traj.logp_old.scatter(1, where, found.detach()))
    return traj


def by_recipe(recipe, policy, traj, A, cfg, rand=agrpo.uniforms, **options):
    return by_states(policy, traj, recipe(policy, traj, A, cfg, rand, **options))


def drawing(*values):
    """A `rand` that draws these, one a call, expanded to the shape asked for."""
    draws = iter(values)
    return lambda *shape: torch.as_tensor(next(draws)).double().expand(shape)


# --- On the states of the rollout -------------------------------------------------------------

def test_every_step_once_is_the_exact_gradient_however_it_is_written(toy):
    *batch, want = toy
    certain = dict(sure=2.0, eos="all")                         # no later token is sure enough
    everyone = config(k=3, follow="uniform")                # k = m points hit each step once
    for found in (found_by("every step", *batch, config()),
                  found_by("EGSPO", *batch, config(k=3)), found_by("AGRPO", *batch, everyone),
                  by_recipe(estimators.step_merge, *batch, config(), N=3),
                  by_recipe(estimators.rldf, *batch, config(k=3), **certain)):
        assert close(found, want)


def test_merged_steps_and_the_official_length_norm_are_biased(toy):
    *batch, want = toy
    one, two = (by_recipe(estimators.step_merge, *batch, config(), N=N) for N in (1, 2))
    assert not close(one, want, 0.1) and not close(two, want, 0.01)
    # One segment is the one-step likelihood without prompt masking.
    assert close(one, by_recipe(estimators.one_step, *batch, config(), p_mask=0, eos="all"))
    # So many points that only bias is left.
    found = {name: found_by(name, *batch, config(k=500)) for name in ("AGRPO", "official")}
    cosine = {name: torch.cosine_similarity(g, want, dim=0) for name, g in found.items()}
    assert cosine["official"] < 0.997 and cosine["AGRPO"] > 0.9999


def test_the_official_way_takes_the_mean_up_to_the_last_text_and_follows_the_entropy():
    """Of A EOS EOS, written from left to right, step 0 alone counts, and as much as three. Of
    three words the one that alone had a choice is drawn, however surprising the others were."""
    policy, A = Any_(), ones(1).double()
    for o, entropy, k, weight in (([A_, EOS, EOS], 1.0, 3, 3.0),
                                  ([A_, B_, B_], [1.0, 0, 0], 1, 1.0)):
        traj = written(policy, o, [0, 1, 2], entropy=entropy)
        first = traj.step_of[:, None] == 0
        want = by_states(policy, traj, estimators.States(first >= 0, first * weight, A))
        assert close(found_by("official", policy, traj, A, config(k=k)), want, 1e-6)


def test_scored_at_one_is_agrpo_where_the_temperature_is_one(toy):
    policy, traj, A, _ = toy
    cold = traj._replace(how=replace(traj.how, temperature=0.6))

    def found(name, traj):
        same = agrpo.row_random([(i,) for i in range(len(A))])
        return found_by(name, policy, traj, A, config(), same)
    assert close(found("scored at T = 1", traj), found("AGRPO", traj))
    assert close(found("scored at T = 1", cold), found("AGRPO", traj))


def test_each_block_is_scored_as_it_was_written():
    """By a policy that sees nothing behind its block, in three blocks: a token has one forward,
    of its own block; as a plain policy would score it, it is another gradient."""
    policy, A = Causal(), tensor([1.0, -0.5], dtype=torch.float64)
    traj = written(policy, [A_, B_, EOS], [0, 1, 2], copies=2, block=1)
    want = found_by("every step", policy, traj, A, config())
    whole = traj._replace(how=replace(traj.how, block_length=C))
    assert not close(found_by("every step", policy, whole, A, config()), want, 0.1)
    for found in (by_recipe(estimators.step_merge, policy, traj, A, config(), N=3),
                  found_by("scored at T = 1", policy, traj, A, config(k=3, follow="uniform"))):
        assert close(found, want)
    # All masked and in one state, and still a forward a block: each sees its block alone.
    everything = ones(2, 1, C).double()
    policy.rows = 0
    found = by_states(policy, traj, estimators.States(everything > 0, everything, A))
    assert policy.rows == 2 * 3
    alone = [everything * (torch.arange(C) == c) for c in range(C)]
    parts = [by_states(policy, traj, estimators.States(everything > 0, w, A)) for w in alone]
    assert close(found, sum(parts))


@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_what_an_estimator_does_not_do_is_refused(name):
    """A KL, a second pass, a truncated support; k between two numbers where each row has k."""
    policy, A = Any_(), tensor([1.0, -0.5, -0.5], dtype=torch.float64)
    traj = written(policy, [A_, B_, EOS], [0, 1, 2], copies=3)
    support = tensor([EOS, A_, B_]).int().expand(3, C, 3)
    policy.reference = torch.no_grad                            # a context: of itself
    refuses = name in estimators.RECIPES or name == "scored at T = 1"
    for cfg, at in ((dict(beta=0.1), traj), (dict(mu=2), traj),
                    ({}, traj._replace(support=support))):
        if refuses:
            with pytest.raises(TaskError, match="--(beta 0.1|mu 2|top_k 0)"):
                found_by(name, policy, at, A, config(**cfg))
        else:                          # and with a KL a row of A = 0 counts too
            seen = estimators.ESTIMATORS[name](policy, at, 0 * A, config(**cfg), agrpo.uniforms)
            assert (len(seen.ratio) > 0) == ("beta" in cfg)
    if name in ("by row", "official", "step-merge", "TraceRL", "EGSPO", "RLDF", "ELBO"):
        with pytest.raises(TaskError, match="--k 0.5: .* whole number"):
            found_by(name, policy, traj, A, config(k=0.5))
    else:
        found_by(name, policy, traj, A, config(k=0.5))


def test_of_a_row_with_fewer_steps_than_k_each_counts_once():
    """The third token was never drawn; and as many points as steps hit each of them."""
    policy, A = Any_(), ones(1).double()
    traj = written(policy, [A_, B_, EOS], [0, 1, 3])
    want = found_by("every step", policy, traj, A, config())
    assert close(found_by("EGSPO", policy, traj, A, config(k=3)), want)
    assert close(found_by("by row", policy, traj, A, config(k=2, follow="uniform")), want)
    surest = by_recipe(estimators.rldf, policy, traj, A, config(k=3), sure=2.0, eos="all")
    assert close(surest, want)
    later = estimators.rldf(policy, traj, A, config(k=3), agrpo.uniforms, sure=0.0, eos="all")
    later = later.weigh(torch.zeros(1, 3, C).double(), tensor([0]))[0]
    assert sorted(later.sum(dim=1).tolist()) == [0, 1, 2] and not later[:, 2].any()


# --- Likelihoods of the finished text ---------------------------------------------------------

def mean_over_masks(name, policy, traj, A, sizes):
    """Over each number of masked tokens, in the middle of its stretch, and each ranking."""
    masks = list(itertools.product(range(sizes), itertools.permutations(range(C))))
    return sum(found_by(name, policy, traj, A, config(k=1),
                   drawing((l + 1e-6) / sizes, tensor(rank).double() / C))
               for l, rank in masks) / len(masks)


def test_elbo_is_exact_at_one_token_a_step_if_the_conditionals_agree():
    """It averages the steps' scores over all orders; the exact gradient takes the orders that
    the text came in. For conditionals of one joint distribution these are the same."""
    for policy, m, exact in ((Joint(), 3, True), (Any_(), 3, False), (Joint(), 1, False)):
        *batch, want = every_trajectory(policy, m)
        assert close(mean_over_masks("ELBO", policy, *batch, C), want) == exact


def test_espo_has_the_mean_of_the_elbo(toy):
    *batch, _ = toy
    assert close(mean_over_masks("ESPO", *batch, C + 1), mean_over_masks("ELBO", *batch, C))


@pytest.mark.parametrize("name, total", [
    ("one-step", 1), ("wd1", 1), ("coupled", 1), ("ELBO", 1), ("ESPO", 1), ("GDSD", 0.5),
    ("SPG", 1), ("step-merge", 1), ("GDPO", 0.87)])
def test_what_a_token_weighs_on_average(name, total):
    """Of 12 tokens without EOS each counts 1, whatever the masks; GDPO's floor loses 13 %."""
    torch.manual_seed(0)
    traj = one_row([A_] * 12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], m=4, copies=3000, block=6)
    batches = 20 if name == "coupled" else 1                # it draws one t for a whole batch
    found = [estimators.RECIPES[name](Any_, traj, ones(3000).double(), config(), agrpo.uniforms)
             for _ in range(batches)]
    w = sum(states.w.sum(dim=1).mean(dim=0) for states in found) / len(found)
    assert torch.allclose(w, torch.full((12,), total).double(), atol=0.08)
    assert all((states.w.gt(0) <= states.hidden).all() for states in found)  # only masked ones


def test_the_score_is_the_sum_of_weighted_log_probabilities_token_by_token():
    """In one step of three tokens, after a padded prompt; with weights that the model gives."""
    policy = Any_()
    traj, *_ = every_trajectory(policy, 1)
    traj = some_of(traj, [3, 10, 17, 20])
    traj = traj._replace(q_mask=tensor([[0, 1], [1, 1], [0, 1], [1, 1]]))
    A = tensor([1.0, 0.0, -0.5, 2.0], dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.rand(4, 2, C, generator=draw) < 0.6
    w = hidden * torch.rand(4, 2, C, generator=draw).double()
    weigh = lambda logp, rows: w[rows] * logp.exp()
    policy.rows = 0
    found = by_states(policy, traj, estimators.States(hidden, w, A))
    assert policy.rows == 3 * 2                                 # the row of A = 0 costs nothing
    weighed = by_states(policy, traj, estimators.States(hidden, w, A, weigh))

    def by_hand(share):
        for b, k, c in itertools.product(range(4), range(2), range(C)):
            x = [MASK if hidden[b, k, i] else int(traj.o[b, i]) for i in range(C)]
            ids, mask = tensor([[A_, B_, *x]]), tensor([[*traj.q_mask[b], *[1] * C]])
            possible = policy(ids, mask, tensor([[P + c]]), None)[0, 0, 1:]     # no [MASK]
            logp = possible.log_softmax(0)[int(traj.o[b, c]) - 1]
            (-w[b, k, c] * share(logp.detach()) * A[b] * logp / (1 * 4)).backward()     # m B
    assert close(found, gradient(policy, lambda: by_hand(lambda logp: 1)))
    assert close(weighed, gradient(policy, lambda: by_hand(torch.exp)))


def one_row(o, step_of, logp=-1.0, entropy=1.0, m=3, copies=1, block=None, prompt=(A_,)):
    """A trajectory of rows alike."""
    def rows(values, kind):
        return torch.as_tensor(values, dtype=kind).expand(copies, -1)
    q = rows(prompt, torch.long)
    how = agrpo.Decoding(C=len(o), m=m, block_length=block or len(o))
    logp, entropy = (rows([x] * len(o) if isinstance(x, float) else x, torch.float64)
                     for x in (logp, entropy))
    return agrpo.Trajectory(q, torch.ones_like(q), rows(o, torch.long),
                            rows(step_of, torch.long), logp, entropy, None, how)


# What `hidden` and the weights must be, for logp where they depend on it.
# EGSPO: step 2 (the first token) and step 1 (the last), each with weight n / k = 3/2. By the
# mean of a step's tokens, not by their sum.
# RLDF: step 1 is drawn for sure, m / k = 3: its own token, and the later one if p >= 0.6.
# SPG: l = 2 of four places in the first draw, 4 in the second, from left to right. Lower bound
# L / (l K). Upper: p^1.5 / tau of token 0 is 1/8 / (1/2) in draw 0 and 1/8 in draw 1, of token
# 1 it is 2 and 1/8; L / |S| = 1. Written in two blocks, and l = 1 of the first: the other
# stays masked. And where 3 of L = 4 are scored, 2 in the first draw.
# coupled: t is 0.8 at most, so 0.9 is not below it; 1/2 / 1.5 and 1/2 / 0.2 / 1.5.
# TraceRL: of its two segments one has two tokens, the other one, which counts twice.
SURE = dict(o=[A_] * 3, step_of=[2, 0, 1], logp=[-0.1, -0.1, -30.0], entropy=[0.9, 0.1, 0.1])
HALF = dict(o=[A_] * 4, step_of=[0, 0, 1, 1], m=2)
IN_ORDER = [0.0, 0.25, 0.5, 0.75]
P_SPG = [[0.25, 1, 1, 1], [0.25, 0.25, 0.25, 1]]
LOWER = tensor([[1, 1, 0, 0], [0.5] * 4]).double()
SHARE = tensor([[2 / 3, 16 / 17, 0, 0], [1 / 3, 1 / 17, 1, 1]], dtype=torch.float64)
THREE = tensor([[1, 1, 0, 0], [2 / 3] * 3 + [0]], dtype=torch.float64)
SHARE3 = tensor([[3 / 5, 3 / 5, 0, 0], [2 / 5, 2 / 5, 1, 0]], dtype=torch.float64)


@pytest.mark.parametrize("name, row, k, A, draws, p, hidden, w", [
    ("EGSPO", dict(o=[A_] * 3, step_of=[2, 0, 1], entropy=[0.3, 0.1, 0.9]), 2, 1, [], None,
     [[1, 0, 1], [1, 0, 0]], [[0, 0, 1.5], [1.5, 0, 0]]),
    ("EGSPO", dict(o=[A_] * 3, step_of=[0, 0, 1], entropy=[0.3, 0.3, 0.5]), 1, 1, [], None,
     [[0, 0, 1]], [[0, 0, 2]]),
    ("TraceRL", dict(o=[A_] * 3, step_of=[0, 1, 2]), 2, 1, [], None,
     [[1, 1, 1], [0, 1, 1]], [[2, 0, 0], [0, 1, 1]]),
    ("coupled", dict(o=[A_] * 2, step_of=[0, 1], m=2), 2, 1, [1.0, 0.9], None,
     [[1, 1], [0, 0], [1, 1]], [[1 / 3, 1 / 3], [0, 0], [5 / 3, 5 / 3]]),
    ("RLDF", SURE, 1, 1, [0.5], [[0.7, 0.9, 0.2]], [[1, 0, 1]], [[3, 0, 3]]),
    ("RLDF", SURE, 1, 1, [0.5], [[0.5, 0.9, 0.2]], [[1, 0, 1]], [[0, 0, 3]]),
    ("SPG", HALF, 2, 1, [0, [0.3, 0.9], IN_ORDER], P_SPG, [[1, 1, 0, 0], [1] * 4], LOWER),
    ("SPG", HALF, 2, -1, [0, [0.3, 0.9], IN_ORDER], P_SPG, [[1, 1, 0, 0], [1] * 4],
     (LOWER + SHARE) / 2),
    ("SPG", HALF, 2, -1, [0, [0.3, 0.6], IN_ORDER], [[1] * 4] * 2, [[1, 1, 0, 0], [1, 1, 1, 0]],
     (THREE + 4 / 3 * SHARE3) / 2),
    ("SPG", dict(HALF, block=2), 2, 1, [0, 0, IN_ORDER], [[1] * 4] * 2, [[1, 0, 1, 1]] * 2,
     [[2, 0, 0, 0]] * 2)])
def test_a_recipe_by_hand(name, row, k, A, draws, p, hidden, w):
    states = estimators.RECIPES[name](Any_, one_row(**row), tensor([A]).double(),
                                      config(k=k, G=2 if name == "coupled" else 1),
                                      drawing(*draws))
    found = states.w
    if states.weigh:
        found = states.weigh(tensor(p).double().log()[None], tensor([0]))
    assert states.hidden[0].int().tolist() == hidden
    want = torch.tensor(w, dtype=torch.float64) if isinstance(w, list) else w
    assert torch.allclose(found[0], want, rtol=0, atol=1e-12)


def test_wd1_and_tracerl_change_the_advantages():
    def changed(name, A):
        A, traj = tensor(A).double(), one_row([A_] * 3, [0, 1, 2], copies=len(A))
        states = estimators.RECIPES[name](Any_, traj, A, config(G=len(A)), agrpo.uniforms)
        return states.A.tolist()
    most, std = 1.5 * (math.e - 1 / math.e) / (math.e + 1 / math.e + 1), math.sqrt(2) / 3
    assert changed("wd1", [1.0, -1.0, 0.0]) == pytest.approx([most, -most, 0])
    right = [2 / 3, -1 / 3, -1 / 3]                                         # one of three right
    assert changed("TraceRL", right) == pytest.approx([x / std for x in right])
    assert not any(changed("TraceRL", [1 / 6] * 5 + [-5 / 6]))              # 83 % right
    assert not any(changed("TraceRL", [-1 / 6] * 5 + [5 / 6]))              # 17 %
    # Leave-one-out: of the others' mean.
    assert changed("coupled", right) == pytest.approx([1, -0.5, -0.5])


def test_masks_of_one_step_espo_and_gdpo():
    traj, A = one_row([A_] * 3, [0, 1, 2], copies=4, prompt=[EOS, A_]), ones(4).double()
    traj = traj._replace(q_mask=tensor([[0, 1]]).expand(4, -1))
    states = estimators.one_step(Any_, traj, A, config(), agrpo.uniforms, p_mask=1.0)
    assert states.q.tolist() == [[EOS, MASK]] * 4               # padding is no prompt
    # One offset for the batch: each number of masked tokens, 0 to 3, in ten of forty rows.
    many = one_row([A_] * 3, [0, 1, 2], copies=40)
    first = estimators.espo(Any_, many, ones(40), config(), agrpo.uniforms).hidden[:, 0]
    assert first.sum(dim=1).bincount().tolist() == [10, 10, 10, 10]
    # Nodes (1 -+ 1 / sqrt 3) / 2 of weight 1/2: 2 and 9 of 12 tokens.
    row = one_row([A_] * 12, [0] * 12, m=1)
    states = estimators.gdpo(Any_, row, ones(1), config(), agrpo.uniforms)
    assert states.hidden.sum(dim=2).tolist() == [[2, 9]]
    nodes = [1 - 1 / math.sqrt(3), 1 + 1 / math.sqrt(3)]
    assert states.w.amax(dim=2)[0].tolist() == pytest.approx([1 / x for x in nodes], abs=1e-14)


def test_tokens_after_the_first_eos_count_or_not():
    traj = one_row([A_, EOS, B_, EOS], [0, 0, 1, 1], m=2, copies=2)
    assert estimators.counted(Any_, traj, "first")[0].tolist() == [True, True, False, False]
    assert estimators.counted(Any_, traj, "all").all()
    for name, recipe in estimators.RECIPES.items():
        if name != "EGSPO":            # whole steps, EOS or not
            w = recipe(Any_, traj, ones(2).double(), config(G=2), agrpo.uniforms, eos="first").w
            assert not w[..., 2:].any() and w[..., :2].any(), name


# --- The last step drawn again ----------------------------------------------------------------

def test_the_last_step_drawn_again_is_exact(monkeypatch):
    """All trajectories of two tokens, each with both of its draws of the last one, in groups of
    two: all pairs of these, rewards times probability. The gradient is (G - 1) / G of that of
    the expected reward, and the early steps see the mean of K rewards."""
    policy, G, K = Any_(), 2, 2
    texts, orders = cartesian_prod(*[tensor([EOS, A_, B_])] * 2), tensor([[0, 1], [1, 0]])
    o, step_of = texts.repeat(2, 1), orders.repeat_interleave(9, 0)         # (18, 2)
    q = tensor([[A_, B_]]).expand(18, P)
    zero = torch.zeros(18, 2, dtype=torch.float64)
    how = agrpo.Decoding(C=2, m=2, block_length=2)
    traj = agrpo.Trajectory(q, torch.ones_like(q), o, step_of, zero, zero + 1, None, how)
    logp = zero
    for t in range(2):
        found, _ = agrpo.step_logprobs(policy, traj, torch.arange(18), torch.full((18,), t))
        logp = logp.scatter(1, (step_of == t).nonzero()[:, 1:], found)
    p = logp.sum(dim=1).exp() / 2
    want = torch.autograd.grad((p * tensor([reward(x) for x in o]).double()).sum(),
                               policy.params)
    want = torch.cat([g.flatten() for g in want])
    traj = traj._replace(logp_old=logp.detach())

    # Rows in one state differ in their last token: what a row draws again, and how often. It is
    # drawn by a number in the middle of its share.
    state = torch.cat([o * (step_of < 1), step_of], dim=1)
    alike = (state[:, None] == state).all(dim=2).nonzero()[:, 1].view(18, 3)
    share = traj.logp_old[step_of == 1].exp()[alike]            # (18, 3): EOS, A, B
    rows, again = cartesian_prod(torch.arange(18), torch.arange(3)).unbind(dim=1)
    middle = (share.cumsum(dim=1) - share / 2)[rows, again]     # (54,)
    weight = p.detach()[rows] * share[rows, again]
    assert weight.sum().item() == pytest.approx(1)
    group = cartesian_prod(torch.arange(54), torch.arange(54))              # (54^2, G)
    both, u = some_of(traj, rows[group.flatten()]), middle[group.flatten()]
    P_group = weight[group].prod(dim=1).repeat_interleave(G)

    def rewards(traj, many):
        which = (many[:, None] == texts).all(dim=2).int().argmax(dim=1)
        scale = P_group.repeat_interleave(K) * len(group)
        return tensor([reward(x) for x in texts]).double()[which] * scale
    every = lambda p, n, offset: (*(p > 0).nonzero().unbind(dim=1), p[p > 0] * 0 + 1)
    monkeypatch.setattr(agrpo, "sample_timesteps", every)
    rand = lambda B, *shape: u[:, None, None].expand(B, *shape) if len(shape) > 1 else zero[:1]
    cfg = config(G=G, micro_batch=10 ** 6)
    found = gradient(policy, lambda: estimators.last_step(policy, both, None, cfg, rand,
                                                          rewards, K))
    assert close(found * 2, want * (G - 1) / G)                 # J has 1 / m


def test_the_last_step_is_drawn_from_its_own_state_and_costs_one_forward_a_state(toy):
    policy, traj, _, _ = toy
    traj = some_of(traj, [5, 40, 77, 120])
    torch.manual_seed(0)
    many = estimators.last_drawn_again(policy, traj, 50, agrpo.uniforms)
    early = (traj.step_of < 2).repeat_interleave(50, dim=0)
    assert (many.o[early] == traj.o.repeat_interleave(50, dim=0)[early]).all()
    assert (many.o[::50] == traj.o).all() and len(many.o[:50].unique(dim=0)) > 1
    found, old = agrpo.step_logprobs(policy, many, torch.arange(200), torch.full((200,), 2))
    assert torch.allclose(found, old)
    rewards = lambda traj, o: tensor([reward(x) for x in o]).double()
    seen = estimators.last_step(policy, traj, None, config(k=500, G=2), agrpo.uniforms,
                                rewards)
    assert 4 * 2 < len(seen.ratio) <= 4 * 3                     # no pair where all K are alike
    assert torch.allclose(seen.ratio, ones(1).double())
    # A row that ended before its last step has but the draws that it had.
    ended = one_row([A_, EOS, EOS], [0, 1, 3], copies=2, prompt=[A_, B_])
    again = estimators.last_drawn_again(policy, ended, 3, agrpo.uniforms)
    assert (again.o == ended.o[0]).all()


# --- The timestep samplers --------------------------------------------------------------------

def test_every_sampler_weighs_every_pair_one_on_average():
    torch.manual_seed(0)
    p = torch.rand(6, 5, dtype=torch.float64) + 0.2
    p = p / p.sum(dim=1, keepdim=True)
    A = tensor([1.0, -0.5, 0.0, 2.0, -1.0, -1.5], dtype=torch.float64)
    spreads = {}
    cdfs = {"batch": (A.abs()[:, None] * p / A.abs().sum())[None]}
    cdfs["group"] = torch.stack([cdfs["batch"][0] * (torch.arange(6) // 3 == g)[:, None]
                                 for g in range(2)])
    cdfs["group"] /= cdfs["group"].sum(dim=(1, 2), keepdim=True)
    for points in estimators.BY_ROW + estimators.TOGETHER:
        cdf = cdfs.get(points, p * (A != 0)[:, None])
        w = estimators.draw_weights(cdf, 2, points, 2000).view(2000, 6, 5)
        assert not w[:, 2].any()                                # A = 0
        assert (w > 0).sum(dim=(1, 2)).max() <= 2 * 5           # k points a live row
        off = (w[:, A != 0].mean(dim=0) - 1).abs()
        assert (off < 6 * w[:, A != 0].std(dim=0) / 2000 ** 0.5 + 1e-9).all(), points
        spreads[points] = w.var(dim=0).mean().item()
    assert spreads["systematic"] < spreads["strata"] < 0.95 * spreads["iid"]


def test_the_gram_matrix_is_that_of_the_pairs_gradients(toy):
    policy, traj, A, _ = toy
    traj, A = (some_of(traj, slice(0, 162, 20)), A[:162:20])
    pairs, gram = estimators.pair_gradients(policy, traj, A)
    whole = found_by("every step", policy, traj, A, config()) * 3 * len(A)
    assert pairs.tolist() == list(range(3 * len(A)))
    assert gram.sum().item() == pytest.approx(whole.square().sum().item(), rel=1e-5)


# --- The experiments --------------------------------------------------------------------------

SMALL = "--quick --seeds 1 --jobs 1 --eval_n 2 --questions 3 --G 4 --updates 1".split()


def lab(capsys, *argv):
    assert experiments.main(list(argv)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_an_experiment_prints_its_table_and_writes_files(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", tmp_path)      # --figures must not write there
    small = ["--jobs", "1"] if name in ("rollout", "masks") else SMALL
    out, kept = tmp_path / "out", tmp_path / "lab" / "figures"
    printed = lab(capsys, name, *small, "--figures", "--out", str(out))
    text = (out / f"{name}.txt").read_text()
    assert text == (kept / f"{name}.txt").read_text()
    assert text.startswith(f"$ bash run.sh lab {name} ") and "seeds [" in text
    table = text.split("\n", 3)[3]
    assert table.strip() in printed and "nan" not in table
    assert (out / f"{name}.png").exists() and len(list(kept.glob("*.png"))) >= 1
    for picture in out.glob("*.png"):
        width, height = (int.from_bytes(picture.read_bytes()[i:i + 4], "big") for i in (16, 20))
        assert width == 1660 and height >= 600                  # twice the width GitHub shows


def test_the_same_command_goes_on_where_it_was_stopped(tmp_path, capsys):
    flags = ["sweep", *SMALL, "--out", str(tmp_path)]
    file = tmp_path / "sweep.jsonl"
    assert "not run" in lab(capsys, *flags, "--show") and not file.exists()
    first, text = lab(capsys, *flags), file.read_text()
    file.write_text(text[:text.rindex('"seconds"')])            # killed while writing the last
    assert "not run" in lab(capsys, *flags, "--show")           # --show computes nothing
    again = lab(capsys, *flags)
    without_seconds = [[row.rsplit(" ", 1)[0] for row in printed.splitlines()]
                       for printed in (first, again)]
    assert without_seconds[0] == without_seconds[1]
    size = file.stat().st_size
    lab(capsys, *flags)
    assert file.stat().st_size == size                          # all was there


def test_a_piece_is_known_by_what_it_computes():
    """The key of a piece that was computed before the file was last rewritten."""
    call = run.parse("--device cpu --m 4 --k 2 --lr 1e-3 --out there".split()), "AGRPO"
    key = experiments.key_of(experiments.learn, call)
    for field, value in dict(out="here", save_every=3, steps="2", preset="").items():
        other = replace(call[0], **{field: value}), "AGRPO"
        assert experiments.key_of(experiments.learn, other) == key
    assert experiments.key_of(experiments.learn, (replace(call[0], seed=1), "AGRPO")) != key
    assert experiments.key_of(experiments.learn, (call[0], "ELBO")) != key


def test_angles_tell_bias_from_variance():
    """g = (3, 0); two draws 2 (3, 4) and 2 (3, 0), whose mean is 34 degrees off."""
    part = dict(dot=18.0, gg=9.0, ee=36.0, square=68.0, states=2.0, cosine=[0.6, 1.0],
                batches=2, across=9.0, across_ee=9.0, across_gg=9.0)
    found = experiments.angles([part, part])
    assert found["one"] == pytest.approx(0.8) and found["mean"] == pytest.approx(1.0)
    # At the length of g: twice as long a draw is not a noisier one.
    assert found["variance"] == pytest.approx((17 - 9) / 9) and found["states"] == 2
    off = experiments.angles([dict(part, ee=52.0)])             # |E e|^2 = 36 + 16: bias
    assert off["bias"] == pytest.approx(2 / 13 ** 0.5)


def test_cosines_fit_the_completion_of_every_task(tmp_path, capsys):
    """At 2, 4 and C steps; of the pieces none is there, so that nothing is computed."""
    shown = lab(capsys, "compare", "--task", "sudoku", "--show", "--out", str(tmp_path))
    assert "sudoku: held-out accuracy" in shown and "countdown" not in shown


def test_directions_multiplies_different_draws(monkeypatch):
    """An estimator that draws 3 g and g in turn, beside the exact one."""
    times = itertools.cycle([3, 1])

    def in_turn(*batch):
        seen = [estimators.every_step(*batch) for _ in range(next(times))]
        return seen[0]
    monkeypatch.setitem(estimators.ESTIMATORS, "in turn", in_turn)
    cfg = run.parse("--m 4 --k 2 --questions 3 --G 4 --device cpu".split())
    found = experiments.directions(cfg, ["every step", "AGRPO", "in turn"], 2, 2)
    exact = experiments.angles([found["every step"]])
    assert exact["one"] == pytest.approx(1) and exact["bias"] < 1e-3 and exact["variance"] == 0
    assert exact["states"] > found["AGRPO"]["states"] > 0
    part = found["in turn"]
    for name, times_g in (("dot", 2), ("ee", 3), ("square", 5)):
        assert part[name] == pytest.approx(times_g * part["gg"], rel=1e-4)
    for name, times_g in (("across", 2), ("across_ee", 4)):
        assert part[name] == pytest.approx(times_g * part["across_gg"], rel=1e-3)


def test_curves_pools_the_seeds_of_finished_runs(tmp_path, capsys):
    folders = [tmp_path / f"run{seed}" for seed in range(2)]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        evals = [dict(update=u, accuracy=0.1 * (u + seed), m=3) for u in (0, 1, 3)]
        (folder / "summary.json").write_text(json.dumps(dict(task="countdown", evals=evals)))
    printed = lab(capsys, "curves", *map(str, folders), "--out", str(tmp_path))
    assert "5.0% [0.0%, 10.0%] -> 35.0% [30.0%, 40.0%], 2 seed(s)" in printed
    assert (tmp_path / "curves.png").is_file()
    with pytest.raises(TaskError, match="no summary.json"):
        experiments.main(["curves", str(tmp_path)])


def test_the_menu_names_every_experiment_and_bad_flags_get_a_sentence(capsys):
    assert experiments.main([]) == 0 and experiments.main(["nonsense"]) == 2
    menu = capsys.readouterr().out
    assert all(f"\n  {name} " in menu for name in [*experiments.EXPERIMENTS, "curves"])
    with pytest.raises(SystemExit):
        experiments.main(["compare", "--help"])
    assert "agrpo.py's" in capsys.readouterr().out
    for argv in (["compare", "--nonsense", "1"], ["sweep", "--over", "nonsense=1"]):
        with pytest.raises(TaskError, match="nonsense"):
            experiments.main(argv)


def test_names_at_the_ends_of_lines_do_not_cover_each_other():
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ax.set(ylim=(0, 1))
    figures.name_ends(ax, [(0.50, "a", "k"), (0.51, "b", "k"), (0.9, "c", "k")], 0.1)
    heights = {text.get_text(): text.xy[1] for text in ax.texts}
    plt.close(fig)
    assert heights["b"] - heights["a"] >= 0.0999 and heights["c"] == pytest.approx(0.9)
