"""Any model as the policy: by name or folder, with code of its own, a saved adapter.

agrpo.load_policy takes the folder of a masked language model on trust. Here, for lab/run.py and
the tools beside it: names of the hub, pinned; code that a checkpoint brings, run only where the
user asked for it; every weight read from the files; a look at what the model does with padding
and with later tokens; LoRA fresh or from a folder; --policy FILE.py:Class, which sees less.
"""
import contextlib
import gc
import importlib.util
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import agrpo
import tasks
from agrpo import HALF, Policy
from tasks import TaskError            # bad input: a ValueError of one sentence

# Naming one of these runs the Python code that comes with it, of this commit (None: newest).
# For any other name that takes --trust_remote_code.
KNOWN = {
    "GSAI-ML/LLaDA-8B-Instruct": "08b83a6feb34df1a6011b80c3c00c7563e963b07",
    "GSAI-ML/LLaDA-8B-Base": "0f2787f2d87eac5eed8a087d5ecd24277e6255b2",
    "Dream-org/Dream-v0-Instruct-7B": "05334cb9faaf763692dcf9d8737c642be2b2a6ae",
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": None,
}
BLOCK_DIFFUSION = "bd3lm|llada2|sdar|trado|fast_dllm"           # in name, type or class


def load_policy(cfg, examples):
    """The model of --model as a Policy, with LoRA; its `notes` say what was found of it.

    examples: of the task; the looks at the start read their prompts. Raises TaskError.
    """
    model, tokenizer = load_model(cfg)
    config, name = model.config, f"--model {cfg.model}"
    mask_id = agrpo.find_mask_id(config, tokenizer) if cfg.mask_id < 0 else cfg.mask_id
    eos_id, ids = tokenizer.eos_token_id, len(model.get_input_embeddings().weight)
    if None in (eos_id, mask_id) or not 0 <= mask_id < ids:
        raise TaskError(f"{name}: [MASK] and EOS are {mask_id} and {eos_id} of {ids} ids; a "
                        "masked diffusion model has both: --mask_id N says which")
    kind = import_file(cfg.policy, "--policy") if cfg.policy else Policy
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise TaskError(f"--policy {cfg.policy} must name a class that derives from "
                        "agrpo.Policy: FILE.py:Class")
    # Full attention in a model that was trained without moves log pi by 0.2 - 0.8 nats a token.
    about = " ".join([cfg.model, config.model_type, *(config.architectures or ())])
    if re.search(BLOCK_DIFFUSION, about, re.I) and not getattr(kind, "block_causal", False):
        raise TaskError(f"{name} is a block-diffusion model, under full attention log pi is "
                        "wrong: add --policy lab/policies.py:FrozenBlockCausal, if that reads "
                        "its code, and the --block_length it was trained with")
    policy = kind(model, tokenizer, mask_id, cfg.device)
    policy.shift = policy.shift if cfg.shift < 0 else cfg.shift
    # Look before there are adapters: what is found is said of the model as it came.
    chats = [tasks.TASKS[cfg.task].prompt(example) for example in examples[:2]]
    look_at_prompts(policy, name, chats)
    policy.notes = [look_at(policy, name, chats[0]), add_adapters(policy, cfg)]
    if cfg.policy:
        policy.notes.append(f"--policy {cfg.policy}: {getattr(kind, 'note', '')}")
    policy.notes += fit_batches(policy, cfg, policy.encode(chats)[0].unique())
    return policy


def load_model(cfg):
    """(model, tokenizer), every weight read from the files. Raises TaskError."""
    import huggingface_hub
    import transformers
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

    transformers.logging.set_verbosity_error()
    name, folder = f"--model {cfg.model}", local_folder(cfg.model)
    source, where = str(folder or cfg.model), {}
    if folder and cfg.revision:
        raise TaskError(f"--revision is for a name of the hub, {name} is a folder: leave it out")
    if folder is None:                 # hub out of reach: the cache, or an error at once
        where = dict(revision=cfg.revision or KNOWN.get(cfg.model),
                     local_files_only=not tasks.hub_answers(huggingface_hub))
    # A local folder may bear a known name and hold anything.
    remote = cfg.trust_remote_code or folder is None and cfg.model in KNOWN
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=remote, **where)
        if config.is_encoder_decoder:
            raise ValueError("it has an encoder and a decoder, choose a masked diffusion model")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=remote, **where)
        # Rollout and loss must be one function: no dropout.
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        config.reference_compile = False        # ModernBERT would compile each layer on a GPU
        own = own_class(config, source, where) if remote else None
        options = dict(config=config, dtype=getattr(torch, cfg.dtype), output_loading_info=True)
        if own:                        # through the base class: Dream's method loses the report
            load = PreTrainedModel.from_pretrained.__func__
            model, report = load(own, source, **options, **where)
        else:
            model, report = AutoModelForMaskedLM.from_pretrained(source, **options, **where)
        model.to(cfg.device)
    except Exception as e:             # a model's own code, damaged files: they raise anything
        text, hint = str(e), "" if folder else "; check name and network, or give a folder"
        if "trust_remote_code" in text:
            text = "it brings its own Python code: read it, then add --trust_remote_code"
        elif "Unrecognized configuration class" in text:
            text = "it is no masked language model that transformers knows, as ModernBERT is"
        raise TaskError(f"{name} could not be loaded: {first_line(text)}{hint}") from e
    # What the files lack, transformers would make up.
    lost = sorted(set(report["missing_keys"]) & dict(model.named_parameters()).keys())
    if lost or model.get_output_embeddings() is None:
        raise TaskError(f"{name} lacks {', '.join(lost[:3]) or 'an LM head'}: its files are "
                        "incomplete, or not of a masked language model")
    if torch.cuda.is_available():
        torch.backends.cuda.enable_mem_efficient_sdp(True)      # LLaDA's code turns it off
        # TF32 leaves every 16-bit number as it is, and the float32 head has such inputs.
        torch.backends.cuda.matmul.allow_tf32 = cfg.dtype != "float32"
    model.config.use_cache = False
    return without_dropout(model), tokenizer


def without_dropout(model):
    """In train mode, where alone some code has gradients or recomputes activations."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def local_folder(model):
    """The folder that --model names, or None for a hub id. Refuses a folder without a model."""
    folder = Path(model).expanduser()
    if model == "lab/tiny" and not folder.exists():
        folder = ROOT / folder                                  # called from elsewhere
    if not folder.exists() and model.count("/") == 1 and model[0] not in "./~":
        return None
    if not (folder / "config.json").is_file():
        raise TaskError(f"--model {model}: no config.json there; give a folder saved by "
                        "save_pretrained, or a hub id")
    return folder


def own_class(config, source, where):
    """The class that comes with a checkpoint: the one `architectures` names, for auto_map may
    name one without a head. None if it brings none."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = getattr(config, "auto_map", None) or {}
    kinds = ("AutoModelForMaskedLM", "AutoModel", "AutoModelForCausalLM")
    found = [auto_map[kind] for kind in kinds if kind in auto_map]
    if not found:
        return None
    if int(transformers.__version__.split(".")[0]) >= 5:        # its weights would be random
        raise ImportError("its code is for transformers 4: pip install 'transformers<5'")
    module = found[0].rpartition(".")[0]
    for name in [f"{module}.{kind}" for kind in config.architectures or ()] + found:
        with contextlib.suppress(AttributeError):
            return get_class_from_dynamic_module(name, source, **where)


def look_at_prompts(policy, name, chats):
    """Refuse a chat template that drops or cuts the problem. Raises TaskError."""
    try:
        policy.render(chats[0])
    except Exception:                  # a template without a system role raises anything
        policy.render = partial(system_in_front, policy.render)
    try:
        texts = [policy.render(chat) for chat in chats]
    except Exception as e:
        raise TaskError(f"{name} has a chat template that fails: {first_line(e)}") from e
    problems = [chat[-1]["content"].strip() for chat in chats]
    if len(set(texts)) < len(set(problems)) or not all(map(str.__contains__, texts, problems)):
        raise TaskError(f"{name} has a chat template that drops or cuts the problem: from "
                        f"{problems[-1][-40:]!r} it makes {texts[-1][-60:]!r}")


def system_in_front(render, chat):
    """`render` for a template without a system role: that text in front of the question."""
    system, question, *more = chat
    both = system["content"] + "\n\n" + question["content"]
    return render([dict(question, content=both), *more])


@torch.no_grad()
def look_at(policy, name, chat):
    """What the model does with padding and later tokens, before an hour is spent. -> a note"""
    q, _ = policy.encode([chat])
    text = torch.cat([q[0, -64:], q.new_full((4,), policy.mask_id)])
    P, at = len(text), torch.arange(1, len(text) - 1, device=q.device)[None]
    seen = torch.ones_like(text)[None]
    alone = policy.logits(text[None], seen, at)
    if not alone.isfinite().all():
        raise TaskError(f"{name} gives logits that are not finite: its weights are damaged")
    # Once more, padded with itself, backwards. Is the gap one of rounding?
    longer = torch.cat([text.flip(0), text])[None]
    padded = policy.logits(longer, torch.cat([0 * seen, seen], dim=1), at + P)
    gap = (padded - alone).abs().max() / alone.abs().max()
    policy.ignores_mask = not gap < (0.05 if policy.dtype in HALF else 1e-3)
    # And with another last token.
    text[-1] = policy.eos_id
    reach = (policy.logits(text[None], seen, at) - alone).abs().max() / alone.abs().max()
    if reach == 0:
        raise TaskError(f"{name} is causal: a later token moves no earlier logit, so it cannot "
                        "denoise; choose a masked diffusion model")
    return (f"[MASK] is {policy.mask_id}, EOS {policy.eos_id}; padding moves logits by "
            f"{gap:.0e} of the largest, a later token by {reach:.0e}"
            + "; so prompts go unpadded, one length at a time" * policy.ignores_mask)


def add_adapters(policy, cfg):
    """LoRA on the blocks' linear layers, not on the head: fresh or from --adapter. -> a note

    Raises TaskError.
    """
    from peft import LoraConfig, get_peft_model

    base, layers = policy.model, adapted_layers(policy.model)
    if cfg.lora_r == 0:
        base.requires_grad_(True)
    elif cfg.adapter:
        policy.model = saved_adapter(base, cfg)
    else:
        # B starts at zero, so this is the base model; A is random, the same in every process.
        torch.manual_seed(cfg.seed)
        lora = LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=layers)
        policy.model = get_peft_model(base, lora) if layers else base
        hit = len(lora_layers(policy.model))
        if not layers or hit != len(layers):
            raise TaskError(f"--model {cfg.model}: LoRA hit {hit} of {len(layers)} linear "
                            "layers in numbered blocks; --lora_r 0 trains all weights")
    for layer in lora_layers(policy.model):
        # In 16 bits peft would cast an adapter's input up, and autocast down again.
        if policy.dtype in HALF:
            layer.cast_input_dtype_enabled = False
        elif small_and_plain(layer):
            layer.forward = partial(lora_forward, layer)
    if cfg.recompute and hasattr(getattr(base, "model", None), "set_activation_checkpointing"):
        base.model.set_activation_checkpointing("whole_layer")  # LLaDA's own switch
    elif cfg.recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    trained, total = sum(n for n, on in sizes if on), sum(n for n, _ in sizes)
    kinds = " ".join(dict.fromkeys(n.rpartition(".")[2] for n in layers))
    what = f"LoRA on {len(layers)} layers ({kinds})" if cfg.lora_r else "no LoRA"
    return f"{what}: {trained:,} of {total:,} parameters are trained"


# --micro_batch and --rollout_batch 0: as many as fit on a GPU. A CPU gains nothing from more.
FIXED = {"cpu": dict(rollout_batch=256, micro_batch=320)}
NO_ROOM = "CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"


def most_rows(cfg):
    """What a forward can have at most: all of an update's, and above 128 nothing is gained."""
    rows = cfg.questions * cfg.G // agrpo.processes()[1]
    return dict(rollout_batch=min(128, rows), micro_batch=min(128, math.ceil(rows * cfg.k)))


def fit_batches(policy, cfg, words):
    """Set cfg.rollout_batch and cfg.micro_batch where they are 0. words: ids. -> notes

    They change speed and no result, so each process tries for itself: no collective in here.
    """
    used = ["rollout_batch"] + ["micro_batch"] * (cfg.updates > 0)
    names = [name for name in used if not getattr(cfg, name)]
    P = min(cfg.max_prompt, room(policy) - max(cfg.C, cfg.eval_C))
    if not names or P < 1:             # no room for any prompt: run.short_enough will say it
        return []
    sizes = FIXED.get(policy.device.type) or {
        name: as_many_as_fit(most_rows(cfg)[name], partial(
            one_pass, policy, cfg, words, P, name == "micro_batch")) for name in names}
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(policy.device)   # the trials' peak is no run's
    for name in names:
        setattr(cfg, name, sizes[name])
    return ["as many as fit: " + ", ".join(f"--{name} {sizes[name]}" for name in names)]


def as_many_as_fit(n, trial):
    """n, halved until trial(n) has enough memory. One row is not tried: there is no less."""
    fits = False
    while n > 1 and not fits:
        try:
            trial(n)
            fits = True
        except RuntimeError as e:      # cuBLAS has words of its own for no memory
            if not isinstance(e, torch.OutOfMemoryError) and not re.search(NO_ROOM, str(e)):
                raise
            n //= 2
        gc.collect()                   # now that the exception has let the trial's tensors go
        torch.cuda.empty_cache()
    return n


def one_pass(policy, cfg, words, P, learns, n):
    """The forward of a denoising step, of n rows; or with the loss's forward and backward.

    Prompts of P of the ids `words`, no two alike: a policy reads equal rows once. A tenth of
    the GPU stays free, and room for Adam's two moments.
    """
    params = [p for p in policy.model.parameters() if p.requires_grad]
    held = torch.cuda.mem_get_info(policy.device)[1] // 10 + 8 * sum(p.numel() for p in params)
    ballast = torch.empty(held, dtype=torch.uint8, device=policy.device)
    # Rollouts and evaluations; pairs have the tokens of a step, however those were chosen.
    how = replace(cfg.how, unmasking="random")
    for how in [how] if learns else {cfg.how, *cfg.cells()}:
        # A step at the text's end. Those who choose by confidence look at the whole block.
        W = how.W if how.unmasking == "random" else how.block_length
        q = words[torch.randint(len(words), (n, P + how.C - W), device=words.device)]
        step = replace(how, C=W, m=1, block_length=W)
        traj = agrpo.rollout(policy, q, torch.ones_like(q), step)
    if learns:
        row, one = torch.arange(n, device=q.device), traj.logp_old.new_ones(n)
        try:
            agrpo.add_gradient(policy, traj, one, (row, 0 * row, one), cfg.eps, n,
                               cfg.ratio_per, cfg.beta)
        finally:
            policy.model.zero_grad()
    del ballast


def room(policy):
    """Tokens that the model has positions for; LLaDA's config has its own word for it."""
    names = ("max_position_embeddings", "max_sequence_length")
    return min(getattr(policy.model.config, name, None) or math.inf for name in names)


# LoraProduct is for matrices of at most so many numbers. A rule that looks at the number of
# tokens too would be faster still, but let rollout and loss round differently.
SMALL = 2 ** 17


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


class LoraProduct(torch.autograd.Function):
    """x (W + s B A)' + bias: LoRA in one product, where x W' + s (x A') B' takes three.

    With a small W and many tokens that is faster, a forward of lab/tiny by a third. The
    gradients are those of the three, so nothing of W's size is kept for them. For float32: in
    16 bits the sum would swallow the small B A.
    """
    @staticmethod
    def forward(ctx, x, W, bias, A, B, s):
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return torch.nn.functional.linear(x, W + s * (B @ A), bias)

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        dx = dy @ (W + ctx.s * (B @ A))
        x, dy = x.flatten(0, -2), ctx.s * dy.flatten(0, -2)                 # (tokens, ...)
        return dx, None, None, (dy @ B).T @ x, dy.T @ (x @ A.T), None


def lora_forward(layer, x):
    """What a LoRA layer of peft computes: by LoraProduct, while its one adapter is in use."""
    if layer.disable_adapters or layer.merged or layer.active_adapters != ["default"]:
        return type(layer).forward(layer, x)
    base, A, B = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    s = layer.scaling["default"]
    return LoraProduct.apply(x, base.weight, base.bias, A.weight, B.weight, s)


def small_and_plain(layer):
    """Is W + s B A cheap to add up, and all that the layer computes? (DoRA's is more.)"""
    base = layer.base_layer
    return (isinstance(base, torch.nn.Linear) and base.weight.numel() <= SMALL
            and not layer.lora_variant and layer.lora_B["default"].bias is None)


def saved_adapter(base, cfg):
    """The base model with the adapter of --adapter. Raises TaskError."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    folder = str(Path(cfg.adapter).expanduser())
    misfit = f"it does not fit --model {cfg.model}"
    try:
        if not Path(folder, "adapter_config.json").is_file():   # peft would ask the hub
            raise ValueError("no adapter_config.json there")
        # peft takes what fits and is silent about the rest: so compare the names.
        there = load_peft_weights(folder, device="cpu", local_files_only=True)
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        if there.keys() != get_peft_model_state_dict(model).keys():
            raise ValueError(misfit)
        if not all(x.isfinite().all() for x in there.values()):
            raise ValueError("its weights are not finite, its training diverged")
        return without_dropout(model)                           # it may bring its own
    except Exception as e:                                      # damaged files raise anything
        why = misfit if "size mismatch" in str(e) else first_line(e)
        raise TaskError(f"--adapter {cfg.adapter}: {why}; give the adapter/ folder of a run, "
                        "and the model it was trained on") from e


def adapted_layers(model):
    """The layers that LoRA goes on: the linear layers of the blocks. In a mixture of experts
    these and their router stay as they are: few tokens reach each."""
    # "layers.3.mlp" is a mixture if "layers.3.mlp.experts" exists.
    mixtures = [name.removesuffix("experts") for name, _ in model.named_modules()
                if name.endswith(".experts")]
    frozen = tuple(mixture + part + "." for mixture in mixtures
                   for part in ("experts", "gate", "router"))
    return [name for name in agrpo.block_linears(model) if not (name + ".").startswith(frozen)]


def first_line(error):
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


USERS_FILES = {}                       # full path: as typed, of files that the user named


def import_file(path, flag):
    """Import FILE.py, or get Class of FILE.py:Class. It runs: the user named it."""
    file, _, name = path.partition(":")
    file = Path(file).expanduser()
    if file.suffix != ".py" or not file.is_file():
        raise TaskError(f"{flag} {path}: {file} is no Python file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    USERS_FILES[str(file.resolve())] = str(file)
    spec.loader.exec_module(module)
    if name and not hasattr(module, name):
        raise TaskError(f"{flag} {path}: there is no {name} in {file}")
    return getattr(module, name) if name else module
