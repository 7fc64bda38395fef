"""Flags: Config's fields as command-line flags, presets, and a sentence for every value that cannot work."""
import argparse
import errno
import inspect
import math
import os
import re
import sys
import typing
from dataclasses import fields
from pathlib import Path

import torch

import tasks
from lab import processes

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR,
               errno.EFBIG)


class UserError(Exception):
    """Bad input: one sentence that names the flag or file and what to do. Ends the program with exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def in_one_sentence(program):
    """Run a program; bad input, a full disk or Ctrl-C end it with one sentence on stderr. Returns the exit code."""
    try:
        code = program()
        processes.leave()
        return code
    except (UserError, tasks.TaskError) as e:
        print(f"agrpo: {e}", file=sys.stderr)
    except BrokenPipeError:                                                      # `| head`: it has seen enough
        hush()
        return 141
    except OSError as e:
        if e.errno not in DISK_ERRORS:
            raise
        print(f"agrpo: cannot write {e.filename or 'the output'}: {e.strerror}; make room or choose another --out (what "
              "was saved before is whole, --resume goes on from it)", file=sys.stderr)
    except FloatingPointError as e:
        print(f"agrpo: the model's {e}, its weights have diverged: start again with a lower --lr", file=sys.stderr)
    except torch.OutOfMemoryError as e:
        print(f"agrpo: {first_line(e).split('. ')[0]}: lower --micro_batch, --rollout_batch or --eval_batch, whichever was at "
              "work, or add --activation_checkpointing (bash run.sh plan adds it up)", file=sys.stderr)
    except RuntimeError as e:
        if not processes.lost(e):
            raise
        print("agrpo: another process of this run has died or cannot be reached; its own message, or the launcher's, says why; "
              "the same command with --resume goes on from the last checkpoint", file=sys.stderr)
    except KeyboardInterrupt:
        print("agrpo: stopped at once by Ctrl-C; what was saved before is whole, the same command with --resume goes on "
              "from it", file=sys.stderr)
        return 130
    return 2


def hush():
    """Nobody reads stdout any more: what is still printed goes nowhere, without an error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def boolean(text):
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def sections(Config):
    """Field name -> the "# --- title" above it in the source of Config."""
    title, titles = None, {}
    for line in inspect.getsource(Config).splitlines():
        heading, name = re.match("    # --- (.+)", line), re.match(r"    (\w+):", line)
        title = heading[1] if heading else title
        if name:
            titles[name[1]] = title
    return titles


def with_underscores(flag):
    """--train-file=a-b is --train_file=a-b; what is no flag stays as it is."""
    name, equals, value = flag.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if flag.startswith("--") else flag


def parse(Config, argv=None):
    """argv -> Config. Every field is a flag, with _ or - between its words; help comes from the field's metadata."""
    prog, titles, groups = f"python {sys.argv[0]}", sections(Config), {}
    parser = Parser(prog=prog, usage=f"{prog} [--flag value ...]", allow_abbrev=False,
                    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=118),
                    description="AGRPO: policy gradients for masked diffusion language models.\nIn brackets the default. Where "
                                "there is none, it depends on the task and the model's size and is\nprinted at the start, or "
                                "is nothing. Flags may be written with - in place of _.")
    for f in fields(Config):
        kind = typing.get_args(f.type)[0] if typing.get_args(f.type) else f.type
        text = f.metadata["help"]
        if f.default is not None and "[" not in text:
            text += f" [{f.default}]"
        more = dict(type=boolean, nargs="?", const=True, metavar="BOOL") if kind is bool else \
            dict(type=kind, metavar={int: "N", float: "X", str: "S"}[kind])
        if titles[f.name] not in groups:
            groups[titles[f.name]] = parser.add_argument_group(titles[f.name])
        groups[titles[f.name]].add_argument(f"--{f.name}", default=f.default, help=text.replace("%", "%%"), **more)
    argv = sys.argv[1:] if argv is None else argv
    return Config(**vars(parser.parse_args([with_underscores(arg) for arg in argv])))


def fill(cfg, presets, default_model):
    """Fill what is None from the presets of the scale (tiny or llada) and the task. default_model: {large, small}."""
    if cfg.task not in tasks.TASKS:
        raise UserError(f"--task {cfg.task} is unknown: choose one of {', '.join(tasks.TASKS)}")
    if cfg.device is None:
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {cfg.device} is unknown: choose cpu, cuda, or one of several GPUs, as in cuda:1")
    try:
        gpu = torch.cuda.get_device_properties(cfg.device).total_memory if torch.device(cfg.device).type == "cuda" else 0
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {cfg.device} is not there: {first_line(e)}; try cpu") from e
    if cfg.model is None:
        cfg.model = default_model["large"] if gpu > 40e9 else default_model["small"]
        cfg.why = f"no --model given: a GPU of {gpu / 1e9:.0f} GB, so {cfg.model} (--model lab/tiny is the small one)" if gpu > 40e9 \
            else f"no --model given: no GPU of 40 GB or more, so lab/tiny (--model {default_model['large']} is the large one)"
        if gpu <= 40e9 and f"tiny/{cfg.task}" not in presets:
            raise UserError(f"--task {cfg.task} needs a model that reads English: a GPU of 40 GB or more for "
                            f"{default_model['large']}, or --model with one of yours; countdown and sudoku run anywhere")
    folder = local_folder(cfg.model)
    small = folder is not None and sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 2e8
    chosen = {**presets["tiny"], **presets.get(f"tiny/{cfg.task}", {})} if small else presets["llada"]
    fill_none(cfg, chosen)
    fill_none(cfg, dict(top_k=0, top_p=1.0, unmasking="random", block_length=cfg.C, eval_C=cfg.C))
    fill_none(cfg, dict(eval_block=cfg.block_length if cfg.eval_C == cfg.C else cfg.eval_C))


def local_folder(model):
    """The folder that --model names, or None for a hub id. A folder without a model is refused here, not on the hub."""
    folder = Path(model).expanduser()
    hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not folder.parent.is_dir()
    if hub_id and not folder.exists():
        return None
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {model}: no config.json there; give a folder saved by save_pretrained or a hub id")
    return folder


def fill_none(cfg, values):
    for name, value in values.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)


def check(cfg, steps_per_block):
    """Refuse what cannot work, in one sentence that says what would. Also fills --steps with all that divide."""
    low = dict(C=1, m=1, block_length=1, k=1, questions=1, mu=1, updates=1, micro_batch=1, rollout_batch=1, eval_batch=1,
               eval_n=1, seeds=1, save_every=1, sample_every=1, G=2, top_k=0, lora_r=0, lora_alpha=1, eval_every=0, beta=0,
               weight_decay=0, warmup=0, temperature=0, max_prompt=1, eval_C=1, eval_block=1)
    for name, least in low.items():
        if not least <= getattr(cfg, name) < math.inf:
            why = " (one rollout alone has no group mean to compare with)" if name == "G" else ""
            raise UserError(f"--{name} {getattr(cfg, name)} must be at least {least}{why}")
    for name in ("lr", "eps", "max_grad_norm"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"--{name} {getattr(cfg, name)} must be a positive number")
    if abs(cfg.seed) >= 2 ** 32:
        raise UserError(f"--seed {cfg.seed} is too large: use one below 2 ** 32")
    if not 0 < cfg.top_p <= 1:
        raise UserError(f"--top_p {cfg.top_p} must be above 0 and at most 1")
    choices = dict(mode=("train", "eval"), unmasking=("random", "entropy", "max_prob", "low_confidence"),
                   timesteps=("surprise", "entropy", "uniform"), points=("low-discrepancy", "iid", "row-strata", "batch-strata"),
                   ratio=("token", "step"), length_norm=("constant", "official"),
                   dtype=("float32", "bfloat16", "float16"))
    for name, good in choices.items():
        if getattr(cfg, name) not in good:
            raise UserError(f"--{name} {getattr(cfg, name)} is unknown: choose one of {', '.join(good)}")
    if cfg.mode == "train" and cfg.adapter:
        raise UserError("--adapter is for --mode eval; to go on with a run use --resume --out FOLDER")
    if cfg.tracker:
        check_tracker(cfg.tracker)
    if cfg.mode == "train" and cfg.temperature == 0:
        raise UserError("--temperature 0 is greedy: all rollouts of a group are equal and nothing can be learnt; train at "
                        "1.0 or so (--mode eval is greedy by itself)")
    if cfg.mode == "train" and cfg.k > cfg.m:
        raise UserError(f"--k {cfg.k} is more than --m {cfg.m}: a rollout has only m timesteps to draw from; use k < m")
    if cfg.mode == "train" and cfg.lora_r == 0 and (cfg.dtype != "float32" or cfg.load_in_4bit):
        raise UserError(f"--lora_r 0 trains every weight, and steps this small vanish in {'4 bits' if cfg.load_in_4bit else cfg.dtype}: "
                        "add --dtype float32, or keep LoRA")
    if cfg.beta > 0 and cfg.lora_r == 0:
        raise UserError("--beta needs adapters to switch off for the reference policy: use --lora_r above 0")
    try:
        steps_per_block(cfg.C, cfg.m, cfg.block_length)
    except ValueError as e:
        raise UserError(str(e)) from None
    if cfg.steps is None:
        cfg.steps = ",".join(map(str, that_divide(range(cfg.eval_C, 0, -1), cfg.eval_C, cfg.eval_block, steps_per_block)))
    if not all(s.strip().isdigit() for s in cfg.steps.split(",")):
        raise UserError(f"--steps {cfg.steps!r} must be numbers with commas between, e.g. 12,6,3")
    if cfg.eval_C % cfg.eval_block:
        raise UserError(f"--eval_block {cfg.eval_block} does not divide --eval_C {cfg.eval_C}: choose a divisor")
    good = list(that_divide(range(1, cfg.eval_C + 1), cfg.eval_C, cfg.eval_block, steps_per_block))
    for m in step_list(cfg):
        if m not in good:
            raise UserError(f"--steps {m} cannot reveal --eval_C {cfg.eval_C} tokens in blocks of --eval_block "
                            f"{cfg.eval_block} in equal shares: choose from {good}")


def check_tracker(name):
    from accelerate.tracking import get_available_trackers

    installed = [tracker.value for tracker in get_available_trackers()]
    if name not in installed:
        raise UserError(f"--tracker {name} is unknown or not installed; installed: {', '.join(installed) or 'none'} "
                        "(pip install adds one; metrics.jsonl is written anyway)")


def that_divide(steps, C, block_length, steps_per_block):
    """Those of `steps` that decode C tokens in equal shares."""
    for m in steps:
        try:
            steps_per_block(C, m, block_length)
        except ValueError:
            continue
        yield m


def step_list(cfg):
    return [int(s) for s in cfg.steps.split(",")]


def first_line(e):
    """The first line of an error's message: enough for one sentence."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return (lines[0] if lines else type(e).__name__).rstrip(".")
