"""--mode eval: killed anywhere it goes on, never generating twice; base beside trained; several seeds; every number again."""
import contextlib
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch

import agrpo
from lab import evaluation, make_tiny

FLAGS = ["--mode", "eval", "--device", "cpu", "--eval_n", "10", "--eval_batch", "3", "--steps", "12,3", "--C", "12", "--m", "3"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A random model that likes the answer tags, and an adapter that is not zero."""
    from peft import LoraConfig, get_peft_model

    where, tokenizer = tmp_path_factory.mktemp("shelf"), make_tiny.make_tokenizer()
    torch.manual_seed(0)
    model = make_tiny.make_model(tokenizer)
    model.save_pretrained(where / "model")
    tokenizer.save_pretrained(where / "model")
    names = [name for name, module in model.model.named_modules() if name.endswith("Wqkv")]
    get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False)).save_pretrained(where / "adapter")
    return SimpleNamespace(model=str(where / "model"), adapter=str(where / "adapter"))


def run(shelf, out, *flags):
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = agrpo.main([*FLAGS, "--model", shelf.model, "--out", str(out), *flags])
    return SimpleNamespace(code=code, out=said.getvalue(), err=errors.getvalue())


def read(out):
    results = json.loads((out / "eval.json").read_text())
    return results, [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(shelf, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "eval"
    assert run(shelf, out).code == 0
    return read(out)


def count_rows(monkeypatch, stop_after=None):
    """Count the rows that are generated; stop hard before the given number of batches was graded."""
    rollout, rows = agrpo.rollout, []

    def counted(policy, q, *args, **kwargs):
        if len(rows) == stop_after:
            raise KeyboardInterrupt
        rows.append(len(q))
        return rollout(policy, q, *args, **kwargs)
    monkeypatch.setattr(agrpo, "rollout", counted)
    return rows


@pytest.mark.parametrize("batches", [0, 1, 5, 9])
def test_a_killed_evaluation_goes_on_where_it_was_and_generates_nothing_twice(batches, shelf, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        rows = count_rows(patch, stop_after=batches)
        assert run(shelf, tmp_path / "eval").code == 130
    for part in (tmp_path / "eval" / "eval.partial").glob("part-*"):
        part.write_text(part.read_text() + '{"who": "base", "seed": 0, "ind')    # killed in the middle of a line
    with pytest.MonkeyPatch.context() as patch:
        more = count_rows(patch)
        assert run(shelf, tmp_path / "eval", "--resume").code == 0
    assert sum(rows) + sum(more) == 4 * 10
    results, generations = read(tmp_path / "eval")
    assert (results["results"], generations) == (whole[0]["results"], whole[1])
    assert not (tmp_path / "eval" / "eval.partial").exists()


def test_a_finished_evaluation_may_be_asked_for_more_steps_problems_and_seeds(shelf, whole, tmp_path, monkeypatch):
    assert run(shelf, tmp_path / "eval", "--eval_n", "6", "--steps", "12").code == 0
    rows = count_rows(monkeypatch)
    assert run(shelf, tmp_path / "eval", "--resume").code == 0
    assert sum(rows) == 40 - 3 * 6                   # 12 greedy, 12 and 3 sampled were there for 6 problems
    assert read(tmp_path / "eval")[0]["results"] == whole[0]["results"]


def test_other_flags_are_not_mixed_into_an_evaluation(shelf, tmp_path):
    assert run(shelf, tmp_path / "eval", "--eval_n", "2").code == 0
    result = run(shelf, tmp_path / "eval", "--resume", "--temperature", "0.5")
    assert result.code == 2 and "--temperature 1.0, not 0.5" in result.err
    result = run(shelf, tmp_path / "eval")
    assert result.code == 2 and "add --resume" in result.err


def test_several_seeds_are_averaged_over_the_same_problems(shelf, whole, tmp_path):
    assert run(shelf, tmp_path / "eval", "--seeds", "3").code == 0
    results, generations = read(tmp_path / "eval")
    for cell, first in zip(results["results"], whole[0]["results"]):
        same = [g for g in generations if (g["m"], g["greedy"]) == (cell["m"], cell["greedy"])]
        assert len(same) == (10 if cell["greedy"] else 30) and cell["n"] == 10       # the interval is over 10 problems
        assert cell["reward"] == pytest.approx(sum(g["reward"] for g in same) / len(same))
        seeds = [{g["index"]: g["text"] for g in same if g["seed"] == seed} for seed in range(1 if cell["greedy"] else 3)]
        assert seeds[0] == {g["index"]: g["text"] for g in whole[1] if (g["m"], g["greedy"]) == (cell["m"], cell["greedy"])}
        assert cell["greedy"] or seeds[0] != seeds[1] != seeds[2]


def test_the_table_s_numbers_by_hand():
    records = lambda *right: [dict(index=i, m=2, greedy=False, correct=bool(x), reward=float(x), who="base", seed=0, text="", reason="",
                                   parsed="", cells=0.5) for i, x in enumerate(right)]
    row = evaluation.summarise([records(1, 0, 0, 1), records(1, 0, 0, 0)], 2, False, True)
    assert row["accuracy"] == 0.375 and row["n"] == 4 and row["cells"] == 0.5
    assert row["sd over seeds"] == pytest.approx(0.25 / 2 ** 0.5)
    low, high = row["low"], row["high"]
    assert low < 0.375 < high and (low, high) == pytest.approx((0.0919, 0.7806), abs=1e-3)   # Wilson: 1.5 of 4


def test_the_base_model_beside_the_trained_one(shelf, whole, tmp_path):
    both = run(shelf, tmp_path / "both", "--adapter", shelf.adapter, "--beside_base")
    alone = run(shelf, tmp_path / "alone", "--adapter", shelf.adapter)
    assert both.code == alone.code == 0, both.err
    results, generations = read(tmp_path / "both")
    assert results["base"] == whole[0]["results"]
    assert results["results"] == read(tmp_path / "alone")[0]["results"]
    texts = {who: [g["text"] for g in generations if g["who"] == who] for who in ("base", "trained")}
    assert texts["base"] == [g["text"] for g in whole[1]] and texts["trained"] != texts["base"]
    assert re.search(r"base \[95 % interval\] +trained \[95 % interval\]", both.out)
    assert (tmp_path / "both" / "eval.png").stat().st_size > 5000
    assert max(map(len, both.out.splitlines())) <= 120
