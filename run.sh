#!/usr/bin/env bash
# From a bare machine to a result. Needs Python 3.10+ and, the first time, a package index (2.5 GB).
#   a laptop or any 2 cores, no GPU:  bash run.sh countdown                   the shipped tiny model, minutes
#   one GPU of 24 GB, by plan:        bash run.sh countdown --preset llada    LLaDA-8B-Instruct, days
# Everything goes into .venv and runs/ beside this file. Further flags pass through: ... --seed 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

menu() {
    cat <<'MENU'
bash run.sh COMMAND [flags]          times on 2 CPU cores with the tiny model

  countdown       train on Countdown: three numbers, one target             2 minutes
  sudoku          train on 4x4 Sudoku                                       2 minutes
  gsm8k, math     train on word problems: with --preset llada or qwen, on a GPU
  antibody        steer a real pretrained model, AntiBERTy (97 MB)          2 minutes
  FILE.py         train on a task of your own
  walkthrough     AGRPO step by step, one page in runs/walkthrough.html     a minute
  eval            a model, or base beside --adapter, at several --steps     a minute
  watch           one problem, denoised step by step; --gif draws it        seconds
  plan            memory, disk and hours of a run; downloads nothing        seconds
  bench           time one update of each policy; on a GPU the kernel too   minutes
  lab             experiments: does it work as claimed? (lists them)        minutes each
  tiny            make the tiny model in lab/tiny again                     45 minutes, one core
  test            every test, in two processes                              3 minutes

The same command again goes on where it stopped. After the first one, .venv/bin/python lab/run.py
--help lists the flags, and torchrun --nproc_per_node 8 -- lab/run.py ... uses eight GPUs.
MENU
}

setup() {  # once, and again only when requirements.txt changes
    local stamp=.venv/.installed want
    want=$(cksum < requirements.txt)
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
        echo "setting up .venv (once) ..."
        "${PYTHON:-python3}" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        echo "$want" > "$stamp"
    fi
}

walkthrough() {  # lab/walkthrough.py, executed, as one page
    local python=.venv/bin/python keep=$PWD/runs/.jupyter       # nothing into the home folder
    "$python" -c "import jupytext, nbconvert, ipykernel" 2>/dev/null ||
        "$python" -m pip install --quiet --disable-pip-version-check \
            $(sed -n 's/^# walkthrough: //p' requirements.txt)
    export IPYTHONDIR=$keep JUPYTER_DATA_DIR=$keep JUPYTER_CONFIG_DIR=$keep
    export PYTHONWARNINGS="ignore:IProgress not found"          # tqdm's, of a notebook
    mkdir -p "$keep"
    "$python" -m jupytext --quiet --to ipynb --output "$keep/walkthrough.ipynb" lab/walkthrough.py
    "$python" -m nbconvert --execute --to html --output-dir runs --log-level=ERROR \
        --ExecutePreprocessor.extra_arguments=--log-level=ERROR "$keep/walkthrough.ipynb"
    rm -rf "$keep"
    echo "written to runs/walkthrough.html"
}

command=${1:-menu}
[ $# -gt 0 ] && shift
case $command in
    menu|help|-h|--help) menu; exit ;;
    -*) echo "run.sh: the first word is a command, not a flag; bash run.sh lists them" >&2; exit 2 ;;
    test)             run=(-m pytest -q -n 2 test_agrpo.py lab/tests) ;;
    eval)             run=(lab/evaluate.py) ;;
    watch|plan|bench) run=(lab/"$command".py) ;;
    lab)              run=(lab/experiments.py) ;;
    walkthrough)      setup; walkthrough; exit ;;
    tiny)             run=(lab/make_tiny.py) ;;
    antibody)         setup; .venv/bin/python lab/antibody_task.py || exit
                      run=(lab/run.py --task lab/antibody_task.py --model runs/antiberty --C 22 --m 2
                           --unmasking max_prob --k 1 --questions 4 --G 8 --lr 5e-4 --beta 0.02
                           --updates 60 --eval_n 100 --eval_every 60 --steps 2) ;;
    math)             run=(lab/run.py --task lab/math_task.py) ;;
    *)                run=(lab/run.py --task "$command") ;;
esac
setup
exec .venv/bin/python "${run[@]}" "$@"
