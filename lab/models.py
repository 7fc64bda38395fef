"""Models: loading through transformers, what a model does with its inputs, LoRA, and memory savers.

In the order a run needs them: `load_model`, `special_ids` and `head_in_float32` (both for agrpo.Policy), `preflight`,
then `add_adapters` or `load_adapter`. All raise UserError: one sentence that names the cause.
"""
from collections import Counter
from pathlib import Path

import torch

from lab import plan
from lab.cli import UserError, first_line, local_folder
from lab.rows import hub_answers

# Naming one of these asks for the Python code it comes with. The commit is the one that many public repositories on
# GitHub pin (search there for the hash); None where no two of them agree: then the newest is taken, and said so.
KNOWN = {
    "GSAI-ML/LLaDA-8B-Instruct": "08b83a6feb34df1a6011b80c3c00c7563e963b07",
    "GSAI-ML/LLaDA-8B-Base": "0f2787f2d87eac5eed8a087d5ecd24277e6255b2",
    "GSAI-ML/LLaDA-1.5": None,
    "Dream-org/Dream-v0-Instruct-7B": "05334cb9faaf763692dcf9d8737c642be2b2a6ae",
    "Dream-org/Dream-v0-Base-7B": "6572adb5535263e4d1a337b56942ba48b6dee2a9",
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": "783d3467f108d28ac0a78d3e41af16ab05cabd8d",
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": None,
}
# transformers 5 gives these random weights, or a rotary embedding of uninitialised memory, without a word.
NEED_TRANSFORMERS_4 = ("DreamModel", "LLaDAMoEModelLM")


# --- Loading ----------------------------------------------------------------------------------------------------------


def load_model(cfg):
    """Base model and tokenizer from the hub or a folder. What there is to say about it waits in model.notes."""
    import huggingface_hub
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    transformers.logging.set_verbosity_error()
    local = local_folder(cfg.model)
    source, remote = str(local or cfg.model), cfg.trust_remote_code or cfg.model in KNOWN
    where = {}
    if local is None:
        cfg.revision = cfg.revision or KNOWN.get(cfg.model)                      # so that config.json has it
        where = dict(revision=cfg.revision, local_files_only=not hub_answers(huggingface_hub))   # or the cache, at once
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=remote, **where)
        plan.check_room(cfg, config.to_dict(), local)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=remote, **where)
        own = own_class(config, source, where) if remote else None
        model = load_weights(cfg, source, config, own, where)
        if not cfg.load_in_4bit:                                                 # bitsandbytes has put it there already
            model.to(cfg.device)
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f"--model {cfg.model} needs a package that is not installed: {first_line(e)}") from e
    except Exception as e:                           # a model's own code, and damaged files, may raise anything
        raise UserError(why_not(cfg, local, e)) from e
    if hasattr(torch.backends.cuda, "enable_mem_efficient_sdp"):
        torch.backends.cuda.enable_mem_efficient_sdp(True)                       # LLaDA's code turns it off globally
    model.config.use_cache = False
    model.notes = [cfg.why] if getattr(cfg, "why", None) else []
    if own:
        model.notes.append(f"its own Python code runs ({'a known model' if cfg.model in KNOWN else '--trust_remote_code'})"
                           + ("" if local else f", revision {cfg.revision or 'not pinned: the newest'}"))
    return model.eval(), tokenizer


def own_class(config, source, where):
    """The model class that comes with the checkpoint, made to fit transformers 5; None if it brings none."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = getattr(config, "auto_map", None) or {}
    found = [named[auto] for auto in ("AutoModelForMaskedLM", "AutoModel", "AutoModelForCausalLM") if auto in named]
    if not found:
        return None
    cls = get_class_from_dynamic_module(found[0], source, **where)
    if int(transformers.__version__.split(".")[0]) >= 5:
        if cls.__name__ in NEED_TRANSFORMERS_4:
            raise UserError(f"--model {source}: the code of {cls.__name__} is not made for transformers "
                            f"{transformers.__version__}, its weights would be silently wrong: pip install 'transformers<5'")
        if cls.__name__ == "LLaDAModelLM":           # version 5 expects both of every model; LLaDA's head is not tied
            cls.all_tied_weights_keys, cls.tie_weights = {}, lambda self, *args, **kwargs: None
    return cls


def load_weights(cfg, source, config, own, where):
    """The model with every weight read from the files: what these lack, transformers would silently fill at random."""
    from transformers import AutoModelForMaskedLM, BitsAndBytesConfig, PreTrainedModel, __version__

    more = dict(dtype=getattr(torch, cfg.dtype), output_loading_info=True, **where)
    if cfg.load_in_4bit:
        more.update(device_map={"": cfg.device}, quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["model.transformer.ff_out", "lm_head", "decoder"]))   # heads stay as they are
    if own:                                          # not own.from_pretrained: Dream's loses the report on missing weights
        model, report = PreTrainedModel.from_pretrained.__func__(own, source, config=config, **more)
    else:
        model, report = AutoModelForMaskedLM.from_pretrained(source, **more)
    lost = sorted(set(report["missing_keys"]) & dict(model.named_parameters()).keys())
    if lost:
        raise UserError(f"--model {cfg.model}: its files lack {len(lost)} of the model's weights ({', '.join(lost[:3])}), which "
                        f"would be random: the files are incomplete, or do not fit its code or transformers {__version__}")
    return model


def why_not(cfg, local, e):
    """The sentence for an exception of transformers, of the hub or of a model's own code."""
    text, name = str(e), f"--model {cfg.model}"
    if "trust_remote_code" in text:
        return f"{name} brings its own Python code: read it, then add --trust_remote_code"
    if "gated repo" in text or "GatedRepo" in type(e).__name__:
        return f"{name} is gated: accept its terms on https://huggingface.co/{cfg.model}, then log in with `hf auth login`"
    if "Unrecognized configuration class" in text:
        return f"{name} is no masked language model that transformers knows: it cannot denoise; choose LLaDA, Dream, BERT, ..."
    if isinstance(e, torch.OutOfMemoryError):
        return f"{name} does not fit on {cfg.device}: add --load_in_4bit, or take a smaller model (bash run.sh plan adds it up)"
    if "size mismatch" in text or "ignore_mismatched_sizes" in text:
        which = [line.strip() for line in text.splitlines() if "size mismatch" in line]
        return ": ".join([f"{name}: its weights have other shapes than its config.json says", *which[:1]])
    if local:
        return f"{name} could not be loaded: {first_line(e)}"
    return (f"{name} could not be loaded from the hub ({first_line(e)}): check the name and the network, or give the folder "
            "of a local copy")


# --- What agrpo.Policy needs to know ----------------------------------------------------------------------------------


def first_id(*ids):
    for i in ids:
        if i is not None:
            return i[0] if isinstance(i, (list, tuple)) else i
    return None


def special_ids(model, tokenizer):
    """Ids of [MASK], EOS and padding, from config and tokenizer. No constants: members of one family differ."""
    config, added = model.config, {text.strip("<|[]>").lower(): i for text, i in tokenizer.get_added_vocab().items()}
    mask = first_id(getattr(config, "mask_token_id", None), tokenizer.mask_token_id, added.get("mask"), added.get("mdm_mask"))
    eos = first_id(tokenizer.eos_token_id, getattr(config, "eos_token_id", None))
    name, rows = config._name_or_path, model.get_input_embeddings().weight.shape[0]
    if mask is None or eos is None:
        raise UserError(f"--model {name}: neither its config nor its tokenizer names a [MASK] and an EOS token; a masked "
                        "diffusion model has both (mask_token_id in config.json)")
    pad = first_id(tokenizer.pad_token_id, eos)
    if max(mask, eos, pad) >= rows:
        raise UserError(f"--model {name}: [MASK] {mask}, EOS {eos} and padding {pad} must be below its {rows} embeddings: "
                        "its tokenizer and config disagree")
    return mask, eos, pad


def head_in_float32(model):
    """The LM head, its own weights in float32 from now on: bf16 logits move a ratio by up to 1.19 (the clip width is 0.2).

    A head tied to the embedding gets a copy of its own then, and the embedding stays as it is.
    """
    head, name = model.get_output_embeddings(), model.config._name_or_path
    if head is None:
        raise UserError(f"--model {name} has no LM head (get_output_embeddings is empty): choose a masked language model, "
                        "not its bare encoder")
    layer = getattr(head, "base_layer", head)        # under LoRA
    if isinstance(head, torch.nn.Embedding) or not layer.weight.is_floating_point():
        raise UserError(f"--model {name}: its LM head is no layer of its own in floating point ({type(layer).__name__}), so it "
                        "cannot run on chosen rows only")
    for kind, p in list(layer.named_parameters(recurse=False)):
        if p.dtype in (torch.bfloat16, torch.float16):
            setattr(layer, kind, torch.nn.Parameter(p.detach().float(), requires_grad=False))
    return head


# --- Before the first update ------------------------------------------------------------------------------------------


@torch.no_grad()
def preflight(policy, prompt):
    """Find out what the model does with its inputs, before an hour is spent on it. Returns lines for the log.

    The attention mask goes in 2D (LLaDA, ModernBERT), 4D (Dream) or not at all, whichever first makes a left-padded
    row equal to its unpadded self; where none does, batches hold prompts of one length only.
    """
    if policy.mask_id in prompt:
        raise UserError(f"the prompt holds the [MASK] token ({policy.mask_id}) of --model {policy.name}: its tokenizer and "
                        "config disagree")
    text = prompt[-64:] + [policy.mask_id] * 4
    gaps = padding_gaps(policy, text)
    tolerance = 1e-3 if policy.dtype == torch.float32 else 0.1
    good = [kind for kind, (hidden, shown) in gaps.items() if hidden < tolerance and hidden <= shown / 2]
    policy.mask_kind, policy.ignores_mask = [*good, *gaps][0], not good
    moved = reach_of_a_later_token(policy, text)
    if moved == 0:
        raise UserError(f"--model {policy.name} is causal: a later token changes no earlier logit, so it cannot denoise; "
                        "choose a masked diffusion model")
    hidden, shown = gaps[policy.mask_kind]
    lines = [*getattr(policy.model, "notes", []),
             f"tokens: [MASK] {policy.mask_id}, EOS {policy.eos_id}, padding {policy.pad_id}; position i is predicted at "
             + ("i - 1" if policy.shift else "i"),
             f"padding moves a logit by {hidden:.1e} of the largest, were it visible {shown:.1e} (attention mask: "
             f"{policy.mask_kind}); a later token moves an earlier logit by {moved:.1e}"]
    if policy.ignores_mask:
        lines.append("padding changes this model's logits (it ignores its attention mask, or counts positions from the "
                     "left): batches will hold prompts of one length only")
    return lines


def refuse_unknown(policy, text, ids):
    """A prompt of words that the tokenizer lacks would be another problem than the one its answer is checked against."""
    tok = policy.tokenizer
    if tok.unk_token_id in ids and tok.unk_token_id not in (policy.eos_id, policy.pad_id, tok.bos_token_id):
        raise UserError(f"--model {policy.name} has no token for a part of this prompt, {text.strip()[-60:]!r}: choose problems "
                        "its vocabulary can write (for countdown a smaller --max_number or --max_target), or another model")


def padding_gaps(policy, text):
    """For each kind of attention mask the model takes: how far padding moves its logits, masked out and in plain sight.

    Padded with the text itself, backwards: a model that sees it will not overlook it, not even in the noise of bf16.
    """
    P, every = len(text), torch.arange(1, len(text), device=policy.device)
    alone, padded = (torch.tensor([ids], device=policy.device) for ids in (text, text[::-1] + text))
    mask = torch.ones_like(padded).repeat(2, 1)                                  # row 0: padding masked out, row 1: in sight
    mask[0, :P] = 0
    gaps, problem = {}, None
    for kind in ("2d", "4d", "none"):
        policy.mask_kind = kind
        try:
            logits = policy(alone, torch.ones_like(alone), every)
            beside = policy(padded.repeat(2, 1), mask, torch.cat([every + P, every + 3 * P])).chunk(2)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:                       # what a model does not take, it may refuse in any way
            problem = e
            continue
        if not logits.isfinite().all():
            raise UserError(f"--model {policy.name} gives logits that are not finite: its weights are damaged, or its code "
                            "does not fit the installed transformers (README, Troubleshooting)")
        gaps[kind] = tuple(((x - logits).abs().max() / logits.abs().max().clamp(min=1)).item() for x in beside)
    if not gaps:
        raise UserError(f"--model {policy.name} takes neither a 2D, nor a 4D, nor no attention mask ({first_line(problem)}): its "
                        "code does not fit the installed transformers (README, Troubleshooting)") from problem
    return gaps


def reach_of_a_later_token(policy, text):
    """The largest change of an earlier logit when the last token changes; 0 in a causal model."""
    ids = torch.tensor([text, text[:-1] + [policy.eos_id]], device=policy.device)            # (2, L)
    L, P = ids.shape[1], torch.arange(ids.shape[1] - 1, device=policy.device) + policy.shift
    before, after = policy(ids, torch.ones_like(ids), torch.cat([P, P + L])).chunk(2)
    return (after - before).abs().max().item()


# --- Adapters ---------------------------------------------------------------------------------------------------------


def block_linears(model):
    """Names of the linear layers inside the transformer blocks: a path with a number in it. The head has none.

    In a mixture of experts, the experts and their router stay as they are: few tokens reach each, thousands of them.
    """
    names = [name for name, _ in model.named_modules()]
    mixtures = {name.rpartition(".experts")[0] + "." for name in names if name.endswith(".experts")}
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))
            and not name.startswith(tuple(mixtures))]


def add_adapters(policy, cfg):
    """LoRA on every linear layer of every block, not on the head. Returns lines for the log."""
    base = policy.model
    if cfg.lora_r == 0:
        base.requires_grad_(True)
        line = "no LoRA (--lora_r 0)"
    else:
        from peft import LoraConfig, get_peft_model

        names = block_linears(base)
        if not names:
            raise UserError(f"--model {policy.name}: no linear layer found inside numbered blocks to put LoRA on; "
                            "--lora_r 0 trains all parameters")
        torch.manual_seed(cfg.seed)
        policy.model = get_peft_model(base, LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=0.0,
                                                       target_modules=names))
        hit = [name for name, module in policy.model.named_modules() if hasattr(module, "lora_A")]
        if len(hit) != len(names):
            raise UserError(f"--model {policy.name}: LoRA hit {len(hit)} layers, not the {len(names)} linear layers of the "
                            "blocks: its names confuse peft; --lora_r 0 trains all parameters")
        line = f"LoRA r {cfg.lora_r} on {describe_layers(names)}, not on the head"
    if cfg.activation_checkpointing:
        save_memory(base)
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    return [line, f"{sum(n for n, on in sizes if on):,} of {sum(n for n, _ in sizes):,} parameters are trained"]


def describe_layers(names):
    """'14 linear layers, 7 in each of 2 blocks (q_proj k_proj ...)': enough to see at once that one kind is missing."""
    blocks = Counter(next(int(part) for part in name.split(".") if part.isdigit()) for name in names)
    each = " to ".join(map(str, sorted({min(blocks.values()), max(blocks.values())})))
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return f"{len(names)} linear layers, {each} in each of {len(blocks)} blocks ({' '.join(kinds)})"


def load_adapter(policy, cfg):
    """A trained adapter onto the policy's model, if --adapter names one. Returns lines for the log."""
    if cfg.adapter is None:
        return ["no --adapter: this is the base model"]
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    if not (Path(cfg.adapter) / "adapter_config.json").is_file():
        raise UserError(f"--adapter {cfg.adapter}: no adapter_config.json there; give the adapter/ folder of a run")
    try:
        policy.model = PeftModel.from_pretrained(policy.model, cfg.adapter).eval()
        spare = load_peft_weights(cfg.adapter, device="cpu").keys() ^ get_peft_model_state_dict(policy.model).keys()
    except Exception as e:                           # damaged files may raise anything
        raise UserError(f"--adapter {cfg.adapter} does not fit --model {cfg.model}: {first_line(e)}") from e
    if spare:                                        # peft drops them without a word
        raise UserError(f"--adapter {cfg.adapter} does not fit --model {cfg.model}: {len(spare)} weights have no counterpart, "
                        f"{min(spare)} for one; give the model it was trained on")
    policy.hook_head()                               # made elsewhere, it may adapt the head as well
    return [f"adapter {cfg.adapter}, trained on {policy.model.peft_config['default'].base_model_name_or_path}"]


def save_memory(model):
    """Recompute activations in the backward pass. Needs training mode, so dropout goes: rollout and loss would differ."""
    for module in model.modules():
        for thing in (module, getattr(module, "config", None)):
            for name, value in list(getattr(thing, "__dict__", {}).items()):
                if isinstance(value, float) and ("dropout" in name or name == "p" and isinstance(thing, torch.nn.Dropout)):
                    setattr(thing, name, 0.0)
    inner = getattr(model, "model", None)
    if hasattr(inner, "set_activation_checkpointing"):                           # LLaDA's own switch
        inner.set_activation_checkpointing("whole_layer")
    else:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as e:
            raise UserError(f"--model {model.config._name_or_path} cannot recompute activations ({first_line(e)}): add "
                            "--activation_checkpointing false, and lower --micro_batch if memory runs out") from e
    model.train()
