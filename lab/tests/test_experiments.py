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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo
import estimators
import experiments
import figures

MASK, EOS, A_, B_ = 0, 1, 2, 3
C, P, V = 3, 2, 4
TEXTS = torch.cartesian_prod(*[torch.tensor([EOS, A_, B_])] * C)                # (27, C)
ORDERS = {3: torch.tensor(list(itertools.permutations(range(3)))),              # m -> step_of
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
        hidden = torch.tanh(self.a[torch.arange(ids.shape[1]), ids].sum(dim=1))
        every = torch.einsum("nd,ldv->nlv", hidden, self.b)
        return every[torch.arange(len(ids))[:, None], positions]


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
    how = agrpo.Decoding(C=C, m=m, block_length=C)
    o, step_of = TEXTS.repeat(len(ORDERS[m]), 1), ORDERS[m].repeat_interleave(len(TEXTS), 0)
    B, q = len(o), torch.tensor([[A_, B_]]).expand(len(o), P)
    zeros = torch.zeros(B, C, dtype=torch.float64)
    traj = agrpo.Trajectory(q, torch.ones_like(q), o, step_of, zeros, zeros, None, how)
    logp = zeros
    for t in range(m):
        found, _ = agrpo.step_logprobs(policy, traj, torch.arange(B), torch.full((B,), t))
        where = (step_of == t).nonzero()[:, 1].view(B, -1)
        logp = logp.scatter(1, where, found)
    probability = logp.sum(dim=1).exp() / len(ORDERS[m])
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    J = (probability * torch.tensor([reward(x) for x in o]).double()).sum()
    grads = torch.autograd.grad(J, policy.params)
    A = torch.tensor([reward(x) for x in o]).double() * probability.detach() * B
    traj = traj._replace(logp_old=logp.detach(), entropy=1 - logp.detach())
    return traj, A, torch.cat([g.flatten() for g in grads]) / m


def gradient(policy, estimate):
    """What `estimate` adds to .grad, with the sign of J."""
    for p in policy.params:
        p.grad = None
    estimate()
    return -torch.cat([p.grad.flatten() for p in policy.params])


def config(**more):
    fields = dict(k=2, G=3, eps=0.2, micro_batch=50, follow="surprise", beta=0.0,
                  ratio_per="token")
    return SimpleNamespace(**{**fields, **more})


def close(a, b, tolerance=1e-9):
    return ((a - b).norm() / b.norm()).item() < tolerance


def run(name, policy, traj, A, cfg, rand=agrpo.uniforms):
    return gradient(policy, lambda: estimators.ESTIMATORS[name](policy, traj, A, cfg, rand))


def by_recipe(recipe, policy, traj, A, cfg, rand=agrpo.uniforms, **options):
    states = recipe(policy, traj, A, cfg, rand, **options)
    return gradient(policy, lambda: estimators.score(policy, traj, cfg, states))


# --- On the states of the rollout -------------------------------------------------------------

def test_all_segments_merged_into_none_is_the_exact_gradient():
    policy = Any_()
    traj, A, want = every_trajectory(policy, 3)
    assert close(run("every step", policy, traj, A, config()), want)
    assert close(by_recipe(estimators.step_merge, policy, traj, A, config(), N=3), want)
    assert close(run("EGSPO", policy, traj, A, config(k=3)), want)
    certain = dict(sure=2.0, eos="all")                         # no later token is sure enough
    assert close(by_recipe(estimators.rldf, policy, traj, A, config(k=3), **certain), want)
    everyone = config(k=3, follow="uniform")                # k = m points hit each step once
    assert close(run("AGRPO", policy, traj, A, everyone), want)


def test_one_segment_is_the_one_step_likelihood_without_prompt_masking():
    policy = Any_()
    traj, A, want = every_trajectory(policy, 3)
    merged = by_recipe(estimators.step_merge, policy, traj, A, config(), N=1)
    one = by_recipe(estimators.one_step, policy, traj, A, config(), p_mask=0.0, eos="all")
    assert close(merged, one)
    assert not close(merged, want, 0.1)                         # and it is another gradient


def test_step_merge_and_the_official_length_norm_are_biased():
    policy = Any_()
    traj, A, want = every_trajectory(policy, 3)
    merged = by_recipe(estimators.step_merge, policy, traj, A, config(), N=2)
    assert not close(merged, want, 0.01)
    # So many points that only bias is left.
    many = config(k=500)
    found = {name: run(name, policy, traj, A, many) for name in ("AGRPO", "official")}
    cosine = {name: torch.cosine_similarity(g, want, dim=0) for name, g in found.items()}
    assert cosine["official"] < 0.997 and cosine["AGRPO"] > 0.9999


def test_the_official_length_norm_takes_the_mean_up_to_the_last_text():
    """Of A EOS EOS, written from left to right, step 0 alone counts, and as much as three."""
    policy = Any_()
    traj = one_row([A_, EOS, EOS], [0, 1, 2], prompt=[A_, B_])
    A = torch.ones(1, dtype=torch.float64)
    first = traj.step_of[:, None] == 0
    states = estimators.States(traj.step_of[:, None] >= 0, first * 3 * estimators.unit(traj), A)
    want = gradient(policy, lambda: estimators.score(policy, traj, config(), states))
    now = traj._replace(logp_old=traj.logp_old * 0 + agrpo.step_logprobs(
        policy, traj, torch.tensor([0]), torch.tensor([0]))[0].detach())
    assert close(run("official", policy, now, A, config(k=3)), want)


def test_scored_at_one_is_agrpo_where_the_temperature_is_one():
    policy = Any_()
    traj, A, want = every_trajectory(policy, 3)
    cold = traj._replace(how=replace(traj.how, temperature=0.6))

    def found(name, traj):
        same = agrpo.row_random([(i,) for i in range(len(A))])
        return run(name, policy, traj, A, config(), same)
    assert close(found("scored at T = 1", traj), found("AGRPO", traj))
    assert close(found("scored at T = 1", cold), found("AGRPO", traj))


# --- Likelihoods of the finished text ---------------------------------------------------------

def every_mask(rows, k=1):
    """The draws of `elbo`, k = 1: each l and each ranking of the places once."""
    for l, rank in itertools.product(range(C), itertools.permutations(range(C))):
        draws = iter([torch.full((rows, k), (l + 0.5) / C).double(),
                      (torch.tensor(rank).double() / C).expand(rows, k, C)])
        yield lambda *shape, draws=draws: next(draws)


def mean_elbo(policy, traj, A):
    found = [run("ELBO", policy, traj, A, config(k=1), rand) for rand in every_mask(len(A))]
    return sum(found) / len(found)


def test_elbo_is_exact_at_one_token_a_step_if_the_conditionals_agree():
    """It averages the steps' scores over all orders; the exact gradient takes the orders that
    the text came in. For conditionals of one joint distribution these are the same."""
    for policy, m, exact in ((Joint(), 3, True), (Any_(), 3, False), (Joint(), 1, False)):
        traj, A, want = every_trajectory(policy, m)
        found = mean_elbo(policy, traj, A) * m / C
        assert close(found * C / m, want) == exact


def test_espo_has_the_mean_of_the_elbo():
    policy = Any_()
    traj, A, _ = every_trajectory(policy, 3)
    B, found = len(A), []
    for j, rank in itertools.product(range(C + 1), itertools.permutations(range(C))):
        draws = iter([torch.full((B, 1), (j + 1e-6) / (C + 1)).double(),
                      (torch.tensor(rank).double() / C).expand(B, 1, C)])
        found.append(run("ESPO", policy, traj, A, config(), lambda *shape: next(draws)))
    assert close(sum(found) / len(found), mean_elbo(policy, traj, A))


@pytest.mark.parametrize("name, total", [
    ("one-step", 1), ("wd1", 1), ("coupled", 1), ("ELBO", 1), ("ESPO", 1), ("GDSD", 0.5),
    ("SPG", 1), ("step-merge", 1), ("GDPO", 0.87)])
def test_what_a_token_weighs_on_average(name, total):
    """Of 12 tokens without EOS each counts u, whatever the masks; GDPO's floor loses 13 %."""
    B, length = 3000, 12
    torch.manual_seed(0)
    zeros = torch.zeros(B, length, dtype=torch.float64)
    q = torch.ones(B, 1, dtype=torch.long)
    o, step_of = torch.full((B, length), A_), torch.arange(length).expand(B, length) // 3
    how = agrpo.Decoding(C=length, m=4, block_length=6)
    traj = agrpo.Trajectory(q, q, o, step_of, zeros, zeros, None, how)
    recipe, A = estimators.RECIPES[name], torch.ones(B, dtype=torch.float64)
    batches = 20 if name == "coupled" else 1                # it draws one t for a whole batch
    found = [recipe(Any_, traj, A, config(), agrpo.uniforms) for _ in range(batches)]
    w = sum(states.w.sum(dim=1).mean(dim=0) for states in found) / len(found)
    assert torch.allclose(w * 4 * B, torch.full((length,), total).double(), atol=0.08)
    assert all((states.w.gt(0) <= states.hidden).all() for states in found)  # only masked ones


def test_score_is_the_sum_of_weighted_log_probabilities_token_by_token():
    policy = Any_()
    traj, _, _ = every_trajectory(policy, 3)
    some = [3, 40, 77, 120]
    traj = agrpo.Trajectory(*(None if x is None else x[some] for x in traj[:-1]), traj.how)
    A = torch.tensor([1.0, 0.0, -0.5, 2.0], dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.rand(4, 2, C, generator=draw) < 0.6
    w = hidden * torch.rand(4, 2, C, generator=draw).double()
    states = estimators.States(hidden, w, A)
    policy.rows = 0
    found = gradient(policy, lambda: estimators.score(policy, traj, config(), states))
    assert policy.rows == 3 * 2                                 # the row of A = 0 costs nothing

    def by_hand():
        for b, k, c in itertools.product(range(4), range(2), range(C)):
            x = [MASK if hidden[b, k, i] else int(traj.o[b, i]) for i in range(C)]
            ids, where = torch.tensor([[A_, B_, *x]]), torch.tensor([[P + c]])
            possible = policy(ids, None, where, None)[0, 0, 1:]     # [MASK] is no token
            logp = possible.log_softmax(0)[int(traj.o[b, c]) - 1]
            (-w[b, k, c] * A[b] * logp).backward()
    assert close(found, gradient(policy, by_hand))


def one_row(o, step_of, logp=None, entropy=None, m=3, copies=1, block=None, prompt=(A_,)):
    """A trajectory of rows alike."""
    def rows(values, kind):
        return torch.tensor([values] * copies, dtype=kind)
    width = len(o)
    q = rows(list(prompt), torch.long)
    how = agrpo.Decoding(C=width, m=m, block_length=block or width)
    return agrpo.Trajectory(q, torch.ones_like(q),
                            rows(o, torch.long), rows(step_of, torch.long),
                            rows(logp or [-1.0] * width, torch.float64),
                            rows(entropy or [1.0] * width, torch.float64), None, how)


def test_egspo_takes_the_steps_of_largest_entropy():
    traj = one_row([A_] * 3, [2, 0, 1], entropy=[0.3, 0.1, 0.9])
    states = estimators.egspo(Any_, traj, torch.ones(1), config(k=2), agrpo.uniforms)
    by_step = {tuple(hidden.int().tolist()): w.tolist()
               for hidden, w in zip(states.hidden[0], states.w[0])}
    # Step 1 (the last token) and step 2 (the first), each with weight u n / k = 1/3 * 3/2.
    assert by_step == {(1, 0, 1): [0, 0, 0.5], (1, 0, 0): [0.5, 0, 0]}


def test_rldf_scores_the_step_and_later_tokens_it_is_sure_of():
    traj = one_row([A_] * 3, [2, 0, 1], logp=[-0.1, -0.1, -30.0])   # step 1 is drawn for sure
    states = estimators.rldf(Any_, traj, torch.ones(1), config(k=1), agrpo.uniforms)
    assert states.hidden[0, 0].tolist() == [True, False, True]
    # u m / k = 1: the last token is the step's own, the first a later one, the middle visible.
    for later, w in ((0.7, 1), (0.5, 0)):
        logp = torch.tensor([[[later, 0.9, 0.2]]], dtype=torch.float64).log()
        assert states.weigh(logp, torch.tensor([0]))[0, 0].tolist() == pytest.approx([w, 0, 1])


def test_spg_by_hand():
    traj = one_row([A_] * 4, [0, 0, 1, 1], m=2, copies=2)
    A = torch.tensor([1.0, -1.0], dtype=torch.float64)
    # l = 2 places of four in the first draw, 4 in the second: ranks 0..3 from left to right.
    draws = iter([torch.zeros(2, 2).double(), torch.tensor([[0.3, 0.9]] * 2).double(),
                  (torch.arange(4) / 4).double().expand(2, 2, 4)])
    states = estimators.spg(Any_, traj, A, config(), lambda *shape: next(draws))
    assert states.hidden[1].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    p = torch.tensor([[0.25, 1, 1, 1], [0.25, 0.25, 0.25, 1]]).double()
    w = states.weigh(p.log().expand(2, 2, 4), torch.arange(2)) / estimators.unit(traj)
    lower = torch.tensor([[1.0, 1, 0, 0], [0.5, 0.5, 0.5, 0.5]])               # L / (l K)
    # p^1.5 / tau: token 0 is 1/8 / (1/2) in draw 0 and 1/8 in draw 1; token 1 is 2 and 1/8.
    share = torch.tensor([[2 / 3, 16 / 17, 0, 0], [1 / 3, 1 / 17, 1, 1]])
    assert torch.allclose(w[0].float(), lower)
    assert torch.allclose(w[1].float(), 0.5 * lower + 0.5 * share)             # L / |S| = 1


def test_spg_masks_all_after_its_block_and_scores_only_in_it():
    traj = one_row([A_] * 4, [0, 0, 1, 1], m=2, block=2)
    draws = iter([torch.zeros(1, 2).double(), torch.zeros(1, 2).double(),       # block 0, l = 1
                  (torch.arange(4) / 4).double().expand(1, 2, 4)])
    A = torch.ones(1, dtype=torch.float64)
    states = estimators.spg(Any_, traj, A, config(), lambda *shape: next(draws))
    assert states.hidden[0, 0].int().tolist() == [1, 0, 1, 1]
    w = states.weigh(torch.zeros(1, 2, 4).double(), torch.tensor([0])) / estimators.unit(traj)
    assert w[0, 0].tolist() == [2, 0, 0, 0]                                     # L / (l K)


def test_wd1_and_tracerl_change_the_advantages():
    traj = one_row([A_] * 3, [0, 1, 2], copies=3)
    A = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    c = estimators.wd1(Any_, traj, A, config(), agrpo.uniforms).A
    most = 1.5 * (math.e - 1 / math.e) / (math.e + 1 / math.e + 1)
    assert c.tolist() == pytest.approx([most, -most, 0])
    right = torch.tensor([2 / 3, -1 / 3, -1 / 3], dtype=torch.float64)     # one of three right
    std = math.sqrt(2) / 3
    found = estimators.tracerl(Any_, traj, right, config(), agrpo.uniforms).A
    assert found.tolist() == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std])
    easy = torch.tensor([1 / 6] * 5 + [-5 / 6], dtype=torch.float64)   # 83 % right: left out
    traj = one_row([A_] * 3, [0, 1, 2], copies=6)
    assert not estimators.tracerl(Any_, traj, easy, config(G=6), agrpo.uniforms).A.any()


def test_tokens_after_the_first_eos_count_or_not():
    traj = one_row([A_, EOS, B_, EOS], [0, 0, 1, 1], m=2, copies=2)
    assert estimators.counted(Any_, traj, "first")[0].tolist() == [True, True, False, False]
    assert estimators.counted(Any_, traj, "all").all()
    A = torch.ones(2, dtype=torch.float64)
    for name, recipe in estimators.RECIPES.items():
        if name != "EGSPO":            # whole steps, EOS or not
            w = recipe(Any_, traj, A, config(G=2), agrpo.uniforms, eos="first").w
            assert not w[..., 2:].any() and w[..., :2].any(), name


# --- The timestep samplers --------------------------------------------------------------------

def test_every_sampler_weighs_every_pair_one_on_average():
    torch.manual_seed(0)
    p = torch.rand(6, 5, dtype=torch.float64) + 0.2
    p = p / p.sum(dim=1, keepdim=True)
    A = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, -1.5], dtype=torch.float64)
    spreads = {}
    for points in (*estimators.POINTS, "pooled"):
        w = estimators.draw_weights(p, A, 2, points, 2000).view(2000, 6, 5)
        assert not w[:, 2].any()                                # A = 0
        off = (w[:, A != 0].mean(dim=0) - 1).abs()
        assert (off < 6 * w[:, A != 0].std(dim=0) / 2000 ** 0.5 + 1e-9).all(), points
        spreads[points] = w.var(dim=0).mean().item()
    assert spreads["systematic"] < spreads["strata"] < 0.95 * spreads["iid"]


def test_the_gram_matrix_is_that_of_the_pairs_gradients():
    policy = Any_()
    traj, A, _ = every_trajectory(policy, 3)
    some = list(range(0, 162, 20))
    traj = agrpo.Trajectory(*(None if x is None else x[some] for x in traj[:-1]), traj.how)
    A = A[some]
    pairs, gram = estimators.pair_gradients(policy, traj, A)
    whole = run("every step", policy, traj, A, config()) * 3 * len(A)
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
    printed = lab(capsys, name, *small, "--figures", "--out", str(tmp_path / "out"))
    kept = tmp_path / "lab" / "figures" / f"{name}.txt"
    text = kept.read_text()
    assert text == (tmp_path / "out" / f"{name}.txt").read_text()
    assert text.startswith(f"$ bash run.sh lab {name} ") and "seeds [" in text
    table = text.split("\n", 3)[3]
    assert table.strip() in printed and "nan" not in table
    for picture in (tmp_path / "out").glob("*.png"):
        width, height = (int.from_bytes(picture.read_bytes()[i:i + 4], "big") for i in (16, 20))
        assert width == 1660 and height >= 600                  # twice the width GitHub shows
    assert list((tmp_path / "out").glob("*.png")) or name == "cost"


def test_the_same_command_goes_on_where_it_was_stopped(tmp_path, capsys):
    flags = ["order", *SMALL, "--out", str(tmp_path)]
    file = tmp_path / "order.jsonl"
    first = lab(capsys, *flags)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], lines[2][:50]]))     # killed while writing the third
    assert "not run" in lab(capsys, *flags, "--show")
    assert len(file.read_text().splitlines()) == 3              # --show computes nothing
    again = lab(capsys, *flags)
    without_seconds = [[row.rsplit(" ", 1)[0] for row in text.splitlines()]
                       for text in (first, again)]
    assert without_seconds[0] == without_seconds[1]
    size = file.stat().st_size
    lab(capsys, *flags)
    assert file.stat().st_size == size                          # all was there


def test_angles_tell_bias_from_variance():
    """g = (3, 0); two draws (3, 4) and (3, 0), whose mean is 34 degrees off."""
    draws, g = torch.tensor([[3.0, 4.0], [3.0, 0.0]]), torch.tensor([3.0, 0.0])
    e = draws.mean(dim=0)
    part = dict(dot=(e @ g).item(), gg=9.0, ee=(draws[0] @ draws[1]).item(), square=17.0,
                states=2.0, cosine=[0.6, 1.0], batches=2, across=9.0, across_ee=9.0,
                across_gg=9.0)
    found = experiments.angles([part, part])
    assert found["one"] == pytest.approx(0.8) and found["mean"] == pytest.approx(1.0)
    assert found["variance"] == pytest.approx((17 - 9) / 9) and found["states"] == 2
    off = experiments.angles([dict(part, ee=13.0)])             # |E e|^2 = 9 + 4: bias
    assert off["bias"] == pytest.approx(2 / 13 ** 0.5)


def test_directions_multiplies_different_draws(monkeypatch):
    """An estimator that draws 3 g and g in turn, beside the exact one."""
    times = itertools.cycle([3, 1])

    def in_turn(*batch):
        seen = [estimators.every_step(*batch) for _ in range(next(times))]
        return seen[0]
    monkeypatch.setitem(estimators.ESTIMATORS, "in turn", in_turn)
    cfg = agrpo.parse("--m 4 --k 2 --questions 3 --G 4 --device cpu".split())
    found = experiments.directions(cfg, ["every step", "AGRPO", "in turn"], 2, 2)
    exact = experiments.angles([found["every step"]])
    assert exact["one"] == pytest.approx(1) and exact["bias"] < 1e-3 and exact["variance"] == 0
    assert exact["states"] > found["AGRPO"]["states"] > 0
    part, gg = found["in turn"], found["in turn"]["gg"]
    assert part["dot"] == pytest.approx(2 * gg, rel=1e-4)
    assert part["ee"] == pytest.approx(3 * gg, rel=1e-4)
    assert part["square"] == pytest.approx(5 * gg, rel=1e-4)
    assert part["across"] == pytest.approx(2 * part["across_gg"], rel=1e-3)
    assert part["across_ee"] == pytest.approx(4 * part["across_gg"], rel=1e-3)


def test_curves_pools_the_seeds_of_finished_runs(tmp_path, capsys):
    for seed in range(2):
        (tmp_path / f"run{seed}").mkdir()
        evals = [dict(update=u, accuracy=0.1 * (u + seed), m=3) for u in (0, 1, 3)]
        text = json.dumps(dict(task="countdown", eval_n=10, evals=evals))
        (tmp_path / f"run{seed}" / "summary.json").write_text(text)
    folders = [str(tmp_path / f"run{seed}") for seed in range(2)]
    printed = lab(capsys, "curves", *folders, "--out", str(tmp_path))
    assert "5.0% [0.0%, 10.0%] -> 35.0% [30.0%, 40.0%], 2 seed(s)" in printed
    assert (tmp_path / "curves.png").is_file()
    with pytest.raises(agrpo.UserError, match="no summary.json"):
        experiments.main(["curves", str(tmp_path)])


def test_the_menu_names_every_experiment_and_bad_flags_get_a_sentence(capsys):
    assert experiments.main([]) == 0 and experiments.main(["nonsense"]) == 2
    menu = capsys.readouterr().out
    assert all(f"\n  {name} " in menu for name in [*experiments.EXPERIMENTS, "curves"])
    with pytest.raises(SystemExit):
        experiments.main(["compare", "--help"])
    assert "agrpo.py's" in capsys.readouterr().out
    with pytest.raises(agrpo.UserError, match="nonsense"):
        experiments.main(["compare", "--nonsense", "1"])


def test_names_at_the_ends_of_lines_do_not_cover_each_other():
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ax.set(ylim=(0, 1))
    figures.name_ends(ax, [(1, 0.50, "a", "k"), (1, 0.51, "b", "k"), (1, 0.9, "c", "k")], 0.1)
    heights = {text.get_text(): text.xy[1] for text in ax.texts}
    plt.close(fig)
    assert heights["b"] - heights["a"] >= 0.0999 and heights["c"] == pytest.approx(0.9)
