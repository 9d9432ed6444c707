#!/usr/bin/env bash
# The service on this machine, in the background, over the make targets.
#
#   scripts/run_local.sh setup     tools for the tests, .env.local from the template, a release build
#   scripts/run_local.sh start     build if needed, start, wait until it is ready
#   scripts/run_local.sh stop      SIGTERM, then wait for the drain
#   scripts/run_local.sh status    process, health and main metrics
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

READY_WITHIN_S=30
# The service ends its drain within 30 s, whatever clients do.
STOPPED_WITHIN_S=40

binary=bin/payment-sim
pid_file=.run/payment-sim.pid
log=.run/payment-sim.log

# A setting as the service reads it: environment, .env.local, .env, default.
setting() { # name, default
    local file line
    if [ -n "${!1:-}" ]; then
        echo "${!1}"
        return
    fi
    for file in .env.local .env; do
        if [ -f "$file" ] && line=$(grep -E "^$1=" "$file" | tail -n 1) && [ -n "$line" ]; then
            line=${line#*=}
            line=${line%\"}
            echo "${line#\"}"
            return
        fi
    done
    echo "$2"
}

# The pid of the running service, or failure. A number alone proves nothing: after a reboot it may
# be anybody's, so the command must be ours as well.
running() {
    local pid
    [ -f "$pid_file" ] || return 1
    pid=$(cat "$pid_file")
    case "$(ps -o args= -p "$pid" 2>/dev/null)" in
    *"$binary"*) echo "$pid" ;;
    *) return 1 ;;
    esac
}

setup() {
    make dev-deps
    if [ ! -f .env.local ]; then
        cp .env.template .env.local
        echo "wrote .env.local; edit it to taste"
    fi
    make build
}

start() {
    local pid ops_port deadline
    if pid=$(running); then
        echo "already running, pid $pid"
        return
    fi
    ops_port=$(setting OPS_PORT 8031)
    # Else its answer would pass for ours below.
    if curl -sS -m 2 -o /dev/null "http://127.0.0.1:$ops_port/livez" 2>/dev/null; then
        echo "something else already answers on port $ops_port" >&2
        return 1
    fi
    make build
    mkdir -p .run
    nohup "$binary" >"$log" 2>&1 </dev/null &
    pid=$!
    echo "$pid" >"$pid_file"
    deadline=$((SECONDS + READY_WITHIN_S))
    while kill -0 "$pid" 2>/dev/null; do
        if curl -fsS -m 2 -o /dev/null "http://127.0.0.1:$ops_port/readyz" 2>/dev/null; then
            echo "ready, pid $pid: gRPC on $(setting GRPC_PORT 8030), health and metrics on $ops_port, log in $log"
            return
        fi
        if [ "$SECONDS" -ge "$deadline" ]; then
            echo "not ready after $READY_WITHIN_S s, left running as pid $pid; see $log" >&2
            return 1
        fi
        sleep 0.2
    done
    rm -f "$pid_file"
    echo "it ended at once:" >&2
    tail -n 20 "$log" >&2
    return 1
}

stop() {
    local pid deadline
    if ! pid=$(running); then
        rm -f "$pid_file"
        echo "not running"
        return
    fi
    kill -TERM "$pid"
    deadline=$((SECONDS + STOPPED_WITHIN_S))
    while kill -0 "$pid" 2>/dev/null; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            echo "pid $pid is still there after $STOPPED_WITHIN_S s; see $log" >&2
            return 1
        fi
        sleep 0.2
    done
    rm -f "$pid_file"
    echo "stopped"
}

status() {
    local pid
    if ! pid=$(running); then
        echo "not running"
        return 1
    fi
    echo "running, pid $pid"
    OPS_PORT=$(setting OPS_PORT 8031) make --no-print-directory status
}

case "${1:-}" in
setup | start | stop | status) "$1" ;;
*)
    sed -n '2,/^set -/{ /^#/s/^# \{0,1\}//p; }' "$0" >&2
    exit 2
    ;;
esac
