"""Models: loading through transformers, what the model does with its inputs, LoRA, and memory savers."""
import math
from pathlib import Path

import torch

from lab.cli import UserError, first_line

KNOWN_REMOTE = {"GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-1.5"}   # naming one asks for its code


def block_linears(model):
    """Names of the linear layers inside the transformer blocks: a path with a number in it. The head has none."""
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))]


def load_model(cfg):
    """Base model and tokenizer from the hub or a folder, through transformers alone. Raises UserError in one sentence."""
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    local = Path(cfg.model).expanduser()
    looks_local = local.exists() or cfg.model.startswith((".", "/", "~")) or cfg.model.count("/") != 1
    if looks_local and not (local / "config.json").is_file():
        raise UserError(f"--model {cfg.model}: no config.json there; give a folder saved by save_pretrained or a hub id")
    source = str(local) if looks_local else cfg.model
    more = dict(revision=cfg.revision, trust_remote_code=cfg.trust_remote_code or cfg.model in KNOWN_REMOTE)
    try:
        config = AutoConfig.from_pretrained(source, **more)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **more)
        auto = AutoModel if getattr(config, "auto_map", None) else AutoModelForMaskedLM
        quantised = {}
        if cfg.load_in_4bit:
            from transformers import BitsAndBytesConfig
            quantised = dict(quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16))
        model = auto.from_pretrained(source, dtype=getattr(torch, cfg.dtype), **more, **quantised)
    except ImportError as e:
        raise UserError(f"--model {cfg.model} needs a package that is not installed: {first_line(e)}") from e
    except (OSError, ValueError, KeyError) as e:
        if "trust_remote_code" in str(e):
            raise UserError(f"--model {cfg.model} brings its own Python code: read it, then add --trust_remote_code") from e
        if looks_local:
            raise UserError(f"--model {cfg.model} could not be loaded: {first_line(e)}") from e
        raise UserError(f"--model {cfg.model} could not be loaded from the hub ({first_line(e)}): check the name and "
                        "the network, or give the folder of a local copy") from e
    if hasattr(torch.backends.cuda, "enable_mem_efficient_sdp"):
        torch.backends.cuda.enable_mem_efficient_sdp(True)                       # LLaDA's code turns it off globally
    model.config.use_cache = False
    return (model if cfg.load_in_4bit else model.to(cfg.device)).eval(), tokenizer


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
        blocks = {next(int(part) for part in name.split(".") if part.isdigit()) for name in names}
        torch.manual_seed(cfg.seed)
        policy.model = get_peft_model(base, LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=0.0,
                                                       target_modules=names))
        hit = [name for name, module in policy.model.named_modules() if hasattr(module, "lora_A")]
        assert len(hit) == len(names), f"LoRA hit {len(hit)} layers, not the {len(names)} linear layers of the blocks"
        line = f"LoRA r {cfg.lora_r} on {len(hit)} linear layers in {len(blocks)} blocks, the head left alone"
    if cfg.activation_checkpointing:
        save_memory(base)
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    return [f"{line}; {sum(n for n, on in sizes if on):,} of {sum(n for n, _ in sizes):,} parameters are trained"]


def load_adapter(policy, cfg):
    """A trained adapter onto the policy's model, if --adapter names one. Returns lines for the log."""
    if cfg.adapter is None:
        return ["no --adapter: this is the base model"]
    from peft import PeftModel

    if not (Path(cfg.adapter) / "adapter_config.json").is_file():
        raise UserError(f"--adapter {cfg.adapter}: no adapter_config.json there; give the adapter/ folder of a run")
    try:
        policy.model = PeftModel.from_pretrained(policy.model, cfg.adapter).eval()
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"--adapter {cfg.adapter} does not fit --model {cfg.model}: {first_line(e)}") from e
    return [f"adapter {cfg.adapter}"]


def save_memory(model):
    """Recompute activations in the backward pass, dropout off (a dropped unit would make rollout and loss disagree)."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inner = getattr(model, "model", None)
    if hasattr(inner, "set_activation_checkpointing"):                           # LLaDA's own switch
        inner.set_activation_checkpointing("whole_layer")
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


@torch.no_grad()
def preflight(policy, prompt):
    """Find out what the model does with its inputs, before an hour is spent on it. Returns lines for the log.

    The attention mask goes in 2D (LLaDA, ModernBERT), 4D (Dream) or not at all, whichever first makes a left-padded
    row equal to its unpadded self; where none does, batches hold prompts of one length only.
    """
    text = prompt + [policy.mask_id] * 4
    ids = torch.tensor([text], device=policy.device)
    padded = torch.tensor([[policy.pad_id] * 3 + text], device=policy.device)
    seen, every = torch.tensor([[0] * 3 + [1] * len(text)], device=policy.device), torch.arange(1, len(text))
    every = every.to(policy.device)
    gaps = {}
    for kind in ("2d", "4d", "none"):
        policy.mask_kind = kind
        try:
            alone = policy(ids, torch.ones_like(ids), every)
            gaps[kind] = (policy(padded, seen, every + 3) - alone).abs().max().item() / alone.abs().max().clamp(min=1).item()
        except (TypeError, ValueError, RuntimeError, AssertionError):
            continue
        if not math.isfinite(gaps[kind]):
            raise UserError(f"--model {policy.name} gives logits that are not finite: its weights are damaged, or its "
                            "code does not fit the installed transformers (README, Troubleshooting)")
    if not gaps:
        raise UserError(f"--model {policy.name} takes neither a 2D, nor a 4D, nor no attention mask: its code does not "
                        "fit the installed transformers (README, Troubleshooting)")
    tolerance = 1e-3 if policy.dtype == torch.float32 else 0.1
    policy.mask_kind = next((kind for kind in gaps if gaps[kind] < tolerance), next(iter(gaps)))
    policy.ignores_mask = gaps[policy.mask_kind] >= tolerance
    later = ids.clone()
    later[0, -1] = policy.eos_id
    first = torch.arange(policy.shift, 1 + policy.shift, device=policy.device)
    moved = (policy(later, torch.ones_like(ids), first) - policy(ids, torch.ones_like(ids), first)).abs().max().item()
    if moved == 0:
        raise UserError(f"--model {policy.name} is causal: a later token changes no earlier logit, so it cannot denoise; "
                        "choose a masked diffusion model")
    if policy.mask_id in prompt:
        raise UserError(f"the prompt holds the [MASK] token ({policy.mask_id}) of --model {policy.name}: its tokenizer "
                        "and config disagree")
    lines = [f"padding changes a logit by {gaps[policy.mask_kind]:.1e} of the largest (attention mask: {policy.mask_kind}); "
             f"a later token changes the first by {moved:.1e}"]
    if policy.ignores_mask:
        lines.append("the model ignores its attention mask: batches will hold prompts of one length only")
    return lines
