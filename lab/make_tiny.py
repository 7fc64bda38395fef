"""Make `lab/tiny/`: a masked diffusion LM small enough for two CPU cores, in the Hugging Face layout.

    OMP_NUM_THREADS=1 python lab/make_tiny.py    # 45 minutes on one core; writes lab/tiny/
    python lab/make_tiny.py --steps 200 --out runs/tiny-test

What it is: ModernBERT, 4 layers of width 128 (0.9 M parameters), one token per number or word, pretrained with
LLaDA's masked-diffusion loss (arXiv 2502.09992, eq. 3) on right answers to two tasks, Countdown and 4x4 Sudoku.
It goes through the very code path of LLaDA-8B: `AutoModelForMaskedLM` and `AutoTokenizer` from a local folder,
a chat template, the prompts and the checkers of tasks.py.

Why this makes a good first experiment: a problem has several right answers, 2 + 3 or 3 + 2 at the least, and a model this
small is unsure of some. Revealed one token a step, each token is chosen in the light of the ones before. Revealed several
tokens a step, they are drawn independently and mix different answers into a wrong one. Pretraining cannot mend that (its
loss never sees two tokens chosen together); a policy gradient at few steps can, by making the model commit to one
answer. That is the paper's "faster inference" in small.

Held-out problems stay held out: problems come from the train split of tasks.py, whose split is a hash of
the problem itself (numbers and target, or solution grid) and so the same for every seed.
"""
import argparse
import itertools
import random
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tasks

# The sizes every default of `run.sh countdown` and `run.sh sudoku` on the tiny model assumes.
COUNTDOWN = dict(numbers=3, max_number=16, max_target=100, division=False)
SUDOKU = dict(empties=10)
COMPLETION = {"countdown": 12, "sudoku": 20}         # C: the longest answer is 11 tokens, or 18, then [EOS]


def make_tokenizer():
    """One token per number 0..100, operator, tag or prompt word; text is split at white space and joined by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[MASK]", "[EOS]", "[UNK]", "[SEP]"]
    words = [str(n) for n in range(101)] + list("+-*/()=")
    words += ["<answer>", "</answer>", "Numbers:", "Target:", "Sudoku:"]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="[PAD]", mask_token="[MASK]",
                                        eos_token="[EOS]", unk_token="[UNK]", sep_token="[SEP]", padding_side="left")
    # A model of 0.9 M parameters reads no instructions: the template drops the system turn and keeps the problem.
    tokenizer.chat_template = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
                               "{% endfor %}{% if add_generation_prompt %} [SEP]{% endif %}")
    return tokenizer


DROPOUT = ("embedding_dropout", "mlp_dropout", "attention_dropout")     # in pretraining only; saved as 0


def make_model(tokenizer, dropout=0.0):
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    return ModernBertForMaskedLM(ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=256,
        global_attn_every_n_layers=1,                # every layer sees the whole text, not a window of it
        global_rope_theta=100.0,                     # texts of 20 to 40 tokens: the default, 160000, hardly tells them apart
        initializer_range=0.08,                      # about 1 / sqrt(width); with 0.02 half of the cycle goes into growing
        **dict.fromkeys(DROPOUT, dropout),           # without it, the model learns the training problems by heart
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.sep_token_id,
        cls_token_id=tokenizer.sep_token_id, sep_token_id=tokenizer.sep_token_id, reference_compile=False))


@lru_cache(maxsize=None)
def answers(nums, target):
    """Right answers of one form, so that every token has its place: ( a op b ) op c without a division and without a
    negative value between; c - ( a op b ) where only that will do."""
    usual, else_ = set(), set()
    for a, b, c in itertools.permutations(nums):
        for op, value in (("+", a + b), ("-", a - b), ("*", a * b)):
            usual |= {f"( {a} {op} {b} ) {op2} {c}" for op2, result in (("+", value + c), ("-", value - c), ("*", value * c))
                      if result == target and value >= 0}
            if c - value == target and value >= 0:
                else_.add(f"{c} - ( {a} {op} {b} )")
    return sorted(usual or else_)


def answer(task, example, rng):
    """One right answer, drawn evenly."""
    if task == "sudoku":
        return "<answer> " + " ".join(example["solution"]) + " </answer>"
    return f"<answer> {rng.choice(answers(tuple(sorted(example['nums'])), example['target']))} = {example['target']} </answer>"


def batches(task, tokenizer, batch, seed, options):
    """Yield (prompt and answer ids (batch, P + C), P) for ever.

    Countdown's different problems come equally often, where the generator draws those of many answers more often: the
    rare ones are the hard ones.
    """
    data, rng, C = tasks.load(task, "train", seed=seed, size=10**9, **options), random.Random(seed), COMPLETION[task]
    examples = (data[i] for i in itertools.count())
    if task == "countdown":
        different = list({(*sorted(e["nums"]), e["target"]): e for e in itertools.islice(examples, 100_000)}.values())
        examples = (dict(e, nums=rng.sample(e["nums"], len(e["nums"]))) for e in iter(lambda: rng.choice(different), None))

    @lru_cache(maxsize=1 << 18)                      # rendering every prompt anew would be a tenth of the time
    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    @lru_cache(maxsize=1 << 18)
    def prompt(text):
        return encode(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                    add_generation_prompt=True))
    while True:
        rows = []
        for example in itertools.islice(examples, batch):
            q = prompt(tasks.TASKS[task].prompt(example)[-1]["content"])         # all prompts of a task are equally long
            o = encode(answer(task, example, rng))
            rows.append(q + (o + [tokenizer.eos_token_id] * C)[:C])
        yield torch.tensor(rows), len(q)


def diffusion_loss(model, ids, P, mask_id):
    """LLaDA eq. 3: mask each answer token with probability t ~ U(0, 1); cross entropy at masked ones, weight 1 / t.

    t is stratified over the batch (arXiv 2406.07524, appendix): same mean, less variance.
    """
    B, C = ids.shape[0], ids.shape[1] - P
    t = ((torch.arange(B) + torch.rand(B)) / B).clamp(min=0.5 / C)[:, None]          # (B, 1)
    masked = torch.rand(B, C) < t                                                    # (B, C)
    noisy = ids.clone()
    noisy[:, P:][masked] = mask_id
    logits = model(input_ids=noisy, attention_mask=torch.ones_like(noisy)).logits[:, P:]
    ce = F.cross_entropy(logits[masked], ids[:, P:][masked], reduction="none")       # (masked,)
    return (ce / t.expand(B, C)[masked]).sum() / (B * C)


def train(model, tokenizer, steps, sudoku_share, lr, seed, batch=128, out=None):
    """One cycle of AdamW over both tasks' streams."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    streams = {"countdown": batches("countdown", tokenizer, batch, seed, COUNTDOWN),
               "sudoku": batches("sudoku", tokenizer, batch, seed, SUDOKU)}
    rng, losses, start = random.Random(seed), {"countdown": [], "sudoku": []}, time.time()
    for step in range(1, steps + 1):
        task = "sudoku" if rng.random() < sudoku_share else "countdown"
        ids, P = next(streams[task])
        with torch.autocast("cpu", torch.bfloat16):  # a third faster on a CPU that has bfloat16
            loss = diffusion_loss(model, ids, P, tokenizer.mask_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses[task].append(loss.item())
        if step % 250 == 0 or step == steps:
            mean = {name: sum(v[-100:]) / len(v[-100:]) for name, v in losses.items() if v}
            print(f"step {step:6d}  loss " + "  ".join(f"{n} {v:.4f}" for n, v in mean.items())
                  + f"  {time.time() - start:.0f} s", flush=True)
        if step % 1000 == 0 or step == steps:
            save(model, tokenizer, out)


def save(model, tokenizer, out):
    """Without the dropout, which was for pretraining: a policy must give the same probabilities twice."""
    on = {name: getattr(model.config, name) for name in DROPOUT}
    model.config.update(dict.fromkeys(DROPOUT, 0.0))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.config.update(on)


# Countdown first, which takes long; then both, for Sudoku is learned in a thousand steps.
PHASES = [dict(steps=9_000, sudoku_share=0.0, lr=2e-3, dropout=0.05),
          dict(steps=3_000, sudoku_share=0.3, lr=1.5e-3, dropout=0.05)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--steps", type=int, help="for a quick look: this many steps of the first phase only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from-phase", type=int, default=0, help="go on from --out with this phase (0 or 1)")
    args = parser.parse_args()

    tokenizer = make_tokenizer()
    for phase in range(args.from_phase, 1 if args.steps else len(PHASES)):
        how = dict(PHASES[phase])
        torch.manual_seed(args.seed + phase)         # anew, so that a phase can be repeated from the weights before it
        model, dropout = make_model(tokenizer, how["dropout"]), how.pop("dropout")
        if phase:
            model = type(model).from_pretrained(args.out, **dict.fromkeys(DROPOUT, dropout))
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}", flush=True)
        how["steps"] = args.steps or how["steps"]
        train(model.train(), tokenizer, **how, seed=args.seed + phase, out=args.out)


if __name__ == "__main__":
    main()
