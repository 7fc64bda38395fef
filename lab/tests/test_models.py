"""Models as users bring them: a folder with weights, a tokenizer and Python code of its own.

Loaded as real checkpoints are, by models.load_policy. The code is in doubles.py. What holds for
every policy that a model may get (ratio, gradient, padding) is in test_policies.py.
"""
import json
import math
import os
import shutil
from functools import partial

import pytest
import torch
import transformers
from conftest import (add_gradient, checkpoint, each, modernbert, policy_of, prompts, shelf,
                      trained)

import agrpo
import make_tiny
import models
import run
from tasks import TaskError


def refusal(model, *flags, **more):
    with pytest.raises(TaskError) as e:
        policy_of(model, *flags, **more)
    sentence = str(e.value)
    assert "\n" not in sentence and f"--model {model}" in sentence
    return sentence


@each("llada", "dream", "tied", "base")
@torch.no_grad()
def test_the_head_on_chosen_rows_changes_no_logit(kind):
    policy = policy_of(shelf[kind])
    policy.model.double()                            # rows in another order round differently
    ids, at = torch.randint(5, 60, (3, 14)), torch.tensor([[2, 9], [5, 13], [1, 2]])
    chosen = policy(ids, torch.ones_like(ids), at)
    mask = torch.ones(3, 14, dtype=torch.bool)
    mask = mask[:, None, None, :] if kind == "dream" else mask
    full = policy.model(input_ids=ids, attention_mask=mask).logits
    shift = 1 if kind == "dream" else 0
    assert policy.shift == shift and chosen.shape == (3, 2, full.shape[-1])
    expected = full[torch.arange(3)[:, None], at - shift]
    assert (chosen - expected).abs().max() < 1e-6


@each("llada", "dream", "modernbert")
def test_train_mode_brings_no_dropout(kind, tmp_path):
    """Else rollout and loss would be two functions."""
    rates = dict(embedding_dropout=0.5, attention_dropout=0.5)
    if kind == "modernbert":
        policy = policy_of(modernbert(tmp_path, mlp_dropout=0.5, **rates))
    else:
        policy = policy_of(checkpoint(tmp_path, kind, **rates))
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
def test_16_bit_bases_multiply_in_16_bits_and_the_head_in_32(kind):
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


def test_bfloat16_gradients_are_near_those_of_float32():
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

    policy = policy_of(checkpoint(tmp_path, "llada", likely, embedding_size=n + 20))
    assert policy.never_ids == {policy.mask_id, *range(n, n + 20)}
    traj, _ = add_gradient(policy)
    assert traj.o.max() < n and (traj.o != policy.mask_id).all()
    assert all(isinstance(text, str) for text in policy.decode(traj.o))


def test_padding_fills_as_eos_does():
    """dLLM's Qwen3 ends a turn by <|im_end|> and fills by <|endoftext|>, its padding."""
    policy = policy_of(shelf["llada"])
    assert policy.pad_id != policy.eos_id
    how = agrpo.Decoding(C=6, m=3, block_length=2)
    for filling in (policy.pad_id, policy.eos_id):               # nothing else is likely
        head = policy.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda layer, args, out: torch.zeros_like(
            out).index_fill(-1, torch.tensor(filling), 50.0))
        traj = agrpo.rollout(policy, *prompts(policy), how)
        hook.remove()
        assert (traj.o[:, :2] == filling).all()
        assert (traj.step_of[:, 2:] == 3).all()                  # ended after the first block


def test_a_model_that_names_no_mask_token_needs_the_flag(tmp_path):
    folder = checkpoint(tmp_path, "llada", mask_token_id=None)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        names = json.loads((tmp_path / file).read_text())
        del names["mask_token"]
        (tmp_path / file).write_text(json.dumps(names))
    tokenizer = make_tiny.make_tokenizer()
    if tokenizer.mask_token.strip("<|[]>").lower() != "mask":
        assert "--mask_id" in refusal(folder)
    assert policy_of(folder, "--mask_id", "9").mask_id == 9
    assert "--mask_id" in refusal(folder, "--mask_id", str(len(tokenizer)))
    assert policy_of(folder, "--mask_id", "9", "--shift", "1").shift == 1


def with_template(where, template):
    """A model whose tokenizer has this chat template."""
    checkpoint(where, "llada")
    (where / "chat_template.jinja").write_text(template)
    return str(where)


def test_a_template_without_a_system_role_gets_it_before_the_question():
    policy = policy_of(shelf["llada"])
    policy.tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}")
    chat = [dict(role="system", content="be brief"), dict(role="user", content="1 + 1")]
    models.look_at_prompts(policy, "--model", [chat])
    assert policy.render(chat) == "[user]be brief\n\n1 + 1"
    policy.tokenizer.chat_template = "{{ enable_thinking }} {{ add_generation_prompt }}"
    assert policy.render(chat) == "False True"


@pytest.mark.parametrize("template, says", [
    ("Solve it!", "drops or cuts the problem"),
    ("{{ messages[-1].content[:10] }}", "drops or cuts the problem"),
    ("{{ messages[-1].contents() }}", "chat template that fails"),
], ids=["drops", "cuts", "fails"])
def test_a_template_that_loses_the_problem_is_found_at_the_start(template, says, tmp_path):
    assert says in refusal(with_template(tmp_path, template))


# --- what is refused --------------------------------------------------------------------------

def remove(name):
    return lambda weights: weights.pop(name)


def nan(weights):
    weights["model.transformer.ln_f.weight"][:] = math.nan


def wider(weights):
    weights["model.transformer.ff_out.weight"] = torch.randn(120, 64)


def whole(weights):
    pass


LOST, GATE = "model.transformer.blocks.1.up_proj.weight", "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize("kind, change, config, says", [
    ("llada", nan, {}, "not finite"),
    ("llada", remove(LOST), {}, LOST),
    ("dream", remove(GATE), {}, GATE),
    ("llada", wider, {}, "could not be loaded"),
    ("llada", whole, dict(headless=True), "an LM head"),
    ("llada", whole, dict(causal=True, hears_mask=False), "is causal"),
], ids=["nan", "lost", "lost in Dream", "shape", "headless", "causal"])
def test_checkpoints_that_cannot_work_are_refused_by_name(kind, change, config, says, tmp_path):
    assert says in refusal(checkpoint(tmp_path / "model", kind, change, **config))


def test_a_causal_model_of_transformers_is_refused(tmp_path):
    small = transformers.LlamaConfig(vocab_size=120, hidden_size=16, intermediate_size=16,
                                     num_hidden_layers=1, num_attention_heads=2)
    transformers.LlamaForCausalLM(small).save_pretrained(tmp_path)
    make_tiny.make_tokenizer().save_pretrained(tmp_path)
    assert "no masked language model" in refusal(str(tmp_path))


def test_block_diffusion_models_need_a_block_causal_policy(tmp_path):
    # Known by its class; or by its name, for dLLM's bd3lm and mdlm have the same configuration.
    llada2 = checkpoint(tmp_path / "a", "a2d", architectures=["LLaDA2MoeModelLM"])
    named = [checkpoint(tmp_path / name, "a2d") for name in (
        "Qwen3-0.6B-diffusion-bd3lm-v0.1", "SDAR-1.7B-Chat", "TraDo-4B", "Fast_dLLM_v2_7B")]
    assert all("block-diffusion" in refusal(model) for model in (llada2, *named))
    assert "FrozenBlockCausal" in refusal(llada2, "--policy", "lab/policies.py:FrozenContext")
    policy = policy_of(llada2, "--policy", "lab/policies.py:FrozenBlockCausal")
    assert policy.block_causal and "block" in policy.notes[-1]


def test_own_code_needs_a_word_from_the_user():
    assert "--trust_remote_code" in refusal(shelf["llada"], trust=False)


def test_wrong_folders_are_one_sentence(tmp_path):
    assert "no config.json there" in refusal(str(tmp_path))
    assert "no config.json there" in refusal("./no/such/folder")
    half = shutil.copytree(shelf["llada"], tmp_path / "half")
    os.truncate(half / "model.safetensors", 2000)
    assert "could not be loaded" in refusal(str(half))
    (half / "model.safetensors").unlink()
    assert "could not be loaded" in refusal(str(half))


def test_a_hub_out_of_reach_is_one_sentence_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("tasks.hub_answers", lambda hub: False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tries again"))
    assert "check name and network" in refusal("nobody/no-such-model")


def test_code_for_transformers_4_is_refused_on_5(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.2.0")
    assert "pip install 'transformers<5'" in refusal(shelf["dream"])


def test_every_pin_is_a_commit():
    assert all(pin is None or len(pin) == 40 and int(pin, 16) for pin in models.KNOWN.values())


# --- LoRA -------------------------------------------------------------------------------------

def test_lora_as_one_product_is_the_three_and_so_are_its_gradients():
    draw = partial(torch.randn, dtype=torch.float64, requires_grad=True)
    x, A, B, W, bias = draw(2, 3, 6), draw(2, 6), draw(5, 2), draw(5, 6), draw(5)
    W.requires_grad_(False), bias.requires_grad_(False)
    linear = torch.nn.functional.linear
    dy = torch.randn(2, 3, 5, dtype=torch.float64)
    for b in (bias, None):
        one = models.LoraProduct.apply(x, W, b, A, B, 0.3)
        three = linear(x, W, b) + 0.3 * linear(linear(x, A), B)
        torch.testing.assert_close(one, three)
        torch.testing.assert_close(torch.autograd.grad(one, (x, A, B), dy),
                                   torch.autograd.grad(three, (x, A, B), dy))


def logits_and_gradients(policy):
    ids = torch.arange(20, 44).view(2, 12)
    logits = policy(ids, torch.ones_like(ids), torch.tensor([[3, 7]] * 2))
    logits.log_softmax(-1)[..., 30].sum().backward()
    grads = [p.grad for p in trained(policy).values()]
    policy.model.zero_grad()
    return [logits.detach(), *grads]


@each("plain", "lora_dropout", "use_rslora", "use_dora")
def test_an_adapter_that_peft_made_computes_what_peft_computes(kind, tmp_path):
    from peft import LoraConfig, get_peft_model

    more = {} if kind == "plain" else {kind: 0.5 if kind == "lora_dropout" else True}
    base, _ = models.load_model(run.parse(["--model", shelf["base"], "--device", "cpu"]))
    lora = LoraConfig(r=4, target_modules=["Wqkv", "Wi"], init_lora_weights=False, **more)
    get_peft_model(base, lora).save_pretrained(tmp_path)
    policy = policy_of(shelf["base"], "--adapter", str(tmp_path), loud=False)
    policy.model.double()
    ours = logits_and_gradients(policy)
    in_one = [layer.__dict__.pop("forward", None) is not None
              for layer in models.lora_layers(policy.model)]
    theirs = logits_and_gradients(policy)                       # without dropout here too
    assert in_one == [kind != "use_dora"] * 4 and len(ours) >= 9
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() < 1e-12 * b.abs().max()


@torch.no_grad()
def test_what_peft_does_with_its_adapters_still_works():
    from peft import LoraConfig

    policy = policy_of(shelf["base"])
    ids, at = torch.arange(20, 44).view(2, 12), torch.tensor([[3, 7]] * 2)
    ask = partial(policy, ids, torch.ones_like(ids), at)
    with policy.reference():
        base = ask()
    ours = ask()
    policy.model.merge_adapter()                     # into the weights: not added once more
    assert (ask() - ours).abs().max() < 1e-4 < (ours - base).abs().max()
    policy.model.unmerge_adapter()
    policy.model.add_adapter("second", LoraConfig(r=2, target_modules=["Wqkv"]))
    policy.model.set_adapter("second")               # its B is zero
    assert (ask() - base).abs().max() < 1e-4


def test_large_layers_stay_as_peft_has_them(monkeypatch):
    monkeypatch.setattr(models, "SMALL", 100)
    layers = models.lora_layers(policy_of(shelf["base"]).model)
    assert layers and not any("forward" in x.__dict__ for x in layers)


def test_an_adapter_comes_back_and_only_to_its_model(tmp_path):
    policy, flag = policy_of(shelf["llada"]), ("--adapter", str(tmp_path))
    policy.model.save_pretrained(tmp_path)
    again = policy_of(shelf["llada"], *flag, loud=False)
    ids, at = torch.arange(20, 34).view(2, 7), torch.tensor([[1, 2]] * 2)
    with torch.no_grad():
        a, b = (p(ids, torch.ones_like(ids), at) for p in (policy, again))
    assert torch.equal(a, b)
    with pytest.raises(TaskError, match="the model it was trained on"):
        policy_of(shelf["a2d"], *flag)
