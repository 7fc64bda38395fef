"""Policies that see less: the gradient is exact for each of them, and each sees what it says.

On doubles of LLaDA's code (blocks that take a past), of dLLM's A2D-Qwen3 (attention through
transformers' interface) and of Dream's (hands a cache on), loaded by --policy as a user does.
"""
import io
import itertools
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from test_models import (A2D, CODE, QWEN, add_gradient, bytes_kept, difference_quotient, each,
                         folder_of, own_code_goes_elsewhere, policy_of, prompts, shelf, trained)

import agrpo
from lab import policies

FILE = Path(policies.__file__)
ALL = ("BlockCausal", "FrozenBlockCausal", "FrozenContext")
TWO_BLOCKS = agrpo.Decoding(C=8, m=4, block_length=4)
every = pytest.mark.parametrize("name", ALL)


def seeing(name, model, *flags, exact=False, **more):
    """The policy of that name; exact: in float64, norms too (Qwen3's own work in float32)."""
    policy = policy_of(model, "--policy", f"{FILE}:{name}", *flags, **more)
    if exact:
        for module in policy.model.modules():
            for at, part in list(module.named_children()):
                if type(part).__name__ == "Qwen3RMSNorm":
                    norm = torch.nn.RMSNorm(len(part.weight), part.variance_epsilon)
                    setattr(module, at, norm)
        policy.model.double()
    return policy


def half_written(policy, rows=2, shown=(0, 2)):
    """A prompt of 9 (row 1: of 5), a block of 4 written, one half written, one masked."""
    q, q_mask = prompts(policy)
    torch.manual_seed(3)
    o = torch.randint(20, 60, (2, 12))
    o[:, 4:] = policy.mask_id
    o[:, [4 + i for i in shown]] = 33
    ids, mask = torch.cat([q, o], dim=1), torch.cat([q_mask, torch.ones_like(o)], dim=1)
    at = torch.arange(13, 17).expand(2, -1)
    return ids[:rows], mask[:rows], at[:rows], agrpo.Block(13, 17, {})


# --- exact ------------------------------------------------------------------------------------

@every
@each("llada", "a2d", "dream")
def test_the_ratio_is_one_and_every_adapter_learns(kind, name, shelf):
    policy = seeing(name, shelf[kind], exact=True)
    _, seen = add_gradient(policy, TWO_BLOCKS)
    assert seen.ratio.numel() == 16 and (seen.ratio - 1).abs().max() < 1e-12
    assert all(p.grad.abs().max() > 0 for p in trained(policy).values())


@every
@each("llada", "a2d", "dream")
def test_the_gradient_is_that_of_the_policy(kind, name, shelf):
    """At the last step: the block half written, the context with gradients of its own."""
    policy = seeing(name, shelf[kind], exact=True)
    quotient, slope = difference_quotient(policy, TWO_BLOCKS, step=3)
    assert slope == pytest.approx(quotient, rel=1e-6)


@every
@each("llada", "a2d", "dream")
def test_recomputed_activations_and_a_reference_change_no_gradient(kind, name, shelf):
    """With beta, the reference is read between forward and backward: it must leave no trace."""
    grads, kept = [], []
    for flags in ([], ["--recompute"]):
        policy = seeing(name, shelf[kind], *flags)
        kept.append(bytes_kept(lambda: add_gradient(policy, TWO_BLOCKS, beta=0.1)))
        grads.append([p.grad for p in trained(policy).values()])
    assert kept[1] < 0.7 * kept[0]
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@every
@each("llada", "a2d", "dream")
def test_rows_that_end_early(kind, name, shelf):
    """They leave the batch, and what is kept of the context belongs to the rows that stay."""
    policy = seeing(name, shelf[kind])
    head = policy.model.get_output_embeddings()
    likely = torch.zeros(len(head.weight)).index_fill(0, torch.tensor(policy.eos_id), 5.5)
    head.register_forward_hook(lambda layer, args, out: out + likely)
    q, q_mask = (x.repeat(4, 1) for x in prompts(policy))
    how = agrpo.Decoding(C=8, m=8, block_length=2)
    traj = agrpo.rollout(policy, q, q_mask, how, agrpo.row_random([(0, i) for i in range(8)]))
    steps_taken = (traj.step_of < how.m).sum(dim=1)
    assert 2 <= steps_taken.min() < steps_taken.max(), steps_taken
    rows, steps = (agrpo.timestep_probs(traj, "uniform") > 0).nonzero().unbind(1)
    seen = agrpo.add_gradient(policy, traj, torch.ones(8), (rows, steps, torch.ones(len(rows))))
    assert len(rows) == steps_taken.sum() and (seen.ratio - 1).abs().max() < 1e-5


@each("llada", "a2d")
def test_in_16_bits_the_ratio_stays_near_one(kind, shelf):
    policy = seeing("FrozenContext", shelf[kind], "--dtype", "bfloat16")
    _, seen = add_gradient(policy, TWO_BLOCKS)
    assert (seen.ratio - 1).abs().max() < 1e-3


# --- what each sees ---------------------------------------------------------------------------

@torch.no_grad()
def test_block_causal_is_the_mask_written_by_hand(shelf):
    """Against the model itself on the whole text, with a mask from two loops."""
    policy = seeing("BlockCausal", shelf["a2d"])
    ids, mask, at, block = half_written(policy)
    L = ids.shape[1]
    by_hand = torch.zeros(2, 1, L, L, dtype=torch.bool)
    for row in range(2):
        for i in range(L):
            for j in range(L):
                # The answer begins at 9: blocks 9-12, 13-16, 17-20; the prompt's are 1-4, 5-8.
                no_later = (j - 9) // 4 <= (i - 9) // 4
                by_hand[row, 0, i, j] = (no_later and mask[row, j] == 1) or i == j
    policy.positions = at
    expected = policy.model(input_ids=ids, attention_mask=by_hand).logits
    assert (policy(ids, mask, at, block) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shift", ["0", "1"])
@each("llada", "a2d", "dream")
@torch.no_grad()
def test_frozen_block_causal_is_block_causal(kind, shift, shelf):
    """Also where position i is predicted at i - 1, for a block's first in the block before."""
    slow, fast = (seeing(name, shelf[kind], "--shift", shift) for name in ALL[:2])
    ids, mask, at, block = half_written(slow)
    expected = slow(ids, mask, at, block)
    found = [fast(ids, mask, at, block) for _ in range(2)]      # then from what was kept
    assert block.kept and all((x - expected).abs().max() < 1e-5 for x in found)
    other = ids.clone()
    other[:, 17:] = 40                               # after the block nothing is seen
    assert torch.equal(fast(other, mask, at, agrpo.Block(13, 17, {})), found[0])


@pytest.mark.parametrize("shift", ["0", "1"])
@each("llada", "a2d", "dream")
@torch.no_grad()
def test_frozen_context_is_the_plain_policy_where_the_block_is_masked(kind, shift, shelf):
    plain = policy_of(shelf[kind], "--shift", shift)
    frozen = seeing("FrozenContext", shelf[kind], "--shift", shift)
    ids, mask, at, block = half_written(plain, shown=())
    gap = plain(ids, mask, at, block) - frozen(ids, mask, at, block)
    assert gap.abs().max() < 1e-5
    half, *rest = half_written(plain)
    gap = plain(half, *rest) - frozen(half, mask, at, block)
    assert gap.abs().max() > 1e-2                    # later it is another policy


@torch.no_grad()
def test_frozen_context_sees_what_is_in_the_block_and_around_it(shelf):
    policy = seeing("FrozenContext", shelf["llada"])
    ids, mask, at, _ = half_written(policy, rows=1)
    before = policy(ids, mask, at, agrpo.Block(13, 17, {}))
    for place in (2, 10, 13, 15, 19):                # prompt, block before, this one, after it
        other = ids.clone()
        other[0, place] = 45
        gap = (policy(other, mask, at, agrpo.Block(13, 17, {})) - before).abs()
        assert gap.max() > 1e-3, place


@pytest.mark.parametrize("kind, name", [*itertools.product(("llada", "a2d", "dream"), ALL),
                                        ("deaf", "FrozenContext")])
@torch.no_grad()
def test_padding_changes_nothing(kind, name, shelf):
    """For a model that ignores its mask, as LLaDA's older code: because it gets no padding."""
    policy = seeing(name, shelf[kind])
    assert policy.ignores_mask == (kind == "deaf")
    ids, mask, at, block = half_written(policy)
    both = policy(ids, mask, at, block)
    alone = policy(ids[1:, 4:], mask[1:, 4:], at[1:] - 4, agrpo.Block(9, 13, {}))
    assert (both[1] - alone[0]).abs().max() < 1e-5


# --- from the command line --------------------------------------------------------------------

@every
def test_the_limits_are_said_where_one_is_chosen(name, shelf):
    policy = seeing(name, shelf["llada"])
    assert getattr(policies, name).note in policy.notes[-1] and "evaluate" in policy.notes[-1]
    assert policy.block_causal == (name != "FrozenContext")


@every
def test_a_model_that_cannot_be_read_so_is_refused(name, shelf):
    with pytest.raises(agrpo.UserError, match=f"{name} cannot read this model"):
        seeing(name, shelf["modernbert"], trust=False)


def test_a_model_that_ignores_what_it_must_not_see_is_refused(shelf, tmp_path, monkeypatch):
    with pytest.raises(agrpo.UserError, match="FrozenBlockCausal reads this model wrongly"):
        seeing("FrozenBlockCausal", shelf["deaf"])
    deaf = A2D.replace("attention_mask=attention_mask", "attention_mask=attention_mask | True")
    monkeypatch.setitem(CODE, "deaf4d", (deaf, *CODE["a2d"][1:]))
    folder = folder_of(tmp_path / "deaf4d", "deaf4d", **QWEN)
    with pytest.raises(agrpo.UserError, match="BlockCausal reads this model wrongly"):
        seeing("BlockCausal", folder)


def test_a_stopped_run_goes_on_to_the_same_numbers(shelf, tmp_path, monkeypatch):
    def run(out, stop_after=None):
        def console(now, *rest):
            if now["update"] == stop_after:
                raise KeyboardInterrupt
        monkeypatch.setattr(agrpo, "console", console)
        argv = ("--task countdown --trust_remote_code --device cpu --max_number 9 --C 8 --m 4 "
                "--k 2 --block_length 4 --updates 2 --questions 2 --G 4 --eval_n 4 --steps 4 "
                "--save_every 1").split()
        argv += ["--model", shelf["llada"], "--policy", f"{FILE}:FrozenContext"]
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()):
            code = agrpo.main(argv + ["--out", str(tmp_path / out)])
        return code, said.getvalue()

    # Random weights solve nothing: a reward of the text's letters keeps groups alive.
    grade = agrpo.tasks.Grade
    monkeypatch.setattr(agrpo.tasks, "grade_batch", lambda name, texts, examples: [
        grade(len(text) % 5 / 4, False, 0.0, "", text, {}) for text in texts])
    code, said = run("whole")
    assert code == 0 and policies.FrozenContext.note[:30] in said
    assert run("parts", stop_after=2)[0] == 130
    code, said = run("parts")
    assert code == 0 and "going on after update 1" in said
    a, b = ([json.loads(line) for line in open(tmp_path / out / "metrics.jsonl")]
            for out in ("whole", "parts"))
    assert [x["grad_norm"] for x in a] == [x["grad_norm"] for x in b] and a[0]["grad_norm"] > 0
