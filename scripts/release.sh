#!/usr/bin/env bash
# Build a release, check it, and publish it where that is asked for.
#
#   scripts/release.sh RELEASE.TOML [-o DIR] [--dry-run] [--push-to-hub OWNER/NAME] [OPTION...]
#
#   scripts/release.sh docs/release.toml -o build/demo-release
#
# The options are those of "impq-edge release"; docs/releases.md explains them. Before anything is published, every file
# is checked against its hash. The environment is that of scripts/with-venv, made on the first run; IMPQ_EDGE names
# another impq-edge to run. Exit codes: 0 done, 1 a gate failed, 2 bad options, 3 bad input.

set -euo pipefail

scripts=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

case ${1:-} in
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' -- "${BASH_SOURCE[0]}"
        exit 0
        ;;
    '' | -*)
        printf 'release: usage: scripts/release.sh RELEASE.TOML [-o DIR] (--help)\n' >&2
        exit 2
        ;;
esac

if [[ -n ${IMPQ_EDGE:-} ]]; then
    exec "$IMPQ_EDGE" release "$@"
fi
exec "$scripts/with-venv" impq-edge release "$@"
