#!/usr/bin/env bash
# Validate a GGUF on an edge device without the workstation's installation: no torch, no compiler here.
#
#   scripts/validate_on_device.sh FILE --device DEVICE --on USER@HOST [OPTION...]     from another machine
#   scripts/validate_on_device.sh FILE --device DEVICE [OPTION...]                    on the device itself
#
#   scripts/validate_on_device.sh llama.gguf --device raspberry-pi-5 --on pi@raspberrypi.local --wheels wheels-aarch64
#
# The options are those of "impq-edge validate"; docs/on-device.md explains them. With --on this machine needs ssh and
# Python 3.11 or newer with venv: a small environment is made once in ~/.cache/impq-edge. Without it, llama.cpp is
# built for this processor, as scripts/with-venv does. Everything it says goes to stderr, the report to stdout.
#
#   PYTHON    the Python to use (default: python3)

set -euo pipefail

scripts=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname -- "$scripts")
base=${PYTHON:-python3}
# shellcheck source=scripts/lock.sh
source "$scripts/lock.sh"

say() { printf 'validate_on_device: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

case ${1:-} in
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' -- "${BASH_SOURCE[0]}"
        exit 0
        ;;
    '')
        say "usage: scripts/validate_on_device.sh FILE --device DEVICE --on USER@HOST (--help)"
        exit 2
        ;;
esac

is_remote() {
    local argument
    for argument in "$@"; do
        [[ $argument != --on && $argument != --on=* ]] || return 0
    done
    return 1
}

# Everything of the base install but llama.cpp, which only the device runs. Named after what it is made of.
make_sender() {
    local requirements
    command -v "$base" >/dev/null || die "$base is not installed; set PYTHON to Python 3.11 or newer."
    "$base" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "$base is older than 3.11 or has no venv (Debian: apt-get install python3-venv); set PYTHON to one that has."
    mapfile -t requirements < <(PYTHONPATH=$root "$base" -P -c \
        'from impq_edge.validation.remote.wheel import base_requirements as all_of
print(*(line for line in all_of() if not line.startswith("llama-cpp-python")), sep="\n")')
    cache=${XDG_CACHE_HOME:-${HOME:?set HOME or XDG_CACHE_HOME}/.cache}/impq-edge
    sender=$cache/sender-$({
        "$base" -c 'import sys; print(sys._base_executable, sys.version)'
        cat "$root/constraints.txt"
        printf '%s\n' "${requirements[@]}"
    } | cksum | tr ' ' -)
    [[ ! -f $sender/ready ]] || return 0
    take_lock 9 "$sender.lock" validate_on_device
    if [[ ! -f $sender/ready ]]; then
        say "making a small environment in $sender"
        rm -rf -- "$sender"
        "$base" -m venv "$sender"
        "$sender/bin/python" -m pip --no-input --disable-pip-version-check install --quiet \
            --constraint "$root/constraints.txt" "${requirements[@]}" >&2 ||
            die "the installation failed, for the reason above; correct it and run the same command again."
        : >"$sender/ready"
    fi
    exec 9>&-
}

if [[ -x $root/.venv/bin/impq-edge ]]; then # scripts/with-venv has been here, with whatever extras
    exec "$root/.venv/bin/impq-edge" validate "$@"
elif is_remote "$@"; then
    make_sender
    PYTHONPATH=$root exec "$sender/bin/python" -P -m impq_edge.cli validate "$@"
else
    IMPQ_EXTRAS='' exec "$scripts/with-venv" impq-edge validate "$@"
fi
