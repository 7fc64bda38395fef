"""What lab/run.py looks at while agrpo.train learns: the ratio, the numbers of the log, the
rows of its table of evaluations.
"""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import policy_of, prompts, shelf
from torch import tensor

import agrpo
import run
import tasks

EOS, A_ = 1, 2


def test_before_the_first_step_a_ratio_is_one_up_to_rounding(capsys):
    """In 16 bits that is more, for a single token much more: so there the mean counts."""
    def passes(*ratio, dtype):
        try:
            run.check_ratio(SimpleNamespace(dtype=dtype), tensor(ratio))
        except tasks.TaskError:
            return False
        return True
    single, half = (partial(passes, dtype=x) for x in (torch.float32, torch.bfloat16))
    assert single(1, 1.0005) and not single(1, 1.002) and not single(1, float("nan"))
    assert half(1, 1, 1, 1.3) and not half(1.2, 0.8) and not half(1, float("nan"))
    assert "warning" not in capsys.readouterr().out
    assert half(*[1] * 9, 1.9) and "more than rounding" in capsys.readouterr().out


def test_the_ratio_is_looked_at_when_there_first_is_one(monkeypatch, capsys):
    """An update of dead groups alone has no pair, and moves nothing: the next one is first."""
    seen = [tensor([]), tensor([1.0, 1.00001]), tensor([1.0, 3.0])]
    monkeypatch.setattr(agrpo, "policy_gradient", lambda *batch: agrpo.Seen(
        seen.pop(0), tensor([]), tensor([]), 0))
    gradient = run.with_ratio_checked(SimpleNamespace(dtype=torch.float32))
    said = []
    for _ in range(3):
        gradient()
        said.append(capsys.readouterr().out.count("max|ratio - 1|"))
    assert said == [0, 1, 0]


def test_a_policy_with_dropout_is_found_before_it_learns():
    """Rollout and loss would be two functions, and the ratio compares the two."""
    policy = policy_of(shelf["base"])
    logits = policy.logits
    policy.logits = lambda *x: torch.nn.functional.dropout(logits(*x), 0.1)
    q, q_mask = prompts(policy)
    traj = agrpo.rollout(policy, q, q_mask, agrpo.Decoding(C=8, m=4, block_length=4))
    cfg, rand = run.parse(["--m", "4", "--C", "8"]), lambda *shape: torch.rand(*shape)
    with pytest.raises(tasks.TaskError, match="ratio - 1.*rollout and loss disagree"):
        run.with_ratio_checked(policy)(policy, traj, tensor([1.0, -1.0]), cfg, rand)


def test_the_numbers_of_the_log_by_hand():
    """Two groups of two, the second dead; one row ended early; three of four ratios clipped:
    0.5 is where A < 0, and 1.5 where A > 0. Two passes: their pairs and forwards together."""
    how = agrpo.Decoding(C=2, m=2, block_length=2)
    o = torch.full((4, 2), A_)
    o[:2, 1] = EOS
    step_of = tensor([[0, 1], [0, 1], [0, 1], [0, 2]])
    entropy = tensor([[1.0, 2.0]]).expand(4, 2)
    traj = agrpo.Trajectory(o, o, o, step_of, 0 * entropy, entropy, None, how)
    grades = [tasks.Grade(r, r > 2, 0.5, "", "", {}) for r in (4.0, 1.0, 1.0, 1.0)]
    A = tensor([1.5, 0.0, 0.0, 0.0])                            # one A of 0 is no dead group
    better, kl = tensor([[1.5], [1.5]]), tensor([[0.5], [0.0]])
    seen = [agrpo.Seen(tensor([[0.5], [1.5]]), better, kl, 1),
            agrpo.Seen(tensor([[0.5], [0.5]]), -better, kl, 2)]
    done = agrpo.Update(7, traj, ["?"] * 4, grades, A, seen, 0.1, [2.0, 3.0], (4.0, 5.0))
    policy = SimpleNamespace(fill_ids={EOS})
    assert run.statistics(policy, done, run.Run(C=2, m=2, G=2)) == dict(
        update=7, reward=7 / 4, correct=1 / 4, format=0.5, dead_groups=0.5, length=6 / 4,
        entropy=pytest.approx(10 / 7), late_eos=pytest.approx(2 / 3), kl=0.25, clip_low=2 / 4,
        clip_high=1 / 4, ratio_min=0.5, ratio_max=1.5, pairs=4, forwards=3, lr=0.1,
        grad_norm=3.0, rollout_seconds=4.0, loss_seconds=5.0)


def test_evaluation_is_as_the_rollouts_sample_and_greedy_max_prob():
    cfg = run.parse(["--device", "cpu"])
    first, *greedy = cfg.cells()
    assert first == cfg.how and [how.m for how in greedy] == [12, 6, 4, 3, 2, 1]
    assert {(how.temperature, how.unmasking) for how in greedy} == {(0.0, "max_prob")}
