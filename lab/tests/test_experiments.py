"""Every experiment runs from its flags to its files, and its estimators are what their formulas say. Random tiny model."""
import json
import types

import pytest
import torch

import agrpo
import tasks
from lab import estimators, experiments, harness, make_tiny
from lab.cli import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path, tokenizer = tmp_path_factory.mktemp("model"), make_tiny.make_tokenizer()
    make_tiny.make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def alive(monkeypatch):
    """A random model never answers, and equal rewards have no gradient: pay for even tokens here."""
    def grade(task, texts, examples):
        scores = [sum(word.isdigit() and int(word) % 2 == 0 for word in text.split()) for text in texts]
        return [tasks.Grade(float(s), s > 2, 0.0, "", "") for s in scores]
    monkeypatch.setattr(tasks, "grade_batch", grade)


@pytest.fixture(scope="module")
def scene(folder):
    """Policy with all parameters trained, one batch of rollouts, advantages."""
    cfg = agrpo.configure(["--model", folder, "--device", "cpu", "--m", "4", "--k", "2", "--questions", "2", "--G", "3",
                           "--lora_r", "0"])
    policy, data = experiments.load(cfg)
    (keys, traj), = agrpo.collect_rollouts(policy, data["train"], cfg, 0)[0]
    adv = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, -1.5]).double()
    return types.SimpleNamespace(cfg=cfg, policy=policy, traj=traj, adv=adv, keys=keys)


def gradient(scene, estimate):
    scene.policy.model.zero_grad()
    estimate()
    g = torch.cat([p.grad.flatten() for p in scene.policy.model.parameters()])
    scene.policy.model.zero_grad()
    return g


@pytest.mark.parametrize("name", harness.EXPERIMENTS)
def test_an_experiment_prints_its_table_and_writes_its_files(name, folder, alive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)                               # --figures must not touch the real ones
    flags = [name, "--quick", "--model", folder, "--out", str(tmp_path), "--jobs", "1", "--seeds", "1", "--eval_n", "1",
             "--questions", "2", "--G", "3", "--updates", "1", "--figures"]
    assert experiments.main(flags) == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 120 + len(str(tmp_path))                    # the command line holds the folder
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"command", "seeds", "hardware", "config", "results", "table"} <= set(saved) and saved["seeds"] == [0]
    kept = (tmp_path / "lab" / "figures" / f"{name}.txt").read_text()
    assert kept.startswith(f"$ bash run.sh lab {name} --quick") and kept.endswith("\n".join([*saved["table"], ""]))
    assert (tmp_path / f"{name}.png").stat().st_size > 5000 and (tmp_path / "lab" / "figures" / f"{name}.png").is_file()


def test_the_sum_over_pairs_of_every_estimate_is_unbiased(scene):
    """Weights are 1 on average for every sampler, the Gram matrix is that of the gradients' sum."""
    m, adv, traj = scene.cfg.m, scene.adv, scene.traj
    pairs, gram = estimators.pair_gradients(scene.policy, scene.cfg, traj, adv)
    assert len(pairs) == 5 * m                                                   # the row with A = 0 is left out
    g = gradient(scene, lambda: agrpo.accumulate_gradient(
        scene.policy, traj, adv, k=0, rows_total=1, mask_id=scene.policy.mask_id, eos_id=scene.policy.eos_id))
    assert gram.sum().item() == pytest.approx((g * m).double().square().sum().item(), rel=1e-4)
    norms = torch.zeros(len(adv) * m).double().index_copy(0, pairs, gram.diagonal().sqrt()).view(-1, m)
    weights = estimators.timestep_weights(scene.policy, scene.cfg, traj, norms)
    torch.manual_seed(0)
    for weight, points in estimators.SAMPLERS:
        p = agrpo.timestep_probs(traj.n, m, weights[weight])
        c = estimators.draw_weights(p, adv, 3, 2, points, 3000)
        assert (c.view(3000, -1, m)[:, 2] == 0).all()
        assert (c[:, pairs].mean(0) - 1).abs().max() < 6 * c.std(0).max() / 3000 ** 0.5, (weight, points)


def test_surprise_brackets_the_norm_of_the_score(scene):
    """1 - p_a <= |e_a - p| <= sqrt(2) (1 - p_a) for every distribution p and token a."""
    p = (3 * torch.randn(500, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).softmax(-1)
    norm, surprise = (torch.eye(7).double()[0] - p).norm(dim=-1), 1 - p[:, 0]
    assert (surprise <= norm + 1e-12).all() and (norm <= 2 ** 0.5 * surprise + 1e-12).all()
    s = agrpo.step_importance(scene.traj, "surprise")[..., 0]
    by_hand = [[sum((1 - x.exp().item()) ** 2 for x in step) ** 0.5 for step in row] for row in scene.traj.logp_old]
    assert torch.allclose(s, torch.tensor(by_hand).double(), atol=1e-6)


def test_one_step_is_the_all_masked_likelihood_up_to_the_first_eos(scene):
    """By hand, row by row, with no prompt token masked."""
    cfg, policy, traj = scene.cfg, scene.policy, scene.traj
    B, C = traj.o.shape
    traj = traj._replace(o=traj.o.clone())
    traj.o[0, 4:6] = policy.eos_id                                               # an EOS early in one row
    got = gradient(scene, lambda: estimators.one_step(policy, cfg, traj, scene.adv, B, agrpo.uniforms, p_mask=0.0))

    def by_hand():
        for b in range(B):
            ids = torch.cat([traj.q[b], torch.full((C,), policy.mask_id)])
            logits = policy.model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[-C:].clone()
            logits[:, policy.mask_id] = -torch.inf
            logp = logits.log_softmax(-1).gather(1, traj.o[b, :, None])[:, 0]
            end = (traj.o[b].tolist() + [policy.eos_id]).index(policy.eos_id) + 1
            (-scene.adv[b] * logp[:end].sum() / (cfg.m * B)).backward()
    want = gradient(scene, by_hand)
    assert torch.allclose(got, want, atol=1e-3 * want.abs().max().item())


def test_elbo_masks_l_tokens_and_weighs_them_by_C_over_l(scene, monkeypatch):
    """In every state the weight times the number of scored tokens is C / (k m rows): unbiased for the bound."""
    calls = []
    monkeypatch.setattr(estimators, "score", lambda *a: calls.append(a) or [])
    estimators.elbo(scene.policy, scene.cfg, scene.traj, scene.adv, 6, agrpo.row_random(scene.keys))
    _, cfg, traj, _, rows, q, x_t, pos, w = calls[0]
    scored, C = (pos >= 0).sum(1), traj.o.shape[1]
    assert rows.tolist() == [0, 0, 1, 1, 3, 3, 4, 4, 5, 5] and (scored >= 1).all()
    assert ((x_t == scene.policy.mask_id) == (pos >= 0)).all() and (x_t[pos < 0] == traj.o[rows][pos < 0]).all()
    assert torch.allclose(w * scored, torch.tensor(C / (cfg.k * cfg.m * 6)).double())


def test_training_stops_when_both_updates_and_passes_are_spent(folder, alive):
    cfg = agrpo.configure(["--model", folder, "--device", "cpu", "--questions", "2", "--G", "3", "--updates", "2",
                           "--eval_n", "3"])
    policy, data = experiments.load(cfg)
    history, evals = experiments.train(policy, data, cfg, passes=150, every=2)
    assert history[-1]["passes"] >= 150 > history[-2]["passes"] and len(history) > cfg.updates
    rollout, loss = 2 * 3 * cfg.m, history[0]["pairs"]
    assert history[0]["passes"] == rollout + 3 * loss
    assert [e["update"] for e in evals] == sorted({*range(0, len(history), 2), len(history)})


def test_an_inner_part_is_taken_out_of_the_outer_one(monkeypatch):
    """Seconds by a clock of ours; memory, the allocator's, is that of the part running when it was at its peak."""
    clock, kept = [0.0], []

    def inner():
        clock[0] += 5
        kept.append(torch.zeros(2**20))                                          # 4 MiB

    def outer():
        clock[0] += 1
        kept.append(torch.zeros(2**18))                                          # 1 MiB
        owner.inner()
        clock[0] += 2
        kept.clear()
    owner = types.SimpleNamespace(inner=inner, outer=outer)
    monkeypatch.setattr(experiments, "PARTS", {"outer": (owner, "outer"), "inner": (owner, "inner")})
    monkeypatch.setattr(experiments.time, "time", lambda: clock[0])
    with experiments.parts_timed() as seconds:
        peaks = experiments.tensor_peaks(owner.outer, "cpu")
    assert seconds == {"outer": 3, "inner": 5} and (owner.inner, owner.outer) == (inner, outer)
    assert peaks == {"outer": pytest.approx(1, abs=0.01), "inner": pytest.approx(5, abs=0.01)}


def test_curves_pools_seeds_of_finished_runs(tmp_path, capsys):
    for seed in range(2):
        (tmp_path / f"run{seed}").mkdir()
        evals = [dict(update=u, accuracy=0.1 * (u + seed), m=3) for u in (0, 1, 3)]
        (tmp_path / f"run{seed}" / "summary.json").write_text(json.dumps(dict(task="countdown", eval_n=10, evals=evals)))
    assert experiments.main(["curves", str(tmp_path / "run0"), str(tmp_path / "run1"), "--out", str(tmp_path)]) == 0
    assert "5.0% [0.0%, 10.0%] -> 35.0% [30.0%, 40.0%], 2 seeds" in capsys.readouterr().out
    assert (tmp_path / "curves.png").is_file()
    with pytest.raises(UserError, match="no summary.json"):
        experiments.main(["curves", str(tmp_path)])


def test_the_menu_and_help_name_every_experiment(capsys):
    assert experiments.main([]) == 0 and experiments.main(["nonsense"]) == 2
    menu = capsys.readouterr().out
    assert all(f"run.sh lab {name}" in menu for name in [*harness.EXPERIMENTS, "curves"])
    with pytest.raises(SystemExit):
        experiments.main(["compare", "--help"])
    assert "2 idle CPU cores" in capsys.readouterr().out
    with pytest.raises(UserError):
        experiments.main(["compare", "--nonsense", "1"])
