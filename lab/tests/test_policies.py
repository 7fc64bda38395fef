"""What the model sees of the text, all or less: the gradient is exact for each policy, and each
sees what it says.

On doubles of LLaDA's code (blocks that take a past), of dLLM's A2D-Qwen3 (attention through
transformers' interface) and of Dream's (hands a cache on), loaded by --policy as a user does.
"""
import itertools

import pytest
import torch
from conftest import (ROOT, add_gradient, checkpoint, each, main, policy_of, prompts, read,
                      shelf, trained)

import agrpo
import models
import policies
import run
import tasks
from tasks import TaskError

FILE = ROOT / "lab" / "policies.py"
ALL = ("BlockCausal", "FrozenBlockCausal", "FrozenContext")
KINDS = ("llada", "a2d", "dream")
PLAIN = [(kind, "plain") for kind in (*KINDS, "tied", "deaf", "base")]
LORA = dict(llada=14, a2d=14, dream=10, tied=14, deaf=14, base=8)     # linear layers in blocks
less = pytest.mark.parametrize("kind, name", [*itertools.product(KINDS, ALL)])
every = pytest.mark.parametrize("kind, name", [*PLAIN, *itertools.product(KINDS, ALL)])


def seeing(name, kind, *flags, exact=False):
    """The policy of that name; exact: in float64, norms too (Qwen3's own work in float32)."""
    own = () if name == "plain" else ("--policy", f"{FILE}:{name}")
    policy = policy_of(shelf[kind], *own, *flags)
    if exact:
        for module in policy.model.modules():
            for at, part in list(module.named_children()):
                if type(part).__name__ == "Qwen3RMSNorm":
                    norm = torch.nn.RMSNorm(len(part.weight), part.variance_epsilon)
                    setattr(module, at, norm.requires_grad_(False))
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
def test_the_ratio_is_one_and_every_adapter_learns(kind, name):
    exact = kind in KINDS
    policy = seeing(name, kind, exact=exact)
    _, seen = add_gradient(policy)
    assert seen.ratio.numel() == 16
    assert (seen.ratio - 1).abs().max() < (1e-12 if exact else 1e-5)
    # On the blocks' linear layers, shared experts too; not on the head, experts and routers.
    adapters, other = trained(policy), ("head.", "transformer.ff_out", ".experts.", ".gate.")
    assert len(adapters) == 2 * LORA[kind] and all("lora_" in x for x in adapters)
    assert not any(part in x for x in adapters for part in other)
    assert all(p.grad.abs().max() > 0 for p in adapters.values())
    assert f"LoRA on {LORA[kind]} layers" in policy.notes[1]


def difference_quotient(policy, step=3, h=1e-6):
    """Along one direction: how log pi of a step changes, and what the gradient says of it."""
    traj, _ = add_gradient(policy)
    rows = (traj.step_of == step).any(dim=1).nonzero()[:, 0]
    params = list(trained(policy).values())
    for p in params:
        p.grad = None

    def log_pi():
        logp, _ = agrpo.step_logprobs(policy, traj, rows, torch.full_like(rows, step))
        return logp.sum()

    log_pi().backward()
    direction = [torch.randn_like(p) for p in params]
    slope = sum((p.grad * d).sum().item() for p, d in zip(params, direction))
    ends = []
    with torch.no_grad():
        for move in (h, -2 * h):
            for p, d in zip(params, direction):
                p += move * d
            ends.append(log_pi().item())
    return (ends[0] - ends[1]) / (2 * h), slope


@pytest.mark.parametrize("kind, name", [*PLAIN[:3], *itertools.product(KINDS, ALL)])
def test_the_gradient_is_that_of_the_policy(kind, name):
    """At the last step: the block half written, the context with gradients of its own."""
    policy = seeing(name, kind, exact=True)
    quotient, slope = difference_quotient(policy)
    assert slope == pytest.approx(quotient, rel=1e-6)


def test_train_mode_matters_to_the_gradient():
    """Dream's double has LLaDA2's experts, which have no gradient in eval mode, in silence."""
    policy = seeing("plain", "dream", exact=True)
    policy.model.eval()
    quotient, slope = difference_quotient(policy)
    assert slope != pytest.approx(quotient, rel=1e-3)


def bytes_kept(work):
    """For the backward pass, while work() runs."""
    seen = []

    def keep(t):
        seen.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        work()
    return sum(seen)


@every
def test_recomputed_activations_and_a_reference_change_no_gradient(kind, name):
    """With beta, the reference is read between forward and backward: it must leave no trace."""
    grads, kept = [], []
    for flags in ([], ["--recompute"]):
        policy = seeing(name, kind, *flags)
        kept.append(bytes_kept(lambda: add_gradient(policy, beta=0.1)))
        grads.append([p.grad for p in trained(policy).values()])
    assert kept[1] < (0.5 if name == "plain" else 0.7) * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@less
def test_rows_that_end_early(kind, name):
    """They leave the batch, and what is kept of the context belongs to the rows that stay."""
    policy = seeing(name, kind)
    head = policy.model.get_output_embeddings()
    likely = torch.zeros(len(head.weight)).index_fill(0, torch.tensor(policy.eos_id), 5.5)
    head.register_forward_hook(lambda layer, args, out: out + likely)
    how = agrpo.Decoding(C=8, m=8, block_length=2)
    traj, seen = add_gradient(policy, how, copies=4)
    steps_taken = (traj.step_of < how.m).sum(dim=1)
    assert 2 <= steps_taken.min() < steps_taken.max(), steps_taken
    assert len(seen.ratio) == steps_taken.sum() and (seen.ratio - 1).abs().max() < 1e-5


@each("llada", "a2d")
def test_in_16_bits_the_ratio_stays_near_one(kind):
    policy = seeing("FrozenContext", kind, "--dtype", "bfloat16")
    _, seen = add_gradient(policy)
    assert (seen.ratio - 1).abs().max() < 1e-3


# --- what each sees ---------------------------------------------------------------------------

@pytest.mark.parametrize("kind, name", [*PLAIN, *itertools.product(KINDS, ALL),
                                        ("deaf", "FrozenContext")])
@torch.no_grad()
def test_padding_changes_nothing(kind, name):
    """For a model that ignores its mask, as LLaDA's older code: because it gets no padding."""
    policy = seeing(name, kind)
    assert policy.ignores_mask == (kind == "deaf")
    assert ("one length at a time" in policy.notes[0]) == (kind == "deaf")
    ids, mask, at, block = half_written(policy)
    # The padded row first: rows of one length at a time come back in their order.
    both = policy(ids.flip(0), mask.flip(0), at, block)
    alone = policy(ids[1:, 4:], mask[1:, 4:], at[1:] - 4, agrpo.Block(9, 13, {}))
    assert (both[0] - alone[0]).abs().max() < 1e-5


@torch.no_grad()
def test_block_causal_is_the_mask_written_by_hand():
    """Against the model itself on the whole text, with a mask from two loops."""
    policy = seeing("BlockCausal", "a2d")
    ids, mask, at, block = half_written(policy)
    L = ids.shape[1]
    by_hand = torch.zeros(2, 1, L, L, dtype=torch.bool)
    for row, i, j in itertools.product(range(2), range(L), range(L)):
        # The answer begins at 9: blocks 9-12, 13-16, 17-20; the prompt's are 1-4, 5-8.
        no_later = (j - 9) // 4 <= (i - 9) // 4
        by_hand[row, 0, i, j] = (no_later and mask[row, j] == 1) or i == j
    assert torch.equal(policy.visible(mask, block), by_hand)
    logits, read = policy.model(input_ids=ids, attention_mask=by_hand).logits, []
    expected = logits[torch.arange(2)[:, None], at]
    policy.model.get_input_embeddings().register_forward_pre_hook(
        lambda layer, args: read.append(args[0].shape[1]))
    assert (policy(ids, mask, at, block) - expected).abs().max() < 1e-5
    assert read == [17]                              # and nothing after the block


@pytest.mark.parametrize("shift", ["0", "1"])
@each(*KINDS)
@torch.no_grad()
def test_frozen_block_causal_is_block_causal(kind, shift):
    """Also where position i is predicted at i - 1, for a block's first in the block before."""
    slow, fast = (seeing(name, kind, "--shift", shift) for name in ALL[:2])
    ids, mask, at, block = half_written(slow)
    expected, first = slow(ids, mask, at, block), fast(ids, mask, at, block)
    kept = block.kept["around"]
    again = fast(ids, mask, at, block)
    assert all((found - expected).abs().max() < 1e-5 for found in (first, again))
    # Read once, and nothing after the block. A shifted block is read from a token earlier on.
    assert block.kept["around"] is kept and kept[0][0].shape[2] == 13 - int(shift)
    other = ids.clone()
    other[:, 17:] = 40                               # after the block nothing is seen
    assert torch.equal(fast(other, mask, at, agrpo.Block(13, 17, {})), first)


@pytest.mark.parametrize("shift", ["0", "1"])
@each(*KINDS)
@torch.no_grad()
def test_frozen_context_is_the_plain_policy_where_the_block_is_masked(kind, shift):
    plain = seeing("plain", kind, "--shift", shift)
    frozen = seeing("FrozenContext", kind, "--shift", shift)
    ids, mask, at, block = half_written(plain, shown=())
    gap = plain(ids, mask, at, block) - frozen(ids, mask, at, block)
    assert gap.abs().max() < 1e-5
    half, *rest = half_written(plain)
    gap = plain(half, *rest) - frozen(half, mask, at, block)
    assert gap.abs().max() > 1e-2                    # later it is another policy


@torch.no_grad()
def test_frozen_context_sees_what_is_in_the_block_and_around_it():
    policy = seeing("FrozenContext", "llada")
    ids, mask, at, _ = half_written(policy, rows=1)
    before = policy(ids, mask, at, agrpo.Block(13, 17, {}))
    for place in (2, 10, 13, 15, 19):                # prompt, block before, this one, after it
        other = ids.clone()
        other[0, place] = 45
        gap = (policy(other, mask, at, agrpo.Block(13, 17, {})) - before).abs()
        assert gap.max() > 1e-3, place


# --- from the command line --------------------------------------------------------------------

@pytest.mark.parametrize("name", ALL)
def test_the_limits_are_said_and_a_model_that_cannot_be_read_so_is_refused(name):
    policy = seeing(name, "llada")
    assert getattr(policies, name).note in policy.notes[-1] and "evaluate" in policy.notes[-1]
    assert policy.block_causal == (name != "FrozenContext")
    with pytest.raises(TaskError, match=f"{name} cannot read this model"):
        seeing(name, "base")


def test_a_model_that_is_another_function_in_train_mode_is_refused(tmp_path):
    """Whatever its code raises then: a sentence."""
    fast = checkpoint(tmp_path, "a2d", architectures=["Fast_dLLM_QwenForCausalLM"])
    with pytest.raises(TaskError, match="cannot read this model .AttributeError"):
        policy_of(fast, "--policy", f"{FILE}:BlockCausal")


@pytest.mark.parametrize(
    "kind, name", [("deaf", "FrozenBlockCausal"), ("deaf4d", "BlockCausal")])
def test_a_model_that_ignores_what_it_must_not_see_is_refused(kind, name):
    with pytest.raises(TaskError, match=f"{name} reads this model wrongly"):
        seeing(name, kind)


def test_nan_in_any_of_the_comparisons_is_refused(monkeypatch):
    """Python's max of a number and NaN may be the number."""
    plain = policies.BlockCausal.__call__

    def broken(policy, ids, *rest):                  # where this block has a token at its end
        return plain(policy, ids, *rest) * (torch.nan if ids[0, 7] == policy.eos_id else 1.0)

    cfg = run.parse(["--model", shelf["llada"], "--device", "cpu", "--trust_remote_code"])
    model, tokenizer = models.load_model(cfg)
    monkeypatch.setattr(policies.BlockCausal, "__call__", broken)
    with pytest.raises(TaskError, match="BlockCausal reads this model wrongly"):
        policies.BlockCausal(model, tokenizer, tokenizer.mask_token_id)


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    # Random weights solve nothing: a reward of the text's letters keeps groups alive.
    monkeypatch.setattr(tasks, "grade_batch", lambda name, texts, examples: [
        tasks.Grade(len(text) % 5 / 4, False, 0.0, "", text, {}) for text in texts])
    argv = ("--task countdown --trust_remote_code --device cpu --max_number 9 --C 8 --m 4 "
            "--k 2 --block_length 4 --updates 2 --questions 2 --G 4 --eval_n 4 --steps 4 "
            "--save_every 1").split()
    argv += ["--model", shelf["llada"], "--policy", f"{FILE}:FrozenContext", "--out"]

    def interrupt(half):
        raise KeyboardInterrupt
    whole = main([*argv, tmp_path / "whole"])
    assert whole.code == 0 and policies.FrozenContext.note[:30] in whole.out
    assert main([*argv, tmp_path / "parts"], interrupt, ("optimizer_step", 2)).code == 130
    resumed = main([*argv, tmp_path / "parts"])
    assert resumed.code == 0 and "going on after update 1" in resumed.out
    a, b = (read(tmp_path / out / "metrics.jsonl") for out in ("whole", "parts"))
    assert [x["grad_norm"] for x in a] == [x["grad_norm"] for x in b] and a[0]["grad_norm"] > 0
