"""Make `lab/tiny/`: a masked diffusion LM small enough for two CPU cores, in the Hugging Face layout.

    python lab/make_tiny.py                      # 80 minutes on one core; writes lab/tiny/
    python lab/make_tiny.py --steps 200 --out runs/tiny-test

What it is: ModernBERT, 4 layers of width 128 (0.9 M parameters), one token per number or word, pretrained with
LLaDA's masked-diffusion loss (arXiv 2502.09992, eq. 3) on right answers to two tasks, Countdown and 4x4 Sudoku.
It goes through the very code path of LLaDA-8B: `AutoModelForMaskedLM` and `AutoTokenizer` from a local folder,
a chat template, the prompts and the checkers of tasks.py.

Why this makes a good first experiment: most Countdown problems have many right answers. Revealed one token a
step, each token is chosen in the light of the ones before, and most answers are right. Revealed several tokens a
step, the tokens are drawn independently and mix different right answers into a wrong one. Pretraining cannot mend
that (its loss never sees two tokens chosen together); a policy gradient at few steps can, by making the
model commit to one answer. That is the paper's "faster inference" in small.

Held-out problems stay held out: problems come from the train split of tasks.py, whose split is a hash of
the problem itself (numbers and target, or solution grid) and so the same for every seed.
"""
import argparse
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
COUNTDOWN = dict(numbers=3, max_number=12, max_target=100)
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


def make_model(tokenizer):
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    return ModernBertForMaskedLM(ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=256,
        global_attn_every_n_layers=1,                # every layer sees the whole text, not a window of it
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.sep_token_id,
        cls_token_id=tokenizer.sep_token_id, sep_token_id=tokenizer.sep_token_id, reference_compile=False))


@lru_cache(maxsize=None)
def tidy_answers(nums, target):
    """All right answers, tidiest first: few parentheses, then few divisions and subtractions, then large numbers first."""
    def untidiness(text):
        return text.count("("), text.count("/"), text.count("-"), [-int(n) for n in text.split() if n.isdigit()], text
    return sorted(tasks.countdown_solutions(list(nums), target), key=untidiness)


def answer(task, example, rng, tidiest):
    """One right answer, drawn evenly from the `tidiest` tidiest, or from all of them (None)."""
    if task == "sudoku":
        return "<answer> " + " ".join(example["solution"]) + " </answer>"
    expression = rng.choice(tidy_answers(tuple(sorted(example["nums"])), example["target"])[:tidiest])
    return f"<answer> {expression} = {example['target']} </answer>"


def batches(task, tokenizer, batch, seed, options, tidiest):
    """Yield (prompt and answer ids (batch, P + C), P) for ever."""
    data, rng, C = tasks.load(task, "train", seed=seed, size=10**9, **options), random.Random(seed), COMPLETION[task]
    i = 0
    while True:
        q, o = [], []
        for example in (data[j] for j in range(i, i + batch)):
            text = tokenizer.apply_chat_template(tasks.TASKS[task].prompt(example), tokenize=False,
                                                 add_generation_prompt=True)
            q.append(text)
            o.append(answer(task, example, rng, tidiest))
        i += batch
        q = tokenizer(q, add_special_tokens=False)["input_ids"]      # all prompts of one task are equally long
        o = [(ids + [tokenizer.eos_token_id] * C)[:C] for ids in tokenizer(o, add_special_tokens=False)["input_ids"]]
        yield torch.tensor([a + b for a, b in zip(q, o)]), len(q[0])


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


def train(model, tokenizer, steps, sudoku_share, lr, tidiest, seed, batch=128, out=None):
    """One cycle of AdamW over both tasks' streams."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    streams = {"countdown": batches("countdown", tokenizer, batch, seed, COUNTDOWN, tidiest),
               "sudoku": batches("sudoku", tokenizer, batch, seed, SUDOKU, tidiest)}
    rng, losses, start = random.Random(seed), {"countdown": [], "sudoku": []}, time.time()
    for step in range(1, steps + 1):
        task = "sudoku" if rng.random() < sudoku_share else "countdown"
        ids, P = next(streams[task])
        loss = diffusion_loss(model, ids, P, tokenizer.mask_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses[task].append(loss.item())
        if step % 250 == 0 or step == steps:
            mean = {name: sum(v[-100:]) / max(len(v[-100:]), 1) for name, v in losses.items()}
            print(f"step {step:6d}  loss " + "  ".join(f"{n} {v:.4f}" for n, v in mean.items())
                  + f"  {time.time() - start:.0f} s", flush=True)
        if step % 2000 == 0 or step == steps:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)


# (steps, share of Sudoku, peak learning rate, answers): first every right answer, then mostly Countdown and only its two
# tidiest answers. A model this small tells apart all of them (7 a problem on average) only half of the time.
PHASES = [(16_000, 0.25, 2e-3, None), (5_000, 0.10, 1e-3, 2)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--steps", type=int, help="for a quick look: this many steps of the first phase only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from-phase", type=int, default=0, help="go on from --out with this phase (0 or 1)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).train()
    if args.from_phase:
        model = type(model).from_pretrained(args.out).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}", flush=True)
    for phase, (steps, share, lr, tidiest) in enumerate(PHASES):
        if phase >= args.from_phase and not (args.steps and phase):
            if phase:                                # seeded anew: a phase can be repeated from the weights before it
                torch.manual_seed(args.seed + phase)
            train(model, tokenizer, args.steps or steps, share, lr, tidiest, args.seed + phase, out=args.out)


if __name__ == "__main__":
    main()
