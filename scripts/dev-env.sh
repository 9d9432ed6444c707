#!/usr/bin/env bash
# Sets up what the tests and linters need besides Rust, inside this repository: `.venv` (Python) and
# `.tools` (buf, grpcurl, ghz, kustomize; Standard Webhooks for Node.js). What is already there and
# current is left alone.
#
#   scripts/dev-env.sh              set up
#   scripts/dev-env.sh exec CMD…    set up, then run CMD with
#       PAYMENT_SIM_VENV    the venv, absolute (bin/python, bin/moto_server), unset where there is none
#       PAYMENT_SIM_TOOLS   .tools, absolute (bin/buf, bin/grpcurl, bin/ghz, bin/kustomize,
#                           node_modules/standardwebhooks), unset where one of them is missing
#       PATH                with both bin folders in front
#
# A missing interpreter is one line on stderr, and a failure when CI=true. An install that was begun
# and fails is always a failure: a half set-up would make tests skip that somebody counts on.
set -euo pipefail

BUF_VERSION=1.75.0
GRPCURL_VERSION=v1.9.4
GHZ_VERSION=v0.93.0
STANDARDWEBHOOKS_VERSION=1.1.1
KUSTOMIZE_VERSION=v5.8.1 # renders the manifests; the same output as `kubectl kustomize`

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
tools=$root/.tools
requirements=$root/tests/py/requirements.txt

missing() { # what is missing, and what goes without it
    echo "missing: $1; without it $2" >&2
    if [ "${CI:-}" = true ]; then
        exit 1
    fi
}

# A stamp holds the very inputs that it was made from, so that any change of them sets up anew.
current() { # stamp, inputs
    [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]
}

python_new_enough() {
    "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

set_up_python() {
    local python='' candidate inputs
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if python_new_enough "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        missing 'python3 >= 3.10 (with venv)' 'the Python and AWS tests and most linters are skipped'
        return
    fi
    inputs=$("$python" -c 'import sys; print(sys.version, sys.executable)'; cat "$requirements")
    if current "$venv/.stamp" "$inputs"; then
        return
    fi
    echo "setting up .venv (about a minute)" >&2
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --requirement "$requirements"
    "$venv/bin/python" -m pip check --disable-pip-version-check >&2
    printf '%s\n' "$inputs" >"$venv/.stamp"
}

set_up_node_tools() {
    local inputs="buf $BUF_VERSION, standardwebhooks $STANDARDWEBHOOKS_VERSION"
    if current "$tools/.stamp-node" "$inputs"; then
        return
    fi
    if ! command -v npm >/dev/null; then
        missing 'Node.js with npm' 'buf (proto lint, buf curl) and the tests that need it or Node.js are skipped'
        return
    fi
    echo "setting up .tools/bin/buf and .tools/node_modules/standardwebhooks" >&2
    mkdir -p "$tools/bin"
    # The binary is in the package itself; no install script needs to run.
    npm install --prefix "$tools" --no-save --no-package-lock --no-audit --no-fund --ignore-scripts --loglevel=error \
        "@bufbuild/buf@$BUF_VERSION" "standardwebhooks@$STANDARDWEBHOOKS_VERSION" >&2
    ln -sf ../node_modules/.bin/buf "$tools/bin/buf"
    printf '%s\n' "$inputs" >"$tools/.stamp-node"
}

set_up_go_tools() {
    local inputs="grpcurl $GRPCURL_VERSION, ghz $GHZ_VERSION, kustomize $KUSTOMIZE_VERSION"
    if current "$tools/.stamp-go" "$inputs"; then
        return
    fi
    if ! command -v go >/dev/null; then
        missing 'Go' 'grpcurl, ghz and kustomize and the tests that need them are skipped'
        return
    fi
    echo "setting up .tools/bin/{grpcurl,ghz,kustomize} (a minute or two)" >&2
    mkdir -p "$tools/bin"
    GOBIN=$tools/bin go install "github.com/fullstorydev/grpcurl/cmd/grpcurl@$GRPCURL_VERSION"
    GOBIN=$tools/bin go install "github.com/bojand/ghz/cmd/ghz@$GHZ_VERSION"
    GOBIN=$tools/bin go install "sigs.k8s.io/kustomize/kustomize/v5@$KUSTOMIZE_VERSION"
    printf '%s\n' "$inputs" >"$tools/.stamp-go"
}

# Only CI installs into the system: a developer's machine is not ours to change.
set_up_strace() {
    if command -v strace >/dev/null || [ "$(uname -s)" != Linux ]; then
        return
    fi
    if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq --no-install-recommends strace
        return
    fi
    missing 'strace' 'the test that sees one fdatasync before each acknowledgement is skipped'
}

set_up_python
set_up_node_tools
set_up_go_tools
set_up_strace

if [ "${1:-}" = exec ]; then
    shift
    unset PAYMENT_SIM_VENV PAYMENT_SIM_TOOLS
    if [ -f "$venv/.stamp" ]; then
        export PAYMENT_SIM_VENV=$venv PATH="$venv/bin:$PATH"
    fi
    if [ -f "$tools/.stamp-node" ] && [ -f "$tools/.stamp-go" ]; then
        export PAYMENT_SIM_TOOLS=$tools
    fi
    export PATH="$tools/bin:$PATH"
    exec "$@"
fi
