# What the machine of tests/power_cut.rs does: steps that the test names on the console, one a line.
# /dev/vda has the file system that loses its power, /dev/vdb the base image, /dev/vdc takes what the
# test is to see. A session disk is /mnt/NUMBER/disk, each provision a new number.
set +e
mkdir -p /run
mount -t tmpfs run /run
mount -t KIND /dev/vda /mnt || exit 1
base=/mnt/base
dir=

# A wait for what programs have printed: await FILE WORDS
await() {
    tries=0
    until grep -q "$2" "$1" 2>/dev/null; do
        tries=$((tries + 1))
        if [ $tries -gt 3000 ]; then
            say "trouble: no '$2' in $1:"
            cat "$1" >/dev/console
            return 1
        fi
        usleep 20000
    done
}

# post FILE: hands a file to the test.
post() {
    size=$(stat -c %s "$1")
    dd if="$1" of=/dev/vdc bs=1M oflag=direct 2>/dev/null && say "post $size"
}

# make_base OFFSET:LENGTH...: in MiB, where the base has data.
make_base() {
    truncate -s "$(blockdev --getsize64 /dev/vdb)" $base
    for range; do
        at=${range%:*}
        dd if=/dev/vdb of=$base bs=1M skip="$at" seek="$at" count="${range#*:}" conv=notrunc 2>/dev/null
    done
    sync
}

# provision NUMBER [--lazy]: when it is done, the disk before goes.
provision() {
    mkdir "/mnt/$1"
    sync
    pristine provision --base $base --disk "/mnt/$1/disk" $2 >/run/out 2>&1 || { cat /run/out >/dev/console; return 1; }
    say "provisioned $1"
    before=$dir
    dir=/mnt/$1
    [ -z "$before" ] || forget "$before"
}

# forget DIRECTORY: first of all what makes it a disk.
forget() {
    rm -f "$1/disk.pristine/manifest"
    sync
    rm -rf "$1"
}

# Says which disks there are: disk NUMBER ready|unfinished
list() {
    for found in /mnt/[0-9]*; do
        [ -d "$found" ] || continue
        if [ -e "$found/disk.pristine/manifest" ]; then
            say "disk ${found##*/} ready"
        else
            say "disk ${found##*/} unfinished"
            rm -rf "$found"
        fi
    done
}

# choose NUMBER: the disk that the next steps are about.
choose() { dir=/mnt/$1; }

# inspect NUMBER: the state that a power cut has left.
inspect() {
    dir=/mnt/$1
    {
        echo "status $(pristine status --disk "$dir/disk" --json)"
        echo "verify $(pristine verify --disk "$dir/disk" --json)"
        for log in "$dir"/disk.pristine/sessions/*.wlog; do
            uuid=${log##*/}
            uuid=${uuid#*-}
            # Retired logs do not count.
            grep -q "${uuid%.wlog}" "$dir/disk.pristine/manifest" &&
                echo "log $(pristine log show "$log" --json)"
        done
    } >/run/report 2>/run/errors
    post /run/report
}

# read_back BYTE-OFFSET...: serves the disk as the cut has left it, and reads blocks of it.
read_back() {
    serve || return 1
    {
        echo "connect 1"
        for at; do echo "compare $at 4096 $base"; done
    } | vhost-client /run/socket >/run/client 2>&1
    stop
    same=$(grep -c "^ok same" /run/client)
    [ "$same" = $# ] || cat /run/client >/dev/console
    say "same $same"
}

restore() {
    pristine restore --disk "$dir/disk" >/run/out 2>&1
    code=$?
    [ $code = 0 ] || cat /run/out >/dev/console
    say "restored $code"
    return $code
}

# What is on the medium, not what is in the page cache.
verify() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    pristine verify --disk "$dir/disk" >/run/out 2>&1
    say "verified $?"
    post "$dir/disk"
}

serve() {
    : >/run/server
    pristine serve --disk "$dir/disk" --socket-path /run/socket "$@" >>/run/server 2>&1 &
    server=$!
    await /run/server listening
}

# storm SEED OFFSET LENGTH: a session that writes until it is ended.
storm() {
    rm -f /run/orders
    mkfifo /run/orders
    : >/run/client
    vhost-client /run/socket </run/orders >>/run/client 2>&1 &
    client=$!
    exec 7>/run/orders
    echo "connect 2" >&7
    echo "storm $*" >&7
    await /run/client "ok storming"
}

# The VM is killed: its session ends.
end() {
    kill -9 $client
    wait $client 2>/dev/null
    exec 7>&-
}

# The server is killed in mid-session, then its VM.
crash() {
    kill -9 $server
    wait $server 2>/dev/null
    end
}

stop() {
    kill $server
    wait $server
}

# dirty COUNT: waits until the session has written so many blocks.
dirty() {
    while :; do
        dirty=$(pristine status --disk "$dir/disk" --json | sed 's/.*"dirty_blocks":\([0-9]*\).*/\1/')
        [ "$dirty" -ge "$1" ] && return
    done
}

wait_a_while() { sleep 3; }

drained() { await /run/server "restored"; }

# pressure data|all|kernel|none...: how a session's data comes to be on the medium before the cut.
# `data` and `all` flush the disk as well, `kernel` does not.
pressure() {
    [ -z "$presser" ] || kill $presser
    presser=
    echo 3000 >/proc/sys/vm/dirty_expire_centisecs
    echo 500 >/proc/sys/vm/dirty_writeback_centisecs
    for kind; do
        case $kind in
            data) while :; do sync -d "$dir/disk"; usleep 3000; done & presser=$! ;;
            all) while :; do sync -f /mnt; usleep 10000; done & presser=$! ;;
            kernel)
                echo 1 >/proc/sys/vm/dirty_writeback_centisecs
                echo 1 >/proc/sys/vm/dirty_expire_centisecs
                ;;
        esac
    done
}

flush() { sync -d "$dir/disk"; }

# The session's data is on the medium; from now on only what pristine syncs gets there.
relax() {
    flush
    pressure none
}

say ready
while read -r line; do
    [ "$line" = off ] && break
    $line
    say "done $?"
done
