#!/usr/bin/env bash
# What a host of a TPU slice does; give the same line to every host.
#
#   cloud/host.sh setup BUCKET              Python, packages, and gs://BUCKET on /mnt/runs
#   cloud/host.sh run PYTHON NOTEBOOK …     train as one of the hosts of a slice, and say what has ended the process
#   cloud/host.sh start NOTEBOOK OPTIONS    the same in the background, on /mnt/runs; the log is ~/tpuchat.log
#   cloud/host.sh stop                      SIGTERM, and wait: the last thing a run does is write a checkpoint
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mount=/mnt/runs
pid=~/tpuchat.pid
log=~/tpuchat.log

# The name is asked for, too: after a reboot the number may be another process's.
running() { [[ -f $pid && $(ps -o args= -p "$(<"$pid")") == *host.sh\ run* ]]; }

setup() {
    # The image's Python may be 3.10, and jax needs 3.11: uv brings one.
    PATH=~/.local/bin:$PATH
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    [[ -x ~/venv/bin/pip ]] || uv venv --seed --python 3.12 ~/venv
    ~/venv/bin/pip install --quiet "jax[tpu]" -r requirements.txt

    mountpoint -q "$mount" && return
    if ! command -v gcsfuse >/dev/null; then
        # The newest release: older ones know no hierarchical namespace, where a folder is renamed in one step.
        releases=https://github.com/GoogleCloudPlatform/gcsfuse/releases
        tag=$(basename "$(curl -fsSL -o /dev/null -w '%{url_effective}' "$releases/latest")")
        curl -fsSL -o /tmp/gcsfuse.deb "$releases/download/$tag/gcsfuse_${tag#v}_amd64.deb"
        sudo apt-get -o DPkg::Lock::Timeout=300 install -y -qq /tmp/gcsfuse.deb
    fi
    sudo install -d -o "$(id -u)" "$mount"
    # No cache of names and sizes: a host must see at once what another one has written.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$1" "$mount"
}

# With these flags the collectives of a v6e run on its SparseCores, beside the arithmetic. On a v5e, which has none, the
# flags have no effect. The libtpu of jax 0.7.2 ends the process at nd_reduce_scatter; that of jax 0.10 knows it.
flags() {
    local kinds=(all_gather reduce_scatter all_reduce)
    if "$1" -c 'import jax; raise SystemExit(jax.__version_info__ < (0, 10))' 2>/dev/null; then
        kinds+=(nd_reduce_scatter)
    fi
    printf -- '--xla_tpu_enable_sparse_core_collective_offload_%s=true ' "${kinds[@]}"
    printf -- '--xla_tpu_prefer_async_allgather_to_allreduce=true'
}

# Ctrl-C means SIGTERM, to all hosts: they stop after the same step. A second Ctrl-C ends this host's process at once.
ask() {
    local signal=TERM
    [[ $asked && $1 == INT ]] && signal=KILL
    kill "-$signal" "$child" 2>/dev/null
    asked=yes interrupted=yes
}

run() {
    export TPUCHAT_HOSTS=many LIBTPU_INIT_ARGS
    LIBTPU_INIT_ARGS="$(flags "$1") ${LIBTPU_INIT_ARGS:-}" # your own come last, and win
    local asked='' interrupted child status why
    "$@" &
    child=$!
    trap 'ask TERM' TERM
    trap 'ask INT' INT
    while
        interrupted='' status=0
        wait "$child" || status=$?
        [[ $interrupted ]] # by a signal to this script: the process goes on
    do :; done

    case $status in
    0 | 2) return "$status" ;; # 2: the process has said which option is wrong
    130 | 143) why="stopped by SIG$(kill -l "$status"), here or on another host" ;;
    134) why="ended by SIGABRT, most likely since another host is gone, see above" ;;
    137) why="killed by SIGKILL, perhaps for its memory" ;;
    *) why="ended with exit status $status, see above; perhaps another host is gone" ;;
    esac
    echo "host.sh: $why; start the same command on all hosts: it goes on from the newest checkpoint" >&2
    return "$status"
}

start() {
    if running; then
        echo "already running, process $(<"$pid")" >&2
        exit 1
    fi
    # Without the mount every host would write to its own disk.
    mountpoint -q "$mount" || { echo "$mount is not mounted: cloud/host.sh setup BUCKET" >&2 && exit 1; }
    if [[ -f ~/tpuchat.env ]]; then # secrets come from a file: a command line is seen by all and is logged
        set -a
        # shellcheck disable=SC1090
        . ~/tpuchat.env
        set +a
    fi
    nohup bash cloud/host.sh run ~/venv/bin/python -u "$@" >>"$log" 2>&1 </dev/null &
    echo $! >"$pid"
}

stop() {
    running || return 0
    kill -TERM "$(<"$pid")"
    while running; do sleep 0.2; done
}

case "${1:-}" in
setup) setup "${2:?BUCKET}" ;;
run) run "${2:?PYTHON}" "${@:3}" ;;
start) start "${@:2}" ;;
stop) stop ;;
*) sed -n '2,7s/^# \{0,1\}//p' cloud/host.sh >&2 && exit 2 ;;
esac
