"""`bash run.sh watch`: one held-out problem, denoised step by step in the terminal. The flags are those of agrpo.py:

    bash run.sh watch --task sudoku --m 4 --seed 1                                another problem and other draws
    bash run.sh watch --adapter runs/countdown/adapter                            a trained model
    bash run.sh watch --temperature 0 --unmasking low_confidence                  as evaluation decodes
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo
import tasks
from lab import cli, models
from lab.logbook import cut, printable, token_texts

NEW, PLAIN = ("\033[1;32m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("", "")


def states(traj, policy):
    """Yield (step, text of x_t with what the step before revealed highlighted, entropy of that step's draws)."""
    tokens, glue = token_texts(policy.tokenizer, traj.o[0])
    tokens = [printable(token) for token in tokens]
    step_of, n = traj.step_of[0].tolist(), int(traj.n[0])
    for t in range(n + 1):
        shown = [(NEW + token + PLAIN if step == t - 1 else token) if step < t or t == n else "_"
                 for token, step in zip(tokens, step_of)]
        yield t, glue.join(shown), traj.entropy[0, t - 1].sum().item() if t else None


def watch(cfg):
    data = agrpo.load_data(cfg, "test")
    example = data[cfg.seed % len(data)]
    policy = agrpo.Policy(*models.load_model(cfg), cfg.device)
    prompt = policy.encode(cfg.task, example)
    models.preflight(policy, prompt)
    models.load_adapter(policy, cfg)
    batch = policy.pad([prompt])
    traj = agrpo.rollout(policy, batch.q, batch.q_mask, C=cfg.C, m=cfg.m, block_length=cfg.block_length,
                         mask_id=policy.mask_id, eos_id=policy.eos_id, temperature=cfg.temperature, top_k=cfg.top_k,
                         top_p=cfg.top_p, unmasking=cfg.unmasking, rand=agrpo.row_random([(cfg.seed, "watch")]))
    text = policy.decode(traj.o)[0]
    grade = tasks.grade_batch(cfg.task, [text], [example])[0]

    print(f"{cfg.task}, problem {cfg.seed % len(data)} of {data.source} | {cfg.model} {cfg.adapter or '(base model)'}")
    print(f"m = {cfg.m} steps of {cfg.C // cfg.m} tokens, {cfg.unmasking} unmasking, temperature {cfg.temperature:g}\n")
    print(policy.tokenizer.decode(prompt, skip_special_tokens=True), "\n")
    for t, state, entropy in states(traj, policy):
        print(f"x_{t:<3} {'' if entropy is None else f'H {entropy:5.2f}':8} {state}")
    print("     H: entropy of what the step drew, summed over its tokens, in nats\n")
    print(f"answer   {cut(text, 110)}")
    print(f"checker  read {cut(repr(grade.parsed), 60)}: {grade.reason}")
    print(f"         {'right' if grade.correct else 'wrong'}, reward {grade.reward:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.in_one_sentence(lambda: watch(agrpo.configure(sys.argv[1:] + ["--mode", "eval"]))))
