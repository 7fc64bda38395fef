# %% [markdown]
# # AGRPO, one step at a time
# A masked diffusion language model writes an answer by filling in `[MASK]` tokens, a few at a
# time. Here such a model (0.9 million parameters, in `lab/tiny`) is trained by its policy
# gradient, in a minute and without a GPU. Read § 1 to § 6 of `agrpo.py` beside it.
# %%
import os
import sys
from itertools import permutations
from pathlib import Path
FILE = Path(globals().get("__file__", "lab/walkthrough.py")).resolve()  # a notebook has none
sys.path.insert(0, str(next(up for up in FILE.parents if (up / "agrpo.py").exists())))
os.environ.setdefault("MPLBACKEND", "Agg")                      # a notebook has set another
import matplotlib.pyplot as plt
import torch
import agrpo
import tasks
cfg = agrpo.Config(m=4)
test = tasks.load(cfg.task, "test", **cfg.options)
data = tasks.load(cfg.task, "train", held_out=test, **cfg.options)
policy, how, G = agrpo.load_policy(cfg), cfg.how, cfg.G
# %% [markdown]
# ## One problem, eight answers
# Countdown: reach the target with each number once. An answer has C = 12 tokens and is written
# in m = 4 denoising steps, 3 tokens a step. A checker reads the finished text: 1 point for its
# form, 3 for being right. One problem is answered G = 8 times, so that answers can be compared.
# %%
traj, texts, grades = agrpo.write_answers(policy, test[:1], range(G), cfg, how)
print(tasks.TASKS[cfg.task].prompt(test[0])[-1]["content"])
for text, grade in zip(texts, grades):
    print(f"{grade.reward:.1f}   {text}   {grade.reason}")
# %% [markdown]
# ## The rollout grid
# A rollout keeps the finished text `o` and `step_of`, the step that drew each token: they hold
# every state on the way. Line t shows what step t did to the first answer. In brackets is what
# it drew, the **action** a_t; the other words are what it saw, the **state** x_t.
# %%
words = policy.tokenizer.convert_ids_to_tokens(traj.o[0])
for t in range(how.m):
    cells = [f"[{word}]" if step == t else word if step < t else "_"
             for word, step in zip(words, traj.step_of[0])]
    print(f"t = {t} ", *(cell.center(len(word) + 2) for cell, word in zip(cells, words)))
# %% [markdown]
# ## One action: log pi, added up by hand
# A step settles where it writes, then draws each token there independently, given x_t. So log
# pi(a_t | x_t) is a plain sum over its tokens: exact, from one forward pass.
# %%
t, o, step_of = 1, traj.o[:1], traj.step_of[:1]
x_t = torch.where(step_of < t, o, policy.mask_id)                           # (1, C)
where, block = (step_of == t).nonzero()[None, :, 1], agrpo.enter_block(traj.q, how, t)
logits = agrpo.logits_at(policy, traj.q[:1], traj.q_mask[:1], x_t, where, block)[0]  # (W, V)
logp = logits.log_softmax(dim=1)[range(how.W), o[0, where[0]]]              # (W,)
logs = " + ".join(f"log {value.exp():.4f}" for value in logp)
print(f"log pi(a_{t} | x_{t}) = {logs} = {logp.sum():.4f}")
assert torch.allclose(logp.double(), traj.logp_old[0, where[0]], atol=1e-4)
# %% [markdown]
# ## rho = 1
# The loss masks a state again and scores its action: `step_logprobs`, for pairs (row, step).
# Its ratio to what the rollout kept, rho = pi / pi_old, is 1 as long as no weight has changed.
# %%
rows, steps = torch.cartesian_prod(torch.arange(G), torch.arange(how.m)).T  # all 32 pairs
before, logp_old = agrpo.step_logprobs(policy, traj, rows, steps)           # (32, W)
print(f"largest |rho - 1|: {((before - logp_old).exp() - 1).abs().max():.1e}")
assert torch.allclose(before, logp_old, atol=1e-4)
# %% [markdown]
# ## One update by hand
# Six functions, of which `rollout` has run. A says how much better an answer was than its
# group's mean. A step raises the sum of A log pi, if not every term: the answers share tokens.
# %%
params = [x for x in policy.model.parameters() if x.requires_grad]
optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99))
A = agrpo.group_advantages(torch.tensor([grade.reward for grade in grades]), G)     # (B,)
p = agrpo.timestep_probs(traj, A.abs())                         # (B, m) how much a pair matters
pairs = agrpo.sample_timesteps(p, G, 0.5)                       # 8 of the 32, with weights
agrpo.add_gradient(policy, traj, A, pairs)
agrpo.optimizer_step(params, optimizer, max_grad_norm=1.0)
after, _ = agrpo.step_logprobs(policy, traj, rows, steps)
change = (after - before).detach().view(G, -1).sum(dim=1)                   # (B,)
for text, a, c in zip(texts, A, change):
    print(f"A = {a:+.2f}   change of log pi {c:+.3f}   {text}")
assert (A * change).sum() > 0
# %% [markdown]
# ## k of m steps
# The whole gradient is a sum over all pairs (row, step), a forward and a backward pass each.
# AGRPO draws n of them by p, k a row on average, and weighs each by w = 1 / (n p). p is large
# where an answer differs from its group and the step was unsure of what it drew. The n points
# lie evenly in p's CDF and share one random offset. Red: drawn by one offset; larger: heavier.
# %%
traj, _, grades = agrpo.write_answers(policy, data[:4], range(4 * G), cfg, how)
A = agrpo.group_advantages(torch.tensor([grade.reward for grade in grades]), G)
p = agrpo.timestep_probs(traj, A.abs())                                     # (32, 4)
rows, steps, w = agrpo.sample_timesteps(p, 32, 0.5)
_, axes = plt.subplots(figsize=(9, 2.2), layout="constrained")
axes.imshow(p.T, cmap="Greys", aspect="auto")
axes.scatter(rows, steps, 9 * w, "red")
_ = axes.set(xlabel="answers, eight to a problem", ylabel="step t", title="p (darker: larger)")
# %% [markdown]
# The weights keep the mean exact: over all offsets w has mean 1 for every pair of an answer
# with A != 0. What is drawn changes only where a point meets an edge of the CDF, so that mean
# is a finite sum. And few draws already point nearly where the sum over all pairs points:
# %%
def mean_weights(p, n):
    edges = torch.cat([p.flatten().cumsum(0) * n % 1, torch.tensor([0.0, 1.0])]).sort().values
    mean = torch.zeros_like(p)                                              # (B, m)
    for left, right in zip(edges, edges[1:]):
        rows, steps, w = agrpo.sample_timesteps(p, n, (left + right) / 2)
        mean[rows, steps] += w * (right - left)
    return mean

def gradient(pairs):
    optimizer.zero_grad()
    agrpo.add_gradient(policy, traj, A, pairs)
    return torch.cat([x.grad.flatten() for x in params])

mean = mean_weights(p, 32)[p > 0]
print(f"E[w] of {len(mean)} pairs: from {mean.min():.9f} to {mean.max():.9f}")
assert torch.allclose(mean, torch.ones_like(mean), atol=1e-9)
exact = gradient((*p.nonzero().T, torch.ones_like(mean)))
for n in (8, 16, 32, 64):
    cosines = [torch.cosine_similarity(gradient(agrpo.sample_timesteps(p, n, offset)), exact, 0)
               for offset in (0.125, 0.375, 0.625, 0.875)]
    print(f"{n:2d} draws: cosine to the whole gradient {sum(cosines) / 4:.2f}")
# %% [markdown]
# ## The exact gradient of a three-token world
# Three places, three tokens and `[MASK]` = 0, one token a step in random order: 162 rollouts
# are all there are. So the expected reward is a sum, which autograd differentiates. The mean of
# AGRPO's estimate, over all rollouts and offsets, is that gradient to nine digits. (A policy is
# any function like `world`: in it each token seen adds its logits for every place.)
# %%
weights = torch.randn(3, 4, 3, 4, dtype=torch.float64, requires_grad=True)

def world(ids, mask=None, positions=torch.arange(3)[None], block=None):
    return weights[range(3), ids].sum(dim=1)[torch.arange(len(ids))[:, None], positions]

world.mask_id, world.eos_id = 0, 1
o = torch.cartesian_prod(*[torch.arange(1, 4)] * 3).repeat(6, 1)            # (162, 3)
step_of = torch.tensor(list(permutations(range(3)))).repeat_interleave(27, dim=0)
logp = torch.zeros(162, 3, dtype=torch.float64)
for t in range(3):
    every = world(o * (step_of < t))[:, :, 1:].log_softmax(dim=2)   # [MASK] is never drawn
    logp = torch.where(step_of == t, every.gather(2, o[:, :, None] - 1)[:, :, 0], logp)
chance = logp.sum(dim=1).exp() / 6                              # six orders, equally likely
r = (o[:, 0] * (o[:, 1] - 1.5 * o[:, 2])).double()              # any reward will do
truth, = torch.autograd.grad(chance @ r, weights)
A, none = (chance * r).detach(), torch.zeros(162, 0, dtype=torch.long)      # no prompt
traj = agrpo.Trajectory(none, none, o, step_of, logp.detach(), torch.zeros_like(logp), None,
                        agrpo.Decoding(C=3, m=3, block_length=3))
w = mean_weights(agrpo.timestep_probs(traj, A.abs()), n=20)
agrpo.add_gradient(world, traj, A, (*w.nonzero().T, w[w > 0]))
mean = -162 * 3 * weights.grad                                  # .grad is of -J, over B m
print(f"|mean - gradient| / |gradient| = {(mean - truth).norm() / truth.norm():.1e}")
assert abs(chance.sum() - 1) < 1e-12 and (mean - truth).norm() < 1e-9 * truth.norm()
# %% [markdown]
# ## Thirty updates
# `agrpo.train` is the loop around all this and yields what happened in each update. An answer
# now gets two steps, at which the model is poor. (What comes next: `lab/EXERCISES.md`.)
# %%
right = lambda grades: 100 * sum(grade.correct for grade in grades) / len(grades)
optimizer.zero_grad()
cfg = agrpo.Config(m=2, questions=40, updates=30, lr=2e-3)
trained, held_out = [], {0: right(agrpo.evaluate(policy, test, cfg, cfg.how, 400))}
for now in agrpo.train(policy, data, cfg, params, optimizer):
    trained.append(right(now.grades))
    if now.number % 10 == 0:
        held_out[now.number] = right(agrpo.evaluate(policy, test, cfg, cfg.how, 400))
_, axes = plt.subplots(figsize=(9, 3), layout="constrained")
axes.plot(range(1, 31), trained, ".", [*held_out], [*held_out.values()], "o-")
_ = axes.set(xlabel="update", ylabel="right, %", title="dots: training, line: held out")
print("held out, % right after updates:", held_out)
assert held_out[30] > held_out[0]
