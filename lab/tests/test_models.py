"""Models as users bring them: a folder with weights, a tokenizer and Python code of its own.

The code below stands in for LLaDA's, Dream's, LLaDA2's and dLLM's A2D-Qwen3: the names and the
quirks that a caller meets, a few thousand random weights. It is written into a folder and
loaded the way a real checkpoint is, by agrpo.load_policy.
"""
import json
import math
import os
import shutil
import time

import pytest
import torch
import transformers

import agrpo
from lab import make_tiny

# --- the models -------------------------------------------------------------------------------

COMMON = '''
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput


class Norm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return (F.rms_norm(x, x.shape[-1:]) * self.weight).to(x.dtype)


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
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    def forward(self, q, k):
        sin, cos = (x.type_as(q) for x in self.get_rotary_embedding(k.shape[2], k.device))
        n = k.shape[2] - q.shape[2]
        return (self.apply_rotary_pos_emb(sin[:, :, n:], cos[:, :, n:], q),
                self.apply_rotary_pos_emb(sin, cos, k))


class Config(PretrainedConfig):
    def __init__(self, **given):
        own = dict(d_model=32, n_layers=2, n_heads=2, vocab_size=0, rope_full_precision=False,
                   embedding_dropout=0.0, attention_dropout=0.0, hears_mask=True, causal=False,
                   headless=False)
        own["embedding_size"] = given.get("vocab_size", 0)
        super().__init__(**{"use_cache": True, **own, **given})
'''

LLADA = COMMON + '''
class LLaDAConfig(Config):
    model_type = "llada"


class LLaDABlock(nn.Module):                         # takes a past; the model refuses one
    def __init__(self, c):
        super().__init__()
        self.config, self.rotary_emb = c, Rotary(c)
        self.attn_norm, self.ff_norm = Norm(c.d_model), Norm(c.d_model)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(c.d_model, c.d_model, bias=False))
        for name in ("ff_proj", "up_proj"):
            setattr(self, name, nn.Linear(c.d_model, 2 * c.d_model, bias=False))
        self.ff_out = nn.Linear(2 * c.d_model, c.d_model, bias=False)

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False):
        c, y = self.config, self.attn_norm(x)
        q, k, v = (proj(y).unflatten(-1, (c.n_heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if layer_past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(layer_past, (k, v)))
        present = (k, v) if use_cache else None
        n, K = q.shape[2], k.shape[2]
        q, k = self.rotary_emb(q, k)
        if not c.hears_mask:                         # as LLaDA's code before October 2025
            attention_bias = None
        if attention_bias is not None:
            attention_bias = attention_bias[:, :, K - n:K, :K].to(q.dtype)
            attention_bias = attention_bias.clamp(min=torch.finfo(q.dtype).min)
        drop = c.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attention_bias, drop, is_causal=c.causal)
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
            ln_f=Norm(c.d_model),
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


class LLaDAModelLM(PreTrainedModel):                 # no post_init, as in the original
    config_class, base_model_prefix = LLaDAConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDAModel(config)

    def forward(self, input_ids, attention_mask=None, use_cache=None):       # no position_ids
        use_cache = self.config.use_cache if use_cache is None else use_cache
        assert not use_cache, "no cache for MDM"
        return MaskedLMOutput(logits=self.model(input_ids, attention_mask))

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def get_output_embeddings(self):
        return None if self.config.headless else self.model.transformer.ff_out

    def tie_weights(self):
        pass
'''

DREAM = COMMON + '''
class DreamConfig(Config):
    model_type = "Dream"


class Mixture(nn.Module):                            # as LLaDA2's: no gradient in eval mode
    def __init__(self, d):
        super().__init__()
        self.gate = nn.Linear(d, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(2))

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            y = torch.stack([expert(x) for expert in self.experts])
        weight = self.gate(x).softmax(-1)
        return torch.einsum("enld,nle->nld", y, weight)


class DreamDecoderLayer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.config, self.rotary, self.layer_idx = c, Rotary(c), index
        self.input_layernorm, self.post_attention_layernorm = Norm(c.d_model), Norm(c.d_model)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(c.d_model, c.d_model, bias=name != "o_proj"))
        self.mlp = Mixture(c.d_model)

    def forward(self, x, mask, where, past):
        c, y = self.config, self.input_layernorm(x)
        q, k, v = (proj(y).unflatten(-1, (c.n_heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        sin, cos = self.rotary.get_rotary_embedding(int(where.max()) + 1, x.device)
        sin, cos = sin[:, :, where[0]].to(x.dtype), cos[:, :, where[0]].to(x.dtype)
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
    def from_pretrained(cls, *args, **kwargs):       # as Dream's: does not say what it loaded
        model = super().from_pretrained(*args, **kwargs)
        model.generation_config = None
        return model


class DreamBaseModel(DreamPreTrainedModel):          # what a careless auto_map names: no head
    def __init__(self, c):
        super().__init__(c)
        self.embed_tokens = nn.Embedding(c.embedding_size, c.d_model)
        self.layers = nn.ModuleList(DreamDecoderLayer(c, i) for i in range(c.n_layers))
        self.norm, self.gradient_checkpointing = Norm(c.d_model), False
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=None):
        x = self.embed_tokens(input_ids)
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
'''

A2D = '''
import torch, transformers


class A2DQwen3Config(transformers.Qwen3Config):
    model_type = "a2d-qwen3"


class A2DQwen3Model(transformers.Qwen3Model):
    def forward(self, input_ids, attention_mask=None, **more):
        if attention_mask.dim() == 2:                # all but padding is seen
            attention_mask = attention_mask[:, None, None, :].bool()
            attention_mask = attention_mask.expand(-1, -1, input_ids.shape[1], -1)
        return super().forward(input_ids, attention_mask=attention_mask, **more)


class A2DQwen3LMHeadModel(transformers.Qwen3ForCausalLM):
    config_class = A2DQwen3Config

    def __init__(self, config):
        super().__init__(config)
        self.model = A2DQwen3Model(config)
        self.post_init()
'''

CODE = {                               # module, config, classes with and without a head
    "llada": (LLADA, "LLaDAConfig", "LLaDAModelLM", "LLaDAModelLM"),
    "dream": (DREAM, "DreamConfig", "DreamModel", "DreamBaseModel"),
    "a2d": (A2D, "A2DQwen3Config", "A2DQwen3LMHeadModel", "A2DQwen3Model"),
}
QWEN = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, intermediate_size=64)


def folder_of(where, kind, change=lambda weights: None, **config):
    """A checkpoint in the hub's layout, of random weights that `change` may edit."""
    from safetensors.torch import save_file

    code, config_class, model_class, headless = CODE[kind]
    where.mkdir(parents=True)
    tokenizer = make_tiny.make_tokenizer()
    scope = {"__name__": "built"}
    exec(code, scope)
    config = dict(
        dict(model_type=scope[config_class].model_type, architectures=[model_class],
             auto_map=dict(AutoConfig=f"modeling.{config_class}",
                           AutoModel=f"modeling.{headless}"),
             vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id,
             eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id),
        **(QWEN if kind == "a2d" else {}), **config)
    (where / "modeling.py").write_text(code)
    (where / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(where)
    torch.manual_seed(0)
    model = scope[model_class](scope[config_class](**config))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    change(weights)
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    return str(where)


def modernbert(where, **config):
    torch.manual_seed(0)
    tokenizer = make_tiny.make_tokenizer()
    model = make_tiny.make_model(tokenizer)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return str(where)


def policy_of(model, *flags, trust=True, loud=True, **changes):
    """A Policy by load_policy. LoRA's second matrices are not zero: zero, they hide much."""
    argv = ["--model", model, "--device", "cpu", "--lora_r", "4", *flags]
    cfg = agrpo.parse(argv + ["--trust_remote_code"] * trust)
    for name, value in changes.items():
        setattr(cfg, name, value)
    policy = agrpo.load_policy(cfg)
    torch.manual_seed(1)
    for name, p in policy.model.named_parameters():
        if "lora_B" in name and loud:
            torch.nn.init.normal_(p, std=0.1)
    return policy


def refusal(model, *flags, **more):
    with pytest.raises(agrpo.UserError) as e:
        policy_of(model, *flags, **more)
    sentence = str(e.value)
    assert "\n" not in sentence and f"--model {model}" in sentence
    return sentence


@pytest.fixture(scope="session", autouse=True)
def own_code_goes_elsewhere(tmp_path_factory):
    """transformers copies a checkpoint's code into a cache; not into the user's."""
    from transformers import dynamic_module_utils

    where = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", where)
        yield


class Shelf(dict):
    """Folders of models, made when first asked for."""
    makers = dict(
        llada=lambda where: folder_of(where, "llada"),
        deaf=lambda where: folder_of(where, "llada", hears_mask=False),
        dream=lambda where: folder_of(where, "dream"),
        a2d=lambda where: folder_of(where, "a2d"),
        tied=lambda where: folder_of(where, "a2d", lambda w: w.pop("lm_head.weight"),
                                     tie_word_embeddings=True),
        modernbert=modernbert)

    def __init__(self, where):
        self.where = where

    def __missing__(self, kind):
        self[kind] = self.makers[kind](self.where / kind)
        return self[kind]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    return Shelf(tmp_path_factory.mktemp("shelf"))


def each(*kinds):
    return pytest.mark.parametrize("kind", kinds)


def prompts(policy, lengths=(9, 5)):
    """q, q_mask of numbers, left-padded."""
    P = max(lengths)
    q = torch.tensor([[policy.pad_id] * (P - n) + list(range(20, 20 + n)) for n in lengths])
    return q, torch.tensor([[0] * (P - n) + [1] * n for n in lengths])


HOW = agrpo.Decoding(C=6, m=3, block_length=6)


def add_gradient(policy, how=HOW, **more):
    """A rollout of two prompts and the gradient of all of its pairs. -> trajectory, Seen"""
    q, q_mask = prompts(policy)
    traj = agrpo.rollout(policy, q, q_mask, how, agrpo.row_random([(0, 0), (0, 1)]))
    rows, steps = (agrpo.timestep_probs(traj, "uniform") > 0).nonzero().unbind(1)
    pairs = rows, steps, torch.ones(len(rows))
    A = torch.tensor([1.0, -0.5])
    return traj, agrpo.add_gradient(policy, traj, A, pairs, micro_batch=4, **more)


def trained(policy):
    return {name: p for name, p in policy.model.named_parameters() if p.requires_grad}


# --- one update, on every kind ----------------------------------------------------------------

LORA = {"llada": 14, "deaf": 14, "dream": 8, "a2d": 14, "tied": 14, "modernbert": 16}


@each(*LORA)
def test_the_ratio_is_one_and_every_adapter_learns(kind, shelf):
    policy = policy_of(shelf[kind], trust=kind != "modernbert")
    _, seen = add_gradient(policy)
    assert (seen.ratio - 1).abs().max() < 1e-5
    adapters = trained(policy)
    assert len(adapters) == 2 * LORA[kind] and all("lora_" in name for name in adapters)
    assert not any("head" in name or "transformer.ff_out" in name for name in adapters)
    assert all(p.grad.abs().max() > 0 for p in adapters.values())
    assert f"LoRA on {LORA[kind]} layers" in policy.notes[1]


@each(*LORA)
@torch.no_grad()
def test_padding_changes_nothing(kind, shelf):
    """For the model that ignores its mask: because rows go without padding."""
    policy = policy_of(shelf[kind], trust=kind != "modernbert")
    assert policy.ignores_mask == (kind == "deaf")
    q, q_mask = prompts(policy)
    at = torch.arange(6, 9)[None]
    both = policy(q, q_mask, at.expand(2, -1))
    alone = policy(q[1:, 4:], q_mask[1:, 4:], at - 4)
    assert (both[1] - alone[0]).abs().max() < 1e-5
    assert ("one length at a time" in policy.notes[0]) == (kind == "deaf")


@each("llada", "dream", "tied", "modernbert")
@torch.no_grad()
def test_the_head_on_chosen_rows_changes_no_logit(kind, shelf):
    policy = policy_of(shelf[kind], trust=kind != "modernbert")
    ids, at = torch.randint(5, 60, (3, 14)), torch.tensor([[2, 9], [5, 13], [1, 2]])
    chosen = policy(ids, torch.ones_like(ids), at)
    policy.positions = torch.arange(14).expand(3, -1)           # the hook hands on everything
    mask = torch.ones(3, 14, dtype=torch.bool)
    mask = mask[:, None, None, :] if kind == "dream" else mask
    full = policy.model(input_ids=ids, attention_mask=mask).logits
    shift = 1 if kind == "dream" else 0
    assert policy.shift == shift and chosen.shape == (3, 2, full.shape[-1])
    expected = full[torch.arange(3)[:, None], at - shift]
    assert (chosen - expected).abs().max() < 1e-6


def bytes_kept(work):
    """For the backward pass, while work() runs."""
    seen = []

    def keep(t):
        seen.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        work()
    return sum(seen)


@each("llada", "dream", "a2d", "modernbert")
def test_recomputed_activations_change_no_gradient(kind, shelf):
    grads, kept = [], []
    for flags in ([], ["--recompute"]):
        policy = policy_of(shelf[kind], *flags, trust=kind != "modernbert")
        kept.append(bytes_kept(lambda: add_gradient(policy)))
        grads.append({name: p.grad for name, p in trained(policy).items()})
    assert kept[1] < kept[0] / 2
    for name, g in grads[0].items():
        assert torch.equal(g, grads[1][name])


def difference_quotient(policy, how=HOW, step=1, h=1e-6):
    """Along one direction: how log pi of a step changes, and what the gradient says of it."""
    traj, _ = add_gradient(policy, how)
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


@each("llada", "dream")
def test_the_gradient_is_that_of_the_function(kind, shelf):
    """Dream's double has LLaDA2's experts, which have no gradient in eval mode, in silence."""
    policy = policy_of(shelf[kind], dtype="float64")
    policy.model.double()
    quotient, slope = difference_quotient(policy)
    assert slope == pytest.approx(quotient, rel=1e-6)
    if kind == "dream":
        policy.model.eval()
        quotient, slope = difference_quotient(policy)
        assert slope != pytest.approx(quotient, rel=1e-3)


@each("llada", "dream", "modernbert")
def test_train_mode_brings_no_dropout(kind, tmp_path):
    """Else rollout and loss would be two functions."""
    rates = dict(embedding_dropout=0.5, attention_dropout=0.5)
    if kind == "modernbert":
        model = modernbert(tmp_path / kind, mlp_dropout=0.5, **rates)
    else:
        model = folder_of(tmp_path / kind, kind, **rates)
    policy = policy_of(model, trust=kind != "modernbert")
    assert policy.model.training
    _, seen = add_gradient(policy)
    assert (seen.ratio - 1).abs().max() < 1e-5


# --- 16 bits ----------------------------------------------------------------------------------

class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the dtypes and sizes of every linear layer's product."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.append((args[-2].dtype, args[-1].dtype, tuple(args[-1].shape)))
        return op(*args, **(kwargs or {}))

    def __enter__(self):
        self.seen = []
        return super().__enter__()


@each("llada", "tied")
def test_16_bit_bases_multiply_in_16_bits_and_the_head_in_32(kind, shelf):
    policy = policy_of(shelf[kind], "--dtype", "bfloat16")
    head, embedding = policy.model.get_output_embeddings(), policy.model.get_input_embeddings()
    assert head.weight.dtype == torch.float32 and embedding.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trained(policy).values()} == {torch.float32}
    # Not cast up in front of a product that casts down again: that is a copy of every input.
    given = set()
    for name, module in policy.model.named_modules():
        if "lora_A." in name:
            module.register_forward_pre_hook(lambda layer, args: given.add(args[0].dtype))
    ids = torch.arange(20, 34).view(2, 7)
    with Products() as products:
        logits = policy(ids, torch.ones_like(ids), torch.tensor([[1, 2, 3]] * 2))
    V = logits.shape[-1]
    assert logits.dtype == torch.float32 and given == {torch.bfloat16}
    for a, b, shape in products.seen:
        expected = torch.float32 if V in shape else torch.bfloat16
        assert a == b == expected, shape
    assert len(products.seen) >= 14 * 3 + 1          # base, lora_A, lora_B of a layer; the head
    assert not torch.equal(logits, logits.bfloat16().float())
    _, seen = add_gradient(policy)
    assert (seen.ratio - 1).abs().max() < 1e-3


def test_bfloat16_gradients_are_near_those_of_float32(shelf):
    grads = []
    for dtype in ("float32", "bfloat16"):
        policy = policy_of(shelf["llada"], "--dtype", dtype)
        torch.manual_seed(2)
        ids = torch.randint(20, 60, (4, 12))
        logits = policy(ids, torch.ones_like(ids), torch.tensor([[3, 7]] * 4))
        logits.log_softmax(-1)[..., 30].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in trained(policy).values()]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.98


# --- ids --------------------------------------------------------------------------------------

def test_ids_without_a_token_and_the_mask_are_never_drawn(tmp_path):
    n = len(make_tiny.make_tokenizer())

    def likely(weights):                             # ids beyond the tokenizer would win
        weights["model.transformer.ff_out.weight"][n:] *= 100

    policy = policy_of(folder_of(tmp_path / "more", "llada", likely, embedding_size=n + 20))
    assert policy.never_ids == {policy.mask_id, *range(n, n + 20)}
    traj, _ = add_gradient(policy)
    assert traj.o.max() < n and (traj.o != policy.mask_id).all()
    assert all(isinstance(text, str) for text in policy.decode(traj.o))


def test_padding_fills_as_eos_does(shelf):
    """dLLM's Qwen3 ends a turn by <|im_end|> and fills by <|endoftext|>, its padding."""
    policy = policy_of(shelf["llada"])
    policy.pad_id, policy.fill_ids = 7, {policy.eos_id, 7}
    head = policy.model.get_output_embeddings()
    head.register_forward_hook(lambda layer, args, out: torch.zeros_like(out).index_fill(
        -1, torch.tensor([7, policy.eos_id]), 50.0))             # nothing but filling is likely
    q, q_mask = prompts(policy)
    traj = agrpo.rollout(policy, q, q_mask, agrpo.Decoding(C=6, m=3, block_length=2))
    assert set(traj.o[:, :2].flatten().tolist()) <= {7, policy.eos_id}
    assert (traj.step_of[:, 2:] == 3).all()                      # ended after the first block


def test_a_model_that_names_no_mask_token_needs_the_flag(tmp_path):
    folder = folder_of(tmp_path / "unnamed", "llada", mask_token_id=None)
    names = json.loads((tmp_path / "unnamed" / "tokenizer_config.json").read_text())
    mask = names.pop("mask_token")
    (tmp_path / "unnamed" / "tokenizer_config.json").write_text(json.dumps(names))
    special = tmp_path / "unnamed" / "special_tokens_map.json"
    special.write_text(json.dumps({k: v for k, v in json.loads(special.read_text()).items()
                                   if k != "mask_token"}))
    tokenizer = make_tiny.make_tokenizer()
    if mask.strip("<|[]>").lower() != "mask":
        assert "--mask_id" in refusal(folder)
    assert policy_of(folder, "--mask_id", "9").mask_id == 9
    assert "--mask_id" in refusal(folder, "--mask_id", str(len(tokenizer)))
    assert policy_of(folder, "--mask_id", "9", "--shift", "1").shift == 1


def test_a_template_without_a_system_role_gets_it_before_the_question(shelf):
    policy = policy_of(shelf["llada"])
    policy.tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}")
    chat = [dict(role="system", content="be brief"), dict(role="user", content="1 + 1")]
    assert policy.render(chat) == "[user]be brief\n\n1 + 1"
    policy.tokenizer.chat_template = "{{ enable_thinking }} {{ add_generation_prompt }}"
    assert policy.render(chat) == "False True"


# --- what is refused --------------------------------------------------------------------------

def test_causal_models_are_refused(tmp_path):
    left = folder_of(tmp_path / "left", "llada", causal=True, hears_mask=False)
    assert "is causal" in refusal(left)
    small = transformers.LlamaConfig(vocab_size=120, hidden_size=16, intermediate_size=16,
                                     num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(small).save_pretrained(tmp_path / "llama")
    make_tiny.make_tokenizer().save_pretrained(tmp_path / "llama")
    assert "no masked language model" in refusal(str(tmp_path / "llama"))


def test_block_diffusion_models_need_a_block_causal_policy(tmp_path, monkeypatch):
    code = A2D.replace("a2d-qwen3", "sdar").replace("A2DQwen3LMHeadModel", "SDARForCausalLM")
    classes = "A2DQwen3Config", "SDARForCausalLM", "A2DQwen3Model"
    monkeypatch.setitem(CODE, "sdar", (code, *classes))
    folder = folder_of(tmp_path / "sdar", "sdar", **QWEN)
    assert "block-diffusion" in refusal(folder)
    assert "FrozenBlockCausal" in refusal(folder, "--policy", "lab/policies.py:FrozenContext")
    policy = policy_of(folder, "--policy", "lab/policies.py:FrozenBlockCausal")
    assert policy.block_causal and "block" in policy.notes[-1]


def test_block_diffusion_is_known_by_name_where_the_config_does_not_say(tmp_path):
    """dLLM's bd3lm and mdlm models have the same configuration."""
    folder = folder_of(tmp_path / "Qwen3-0.6B-diffusion-bd3lm-v0.1", "a2d")
    assert "block-diffusion" in refusal(folder)


def test_own_code_needs_a_word_from_the_user(shelf):
    assert "--trust_remote_code" in refusal(shelf["llada"], trust=False)


def nan(weights):
    weights["model.transformer.ln_f.weight"][:] = math.nan


def lost(weights):
    del weights["model.transformer.blocks.1.up_proj.weight"]


def lost_in_dream(weights):
    del weights["model.layers.1.mlp.gate.weight"]


def wider(weights):
    weights["model.transformer.ff_out.weight"] = torch.randn(120, 64)


@pytest.mark.parametrize("kind, how, change, says", [
    ("llada", {}, nan, "not finite"),
    ("llada", {}, lost, "model.transformer.blocks.1.up_proj.weight"),
    ("dream", {}, lost_in_dream, "model.layers.1.mlp.gate.weight"),
    ("llada", {}, wider, "could not be loaded"),
    ("llada", dict(headless=True), lambda weights: None, "an LM head"),
], ids=["nan", "lost", "lost in Dream", "shape", "headless"])
def test_damaged_checkpoints_are_refused_by_name(kind, how, change, says, tmp_path):
    assert says in refusal(folder_of(tmp_path / "damaged", kind, change, **how))


def test_wrong_folders_are_one_sentence(shelf, tmp_path):
    assert "no config.json there" in refusal(str(tmp_path))
    assert "no config.json there" in refusal("./no/such/folder")
    half = shutil.copytree(shelf["llada"], tmp_path / "half")
    os.truncate(half / "model.safetensors", 2000)
    assert "could not be loaded" in refusal(str(half))
    (half / "model.safetensors").unlink()
    assert "could not be loaded" in refusal(str(half))


def test_a_hub_out_of_reach_is_one_sentence_within_seconds(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("tasks.hub_answers", lambda hub: False)
    began = time.time()
    assert "check name and network" in refusal("nobody/no-such-model")
    assert time.time() - began < 10


def test_code_for_transformers_4_is_refused_on_5(shelf, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.2.0")
    assert "pip install 'transformers<5'" in refusal(shelf["dream"])


def test_every_pin_is_a_commit():
    assert all(pin is None or len(pin) == 40 and int(pin, 16) for pin in agrpo.KNOWN.values())


# --- LoRA -------------------------------------------------------------------------------------

def test_experts_and_routers_are_not_adapted(shelf):
    policy = policy_of(shelf["dream"])
    assert not any("experts" in name or "gate" in name for name in trained(policy))


def test_an_adapter_comes_back_and_only_to_its_model(shelf, tmp_path):
    policy = policy_of(shelf["llada"])
    policy.model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(20, 34).view(2, 7)
    again = policy_of(shelf["llada"], "--adapter", str(tmp_path / "adapter"), loud=False)
    with torch.no_grad():
        at = torch.tensor([[1, 2]] * 2)
        a, b = (p(ids, torch.ones_like(ids), at) for p in (policy, again))
    assert torch.equal(a, b)
    with pytest.raises(agrpo.UserError, match="the model it was trained on"):
        policy_of(shelf["a2d"], "--adapter", str(tmp_path / "adapter"))
