#!/usr/bin/env bash
# What runs on odd machines, tried: read-only roots, no home, full disks, few files, a C locale, and the deployment
# files as they are written.  As root, on Linux, for mount namespaces and other users; needs no network.
#     bash bench/odd_machines.sh [CASE ...]
# Prints a line per case, and ends with 1 if one fails.  No container is made: what an image would hold is this
# machine's root, read-only, with the volumes of the files mounted over it.
set -uo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python}") BIN=$(dirname "$PYTHON")
[ "$(id -u)" = 0 ] || { echo "error: run it as root: it mounts, and becomes another user" >&2; exit 2; }
[ "${ROOT#/tmp/}" = "$ROOT" ] || { echo "error: run it from outside /tmp, which is mounted over" >&2; exit 2; }
PORT=${PORT:-18490} WORK=$(mktemp -d /var/tmp/odd.XXXXXX) MODEL=$ROOT/scripts/demo_model
trap 'rm -rf "$WORK"' EXIT
chmod 755 "$WORK"
SMALL=(--kv-cache-memory 32MiB --linear-kernel plain)
GENERATE=("$BIN/fastdecode" generate "$MODEL" --prompt import --max-tokens 4 --r-worker-threads 1 "${SMALL[@]}")

# An interpreter in root's home, where nobody else may go, is shown alone.
BASE=$("$PYTHON" -c 'import sys; print(sys.base_prefix)') REACHABLE=
if [ "${BASE#/root/}" != "$BASE" ]; then
    mkdir "$WORK/base"
    REACHABLE="mount --bind $BASE $WORK/base; mount -t tmpfs -o mode=755 tmpfs /root; mkdir -p $BASE; mount --move $WORK/base $BASE"
fi

# confined MOUNTS COMMAND...: as uid 10001 without privileges or home, on a root that is read-only but for MOUNTS.
confined() {
    local mounts=$1; shift
    unshare -m sh -ec "mount --make-rprivate /
        $REACHABLE
        for at in \$(findmnt -rno TARGET | grep -Ev '^/(proc|sys|dev)(/|\$)'); do mount -o remount,bind,ro \"\$at\" 2>/dev/null || true; done
        $mounts
        exec \"\$@\"" _ setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all \
        env -i PATH="$BIN:/usr/bin:/bin" PYTHONPATH="$ROOT" HOME=/ HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$@"
}
no_cache_dir() { confined : "$BIN/fastdecode" serve --help >"$WORK/out" 2>&1; }
READABLE_TMP="mount -t tmpfs -o mode=1777 tmpfs /tmp"
read_only_root() {
    confined "$READABLE_TMP" "${GENERATE[@]}" >"$WORK/out" 2>&1 && [ "$(grep -c NUMBA_CACHE_DIR "$WORK/out")" -le 1 ]
}
nothing_writable() {  # torch itself needs a temporary directory
    confined : "${GENERATE[@]}" >"$WORK/out" 2>&1
    [ $? = 2 ] && grep -q TMPDIR "$WORK/out"
}
cache_full() {
    confined "$READABLE_TMP; mount -t tmpfs -o size=64k,mode=1777 tmpfs /srv; head -c 60k /dev/zero >/srv/x" \
        env NUMBA_CACHE_DIR=/srv "${GENERATE[@]}" >"$WORK/out" 2>&1 && grep -q "/srv/fastdecode" "$WORK/out"
}
long_tmpdir() {
    local long="/srv/$(printf 'x%.0s' {1..50})/$(printf 'y%.0s' {1..50})"
    confined "$READABLE_TMP; mount -t tmpfs tmpfs /srv; mkdir -p $long; chmod -R 777 /srv" \
        env TMPDIR="$long" "${GENERATE[@]}" --transport shm >"$WORK/out" 2>&1
}
full_tmpdir() {
    confined "mount -t tmpfs -o size=64k,mode=1777,nr_inodes=3 tmpfs /srv; $READABLE_TMP; head -c 64k /dev/zero >/srv/x || true" \
        env TMPDIR=/srv "${GENERATE[@]}" --transport shm >"$WORK/out" 2>&1
}
locale_c() {
    confined "$READABLE_TMP" env LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "${GENERATE[@]}" --prompt "é 漢" >"$WORK/out" 2>&1 &&
        grep -q "é 漢" "$WORK/out"
}
rworker_budget() {
    confined "mount -t tmpfs -o mode=1777 tmpfs /srv" "$BIN/fastdecode" rworker --bind shm:///srv/w --kv-cache-memory 900TiB \
        >"$WORK/out" 2>&1
    [ $? = 2 ] && grep -q -- "--kv-cache-memory" "$WORK/out"
}
emfile() {
    confined "$READABLE_TMP; ulimit -S -n 64; ulimit -H -n 64" "$BIN/fastdecode" serve "$MODEL" --port "$PORT" "${SMALL[@]}" >"$WORK/out" 2>&1 &
    local server=$!
    "$PYTHON" - "$PORT" <<'P'
import socket, sys, time, urllib.request
url = f"http://127.0.0.1:{sys.argv[1]}/health"
for _ in range(300):
    try:
        urllib.request.urlopen(url, timeout=1); break
    except OSError: time.sleep(0.5)
held = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), 3) for _ in range(100)]
time.sleep(5)
for one in held: one.close()
time.sleep(2)
urllib.request.urlopen(url, timeout=10)
P
    local asked=$?
    kill -TERM "$(pgrep -P $server)"; wait $server || return 1  # the child of the function's shell
    [ $asked = 0 ] && grep -q "new connections wait" "$WORK/out" && [ "$(wc -l <"$WORK/out")" -lt 60 ]
}

# deployed FILE: its containers or its command as written, but for sizes and the address; asked, and ended by SIGTERM.
kubernetes() { deployed kubernetes; }
kubernetes_r_workers() { deployed kubernetes_r_workers; }
systemd() { deployed systemd; }
deployed() {
    "$PYTHON" "$ROOT/bench/deployment_commands.py" "$1" --model "$MODEL" --port "$PORT" >"$WORK/commands" || return 1
    confined "mount -t tmpfs -o mode=1777 tmpfs /tmp; mount -t tmpfs -o uid=10001 tmpfs /run; mkdir -m 777 /run/fastdecode
        mount -t tmpfs tmpfs /var/cache; mkdir -m 777 /var/cache/fastdecode" sh -c "$(cat "$WORK/commands")" >"$WORK/out" 2>&1
}
dockerfile() {  # its COPY lines hold all that its second RUN builds; torch and the rest are those of this machine
    local context=$WORK/image
    mkdir -p "$context/site" && (cd "$ROOT" && sed -n 's/^COPY \(.*\) \(\.\/\|[a-z_]*\)$/\1/p' scripts/Dockerfile | xargs -n1 | xargs -I{} cp -r {} "$context/")
    "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --target "$context/site" "$context" >"$WORK/out" 2>&1 || return 1
    chmod -R a+rX "$context"
    confined "$READABLE_TMP" env -C / PYTHONPATH="$context/site" "$PYTHON" -m fastdecode generate "$MODEL" --prompt import --max-tokens 4 \
        --r-worker-threads 1 "${SMALL[@]}" >>"$WORK/out" 2>&1
}

ALL=(no_cache_dir read_only_root nothing_writable cache_full long_tmpdir full_tmpdir locale_c rworker_budget emfile kubernetes kubernetes_r_workers systemd dockerfile)
failed=0
printf '%-24s %-6s %s\n' case result seconds
for name in "${@:-${ALL[@]}}"; do
    began=$SECONDS
    if "$name"; then result=ok; else result=FAILS failed=1; fi
    printf '%-24s %-6s %s\n' "$name" "$result" $((SECONDS - began))
    [ $result = ok ] || tail -n ${LINES_SHOWN:-8} "$WORK/out" | sed 's/^/    /'
done
exit $failed
