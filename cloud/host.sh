#!/usr/bin/env bash
# What a host of a TPU slice does; give the same line to every host.
#
#   cloud/host.sh setup BUCKET             Python, packages, and gs://BUCKET on /mnt/runs
#   cloud/host.sh start NOTEBOOK OPTIONS   train in the background; the log is ~/tpuchat.log
#   cloud/host.sh stop                     SIGTERM, and wait: the last thing a run does is write a checkpoint
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mount=/mnt/runs
pid=~/tpuchat.pid
log=~/tpuchat.log

# The name is asked for, too: after a reboot the number may be another process's.
running() { [[ -f $pid && $(ps -o args= -p "$(<"$pid")") == *venv/bin/python* ]]; }

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

start() {
    if running; then
        echo "already running, process $(<"$pid")" >&2
        exit 1
    fi
    # Without the mount every host would write to its own disk, and no checkpoint would be whole.
    mountpoint -q "$mount" || { echo "$mount is not mounted: cloud/host.sh setup BUCKET" >&2 && exit 1; }
    if [[ -f ~/tpuchat.env ]]; then # secrets come from a file: a command line is seen by all and is logged
        set -a
        # shellcheck disable=SC1090
        . ~/tpuchat.env
        set +a
    fi
    nohup ~/venv/bin/python -u "$@" >>"$log" 2>&1 </dev/null &
    echo $! >"$pid"
}

stop() {
    running || return 0
    kill -TERM "$(<"$pid")"
    while running; do sleep 0.2; done
}

case "${1:-}" in
setup) setup "${2:?BUCKET}" ;;
start) start "${@:2}" ;;
stop) stop ;;
*) sed -n '2,6s/^# \{0,1\}//p' cloud/host.sh >&2 && exit 2 ;;
esac
