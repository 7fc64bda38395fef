"""Make lab/tiny/: a masked diffusion LM small enough for two CPU cores, in the hub's layout.

    bash run.sh tiny                  45 minutes on one core; writes lab/tiny/
    bash run.sh tiny --steps 200      a quick look, in runs/tiny/

What it is: ModernBERT, 4 layers of width 128 (0.9 M parameters), one token per number or word,
pretrained with LLaDA's masked-diffusion loss (arXiv 2502.09992, eq. 3) on right answers to two
tasks, Countdown and 4x4 Sudoku. It goes through the very code path of LLaDA-8B.

Why this makes a good first experiment: a problem has several right answers, 2 + 3 or 3 + 2 at
the least. Revealed one token a step, each token is chosen in the light of the ones before.
Revealed several a step, they are drawn alone and mix different answers into a wrong one.
Pretraining cannot mend that (its loss never sees two tokens chosen together); a policy gradient
at few steps can, by making the model commit to one answer. That is the paper's "faster
inference" in small.

Held-out problems stay held out: problems come from the train split of tasks.py, whose split is
a hash of the problem itself (numbers and target, or solution grid), the same for every seed.
"""
import argparse
import itertools
import random
import sys
import time
from functools import lru_cache
from operator import add, mul, sub
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tasks

# The sizes every default of `run.sh countdown` and `run.sh sudoku` on the tiny model assumes.
COUNTDOWN = dict(numbers=3, max_number=16, max_target=100, division=False)
SUDOKU = dict(empties=10)
COMPLETION = {"countdown": 12, "sudoku": 20}         # C: an answer of 11 or 18, then [EOS]
MANY = 100_000      # Countdown problems, among them the different ones


def make_tokenizer():
    """One token per number 0..100, operator, tag or prompt word, with spaces between."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[MASK]", "[EOS]", "[UNK]", "[SEP]"]
    words = [str(n) for n in range(101)] + list("+-*/()=")
    words += ["<answer>", "</answer>", "Numbers:", "Target:", "Sudoku:"]
    ids = {word: i for i, word in enumerate(special + words)}
    tok = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="[PAD]", mask_token="[MASK]", eos_token="[EOS]",
        unk_token="[UNK]", sep_token="[SEP]", padding_side="left")
    # A model this small reads no instructions: the template drops the system turn.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %} [SEP]{% endif %}")
    return tokenizer


# In pretraining only: without it the model learns the problems by heart. Saved as 0.
DROPOUT = ("embedding_dropout", "mlp_dropout", "attention_dropout")


def make_model(tokenizer, dropout=0.0):
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    return ModernBertForMaskedLM(ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=256,
        global_attn_every_n_layers=1,                # every layer sees the whole text
        global_rope_theta=100.0,                     # the default, 160000, is for longer texts
        initializer_range=0.08,                      # about 1 / sqrt(width); 0.02 learns late
        **dict.fromkeys(DROPOUT, dropout),
        mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.sep_token_id,
        cls_token_id=tokenizer.sep_token_id, sep_token_id=tokenizer.sep_token_id,
        reference_compile=False))


@lru_cache(maxsize=None)
def answers(nums, target):
    """Right answers of one form, so that every token has its place: ( a op b ) op c without a
    division and without a negative value between; c - ( a op b ) where only that will do."""
    apply, usual, other = {"+": add, "-": sub, "*": mul}, set(), set()
    for (a, b, c), op in itertools.product(itertools.permutations(nums), apply):
        value = apply[op](a, b)
        if value < 0:
            continue
        right = [then for then in apply if apply[then](value, c) == target]
        usual.update(f"( {a} {op} {b} ) {then} {c}" for then in right)
        if c - value == target:
            other.add(f"{c} - ( {a} {op} {b} )")
    return sorted(usual or other)


def answer(task, example, rng):
    """One right answer, drawn evenly."""
    if task == "sudoku":
        return "<answer> " + " ".join(example["solution"]) + " </answer>"
    found = answers(tuple(sorted(example["nums"])), example["target"])
    return f"<answer> {rng.choice(found)} = {example['target']} </answer>"


def examples_of(task, seed, options, rng):
    """Yield training problems for ever. Of Countdown's the different ones come equally often:
    the generator draws those of many answers more often, and the rare ones are the hard ones.
    """
    data = tasks.load(task, "train", seed=seed, size=10**9, **options)
    if task != "countdown":
        yield from (data[i] for i in itertools.count())
    many = (data[i] for i in range(MANY))
    different = list({(*sorted(e["nums"]), e["target"]): e for e in many}.values())
    while True:
        example = rng.choice(different)
        yield dict(example, nums=rng.sample(example["nums"], len(example["nums"])))


def batches(task, tokenizer, batch, seed, options):
    """Yield (prompt and answer ids (batch, P + C), P) for ever."""
    rng, C = random.Random(seed), COMPLETION[task]
    examples = examples_of(task, seed, options, rng)

    @lru_cache(maxsize=1 << 18)                      # anew it would be a tenth of the time
    def encode(text, prompt=False):
        if prompt:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                 tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    while True:
        rows = []
        for example in itertools.islice(examples, batch):
            q = encode(tasks.TASKS[task].prompt(example)[-1]["content"], prompt=True)
            o = encode(answer(task, example, rng))
            rows.append(q + (o + [tokenizer.eos_token_id] * C)[:C])
        yield torch.tensor(rows), len(q)             # all prompts of a task are equally long


def diffusion_loss(model, ids, P, mask_id):
    """LLaDA eq. 3: mask each answer token with probability t ~ U(0, 1); cross entropy at masked
    ones, weight 1 / t.

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


def train(model, tokenizer, steps, sudoku_share, lr, seed, batch=128):
    """One cycle of AdamW over both tasks' streams."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = one_cycle(optimizer, lr, total_steps=steps, pct_start=0.1)
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
            recent = {name: v[-100:] for name, v in losses.items() if v}
            means = "  ".join(f"{name} {sum(v) / len(v):.4f}" for name, v in recent.items())
            print(f"step {step:6d}  loss {means}  {time.time() - start:.0f} s", flush=True)


# Countdown first, which takes long; then both, for Sudoku is learned in a thousand steps.
PHASES = [dict(steps=9_000, sudoku_share=0.0, lr=2e-3),
          dict(steps=3_000, sudoku_share=0.3, lr=1.5e-3)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder [lab/tiny, or with --steps runs/tiny]")
    parser.add_argument("--steps", type=int, help="a quick look: steps of the first phase")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps} cannot work: it starts at 1")
    out = args.out or (Path("runs/tiny") if args.steps else Path(__file__).parent / "tiny")
    phases = [dict(PHASES[0], steps=args.steps)] if args.steps else PHASES

    tokenizer, weights = make_tokenizer(), None
    for seed, phase in enumerate(phases, args.seed):
        torch.manual_seed(seed)
        model = make_model(tokenizer, dropout=0.05)
        if weights:                                  # of the phase before
            model.load_state_dict(weights)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, vocabulary {len(tokenizer)}", flush=True)
        train(model.train(), tokenizer, **phase, seed=seed)
        weights = model.state_dict()
    # Without the dropout: a policy must give the same probabilities twice.
    model.config.update(dict.fromkeys(DROPOUT, 0.0))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
