"""Doubles of the code that comes with LLaDA, Dream, LLaDA2, Fast-dLLM and dLLM's A2D-Qwen3.

The names and the quirks that a caller meets, a few thousand weights. The checkpoints that the
tests write carry this file as their modeling.py.
"""
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput


class Config(PretrainedConfig):
    def __init__(self, **given):
        own = dict(d_model=32, n_layers=2, n_heads=2, vocab_size=0, embedding_dropout=0.0,
                   attention_dropout=0.0, hears_mask=True, causal=False, headless=False,
                   use_cache=True)
        own["embedding_size"] = given.get("vocab_size", 0)
        super().__init__(**{**own, **given})


class Rotary(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def get_rotary_embedding(self, n, device):
        width = self.config.d_model // self.config.n_heads
        rate = 100.0 ** -(torch.arange(0, width, 2, device=device) / width)
        angle = (torch.arange(n, device=device)[:, None] * rate).repeat(1, 2)
        return angle.sin()[None, None], angle.cos()[None, None]

    def apply_rotary_pos_emb(self, sin, cos, x):
        a, b = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)

    def forward(self, q, k):
        sin, cos = self.get_rotary_embedding(k.shape[2], k.device)
        n = k.shape[2] - q.shape[2]
        turned = self.apply_rotary_pos_emb(sin[:, :, n:], cos[:, :, n:], q)
        return turned, self.apply_rotary_pos_emb(sin, cos, k)


class Layer(nn.Module):
    """Queries, keys and values, as both families have them."""

    def __init__(self, c, bias):
        super().__init__()
        self.config = c
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(c.d_model, c.d_model, bias=bias))

    def qkv(self, x):
        for project in (self.q_proj, self.k_proj, self.v_proj):
            yield project(x).unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2)


# --- LLaDA ------------------------------------------------------------------------------------

class LLaDAConfig(Config):
    model_type = "llada"


class LLaDABlock(Layer):
    """Takes a past; the model refuses one."""

    def __init__(self, c):
        super().__init__(c, bias=False)
        d, self.rotary_emb = c.d_model, Rotary(c)
        self.attn_norm, self.ff_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_proj, self.up_proj = (nn.Linear(d, 2 * d, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(2 * d, d, bias=False)

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False):
        q, k, v = self.qkv(self.attn_norm(x))
        if layer_past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(layer_past, (k, v)))
        present = (k, v) if use_cache else None
        n, K = q.shape[2], k.shape[2]
        q, k = self.rotary_emb(q, k)
        if not self.config.hears_mask:               # as LLaDA's code before October 2025
            attention_bias = None
        if attention_bias is not None:
            attention_bias = attention_bias[:, :, K - n:K, :K].to(q.dtype)
            attention_bias = attention_bias.clamp(min=torch.finfo(q.dtype).min)
        drop = self.config.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attention_bias, drop,
                                           is_causal=self.config.causal)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y)), present


class LLaDAModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, self.activation_checkpointing_strategy = c, None
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.embedding_size, c.d_model),
            emb_drop=nn.Dropout(c.embedding_dropout),
            blocks=nn.ModuleList(LLaDABlock(c) for _ in range(c.n_layers)),
            ln_f=nn.RMSNorm(c.d_model),
            ff_out=nn.Linear(c.d_model, c.embedding_size, bias=False)))

    def set_activation_checkpointing(self, strategy):
        self.activation_checkpointing_strategy = strategy

    def _activation_checkpoint_fn(self, block, *args, **more):
        return checkpoint(block, *args, use_reentrant=False, **more)

    def forward(self, ids, mask):
        x, bias = self.transformer.emb_drop(self.transformer.wte(ids)), None
        if mask is not None and (mask == 0).any():
            bias = torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min)
            bias = bias[:, None, None, :].expand(-1, -1, mask.shape[1], -1)
        for block in self.transformer.blocks:
            if self.activation_checkpointing_strategy:
                x, _ = self._activation_checkpoint_fn(block, x, attention_bias=bias)
            else:
                x, _ = block(x, attention_bias=bias)
        return self.transformer.ff_out(self.transformer.ln_f(x))


class LLaDAModelLM(PreTrainedModel):
    """No post_init and no position_ids, as in the original."""
    config_class, base_model_prefix = LLaDAConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDAModel(config)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        assert not use_cache, "no cache for MDM"
        return MaskedLMOutput(logits=self.model(input_ids, attention_mask))

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def get_output_embeddings(self):
        return None if self.config.headless else self.model.transformer.ff_out

    def tie_weights(self):
        pass


# --- Dream ------------------------------------------------------------------------------------

class DreamConfig(Config):
    model_type = "Dream"


class Mixture(nn.Module):
    """As LLaDA2's experts, no gradient in eval mode; and one that all tokens share."""

    def __init__(self, d):
        super().__init__()
        self.shared_experts = nn.Linear(d, d, bias=False)
        self.gate = nn.Linear(d, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(2))

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            y = torch.stack([expert(x) for expert in self.experts])
        mixed = torch.einsum("enld,nle->nld", y, self.gate(x).softmax(-1))
        return (mixed + self.shared_experts(x)) / 2


class DreamDecoderLayer(Layer):
    def __init__(self, c, index):
        super().__init__(c, bias=True)
        d, self.rotary, self.layer_idx = c.d_model, Rotary(c), index
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.o_proj, self.mlp = nn.Linear(d, d, bias=False), Mixture(d)

    def forward(self, x, mask, where, past):
        q, k, v = self.qkv(self.input_layernorm(x))
        sin, cos = self.rotary.get_rotary_embedding(int(where.max()) + 1, x.device)
        sin, cos = sin[:, :, where[0]], cos[:, :, where[0]]
        q, k = (self.rotary.apply_rotary_pos_emb(sin, cos, part) for part in (q, k))
        if past is not None:
            k, v = past.update(k, v, self.layer_idx, {})
        y = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class DreamPreTrainedModel(PreTrainedModel):
    config_class, base_model_prefix = DreamConfig, "model"
    supports_gradient_checkpointing = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As Dream's: does not say what it loaded."""
        model = super().from_pretrained(*args, **kwargs)
        model.generation_config = None
        return model


class DreamBaseModel(DreamPreTrainedModel):
    """What a careless auto_map names: no head."""

    def __init__(self, c):
        super().__init__(c)
        self.embed_tokens = nn.Embedding(c.embedding_size, c.d_model)
        self.layers = nn.ModuleList(DreamDecoderLayer(c, i) for i in range(c.n_layers))
        self.norm, self.gradient_checkpointing = nn.RMSNorm(c.d_model), False
        self.drop = nn.Dropout(0.5)                  # no config knows of it
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=None):
        x = self.drop(self.embed_tokens(input_ids))
        if position_ids is None:
            position_ids = torch.arange(x.shape[1])[None]
        for layer in self.layers:
            more = attention_mask, position_ids, past_key_values
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, *more)
            else:
                x = layer(x, *more)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class DreamModel(DreamPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is not None and attention_mask.dim() != 4:
            raise RuntimeError(f"the mask must be 4D, not {attention_mask.dim()}D")
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        return MaskedLMOutput(logits=self.lm_head(hidden))

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


# --- A2D: a causal model of transformers that sees all but padding ----------------------------

class A2DQwen3Config(transformers.Qwen3Config):
    model_type = "a2d-qwen3"


class A2DQwen3Model(transformers.Qwen3Model):
    def forward(self, input_ids, attention_mask=None, **more):
        if attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None, :].bool()
            attention_mask = attention_mask.expand(-1, -1, input_ids.shape[1], -1)
        if not getattr(self.config, "hears_mask", True):
            attention_mask = torch.ones_like(attention_mask)
        return super().forward(input_ids, attention_mask=attention_mask, **more)


class A2DQwen3LMHeadModel(transformers.Qwen3ForCausalLM):
    config_class = A2DQwen3Config

    def __init__(self, config):
        super().__init__(config)
        self.model = A2DQwen3Model(config)
        self.post_init()


# --- Block diffusion, known by the name of its class ------------------------------------------

class LLaDA2MoeModelLM(A2DQwen3LMHeadModel):
    pass


class Fast_dLLM_QwenModel(A2DQwen3Model):
    """As Fast-dLLM v2's and SDAR's: in train mode another function, for their own training."""

    def forward(self, *args, labels=None, **more):
        if self.training:
            return labels.shape
        return super().forward(*args, **more)


class Fast_dLLM_QwenForCausalLM(A2DQwen3LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = Fast_dLLM_QwenModel(config)
        self.post_init()
