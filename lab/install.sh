#!/bin/bash
# Which Debian packages does this machine lack, and how do they come without starting a service?
#
#   lab/install.sh demo|test      installs what the demonstration, or the tests and the benchmark, need
#   lab/install.sh python         prints the Python (>= 3.11) to build the virtual environment with
#
# A package is asked for only when the file it brings is missing: a repeated run does nothing and needs no network.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# what must be there (a command on the path, or a file): the package that brings it
build=(gcc:gcc /usr/include/stdlib.h:libc6-dev clang:clang llvm-objdump:llvm
    /usr/include/bpf/bpf.h:libbpf-dev /usr/include/libelf.h:libelf-dev /usr/include/zlib.h:zlib1g-dev)
demo=("${build[@]}" ip:iproute2 ethtool:ethtool nft:nftables curl:curl)
test=("${demo[@]}" wget:wget nc:netcat-openbsd sshd:openssh-server scp:openssh-client git:git iperf3:iperf3
    redis-server:redis-server redis-benchmark:redis-tools /usr/lib/postgresql:postgresql wrk:wrk
    haproxy:haproxy socat:socat nginx:nginx-light /usr/lib/nginx/modules/ngx_stream_module.so:libnginx-mod-stream)

present() {
    case $1 in
    /*) [ -e "$1" ] ;;
    *) command -v "$1" >/dev/null ;;
    esac
}

suitable() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local name
    for name in "${PYTHON:-python3}" python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
        if suitable "$name"; then
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

# The packages that the chosen Python lacks for building extensions and virtual environments.
python_packages() {
    local python
    python=$(find_python) || {
        echo python3 python3-dev python3-venv
        return
    }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
        echo "$("$python" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')"
}

install() {
    local policy=/usr/sbin/policy-rc.d
    echo "installing Debian packages: $*"
    export DEBIAN_FRONTEND=noninteractive
    # A web server or database that a package starts by itself has no business on this machine.
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
        trap "rm -f $policy" EXIT
    fi
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

case ${1:-} in
python)
    find_python || {
        echo "no Python 3.11 or newer was found: name one with PYTHON=/path/to/python3 make ..." >&2
        exit 1
    }
    exit
    ;;
demo) wanted=("${demo[@]}") ;;
test) wanted=("${test[@]}") ;;
*)
    echo "usage: $0 demo|test|python" >&2
    exit 2
    ;;
esac

missing=()
for pair in "${wanted[@]}"; do
    present "${pair%%:*}" || missing+=("${pair#*:}")
done
mapfile -t -O "${#missing[@]}" missing < <(python_packages)
if [ ${#missing[@]} -gt 0 ]; then
    install "${missing[@]}"
fi
