#!/bin/sh
# header @SELF@
# A model and all that serves it. Install:  sh THIS_FILE      Help:  sh THIS_FILE --help
NAME='@NAME@' VERSION='@VERSION@' MACHINE='@MACHINE@' GLIBC='@GLIBC@' NEED_KB='@NEED_KB@' FILES='@FILES@'
HEADER_BYTES='@HEADER_BYTES@' SUMS='@SUMS@' SPLIT='@SPLIT@'
# One line for each part: its SHA-256 without the header, its size without the header.
PARTS='@PARTS@'

usage() {
    cat <<END
Usage: sh $0 [--dir DIR] [--skip-answer]
           install $NAME in DIR (default: $(default_dir))
       sh $0 --check
           is this file whole and sound? Installs nothing
       sh DIR/current/install.sh --check
           are the installed files sound, and is the answer the recorded one?
       sh DIR/current/install.sh --rollback
           go back to the version before

Needs $MACHINE, Linux with glibc $GLIBC or newer, $((NEED_KB / 1024)) MiB of disk; no Python, no network, no root.
--skip-answer does not start the model to compare its answer with the one that was recorded when it was packed.
END
}

say() { printf '%s\n' "$*"; }
die() { # what is wrong, what to do, exit code
    printf 'pack: %s\n' "$1" >&2
    [ -z "$2" ] || printf '  %s\n' "$2" >&2
    exit "${3:-70}"
}
default_dir() { if [ "$(id -u)" = 0 ]; then say "/opt/pagoda/$NAME"; else say "$HOME/pagoda/$NAME"; fi; }
sha() { set -- $(sha256sum) && say "$1"; }
bytes_of() { set -- $(wc -c <"$1") && say "$1"; }

part() { # number -> file
    if [ "$SPLIT" = 1 ]; then printf '%s.%03d' "${0%.001}" "$1"; else say "$0"; fi
}
part_bytes() { # number -> its bytes, without the header
    if [ "$1" = 1 ]; then tail -c +$((HEADER_BYTES + 1)) "$0"; else cat "$(part "$1")"; fi
}

check_tools() {
    for tool in cat cut df dirname du head id ln ls mkdir mv printf readlink rm sha256sum sleep sync tail tar uname wc; do
        command -v $tool >/dev/null || die "the command $tool is not here" "It is part of coreutils or tar" 69
    done
}
check_header() {
    [ -f "$0" ] || die "this must be run from its file" "Type: sh FILE" 78
    [ "$(bytes_of "$0")" -ge "$HEADER_BYTES" ] || die "$0 is cut off" "Copy it again" 65
    stated=$(head -c 83 "$0")
    found=$(head -c "$HEADER_BYTES" "$0" | tail -c +84 | sha)
    [ "$stated" = "$(printf '#!/bin/sh\n# header %s' "$found")" ] || die "$0 is damaged" "Copy it again" 65
}
check_sizes() {
    number=0
    for size in $(say "$PARTS" | cut -d ' ' -f 2); do
        number=$((number + 1)) file=$(part $number)
        [ -f "$file" ] || die "$file is missing" "Copy it to where the others are: all parts are needed" 66
        [ $number = 1 ] && size=$((size + HEADER_BYTES))
        found=$(bytes_of "$file")
        [ "$found" = "$size" ] || die "$file has $found bytes, not $size" "Copy it again" 65
    done
}
check_parts() {
    number=0 bad=
    for stated in $(say "$PARTS" | cut -d ' ' -f 1); do
        number=$((number + 1)) file=$(part $number)
        show "checking $file"
        [ "$(part_bytes $number | sha)" = "$stated" ] || bad="$bad $file"
    done
    show ''
    [ -z "$bad" ] || die "damaged:$bad" "Copy it again" 65
}

glibc_here() {
    set -- $(getconf GNU_LIBC_VERSION 2>/dev/null)
    if [ "$1" = glibc ]; then say "$2"; return; fi
    for loader in /lib64/ld-linux-x86-64.so.2 /lib/ld-linux-aarch64.so.1; do
        [ -x $loader ] || continue
        first=$($loader --version 2>/dev/null | head -n 1) || continue
        first=${first##* } && say "${first%.}" && return
    done
}
older() { # is version $1 older than $2?
    [ "${1%%.*}" -lt "${2%%.*}" ] && return 0
    [ "${1%%.*}" -eq "${2%%.*}" ] && [ "${1#*.}" -lt "${2#*.}" ]
}
check_machine() {
    [ "$(uname -s)" = Linux ] || die "this is $(uname -s); the pack is for Linux" "Install it on a Linux machine" 69
    [ "$(uname -m)" = "$MACHINE" ] || die "this machine is $(uname -m); the pack is for $MACHINE" \
        "Pack on a machine like this one" 69
    here=$(glibc_here)
    case $here in [0-9]*.[0-9]*) ;; *)
        die "no glibc was found here; the pack needs glibc $GLIBC or newer" "Alpine and other musl systems have none" 69 ;;
    esac
    ! older "$here" "$GLIBC" || die "this machine has glibc $here; the pack needs $GLIBC or newer" \
        "Use a newer system here, or pack on one as old as this" 69
}
check_disk() {
    place=$dir
    while [ ! -d "$place" ]; do place=$(dirname "$place"); done
    [ -w "$place" ] || die "you may not write to $place" "Name another folder (--dir DIR), or be root" 77
    set -- $(df -Pk "$place" | tail -n 1)
    [ "$4" -ge "$NEED_KB" ] || die "$((NEED_KB / 1024)) MiB are needed in $place, $(($4 / 1024)) MiB are free" \
        "Make room, or name a folder on another disk: --dir DIR" 74
}

live() { [ -t 2 ]; }
show() { ! live || printf '\r\033[2K%s' "$1" >&2; }
watch() { # until process $1 ends: how much of NEED_KB is in folder $2
    while live && kill -0 "$1" 2>/dev/null; do
        set -- "$1" "$2" $(du -sk "$2" 2>/dev/null)
        show "unpacking: $((${3:-0} * 100 / NEED_KB)) % of $((NEED_KB / 1024)) MiB"
        sleep 1
    done
    show ''
}
unpack() { # into folder $1
    number=0
    for size in $(say "$PARTS" | cut -d ' ' -f 2); do
        number=$((number + 1))
        part_bytes $number
    done | (cd "$1" && exec tar -xof -) &
    job=$!
    watch $job "$1"
    wait $job || die "the files could not be written" "See above; is the disk full? Is the pack whole: sh $0 --check" 74
    job=
}
check_files() { # are all files of folder $1 what they were when they were packed?
    [ -f "$1/SHA256SUMS" ] && [ "$(sha <"$1/SHA256SUMS")" = "$SUMS" ] || return 1
    (cd "$1" && sha256sum -c SHA256SUMS 2>&1) | {
        good=0
        while read -r line; do
            case $line in
            *': OK') good=$((good + 1)) && [ $((good % 50)) != 0 ] || show "checking files: $good of $FILES" ;;
            *': FAILED'*) show '' && say "pack: damaged: ${line%%: FAILED*}" >&2 ;;
            esac
        done
        show ''
        [ "$good" = "$FILES" ]
    }
}
check_answer() { # does the model in folder $1 say what it said where it was packed?
    "$1/bin/pagoda" pack --answer "$1"
}

write_config() { # the options of the server, with the place of the model, into folder $1
    while IFS= read -r line; do
        case $line in
        *@HERE@*) say "${line%%@HERE@*}$dir/current${line#*@HERE@}" ;;
        *) say "$line" ;;
        esac || return 1
    done <"$1/serve.yaml.in" >"$1/serve.yaml"
}
link_to() { # folder, name of the link: changes it in one step
    ln -s "versions/$1" "$dir/.$2.$$" && mv -T "$dir/.$2.$$" "$dir/$2" ||
        die "the link $dir/$2 cannot be changed" "See above" 74
}
target() { # name of a link -> the version it leads to
    [ ! -L "$dir/$1" ] || { link=$(readlink "$dir/$1") && say "${link#versions/}"; }
}
clean() { # what installers that were killed have left, and versions that no link leads to
    for path in "$dir"/versions/.*.part "$dir"/.current.* "$dir"/.previous.*; do
        owner=${path%.part} && owner=${owner##*.}
        { [ ! -e "$path" ] && [ ! -L "$path" ]; } || kill -0 "$owner" 2>/dev/null || rm -rf "$path"
    done
    for path in "$dir"/versions/*; do
        case ${path##*/} in "$(target current)" | "$(target previous)" | '*') ;; *) rm -rf "$path" ;; esac
    done
}

install_pack() {
    case $dir in /*) ;; *) dir=$PWD/$dir ;; esac
    case $dir in *[\"\\\'@]*) die "the folder's name $dir holds a quote, a backslash or @" "Name another one: --dir DIR" 78 ;; esac
    check_machine
    check_sizes
    new=$dir/versions/$VERSION
    if [ -d "$new" ] && check_files "$new"; then
        say "$VERSION is here already, and sound"
    else
        build
    fi
    old=$(target current)
    [ -z "$old" ] || [ "$old" = "$VERSION" ] || link_to "$old" previous
    link_to "$VERSION" current
    clean
    say "Installed: $dir/current"
    say "  serve it now       $dir/current/bin/pagoda serve"
    say "  keep it running    $dir/current/bin/pagoda service install --start"
    [ -z "$old" ] || [ "$old" = "$VERSION" ] || say "  back to before     sh $dir/current/install.sh --rollback (then restart the server)"
}
build() { # unpack, check and try beside what is there; only then does it get its name
    [ ! -d "$dir/versions" ] || clean
    check_disk
    stage=$dir/versions/.$VERSION.$$.part
    trap 'show ""; [ -z "$job" ] || kill "$job" 2>/dev/null; rm -rf "$stage"' EXIT
    trap 'exit 130' INT TERM HUP
    mkdir -p "$stage" || die "$stage cannot be made" "Name another folder: --dir DIR" 77
    unpack "$stage"
    check_files "$stage" || die "the pack is damaged: nothing was installed" "Copy it again, and see: sh $0 --check" 65
    head -c "$HEADER_BYTES" "$0" >"$stage/install.sh" && write_config "$stage" ||
        die "$stage cannot be written" "Is the disk full?" 74
    show 'compiling Python'
    "$stage/python/bin/python3" -I -m compileall -q "$stage/python/lib" >/dev/null 2>&1
    show ''
    "$stage/bin/pagoda" --version >/dev/null || die "the packed Python does not start here" "Its own words are above" 70
    [ "$skip" = 1 ] || check_answer "$stage" || die "the moved engine was not accepted: nothing was installed" \
        "To install it all the same: --skip-answer" 70
    sync -f "$stage" 2>/dev/null || sync
    rm -rf "$new" && mv -T "$stage" "$new" || die "$new cannot be written" "" 74
    trap - EXIT INT TERM HUP
}
rollback() {
    now=$(target current) && before=$(target previous)
    [ -n "$before" ] && [ "$before" != "$now" ] && [ -d "$dir/versions/$before" ] ||
        die "there is no version before this one in $dir" "" 66
    link_to "$before" current && link_to "$now" previous
    say "$dir/current is $before again (before: $now). Restart the server: $dir/current/bin/pagoda service restart"
}
check() {
    if [ -n "$installed" ]; then
        check_files "$dir/current" || die "the installed files are damaged" "Install it again" 65
        [ "$skip" = 1 ] || check_answer "$dir/current" || exit 70
        say "$dir/current is sound"
        return
    fi
    check_sizes
    check_parts
    say "$0 is sound: $NAME, version $VERSION"
}

main() {
    umask 022
    dir='' skip=0 verb=install_pack installed='' job=''
    while [ $# -gt 0 ]; do
        case $1 in
        --dir=*) dir=${1#--dir=} ;;
        --dir) [ $# -ge 2 ] || die "--dir needs a folder" "" 78; dir=$2 && shift ;;
        --skip-answer) skip=1 ;;
        --check) verb=check ;;
        --rollback) verb=rollback ;;
        -h | --help) usage && exit 0 ;;
        *) die "there is no option $1" "See: sh $0 --help" 78 ;;
        esac
        shift
    done
    check_tools
    check_header
    if [ "$(bytes_of "$0")" = "$HEADER_BYTES" ]; then # the copy in an installed version
        installed=$(cd "$(dirname "$0")" && pwd -P)
        [ -n "$dir" ] || dir=${installed%/versions/*}
        [ $verb != install_pack ] || die "$0 holds no files to install" "Run the pack itself; here: --check, --rollback" 78
    fi
    [ -n "$dir" ] || dir=$(default_dir)
    $verb
}
main "$@"
exit 0
