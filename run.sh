#!/usr/bin/env bash
# From a bare machine to a result. Needs Python 3.10+ and, the first time, a package index (about 2 GB, one minute).
#   laptop or any 2 cores, no GPU:  bash run.sh countdown    the shipped tiny model, minutes
#   one GPU of 40 GB or more:       bash run.sh countdown    LLaDA-8B-Instruct, hours; --model lab/tiny for the above
# Everything goes into .venv and runs/ beside this file. Further flags pass through: bash run.sh countdown --seed 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

menu() {
    cat <<'MENU'
bash run.sh COMMAND [flags]           times on 2 CPU cores with the tiny model

  countdown        train on Countdown: three numbers, one target            3 minutes
  sudoku           train on 4x4 Sudoku                                      4 minutes
  gsm8k, math      train on word problems (needs a GPU of 40 GB or --model)
  eval             evaluate a model or --adapter runs/countdown/adapter     seconds
  plan             memory, disk and work of a run of LLaDA-8B; no download   seconds
  watch            one problem, denoised step by step in the terminal       seconds
  kernels          check the Triton kernel; benchmark it if there is a GPU  seconds
  lab              experiments: does it work as claimed? (lists them)       minutes each
  tiny             make the tiny model in lab/tiny again                    45 minutes, one core
  test             every test                                               5 minutes

  python agrpo.py --help lists all flags (after the first command: .venv/bin/python)
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

launch() {  # PROCESSES=8 bash run.sh ...: that many processes, one for each GPU
    [ "${PROCESSES:-1}" -eq 1 ] && exec $python agrpo.py "$@"
    exec $python -m accelerate.commands.launch --multi_gpu --num_processes "$PROCESSES" --num_machines 1 \
        --mixed_precision no --dynamo_backend no agrpo.py "$@"
}

command=${1:-menu}
[ $# -gt 0 ] && shift
python=.venv/bin/python
case $command in
    menu|help|-h|--help) menu ;;
    test)    setup; exec $python -m pytest -q test_agrpo.py lab/tests "$@" ;;
    eval)    setup; launch --mode eval "$@" ;;
    plan)    setup; exec $python lab/plan.py "$@" ;;
    watch)   setup; exec $python lab/watch.py "$@" ;;
    kernels) setup; exec $python kernels.py "$@" ;;
    lab)     setup; exec $python lab/experiments.py "$@" ;;
    tiny)    setup; exec $python lab/make_tiny.py "$@" ;;
    -*)      echo "run.sh: the first word is a command, not a flag; bash run.sh lists them" >&2; exit 2 ;;
    *)       setup; launch --task "$command" "$@" ;;
esac
