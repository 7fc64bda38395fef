"""Policies that see less of the text: cheaper steps, and the attention of block diffusion.

    bash run.sh gsm8k --preset llada --policy lab/policies.py:FrozenContext

AGRPO's gradient is exact for whatever function the policy is, if rollout and loss call the same
one with the same arguments (agrpo.Block).

                      sees                                     exact?
    BlockCausal       its own block and those before it        yes; bd3lm, LLaDA2, SDAR learn it
    FrozenBlockCausal the same, keys and values of those kept  yes; equal to BlockCausal
    FrozenContext     all, but the text around the block is    yes, of this policy, which is not
                      read once, with the block all masked     the plain one

Limits. Keys and values of LLaDA-8B take 0.52 MB a token: 128 rows of 522 tokens are 35 GB, so
fewer rows fit into a forward (--rollout_batch 0 tries how many). Others measured 1 to 5 points
lost by prefix caches with random order or parallel decoding: evaluate with and without before
training, and a trained model with the policy it was trained with. The masked text after the
block is frozen, not dropped: dropping it takes LLaDA's GSM8K from 79 to 34 % (others'
measurement). Blocks are counted from where the answer begins, as dLLM's bd3lm sampler does;
LLaDA2 and SDAR count from the text's start.

Read are LLaDA's code, whose blocks take a past, and models that take a mask of four dimensions
and either put their attention through transformers' interface (Qwen3, Llama, A2D) or hand it a
cache (Dream, LLaDA2). Any other is refused: LLaDA-MoE takes no cache; in train mode SDAR's and
Fast-dLLM v2's attention is another function.
"""
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
from agrpo import HALF, Block, Policy, one_length_at_a_time
from models import first_line
from tasks import TaskError

# Printed when such a policy is chosen.
CHECK = "evaluate with and without it before training, and a trained model with it"
LENGTH = ("give the --block_length that the model was trained with; one that was trained "
          "otherwise is another policy then: " + CHECK)


class Seeing(Policy):
    """A policy that says which tokens see which, and can read a part of the text."""
    block_causal = False               # does it see nothing after its block?

    def __init__(self, model, tokenizer, mask_id, device="cpu"):
        super().__init__(model, tokenizer, mask_id, device)
        # The model without its head. Adapters will stand in it.
        self.inner = getattr(model, "model", None)
        self.start = 0                 # where in the text the tokens being read begin
        # Not by model_type: LLaDA-MoE's is LLaDA's, its code is not.
        self.like_llada = hasattr(self.inner, "transformer")
        if self.like_llada:
            # LLaDA's RoPE takes the last n keys for the n queries, which holds for no suffix.
            for layer in self.inner.transformer.blocks:
                layer.rotary_emb.forward = partial(rotate, self, layer.rotary_emb)
        else:
            model.config._attn_implementation = "kept"          # `attention`, below
        must_fit(self)

    def visible(self, mask, block):
        """(N, 1, L, L) bool, True where query i may look at key j. Here: all but padding."""
        L = mask.shape[1]
        return mask[:, None, None, :].bool().expand(-1, -1, L, -1)

    def logits(self, ids, mask, positions):
        """The whole text, in which all see all: what the checks at the start look at."""
        hidden, _ = self.read(ids, Seeing.visible(self, mask, None))
        return self.predict(hidden, positions)

    def read(self, ids, visible, around=None, start=0):
        """The model without its head, on tokens `start` to `start + n` of the text.

        ids (N, n), visible (N, 1, n, K); around: per layer keys and values (N, heads, K - n, d)
        of the other tokens seen. Returns hidden states (N, n, d), and, where nothing is around,
        the n's keys and values.
        """
        self.start = start
        with self.autocast():
            if self.like_llada:
                return read_llada(self.inner, ids, visible, around)
            kept = Kept(around)
            where = torch.arange(start, start + ids.shape[1], device=ids.device)
            out = self.inner(input_ids=ids, attention_mask=visible, position_ids=where[None],
                             use_cache=False, **{self.way: kept})
        return out.last_hidden_state, [kept.own[layer] for layer in sorted(kept.own)]

    def predict(self, hidden, positions):
        """The head on positions (N, W) of hidden (N, n, d) -> (N, W, V)."""
        row = torch.arange(len(hidden), device=hidden.device)[:, None]
        return self.head(hidden[row, positions - self.shift].to(self.head.weight.dtype))


class BlockCausal(Seeing):
    """A token sees its own block and those before it, counted from where the answer begins.

    bd3lm A2D, LLaDA2, SDAR, TraDo and Fast-dLLM v2 were trained so. Under full attention their
    log pi is off by 0.2 to 0.8 nats a token (measured), in silence.
    """
    block_causal = True
    note = "a token sees its own block and those before it: " + LENGTH

    def visible(self, mask, block):
        """As before, and the key's block is no later than the query's."""
        # i counts tokens from the block being written, b counts blocks from it.
        i = torch.arange(mask.shape[1], device=mask.device) - block.start
        b = i // (block.end - block.start)                      # the prompt's blocks are < 0
        no_later = b[:, None] >= b
        # A query that sees nothing is NaN, and padding may see nothing but itself.
        itself = i[:, None] == i
        return super().visible(mask, block) & no_later | itself

    def __call__(self, ids, mask, positions, block):
        """ids, mask (N, L), positions (N, W) -> logits (N, W, V)."""
        # Nothing in the block or before it sees what comes after, so that is not read.
        ids, mask = ids[:, :block.end], mask[:, :block.end]
        hidden, _ = self.read(ids, self.visible(mask, block))
        return self.predict(hidden, positions)


class FrozenContext(Seeing):
    """Per block one pass over the text with the block all masked, per step the block alone.

    The pass yields keys and values of the text around the block; each step's queries see those
    and the block as it is. At a block's first step this is the plain policy. Later it is not:
    the text around does not see what has been written into the block. In the loss both passes
    have gradients.
    """
    note = ("the text around a block is read once, with the block masked: another policy than "
            "the plain one; keys and values are 0.5 MB a token at 8B, so fewer rows fit "
            "(--rollout_batch): " + CHECK)

    def __call__(self, ids, mask, positions, block):
        """ids, mask (N, L), positions (N, W) in the block -> logits (N, W, V)."""
        if not self.ignores_mask:
            return self.by_block(ids, mask, positions, block)
        return one_length_at_a_time(mask, lambda rows, n: self.by_block(
            ids[rows, n:], mask[rows, n:], positions[rows] - n,
            Block(block.start - n, block.end - n, block.kept.setdefault(n, {}))))

    def by_block(self, ids, mask, positions, block):
        """The two passes."""
        # A shifted model predicts the block's first token at the token before it.
        start, end = block.start - self.shift, block.end
        seen = end if self.block_causal else ids.shape[1]
        ids, visible = ids[:, :seen], self.visible(mask[:, :seen], block)
        outside = torch.ones(seen, dtype=torch.bool, device=ids.device)
        outside[start:end] = False
        # Once a block, the text around it. It has gradients in the loss, as the step has.
        if "around" not in block.kept:
            masked = ids.clone()
            masked[:, block.start:end] = self.mask_id
            _, kv = self.read(masked, visible)
            block.kept["around"] = [(k[:, :, outside], v[:, :, outside]) for k, v in kv]
        # The step: queries of the block; keys of the text around it, then of the block.
        rows = visible[:, :, start:end]
        rows = torch.cat([rows[..., outside], rows[..., start:end]], dim=3)
        hidden, _ = self.read(ids[:, start:end], rows, block.kept["around"], start)
        return self.predict(hidden, positions - start)


class FrozenBlockCausal(FrozenContext, BlockCausal):
    """BlockCausal with keys and values of the earlier blocks kept: they never see the block, so
    nothing is approximate. The passes of FrozenContext, the mask of BlockCausal.
    """
    note = ("as BlockCausal, keys and values of earlier blocks kept, 0.5 MB a token at 8B, so "
            "fewer rows fit (--rollout_batch): " + LENGTH)


@torch.no_grad()
def must_fit(policy):
    """Refuse a model that does not read as it is told: 12 tokens, 4 to 8 are the block.

    FrozenContext must equal the plain model where the block is all masked. A block-causal
    policy must not see the block from before it, and FrozenBlockCausal must equal BlockCausal.
    Raises TaskError.
    """
    name, causal = f"--policy {type(policy).__name__}", partial(BlockCausal.__call__, policy)
    # Three blocks of four: written, all masked, and what comes after.
    ids = torch.arange(12, device=policy.device)[None] % 7 + 5
    ids[:, 4:8] = policy.mask_id
    mask, at = torch.ones_like(ids), torch.arange(4, 8, device=ids.device)[None]
    # Two positions of the block before, with and without a token in this one.
    other, before = ids.clone(), at[:, :2] - 2
    other[:, 7] = policy.eos_id
    try:
        find_way(policy)
        found = policy(ids, mask, at, Block(4, 8, {}))
        if policy.block_causal:
            pairs = [(found, causal(ids, mask, at, Block(4, 8, {}))),
                     [causal(x, mask, before, Block(4, 8, {})) for x in (ids, other)]]
        else:
            pairs = [(found, Policy.logits(policy, ids, mask, at))]
    except Exception as e:             # a model's own code may raise anything
        raise TaskError(f"{name} cannot read this model ({type(e).__name__}: {first_line(e)}); "
                        "it reads LLaDA's, Dream's and LLaDA2's code and attention by "
                        "transformers' interface") from e
    # torch's maximum is NaN where one of them is; Python's may not be.
    gap = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max()
    if not gap < (0.05 if policy.dtype in HALF else 1e-3):
        raise TaskError(f"{name} reads this model wrongly: logits that must be equal differ by "
                        f"{gap:.0e} of the largest; leave it out or choose another")


# --- how a part of the text is read -----------------------------------------------------------

class Kept:
    """Keys and values of one pass, per layer: to be kept, and to follow those around them.

    To a model it looks like transformers' cache.
    """

    def __init__(self, around):
        self.around, self.own = around, {}

    def get_seq_length(self, *layer):
        return 0                       # positions and mask are given, nothing is to be derived

    def update(self, k, v, layer, *more):
        """k, v (N, heads, n, d) -> with what is around in front of them, (N, heads, K, d)."""
        self.own[layer] = k, v
        if self.around is None:
            return k, v
        k_around, v_around = self.around[layer]
        return torch.cat([k_around, k], dim=2), torch.cat([v_around, v], dim=2)


def attention(module, q, k, v, mask, kept=None, **more):
    """transformers' attention by torch, with `kept` handed through to it."""
    if kept is not None:
        k, v = kept.update(k, v, module.layer_idx)
    return sdpa_attention_forward(module, q, k, v, mask, **more)


AttentionInterface.register("kept", attention)
AttentionMaskInterface.register("kept", sdpa_mask)


def find_way(policy):
    """Set policy.way, the argument by which the model hands a Kept to its attention.

    Not as its past where there is another way: transformers drops a past where activations are
    recomputed. Code that does not know `kept` refuses it or keeps nothing.
    """
    policy.way, two = "kept", torch.full((1, 2), policy.eos_id, device=policy.device)
    try:
        _, kv = policy.read(two, Seeing.visible(policy, torch.ones_like(two), None))
    except TypeError:
        kv = []
    if not kv:
        policy.way = "past_key_values"


def read_llada(inner, ids, visible, around=None):
    """LLaDA's forward refuses a past, but its blocks take one: here is the loop over those.

    Returns the last hidden states and each layer's keys and values, not rotated yet; where
    there are some around, with those in front.
    """
    n, K = visible.shape[2:]
    bias = None
    # All seen: no bias, as in LLaDA's own forward, and torch may take a faster attention.
    if not visible.all():
        bias = torch.zeros(visible.shape, device=ids.device)
        bias = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)
        # A block wants a row for every key and takes the last n.
        bias = pad(bias, (0, 0, K - n, 0))
    x, kv = inner.transformer.emb_drop(inner.transformer.wte(ids)), []
    for i, layer in enumerate(inner.transformer.blocks):
        past = around[i] if around else None
        if inner.activation_checkpointing_strategy:             # LLaDA's way to recompute
            layer = partial(inner._activation_checkpoint_fn, layer)
        x, own = layer(x, attention_bias=bias, layer_past=past, use_cache=True)
        kv.append(own)
    return inner.transformer.ln_f(x), kv


def rotate(policy, rotary, q, k):
    """LLaDA's RoPE for keys in this order: before the tokens read, after them, themselves.

    q (N, heads, n, d), k (N, heads, K, d); the tokens read begin at policy.start.
    """
    n, K, start = q.shape[2], k.shape[2], policy.start
    # Where in the text each key stands; with nothing around, in the order of the text.
    place = torch.arange(K, device=k.device)
    if n < K:
        place = torch.cat([place[:start], place[start + n:], place[start:start + n]])
    # Sine and cosine are float32, (1, 1, K, d): so are the products, then cast back.
    sin, cos = (x[:, :, place] for x in rotary.get_rotary_embedding(K, k.device))
    turned_q = rotary.apply_rotary_pos_emb(sin[:, :, K - n:], cos[:, :, K - n:], q)
    return turned_q, rotary.apply_rotary_pos_emb(sin, cos, k)
