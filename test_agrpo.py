"""AGRPO's claims, executable, in the order of agrpo.py's sections: worked examples to read.

The main witness is a toy model small enough to enumerate: three tokens and [MASK], in float64.
`trajectories` walks all that can happen, every choice of positions and every token, with plain
code of its own. `witness` drives agrpo.rollout down each by choosing its random numbers. The
estimator's exact mean over all must be the gradient of the expected reward, to nine digits.
(§ 7 and § 9, which need transformers, have theirs in lab/tests/test_alone.py.)
"""
import functools
import itertools
import math
from contextlib import contextmanager
from dataclasses import replace
from statistics import mean

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
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prompt(rows):
    q = tensor([[A_, B_]]).expand(rows, P)
    return q, torch.ones_like(q)


class Toy(torch.nn.Module):
    """A bidirectional model, L positions, V tokens: logits[l] = W[l] tanh(sum_i a[i, x_i])."""
    mask_id, eos_id = MASK, EOS                      # all that § 1 to § 6 ask of a policy

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
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (self.a, self.W)]
        self.zero_grad()
        return torch.cat([g.flatten() for g in grads])

    @contextmanager
    def reference(self):
        """A model with other parameters, of which the KL is."""
        assert not torch.is_grad_enabled()           # no graph is kept for it
        self.every_logit = Toy(len(self.a) - P, seed=9).every_logit
        yield
        del self.every_logit

    # What the training loop asks of a policy.
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
    """Every step that acted, with weight 1: the sum that n drawn pairs estimate."""
    every = agrpo.timestep_probs(traj, torch.ones(len(traj.o)), "uniform")
    rows, steps = every.nonzero().unbind(dim=1)
    return rows, steps, torch.ones(len(rows))


def same(a, b, tolerance=1e-9):
    return (a - b).norm() < tolerance * b.norm()


def nudge(model, size=0.1):
    """Other parameters, so that the ratio is no longer 1."""
    torch.manual_seed(0)
    model.W.data += size * torch.randn(model.W.shape)


halves = lambda *shape: torch.full(shape, 0.5)       # in place of random numbers


# --- the witness ------------------------------------------------------------------------------

# Every setting documented as exact, and the grid that meets all of its trajectories. (With
# max_prob and entropy, the expected reward jumps where an order flips: exact between jumps.)
EXACT = {
    "random": (Decoding(3, 3, 3), 14),
    "several tokens a step": (Decoding(4, 2, 4), 7),
    "blocks and early exit": (Decoding(4, 4, 2), 7),
    "blocks of one step": (Decoding(4, 2, 2), 7),
    "blocks of one token": (Decoding(3, 3, 1), 14),
    "temperature": (Decoding(3, 3, 3, temperature=0.7), 14),
    "top-k": (Decoding(3, 3, 3, top_k=2), 14),
    "top-k above V, top-p": (Decoding(3, 3, 3, temperature=0.8, top_k=50, top_p=0.8), 14),
    "entropy": (Decoding(3, 3, 3, "entropy"), 14),
    "max_prob, top-k": (Decoding(4, 2, 4, "max_prob", top_k=2), 10),
    "max_prob, temperature": (Decoding(4, 4, 4, "max_prob", temperature=2.0), 7),
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
    return model, take(traj, rows), p


def take(traj, rows):
    """The batch of these rows."""
    *tensors, how = traj
    return agrpo.Trajectory(*(None if x is None else x[rows] for x in tensors), how)


def reward(o):
    """(N, C) -> (N,). Another for nearly every text, and nothing a symmetry could cancel."""
    i = torch.arange(o.shape[1]) + 1
    return ((i + 0.5) * torch.sin(1.3 * o * i)).sum(dim=1) + 2.0 * (o[:, 0] == A_)


def pieces(p, n):
    """(offset, length): every draw of n pairs that there can be, and how likely it is.

    Point (j + offset) / n meets an edge c of the CDF at offset (c n) mod 1. Between two such
    offsets the draw is the same. So a mean over the offset is a finite sum.
    """
    edges = torch.cat([p.flatten().cumsum(0) * n % 1, tensor([0.0, 1.0])]).sort().values
    return zip(((edges[1:] + edges[:-1]) / 2).tolist(), edges.diff().tolist())


def mean_weights(p, n):
    """(B, m): what a pair weighs on average over the offset. Exact."""
    weights = torch.zeros_like(p)
    for offset, length in pieces(p, n):
        rows, steps, w = agrpo.sample_timesteps(p, n, offset)
        weights[rows, steps] += w * length
    return weights


def total(model, traj):
    """sum_row A sum_t w grad log pi: add_gradient's means and its sign undone."""
    return -len(traj.o) * traj.how.m * model.gradient()


# --- § 1 The denoising MDP --------------------------------------------------------------------

@pytest.mark.parametrize("settings, says", [
    ((12, 5, 12), r"^m 5 .*\[12, 6, 4, 3, 2, 1\]"),
    ((12, 4, 5), r"^block_length 5 .*\[1, 2, 3, 4, 6, 12\]"),
    ((4, 4, 4, "low_confidence"), "^unmasking low_confidence .*random"),
    ((4, 4, 4, "random", math.nan), "^temperature nan"),
    ((4, 4, 4, "random", 1e-308), "^temperature 1e-308 .*0 for greedy"),
    ((4, 4, 4, "random", 1e39), r"^temperature 1e\+39 .*0.001 to 1000"),
    ((4, 4, 4, "random", 1.0, 3, 0.0), "^top_p 0.0"),
    ((4, 4, 4, "random", 1.0, 0, 0.9), "^top_p 0.9 with top_k 0 .*below 1 a top_k"),
])
def test_steps_must_divide_and_the_refusal_names_what_would(settings, says):
    with pytest.raises(ValueError, match=says):
        Decoding(*settings)
    assert Decoding(384, 128, 12).W == 3 and agrpo.step_counts(12, 4) == [12, 6, 3]


def test_a_state_holds_what_was_revealed_before_its_step():
    """The picture in § 1: C = 3, one token a step, revealed in the order 1, 0, 2."""
    traj = made_up([[1, 0, 2]], m=3)._replace(o=tensor([[A_, B_, EOS]]))
    model, seen, logits = Toy(3), [], Toy(3).every_logit
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
def test_one_broken_logit_ends_with_a_sentence_in_every_path(how, bad):
    """In the last of three rows; the others are in order."""
    model, logits = Toy(2), torch.zeros(3, P + 2, 4)
    logits[2, 3, B_] = bad
    model.every_logit = lambda ids: logits
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sample(model, 3, Decoding(2, 2, 2, "max_prob", **how))


# --- § 2 Rollout ------------------------------------------------------------------------------

def test_inverse_cdf_never_leaves_the_support():
    p = tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    u = tensor([[0.0, 0.249, 0.25, 0.999, 1.0 - 2 ** -53, 1.0]])
    assert agrpo.inverse_cdf(p, u).tolist() == [[1, 1, 3, 3, 3, 3]]
    assert agrpo.inverse_cdf(torch.full((1, 10), 0.0999), torch.ones(1, 1)) == 9   # sum 0.999


def test_float32_numbers_are_drawn_from_in_float64():
    """In float32, 1 + 2^-25 is 1, so the last of these would never be drawn. A random number
    there has 24 digits, and the softmax seven: the edge between two tokens would move."""
    p = tensor([[1.0, 2 ** -25]], dtype=torch.float32)
    assert agrpo.inverse_cdf(p, tensor([[1 - 2 ** -53]])) == 1
    p = tensor([[1 - 2 ** -30, 2 ** -30]])                      # no point is rounded up
    assert agrpo.sample_timesteps(p, 1, 1 - 2 ** -29)[1] == 0
    torch.set_default_dtype(torch.float32)
    drawn = agrpo.uniforms(1000), agrpo.row_random([(0, 0)])(1, 1000)
    assert all(u.dtype == torch.float64 and (u * 2 ** 24 % 1 > 0).any() for u in drawn)
    logits = tensor([[[0.3, 0.0, -0.2]]])
    edge = logits.double().softmax(dim=-1)[..., 0]
    for u, token in ((edge - 1e-9, 0), (edge + 1e-9, 1)):
        assert agrpo.sample_tokens(logits, u, Decoding(1, 1, 1))[0] == token


@pytest.mark.parametrize("T, top_k, top_p, kept, offset", [
    (1.0, 0, 1.0, [0, 1, 2, 3, 4], 0.0),
    (0.5, 0, 1.0, [0, 1, 2, 3, 4], 1000.0),     # large logits do not overflow
    (1.0, 2, 1.0, [0, 2], 0.0),
    (1.0, 5, 0.7, [0, 2], 0.0),             # 0.5 < 0.7: the next token crosses
    (0.5, 5, 0.7, [0], 0.0),                # 64 / 86 = 0.74 at T = 0.5
    (1.0, 5, 0.5, [0], 0.0),                # exactly at an edge no other token is needed
    (1.0, 5, 0.75, [0, 2], 0.0),
    (1.0, 5, 0.7501, [0, 1, 2], 0.0),
])
def test_tokens_are_drawn_in_proportion(T, top_k, top_p, kept, offset):
    """p = 8/16, 2/16, 4/16, 1/16 and 1/16 at T = 1, and 0."""
    how, n = Decoding(1, 1, 1, "random", T, top_k, top_p), 10_000
    logits = tensor([4.0, 1.0, 2.0, 0.5, 0.5, 0.0]).log() + offset
    want = torch.zeros(6)
    want[kept] = (logits[kept] / T).softmax(dim=0)
    logits = logits.expand(n, 1, 6)
    u = (torch.arange(n)[:, None] + 0.5) / n
    tokens, support = agrpo.sample_tokens(logits, u, how)
    assert (torch.bincount(tokens[:, 0], minlength=6) / n - want).abs().max() < 1e-3
    logp, H = agrpo.score(logits, tokens, how, support)
    assert torch.allclose(logp, want[tokens].log(), atol=1e-6)
    assert torch.allclose(H, torch.special.entr(want).sum(), atol=1e-6)


@pytest.mark.parametrize("unmasking", agrpo.UNMASKING)
def test_a_rollout_reveals_every_position_once_in_block_order(unmasking):
    model = Toy(6)
    model.eos_id = 99
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
    for unmasking, want in (("max_prob", p.amax(dim=2).log()),
                            ("entropy", torch.xlogy(p, p).sum(dim=2))):
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


# --- § 4 Timesteps ----------------------------------------------------------------------------

@pytest.mark.parametrize("follow, floor, want", [
    # Five pairs, those of the last row are never drawn.
    ("uniform", 0.1, [[0.2, 0.2], [0.2, 0], [0.2, 0.2], [0, 0]]),
    # The steps' sums are 1 and 5; 1; 2 and 6, times the row's size: 2 10, 1, 1 3, in all 17.
    ("entropy", 0.0, [[2 / 17, 10 / 17], [1 / 17, 0], [1 / 17, 3 / 17], [0, 0]]),
    # The norm of 1 - p: of (1/2, 1/2) 0.7071, and 0; 0.7071; of (0.3, 0.4) 0.5, and 0.75,
    # times the size. 90 % follow that, 10 % are uniform over the five.
    ("surprise", 0.1, [[0.9 * 1.4142 / 2.7463 + 0.02, 0.02], [0.9 * 0.7071 / 2.7463 + 0.02, 0],
                       [0.9 * 0.375 / 2.7463 + 0.02, 0.9 * 0.25 / 2.7463 + 0.02], [0, 0]]),
])
def test_timestep_probabilities_by_hand(follow, floor, want):
    """Four rows, m = 2 steps of two tokens, of size |A| = 2, 1, 0.5 and 0. The second row ended
    after its first step, so it has no second."""
    steps = [[0, 1, 1, 0], [0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1]]
    p_old = [[0.5, 1, 1, 0.5], [0.5, 0.5, 1, 1], [0.25, 1, 0.7, 0.6], [0.1, 0.1, 0.1, 0.1]]
    entropy = [[1.0, 3, 2, 0], [0.5, 0.5, 0, 0], [1.0, 1, 3, 3], [9, 9, 9, 9]]
    traj, size = made_up(steps, 2, p_old, entropy), tensor([2.0, 1.0, 0.5, 0.0])
    p = agrpo.timestep_probs(traj, size.float(), follow, floor)
    assert torch.allclose(p, tensor(want), atol=1e-4) and p.dtype == torch.float64
    with pytest.raises(ValueError, match="^follow suprise is unknown"):
        agrpo.timestep_probs(traj, size, "suprise")


# step_of, m, size |A|, entropy, n: everything that a batch can be. (m stands for "never".)
LATE, EARLY = [0, 1, 2], [0, 3, 3]
BATCHES = {
    "rows of different worth": ([LATE] * 3, 3, [1.0, 0.2, 0.0], 1.0, 2),
    "a row that ended early": ([LATE, EARLY, LATE], 3, [1.0, 1.0, 2.0], [0.1, 2.0, 1.0], 3),
    "importances that sum to nothing": ([LATE, EARLY], 3, [1.0, 1.0], 0.0, 2),
    "or to less than can be divided": ([LATE], 3, [1.0], [1e-320, 0.0, 1e-305], 2),
    "an entropy below 0 by rounding": ([LATE], 3, [1.0], [-1e-17, 0.0, 3e-17], 2),
    "a step that decides nearly nothing": ([LATE], 3, [1.0], [1e-9, 1.0, 2.0], 1),
    "one pair": ([[0, 0]], 1, [0.3], 1.0, 1),
    "more draws than pairs": ([LATE, EARLY], 3, [1.0, 3.0], [0.1, 2.0, 1.0], 30),
    "every group dead": ([LATE, EARLY], 3, [0.0, 0.0], 1.0, 2),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("follow", agrpo.FOLLOW)
def test_every_pair_that_acted_has_mean_weight_one(name, follow):
    """Whatever p follows, as long as the row has a size. And no weight is without a bound."""
    step_of, m, size, entropy, n = BATCHES[name]
    traj, size = made_up(step_of, m, 0.5, entropy), tensor(size)
    p = agrpo.timestep_probs(traj, size, follow)
    acted = torch.stack([(traj.step_of == t).any(dim=1) for t in range(m)], dim=1)
    alive = acted & (size > 0)[:, None]
    assert torch.allclose(mean_weights(p, n), alive.double(), atol=1e-9)
    assert (p >= 0).all() and p.sum().item() == pytest.approx(float(alive.any()))
    for offset, _ in pieces(p, n):
        rows, steps, w = agrpo.sample_timesteps(p, n, offset)
        assert len(set(zip(rows.tolist(), steps.tolist()))) == len(rows) <= n
        assert (w < 1 + alive.sum() / (n * 0.1) + 1e-9).all()


def test_points_are_evenly_spaced_and_equal_draws_merged():
    """p = 0.5, 0.2 | 0.3, 0: the CDF has its edges at 0.5, 0.7 and 1, across the rows."""
    p = tensor([[0.5, 0.2], [0.3, 0.0]])
    rows, steps, w = agrpo.sample_timesteps(p, 4, 0.7)          # points .175 .425 .675 .925
    assert rows.tolist() == [0, 0, 1] and steps.tolist() == [0, 1, 0]
    assert w.tolist() == pytest.approx([2 / (4 * 0.5), 1 / (4 * 0.2), 1 / (4 * 0.3)])
    # As many points as pairs, all alike: each exactly once with weight 1, the full sum.
    p = torch.full((2, 7), 1 / 14)
    rows, steps, w = agrpo.sample_timesteps(p, 14, 0.3)
    assert (7 * rows + steps).tolist() == list(range(14)) and torch.allclose(w, torch.ones(14))
    assert agrpo.sample_timesteps(p, 1, 1 - 2 ** -53)[1] == 6   # nor does the end fall off


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
    H = torch.special.entr(distribution(logits, traj.how)).sum(dim=1).expand(traj.o.shape)
    assert torch.allclose(traj.entropy[traj.step_of == 0], H[traj.step_of == 0])


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
    assert not ratio.requires_grad                              # a number to look at, only


@pytest.mark.parametrize("logp, old, ref, k3", [
    (math.log(0.5), math.log(0.5), math.log(0.25), 0.5 + math.log(2) - 1),      # rho = 1
    (math.log(0.4), math.log(0.5), math.log(0.25), 0.5 - 0.8 * (1 - math.log(1.6))),
    # Far off policy k3 = e^99, and a rho of 0 times that: rho k3 is 1 all the same.
    (-100.0, -1.0, -1.0, 1.0),
    (-1.0, -1.0, -100.0, 98.0),
])
def test_the_kl_by_hand(logp, old, ref, k3):
    """rho (e^d - d - 1), d = ref - logp; its slope rho (logp - ref), finite in float32 too."""
    for dtype in (torch.float64, torch.float32):
        x = tensor(logp, dtype=dtype, requires_grad=True)
        kl = agrpo.kl_to_reference(x, tensor(old, dtype=dtype), tensor(ref, dtype=dtype))
        kl.backward()
        slope = math.exp(logp - old) * (logp - ref)
        assert (kl.item(), x.grad.item()) == pytest.approx((k3, slope), rel=1e-5, abs=1e-6)


# --- § 6 Update: the gradient is the policy gradient ------------------------------------------

@pytest.mark.parametrize("name", EXACT)
def test_the_mean_of_the_estimator_is_the_policy_gradient(name):
    """All trajectories as one batch, in proportion to their probability. The draws' mean is
    that of their weights, as rho = 1 and J is linear in w."""
    model, traj, p = witness(*EXACT[name])
    r = reward(traj.o)
    A, want = r * p.detach(), model.gradient(of=(p * r).sum())
    rows, steps, once = all_pairs(traj)
    for follow, n in itertools.product(agrpo.FOLLOW, (1, 40)):
        w = mean_weights(agrpo.timestep_probs(traj, A.abs(), follow), n)[rows, steps]
        agrpo.add_gradient(model, traj, A, (rows, steps, w), micro_batch=1000)
        assert same(total(model, traj), want), (follow, n)
    for more in (dict(micro_batch=7), dict(ratio_per="step", micro_batch=1000)):
        agrpo.add_gradient(model, traj, A, (rows, steps, once), **more)
        assert same(total(model, traj), want)                   # every step, once


@pytest.mark.parametrize("C, G, k", [(2, 2, 0.5), (2, 2, 1.0), (1, 3, 0.1), (1, 3, 2.0)])
def test_over_all_groups_the_mean_is_g_minus_one_over_g_of_the_gradient(C, G, k):
    """§ 3 to § 6 as training calls them: every group that there can be, and every offset."""
    model, traj, p = witness(Decoding(C, C, C, "max_prob"), grid=14)
    r, cfg = reward(traj.o), agrpo.Config(k=k)
    for group in map(list, itertools.product(range(len(p)), repeat=G)):
        batch, A = take(traj, group), agrpo.group_advantages(r[group], G)
        n = max(1, round(k * (A != 0).sum().item()))            # pairs
        for offset, length in pieces(agrpo.timestep_probs(batch, A.abs()), n):
            weight = p.detach()[group].prod() * length / G
            agrpo.policy_gradient(model, batch, A * weight, cfg, lambda *_: tensor([[offset]]))
    found = total(model, batch)
    assert same(found, (G - 1) / G * model.gradient(of=(p * r).sum()))


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
    model, cfg = Toy(4), agrpo.Config(k=4, follow="uniform")    # n = all pairs: each once
    traj = sample(model, 8, Decoding(4, 4, 4))
    A = agrpo.group_advantages(tensor([1.0, 0.0, 1.0, 0.0] + [0.3] * 4), G=4)
    model.asked.clear()
    agrpo.policy_gradient(model, traj, A, cfg, halves)
    assert sum(rows for rows, _ in model.asked) == 16           # 4 rows x 4 steps
    found = model.gradient()
    agrpo.add_gradient(model, traj, A, all_pairs(traj))
    assert same(found, model.gradient())                        # they count in the mean
    # But they have a KL. Each pair is scored by the policy and by the reference.
    model.asked.clear()
    agrpo.policy_gradient(model, traj, A, replace(cfg, beta=0.1), halves)
    assert sum(rows for rows, _ in model.asked) == 2 * 32


@pytest.mark.parametrize("settings", [
    dict(eps=0.01), dict(ratio_per="step"), dict(beta=0.5), dict(micro_batch=1)], ids=str)
def test_the_gradient_is_that_of_its_settings(settings):
    """n = all pairs, each once, with parameters that have moved: so every setting counts."""
    model, cfg = Toy(4), agrpo.Config(k=2, follow="uniform", **settings)
    traj, A = sample(model, 6, Decoding(4, 2, 4)), tensor([1.0, -2.0, 0.5, 3.0, -1.0, 1.5])
    nudge(model, 0.5)
    seen = agrpo.policy_gradient(model, traj, A, cfg, halves)
    found = model.gradient()
    agrpo.add_gradient(model, traj, A, all_pairs(traj), **settings)
    assert same(found, model.gradient(), 1e-12)
    default = agrpo.add_gradient(model, traj, A, all_pairs(traj))
    alike = "micro_batch" in settings                           # which changes no result
    assert same(found, model.gradient(), 1e-3) == alike == (seen.forwards == 12)
    assert default.ratio.shape == (12, 2) and (default.ratio - 1).abs().max() > 0.01
    if "ratio_per" in settings:        # the action's ratio is the product of its tokens'
        assert torch.allclose(seen.ratio, default.ratio.prod(dim=1, keepdim=True))
        with pytest.raises(ValueError, match="^ratio_per tokn is unknown: choose token or "):
            agrpo.policy_gradient(model, traj, A, replace(cfg, ratio_per="tokn"), halves)


def test_accumulation_in_any_micro_batch_is_one_big_batch():
    """And no forward pass mixes blocks: a policy may see each differently."""
    model, A, grads = Toy(4), torch.arange(12) - 5, []

    def within(ids, mask, positions, block, forward=model.forward):
        assert positions.min() >= block.start == block.end - 2 and positions.max() < block.end
        return forward(ids, mask, positions, block)
    model.forward = within
    traj = sample(model, 12, Decoding(4, 4, 2, top_k=2))
    pairs = agrpo.sample_timesteps(agrpo.timestep_probs(traj, A.abs()), 36, 0.3)
    for n in (1000, 1, 5, 7):
        seen = agrpo.add_gradient(model, traj, A, pairs, micro_batch=n)
        assert len(seen.ratio) == len(pairs[0]) and seen.forwards >= len(pairs[0]) / n
        grads.append(model.gradient())
        assert same(grads[-1], grads[0], 1e-12)
    assert agrpo.add_gradient(model, traj, A, [x[:0] for x in pairs]).forwards == 0


@pytest.mark.parametrize("m", [2, 1])                           # one token a step, or two
def test_the_kl_term_is_the_kl_and_has_its_gradient(m):
    """-beta KL(pi || ref), also when pi has left what the rollouts were drawn from: in each
    state, E_pi of log(pi / ref), and its gradient E_pi of log(pi / ref) grad log pi."""
    _, traj, p = witness(Decoding(2, m, 2), grid=14)
    model, other, (rows, steps, _) = Toy(2, seed=1), Toy(2, seed=9), all_pairs(traj)
    w = p.detach()[rows]
    for _ in range(2):
        seen = agrpo.add_gradient(model, traj, 0 * p.detach(), (rows, steps, w), beta=0.3)
        got = total(model, traj)
        logp, logp_old = agrpo.step_logprobs(model, traj, rows, steps)          # (N, W)
        logp_ref, _ = agrpo.step_logprobs(other, traj, rows, steps)
        rho, log_ratio = (logp - logp_old).exp().detach(), (logp - logp_ref).detach()
        want = -0.3 * model.gradient(of=(w @ (rho * log_ratio * logp)).sum())
        assert same(got, want) and same(w @ seen.kl, w @ (rho * log_ratio))     # and is logged
        nudge(model, 0.3)


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
    """Nor does one that is zero, not even by momentum."""
    p, frozen = (torch.nn.Parameter(torch.ones(2), requires_grad=x) for x in (True, False))
    optimizer, before = torch.optim.AdamW([p], lr=0.1), [1.0, 1.0]
    for grad, norm in (([1.0, math.nan], math.nan), ([3.0, 4.0], 5.0), ([0.0, 0.0], 0.0)):
        p.grad = tensor(grad)                                   # an iterator, as parameters()
        found = agrpo.optimizer_step(iter([p, frozen]), optimizer, 1.0)
        assert found == pytest.approx(norm, nan_ok=True) and frozen.grad is None
        assert (p.tolist() == before) == (norm != 5.0)
        before = p.tolist()


def as_processes(monkeypatch, n, work):
    """work(index) as each of n processes does it -> their results.

    Everybody works twice. In the first round `gather` writes down what each has given, in the
    second it hands all of that to everybody.
    """
    given = [[] for _ in range(n)]
    for second in (False, True):
        results = []
        for index in range(n):
            heard = zip(*given)
            gather = (lambda value: list(next(heard))) if second else (
                lambda value: given[index].append(value) or [value] * n)
            monkeypatch.setattr(agrpo, "processes", lambda: (index, n))
            monkeypatch.setattr(agrpo, "gather", gather)
            results.append(work(index))
    return results


def test_any_number_of_processes_draws_the_same_pairs(monkeypatch):
    """One CDF over the rows of all, in their order; each scores the pairs of its own rows."""
    model, cfg, real = Toy(4), agrpo.Config(k=0.7), agrpo.add_gradient
    traj, offsets = sample(model, 12, Decoding(4, 4, 2)), torch.rand(12, 1)
    A = agrpo.group_advantages(tensor([1, 0, 2, 1, 1, 1, 5, 0, 0, 2, 2, 2.0]), G=3)
    monkeypatch.setattr(agrpo, "add_gradient", lambda policy, traj, A, pairs, *more: (
        pairs, real(policy, traj, A, pairs, *more)))

    def work(index, n):
        mine = range(12)[index * 12 // n:(index + 1) * 12 // n]
        (rows, steps, w), _ = agrpo.policy_gradient(
            model, take(traj, list(mine)), A[mine], cfg, lambda *shape: offsets[mine])
        return torch.stack([rows + mine.start, steps, w], dim=1), model.gradient()
    want, whole = work(0, 1)
    assert len(want) == round(0.7 * 6) == 4                     # two groups of four are dead
    for n in (2, 3, 4):
        pairs, gradients = zip(*as_processes(monkeypatch, n, functools.partial(work, n=n)))
        assert torch.allclose(torch.cat(pairs), want, atol=1e-12)
        assert same(sum(gradients) / n, whole, 1e-12)           # the mean over processes


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
    monkeypatch.setattr(tasks, "TASKS", dict(toy=tasks.Task("toy", prompt_of, grade)))


def watched(cfg, first=0):
    """What agrpo.train hands to the gradient, each pass: traj, A, the offsets. And its log."""
    policy, seen = Toy(cfg.C), []

    def gradient(policy, traj, A, cfg, rand):
        seen.append((traj, A, rand(len(A), 1)))
        return agrpo.add_gradient(policy, traj, A, all_pairs(traj))
    params = list(policy.parameters())
    optimizer = torch.optim.SGD(params, lr=0.0)
    log = list(agrpo.train(policy, DATA, cfg, params, optimizer, first, gradient))
    return seen, log


def test_every_row_has_draws_of_its_own(toy_task, monkeypatch):
    """Seeds, updates, places of one update (which may hold one problem), copies; rollouts,
    the timesteps of each pass, evaluation: no two share a key, and so no random number."""
    keys, row_random = [], agrpo.row_random
    monkeypatch.setattr(agrpo, "row_random", lambda new: keys.extend(new) or row_random(new))
    for seed in (0, 1):
        cfg = replace(TOY, seed=seed, mu=2)                     # 3 problems at 6 places
        watched(cfg)
        agrpo.evaluate(Toy(4), DATA, cfg, cfg.how)
    assert len(keys) == 2 * (2 * 24 * (1 + 2) + 3) == len(set(keys))
    drawn = row_random(keys)(len(keys), 1)
    assert len(drawn.unique()) == len(keys) and ((0 <= drawn) & (drawn < 1)).all()


def test_advantages_belong_to_their_rows(toy_task):
    """Rollouts come in batches of five rows; each row's advantage is still its own group's."""
    asked = [DATA[i] for i in agrpo.questions(3, 6, 0, 0) for _ in range(4)]
    for std in (False, True):
        (traj, A, _), *_ = watched(replace(TOY, divide_by_std=std))[0]
        assert traj.q[:, 0].tolist() == [x["want"] for x in asked]      # so is its prompt
        r = [tasks.grade("toy", *pair).reward for pair in zip(Toy(4).decode(traj.o), asked)]
        assert torch.allclose(A, agrpo.group_advantages(tensor(r), 4, std))


def test_processes_share_the_questions_and_draw_what_one_would(toy_task, monkeypatch):
    """Also a run that goes on: an update's numbers depend on nothing that ran before."""
    (one, second), (again,) = watched(TOY)[0], watched(TOY, first=1)[0]
    assert torch.equal(second[0].o, again[0].o) and not torch.equal(one[0].o, again[0].o)
    assert torch.equal(second[2], again[2])
    answers = lambda *_: [g.parsed for g in agrpo.evaluate(Toy(4), DATA, TOY, TOY.how)]
    every = answers()
    for n in (2, 3):
        shares = as_processes(monkeypatch, n, lambda index: watched(TOY)[0][0])
        assert torch.equal(torch.cat([traj.o for traj, *_ in shares]), one[0].o)
        assert torch.equal(torch.cat([A for _, A, _ in shares]), one[1])
        assert as_processes(monkeypatch, n, answers) == [every] * n


def test_learning_on_the_toy_raises_the_expected_reward(toy_task):
    cfg = replace(TOY, updates=40, lr=0.05, questions=12, G=8, rollout_batch=512)
    policy, data = Toy(cfg.C), [dict(want=A_)] * 300
    params = list(policy.parameters())
    right = lambda: mean(g.correct for g in agrpo.evaluate(policy, data, cfg, cfg.how, 300))
    before = right()
    log = list(agrpo.train(policy, data, cfg, params, torch.optim.Adam(params)))
    assert before < 0.6 and right() > 0.95
    assert mean(g.reward for g in log[-1].grades) > mean(g.reward for g in log[0].grades)
    assert (log[0].seen[0].ratio == 1).all() and [now.number for now in log] == [*range(1, 41)]
    assert log[0].texts == policy.decode(log[0].traj.o)


def test_every_epoch_asks_every_question_once_in_a_new_order():
    first, second = (list(agrpo.questions(7, 7, epoch, 0)) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    both = [i for update in (0, 1) for i in agrpo.questions(7, 5, update, 0)]
    assert both == first + second[:3] and first != list(agrpo.questions(7, 7, 0, 1))


def test_warm_up_then_cosine(toy_task):
    cfg = agrpo.Config(updates=200, mu=2, lr=1.0)
    rates = [agrpo.learning_rate(cfg, step) for step in range(400)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[202] == pytest.approx(0.5, abs=0.01)
    assert 0 < rates[-1] < 1e-3 and rates[3:] == sorted(rates[3:], reverse=True)
    cfg, (_, log) = replace(TOY, mu=2), watched(replace(TOY, mu=2))     # each pass is a step
    assert [now.lr for now in log] == [agrpo.learning_rate(cfg, step) for step in (1, 3)]
    assert [len(now.norms) for now in log] == [2, 2] == [len(now.seen) for now in log]
