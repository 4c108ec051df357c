#!/usr/bin/env bash
# Downloads models of Llama 2 or Code Llama, and checks every file against the published checksums.
# Asks for the link that Meta mails to those who accepted the licence, and for the models, separated by commas:
#   7B,13B,70B,7B-chat,13B-chat,70B-chat (none means all of these), or
#   CodeLlama-7b, -13b, -34b, -70b, each also with -Python or -Instruct appended.
# Run it again to go on after an interruption: it resumes partial files and skips verified ones. Variables:
#   PRESIGNED_URL       the link from the mail, with the * that stands in it; by default it is asked for
#   MODEL_SIZE          the models, "all" or empty for all of Llama 2; by default they are asked for
#   TARGET_FOLDER=.     where the files go
#   RETRIES=5           failures in a row, without a byte gained, that are tried again
#   RETRY_DELAY=2       seconds before the first of them; doubles each time, up to 60
#   STALL_SECONDS=60    silence (with curl also: less than 1 KB/s) after which a connection counts as broken
#   SKIP_SPACE_CHECK=1  does not look at the free disk space first
# Sizes on disk: 7B 13 GB, 13B 25 GB, 34B 63 GB, 70B 130 GB. It needs bash 3.2 (macOS) or later, curl or GNU wget 1,
# md5sum or macOS's md5, and df. Status: 0 all there and verified, 1 something failed, 2 wrong usage, 130 interrupted.

if [ -z "${BASH_VERSION:-}" ]; then # as in `sh download.sh`
  command -v bash >/dev/null || echo 'error: bash is not installed. Install it, and run: bash download.sh' >&2
  exec bash "$0" "$@"
fi
set -u +a -o pipefail -o noglob
export LC_ALL=C # the output of df, wget and tr is read by machine
AGAIN='Run this again: it goes on from what is already here.' KEPT='What is already here is kept.' tty_settings=''
LLAMA_2='7B,13B,70B,7B-chat,13B-chat,70B-chat' CODE='CodeLlama-{7b,13b,34b,70b}[-Python|-Instruct]'
PAGE=https://ai.meta.com/resources/models-and-libraries/llama-downloads/

say() { printf '%s\n' "$*"; }
warn() { say "$@" >&2; }
die() { warn "error: $*" && exit 1; }
usage_error() { warn "error: $*" && warn 'download.sh --help says how it is used.' && exit 2; }
interrupted() { # status
  [ -z "$tty_settings" ] || stty "$tty_settings" # set while the terminal does not echo
  warn '' && warn "Interrupted. $AGAIN" && exit "$1"
}
ask() { # variable question
  [ -t 0 ] || usage_error "$1 is not set, and there is no terminal to ask for it on. Set the variable $1."
  printf '%s: ' "$2" >&2
}
make_folder() { { mkdir -p "$1" && [ -w "$1" ]; } || die "cannot make, or write to, the folder $1. Set TARGET_FOLDER"; }
size_of() { if [ -f "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi; }
set_files() { # model; sets gigabytes and names of its shards
  case $1 in
    *-7b*) gigabytes=13 shards=(consolidated.00.pth) ;;
    *-13b*) gigabytes=25 shards=(consolidated.0{0,1}.pth) ;;
    *-34b*) gigabytes=63 shards=(consolidated.0{0,1,2,3}.pth) ;;
    *) gigabytes=130 shards=(consolidated.0{0,1,2,3,4,5,6,7}.pth) ;;
  esac
}
listed_md5() { # checklist name; prints the checksum, if there is one. * is md5sum's mark for binary mode
  [ ! -f "$1" ] || tr -d '\r' <"$1" | sed -n "s|^\([0-9a-f]\{32\}\)  *\*\{0,1\}\(\./\)\{0,1\}$2\$|\1|p" | tail -n 1
}
matches() { # file md5; a tool that fails is no mismatch: it must not cost a file of many gigabytes
  local sum
  if [ "$md5_tool" = md5 ]; then sum=$(md5 -r "$1"); else sum=$(md5sum <"$1"); fi
  [[ ${sum%% *} =~ ^[0-9a-f]{32}$ ]] || die "$md5_tool could not read $1. $AGAIN"
  [ "${sum%% *}" = "$2" ]
}

# One request; sets http_status (000: no answer) and tool_status. The first * of the link stands for the path. Neither
# the list of processes nor any file shows the link: it goes over standard input (here-strings are files in old shells),
# curl's own settings, which may ask for a trace, are left out, and of wget's log only the status lines are read.
request() { # path file
  local link=${url%%\**}$1${url#*\*} meter='' log
  [[ $1 == *.pth && -t 2 ]] && meter=yes
  if [ "$downloader" = curl ]; then
    http_status=$(printf 'url = "%s"\n' "$link" | curl -q --config - --globoff --location --fail \
      "--${meter:+no-}silent" --connect-timeout "$STALL_SECONDS" --speed-limit 1000 --speed-time "$STALL_SECONDS" \
      --continue-at - --output "$2" --write-out '%{http_code}')
    tool_status=$?
  else
    [[ $meter$wget_help == yes*--show-progress* ]] && meter=--show-progress || meter=--quiet
    log=$(printf '%s\n' "$link" | wget --quiet "$meter" --server-response --tries=1 --timeout="$STALL_SECONDS" \
      --continue --output-document="$2" --output-file=- --input-file=-)
    tool_status=$?
    http_status=$(printf '%s\n' "$log" | sed -n 's|^ *HTTP/[0-9.]* *\([0-9][0-9][0-9]\).*|\1|p' | tail -n 1)
  fi
}

# Brings FILE to its full length, in as many requests as it takes; only failures without a byte gained count. Status
# 416: there is nothing beyond what FILE holds. What trying again cannot mend, a refusal or a failure here, is an error.
transfer() { # path file
  local failures=0 delay=$RETRY_DELAY best size what status tool
  best=$(size_of "$2")
  while request "$1" "$2"; do
    [ -s "$2" ] || rm -f "$2"
    status="(status $http_status)" tool="$downloader exit status $tool_status" size=$(size_of "$2")
    case $downloader-$tool_status-${http_status:-000}-$size in
      *-0-2??-[1-9]* | *-416-[1-9]*) return ;;
      curl-23-* | wget-3-*) die "$1: cannot write to $target. Is the disk full, or the folder read-only? $AGAIN" ;;
      curl-51-* | curl-60-* | curl-77-* | wget-5-*) die "$1: the server's certificate is not trusted. Is this" \
        "machine's clock right? Does a proxy stand in between? $AGAIN" ;;
      curl-[123]-* | wget-2-* | *-12[67]-*) die "$1: $downloader does not work here, or cannot be started ($tool)." ;;
      curl-33-*) rm -f "$2" && what='the server cannot resume; starting over' ;;
      *-000-*) what="the server cannot be reached ($tool; check network and proxy)" ;;
      *-2??-*) what='the connection breaks off' ;;
      *-408-* | *-416-* | *-425-* | *-429-* | *-5??-*) what="the server is in trouble $status. Try again later" ;;
      *-401-* | *-403-*) die "$1: the server refuses the link $status. It has expired (after 24 hours), was used up," \
        "or is for another model. Ask for a new one at $PAGE and run this again with it. $KEPT" ;;
      *-404-* | *-410-*) die "$1: no such file on the server $status. Either the link is not for this model: compare" \
        "the name with those in the mail; or the link was cut or changed: copy it whole. $KEPT" ;;
      *) die "$1: the server does not understand the link $status. Copy it whole from the mail. $KEPT" ;;
    esac
    failures=$((failures + 1))
    [ "$size" -le "$best" ] || best=$size failures=0 delay=$RETRY_DELAY
    [ "$failures" -le "$RETRIES" ] || die "$1: $what. $AGAIN"
    warn "  $1: $what; trying again in $delay s"
    sleep "$delay"
    delay=$((delay * 2 < 60 ? delay * 2 : 60))
  done
}

# Resumes FILE.part, verifies it if it has a checksum, and gives it its name. If it fails, it is fetched once more.
fetch() { # path file md5
  local try
  for try in once twice; do
    say "$1: downloading, $(($(size_of "$2.part") / 1000000)) MB are here"
    transfer "$1" "$2.part"
    if [ -z "$3" ] || matches "$2.part" "$3"; then
      mv -f "$2.part" "$2" || die "cannot rename $2.part."
      say "$1: ${3:+verified, }done" && return
    fi
    rm -f "$2.part"
    warn "$1: corrupt $try: its checksum is not the published one"
  done
  die "$1: corrupt twice in a row, and deleted. Does a proxy change it? Try another network, or later. $AGAIN"
}
fetch_plain() { [ -s "$target/$2" ] || { rm -f "$target/$2.part" && fetch "$1" "$target/$2" ''; }; } # path name

# Brings files to the state that a checklist describes. A whole set needs no network; otherwise the checklist is fetched
# anew, so that a damaged one condemns no good file. It replaces the old one only if it is one, not, say, a login page.
# A file that does not match may be the beginning of one: it is resumed.
fetch_set() { # folder checklist name...
  local list=$target/$1$2 name file md5 good=' ' n=2 # good: the files that matched the old checklist, with their sums
  for name in "${@:3}"; do
    file=$target/$1$name md5=$(listed_md5 "$list" "$name")
    [ -n "$md5" ] && [ -f "$file" ] && matches "$file" "$md5" && good+="$name=$md5 " n=$((n + 1))
  done
  if [ "$n" -lt $# ]; then
    rm -f "$list.part"
    transfer "$1$2" "$list.part"
    for name in "${@:3}"; do
      [ -n "$(listed_md5 "$list.part" "$name")" ] || { rm -f "$list.part" && die "$1$2: what came is no checklist of" \
        "${*:3}. Does the network answer in the server's place (a login page)? $KEPT"; }
    done
    mv -f "$list.part" "$list"
  fi
  for name in "${@:3}"; do
    file=$target/$1$name md5=$(listed_md5 "$list" "$name")
    if [[ $good == *" $name=$md5 "* ]] || { [ -f "$file" ] && matches "$file" "$md5"; }; then
      say "$1$name: already verified"
    else
      [ ! -f "$file" ] || mv -f "$file" "$file.part"
      fetch "$1$name" "$file" "$md5"
    fi
  done
}

if [[ ${1-} == -h || ${1-} == --help ]]; then sed -n '/^# Downloads/,/^$/s/^# \{0,1\}//p' "$0" && exit; fi
[ -z "${1-}" ] || usage_error 'the only argument is --help. Settings are variables.'
: "${RETRIES:=5}" "${RETRY_DELAY:=2}" "${STALL_SECONDS:=60}"
for name in RETRIES RETRY_DELAY STALL_SECONDS; do # a leading zero would mean octal
  [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || usage_error "$name must be a whole number."
done
trap 'interrupted 129' HUP && trap 'interrupted 130' INT && trap 'interrupted 143' TERM

# The link is a secret: it is not echoed, no child inherits it, and request() hands it over unseen. Taken out is what
# mail programs, terminals and shells put in: blanks, quotes, brackets, backslashes, &amp;, %2A.
declare +x url=${PRESIGNED_URL:-} # not exported, even where the caller exports a variable of that name
unset PRESIGNED_URL
if [ -z "$url" ]; then
  ask PRESIGNED_URL 'Paste the URL from the mail and press Enter (it is not shown)'
  tty_settings=$(stty -g 2>/dev/null)
  IFS= read -r -s -n 16384 url || die 'no URL was given.' # by lines, without -n, macOS takes no more than 1024
  while IFS= read -r -s -t 1 -n 16384 more; do url=$url$more; done # what follows within a second: a wrapped link
  tty_settings='' && warn ''
fi
url=$(printf '%s' "$url" | tr -cd '!-~' | tr -d "\"'\`<>\\\\" | sed -e 's/&amp;/\&/g' -e '/\*/!s/%2[Aa]/*/')
[[ $url == http://?* || $url == https://?* ]] ||
  usage_error 'the URL is empty, or does not begin with http:// or https://. Copy the whole link from the mail.'
[[ ${url%%\?*} == *\** ]] || usage_error 'the URL has no * before its ?. Copy the text of the link in the mail, not' \
  'the address behind it: it begins with https://download.llamameta.net/* and the * must stay.'

# The models: the names of their folders, each once.
if [ -z "${MODEL_SIZE+set}" ]; then
  ask MODEL_SIZE "Models to download ($LLAMA_2; $CODE), or Enter for all of Llama 2"
  IFS= read -r MODEL_SIZE || die 'no answer was given.'
fi
[[ ${MODEL_SIZE//[[:space:],]/} =~ ^([Aa][Ll][Ll])?$ ]] && MODEL_SIZE=$LLAMA_2
models=' '
for name in $(printf '%s' "$MODEL_SIZE" | tr ',\rA-Z' '  a-z'); do
  [ "${#name}" -le 22 ] || usage_error 'MODEL_SIZE holds something that is no model name.' # perhaps the link: not shown
  if [[ $name =~ ^(7|13|70)b(-chat)?$ ]]; then
    name=llama-2-$name
  elif [[ $name =~ ^codellama-(7|13|34|70)b(-python|-instruct)?$ ]]; then
    name=${name/codel/CodeL} name=${name/-p/-P} name=${name/-i/-I}
  else
    usage_error "unknown model '$name'. The models are $LLAMA_2, and $CODE."
  fi
  [[ $models == *" $name "* ]] || models+="$name "
done

target=${TARGET_FOLDER:-.}
[[ $target != \~ && $target != \~/* ]] || target=$HOME${target#\~} # in quotes, the shell leaves it as it is
[[ $target == . || $target == /* ]] || target=./$target # a name that begins with a dash is no option
downloader=curl md5_tool=md5sum
command -v curl >/dev/null || downloader=wget
command -v "$downloader" >/dev/null || die 'neither curl nor wget is installed. Install one of them.'
[ "$downloader" = curl ] || wget_help=$(wget --help 2>&1)
[[ $downloader == curl || ($wget_help == *--input-file* && $wget_help != *Wget2*) ]] || # Wget2 hangs at a piped link
  die 'this wget cannot be handed the link unseen (BusyBox? Wget2?). Install curl or GNU wget 1.'
command -v md5sum >/dev/null || md5_tool=md5
command -v "$md5_tool" >/dev/null || die 'neither md5sum nor md5 is installed, to verify files. Install one of them.'
make_folder "$target"

# The free KiB, compared with those of the shards that are still to come. The other files are small.
need=0
for model in $models; do
  set_files "$model"
  for name in "${shards[@]}"; do
    file=$target/$model/$name
    [ -f "$file" ] || need=$((need + gigabytes * 1048576 / ${#shards[@]} - $(size_of "$file.part") / 1024))
  done
done
if [ "${SKIP_SPACE_CHECK:-0}" != 1 ] && [ "$need" -gt 0 ]; then
  # The fourth column, found by the percentage after it: the columns before it may hold blanks.
  free=$(df -Pk "$target" 2>/dev/null | sed -n '2s/^.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*$/\1/p')
  [ -n "$free" ] || warn "warning: free space in $target could not be read. About $((need / 1048576)) GB are needed."
  [ "${free:-$need}" -ge "$need" ] || die "not enough disk space in $target: about" \
    "$(((need + 1048575) / 1048576)) GB are still to come, $((free / 1048576)) GB are free. Free some, choose fewer" \
    "models, or set TARGET_FOLDER to another disk. (SKIP_SPACE_CHECK=1 goes on regardless.)"
fi

[[ $models != *llama-2-* ]] || fetch_set '' tokenizer_checklist.chk tokenizer.model
licence=LICENSE
[ ! "$target/download.sh" -ef "$0" ] || licence=LICENSE-llama-2 # in a clone, LICENSE is this library's own
fetch_plain LICENSE "$licence"
fetch_plain USE_POLICY.md USE_POLICY.md
for model in $models; do
  set_files "$model"
  make_folder "$target/$model"
  fetch_set "$model/" checklist.chk params.json "${shards[@]}"
  [[ $model == CodeLlama-* ]] || continue # each of these has a tokenizer of its own
  if [ -n "$(listed_md5 "$target/$model/checklist.chk" tokenizer.model)" ]; then
    fetch_set "$model/" checklist.chk tokenizer.model
  else
    fetch_plain "$model/tokenizer.model" "$model/tokenizer.model"
  fi
done
say "Done: all files are in $target and verified."
