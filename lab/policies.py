"""Policies that see less of the text: cheaper steps, and the attention that block diffusion needs.

    python agrpo.py --policy lab/policies.py:FrozenContext --model ... --trust_remote_code

AGRPO's gradient is exact for whatever function the policy is, if rollout and loss call the same one
with the same arguments (agrpo.Block). So a policy may look at a part of the text, or freeze what it
saw around the block being written, and nothing is mismatched.

                      sees                                        exact?
    BlockCausal       its own block and those before it           yes; what bd3lm, LLaDA2, SDAR learnt
    FrozenBlockCausal the same, keys and values before it kept    yes; equal to BlockCausal
    FrozenContext     all, but what surrounds the block is read   yes, of this policy, which is another
                      once, with the block all masked             one than the plain

Limits. Keys and values of LLaDA-8B take 0.52 MB a token: 128 rows of 522 tokens are 35 GB, so lower
--rollout_batch to 32 or so. Others measured 1 to 5 points lost by prefix caches with random order or
parallel decoding: evaluate with and without before training, and a trained model with the policy it
was trained with. The masked text after the block is frozen, not dropped: dropping it takes LLaDA's
GSM8K from 79 to 34 % (others' measurement). Blocks are counted from where the answer begins, as
dLLM's bd3lm sampler does; LLaDA2 and SDAR count from the start of the text.

They read two kinds of model: code like LLaDA's, whose blocks take a past, and models whose attention
goes through transformers' interface (Qwen3, Llama and their A2D versions). BlockCausal reads any
that takes a mask of four dimensions (LLaDA2, SDAR, Dream).
"""
from functools import partial

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from agrpo import HALF, Block, Policy, UserError, first_line

CHECK = "evaluate with and without it before training, and a trained model with it"


class Seeing(Policy):
    """A policy that says which tokens see which, and can read a part of the text."""

    def __init__(self, model, tokenizer, mask_id, device="cpu"):
        super().__init__(model, tokenizer, mask_id, device)
        self.start = 0                 # where in the text the tokens that are read begin
        self.like_llada = hasattr(getattr(model, "model", None), "transformer")
        if self.like_llada:
            for layer in model.model.transformer.blocks:
                layer.rotary_emb.forward = partial(rotate, self, layer.rotary_emb)
        else:
            model.config._attn_implementation = "kept"
        must_fit(self)

    def visible(self, mask, block):
        """(N, 1, L, L) bool, True where query i may look at key j. Here: all but padding."""
        L = mask.shape[1]
        return mask[:, None, None, :].bool().expand(-1, -1, L, -1)

    def logits(self, ids, mask, positions):
        """The whole text as one block, in which all see all: what the checks at the start look at."""
        hidden, _ = self.read(ids, Seeing.visible(self, mask, None))
        return self.predict(hidden, positions)

    def read(self, ids, visible, around=None, start=0):
        """The model without its head, on tokens `start` to `start + n` of the text.

        ids (N, n), visible (N, 1, n, K); around: per layer keys and values (N, heads, K - n, d) of
        the other tokens seen. Returns hidden states (N, n, d), keys and values of the n per layer.
        """
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        self.start = start
        with self.autocast():
            if self.like_llada:
                return read_llada(base.model, ids, visible, around)
            kept, where = {}, torch.arange(start, start + ids.shape[1], device=ids.device)
            # Not past_key_values: transformers drops those where activations are recomputed.
            out = base.model(input_ids=ids, attention_mask=visible, position_ids=where[None],
                             use_cache=False, around=around, kept=kept)
        return out.last_hidden_state, [kept[layer] for layer in sorted(kept)]

    def predict(self, hidden, positions):
        """The head on positions (N, W) of hidden (N, n, d) -> (N, W, V)."""
        self.positions = positions - self.shift
        return self.model.get_output_embeddings()(hidden)


class BlockCausal(Seeing):
    """A token sees its own block and those before it, counted from where the answer begins.

    bd3lm A2D, LLaDA2, SDAR, TraDo and Fast-dLLM v2 were trained so. Under full attention their log pi
    is off by 0.2 to 0.8 nats a token (measured), in silence.
    """
    block_causal = True
    note = ("a token sees its own block and those before it: for models trained so; take the "
            "--block_length they were trained with. Another model is another policy so: " + CHECK)

    def visible(self, mask, block):
        """As before, and the key's block is no later than the query's."""
        i = torch.arange(mask.shape[1], device=mask.device) - block.start
        b = i // (block.end - block.start)                                  # the prompt's are < 0
        # Padding may see nothing of its own block, and a query that sees nothing is NaN.
        itself = i[:, None] == i
        return super().visible(mask, block) & (b[:, None] >= b) | itself

    def __call__(self, ids, mask, positions, block):
        """ids, mask (N, L), positions (N, W) -> logits (N, W, V). Reads no token after the block."""
        ids, mask = ids[:, :block.end], mask[:, :block.end]
        hidden, _ = self.read(ids, self.visible(mask, block))
        return self.predict(hidden, positions)


class FrozenContext(Seeing):
    """Per block one pass over the text with the block all masked, per step the block alone.

    The pass yields keys and values of the text around the block; each step's queries see those and
    the block as it is. At a block's first step this is the plain policy. Later it is another one: the
    text around does not see what has been written into the block. In the loss both passes have
    gradients.
    """
    note = ("the text around a block is read once, with the block masked: exact gradient of a policy "
            "that differs from the plain one, and about 0.5 MB a token of keys and values at 8B (so "
            "--rollout_batch 32 or less): " + CHECK)

    def __call__(self, ids, mask, positions, block):
        """ids, mask (N, L), positions (N, W) in the block -> logits (N, W, V)."""
        # A shifted model predicts the block's first token at the token before it.
        start, end = block.start - self.shift, block.end
        seen = end if self.block_causal else ids.shape[1]
        ids, visible = ids[:, :seen], self.visible(mask[:, :seen], block)
        outside = torch.ones(seen, dtype=torch.bool, device=ids.device)
        outside[start:end] = False
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
    nothing is approximate. (The step of FrozenContext, the mask of BlockCausal.)"""
    note = ("as BlockCausal, with the keys and values of earlier blocks kept, which changes nothing but "
            "the time and about 0.5 MB a token at 8B; take the --block_length that the model was "
            "trained with. A model trained otherwise is another policy so: " + CHECK)


@torch.no_grad()
def must_fit(policy):
    """Refuse a model that does not read as it is told: 12 tokens, the block is 4 to 8.

    FrozenContext must equal the plain model where the block is all masked. A block-causal policy must
    not see the block from before it, and FrozenBlockCausal must equal BlockCausal. Raises UserError.
    """
    name = type(policy).__name__
    ids = torch.arange(12, device=policy.device)[None] % 7 + 5
    mask, at = torch.ones_like(ids), torch.arange(4, 8, device=ids.device)[None]
    ids[:, 4:8] = policy.mask_id
    try:
        found = policy(ids, mask, at, Block(4, 8, {}))
        if policy.block_causal:
            causal = partial(BlockCausal.__call__, policy)
            same = [(found, causal(ids, mask, at, Block(4, 8, {})))]
            other = ids.clone()
            other[:, 7] = policy.eos_id
            before = torch.tensor([[2, 3]], device=ids.device)
            same += [[causal(x, mask, before, Block(4, 8, {})) for x in (ids, other)]]
        else:
            same = [(found, Policy.logits(policy, ids, mask, at))]
    except Exception as e:             # a model's own code may raise anything
        raise UserError(f"--policy {name} cannot read this model ({type(e).__name__}: {first_line(e)}); "
                        "it reads code like LLaDA's and attention by transformers' interface") from e
    limit = 0.05 if policy.dtype in HALF else 1e-3
    for a, b in same:
        gap = ((a - b).abs().max() / b.abs().max()).item()
        if not gap < limit:
            raise UserError(f"--policy {name} reads this model wrongly: logits that must be equal differ "
                            f"by {gap:.0e} of the largest; leave --policy out, or choose another")


# --- how a part of the text is read -------------------------------------------------------------

def attention(module, q, k, v, mask, around=None, kept=None, **more):
    """transformers' attention by torch, with more keys and values in front. q, k, v (N, heads, n, d)."""
    if kept is not None:
        kept[module.layer_idx] = k, v
    if around is not None:
        k_around, v_around = around[module.layer_idx]
        k, v = torch.cat([k_around, k], dim=2), torch.cat([v_around, v], dim=2)
    return sdpa_attention_forward(module, q, k, v, mask, **more)


AttentionInterface.register("kept", attention)
AttentionMaskInterface.register("kept", sdpa_mask)


def read_llada(inner, ids, visible, around=None):
    """LLaDA's forward refuses a past, but its blocks take one: so here is the loop over its blocks.

    Returns the last hidden states and each layer's keys and values, not rotated yet.
    """
    n, K = visible.shape[2:]
    bias = None
    if not visible.all():
        bias = torch.zeros(visible.shape, device=ids.device)
        bias = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)
        bias = pad(bias, (0, 0, K - n, 0))      # a block wants a row for every key and takes the last n
    again = None
    if inner.activation_checkpointing_strategy:
        again = inner._activation_checkpoint_fn                 # LLaDA's own: recomputes activations
    x, kv = inner.transformer.emb_drop(inner.transformer.wte(ids)), []
    for i, layer in enumerate(inner.transformer.blocks):
        call = partial(again, layer) if again else layer
        past = around[i] if around else None
        x, (k, v) = call(x, attention_bias=bias, layer_past=past, use_cache=True)
        kv.append((k[:, :, K - n:], v[:, :, K - n:]))
    return inner.transformer.ln_f(x), kv


def rotate(policy, rotary, q, k):
    """LLaDA's RoPE for keys in the order of `around`: before the tokens read, after them, those.

    q (N, heads, n, d), k (N, heads, K, d); the tokens read begin at policy.start.
    """
    n, K, start = q.shape[2], k.shape[2], policy.start
    place = torch.arange(K, device=k.device)
    if n < K:
        place = torch.cat([place[:start], place[start + n:], place[start:start + n]])
    dtype = torch.float32 if rotary.config.rope_full_precision else k.dtype
    with torch.autocast(k.device.type, enabled=False):
        sin, cos = rotary.get_rotary_embedding(K, k.device)                 # (1, 1, K, d)
        sin, cos = sin[:, :, place].to(dtype), cos[:, :, place].to(dtype)
        turned = rotary.apply_rotary_pos_emb(sin[:, :, K - n:], cos[:, :, K - n:], q.to(dtype))
        k_turned = rotary.apply_rotary_pos_emb(sin, cos, k.to(dtype))
    return turned.type_as(q), k_turned.type_as(k)
