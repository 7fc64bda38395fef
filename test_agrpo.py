"""AGRPO's claims, executable, in the order of agrpo.py's sections: worked examples to read.

The main witness is a toy model small enough to enumerate: three tokens and [MASK], in float64.
`trajectories` walks all that can happen, every choice of positions and every token, with plain
code of its own. `witness` drives agrpo.rollout down each by choosing its random numbers. The
estimator's exact mean over all must be the gradient of the expected reward, to nine digits.
"""
import functools
import itertools
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

import agrpo
import tasks
from agrpo import Decoding

MASK, EOS, A_, B_ = 0, 1, 2, 3                       # the toy vocabulary
P = 2                                                # its prompt length


@pytest.fixture(autouse=True)
def float64():
    """The toy's numbers. (The model of § 7 is loaded before, in float32.)"""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prompt(rows):
    q = tensor([[A_, B_]]).expand(rows, P)
    return q, torch.ones_like(q)


class Toy(torch.nn.Module):
    """A bidirectional model, L positions, V tokens: logits[l] = W[l] tanh(sum_i a[i, x_i])."""
    mask_id, eos_id, dtype = MASK, EOS, torch.float64

    def __init__(self, C, V=4, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = torch.nn.Parameter(torch.randn(P + C, V, 6, generator=g))
        self.W = torch.nn.Parameter(0.2 * torch.randn(P + C, 6, V, generator=g))
        self.asked = []                              # the shape of positions, each forward pass

    def every_logit(self, ids):
        h = torch.tanh(self.a[torch.arange(ids.shape[1]), ids].sum(dim=1))  # (N, 6)
        return torch.einsum("nd,ldv->nlv", h, self.W)                       # (N, L, V)

    def forward(self, ids, mask, positions, block):
        self.asked.append(tuple(positions.shape))
        return self.every_logit(ids)[torch.arange(len(ids))[:, None], positions]

    def gradient(self, of=None):
        """Of a scalar; without one, what backward passes have added up. Flat."""
        if of is not None:
            of.backward(retain_graph=True)
        flat = torch.cat([self.a.grad.flatten(), self.W.grad.flatten()])
        self.zero_grad()
        return flat

    # What the training loop asks of a policy.
    fill_ids = {EOS}
    tokenizer = SimpleNamespace(batch_decode=lambda o: list(map(str, o)),
                                decode=lambda o, **more: str(o))

    def encode(self, chats):
        q, q_mask = prompt(len(chats))
        first = tensor([[int(chat[-1]["content"])] for chat in chats])
        return torch.cat([first, q[:, 1:]], dim=1), q_mask

    def decode(self, o):
        return [" ".join(map(str, row)) for row in o.tolist()]


def sample(model, rows, how):
    torch.manual_seed(0)
    return agrpo.rollout(model, *prompt(rows), how)


def made_up(step_of, m, p_old=1.0, entropy=0.0):
    """A trajectory of which only the steps matter."""
    step_of = tensor(step_of)
    B, C = step_of.shape
    logp_old, entropy = tensor(p_old).log().expand(B, C), tensor(entropy).expand(B, C)
    o = torch.full((B, C), A_)
    return agrpo.Trajectory(*prompt(B), o, step_of, logp_old, entropy, None, Decoding(C, m, C))


def all_pairs(traj):
    """Every step that acted, with weight 1: the sum that k drawn steps estimate."""
    rows, steps = (agrpo.timestep_probs(traj, "uniform") > 0).nonzero().unbind(dim=1)
    return rows, steps, torch.ones(len(rows))


def same(a, b, tolerance=1e-9):
    return (a - b).norm() < tolerance * b.norm()


# --- the witness ------------------------------------------------------------------------------

# Every setting documented as exact, and the grid that meets all of its trajectories.
EXACT = {
    "random": (Decoding(3, 3, 3), 14),
    "several tokens a step": (Decoding(4, 2, 4), 7),
    "blocks and early exit": (Decoding(4, 4, 2), 7),
    "temperature": (Decoding(3, 3, 3, temperature=0.7), 14),
    "top-k": (Decoding(3, 3, 3, top_k=2), 14),
    "top-k above V, top-p": (Decoding(3, 3, 3, temperature=0.8, top_k=50, top_p=0.8), 14),
    "entropy": (Decoding(3, 3, 3, "entropy"), 14),
    "max_prob, top-k": (Decoding(4, 2, 4, "max_prob", top_k=2), 10),
}


def distribution(logits, how):
    """(C, V) probabilities after temperature, top-k and top-p. [MASK] has none."""
    p = (logits / how.temperature).index_fill(1, tensor(MASK), -math.inf).softmax(dim=1)
    likelier = p[:, None, :] > p[:, :, None]                    # [.., v, u]: u before v
    p = p * (likelier.sum(dim=2) < (how.top_k or math.inf))
    p = p / p.sum(dim=1, keepdim=True)
    p = p * ((p[:, None, :] * likelier).sum(dim=2) < how.top_p)
    return p / p.sum(dim=1, keepdim=True)


def choices(logits, masked, how):
    """The sets of positions that a step may reveal, all equally likely."""
    if how.unmasking == "random":
        return list(itertools.combinations(masked, how.C // how.m))
    p = distribution(logits, Decoding(how.C, how.m, how.block_length))
    sure = p.amax(dim=1) if how.unmasking == "max_prob" else -torch.special.entr(p).sum(dim=1)
    return [sorted(masked, key=lambda i: -sure[i].item())[:how.C // how.m]]


def trajectories(model, how, o, step_of, t=0, p=1.0):
    """Yield (o, step_of), probability with gradient, of all that can follow from step t on."""
    start = t * (how.C // how.m) // how.block_length * how.block_length
    ended = start > 0 and set(o[start - how.block_length:start]) == {EOS}
    if ended or t == how.m:
        yield (*o[:start], *[EOS] * (how.C - start), *step_of), p
        return
    logits = model.every_logit(tensor([[A_, B_, *o]]))[0, P:]
    pi = distribution(logits, how)
    masked = [i for i in range(start, start + how.block_length) if o[i] == MASK]
    every_choice = choices(logits, masked, how)
    for where in every_choice:
        for tokens in itertools.product(*(pi[i].nonzero()[:, 0].tolist() for i in where)):
            next_o, next_step_of = list(o), list(step_of)
            for i, token in zip(where, tokens):
                next_o[i], next_step_of[i] = token, t
            share = pi[where, tokens].prod() / len(every_choice)
            yield from trajectories(model, how, next_o, next_step_of, t + 1, p * share)


@functools.cache
def witness(how, grid, seed=1):
    """A toy model; every trajectory, as agrpo.rollout writes it; their probabilities.

    The rollouts follow a grid of `grid` values for each token's random number.
    """
    model = Toy(how.C, seed=seed)
    truth = dict(trajectories(model, how, [MASK] * how.C, [how.m] * how.C))
    p = torch.stack(list(truth.values()))
    assert p.sum().item() == pytest.approx(1, abs=1e-12)

    orders = list(itertools.permutations(range(how.C)))
    orders = tensor(orders if how.unmasking == "random" else orders[:1])
    u = torch.cartesian_prod(*[(torch.arange(grid) + 0.5) / grid] * how.C)
    numbers = iter([orders.repeat_interleave(len(u), dim=0),
                    u.repeat(len(orders), 1).view(-1, how.m, how.C // how.m)])
    traj = agrpo.rollout(model, *prompt(len(orders) * len(u)), how, lambda *_: next(numbers))
    keys = torch.cat([traj.o, traj.step_of], dim=1).tolist()
    row_of = {tuple(key): row for row, key in enumerate(keys)}
    assert row_of.keys() == truth.keys()
    rows = [row_of[key] for key in truth]
    once = {name: x[rows] for name, x in traj._asdict().items() if torch.is_tensor(x)}
    return model, traj._replace(**once), p


def reward(o):
    """(N, C) -> (N,). Another for nearly every text, and nothing a symmetry could cancel."""
    i = torch.arange(o.shape[1]) + 1
    return ((i + 0.5) * torch.sin(1.3 * o * i)).sum(dim=1) + 2.0 * (o[:, 0] == A_)


def estimator_mean(model, traj, weight, follow, k, **more):
    """Exact mean of agrpo's estimate of sum_row weight * sum_t grad log pi, over the offsets.

    The drawn steps are piecewise constant in a row's offset: u_j = (j + offset) / k meets an
    edge c of the CDF at offset (c k) mod 1. So the mean is a finite sum, pieces times length.
    """
    p = agrpo.timestep_probs(traj, follow)
    ends = tensor([[0.0, 1.0]]).expand(len(p), 2)
    edges = torch.cat([p.cumsum(dim=1) * k % 1, ends], dim=1).sort(dim=1).values
    for left, right in zip(edges.T, edges.T[1:]):
        pairs = agrpo.sample_timesteps(p, k, (left + right)[:, None] / 2)
        length = right - left
        agrpo.add_gradient(model, traj, weight * length, pairs, micro_batch=1000, **more)
    return total(model, traj)


def total(model, traj):
    """sum_row A sum_t w grad log pi: add_gradient's means and its sign undone."""
    return -len(traj.o) * traj.how.m * model.gradient()


# --- § 1 The denoising MDP --------------------------------------------------------------------

@pytest.mark.parametrize("settings, says", [
    ((12, 5, 12), r"--m 5 .*\[12, 6, 4, 3, 2, 1\]"),
    ((12, 2, 4), r"--m 2 .*\[12, 6, 3\]"),
    ((12, 0, 12), "--m 0 "),
    ((12, 4, 5), r"--block_length 5 .*\[1, 2, 3, 4, 6, 12\]"),
    ((4, 4, 4, "low_confidence"), "--unmasking low_confidence .*random"),
    ((4, 4, 4, "random", -1.0), "--temperature -1.0"),
    ((4, 4, 4, "random", math.nan), "--temperature nan"),
    ((4, 4, 4, "random", 1.0, 3, 0.0), "--top_p 0.0"),
    ((4, 4, 4, "random", 1.0, 0, 0.9), "--top_p 0.9 needs a --top_k"),
])
def test_steps_must_divide_and_the_refusal_names_what_would(settings, says):
    with pytest.raises(ValueError, match=says):
        Decoding(*settings)
    assert Decoding(384, 128, 12).W == 3 and agrpo.step_counts(12, 4) == [12, 6, 3]


def test_a_state_holds_what_was_revealed_before_its_step():
    """The picture in § 1: C = 3, one token a step, revealed in the order 1, 0, 2."""
    traj = made_up([[1, 0, 2]], m=3)
    traj.o[:] = tensor([A_, B_, EOS])
    model, seen = Toy(3), []
    logits = model.every_logit
    model.every_logit = lambda ids: seen.append(ids[0, P:].tolist()) or logits(ids)
    for t in range(3):
        agrpo.step_logprobs(model, traj, tensor([0]), tensor([t]))
    assert seen == [[MASK, MASK, MASK], [MASK, B_, MASK], [A_, B_, MASK]]


def test_mask_and_ids_without_a_token_are_never_drawn():
    model = Toy(4, V=6)
    model.never_ids = {5}
    model.W.data[:, :, [MASK, 5]] += 10                         # the model would love to
    traj = sample(model, 200, Decoding(4, 2, 4))
    assert traj.o.unique().tolist() == [EOS, A_, B_, 4]


@pytest.mark.parametrize("how", [dict(temperature=0.0), dict(), dict(top_k=2)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_end_with_a_sentence_in_every_path(how, bad):
    model = Toy(2)
    model.every_logit = lambda ids: tensor([0.0, 1.0, bad, 2.0]).expand(*ids.shape, 4)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sample(model, 3, Decoding(2, 2, 2, **how))


# --- § 2 Rollout ------------------------------------------------------------------------------

def test_inverse_cdf_never_leaves_the_support():
    p = tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    u = tensor([[0.0, 0.249, 0.25, 0.999, 1.0 - 2 ** -53, 1.0]])
    assert agrpo.inverse_cdf(p, u).tolist() == [[1, 1, 3, 3, 3, 3]]
    short = torch.full((1, 10), 0.0999)                         # ends at 0.999, asked for 1.0
    assert agrpo.inverse_cdf(short, torch.ones(1, 1)) == 9


@pytest.mark.parametrize("T, top_k, top_p, kept", [
    (1.0, 0, 1.0, [0, 1, 2]),
    (0.5, 0, 1.0, [0, 1, 2]),
    (1.0, 2, 1.0, [0, 2]),
    (1.0, 99, 1.0, [0, 1, 2]),
    (1.0, 4, 0.7, [0, 2]),             # 0.665 < 0.7: the next token crosses
    (1.0, 4, 0.6, [0]),
    (0.5, 4, 0.8, [0]),                # 0.867 at T = 0.5, 0.665 at T = 1
])
@pytest.mark.parametrize("offset", [0.0, 1000.0])               # large logits do not overflow
def test_tokens_are_drawn_in_proportion(T, top_k, top_p, kept, offset):
    how, n = Decoding(1, 1, 1, "random", T, top_k, top_p), 10_000
    logits = tensor([2.0, 0.0, 1.0, -math.inf]) + offset
    want = torch.zeros(4)
    want[kept] = (logits[kept] / T).softmax(dim=0)
    logits = logits.expand(n, 1, 4)
    u = (torch.arange(n)[:, None] + 0.5) / n
    tokens, support = agrpo.sample_tokens(logits, u, how)
    assert (torch.bincount(tokens[:, 0], minlength=4) / n - want).abs().max() < 1e-3
    logp, H = agrpo.score(logits, tokens, how, support)
    assert torch.allclose(logp, want[tokens].log(), atol=1e-6)
    assert torch.allclose(H, torch.special.entr(want).sum(), atol=1e-6)


@pytest.mark.parametrize("unmasking", agrpo.UNMASKING)
def test_a_rollout_reveals_every_position_once_in_block_order(unmasking):
    model = Toy(6)
    model.eos_id, model.fill_ids = 99, {99}
    traj = sample(model, 50, Decoding(6, 6, 3, unmasking))
    assert (traj.o != MASK).all()
    assert (traj.step_of.sort(dim=1).values == torch.arange(6)).all()
    assert (traj.step_of[:, :3] < 3).all() and (traj.step_of[:, 3:] >= 3).all()
    # The head runs on W positions; on all that are masked where they must be compared.
    places = {1} if unmasking == "random" else {3, 2, 1}
    assert set(model.asked) == {(50, n) for n in places}


def test_how_sure_the_model_is_does_not_depend_on_a_temperature():
    """By hand, at T = 1. At T = 2 max_prob would take the other position of the two."""
    logits = tensor([[[3.0, 2.9, -math.inf], [1.2, 0.0, 0.0]]])
    p = tensor([[[0.525, 0.475, 0.0], [0.6241, 0.188, 0.188]]])
    wanted = dict(max_prob=p.amax(dim=2).log(), entropy=torch.xlogy(p, p).sum(dim=2))
    for unmasking, want in wanted.items():
        assert torch.allclose(agrpo.confidence(logits, unmasking), want, atol=1e-3)


def test_greedy_max_prob_is_low_confidence_decoding():
    """Take the likeliest token everywhere, keep the surest: LLaDA's evaluation, by hand."""
    model, o = Toy(6, seed=5), torch.full((6,), MASK)
    for _ in range(3):
        logits = model.every_logit(tensor([[A_, B_, *o]]))[0, P:]
        sure, token = logits[:, 1:].softmax(dim=1).max(dim=1)
        keep = sure.masked_fill(o != MASK, -1).topk(2).indices
        o[keep] = 1 + token[keep]
    assert torch.equal(sample(model, 1, Decoding(6, 3, 6, "max_prob", 0.0)).o[0], o)


def test_a_row_whose_block_is_all_filling_leaves_and_the_rest_is_eos():
    model = Toy(4, V=5)
    model.fill_ids = {EOS, 4}                                   # 4 is padding: it fills as well
    traj = sample(model, 600, Decoding(4, 4, 2))
    ended = torch.isin(traj.o[:, :2], tensor([EOS, 4])).all(dim=1)
    assert (traj.o[ended, 0] == 4).any()
    assert (traj.o[ended, 2:] == EOS).all()
    assert (traj.step_of[ended, 2:] == 4).all() and (traj.step_of[~ended] < 4).all()
    assert (traj.logp_old[ended, 2:] == 0).all()
    left = (~ended).sum().item()                                # the others cost nothing
    assert 0 < left < 600 and [rows for rows, _ in model.asked] == [600, 600, left, left]


def test_a_row_does_not_depend_on_the_batch_it_is_in():
    """Nor on rows that leave it early."""
    model, how = Toy(4), Decoding(4, 4, 2)

    def rollout(copies):
        rand = agrpo.row_random([(0, copy) for copy in copies])
        return agrpo.rollout(model, *prompt(len(copies)), how, rand)
    whole, first, second = rollout(range(40)), rollout(range(20)), rollout(range(20, 40))
    for name in ("o", "step_of", "logp_old"):
        parts = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(getattr(whole, name), parts)
    assert (whole.step_of == 4).any() and len(whole.o.unique(dim=0)) > 10


# --- § 3 Advantages ---------------------------------------------------------------------------

def test_advantages_by_hand():
    A = agrpo.group_advantages(tensor([1.0, 2.0, 3.0, 6.0, 0.1, 0.1, 0.1, 0.1]), G=4)
    assert A.tolist() == [-2.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    A = agrpo.group_advantages(tensor([0.0, 2.0]), G=2, divide_by_std=True)
    assert torch.allclose(A, tensor([-1.0, 1.0]) / (math.sqrt(2) + 1e-4))
    for G, r in itertools.product((3, 5, 6, 7), range(1, 40)):  # equal floats, another mean
        assert not agrpo.group_advantages(torch.full((G,), r / 10), G).any()


@pytest.mark.parametrize("G", [2, 3])
def test_with_group_advantages_the_mean_is_g_minus_one_over_g_of_the_gradient(G):
    model, traj, p = witness(Decoding(2, 2, 2), grid=14, seed=2)
    r, N = reward(traj.o), len(p)
    groups = torch.cartesian_prod(*[torch.arange(N)] * G)       # every group that there can be
    A = agrpo.group_advantages(r[groups].flatten(), G).view(-1, G)
    weight = p.detach()[groups].prod(dim=1, keepdim=True) * A / G
    per_row = torch.zeros(N).index_add(0, groups.flatten(), weight.flatten())
    got = estimator_mean(model, traj, per_row, "uniform", k=2)
    assert same(got, (G - 1) / G * model.gradient(of=(p * r).sum()))


# --- § 4 Timesteps ----------------------------------------------------------------------------

@pytest.mark.parametrize("follow, want", [
    ("uniform", [[0.5, 0.5], [1, 0], [0.5, 0.5]]),
    # Its sums are 1 and 5; 1; 2 and 6. 90 % follow them, 10 % are uniform.
    ("entropy", [[0.9 * 1/6 + 0.05, 0.9 * 5/6 + 0.05], [1, 0], [0.275, 0.725]]),
    # The norm of 1 - p: of (1/2, 1/2) and 0; of (1/2, 1/2); 0.75 and 0.5, of (0.3, 0.4).
    ("surprise", [[0.95, 0.05], [1, 0], [0.9 * 0.6 + 0.05, 0.9 * 0.4 + 0.05]]),
])
def test_timestep_probabilities_by_hand(follow, want):
    """Three rows, m = 2 steps of two tokens; the second row ended after its first step."""
    traj = made_up([[0, 1, 1, 0], [0, 0, 2, 2], [0, 0, 1, 1]], m=2,
                   p_old=[[0.5, 1, 1, 0.5], [0.5, 0.5, 1, 1], [0.25, 1, 0.7, 0.6]],
                   entropy=[[1.0, 3, 2, 0], [0.5, 0.5, 0, 0], [1.0, 1, 3, 3]])
    assert torch.allclose(agrpo.timestep_probs(traj, follow), tensor(want))


@pytest.mark.parametrize("tiny", [0.0, 1e-320, 1e-305])
def test_importances_too_small_to_divide_give_uniform_weights(tiny):
    traj = made_up([[0, 1, 2]], m=3, entropy=[tiny, 0.0, tiny])
    assert agrpo.timestep_probs(traj, "entropy")[0].tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_every_step_that_acted_has_mean_weight_one(k):
    p = tensor([[0.05, 0.3, 0.05, 0.5, 0.05, 0.05], [0.2, 0.5, 0.3, 0, 0, 0]])
    n, mean = 4000, torch.zeros(2, 6)
    for offset in (torch.arange(n) + 0.5) / n:
        rows, steps, w = agrpo.sample_timesteps(p, k, offset.expand(2, 1))
        assert len(set(zip(rows.tolist(), steps.tolist()))) == len(rows) <= 2 * k
        mean[rows, steps] += w / n
    assert torch.allclose(mean, (p > 0).double(), atol=5e-3)


def test_k_points_are_evenly_spaced_and_equal_draws_merged():
    p = tensor([[0.9, 0.1], [0.0, 0.0]])                        # points .175 .425 .675 .925
    rows, steps, w = agrpo.sample_timesteps(p, 4, tensor([[0.7], [0.7]]))
    assert rows.tolist() == [0, 0]                              # a row of zeros yields nothing
    assert steps.tolist() == [0, 1]
    assert w.tolist() == pytest.approx([3 / (4 * 0.9), 1 / (4 * 0.1)])
    # k = m, uniform: each step exactly once with weight 1, the sum over all steps.
    p = torch.full((1, 7), 1 / 7)
    _, steps, w = agrpo.sample_timesteps(p, 7, tensor([[0.3]]))
    assert steps.tolist() == list(range(7)) and w.tolist() == pytest.approx([1.0] * 7)
    assert agrpo.sample_timesteps(p, 1, torch.ones(1, 1))[1].tolist() == [6]


# --- § 5 Loss ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EXACT)
def test_ratio_is_one_before_the_first_update(name):
    """What the rollout kept is what one forward per (row, step) gives again."""
    model, traj, _ = witness(*EXACT[name])
    rows, steps, _ = all_pairs(traj)
    logp, logp_old = agrpo.step_logprobs(model, traj, rows, steps)
    assert torch.allclose(logp, logp_old, atol=1e-12) and (logp < 0).any()
    assert model.asked[-1] == (len(rows), traj.how.W)           # the scored positions alone
    # The entropy that it kept is that of the distribution: here of the first step.
    logits = model.every_logit(tensor([[A_, B_] + [MASK] * traj.how.C]))[0, P:]
    H = torch.special.entr(distribution(logits, traj.how)).sum(dim=1)
    first = traj.step_of == 0
    assert torch.allclose(traj.entropy[first], H.expand(first.shape)[first])


@pytest.mark.parametrize("rho, A, J, slope", [                  # slope: dJ / dlogp
    (1.0, 2.0, 2.0, 2.0), (1.1, 2.0, 2.2, 2.2), (1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0),
    (1.0, -2.0, -2.0, -2.0), (0.9, -2.0, -1.8, -1.8), (0.5, -2.0, -1.6, 0.0),
    (1.5, -2.0, -3.0, -3.0), (1.5, 0.0, 0.0, 0.0),
    (1.21, 2.0, 2.4, 0.0), (0.79, -2.0, -1.6, 0.0),             # just past the edges
    (math.inf, 2.0, 2.4, 0.0), (math.inf, 0.0, 0.0, 0.0),       # it overflows; the clip holds
])
def test_clip_by_hand(rho, A, J, slope):
    """A > 0: J = min(rho, 1.2) A; A < 0: J = max(rho, 0.8) A. No slope where the clip binds."""
    logp = tensor([[math.log(rho) - 1.0]], requires_grad=True)
    found, ratio = agrpo.clipped_objective(logp, tensor([[-1.0]]), tensor([[A]]), eps=0.2)
    found.sum().backward()
    assert (found.item(), logp.grad.item(), ratio.item()) == pytest.approx((J, slope, rho))


# --- § 6 Update: the gradient is the policy gradient ------------------------------------------

@pytest.mark.parametrize("name", EXACT)
def test_the_mean_of_the_estimator_is_the_policy_gradient(name):
    model, traj, p = witness(*EXACT[name])
    r = reward(traj.o)
    weight, want = r * p.detach(), model.gradient(of=(p * r).sum())
    for follow, k in itertools.product(agrpo.FOLLOW, (1, 2)):
        assert same(estimator_mean(model, traj, weight, follow, k), want), (follow, k)
    assert same(estimator_mean(model, traj, weight, "surprise", 1, ratio_per="step"), want)
    agrpo.add_gradient(model, traj, weight, all_pairs(traj), micro_batch=7)
    assert same(total(model, traj), want)                       # every step, once


def test_dropping_late_eos_would_be_biased():
    """The check has teeth: each row's sum cut at its last token of text is another gradient."""
    model, traj, p = witness(*EXACT["blocks and early exit"])
    rows, steps, w = all_pairs(traj)
    last = traj.step_of.masked_fill((traj.o == EOS) | (traj.step_of == 4), -1).amax(dim=1)
    w = w * (steps <= last[rows])
    r = reward(traj.o)
    agrpo.add_gradient(model, traj, r * p.detach(), (rows, steps, w))
    got, want = total(model, traj), model.gradient(of=(p * r).sum())
    assert 0.2 < torch.cosine_similarity(got, want, dim=0) < 0.999


def test_dead_groups_cost_no_forward_and_change_nothing():
    model, cfg = Toy(4), agrpo.Config(k=4, follow="uniform")    # k = m: every step, once
    traj = sample(model, 8, Decoding(4, 4, 4))
    A = agrpo.group_advantages(tensor([1.0, 0.0, 1.0, 0.0] + [0.3] * 4), G=4)
    model.asked.clear()
    agrpo.policy_gradient(model, traj, A, cfg, torch.zeros)
    assert sum(rows for rows, _ in model.asked) == 16           # 4 rows x 4 steps
    found = model.gradient()
    agrpo.add_gradient(model, traj, A, all_pairs(traj))
    assert same(found, model.gradient())                        # they count in the mean
    # But they have a KL. Each pair is scored by the policy and by the reference.
    model.reference = nullcontext
    model.asked.clear()
    agrpo.policy_gradient(model, traj, A, replace(cfg, beta=0.1), torch.zeros)
    assert sum(rows for rows, _ in model.asked) == 2 * 32


def test_accumulation_in_any_micro_batch_is_one_big_batch():
    model, A, grads = Toy(4), torch.arange(12) - 5, []
    traj = sample(model, 12, Decoding(4, 4, 2, top_k=2))
    pairs = agrpo.sample_timesteps(agrpo.timestep_probs(traj), 3, torch.rand(12, 1))
    for n in (1000, 1, 5, 7):
        seen = agrpo.add_gradient(model, traj, A, pairs, micro_batch=n)
        assert len(seen.ratio) == len(pairs[0]) and seen.forwards >= len(pairs[0]) / n
        grads.append(model.gradient())
        assert same(grads[-1], grads[0], 1e-12)
    assert agrpo.add_gradient(model, traj, A, [x[:0] for x in pairs]).forwards == 0


@pytest.mark.parametrize("m", [2, 1])                           # one token a step, or two
def test_the_kl_term_is_the_kl_and_has_its_gradient(m):
    """pi = 1/2, ref = 1/4 by hand: k3 = 1/2 + log 2 - 1. Then the whole, -beta KL(pi || ref):
    in each state, E_pi of log(pi / ref), its gradient E_pi of log(pi / ref) grad log pi."""
    kl = agrpo.kl_to_reference(*tensor([0.5, 0.5, 0.25]).log())
    assert kl.item() == pytest.approx(0.5 + math.log(2) - 1)
    model, traj, p = witness(Decoding(2, m, 2), grid=14)
    other = Toy(2, seed=9)

    @contextmanager
    def reference():
        model.every_logit = other.every_logit
        yield
        del model.every_logit
    model.reference = reference
    rows, steps, _ = all_pairs(traj)
    w = p.detach()[rows]
    seen = agrpo.add_gradient(model, traj, 0 * p.detach(), (rows, steps, w), beta=0.3)
    got = total(model, traj)
    logp, _ = agrpo.step_logprobs(model, traj, rows, steps)     # (N, W)
    logp_ref, _ = agrpo.step_logprobs(other, traj, rows, steps)
    log_ratio = (logp - logp_ref).detach()
    assert same(got, -0.3 * model.gradient(of=(w @ (log_ratio * logp)).sum()))
    assert same(w @ seen.kl, w @ log_ratio)                     # and is logged


def test_a_ratio_per_step_is_the_product_of_its_tokens():
    model, ratio = Toy(4), {}
    traj = sample(model, 12, Decoding(4, 2, 4))
    model.W.data += 0.1 * torch.randn(model.W.shape, generator=torch.Generator().manual_seed(0))
    for per in ("token", "step"):
        seen = agrpo.add_gradient(model, traj, torch.ones(12), all_pairs(traj), ratio_per=per)
        ratio[per] = seen.ratio
    assert ratio["token"].shape == (24, 2) and (ratio["token"] - 1).abs().max() > 0.01
    assert torch.allclose(ratio["step"], ratio["token"].prod(dim=1, keepdim=True))


def test_a_second_pass_is_clipped_against_the_rollout_not_the_last_pass():
    """Pushed far enough, every token's gradient stops: rho compares with pi_old."""
    model = Toy(2)
    traj, params = sample(model, 1, Decoding(2, 2, 2)), list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=5.0)
    for _ in range(60):
        seen = agrpo.add_gradient(model, traj, torch.ones(1), all_pairs(traj))
        norm = agrpo.optimizer_step(params, optimizer, 1e9)
    assert seen.ratio.min() > 1.2 and norm == 0


def test_a_gradient_that_is_not_finite_moves_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = tensor([1.0, math.nan])
    assert math.isnan(agrpo.optimizer_step([p], optimizer, 1.0)) and p.tolist() == [1.0, 1.0]
    p.grad = tensor([3.0, 4.0])
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    params = iter([p, frozen])                                  # as model.parameters() is
    assert agrpo.optimizer_step(params, optimizer, 1.0) == pytest.approx(5.0) and (p < 1).all()
    assert frozen.grad is None
    before = p.tolist()                                         # nor does one that is zero
    assert agrpo.optimizer_step([p], optimizer, 1.0) == 0 and p.tolist() == before


# --- § 7 A transformers model as the policy ---------------------------------------------------

CFG = agrpo.parse(["--device", "cpu"])               # the shipped tiny model and its settings


@pytest.fixture(scope="module")
def tiny():
    return agrpo.load_policy(CFG)


def encode(policy, *texts):
    return policy.encode([[dict(role="user", content=text)] for text in texts])


def near(a, b):
    return torch.allclose(a, b, atol=1e-5)


def trained(policy):
    return {name: p for name, p in policy.model.named_parameters() if p.requires_grad}


def test_a_policy_gives_the_models_own_logits_at_the_asked_positions(tiny, monkeypatch):
    """Padding is hidden, whatever stands in it; the head runs on the asked positions alone."""
    q, q_mask = encode(tiny, "Numbers: 1 2 3", "Target: 5", "Numbers: 1 2")
    at = tensor([[q.shape[1] - 1, q.shape[1] - 3]] * 3)
    got = tiny(q, q_mask, at)
    alone = q[1:2, q_mask[1] > 0]
    assert q_mask[1, 0] == 0                                    # padded, on the left
    tiny.positions = torch.arange(alone.shape[1])[None]         # everywhere
    every = tiny.model(input_ids=alone).logits                  # (1, L, V), asked directly
    assert got.shape == (3, 2, every.shape[2]) and near(got[1], every[0, [-1, -3]])

    junk = q.masked_fill(q_mask == 0, 7)
    for ignores_mask, order in itertools.product((False, True), ([0, 1, 2], [2, 1, 0])):
        monkeypatch.setattr(tiny, "ignores_mask", ignores_mask)     # then one length at a time
        assert near(tiny(junk[order], q_mask[order], at), got[order])
    monkeypatch.setattr(tiny, "shift", 1)                       # Dream predicts i at i - 1
    assert near(tiny(q, q_mask, at + 1), got)


def test_rows_in_the_same_state_share_one_forward_pass(tiny, monkeypatch):
    """Same logits and gradient as one by one; the model sees each state once."""
    one, other = "Numbers: 1 2 3", "Numbers: 4 2 3"
    q, q_mask = encode(tiny, one, other, one, one)
    at = tensor([[0, 3], [2, 1], [4, 3], [0, 3]])
    weights = list(trained(tiny).values())
    states, forward = [], tiny.model.forward
    monkeypatch.setattr(tiny.model, "forward",
                        lambda **x: states.append(len(x["input_ids"])) or forward(**x))

    def logits_and_gradient(*batches):
        logits = torch.cat([tiny(q[rows], q_mask[rows], at[rows]) for rows in batches])
        loss = (logits.square() * torch.arange(1, 5)[:, None, None]).mean()
        return logits, *torch.autograd.grad(loss, weights)
    together = logits_and_gradient(slice(4))
    one_by_one = logits_and_gradient([0], [1], [2], [3])
    assert states == [2, 1, 1, 1, 1] and all(map(near, together, one_by_one))
    # Another mask is another state.
    masks = torch.stack([q_mask[0], torch.arange(q.shape[1]) > 0])
    first, second = tiny(q[[0, 0]], masks, at[[0, 0]])
    assert not near(first, second)


def test_lora_trains_the_blocks_and_its_reference_is_the_base_model(tiny):
    q, q_mask = encode(tiny, "Numbers: 1 2 3")
    logits = lambda: tiny(q, q_mask, tensor([[3, 4]]))
    base, weights = logits(), trained(tiny)
    assert all("lora_" in n and ".layers." in n for n in weights) and len(weights) == 2 * 16
    for name, p in weights.items():
        p.data += 0.1 * ("lora_B" in name)
    with tiny.reference():
        assert torch.equal(logits(), base)
    assert not torch.allclose(logits(), base, atol=1e-2)
    for name, p in weights.items():
        p.data -= 0.1 * ("lora_B" in name)


# --- § 8 Train --------------------------------------------------------------------------------

DATA = [dict(want=A_), dict(want=B_), dict(want=EOS)]           # of the answer's first token
TOY = agrpo.Config(task="toy", C=4, m=2, block_length=4, questions=6, G=4, k=1, updates=2,
                   rollout_batch=5)


@pytest.fixture
def toy_task(monkeypatch):
    def grade(text, example):
        right = text.split()[0] == str(example["want"])
        return tasks.Grade(3.0 * right + 0.01 * len(set(text)), right, 0.0, "", text, {})
    prompt_of = lambda example: [dict(role="user", content=str(example["want"]))]
    monkeypatch.setitem(tasks.TASKS, "toy", tasks.Task("toy", prompt_of, grade))


def watched(cfg):
    """What agrpo.train hands to the gradient, each pass: traj, A, the offsets. And its log."""
    policy, seen = Toy(cfg.C), []

    def gradient(policy, traj, A, cfg, rand):
        seen.append((traj, A, rand(len(A), 1)))
        return agrpo.add_gradient(policy, traj, A, all_pairs(traj))
    params = list(policy.parameters())
    optimizer = torch.optim.SGD(params, lr=0.0)
    log = list(agrpo.train(policy, DATA, cfg, params, optimizer, gradient=gradient))
    return seen, log


def test_every_row_has_draws_of_its_own(toy_task):
    """Copies, places of one update that hold one problem, updates, passes: none share any."""
    seen, _ = watched(replace(TOY, mu=2))                       # 3 problems at 6 places
    offsets = torch.cat([offset for *_, offset in seen])
    assert len(offsets.unique()) == len(offsets) == 2 * 2 * 24
    drawn = torch.cat([traj.logp_old for traj, *_ in seen[::2]])
    assert len(drawn.unique(dim=0)) > 30                        # of 48; a few may coincide


def test_advantages_belong_to_their_rows(toy_task):
    """Rollouts come in batches of five rows; each row's advantage is still its own group's."""
    (traj, A, _), *_ = watched(TOY)[0]
    texts = Toy(4).decode(traj.o)
    for group, i in enumerate(agrpo.questions(3, 6, 0, 0)):
        rows = slice(4 * group, 4 * group + 4)
        assert (traj.q[rows, 0] == DATA[i]["want"]).all()       # and so is its prompt
        r = [tasks.grade("toy", text, DATA[i]).reward for text in texts[rows]]
        assert A[rows].tolist() == pytest.approx([x - sum(r) / 4 for x in r])


def test_processes_share_the_questions_and_draw_what_one_would(toy_task, monkeypatch):
    def drawn():
        (traj, *_), *_ = watched(TOY)[0]
        return traj.o.view(-1, 4, 4)                            # (questions, G, C)
    whole = drawn()
    monkeypatch.setattr(agrpo, "gather", lambda value: [value])
    for index in (0, 1):
        monkeypatch.setattr(agrpo, "processes", lambda: (index, 2))
        assert torch.equal(drawn(), whole[index::2])


def test_a_policy_with_dropout_is_found_before_it_learns(toy_task):
    """Rollout and loss would be two functions, and the ratio compare the two."""
    class Dropping(Toy):
        def every_logit(self, ids):
            return torch.nn.functional.dropout(super().every_logit(ids), 0.1)
    policy = Dropping(TOY.C)
    before, params = policy.W.clone(), list(policy.parameters())
    with pytest.raises(agrpo.UserError, match="ratio - 1.*rollout and loss disagree"):
        next(agrpo.train(policy, DATA, TOY, params, torch.optim.SGD(params, lr=1.0)))
    assert torch.equal(policy.W, before)


def test_before_the_first_step_a_ratio_is_one_up_to_rounding(capsys):
    """In 16 bits that is more, for a single token much more: so there the mean counts."""
    def passes(*ratio, dtype):
        try:
            agrpo.check_ratio(SimpleNamespace(dtype=dtype), tensor(ratio))
        except agrpo.UserError:
            return False
        return True
    single, half = (functools.partial(passes, dtype=x) for x in (torch.float32, torch.bfloat16))
    assert single(1, 1.0005) and not single(1, 1.002) and not single(1, math.nan)
    assert half(1, 1, 1, 1.3) and not half(1.2, 0.8) and not half(1, math.nan)
    assert single() and half()                                  # every group was dead
    assert "warning" not in capsys.readouterr().out
    assert half(*[1] * 9, 1.9) and "more than rounding" in capsys.readouterr().out


def test_learning_on_the_toy_raises_the_expected_reward(toy_task):
    cfg = replace(TOY, updates=40, lr=0.05, questions=12, G=8, rollout_batch=512)
    policy, data = Toy(cfg.C), [dict(want=A_)] * 300
    params = list(policy.parameters())
    before = agrpo.evaluate(policy, data, cfg, cfg.how, 300)
    log = list(agrpo.train(policy, data, cfg, params, torch.optim.Adam(params)))
    after = agrpo.evaluate(policy, data, cfg, cfg.how, 300)
    assert before < 0.6 and after > 0.95 and log[-1]["reward"] > log[0]["reward"]
    assert log[5]["lr"] == agrpo.learning_rate(cfg, 5)
    assert log[0]["ratio_min"] == log[0]["ratio_max"] == 1


def test_the_numbers_of_the_log_by_hand():
    """Two groups of two, the second dead; one row ended early; three of four ratios clipped:
    0.5 is where A < 0, and 1.5 where A > 0."""
    traj = made_up([[0, 1], [0, 1], [0, 1], [0, 2]], m=2, entropy=[1.0, 2.0])
    traj.o[:2, 1] = EOS
    grades = [tasks.Grade(r, r > 2, 0.5, "", "", {}) for r in (4.0, 1.0, 1.0, 1.0)]
    A = tensor([1.5, 0.0, 0.0, 0.0])                            # one A of 0 is no dead group
    A_pair = tensor([[1.5], [1.5], [-1.5], [-1.5]])
    ratio = tensor([[0.5], [1.5], [0.5], [0.5]])
    seen = agrpo.Seen(ratio, A_pair, torch.full((4, 1), 0.25), forwards=3)
    assert agrpo.statistics(Toy(2), traj, grades, A, seen, agrpo.Config(m=2, G=2)) == dict(
        reward=7 / 4, correct=1 / 4, format=0.5, dead_groups=0.5, length=6 / 4,
        entropy=10 / 7, late_eos=2 / 3, kl=0.25, clip_low=2 / 4, clip_high=1 / 4,
        ratio_min=0.5, ratio_max=1.5, pairs=4, forwards=3)


def test_every_epoch_asks_every_question_once_in_a_new_order():
    first, second = (list(agrpo.questions(7, 7, epoch, 0)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    both = [i for update in (0, 1) for i in agrpo.questions(7, 5, update, 0)]
    assert both == first + second[:3]


def test_warm_up_then_cosine(toy_task):
    cfg = agrpo.Config(updates=200, mu=2, lr=1.0)
    rates = [agrpo.learning_rate(cfg, step) for step in range(400)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[202] == pytest.approx(0.5, abs=0.01)
    assert 0 < rates[-1] < 1e-3 and rates[3:] == sorted(rates[3:], reverse=True)
    cfg = replace(TOY, mu=2)                                    # each pass is a step
    _, log = watched(cfg)
    assert [x["lr"] for x in log] == [agrpo.learning_rate(cfg, step) for step in (1, 3)]


def test_evaluation_is_greedy_max_prob_and_as_the_rollouts_sample():
    first, *greedy = CFG.cells()
    assert first == CFG.how and [how.m for how in greedy] == [12, 6, 4, 3, 2, 1]
    assert {(how.temperature, how.unmasking) for how in greedy} == {(0.0, "max_prob")}
