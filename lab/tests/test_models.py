"""Models as users bring them: a folder in the hub's layout with weights, a tokenizer and Python code of its own.

The code below stands in for LLaDA's and Dream's: same names, same quirks, a few thousand random weights. It is written
into a folder and loaded the way a real checkpoint is, through agrpo.main or agrpo.Policy and lab/models.py.
"""
import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import agrpo
import tasks
from lab import make_tiny, models, plan
from lab.cli import UserError

ROOT = Path(__file__).resolve().parents[2]

# --- The models -------------------------------------------------------------------------------------------------------

BOTH = '''
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


def rotated(x):                                      # (N, heads, L, width), rotary positions 0..L-1
    L, half = x.shape[2], x.shape[3] // 2
    angle = torch.arange(L)[:, None] / 100.0 ** (torch.arange(half) / half)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1).to(x.dtype)


def attend(q, k, v, heads, mask, causal, dropout):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    x = F.scaled_dot_product_attention(rotated(q), rotated(k), v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    return x.transpose(1, 2).flatten(2)


class Norm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return (F.rms_norm(x.float(), x.shape[-1:]) * self.weight).to(x.dtype)
'''

LLADA = BOTH + '''
class LLaDAConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(self, d_model=0, n_layers=0, n_heads=0, mlp_hidden_size=0, embedding_size=0, vocab_size=0,
                 attention_dropout=0.0, use_cache=True, hears_mask=True, causal=False, headless=False, **more):
        super().__init__(use_cache=use_cache, **more)
        self.d_model, self.n_layers, self.n_heads, self.mlp_hidden_size = d_model, n_layers, n_heads, mlp_hidden_size
        self.embedding_size, self.vocab_size, self.attention_dropout = embedding_size, vocab_size, attention_dropout
        self.hears_mask, self.causal, self.headless = hears_mask, causal, headless


class LLaDABlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.attn_norm, self.ff_norm = Norm(c.d_model), Norm(c.d_model)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(c.d_model, c.d_model, bias=False))
        for name in ("ff_proj", "up_proj"):
            setattr(self, name, nn.Linear(c.d_model, c.mlp_hidden_size, bias=False))
        self.ff_out = nn.Linear(c.mlp_hidden_size, c.d_model, bias=False)

    def forward(self, x, mask):
        c, y = self.config, self.attn_norm(x)
        x = x + self.attn_out(attend(self.q_proj(y), self.k_proj(y), self.v_proj(y), c.n_heads, mask, c.causal,
                                     c.attention_dropout if self.training else 0.0))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))


class LLaDAModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, self.strategy = c, None
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.embedding_size, c.d_model), blocks=nn.ModuleList(LLaDABlock(c) for _ in range(c.n_layers)),
            ln_f=Norm(c.d_model), ff_out=nn.Linear(c.d_model, c.embedding_size, bias=False)))

    def set_activation_checkpointing(self, strategy):
        self.strategy = strategy

    def forward(self, ids, mask):
        x = self.transformer.wte(ids)
        if mask is not None and self.config.hears_mask and not self.config.causal and (mask == 0).any():
            mask = torch.where(mask.bool(), 0.0, torch.finfo(x.dtype).min)[:, None, None, :].to(x.dtype)
        else:
            mask = None
        for block in self.transformer.blocks:
            x = checkpoint(block, x, mask, use_reentrant=False) if self.strategy == "whole_layer" else block(x, mask)
        return self.transformer.ff_out(self.transformer.ln_f(x))


class LLaDAModelLM(PreTrainedModel):                 # no post_init, as in the original
    config_class, base_model_prefix = LLaDAConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDAModel(config)
        torch.backends.cuda.enable_mem_efficient_sdp(False)

    def forward(self, input_ids, attention_mask=None, use_cache=None):       # no position_ids
        assert not (self.config.use_cache if use_cache is None else use_cache), "The kvcache is not supported for MDM."
        return MaskedLMOutput(logits=self.model(input_ids, attention_mask))

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def get_output_embeddings(self):
        return None if self.config.headless else self.model.transformer.ff_out

    def tie_weights(self):
        pass
'''

DREAM = BOTH + '''
class DreamConfig(PretrainedConfig):
    model_type = "Dream"

    def __init__(self, hidden_size=0, num_hidden_layers=0, num_attention_heads=1, num_key_value_heads=1,
                 intermediate_size=0, vocab_size=0, attention_dropout=0.0, tie_word_embeddings=False, **more):
        super().__init__(tie_word_embeddings=tie_word_embeddings, **more)
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.intermediate_size, self.attention_dropout = intermediate_size, attention_dropout


class DreamAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, kv = c.hidden_size, c.hidden_size * c.num_key_value_heads // c.num_attention_heads
        self.heads, self.groups = c.num_attention_heads, c.num_attention_heads // c.num_key_value_heads
        self.attention_dropout = c.attention_dropout
        self.q_proj, self.o_proj = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.k_proj, self.v_proj = nn.Linear(d, kv), nn.Linear(d, kv)

    def forward(self, x, mask):
        k, v = (proj(x).repeat(1, 1, self.groups) for proj in (self.k_proj, self.v_proj))
        return self.o_proj(attend(self.q_proj(x), k, v, self.heads, mask, False,
                                  self.attention_dropout if self.training else 0.0))


class DreamMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.hidden_size, c.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DreamDecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = DreamAttention(c), DreamMLP(c)
        self.input_layernorm, self.post_attention_layernorm = Norm(c.hidden_size), Norm(c.hidden_size)

    def forward(self, x, mask):
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class DreamPreTrainedModel(PreTrainedModel):
    config_class, base_model_prefix = DreamConfig, "model"
    supports_gradient_checkpointing = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):       # as Dream's: cannot be asked what was loaded
        model = super().from_pretrained(*args, **kwargs)
        model.generation_config = None
        return model


class DreamBaseModel(DreamPreTrainedModel):
    def __init__(self, c):
        super().__init__(c)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers, self.norm = nn.ModuleList(DreamDecoderLayer(c) for _ in range(c.num_hidden_layers)), Norm(c.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, ids, mask):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            again = self.gradient_checkpointing and self.training
            x = self._gradient_checkpointing_func(layer.__call__, x, mask) if again else layer(x, mask)
        return self.norm(x)


class DreamModel(DreamPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is not None and attention_mask.dim() != 4:
            raise RuntimeError(f"the mask must be 4D, not {attention_mask.dim()}D")
        return MaskedLMOutput(logits=self.lm_head(self.model(input_ids, attention_mask)))

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head
'''


V4 = int(transformers.__version__.split(".")[0]) < 5  # Dream's code, and so its double here, needs it
SIZES = (dict(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=96, embedding_size=len(make_tiny.make_tokenizer())),
         dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96))


def folder_of(where, code, config, change=lambda weights: None):
    """A checkpoint in the hub's layout: the code's config and model class, random weights that `change` may edit."""
    from safetensors.torch import save_file

    where.mkdir(parents=True)
    tokenizer = make_tiny.make_tokenizer()
    prefix, model_class, sizes = ("LLaDA", "LLaDAModelLM", SIZES[0]) if code is LLADA else ("Dream", "DreamModel", SIZES[1])
    config = dict(
        model_type="llada" if code is LLADA else "Dream", architectures=[model_class],
        auto_map={"AutoConfig": f"modeling.{prefix}Config", "AutoModel": f"modeling.{model_class}"}, **sizes,
        vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **config)
    (where / "modeling.py").write_text(code)
    (where / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(where)
    scope = {"__name__": "built"}
    exec(code, scope)
    torch.manual_seed(0)
    model = scope[model_class](scope[f"{prefix}Config"](**config))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
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


@pytest.fixture(scope="session", autouse=True)
def own_code_goes_elsewhere(tmp_path_factory):
    """transformers copies a checkpoint's code into a cache; not into the user's."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(models, "hub_answers", lambda hub: False)
        yield


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    where = tmp_path_factory.mktemp("shelf")
    dreams = dict(dream=folder_of(where / "dream", DREAM, {}),
                  dream_tied=folder_of(where / "dream_tied", DREAM, dict(tie_word_embeddings=True))) if V4 else {}
    return dict(
        dreams, llada=folder_of(where / "llada", LLADA, {}),
        llada_deaf=folder_of(where / "llada_deaf", LLADA, dict(hears_mask=False)), modernbert=modernbert(where / "modernbert"))


def each(*kinds):
    return pytest.mark.parametrize("kind", [kind for kind in kinds if V4 or "dream" not in kind])


needs_dream = pytest.mark.skipif(not V4, reason="Dream needs transformers 4")


def config(model, **flags):
    return SimpleNamespace(**dict(dict(
        model=model, revision=None, trust_remote_code=True, load_in_4bit=False, dtype="float32", device="cpu", seed=0, lora_r=4,
        lora_alpha=4, activation_checkpointing=False, adapter=None), **flags))


def policy_of(model, adapters=False, **flags):
    """A Policy by the path of agrpo.run, and the lines for the log."""
    cfg = config(model, **flags)
    policy = agrpo.Policy(*models.load_model(cfg), cfg.device)
    lines = models.preflight(policy, list(range(10, 22)))
    if adapters:
        lines += models.add_adapters(policy, cfg)
        torch.manual_seed(1)
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:                     # zero at first: LoRA would change nothing
                torch.nn.init.normal_(p, std=0.1)
    return policy, " | ".join(lines)


def refusal(model, **flags):
    with pytest.raises(UserError) as e:
        policy_of(model, **flags)
    sentence = str(e.value)
    assert "\n" not in sentence and f"--model {model}" in sentence
    return sentence


# --- The whole loop ---------------------------------------------------------------------------------------------------


@pytest.fixture
def even(monkeypatch):
    """A task that random weights solve now and then, with prompts of several lengths."""
    def grade(text, example):
        numbers = [int(word) for word in text.split() if word.isdigit()]
        share = sum(n % 2 == 0 for n in numbers) / max(len(numbers), 1)
        return tasks.Grade(share, share > 0.6, 1.0, "even numbers", text[:20])

    def make(seed, index, split, **options):
        return dict(start=seed + index, length=3 + index % 4)

    prompt = lambda x: [dict(role="user", content=" ".join(map(str, range(x["start"] % 90, x["start"] % 90 + x["length"]))))]
    monkeypatch.setitem(tasks.TASKS, "even", tasks.Task("even", prompt, grade, None, make=make))


def run(out, model, *flags):
    """Two updates by agrpo.main. -> (exit code, console, metrics)"""
    console, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(console), contextlib.redirect_stderr(errors):
        code = agrpo.main(["--task", "even", "--device", "cpu", "--model", model, "--out", str(out), "--updates", "2",
                           "--questions", "4", "--G", "4", "--C", "8", "--m", "4", "--k", "2", "--eval_n", "6", "--steps", "4",
                           "--rollout_batch", "8", "--micro_batch", "6", *flags])
    assert code == 0, errors.getvalue()
    return " ".join(console.getvalue().split()), [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]


EXPECTED = {
    "llada": ("attention mask: 2d", "is predicted at i;", "14 linear layers, 7 in each of 2 blocks (q_proj k_proj v_proj "
              "attn_out ff_proj up_proj ff_out), not on the head"),
    "llada_deaf": ("prompts of one length only", "14 linear layers"),
    "dream": ("attention mask: 4d", "is predicted at i - 1", "14 linear layers, 7 in each of 2 blocks (q_proj o_proj k_proj "
              "v_proj gate_proj up_proj down_proj), not on the head"),
    "dream_tied": ("attention mask: 4d", "14 linear layers"),
    "modernbert": ("attention mask: 2d", "16 linear layers, 4 in each of 4 blocks"),
}


@each(*EXPECTED)
def test_the_whole_loop_runs_on(kind, shelf, even, tmp_path):
    own = [] if kind == "modernbert" else ["--trust_remote_code"]
    console, metrics = run(tmp_path / "run", shelf[kind], *own)
    for part in EXPECTED[kind] + (("its own Python code runs (--trust_remote_code)",) if own else ()):
        assert part.replace(";", "") in console
    assert len(metrics) == 2 and all(x["grad_norm"] > 0 for x in metrics)
    assert float(re.search(r"max\|ratio - 1\|\D+([\d.e+-]+)", console)[1]) < 1e-3
    trained = int(re.search(r"([\d,]+) of [\d,]+ parameters are trained", console)[1].replace(",", ""))
    assert trained == sum(p.numel() for p in load_adapter_file(tmp_path / "run"))


def load_adapter_file(folder):
    from safetensors.torch import load_file
    return load_file(folder / "adapter" / "adapter_model.safetensors").values()


@each("llada", "dream_tied")
def test_below_float32_with_recomputed_activations_and_the_adapter_evaluates(kind, shelf, even, tmp_path):
    how = ["--trust_remote_code", "--dtype", "bfloat16"]
    console, metrics = run(tmp_path / "run", shelf[kind], *how, "--activation_checkpointing")
    assert all(x["grad_norm"] > 0 for x in metrics)
    evaluation = io.StringIO()
    with contextlib.redirect_stdout(evaluation):
        assert agrpo.main(["--task", "even", "--device", "cpu", "--mode", "eval", "--model", shelf[kind], *how, "--C", "8", "--m", "4",
                           "--adapter", str(tmp_path / "run" / "adapter"), "--eval_n", "6", "--steps", "4",
                           "--out", str(tmp_path / "eval")]) == 0
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())["results"]
    assert [x["accuracy"] for x in found] == [x["accuracy"] for x in final]


# --- The head on chosen rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True], ids=["base", "lora"])
@each("llada", "dream", "dream_tied", "modernbert")
@torch.no_grad()
def test_the_head_on_chosen_rows_changes_no_digit(kind, adapters, shelf):
    policy, _ = policy_of(shelf[kind], adapters)
    ids, rows, seen = torch.randint(5, 100, (3, 14)), torch.tensor([2, 9, 17, 30, 41]), []
    head = policy.model.get_output_embeddings()
    with head.register_forward_hook(lambda layer, args, out: seen.append(args[0])):
        chosen = policy(ids, torch.ones_like(ids), rows)
        policy.hook.remove()
        full = policy.model(input_ids=ids).logits.flatten(0, 1)[rows - policy.shift]
    here, everywhere = seen
    assert len(here) == 5 and chosen.dtype == torch.float32
    assert torch.equal(here, everywhere.flatten(0, 1)[rows - policy.shift]) and torch.equal(chosen, head(here))
    assert (chosen - full).abs().max() < 1e-6        # a matrix product may round differently with another number of rows


@each("llada", "dream_tied", "modernbert")
def test_the_head_of_a_bfloat16_model_is_float32_and_its_embedding_is_not(kind, shelf):
    policy, lines = policy_of(shelf[kind], adapters=True, dtype="bfloat16")
    head, embedding = policy.model.get_output_embeddings(), policy.model.get_input_embeddings()
    assert head.weight.dtype == torch.float32 and embedding.weight.dtype == torch.bfloat16
    assert torch.equal(head.weight.bfloat16(), embedding.weight) or kind == "llada"
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}
    assert "attention mask: " + ("4d" if "dream" in kind else "2d") in lines         # bf16's noise is not taken for deafness
    logits = policy(torch.arange(10, 20)[None], torch.ones(1, 10, dtype=torch.long), torch.arange(1, 9))
    assert not torch.equal(logits, logits.bfloat16().float())


@needs_dream
def test_an_adapter_that_adapts_the_head_as_well_still_gets_chosen_rows(shelf, tmp_path):
    from peft import LoraConfig, get_peft_model

    cfg = config(shelf["dream"], adapter=str(tmp_path))
    theirs = get_peft_model(models.load_model(cfg)[0], LoraConfig(r=2, target_modules=["q_proj", "lm_head"],
                                                                  init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    policy = agrpo.Policy(*models.load_model(cfg))
    models.preflight(policy, list(range(10, 22)))
    models.load_adapter(policy, cfg)
    ids, rows = torch.randint(5, 100, (2, 9)), torch.tensor([3, 12])
    with torch.no_grad():
        difference = policy(ids, torch.ones_like(ids), rows) - theirs(input_ids=ids).logits.flatten(0, 1)[rows - 1]
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("how", [["--dtype", "bfloat16"], ["--load_in_4bit"]])
def test_all_weights_are_trained_in_float32_or_not_at_all(how, shelf):
    with pytest.raises(UserError, match="add --dtype float32, or keep LoRA"):
        agrpo.configure(["--model", shelf["llada"], "--lora_r", "0", "--device", "cpu", *how])


# --- What the model does with its inputs ------------------------------------------------------------------------------


def test_a_model_that_ignores_its_mask_gets_prompts_of_one_length(shelf, even):
    policy, lines = policy_of(shelf["llada_deaf"])
    assert policy.ignores_mask and "one length only" in lines
    data = tasks.load("even", "train", size=9)
    batches = list(policy.batches([policy.encode("even", data[i]) for i in range(9)], rows=8, copies=2))
    assert all(batch.q_mask.all() for batch in batches)
    assert len(batches) == 4                         # as few as can be: the prompts have four lengths


@each("llada", "dream", "modernbert")
def test_padding_in_a_mixed_batch_changes_nothing(kind, shelf):
    policy, _ = policy_of(shelf[kind])
    prompts = [list(range(20, 31)), list(range(40, 45))]
    both, alone = policy.pad(prompts), policy.pad(prompts[1:])
    a = policy(both.q, both.q_mask, torch.arange(17, 22))
    b = policy(alone.q, alone.q_mask, torch.arange(0, 5))
    assert (a - b)[1:].abs().max() < 1e-5            # [0] has no position before it to be predicted at, if shifted


@needs_dream
def test_a_model_may_mask_out_whole_rows_of_attention(shelf, monkeypatch):
    """Some copies of Dream's code do that to a 2D mask, and give NaN at the padding: then the 4D mask is the one."""
    policy, _ = policy_of(shelf["dream"])
    forward = type(policy.model).forward

    def outer(self, input_ids, attention_mask=None):
        if attention_mask is not None and attention_mask.dim() == 2:
            out = forward(self, input_ids)
            out.logits[(attention_mask == 0).any(dim=1)] = math.nan
            return out
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(type(policy.model), "forward", outer)
    policy.hook_head()
    models.preflight(policy, list(range(10, 22)))
    assert policy.mask_kind == "4d" and not policy.ignores_mask


def test_a_causal_model_is_refused(shelf, tmp_path):
    assert "is causal" in refusal(folder_of(tmp_path / "left", LLADA, dict(causal=True)))
    tiny = transformers.LlamaConfig(vocab_size=120, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                    num_attention_heads=2)
    transformers.LlamaForCausalLM(tiny).save_pretrained(tmp_path / "llama")
    make_tiny.make_tokenizer().save_pretrained(tmp_path / "llama")
    assert "no masked language model" in refusal(str(tmp_path / "llama"))


def nan(weights):
    weights["model.transformer.ln_f.weight"][:] = math.nan


def lost(weights):
    del weights["model.transformer.blocks.1.up_proj.weight"]


def lost_in_dream(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def wider(weights):
    weights["model.transformer.ff_out.weight"] = torch.randn(120, 64)


@pytest.mark.parametrize("code, how, change, says", [
    (LLADA, {}, nan, "not finite"),
    (LLADA, {}, lost, "lack 1 of the model's weights (model.transformer.blocks.1.up_proj.weight)"),
    pytest.param(DREAM, {}, lost_in_dream, "lack 1 of the model's weights (model.layers.1.mlp.up_proj.weight)", marks=needs_dream),
    (LLADA, {}, wider, "other shapes than its config.json says"),
    (LLADA, dict(headless=True), None, "no LM head"),
], ids=["nan", "lost", "lost in Dream", "shape", "headless"])
def test_damaged_checkpoints_are_refused_by_name(code, how, change, says, tmp_path):
    assert says in refusal(folder_of(tmp_path / "damaged", code, how, change or (lambda weights: None)))


def test_folders_without_or_with_half_the_weights_are_refused(shelf, tmp_path):
    import shutil

    half = shutil.copytree(shelf["llada"], tmp_path / "half")
    os.truncate(half / "model.safetensors", 2000)
    assert "could not be loaded" in refusal(str(half))
    (half / "model.safetensors").unlink()
    assert "no file named" in refusal(str(half))


def test_own_code_needs_a_word_from_the_user(shelf):
    assert "--trust_remote_code" in refusal(shelf["llada"], trust_remote_code=False)


def test_a_prompt_with_the_mask_token_and_ids_out_of_range_are_refused(shelf):
    policy, _ = policy_of(shelf["llada"])
    with pytest.raises(UserError, match="holds the .MASK. token"):
        models.preflight(policy, [10, policy.mask_id, 11])
    policy.model.config.mask_token_id = 126336
    with pytest.raises(UserError, match=r"must be below its \d+ embeddings"):
        models.special_ids(policy.model, policy.tokenizer)


def test_special_ids_come_from_the_config_then_the_tokenizer_then_its_added_tokens(shelf):
    policy, _ = policy_of(shelf["llada"])
    tokenizer = SimpleNamespace(mask_token_id=7, eos_token_id=None, pad_token_id=None, get_added_vocab=lambda: {"<|mdm_mask|>": 9})
    policy.model.config.eos_token_id = [4, 5]
    assert models.special_ids(policy.model, tokenizer) == (1, 4, 4)
    del policy.model.config.mask_token_id
    assert models.special_ids(policy.model, tokenizer) == (7, 4, 4)
    tokenizer.mask_token_id = None
    assert models.special_ids(policy.model, tokenizer) == (9, 4, 4)
    tokenizer.get_added_vocab = dict
    with pytest.raises(UserError, match="names a .MASK. and an EOS"):
        models.special_ids(policy.model, tokenizer)


# --- The hub ----------------------------------------------------------------------------------------------------------


def test_a_known_id_runs_its_own_code_at_the_pinned_revision_and_says_so(tmp_path):
    """From the hub's cache, with no hub: as on a machine that has downloaded the model before."""
    name, pin = "GSAI-ML/LLaDA-8B-Instruct", models.KNOWN["GSAI-ML/LLaDA-8B-Instruct"]
    folder_of(tmp_path / "hub" / "models--GSAI-ML--LLaDA-8B-Instruct" / "snapshots" / pin, LLADA, {})
    out = subprocess.run(
        [sys.executable, "agrpo.py", "--mode", "eval", "--task", "countdown", "--model", name, "--device", "cpu", "--dtype", "float32",
         "--C", "6", "--m", "2", "--block_length", "6", "--eval_C", "6", "--eval_block", "6", "--eval_n", "2", "--steps", "2",
         "--out", str(tmp_path / "eval")],
        cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"))
    assert out.returncode == 0, out.stderr
    assert f"its own Python code runs (a known model), revision {pin}" in " ".join(out.stdout.split())
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["config"]["revision"] == pin


def test_every_pin_is_a_commit_hash():
    for pin in models.KNOWN.values():
        assert pin is None or re.fullmatch("[0-9a-f]{40}", pin)


def test_a_hub_out_of_reach_and_a_gated_model_are_one_sentence(monkeypatch):
    assert "check the name and the network, or give the folder of a local copy" in refusal("nobody/no-such-model")

    def gated(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/a/b.")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    assert "accept its terms on https://huggingface.co/a/b" in refusal("a/b")


@needs_dream
def test_code_that_transformers_5_would_load_wrongly_is_refused(shelf, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.2.0")
    assert "pip install 'transformers<5'" in refusal(shelf["dream"])


# --- Memory -----------------------------------------------------------------------------------------------------------


def gradients(model, **flags):
    """Of one batch of rollouts, by parameter; and the bytes kept for the backward pass."""
    policy, _ = policy_of(model, adapters=True, **flags)
    q = torch.arange(10, 26).view(2, 8)
    traj = agrpo.rollout(policy, q, torch.ones_like(q), C=6, m=3, block_length=6, mask_id=policy.mask_id, eos_id=policy.eos_id,
                         rand=agrpo.row_random([0, 1]))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        agrpo.accumulate_gradient(policy, traj, torch.tensor([1.0, -1.0]), k=0, rows_total=2, mask_id=policy.mask_id,
                                  eos_id=policy.eos_id)
    return {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}, sum(kept), policy


@each("llada", "dream", "modernbert")
def test_recomputing_activations_saves_memory_and_changes_no_gradient(kind, shelf):
    plain, kept, _ = gradients(shelf[kind])
    again, less, _ = gradients(shelf[kind], activation_checkpointing=True)
    assert less < kept / 3
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(g.abs().sum() > 0 for g in plain.values())


def test_training_mode_brings_no_dropout(tmp_path):
    """Else rollout and loss disagree about the policy, and every ratio is off."""
    makers = [lambda: folder_of(tmp_path / "drop_l", LLADA, dict(attention_dropout=0.5)),
              lambda: modernbert(tmp_path / "drop_m", attention_dropout=0.5, mlp_dropout=0.5, embedding_dropout=0.5),
              lambda: folder_of(tmp_path / "drop_d", DREAM, dict(attention_dropout=0.5))]
    for model in [make() for make in makers[:3 if V4 else 2]]:
        _, _, policy = gradients(model, activation_checkpointing=True)
        ids = torch.arange(10, 26).view(2, 8)
        a, b = (policy(ids, torch.ones_like(ids), torch.arange(1, 8)) for _ in range(2))
        assert policy.model.training and torch.equal(a, b)


def test_a_model_that_cannot_recompute_says_what_to_do(shelf):
    policy, _ = policy_of(shelf["modernbert"])
    type(policy.model).supports_gradient_checkpointing, before = False, True
    try:
        with pytest.raises(UserError, match="--activation_checkpointing false"):
            models.save_memory(policy.model)
    finally:
        type(policy.model).supports_gradient_checkpointing = before


def test_loading_leaves_memory_efficient_attention_on(shelf):
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    models.load_model(config(shelf["llada"]))
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_experts_and_routers_are_not_adapted():
    block = torch.nn.ModuleDict(dict(q_proj=torch.nn.Linear(2, 2), mlp=torch.nn.ModuleDict(dict(
        gate=torch.nn.Linear(2, 2), experts=torch.nn.ModuleList(torch.nn.ModuleDict(dict(up_proj=torch.nn.Linear(2, 2)))
                                                               for _ in range(2))))))
    model = torch.nn.ModuleDict(dict(layers=torch.nn.ModuleList([block, block]), lm_head=torch.nn.Linear(2, 2)))
    assert models.block_linears(model) == ["layers.0.q_proj"]        # the same module twice: named once


# --- The plan ---------------------------------------------------------------------------------------------------------


def shape_in(folder):
    return plan.shape_of(plan.read_config(folder)[0])


@each("llada", "dream", "dream_tied", "modernbert")
def test_the_plan_counts_what_a_run_then_has(kind, shelf):
    policy, _ = policy_of(shelf[kind], adapters=True)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in policy.model.parameters()) - trained
    shape = shape_in(shelf[kind])
    cfg = agrpo.configure(["--model", shelf[kind], "--lora_r", "4", "--device", "cpu"])
    assert plan.needs(cfg, shape, 20)["lora"] == trained
    assert abs(shape.parameters / total - 1) < 0.01  # biases are left out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_knows_what_a_block_keeps(dtype, shelf):
    """Against a count of every tensor that autograd saved, on a batch like the loss's."""
    for kind in ("llada", "dream")[:2 if V4 else 1]:
        policy, _ = policy_of(shelf[kind], adapters=True, dtype=dtype)
        weights, kept = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}, {}

        def keep(t):
            if t.untyped_storage().data_ptr() not in weights:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        ids = torch.randint(5, 100, (4, 64))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = policy(ids, torch.ones_like(ids), torch.arange(1, 9))
        cfg = agrpo.configure(["--model", shelf[kind], "--lora_r", "4", "--dtype", dtype, "--micro_batch", "4", "--C", "32", "--m",
                               "4", "--device", "cpu"])
        assert abs(plan.kept_bytes(cfg, shape_in(shelf[kind]), 64) / sum(kept.values()) - 1) < 0.25
        del out


def test_the_plan_of_llada_8b_needs_no_download(capsys, monkeypatch):
    monkeypatch.setattr(plan, "is_cached", lambda cfg: False)
    assert plan.main(["gsm8k", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    for part in ("8,015.6 M: 15.0 GB in bfloat16, and the LM head 2.1 GB", "167.8 M on 224 linear layers", "16.0 GB to download",
                 "1,024 forwards of 16 rows", "768 forwards and backwards of 4", "14.7 M tokens"):
        assert part in text
    shape = plan.shape_of(plan.DREAM)
    assert abs(shape.parameters * 2 / 15_231_271_864 - 1) < 1e-4     # the size of its published files


@pytest.mark.parametrize("short, says", [
    (dict(disk=1e9), "needs 16.0 GB of disk"), (dict(memory=1e9), "needs 16.0 GB of memory"),
    (dict(gpu=8e9), "needs 16.0 GB on the GPU"), ({}, None)])
def test_a_download_that_cannot_fit_is_refused_before_it_starts(short, says, monkeypatch):
    monkeypatch.setattr(plan, "room", lambda cfg: dict(dict(cache="/c", disk=1e12, memory=1e12, gpu=80e9), **short))
    monkeypatch.setattr(plan, "is_cached", lambda cfg: False)
    cfg = config("GSAI-ML/LLaDA-8B-Instruct", dtype="bfloat16")
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
        plan.check_room(cfg, plan.LLADA, None)


def test_loading_asks_whether_there_is_room(shelf, monkeypatch):
    monkeypatch.setattr(plan, "room", lambda cfg: dict(cache="/c", disk=1e12, memory=1e3, gpu=0))
    assert "of memory to be read in" in refusal(shelf["llada"])


def test_a_plan_for_an_unknown_model_says_what_to_do():
    with pytest.raises(UserError, match="put its config.json into a folder"):
        plan.read_config("nobody/no-such-model")
