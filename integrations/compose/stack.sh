#!/usr/bin/env bash
# The parts of the stack that install without containers: Prometheus, Alertmanager (both are Debian packages) and workers.
#
#   stack.sh start [PART...]    start what is not running: prometheus, alertmanager, worker-PORT
#   stack.sh stop [PART...]     stop it; data stays
#   stack.sh status             one line per part
#
# Settings, by environment:
#   NLA_STACK_DIR              data, logs, process ids (default ./nla-stack)
#   NLA_MONITOR_DATABASE       the store (default an SQLite file in NLA_STACK_DIR)
#   NLA_STACK_WORKER_PORTS     one worker for each (default "9464")
#   NLA_STACK_WORKER_ARGS      further arguments of workers, such as "--config monitor.yaml"
#   NLA_STACK_WORKER           the command line tool (default nla-monitor)
#   NLA_STACK_PROMETHEUS_PORT, NLA_STACK_ALERTMANAGER_PORT     (default 9090, 9093)
#   NLA_STACK_WEBHOOK          where Alertmanager tells of alerts (default http://localhost:9080)
#   NLA_STACK_INTERVAL         between scrapes and evaluations (default 15s)
#   NLA_STACK_GROUP_INTERVAL   between messages about one group (default 5m)
set -euo pipefail

assets="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dir="${NLA_STACK_DIR:-$PWD/nla-stack}"
prometheus_port="${NLA_STACK_PROMETHEUS_PORT:-9090}"
alertmanager_port="${NLA_STACK_ALERTMANAGER_PORT:-9093}"
interval="${NLA_STACK_INTERVAL:-15s}"
read -r -a worker_ports <<<"${NLA_STACK_WORKER_PORTS:-9464}"
read -r -a worker_args <<<"${NLA_STACK_WORKER_ARGS:-}"
mkdir -p "$dir"
dir="$(cd "$dir" && pwd)"
export NLA_MONITOR_DATABASE="${NLA_MONITOR_DATABASE:-sqlite:///$dir/nla-monitor.db}"

alive() { [[ -f "$dir/$1.pid" ]] && kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null; }

configure() {
  local targets
  targets="$(printf '"localhost:%s", ' "${worker_ports[@]}")"
  sed -e "s|localhost:9093|localhost:$alertmanager_port|" -e "s|\"localhost:9464\"|${targets%, }|" \
    -e "s|_interval: 15s|_interval: $interval|" -e "s|- nla-monitor.rules|- $assets/prometheus/nla-monitor.rules|" \
    "$assets/prometheus/prometheus.example.yaml" >"$dir/prometheus.yaml"
  sed -e "s|http://localhost:9080|${NLA_STACK_WEBHOOK:-http://localhost:9080}|" \
    -e "s|group_interval: 5m|group_interval: ${NLA_STACK_GROUP_INTERVAL:-5m}|" \
    "$assets/alertmanager/alertmanager.example.yaml" >"$dir/alertmanager.yaml"
}

launch() { # NAME COMMAND...
  local name="$1"
  shift
  if ! command -v "$1" >/dev/null; then
    echo "$name: $1 is not installed" >&2
    return 1
  fi
  setsid "$@" >>"$dir/$name.log" 2>&1 </dev/null &
  echo $! >"$dir/$name.pid"
  echo "$name: started, log $dir/$name.log"
}

start() {
  alive "$1" && { echo "$1: runs already"; return; }
  case "$1" in
    prometheus)
      launch prometheus prometheus --config.file="$dir/prometheus.yaml" --storage.tsdb.path="$dir/prometheus" \
        --web.listen-address="127.0.0.1:$prometheus_port" ;;
    alertmanager)
      launch alertmanager prometheus-alertmanager --config.file="$dir/alertmanager.yaml" \
        --storage.path="$dir/alertmanager" --web.listen-address="127.0.0.1:$alertmanager_port" \
        --cluster.listen-address= ;;
    worker-*)
      launch "$1" "${NLA_STACK_WORKER:-nla-monitor}" worker --metrics-port "${1#worker-}" "${worker_args[@]}" ;;
    *) echo "no part is called $1" >&2; return 2 ;;
  esac
}

stop() { # PART...: all are told first, then waited for, a minute at most
  local part pid
  for part in "$@"; do
    if alive "$part"; then kill "$(cat "$dir/$part.pid")" || true; else echo "$part: does not run"; rm -f "$dir/$part.pid"; fi
  done
  SECONDS=0
  for part in "$@"; do
    [[ -f "$dir/$part.pid" ]] || continue
    pid="$(cat "$dir/$part.pid")"
    while kill -0 "$pid" 2>/dev/null; do
      if ((SECONDS > 60)); then
        echo "$part: does not stop (process $pid)" >&2
        return 1
      fi
      sleep 0.2
    done
    rm -f "$dir/$part.pid"
    echo "$part: stopped"
  done
}

action="${1:-status}"
shift || true
parts=("$@")
[[ ${#parts[@]} -gt 0 ]] || parts=(alertmanager prometheus "${worker_ports[@]/#/worker-}")
case "$action" in
  start)
    configure
    for part in "${parts[@]}"; do start "$part"; done ;;
  stop) stop "${parts[@]}" ;;
  status) for part in "${parts[@]}"; do if alive "$part"; then echo "$part: runs"; else echo "$part: does not run"; fi; done ;;
  *) echo "usage: stack.sh start|stop|status [PART...]" >&2; exit 2 ;;
esac
