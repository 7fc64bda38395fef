"""What the tests share: small models of random weights, runs in this process or in others."""
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]

# Triton reads this once, when it is first imported, and transformers, peft and torch._dynamo
# all import it. With a GPU the kernels run there: torch.compile needs a Triton that compiles.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests run side by side: a thread for each, and for the processes that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

import agrpo
import make_tiny
import models
import run


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device, skipped without one")


# --- models -----------------------------------------------------------------------------------

def modernbert(where, seed=0, layers=2, **config):
    """lab/tiny's architecture. Its head likes the answer tags: some rollouts earn the reward of
    the format, and groups differ."""
    torch.manual_seed(seed)
    tokenizer = make_tiny.make_tokenizer()
    model = make_tiny.make_model(tokenizer)
    model.model.layers = model.model.layers[:layers]
    tags = tokenizer.convert_tokens_to_ids(["<answer>", "</answer>"])
    model.decoder.bias.data[tags] = 3.0
    for name, value in dict(config, num_hidden_layers=layers).items():
        setattr(model.config, name, value)
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return str(where)


CLASSES = dict(llada=("LLaDAConfig", "LLaDAModelLM", "LLaDAModelLM"),       # config, model and
               dream=("DreamConfig", "DreamModel", "DreamBaseModel"),       # one without a head
               a2d=("A2DQwen3Config", "A2DQwen3LMHeadModel", "A2DQwen3Model"))
QWEN = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, intermediate_size=64)


def checkpoint(where, kind, change=lambda weights: None, **config):
    """A double's folder in the hub's layout, of random weights that `change` may edit."""
    import doubles
    from safetensors.torch import save_file

    config_class, model_class, headless = CLASSES[kind]
    tokenizer = make_tiny.make_tokenizer()
    config = dict(
        dict(architectures=[model_class], vocab_size=len(tokenizer),
             model_type=getattr(doubles, config_class).model_type,
             auto_map=dict(AutoConfig=f"modeling.{config_class}",
                           AutoModel=f"modeling.{headless}"),
             mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
             pad_token_id=tokenizer.pad_token_id),
        **(QWEN if kind == "a2d" else {}) | config)
    tokenizer.save_pretrained(where)
    shutil.copy(doubles.__file__, where / "modeling.py")
    (where / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = getattr(doubles, model_class)(getattr(doubles, config_class)(**config))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    change(weights)
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    return str(where)


def tied(where):
    lose = lambda weights: weights.pop("lm_head.weight")
    return checkpoint(where, "a2d", lose, tie_word_embeddings=True)


class Shelf(dict):
    """Folders of models, made when first asked for."""
    makers = dict(
        base=modernbert, tied=tied,
        other=lambda where: modernbert(where, seed=1),
        shallow=lambda where: modernbert(where, layers=1),
        deaf=lambda where: checkpoint(where, "llada", hears_mask=False),
        deaf4d=lambda where: checkpoint(where, "a2d", hears_mask=False))

    def __missing__(self, kind):
        make = self.makers.get(kind, lambda where: checkpoint(where, kind))
        self[kind] = make(self.where / kind)
        return self[kind]


shelf = Shelf()


@pytest.fixture(scope="session", autouse=True)
def somewhere_else(tmp_path_factory):
    """transformers copies a checkpoint's code into a cache: not into the user's."""
    from transformers import dynamic_module_utils

    shelf.where = tmp_path_factory.mktemp("shelf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(shelf.where))
        yield


PROBLEMS = [dict(nums=[1, 2, 3], target=6), dict(nums=[4, 5, 6], target=7)]


def each(*kinds):
    return pytest.mark.parametrize("kind", kinds)


def policy_of(model, *flags, trust=True, loud=True):
    """A Policy by load_policy. LoRA's second matrices are not zero: zero, they hide much."""
    argv = ["--model", model, "--device", "cpu", "--lora_r", "4", *flags]
    policy = models.load_policy(run.parse(argv + ["--trust_remote_code"] * trust), PROBLEMS)
    torch.manual_seed(1)
    for name, p in policy.model.named_parameters():
        if "lora_B" in name and loud:
            torch.nn.init.normal_(p, std=0.1)
    return policy


def prompts(policy, lengths=(9, 5)):
    """q, q_mask of numbers, left-padded."""
    P = max(lengths)
    q = torch.tensor([[policy.pad_id] * (P - n) + list(range(20, 20 + n)) for n in lengths])
    return q, torch.tensor([[0] * (P - n) + [1] * n for n in lengths])


TWO_BLOCKS = agrpo.Decoding(C=8, m=4, block_length=4)


def add_gradient(policy, how=TWO_BLOCKS, copies=1, **more):
    """Rollouts of two prompts and the gradient of all of their pairs. -> trajectory, Seen"""
    q, q_mask = (x.repeat(copies, 1) for x in prompts(policy))
    keys = [(0, i) for i in range(len(q))]
    traj = agrpo.rollout(policy, q, q_mask, how, agrpo.row_random(keys))
    A = torch.tensor([1.0, -0.5]).repeat(copies)
    rows, steps = (agrpo.timestep_probs(traj, A.abs(), "uniform") > 0).nonzero().unbind(1)
    pairs = rows, steps, torch.ones(len(rows))
    return traj, agrpo.add_gradient(policy, traj, A, pairs, micro_batch=4, **more)


def trained(policy):
    return {name: p for name, p in policy.model.named_parameters() if p.requires_grad}


# --- runs -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def one_thread():
    """Another order of sums has other last bits. And Ctrl-C is heard in a script, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, before)


def act_at(act, moment, patch):
    """Call act(half) at a moment ("fsync", 2): before the second call of that function.

    half() leaves what a death in the middle would: a file half written.
    """
    name, number = moment
    owner = dict(fsync=os, replace=os, rename=Path).get(name, agrpo)
    function, count = getattr(owner, name), []

    def half(fd=None, *more):
        if name == "fsync":
            os.ftruncate(fd, os.fstat(fd).st_size // 2)

    def call(*args, **kwargs):
        count.append(1)
        if len(count) == number:
            act(lambda: half(*args))
        return function(*args, **kwargs)
    patch.setattr(owner, name, call)


def main(argv, act=None, at=None):
    """run.main in this process -> code, out, err"""
    with pytest.MonkeyPatch.context() as patch:
        if act:
            act_at(act, at, patch)
        return captured(lambda: run.main([str(word) for word in argv]))


def captured(program):
    """program() in this process -> code, out, err"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program()
    # kernels.py names its path once a process, so in whichever test comes first.
    lines = err.getvalue().splitlines(keepends=True)
    err = "".join(line for line in lines if not line.startswith("kernels.py:"))
    return SimpleNamespace(code=code, out=out.getvalue(), err=err)


def child(job, args, log, env):
    """The first function of a new process: the console goes to files, its job to the end."""
    for fd, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.environ.update(env)
    for signum in (signal.SIGINT, signal.SIGHUP):                # heard under nohup, too
        signal.signal(signum, signal.default_int_handler)
    torch.set_num_threads(1)
    job(*args)


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """Calls job(*args) in a process for each of the tuples args -> code, out, err of each.

    They are forked from a server that has everything imported but never runs a backward pass.
    env: a dict for each. Who still lives after a minute is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run", "matplotlib.pyplot", "peft", "conftest",
                                    "transformers.models.modernbert.modeling_modernbert"])
    log = str(tmp_path_factory.mktemp("log") / "console")

    def call(job, *of_each, env=({}, {})):
        logs = [f"{log}{i}" for i in range(len(of_each))]
        members = [context.Process(target=child, args=(job, *more))
                   for more in zip(of_each, logs, env)]
        for process in members:
            process.start()
        for process in members:
            process.join(60)
        for process in members:
            process.kill()
            process.join()
        return [SimpleNamespace(code=process.exitcode, out=Path(log + ".out").read_text(),
                                err=Path(log + ".err").read_text())
                for process, log in zip(members, logs)]

    with pytest.MonkeyPatch.context() as patch:
        # For the server's imports. It sees no GPU: CUDA does not outlive a fork.
        for path in (str(ROOT), str(ROOT / "lab"), str(Path(__file__).parent)):
            patch.setenv("PYTHONPATH", path, prepend=os.pathsep)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield call


def read(path):
    """JSON as it is defined: no NaN, no Infinity."""
    def refuse(constant):
        raise AssertionError(f"{path}: {constant} is not JSON")
    if path.suffix == ".json":
        return json.loads(path.read_text(), parse_constant=refuse)
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def timeless(record):
    times = ("rollout_seconds", "loss_seconds", "seconds", "memory_bytes", "peak_memory_bytes")
    return {name: value for name, value in record.items() if name not in times}


def outcome(folder):
    """All that a run found out and learnt, the weights bit by bit, and what it left lying."""
    return dict(metrics=[timeless(x) for x in read(folder / "metrics.jsonl")],
                samples=read(folder / "samples.jsonl"),
                summary=timeless(read(folder / "summary.json")),
                adapter=(folder / "adapter" / "adapter_model.safetensors").read_bytes(),
                partial=[path.name for path in folder.rglob("*.partial")])
