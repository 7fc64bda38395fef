"""A run that is kept: what `bash run.sh countdown` starts, around agrpo.py's own loop.

    python lab/run.py --task gsm8k --preset llada       (--help lists the flags)
    torchrun --nproc_per_node 8 -- lab/run.py --task gsm8k --preset llada

agrpo.train does the learning. Here is what a person types, sees and keeps: presets, refusals,
a folder with a lock, checkpoints (the same command goes on where it was killed, to the same
numbers), several processes that must agree, the table, the log with its warnings, the curve.
"""
import argparse
import contextlib
import fcntl
import inspect
import io
import json
import math
import os
import re
import resource
import secrets
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from hashlib import blake2b
from importlib import metadata
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import agrpo
import models
import tasks
from agrpo import Decoding, gather, processes, step_counts
from models import first_line
from tasks import TaskError            # bad input: a ValueError of one sentence

# --- what is typed ----------------------------------------------------------------------------

@dataclass
class Run(agrpo.Config):
    """agrpo.Config and what a run that is kept has beside it."""
    preset: str = ""                   # tiny, llada or qwen: a model and its settings [tiny]
    task: str = "countdown"            # countdown, sudoku, gsm8k, or FILE.py that registers one
    options: dict = field(default_factory=dict)     # the task's own, each a flag
    C: int = 32                        # completion length, tokens
    m: int = 8                         # denoising steps: C / m tokens a step
    k: float = 4.0                     # timesteps per rollout that are scored, on average
    lr: float = 1e-3                   # peak; 1 % warm-up, then cosine to 0
    model: str = ""                    # hub id or folder [the preset's]
    revision: str = ""                 # commit of a hub id, to pin it
    policy: str = ""                   # FILE.py:Class, what the model sees [the whole text]
    adapter: str = ""                  # folder of LoRA weights to start from
    mask_id: int = -1                  # id of [MASK], for a model that does not say
    shift: int = -1                    # 1: position i is predicted at i - 1 [1 for Dream]
    out: str = ""                      # folder of the run [runs/TASK-SEED]
    device: str = ""                   # cpu, cuda, cuda:1 [cuda if there is one]
    wandb: str = ""                    # Weights & Biases project to log to, too
    train_file: str = ""               # JSONL, CSV or parquet in place of the task's own data
    test_file: str = ""                # the same, held out; its problems are never trained on
    max_prompt: int = 512              # tokens; longer prompts are left out
    updates: int = 200                 # of the weights, mu steps each; 0: only evaluate
    micro_batch: int = 320             # pairs per pass of the loss; 0: as many as fit
    rollout_batch: int = 256           # rows per forward of a rollout; 0: as many as fit
    recompute: bool = False            # activations in the backward pass: slower, less memory
    eval_C: int = 0                    # completion length of the evaluations [C]
    eval_block: int = 0                # and their block length [block_length, or eval_C]
    eval_sampled: bool = True          # as the rollouts sample too, not only greedy
    steps: str = ""                    # of the greedy evaluations, as 12,6,2 [all that fit]
    save_every: int = 10               # updates between checkpoints

    def cells(self):
        """The evaluations, first the one that a run is known by: as the rollouts sample, then
        greedy max_prob, which is LLaDA's low-confidence decoding, at each of --steps."""
        greedy = [Decoding(self.eval_C, int(m), self.eval_block, "max_prob", temperature=0.0)
                  for m in self.steps.split(",")]
        return [self.how] * self.eval_sampled + greedy


# tiny: measured here, see README. llada: the paper's settings, but half of its k, as pairs are
# drawn over the batch; and its learning rate belongs to 24 optimizer steps an update, so it is
# to be swept for one. qwen: a guess for a consumer GPU.
PRESETS = {
    "tiny": dict(model="lab/tiny"),
    "llada": dict(
        model="GSAI-ML/LLaDA-8B-Instruct", dtype="bfloat16", recompute=True, C=384, m=128,
        block_length=12, temperature=0.6, top_k=150, top_p=0.99, questions=16, k=12.0,
        updates=300, lr=1e-5, lora_r=64, lora_alpha=64, micro_batch=0, rollout_batch=0,
        eval_C=256, eval_block=32, steps="128", eval_sampled=False),
    "qwen": dict(
        model="dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", dtype="bfloat16", C=256, m=64,
        block_length=32, temperature=0.8, top_k=150, top_p=0.99, questions=16, k=4.0,
        updates=300, lr=5e-5, micro_batch=0, rollout_batch=0, recompute=True, steps="64",
        eval_sampled=False),
}
TINY = {
    "countdown": dict(C=12, m=2, k=0.5, lr=1.5e-3, updates=500, max_number=16,
                      division=False),
    "sudoku": dict(C=20, m=2, k=0.5, empties=10, unmasking="max_prob", updates=250),
}
CHOICES = dict(preset=(*PRESETS,), unmasking=agrpo.UNMASKING, follow=agrpo.FOLLOW,
               ratio_per=("token", "step"), dtype=("float32", "bfloat16", "float16"))
AT_LEAST = dict(seed=0, C=1, m=1, questions=1, G=2, mu=1, beta=0, updates=0,
                weight_decay=0, lora_r=0, lora_alpha=1, micro_batch=0, rollout_batch=0,
                eval_n=1, eval_every=1, save_every=1, max_prompt=1, temperature=0, mask_id=-1,
                shift=-1)
MOST = 1e15                            # of each of these
ABOVE_0 = ("lr", "eps", "max_grad_norm", "k")


def parse(argv=None):
    """Flags -> Run: what was typed, over the preset's values, over the defaults.

    Every field is a flag, the comment behind it its help; so is every option of the task.
    Raises TaskError.
    """
    models.USERS_FILES.clear()         # of an earlier call in this process
    parser = Parser(add_help=False, usage="run.py [--flag VALUE ...]",
                    epilog="Presets and tasks set other values: a run's first lines say which.")
    source = inspect.getsource(agrpo.Config) + inspect.getsource(Run)
    comments = dict(re.findall(r"^    (\w+): .*# (.+)$", source, re.M))
    for f in fields(Run):
        if f.name != "options":
            add_flag(parser, f.name, f.default, comments[f.name])
    # Which task, decides what further flags there are.
    asked = vars(parser.parse_known_args(argv)[0]).get("task", Run.task)
    task = find_task(asked)
    taken = set(tasks.TASKS[task].options) & {f.name for f in fields(Run)}
    if taken:
        raise TaskError(f"--task {asked}: its option {min(taken)} is a flag already; give it "
                        "another name")
    for name, default in tasks.TASKS[task].options.items():
        add_flag(parser, name, default, f"an option of {task}")
    parser.add_argument("-h", "--help", action="help")
    typed = dict(vars(parser.parse_args(argv)), task=task)

    # Naming a preset's model asks for its settings.
    of_model = {values["model"]: preset for preset, values in PRESETS.items()}
    preset = typed.setdefault("preset", of_model.get(typed.get("model"), "tiny"))
    # A task of one's own may bear a known name: it is not what the tiny model knows.
    if preset == "tiny" and "model" not in typed and asked not in TINY:
        raise TaskError(f"--task {task} needs a model that reads its problems: add --preset "
                        "llada, --preset qwen or --model, and the flags of the run if this is "
                        "about its --adapter")
    values = {**PRESETS[preset], **(TINY.get(asked, {}) if preset == "tiny" else {}), **typed}
    options = {name: values.pop(name) for name in tasks.TASKS[task].options if name in values}
    cfg = Run(**values, options=options)
    # What was left open follows from the rest, so that config.json has every value.
    cfg.block_length = cfg.block_length or cfg.C
    cfg.eval_C = cfg.eval_C or cfg.C
    cfg.eval_block = cfg.eval_block or (cfg.block_length if cfg.eval_C == cfg.C else cfg.eval_C)
    cfg.steps = cfg.steps or ",".join(map(str, step_counts(cfg.eval_C, cfg.eval_block)))
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg.out = str(Path(cfg.out or f"runs/{task}-{cfg.seed}").expanduser())
    if cfg.adapter:
        take_adapters_size(cfg, typed)
    check(cfg, typed)
    return cfg


def take_adapters_size(cfg, typed):
    """Rank and alpha are those of --adapter. Refuses others that were typed."""
    saved = {}
    with contextlib.suppress(OSError, ValueError):              # load_policy will say it
        path = Path(cfg.adapter).expanduser() / "adapter_config.json"
        saved = json.loads(path.read_text())
    for flag, key in (("lora_r", "r"), ("lora_alpha", "lora_alpha")):
        if key in saved and cfg.lora_r:
            if typed.get(flag, saved[key]) != saved[key]:
                raise TaskError(f"--{flag} {typed[flag]}: --adapter {cfg.adapter} has "
                                f"{saved[key]}; leave it out")
            setattr(cfg, flag, saved[key])


class Parser(argparse.ArgumentParser):
    def __init__(self, **more):
        super().__init__(allow_abbrev=False, **more,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise TaskError(f"{message} (--help lists the flags)")


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def add_flag(parser, name, default, help):
    kind = type(default)
    more = dict(type=boolean, nargs="?", const=True) if kind is bool else dict(type=kind)
    spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
    shown = "" if default == "" or help.endswith("]") else f" [{default}]"
    help = (help + shown).replace("%", "%%")
    parser.add_argument(*spellings, dest=name, default=argparse.SUPPRESS, help=help,
                        choices=CHOICES.get(name), metavar=kind.__name__.upper(), **more)


def check(cfg, typed):
    """Refuse what cannot work, in a sentence that says what would. Raises TaskError."""
    value, gpus = asdict(cfg), torch.cuda.device_count()
    gpu = re.fullmatch(r"cuda:?(\d*)", cfg.device)
    # (is it broken?, what to say). Numbers first: the later rules count on them.
    rules = [(typed[name] == "", f"--{name} is empty: leave it out, or give a value")
             for name in typed]
    rules += [(not least <= value[name] < MOST,
               f"--{name} {value[name]} cannot work: give a number from {least} to {MOST:.0e}")
              for name, least in AT_LEAST.items()]
    rules += [(not 0 < value[name] < math.inf,
               f"--{name} {value[name]} cannot work: give a number above 0")
              for name in ABOVE_0]
    try:
        cfg.how
    except ValueError as e:
        rules.append((True, with_flags(str(e))))
    rules += [
        (cfg.seed >= 2 ** 32, f"--seed {cfg.seed} is too large: use one below 2 ** 32"),
        (cfg.shift > 1, f"--shift {cfg.shift} is none: 0, or 1 for a model like Dream"),
        (cfg.device != "cpu" and not (gpu and int(gpu[1] or 0) < gpus),
         f"--device {cfg.device} is not here (torch sees {gpus} GPUs): choose cpu or cuda:N"),
        (cfg.updates > 0 and cfg.temperature == 0,
         "--temperature 0 is greedy, all rollouts of a group would be equal: train at 1.0"),
        (cfg.k > cfg.m, f"--k {cfg.k:g} is more than the --m {cfg.m} steps of a rollout"),
        (cfg.beta > 0 and not cfg.lora_r, "--beta needs adapters to switch off: --lora_r 32"),
        (cfg.adapter and not cfg.lora_r, "--adapter needs --lora_r above 0"),
        (not cfg.lora_r and cfg.dtype != "float32",
         f"--lora_r 0: small steps of all weights vanish in {cfg.dtype}; use --dtype float32"),
        (not re.fullmatch(r"\d+(,\d+)*", cfg.steps),
         f"--steps {cfg.steps} must be numbers with commas between, as in 12,6,3")]
    # A task that reads both files makes no problems of its own.
    for name in tasks.TASKS[cfg.task].options if cfg.train_file and cfg.test_file else ():
        rules.append((name in typed, f"--{name} has no effect beside --train_file and "
                                     "--test_file: leave it out"))
    for broken, sentence in rules:
        if broken:
            raise TaskError(sentence)
    try:
        cfg.cells()
    except ValueError as e:            # evaluations have flags of their own
        own = dict(m="steps", C="eval_C", block_length="eval_block")
        raise TaskError(with_flags(str(e), own)) from None


def with_flags(sentence, own={}):
    """What agrpo.Decoding says of its fields, said of the flags."""
    return re.sub(r"\b(m|C|block_length|unmasking|temperature|top_k|top_p) ",
                  lambda name: f"--{own.get(name[1], name[1])} ", sentence)


def find_task(name):
    """The name of a task in tasks.TASKS. FILE.py is imported: the first one it registers, or
    the one that FILE.py:NAME names. Raises TaskError."""
    file, _, wanted = name.partition(":")
    if not file.endswith(".py"):
        tasks.TASKS[name]                                       # or TASKS says what there is
        return name
    # Its own are those that were not there before, or were another one of that name.
    before = dict(tasks.TASKS)
    models.import_file(file, "--task")
    new = [task for task in tasks.TASKS if tasks.TASKS[task] is not before.get(task)]
    if not new or wanted and wanted not in new:
        raise TaskError(f"--task {name} registers no task of that name (but {new}): set "
                        "tasks.TASKS[NAME] in it")
    return wanted or new[0]


# --- what is watched -------------------------------------------------------------------------

def with_ratio_checked(policy):
    """AGRPO's gradient, looked at when it first has pairs: until then nothing moves."""
    checked = []

    def gradient(*batch):
        seen = agrpo.policy_gradient(*batch)
        if not checked and any(gather(len(seen.ratio))):
            check_ratio(policy, seen.ratio)
            checked.append(True)
        return seen
    return gradient


def check_ratio(policy, ratio):
    """Before the first optimizer step pi_theta is pi_old: any other ratio is a fault.

    In 16 bits a GPU rounds a product of few rows otherwise than one of many, and a single token
    may be off by 0.2 (measured at 8B): there the mean decides, and a larger maximum is a sign.
    """
    off = (ratio - 1).abs() if len(ratio) else torch.zeros(1)
    worst, mean = torch.tensor(gather((off.amax().item(), off.mean().item()))).amax(dim=0)
    found = f"max|ratio - 1| before the first optimizer step: {worst:.1e}"
    decides, tolerance = worst, 1e-3
    if policy.dtype in agrpo.HALF:
        decides, tolerance, found = mean, 0.1, f"{found}, its mean {mean:.1e}"
    if not decides < tolerance:
        raise TaskError(f"{found}, not below {tolerance}: rollout and loss disagree; see the "
                        "model's code")
    say(found)
    if worst > 0.5:
        say("    warning: that is more than rounding; if --dtype float32 gives more than 1e-3, "
            "see the model's code")


def statistics(policy, done, cfg):
    """The numbers of the log of an agrpo.Update, over the rows, tokens and pairs of all
    processes: means, but for the few that say otherwise."""
    traj, A = done.traj, done.A
    ratio, A_pair, kl = (torch.cat(x) for x in list(zip(*done.seen))[:3])   # of all passes
    # Tokens that were drawn; those of the last quarter of the steps; those behind the answer.
    drawn = traj.step_of < cfg.m
    late = drawn & (traj.step_of >= cfg.m - max(1, cfg.m // 4))
    filling = torch.isin(traj.o, torch.tensor(sorted(policy.fill_ids), device=traj.o.device))
    each = dict(
        reward=[g.reward for g in done.grades], correct=[g.correct for g in done.grades],
        format=[g.format for g in done.grades], length=(~filling).sum(dim=1),
        dead_groups=(A.view(-1, cfg.G) == 0).all(dim=1), entropy=traj.entropy[drawn],
        late_eos=filling[late], kl=kl, clip_low=(ratio < 1 - cfg.eps) & (A_pair < 0),
        clip_high=(ratio > 1 + cfg.eps) & (A_pair > 0))
    # The mean over all processes is the sum of their sums over the sum of their counts.
    each = {name: torch.as_tensor(x).double() for name, x in each.items()}
    extremes = (ratio.min().item(), ratio.max().item()) if len(ratio) else (1.0, 1.0)
    sums = {name: (x.sum().item(), x.numel()) for name, x in each.items()}
    parts, low, high, pairs, forwards = zip(
        *gather((sums, *extremes, len(ratio), sum(seen.forwards for seen in done.seen))))
    means = {}
    for name in sums:
        total, n = map(sum, zip(*[part[name] for part in parts]))
        means[name] = total / max(1, n)
    # The largest norm of the passes; one that is not finite is the largest.
    worst = max(done.norms, key=lambda norm: (not math.isfinite(norm), norm))
    rollout_seconds, loss_seconds = done.seconds
    return dict(update=done.number, **means, ratio_min=min(low), ratio_max=max(high),
                pairs=sum(pairs), forwards=sum(forwards), lr=done.lr, grad_norm=worst,
                rollout_seconds=rollout_seconds, loss_seconds=loss_seconds)


def describe(policy, traj, row, text, grade):
    """One rollout, half-way and finished, and what the checker made of it."""
    half, tokenizer = traj.how.m // 2, policy.tokenizer
    tokens = tokenizer.batch_decode([[i] for i in traj.o[row].tolist()])
    shown = [token if t < half else "_" for token, t in zip(tokens, traj.step_of[row])]
    prompt = tokenizer.decode(traj.q[row][traj.q_mask[row] > 0], skip_special_tokens=True)
    return dict(prompt=prompt, half=" ".join(shown), text=text, parsed=grade.parsed,
                reason=grade.reason, reward=grade.reward)


# --- what is kept -----------------------------------------------------------------------------

def write(path, data):
    """Bytes to a file that is either the old one or the new one, whenever the process dies."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as e:
        partial.unlink(missing_ok=True)                         # a full disk gets its room back
        raise OSError(e.errno, e.strerror, str(path)) from e


def to_json(value, indent=None):
    """A line of strict JSON: a number that is not finite becomes null."""
    # Python writes NaN and Infinity, which no other reader knows; and reads what it wrote.
    strict = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return (json.dumps(strict, indent=indent) + "\n").encode()


@contextlib.contextmanager
def folder_of_my_own(out):
    """Make the folder, and lock it until this process ends, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        handle = os.open(out, os.O_RDONLY)
    except OSError as e:
        raise TaskError(f"--out {out} cannot be written to ({e.strerror})") from e
    # The system drops this lock when the process dies, even by SIGKILL: no stale lock files.
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TaskError(f"--out {out} is in use by another run: choose another") from None
    try:
        there = sorted(path.name for path in out.iterdir() if path.suffix != ".partial")
        if there and not (out / "checkpoint.pt").exists() and not is_a_run(out):
            raise TaskError(f"--out {out} holds {there[0]} and is no folder of a run: choose "
                            "another, nothing in it was touched")
        yield
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()                                         # if nothing was written
        os.close(handle)


def is_a_run(folder):
    """Is its config.json one of ours?"""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return {"task", "unmasking", "lora_r"} <= set(json.loads(
            (folder / "config.json").read_text()))
    return False


def digest(data):
    """16 bytes that other bytes would not have."""
    return blake2b(data, digest_size=16).digest()


def flags(cfg):
    """Every flag and its value, the task's own among them."""
    fields = asdict(cfg)
    options = fields.pop("options")
    return {**fields, **options}


def fingerprint(model, adapters=False):
    """Numbers from all over each of the base model's tensors, hashed: what is trained on."""
    some = []
    for name, p in model.named_parameters():
        if adapters or "lora_" not in name:
            # Of a large tensor some 4,096, and the sum of all.
            flat = p.detach().flatten()
            some += [flat[::max(1, len(flat) // 4096)].double(), flat.double().sum()[None]]
    return digest(torch.cat(some).cpu().numpy().tobytes()).hex()


def identity(cfg, policy, data, test):
    """What a run is beside its flags: {what it is called in a sentence: a digest of it}."""
    def asked(examples):               # made ones are alike: the first stand for all
        count = min(len(examples), 100) if examples.source.startswith("generated") else None
        prompt = tasks.TASKS[cfg.task].prompt
        return repr([(prompt(example), example) for example in examples[:count]]).encode()

    code = {file: digest(Path(file).read_bytes()).hex() for file in models.USERS_FILES.values()}
    return {"--model (its weights)": fingerprint(policy.model),
            "--mask_id (or what the model says)": str((policy.mask_id, policy.shift)),
            "the training problems": digest(asked(data)).hex(),
            "the held-out problems": digest(asked(test)).hex(),
            **{f"the code of {file}": found for file, found in code.items()}}


def save_checkpoint(cfg, state, trained, optimizer):
    """All that the same command needs to go on, to the same numbers."""
    if processes()[0] == 0:
        # In memory first, with a digest of its bytes behind it: torch.load reads past that.
        file = io.BytesIO()
        torch.save(dict(state=state, config=flags(cfg), trained=trained,
                        optimizer=optimizer.state_dict()), file)
        file.write(digest(file.getvalue()))
        write(Path(cfg.out, "checkpoint.pt"), file.getbuffer())
        write(Path(cfg.out, "samples.jsonl"), b"".join(map(to_json, state["samples"])))


def load_checkpoint(path, cfg, mine, trained, optimizer):
    """Put the last checkpoint back. Returns its state, or None if there is none yet.

    Raises TaskError if it is damaged, of other flags, or of another `identity`.
    """
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        if digest(data[:-16]) != data[-16:]:
            raise ValueError("its bytes are damaged")
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        config, params, state = saved["config"], saved["trained"], saved["state"]
    except Exception as e:             # whatever the readers of zip and pickle raise
        raise TaskError(f"{path} cannot be read ({first_line(e)}): move it away") from e
    # These may change between two calls: they do not change what is learnt. (The base model is
    # compared by its weights.)
    free = ("out", "device", "save_every", "wandb", "preset", "revision", "model", "recompute",
            "micro_batch", "rollout_batch", "eval_every")
    for name, value in flags(cfg).items():
        if name not in free and config.get(name) != value:
            raise TaskError(f"{path} was made with --{name} {config.get(name)}, not {value}: "
                            "repeat its flags (config.json has them), or choose another --out")
    changed = [name for name in mine if state["identity"].get(name) != mine[name]]
    if changed:
        raise TaskError(f"{path}: {changed[0]} changed since this run began: put it back, or "
                        "choose another --out")
    if params.keys() != trained.keys():
        raise TaskError(f"{path} is not of --model {cfg.model}: choose another --out")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(params[name])
    optimizer.load_state_dict(saved["optimizer"])
    return state


def save_weights(policy, folder):
    """The adapter, as plain peft loads it, or with --lora_r 0 a model that --model can name."""
    # Whole under another name first, then file by file: what else lies there, stays.
    partial = folder.with_name(folder.name + ".partial")
    try:
        policy.model.save_pretrained(partial)
        policy.tokenizer.save_pretrained(partial)
        folder.mkdir(exist_ok=True)
        for path in sorted(partial.iterdir()):
            path.rename(folder / path.name)
        partial.rmdir()
    except Exception as e:                                      # safetensors has its own errors
        raise OSError(getattr(e, "errno", None), first_line(e), str(folder)) from e


# --- what is printed --------------------------------------------------------------------------

def say(text):
    """Print, from the first process, to a terminal that may be gone."""
    if processes()[0] != 0:
        return
    try:
        print(text, flush=True)
    except OSError:                                             # nobody reads any more: go on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cut(text, width=100):
    """One safe line of at most `width` columns, the middle left out."""
    text, half = tasks.printable(" ".join(text.split())), width // 2 - 2
    return text if len(text) <= width else text[:half] + " .. " + text[-half:]


def versions():
    return {name: metadata.version(name) for name in ("torch", "transformers", "peft")}


def header(cfg, policy, training, held_out):
    """Versions, device, what differs from the defaults, and the counts that follow."""
    # One line on where this runs.
    where = f"{torch.get_num_threads()} threads"
    if cfg.device != "cpu":
        where = torch.cuda.get_device_name(cfg.device)
    say(f"AGRPO | {', '.join(f'{name} {v}' for name, v in versions().items())} | {cfg.device}, "
        f"{where}, {processes()[1]} process(es) | seed {cfg.seed} | {cfg.out}")
    # What differs from Config's defaults, seven a line.
    plain = asdict(Run())
    changed = [f"{name} {v}" for name, v in flags(cfg).items() if v != plain.get(name, "")]
    for i in range(0, len(changed), 7):
        say("    " + ", ".join(changed[i:i + 7]))
    say("\n".join(policy.notes))
    say(f"{cfg.questions} questions x G {cfg.G} = {cfg.questions * cfg.G} rollouts an update, "
        f"{cfg.how.W} tokens a step; {cfg.m} forwards write one, k = {cfg.k:g} learn on average")
    say(f"training: {training}\nheld out: {held_out}")


def wilson(correct, n, z=1.96):
    """95 % interval of a proportion (Wilson score), sensible at 0 and n too: (low, high)."""
    p, d = correct / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(policy, data, cfg, how):
    """One row of the table of evaluations."""
    grades = agrpo.evaluate(policy, data, cfg, how, cfg.eval_n)
    return summarise(grades, how, len(grades))


def summarise(grades, how, n):
    """Accuracy, its interval for n problems, means of reward and other metrics."""
    def mean(values):
        return sum(values) / len(grades)

    accuracy = mean(g.correct for g in grades)
    low, high = wilson(accuracy * n, n)
    more = {name: mean(g.metrics[name] for g in grades) for name in grades[0].metrics}
    return dict(m=how.m, greedy=how.temperature == 0, n=n, accuracy=accuracy, low=low,
                high=high, reward=mean(g.reward for g in grades), **more)


def table_row(*found):
    """The same evaluation of the base, and of the trained model beside it."""
    text = f"{found[0]['m']:6d} {'greedy' if found[0]['greedy'] else 'rollout':<8}"
    for x in found:
        text += f"   {x['accuracy']:6.1%} [{x['low']:5.1%}, {x['high']:5.1%}]"
    # And the means of the task's own metrics, as the share of tagged answers.
    known = ("m", "greedy", "n", "accuracy", "low", "high", "reward")
    for name in [name for name in found[0] if name not in known]:
        text += f"   {name} " + " -> ".join(f"{x[name]:.2f}" for x in found)
    return text


def table_head(first, trained):
    """What stands above the rows: with the column of the trained model, or without."""
    return f"\n steps sampling   {first:5} [95 % interval]" + "    trained" * trained


def table(policy, data, cfg, state, who, rows=None):
    """Fill state[who], who "base" or "final", with `rows` evaluations [all]; print them."""
    # With --adapter the first column is not of the base model.
    say(table_head("start" if cfg.adapter else "base", who == "final"))
    for i, how in enumerate(cfg.cells()[:rows]):
        # The base model's other rows wait for the end, beside the trained model's.
        if i == len(state["base"]):
            with policy.reference() if state["update"] else contextlib.nullcontext():
                state["base"].append(measure(policy, data, cfg, how))
        if who == "final" and i == len(state["final"]):
            state["final"].append(measure(policy, data, cfg, how))
        say(table_row(state["base"][i], *state["final"][i:i + 1]))


COLUMNS = dict(update=9, reward=8, right=7, dead=6, H=6, ratio=12, clip=9, norm=8, len=5,
               roll=8, loss=8, memory=8, left=8)


def show_sample(sample):
    """A rollout as `describe` has it, and the names of the columns that go on below."""
    for name, key in (("prompt", "prompt"), ("half-way", "half"), ("answer", "text")):
        say(f"    {name:10s} {cut(sample[key])}")
    verdict = f"{cut(sample['reason'], 40)}, reward {sample['reward']:.2f}"
    say(f"    {'checker':10s} read {cut(sample['parsed'], 40)!r}: {verdict}")
    say("".join(f"{name:>{width}}" for name, width in COLUMNS.items()))


def console(now, cfg, left):
    """A line of the log; left: seconds."""
    values = [f"{now['update']}/{cfg.updates}", f"{now['reward']:.2f}", f"{now['correct']:.0%}",
              f"{now['dead_groups']:.0%}", f"{now['entropy']:.2f}",
              f"{now['ratio_min']:.3g}-{now['ratio_max']:.3g}",
              f"{now['clip_low']:.0%}/{now['clip_high']:.0%}", f"{now['grad_norm']:.3g}",
              f"{now['length']:.0f}"]
    values += [f"{now[part]:.2f}s" for part in ("rollout_seconds", "loss_seconds")]
    values += [f"{now['memory_bytes'] / 2**20:.0f}M", f"{left // 60:.0f}:{left % 60:02.0f}"]
    say("".join(f"{value:>{width}}" for value, width in zip(values, COLUMNS.values())))


def warnings(now, past):
    """(kind, sentence) of the ways in which training fails, with the likely cause."""
    norm, H, dead, late = (now[x] for x in ("grad_norm", "entropy", "dead_groups", "late_eos"))
    # A spike is measured against the median of the last 20 norms; dead updates have none.
    norms = sorted([x["grad_norm"] for x in past if 0 < x["grad_norm"] < math.inf][-20:])
    H_first, clipped = past[0]["entropy"] if past else 0.0, now["clip_low"] + now["clip_high"]
    spike = len(norms) >= 10 and 10 * norms[len(norms) // 2] < norm < math.inf
    # kind: (is it so?, the sentence)
    signs = dict(
        broken=(not math.isfinite(norm), "a gradient that is not finite: it changed nothing"),
        spike=(spike, f"gradient norm {norm:.3g} is over 10 times its median: k too small, or "
                      "weights without a bound"),
        entropy=(H < 0.05 * H_first, f"entropy {H:.3g} fell from {H_first:.3g}: the policy has "
                                     "stopped exploring; lower --lr, or stop here"),
        eos=(late > 0.9, f"{late:.0%} of the last steps' tokens are EOS: shorten --C or "
                         "--block_length"),
        dead=(dead > 0.8, f"{dead:.0%} of the groups are dead, all rewards equal: problems too "
                          "easy or too hard, or --G too small"),
        clip=(clipped > 0.3, f"{clipped:.0%} of the tokens are clipped: lower --lr or --mu"))
    return [(kind, sentence) for kind, (shown, sentence) in signs.items() if shown]


def draw_curve(path, history, evals, title):
    """Accuracy against updates: of the training rollouts, and held out with its interval."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    ax.plot([h["update"] for h in history], [h["correct"] for h in history], lw=0.8, alpha=0.5,
            label="training rollouts")
    x, y, low, high = ([e[key] for e in evals] for key in ("update", "accuracy", "low", "high"))
    ax.plot(x, y, "o-", label="held-out")
    ax.fill_between(x, low, high, alpha=0.2)
    ax.axhline(y[0], ls="--", c="gray", label="before training")
    ax.set(xlabel="update", ylabel="accuracy", ylim=(0, 1), title=title)
    ax.legend()
    picture = io.BytesIO()
    fig.savefig(picture, dpi=120)
    plt.close(fig)
    write(path, picture.getvalue())


# --- a run ------------------------------------------------------------------------------------

@contextlib.contextmanager
def heard_signals():
    """Ctrl-C, SIGTERM, SIGHUP: a list of those that came, for the update in hand is finished.

    The second one is a KeyboardInterrupt: it stops at once.
    """
    heard = []

    def receive(number, frame):
        if heard:
            raise KeyboardInterrupt
        heard.append(number)
        with contextlib.suppress(OSError):                      # print may be under way
            os.write(2, b"\nstopping after this update, to save it (again: at once)\n")
    # Not those that were ignored before, as SIGHUP is under nohup.
    ours = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(n) != signal.SIG_IGN]
    before = [signal.signal(n, receive) for n in ours]
    try:
        yield heard
    finally:
        for number, handler in zip(ours, before):
            signal.signal(number, handler)


def join_processes(cfg):
    """Meet the other processes of this run, if torchrun or accelerate launch started some."""
    # They set these variables; without them there is one process.
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    lost = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if lost:
        raise TaskError(f"WORLD_SIZE is set and {min(lost)} is not: start with torchrun, which "
                        "sets both, or unset WORLD_SIZE")
    if cfg.device != "cpu":
        cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(cfg.device)
    # One process may learn for long while another, with dead groups only, waits for it.
    backend, patience = "gloo" if cfg.device == "cpu" else "nccl", timedelta(hours=2)
    dist.init_process_group(backend, timeout=patience)
    if cfg.questions % processes()[1]:
        raise TaskError(f"--questions {cfg.questions} cannot be shared equally by "
                        f"{processes()[1]} processes: choose a multiple")


def must_agree(what):
    """Refuse processes that differ in flags, base model or checkpoint."""
    for other in gather(what):
        for name in what:
            if other[name] != what[name]:
                flag = name if " " in name else f"--{name}"         # or of `identity`
                raise TaskError(f"two processes have {flag} {other[name]} and {what[name]}: "
                                "start all with the same flags and files, on a disk all see")


def load_test(cfg):
    """The held-out examples. Raises TaskError."""
    return tasks.load(cfg.task, "test", file=cfg.test_file or None, **cfg.options)


def load_training(cfg, test):
    """The training examples, none of which is a held-out problem. Raises TaskError."""
    return tasks.load(cfg.task, "train", seed=cfg.seed, file=cfg.train_file or None,
                      held_out=test, **cfg.options)


def make_optimizer(cfg, params):
    """AdamW; `train` sets its learning rate before each step."""
    return torch.optim.AdamW(params, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)


def short_enough(policy, data, cfg, split):
    """The examples whose prompts are not too long. Says how many are. Raises TaskError."""
    # Prompt and completion must fit into the model.
    longest = models.room(policy)
    most = max(0, min(cfg.max_prompt, longest - max(cfg.C, cfg.eval_C)))
    # Made examples are alike, so the first 100 stand for all.
    generated = data.source.startswith("generated")
    some = [data[i] for i in range(min(len(data), 100) if generated else len(data))]
    _, mask = policy.encode([tasks.TASKS[cfg.task].prompt(example) for example in some])
    length = mask.sum(dim=1).tolist()
    kept = [example for example, n in zip(some, length) if n <= most]
    if len(kept) == len(some):
        return data
    what = f"{len(some) - len(kept)} of {len(some)} {split} prompts have over {most} tokens"
    if generated or not kept:
        way_out = ("raise --max_prompt" if most == cfg.max_prompt else
                   f"lower --C, for --model has room for {longest} tokens in all")
        raise TaskError(f"{what}, up to {max(length)}: {way_out}")
    say(f"{what}: left out")
    return kept


def peak_memory(device):
    """Bytes at the peak: allocated on the GPU, or resident."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(cfg):
    """Train, or go on where the folder's checkpoint stands, to the same numbers -> exit code"""
    # The first process has the folder; each has the data and the model.
    join_processes(cfg)
    first = processes()[0] == 0
    folder = folder_of_my_own(Path(cfg.out)) if first else contextlib.nullcontext()
    with folder, heard_signals() as heard:
        test = data = load_test(cfg)
        if cfg.updates:
            data = load_training(cfg, test)
        policy, source = models.load_policy(cfg, test), test.source
        header(cfg, policy, data.source, source)
        mine = identity(cfg, policy, data, test)
        test = short_enough(policy, test, cfg, "held-out")
        data = short_enough(policy, data, cfg, "training")
        state = learn(cfg, policy, data, test, mine, heard)
        if state["update"] == cfg.updates:
            finish(cfg, policy, state, source)
            return 0
        say(f"stopped after update {state['update']}, saved in {cfg.out}; the same command "
            "goes on")
        return 130


def begin(cfg, policy, test, mine):
    """From the checkpoint, or from the base model and its row -> state, weights, optimizer

    Raises TaskError.
    """
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    optimizer, start = make_optimizer(cfg, trained.values()), time.time()
    # Another flag or another model in one process would be averaged into everyone's gradient.
    # (How many rows fit may differ, and changes nothing.)
    must_agree(dict(flags(cfg), device="", micro_batch=0, rollout_batch=0, **mine))
    state = load_checkpoint(Path(cfg.out, "checkpoint.pt"), cfg, mine, trained, optimizer)
    must_agree(dict(out=state and state["update"]))
    if state:
        say(f"going on after update {state['update']} of {cfg.updates}")
    else:
        state = dict(update=0, seconds=0.0, identity=mine, base=[], final=[], evals=[],
                     history=[], samples=[], wandb=secrets.token_hex(4))
        # With adapters to switch off, the rest of the table can wait.
        fresh = cfg.lora_r and not cfg.adapter and cfg.updates
        table(policy, test, cfg, state, "base", rows=1 if fresh else None)
        state["evals"].append(dict(update=0, **state["base"][0]))
        state["seconds"] = time.time() - start
        save_checkpoint(cfg, state, trained, optimizer)
    if processes()[0] == 0:
        config = dict(asdict(cfg), versions=versions())
        write(Path(cfg.out, "config.json"), to_json(config, indent=2))
        # A killed run may have logged updates that its checkpoint does not know.
        write(Path(cfg.out, "metrics.jsonl"), b"".join(map(to_json, state["history"])))
    return state, trained, optimizer


def learn(cfg, policy, data, test, mine, heard):
    """Begin, train until done or a signal was heard, saving on the way -> state

    Raises TaskError.
    """
    state, trained, optimizer = begin(cfg, policy, test, mine)
    log = logger(cfg, state)
    first, history = state["update"], state["history"]
    start, before = time.time(), state["seconds"]
    for done in agrpo.train(policy, data, cfg, list(trained.values()), optimizer, first,
                            with_ratio_checked(policy)):
        now, update = statistics(policy, done, cfg), done.number
        sample = describe(policy, done.traj, 0, done.texts[0], done.grades[0])
        now["memory_bytes"] = peak_memory(cfg.device)
        left = (time.time() - start) / (update - first) * (cfg.updates - update)
        report(now, sample, state, cfg, left)
        if update % cfg.eval_every == 0 and update < cfg.updates:
            found = measure(policy, test, cfg, cfg.cells()[0])
            state["evals"].append(dict(update=update, **found))
            now["held_out"] = found["accuracy"]
            say(f"    held-out{table_row(found)}   n {found['n']}")
        log(now)
        history.append(now)
        state.update(update=update, seconds=before + time.time() - start)
        # Ctrl-C may have reached one process alone; all stop after the same update.
        stopping = any(gather(bool(heard)))
        if update % cfg.save_every == 0 or update == cfg.updates or stopping:
            save_checkpoint(cfg, state, trained, optimizer)
        if [math.isfinite(x["grad_norm"]) for x in history[-3:]] == [False] * 3:
            raise TaskError("three gradients in a row were not finite: start again with a "
                            f"lower --lr, another --out ({cfg.out} has the weights before)")
        if stopping:
            break
    if state["update"] < cfg.updates:
        return state
    # The last table, saved too: a finished run called again prints it without a forward.
    if cfg.updates == 0:
        state["final"] = state["base"]
    unfinished = not state["final"]
    table(policy, test, cfg, state, "final")
    if unfinished:
        state["seconds"] = before + time.time() - start
        save_checkpoint(cfg, state, trained, optimizer)
    return state


def report(now, sample, state, cfg, left):
    """Print an update: its sample and its numbers only now and then, its warnings always."""
    update, every = now["update"], max(1, cfg.updates // 50)    # lines that fit a screen or two
    if update == 1 or update % (10 * every) == 0:
        state["samples"].append(dict(update=update, **sample))
        show_sample(sample)
    if update == 1 or update % every == 0:
        console(now, cfg, left)
    # A warning that was given in the last 20 updates is not given again.
    signs = warnings(now, state["history"])
    given = {kind for x in state["history"][-20:] for kind in x["warnings"]}
    now["warnings"] = [kind for kind, _ in signs]
    for kind, sentence in signs:
        if kind not in given:
            say(f"    warning: {sentence}")


def logger(cfg, state):
    """A function that keeps the numbers of an update: in metrics.jsonl and, if asked, W&B."""
    if processes()[0] != 0:
        return lambda now: None
    if cfg.wandb:
        # The id stands in the checkpoint, so that a resumed run goes on in its own record.
        import wandb
        wandb.init(project=cfg.wandb, config=asdict(cfg), dir=cfg.out, id=state["wandb"],
                   resume="allow")

    def log(now):
        with open(Path(cfg.out, "metrics.jsonl"), "ab") as f:
            f.write(to_json(now))
        if cfg.wandb:
            wandb.log(now, step=now["update"])
    return log


def finish(cfg, policy, state, source):
    """The weights, the curve, summary.json, and what they say."""
    out, history = Path(cfg.out), state["history"]
    # The first row of each table is what the run is known by: decoded as the rollouts are.
    base, last = state["base"][0], state["final"][0]
    evals = state["evals"] + [dict(update=cfg.updates, **last)] * (cfg.updates > 0)
    best = max(evals, key=lambda e: e["accuracy"])
    roll, loss = (sum(x[name] for x in history) for name in ("rollout_seconds", "loss_seconds"))
    peak = max([peak_memory(cfg.device)] + [x["memory_bytes"] for x in history])
    summary = dict(
        task=cfg.task, model=cfg.model, seed=cfg.seed, base_accuracy=base["accuracy"],
        final_accuracy=last["accuracy"], best_accuracy=best["accuracy"],
        best_update=best["update"], eval_n=last["n"], test_data=source, updates=state["update"],
        skipped_updates=sum(not math.isfinite(x["grad_norm"]) for x in history),
        seconds=state["seconds"], rollout_seconds=roll, loss_seconds=loss,
        peak_memory_bytes=peak, base=state["base"], final=state["final"], evals=evals)
    weights = out / ("adapter" if cfg.lora_r else "model")
    if processes()[0] == 0:
        save_weights(policy, weights)
        draw_curve(out / "curve.png", history, evals, f"{cfg.task}, m = {cfg.m}, k = {cfg.k:g}")
        write(out / "summary.json", to_json(summary, indent=2))
    if history and not any(x["pairs"] for x in history):
        say("    warning: no rollout was learnt from, every group was dead: other problems?")
    say(f"best held-out {best['accuracy']:.1%} (update {best['update']}), last "
        f"{last['accuracy']:.1%}; {state['seconds']:.0f} s, of these rollouts {roll:.0f} and "
        f"learning {loss:.0f}; peak {peak / 2**20:.0f} MiB")
    say(f"written to {out}: metrics.jsonl config.json samples.jsonl summary.json curve.png "
        f"{weights.name}/")
    say(f"held-out accuracy {base['accuracy']:.1%} -> {last['accuracy']:.1%} (m = {last['m']}, "
        f"n = {last['n']})")


def in_one_sentence(program):
    """Run a program. Bad input, a full disk or Ctrl-C end it with a sentence. -> exit code"""
    goes_on = "the last checkpoint is whole, the same command goes on from it"
    try:
        return program()
    except TaskError as e:
        sentence = str(e)
    except FloatingPointError as e:
        sentence = f"{e}: its weights have diverged; start again with a lower --lr"
    except torch.OutOfMemoryError as e:
        sentence = (f"{first_line(e)}: lower --micro_batch and --rollout_batch, or add "
                    f"--recompute; {goes_on}")
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        print(f"agrpo: stopped at once; {goes_on}", file=sys.stderr)
        return 130
    except Exception as e:
        sentence = told_of(e, goes_on)
        if sentence is None:
            raise
    print(f"agrpo: {sentence}", file=sys.stderr)
    return 2


def told_of(error, goes_on):
    """A sentence about an error that is not of our making, or None."""
    # In a file that the user named: its traceback first.
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = models.USERS_FILES.get(str(Path(frame.filename).resolve()))
        if file:
            traceback.print_exception(error)
            return (f"{file} raised {type(error).__name__} in {frame.name}, line "
                    f"{frame.lineno}: its traceback stands above")
    if isinstance(error, ImportError):
        return f"{error}: pip install it"
    if isinstance(error, OSError):
        file, gone = error.filename or "the output", isinstance(error, FileNotFoundError)
        advice = "its folder was deleted, start again" if gone else f"make room; {goes_on}"
        return f"cannot write {file} ({error.strerror or error}): {advice}"
    lost = re.search("closed by peer|reset by peer|timed? ?out|gloo|nccl", str(error), re.I)
    if lost and dist.is_initialized():
        return f"another process of this run has died, its message says why; {goes_on}"


def main(argv=None):
    code = in_one_sentence(lambda: run(parse(argv)))
    if dist.is_initialized():
        if code == 0:
            dist.barrier()                                      # none leaves before the others
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
