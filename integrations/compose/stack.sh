#!/usr/bin/env bash
# The parts of the stack that install without containers: Prometheus, Alertmanager (both are Debian packages) and workers.
#
#   stack.sh start [PART...]    start what is not running, and wait until it answers: prometheus, alertmanager, worker-PORT
#   stack.sh stop [PART...]     stop it; data stays
#   stack.sh status             one line per part
#
# A part that does not come up (its port is taken, its configuration is wrong) is said with the end of its log, and the exit
# status is 1; what has been started runs on until it is stopped. Ctrl-C while it starts stops what this call has started.
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

# Field 22 of /proc/PID/stat, counted behind the name: when the process began, in ticks. A process id alone may be that of a
# stranger by now, after a reboot for instance.
began() { local stat; stat="$(cat "/proc/$1/stat" 2>/dev/null)" && set -- ${stat##*) } && echo "${20}"; }

alive() { # PART: whether the process that was started for it is still there, and not its corpse
  local pid since
  [[ -f "$dir/$1.pid" ]] && read -r pid since <"$dir/$1.pid" && [[ -n "$since" && "$(began "$pid")" == "$since" ]] &&
    ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null
}

escaped() { printf '%s' "$1" | sed -e 's/[&|\\]/\\&/g'; } # for the right side of sed's s|||

configure() {
  local targets
  targets="$(printf '"localhost:%s", ' "${worker_ports[@]}")"
  sed -e "s|localhost:9093|localhost:$alertmanager_port|" -e "s|\"localhost:9464\"|${targets%, }|" \
    -e "s|_interval: 15s|_interval: $interval|" -e "s|- nla-monitor.rules|- $(escaped "$assets")/prometheus/nla-monitor.rules|" \
    "$assets/prometheus/prometheus.example.yaml" >"$dir/prometheus.yaml"
  sed -e "s|http://localhost:9080|$(escaped "${NLA_STACK_WEBHOOK:-http://localhost:9080}")|" \
    -e "s|group_interval: 5m|group_interval: ${NLA_STACK_GROUP_INTERVAL:-5m}|" \
    "$assets/alertmanager/alertmanager.example.yaml" >"$dir/alertmanager.yaml"
}

launch() { # NAME URL COMMAND...: start it, and wait until the URL answers
  local name="$1" url="$2" pid
  shift 2
  if ! command -v "$1" >/dev/null; then
    echo "$name: $1 is not installed" >&2
    return 1
  fi
  if answers "$url" any; then
    echo "$name: not started, somebody else answers at $url" >&2
    return 1
  fi
  echo "--- $(date -u +%FT%TZ) start" >>"$dir/$name.log"
  setsid "$@" >>"$dir/$name.log" 2>&1 </dev/null 9>&- &
  pid=$!
  echo "$pid $(began "$pid" || true)" >"$dir/$name.pid"
  fresh+=("$name")
  SECONDS=0
  until answers "$url"; do
    if ! alive "$name" || ((SECONDS > ${NLA_STACK_PATIENCE:-120})); then
      echo "$name: did not come up; the end of $dir/$name.log:" >&2
      tail -n 5 "$dir/$name.log" >&2
      stop "$name" >/dev/null
      return 1
    fi
    sleep 0.2
  done
  echo "$name: started, log $dir/$name.log"
}

answers() { # URL [any]: whether an HTTP server says 200 there, or anything at all
  local rest="${1#http://}" line place
  place="${rest%%/*}"
  { exec 3<>"/dev/tcp/${place%:*}/${place#*:}"; } 2>/dev/null || return 1
  [[ "${2:-}" == any ]] && { exec 3>&-; return 0; }
  printf 'GET /%s HTTP/1.0\r\nHost: %s\r\n\r\n' "${rest#*/}" "$place" >&3
  read -r -t 2 line <&3 || line=""
  exec 3>&-
  [[ "$line" == *" 200 "* ]]
}

start() {
  alive "$1" && { echo "$1: runs already"; return; }
  case "$1" in
    prometheus)
      launch prometheus "http://127.0.0.1:$prometheus_port/-/ready" prometheus --config.file="$dir/prometheus.yaml" --storage.tsdb.path="$dir/prometheus" \
        --web.listen-address="127.0.0.1:$prometheus_port" ;;
    alertmanager)
      launch alertmanager "http://127.0.0.1:$alertmanager_port/-/ready" prometheus-alertmanager --config.file="$dir/alertmanager.yaml" \
        --storage.path="$dir/alertmanager" --web.listen-address="127.0.0.1:$alertmanager_port" \
        --cluster.listen-address= ;;
    worker-*)
      launch "$1" "http://127.0.0.1:${1#worker-}/metrics" "${NLA_STACK_WORKER:-nla-monitor}" worker --metrics-port "${1#worker-}" "${worker_args[@]}" ;;
    *) echo "no part is called $1" >&2; return 2 ;;
  esac
}

stop() { # PART...: all are told first, then waited for, a minute at most
  local part pid told=()
  for part in "$@"; do
    if alive "$part"; then
      read -r pid _ <"$dir/$part.pid"
      kill "$pid" 2>/dev/null || true
      told+=("$part")
    else
      echo "$part: does not run"
      rm -f "$dir/$part.pid"
    fi
  done
  SECONDS=0
  for part in ${told[@]+"${told[@]}"}; do
    while alive "$part"; do
      if ((SECONDS > 60)); then
        echo "$part: does not stop (process $(cut -d' ' -f1 "$dir/$part.pid"))" >&2
        return 1
      fi
      sleep 0.2
    done
    rm -f "$dir/$part.pid"
    echo "$part: stopped"
  done
}

interrupted() {
  trap '' INT TERM
  echo "interrupted: stopping what was started" >&2
  stop ${fresh[@]+"${fresh[@]}"} >&2
  exit 130
}

alone() { # two calls at once would start everything twice
  exec 9>"$dir/lock"
  flock -w 180 9 || { echo "another stack.sh is at work in $dir" >&2; exit 1; }
}

action="${1:-status}"
shift || true
parts=("$@")
fresh=()
failed=0
[[ ${#parts[@]} -gt 0 ]] || parts=(alertmanager prometheus "${worker_ports[@]/#/worker-}")
case "$action" in
  start)
    alone
    trap interrupted INT TERM
    configure
    for part in "${parts[@]}"; do start "$part" || failed=$?; done
    exit "$failed" ;;
  stop)
    alone
    stop "${parts[@]}" ;;
  status) for part in "${parts[@]}"; do if alive "$part"; then echo "$part: runs"; else echo "$part: does not run"; fi; done ;;
  *) echo "usage: stack.sh start|stop|status [PART...]" >&2; exit 2 ;;
esac
