#!/usr/bin/env bash
# Lints everything that is not Rust code. A linter that is not set up is one visible line, and a failure
# when CI=true.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.tools/bin:$PWD/.venv/bin:$PATH"
failed=0

lint() { # name, arguments…
    if command -v "$1" >/dev/null; then
        echo "$*"
        "$@" || failed=1
    else
        echo "skipped: $1 is not set up (make dev-deps)" >&2
        if [ "${CI:-}" = true ]; then
            failed=1
        fi
    fi
}

# The module is the whole repository, so that imports read as published; .venv has protos of its own.
lint buf lint --path proto
lint cargo-deny --all-features --locked check licenses bans sources
lint hadolint Dockerfile
lint yamllint --strict .
lint shellcheck scripts/*.sh .ci/run
exit "$failed"
