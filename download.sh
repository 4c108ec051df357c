#!/usr/bin/env bash
# Downloads models of Llama 2 or Code Llama, and checks every file against the published checksums.
# Asks for the link that Meta mails to those who accepted the licence, and for the models, separated by commas:
#   7B,13B,70B,7B-chat,13B-chat,70B-chat (none means all of these), or
#   CodeLlama-7b, -13b, -34b, -70b, each also with -Python or -Instruct behind it.
# Run it again to go on after an interruption: it resumes partial files and skips verified ones.
#
# Without a terminal, or to be asked nothing, set PRESIGNED_URL (the link from the mail, with the * that stands in it),
# MODEL_SIZE (the models; "all" or empty means all of Llama 2) and TARGET_FOLDER (default: the current folder):
#   PRESIGNED_URL='https://download.llamameta.net/*?Policy=...' MODEL_SIZE=7B,7B-chat ./download.sh
# More variables:
#   RETRIES=5           failures in a row, without a byte gained, that are tried again
#   RETRY_DELAY=2       seconds before the first of them; doubles each time, up to 60
#   STALL_SECONDS=60    silence (with curl also: less than 1 KB/s) after which a connection counts as broken
#   SKIP_SPACE_CHECK=1  does not look at the free disk space first
#
# Sizes on disk: 7B 13 GB, 13B 25 GB, 34B 63 GB, 70B 130 GB. It needs bash 3.2 (macOS) or later, curl or GNU wget 1,
# md5sum or macOS's md5, and df. Status: 0 all there and verified, 1 something failed, 2 wrong usage, 130 interrupted.

if [ -z "${BASH_VERSION:-}" ]; then # as in `sh download.sh`
  command -v bash >/dev/null || echo 'error: bash is not installed. Install it, and run: bash download.sh' >&2
  exec bash "$0" "$@"
fi
set -u +a -o pipefail -o noglob
export LC_ALL=C # the output of df, wget and tr is read by machine
LLAMA_2='7B,13B,70B,7B-chat,13B-chat,70B-chat' CODE='CodeLlama-{7b,13b,34b,70b}[-Python|-Instruct]'
KEPT='What is already here is kept.' AGAIN='Run this again: it goes on from what is already here.'

say() { printf '%s\n' "$*"; }
warn() { say "$@" >&2; }
die() { warn "error: $*" && exit 1; }
usage_error() { warn "error: $*" && warn 'download.sh --help says how it is used.' && exit 2; }
ask() { # variable question
  [ -t 0 ] || usage_error "$1 is not set, and there is no terminal to ask for it on. Set the variable $1."
  printf '%s: ' "$2" >&2
}
tty_settings='' # set while the terminal does not echo
interrupted() { # status
  [ -z "$tty_settings" ] || stty "$tty_settings"
  warn '' && warn "Interrupted. $AGAIN" && exit "$1"
}

# The answer is not echoed, lest the link stay in a terminal's history. -n reads character by character: line by line,
# macOS takes no more than 1024. What follows within a second belongs to a link that was wrapped.
ask_url() {
  local more
  ask PRESIGNED_URL 'Paste the URL from the mail and press Enter (it is not shown)'
  tty_settings=$(stty -g 2>/dev/null)
  IFS= read -r -s -n 16384 url || die 'no URL was given.'
  while IFS= read -r -s -t 1 -n 16384 more; do url=$url$more; done
  tty_settings='' && warn ''
}

# The link is a secret: no child inherits it, and request() hands it over unseen. Taken out is what mail programs,
# terminals and shells put in: blanks, quotes, brackets, backslashes, &amp;, %2A.
take_url() {
  unset url # or it would be exported, where the caller exports a variable of that name
  url=${PRESIGNED_URL:-}
  unset PRESIGNED_URL
  [ -n "$url" ] || ask_url
  url=$(printf '%s' "$url" | tr -cd '!-~' | tr -d "\"'\`<>\\\\" | sed -e 's/&amp;/\&/g' -e '/\*/!s/%2[Aa]/*/')
  [ -n "$url" ] || usage_error 'the URL is empty. Paste the link from the mail.'
  [[ $url == http://?* || $url == https://?* ]] ||
    usage_error 'the URL does not begin with http:// or https://. Copy the whole link from the mail.'
  [[ ${url%%\?*} == *\** ]] || usage_error 'the URL has no * before its ?. Copy the text of the link in the mail, not' \
    'the address behind it: it begins with https://download.llamameta.net/* and the * must stay.'
}

# Sets models: the names of the folders, each once. A name too long for a model may be a piece of the link: not shown.
take_models() {
  local IFS=$' ,\t\r\n' wanted=${MODEL_SIZE-} known=$LLAMA_2 size name folder found
  if [ -z "${MODEL_SIZE+set}" ]; then
    ask MODEL_SIZE "Models to download ($LLAMA_2; $CODE), or Enter for all of Llama 2"
    IFS= read -r wanted || die 'no answer was given.'
  fi
  for size in 7b 13b 34b 70b; do known+=" CodeLlama-$size CodeLlama-$size-Python CodeLlama-$size-Instruct"; done
  shopt -s nocasematch
  [[ ${wanted//[[:space:],]/} =~ ^(all)?$ ]] && wanted=$LLAMA_2
  models=' '
  for name in $wanted; do
    [ -n "$name" ] || continue # between two commas
    [ "${#name}" -le 22 ] || usage_error 'MODEL_SIZE holds something that is no model name.'
    found=''
    for folder in $known; do [[ $folder != "$name" ]] || found=$folder; done
    [ -n "$found" ] || usage_error "unknown model '$name'. The models are $LLAMA_2, and $CODE."
    case $found in [0-9]*) found=llama-2-${found/B/b} ;; esac
    case $models in *" $found "*) ;; *) models+="$found " ;; esac
  done
  shopt -u nocasematch
}

take_target() {
  target=${TARGET_FOLDER:-.}
  case $target in
    /* | .) ;;
    \~ | \~/*) target=$HOME${target#\~} ;; # in quotes, the shell leaves it as it is
    *) target=./$target ;; # a name that begins with a dash is no option
  esac
}

pick_tools() {
  downloader=curl md5_tool=md5sum
  if ! command -v curl >/dev/null; then
    command -v wget >/dev/null || die 'neither curl nor wget is installed. Install one of them.'
    downloader=wget wget_help=$(wget --help 2>&1)
    [[ $wget_help == *--input-file* && $wget_help != *Wget2* ]] || # Wget2 hangs at a link on its standard input
      die 'this wget cannot be handed the link unseen (BusyBox? Wget2?). Install curl or GNU wget 1.'
  fi
  command -v md5sum >/dev/null || md5_tool=md5
  command -v "$md5_tool" >/dev/null || die 'neither md5sum nor md5 is installed, to verify files. Install one of them.'
}

make_folder() {
  mkdir -p "$1" && [ -w "$1" ] && return
  die "cannot make the folder $1, or write to it. Set TARGET_FOLDER to one that you may write to."
}
size_of() { if [ -f "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi; }
set_sizes() { # folder; sets shards and gigabytes
  case $1 in
    *-7b*) shards=1 gigabytes=13 ;;
    *-13b*) shards=2 gigabytes=25 ;;
    *-34b*) shards=4 gigabytes=63 ;;
    *) shards=8 gigabytes=130 ;;
  esac
}

# Compares the free KiB with those of the shards that are still to come. The other files are small.
require_space() {
  local model i part need=0 free
  for model in $models; do
    set_sizes "$model"
    for ((i = 0; i < shards; i++)); do
      [ -f "$target/$model/consolidated.0$i.pth" ] && continue
      part=$((gigabytes * 1048576 / shards - $(size_of "$target/$model/consolidated.0$i.pth.part") / 1024))
      need=$((need + (part > 0 ? part : 0)))
    done
  done
  [ "${SKIP_SPACE_CHECK:-0}" != 1 ] && [ "$need" -gt 0 ] || return 0
  # The fourth column, found by the percentage after it: the columns before it may hold blanks.
  free=$(df -Pk "$target" 2>/dev/null | sed -n '2s/^.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*$/\1/p')
  if [ -z "$free" ]; then
    warn "warning: how much space is free in $target could not be read. About $((need / 1048576)) GB are needed."
  elif [ "$free" -lt "$need" ]; then
    die "not enough disk space in $target: about $(((need + 1048575) / 1048576)) GB are still to come," \
      "$((free / 1048576)) GB are free. Free some, choose fewer models, or set TARGET_FOLDER to another disk." \
      "(SKIP_SPACE_CHECK=1 goes on regardless.)"
  fi
}

is_md5() { [[ $1 =~ ^[0-9a-f]{32}$ ]]; }
listed_md5() { # checklist name; prints the checksum, or fails. * is md5sum's mark for binary mode
  local sum name rest
  [ -f "$1" ] && while read -r sum name rest || [ -n "$sum" ]; do
    name=${name%$'\r'} name=${name#\*}
    if [ "${name#./}" = "$2" ] && [ -z "$rest" ] && is_md5 "$sum"; then say "$sum" && return; fi
  done <"$1"
  return 1
}
matches() { # file md5; a tool that fails is no mismatch: it must not cost a file of many gigabytes
  local sum
  if [ "$md5_tool" = md5 ]; then sum=$(md5 -r "$1"); else sum=$(md5sum <"$1"); fi
  is_md5 "${sum%% *}" || die "$md5_tool could not read $1. $AGAIN"
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
    http_status=${http_status:-000}
  fi
}

# Sets what: why a request failed. Ends with an error if trying again cannot mend it: a refusal, or a failure here.
judge() { # path
  local page=https://ai.meta.com/resources/models-and-libraries/llama-downloads/ status="(status $http_status)"
  case $downloader-$tool_status in
    curl-23 | wget-3) die "$1: cannot write to $target. Is the disk full, or the folder read-only? $AGAIN" ;;
    curl-51 | curl-60 | curl-77 | wget-5) die "$1: the server's certificate is not trusted. Is this machine's clock" \
      "right? Does a proxy stand in between? $AGAIN" ;;
    curl-[123] | wget-2) die "$1: $downloader does not work here (exit status $tool_status)." ;;
    *-12[67]) die "$1: $downloader cannot be started (exit status $tool_status)." ;;
  esac
  case $http_status in
    000) what="the server cannot be reached ($downloader exit status $tool_status; check network and proxy)" ;;
    2??) what='the connection breaks off' ;;
    408 | 416 | 425 | 429 | 5??) what="the server is in trouble $status. Try again later" ;;
    401 | 403) die "$1: the server refuses the link $status. It has expired (after 24 hours), was used up, or is" \
      "for another model. Ask for a new one at $page and run this again with it. $KEPT" ;;
    404 | 410) die "$1: no such file on the server $status. Either the link is not for this model: compare the name" \
      "with those in the mail; or the link was cut or changed: copy it whole. $KEPT" ;;
    *) die "$1: the server does not understand the link $status. Copy it whole from the mail. $KEPT" ;;
  esac
}

# Brings FILE to its full length, over as many requests as it takes. Only failures without a byte gained count. Status
# 416 means that there is nothing beyond what FILE holds: the checksum will tell whether it is all of it.
transfer() { # path file
  local failures=0 delay=$RETRY_DELAY best size what
  best=$(size_of "$2")
  while request "$1" "$2"; do
    if [ -s "$2" ]; then case $http_status-$tool_status in 2??-0 | 416-*) return ;; esac; else rm -f "$2"; fi
    if [ "$downloader-$tool_status" = curl-33 ]; then
      warn "  $1: the server cannot resume; starting over"
      rm -f "$2" && continue # terminates: a request for an empty file does not end so
    fi
    judge "$1"
    size=$(size_of "$2") failures=$((failures + 1))
    [ "$size" -le "$best" ] || best=$size failures=0 delay=$RETRY_DELAY
    [ "$failures" -le "$RETRIES" ] || die "$1: $what. $AGAIN"
    warn "  $1: $what; trying again in $delay s"
    sleep "$delay"
    delay=$((delay * 2 < 60 ? delay * 2 : 60))
  done
}

# Resumes FILE.part, verifies it if it has a checksum, and gives it its name. If it fails, it is fetched once more.
fetch() { # path file md5
  local part=$2.part size try
  for try in once twice; do
    size=$(size_of "$part")
    if [ "$size" -gt 0 ]; then say "$1: resuming after $((size / 1000000)) MB"; else say "$1: downloading"; fi
    transfer "$1" "$part"
    if [ -z "$3" ] || matches "$part" "$3"; then
      mv -f "$part" "$2" || die "cannot rename $part."
      [ -z "$3" ] || say "$1: verified"
      return
    fi
    rm -f "$part"
    warn "$1: corrupt $try: its checksum is not the published one"
  done
  die "$1: corrupt twice in a row, and deleted. Does a proxy change it? Try another network, or later. $AGAIN"
}

# Brings the files to the state that the checklist describes. A set that is whole needs no network; otherwise the
# checklist is fetched anew, so that a damaged one condemns no good file. It replaces the old one only if it is one, and
# not, say, the login page of a hotel's network. A file that does not match may be the beginning of one: it is resumed.
fetch_set() { # folder checklist name...
  local list=$target/$1$2 name md5 good=' ' n=2 # good: the files that matched the old checklist, with their sums
  for name in "${@:3}"; do
    md5=$(listed_md5 "$list" "$name") && [ -f "$target/$1$name" ] && matches "$target/$1$name" "$md5" &&
      good+="$name=$md5 " n=$((n + 1))
  done
  if [ "$n" -lt $# ]; then
    rm -f "$list.part"
    transfer "$1$2" "$list.part"
    for name in "${@:3}"; do
      listed_md5 "$list.part" "$name" >/dev/null || { rm -f "$list.part" && die "$1$2: what came is no checklist of" \
        "${*:3}. Does the network answer in the server's place (a login page)? $KEPT"; }
    done
    mv -f "$list.part" "$list"
  fi
  for name in "${@:3}"; do
    md5=$(listed_md5 "$list" "$name")
    if [[ $good == *" $name=$md5 "* ]] || { [ -f "$target/$1$name" ] && matches "$target/$1$name" "$md5"; }; then
      say "$1$name: already verified"
    else
      [ ! -f "$target/$1$name" ] || mv -f "$target/$1$name" "$target/$1$name.part"
      fetch "$1$name" "$target/$1$name" "$md5"
    fi
  done
}
fetch_plain() { [ -s "$target/$2" ] || { rm -f "$target/$2.part" && fetch "$1" "$target/$2" ''; }; } # path name

fetch_model() { # folder
  local i names=(params.json)
  set_sizes "$1"
  make_folder "$target/$1"
  for ((i = 0; i < shards; i++)); do names+=("consolidated.0$i.pth"); done
  fetch_set "$1/" checklist.chk "${names[@]}"
  [[ $1 == CodeLlama-* ]] || return 0 # each of these has a tokenizer of its own
  if listed_md5 "$target/$1/checklist.chk" tokenizer.model >/dev/null; then
    fetch_set "$1/" checklist.chk tokenizer.model
  else
    fetch_plain "$1/tokenizer.model" "$1/tokenizer.model"
  fi
}

case ${1-} in
  '') ;;
  -h | --help) sed -n '/^# Downloads/,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
  *) usage_error 'the only argument is --help. Settings are variables.' ;;
esac
: "${RETRIES:=5}" "${RETRY_DELAY:=2}" "${STALL_SECONDS:=60}"
for name in RETRIES RETRY_DELAY STALL_SECONDS; do # a leading zero would mean octal
  case ${!name} in *[!0-9]* | 0?*) usage_error "$name must be a whole number." ;; esac
done
trap 'interrupted 129' HUP && trap 'interrupted 130' INT && trap 'interrupted 143' TERM
take_url && take_models && take_target && pick_tools && make_folder "$target"
require_space
case $models in *llama-2-*) fetch_set '' tokenizer_checklist.chk tokenizer.model ;; esac
licence=LICENSE
[ ! "$target/download.sh" -ef "$0" ] || licence=LICENSE-llama-2 # in a clone, LICENSE is this library's own
fetch_plain LICENSE "$licence"
fetch_plain USE_POLICY.md USE_POLICY.md
for model in $models; do fetch_model "$model"; done
say "Done: all files are in $target and verified."
