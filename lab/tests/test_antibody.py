"""lab/antibody_task.py: what it pays for, what is held out, and the model it prepares."""
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import antibody_task  # noqa: E402
import models  # noqa: E402
import run  # noqa: E402
import tasks  # noqa: E402

END = antibody_task.END


def graded(loop, end=END):
    return tasks.grade("antibody", " ".join(loop + end), {})


@pytest.mark.parametrize("loop, failed", [
    ("DRGGYSSYFDY", ""),
    ("RVRVYGGGFSY", "charge +2"),           # bounded above
    ("DDGYYYYYFEY", "isomerisation, charge -3"),                        # and below
    ("RSNYTYGYFDY", "N-glycosylation"),
    ("RSNPTYGYFDY", ""),                    # a proline keeps the sugar off
    ("RYNGYYGYFDY", "deamidation"),
    ("RYDSYYGYYAY", "isomerisation"),
    ("RYYGYYGAMDY", "oxidation"),
    ("RYCGYYGYFDY", "free cysteine"),
])
def test_a_loop_is_right_where_no_check_fails(loop, failed):
    grade, count = graded(loop), len(failed.split(", ")) if failed else 0
    assert grade.reason == (failed or "passes")
    assert grade.correct == (not failed) and grade.format == 1
    assert grade.reward == pytest.approx(1 + 3 * (1 - count / 6))


def test_the_loop_earns_nothing_before_the_end_is_whole():
    clean, spoilt = "DRGGYSSYFDY", "NGCMWWWNGSS"
    for end in ("WGQGTTVTVSS", END[:-1], END + "A", ""):
        assert graded(clean, end).reward == graded(spoilt, end).reward <= 1
        assert not graded(clean, end).correct
    # What is kept of it counts from its W to the first residue that is another.
    assert graded(clean, "WGQGTTVTVSS").reward == 5 / 11 and graded("", "").reward == 0


def test_training_never_sees_the_families_of_the_test():
    test = tasks.load("antibody", "test")
    train = tasks.load("antibody", "train", held_out=test)
    family = lambda example: example["gene"].partition("-")[0]
    assert len(test) == 100 and len({example["gene"] for example in test}) == 2
    seen = {family(train[i]) for i in range(100)}
    assert len(seen) > 1 and not seen & {family(example) for example in test}


def test_a_segment_runs_from_its_first_residue_to_the_loop():
    for gene in antibody_task.GENES.values():
        assert set(gene) <= set("ACDEFGHIKLMNPQRSTVWY")
        assert gene[0] in "EQ" and gene[21:23].count("C") == 1 and gene[-3:] in ("CAR", "CAK")


# --- the model --------------------------------------------------------------------------------

LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package like AntiBERTy's, of random weights and one small layer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=25, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.1)
    model = transformers.BertForMaskedLM(config)
    weights = dict(model.state_dict(), **{"cls.species.weight": torch.zeros(6, 32)})
    (tmp_path / "vocab").write_text("\n".join(LETTERS))
    config.to_json_file(tmp_path / "config")
    torch.save(weights, tmp_path / "weights")
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as file:
        for name, inside in zip(("vocab", "config", "weights"), antibody_task.INSIDE):
            file.write(tmp_path / name, inside)
    monkeypatch.setattr(antibody_task, "fetch", lambda folder: tmp_path / "package.whl")
    return weights


def test_the_prepared_model_trains(package, tmp_path):
    folder = tmp_path / "runs" / "antiberty"
    antibody_task.main(folder)
    model = transformers.BertForMaskedLM.from_pretrained(folder)
    assert all(torch.equal(value, package[name]) for name, value in model.state_dict().items())
    assert [path.name for path in folder.parent.iterdir()] == ["antiberty"]

    argv = ["--task", str(ROOT / "lab/antibody_task.py"), "--model", str(folder), "--device",
            "cpu", "--C", "22", "--m", "2", "--k", "1", "--unmasking", "max_prob", "--beta",
            "0.02", "--questions", "2", "--updates", "2", "--eval_n", "4", "--steps", "2"]
    example = {"gene": "IGHV3-23*01"}
    policy = models.load_policy(run.parse(argv), [example])
    q, q_mask = policy.encode([antibody_task.prompt(example)])
    assert "".join(LETTERS[i] for i in q[0]) == "[CLS]" + antibody_task.GENES["IGHV3-23*01"]
    assert policy.eos_id == LETTERS.index("[SEP]") and policy.mask_id == LETTERS.index("[MASK]")
    assert policy.ignores_mask                    # its positions are absolute: no padding
    assert run.main([*argv, "--out", str(tmp_path / "run")]) in (None, 0)


def test_a_preparation_that_fails_leaves_nothing(package, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "antiberty"
    monkeypatch.setattr(transformers.BertForMaskedLM, "save_pretrained", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        antibody_task.main(folder)
    assert not [*folder.parent.iterdir()]


def test_a_package_that_is_not_to_be_had_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SystemExit) as exit:
        antibody_task.main(tmp_path / "runs" / "antiberty")
    said = capsys.readouterr().err
    assert exit.value.code == 2 and len(said.splitlines()) == 1
    assert said.startswith("antibody: the package antiberty==0.1.3, 97 MB, is not to be had")
    assert not [*(tmp_path / "runs").iterdir()]
