# shellcheck shell=bash
# Sourced: one process at a time.

# take_lock DESCRIPTOR FILE WHAT: hold FILE's lock until this process and its children end or close DESCRIPTOR.
take_lock() {
    mkdir -p -- "$(dirname -- "$2")"
    eval "exec $1>>\"\$2\""
    if ! command -v flock >/dev/null; then
        printf '%s: flock is not installed; do not run two at once\n' "$3" >&2
    elif ! flock -n "$1"; then
        printf '%s: waiting for another process that does the same\n' "$3" >&2
        flock "$1"
    fi
}
