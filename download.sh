#!/usr/bin/env bash
#
# Downloads the Llama 2 weights with the link that Meta mails to those who accepted its licence, and checks
# every file against the published checksums. `download.sh --help` says how it is used.
#
# It needs bash 3.2 (macOS) or later, curl or GNU wget 1, md5sum or macOS's md5, and df.
#
# Knobs for unusual places and for the tests, all taken from the environment:
#   RETRIES=5           failures in a row, without a byte gained, that are tried again
#   RETRY_DELAY=2       seconds before the first of them; doubles each time, up to 60
#   STALL_SECONDS=60    silence (with curl also: less than 1 KB/s) after which a connection counts as broken
#   SKIP_SPACE_CHECK=1  does not look at the free disk space first
#
# The link is a secret. It is handed to curl and wget on their standard input, so that neither the list of
# processes nor any file shows it. Here-documents and here-strings are files in old shells: not for the link.

set -u +a -o pipefail -o noglob
export LC_ALL=C # the output of df, wget and tr is read by machine

readonly ALL_MODELS='7B,13B,70B,7B-chat,13B-chat,70B-chat'
readonly REQUEST_PAGE='https://ai.meta.com/resources/models-and-libraries/llama-downloads/'
readonly KEPT='What is already here is kept.'
readonly AGAIN="$KEPT Run this again and it goes on from there."

usage() {
  cat <<END
Usage: download.sh [-h | --help]

Downloads Llama 2 models and verifies them. Asks for the link that Meta mailed to you and for the models
(any of $ALL_MODELS, separated by commas; none means all).
Run it again to go on after an interruption: it resumes partial files and skips verified ones.

Without a terminal, or to be asked nothing, set these variables:
  PRESIGNED_URL   the link from the mail, with the * that stands in it
  MODEL_SIZE      the models, as above; "all" or empty means all
  TARGET_FOLDER   where to put them (default: the current folder)

Example:
  PRESIGNED_URL='https://download.llamameta.net/*?Policy=...' MODEL_SIZE=7B,7B-chat ./download.sh

Sizes on disk: 7B 13 GB, 13B 25 GB, 70B 130 GB; a chat model is as large as its base model.
More knobs are described at the top of the script.
Status: 0 all there and verified, 1 something failed, 2 wrong usage, 130 interrupted.
END
}

say() { printf '%s\n' "$*"; }

warn() { printf '%s\n' "$*" >&2; }

die() {
  warn "error: $*"
  exit 1
}

usage_error() {
  warn "error: $*"
  warn 'download.sh --help says how it is used.'
  exit 2
}

tty_settings='' # set while the terminal does not echo

interrupted() {
  [ -z "$tty_settings" ] || stty "$tty_settings"
  warn ''
  warn "Interrupted. $AGAIN"
  exit "$1"
}

# --- what to fetch: the questions and their answers ---

is_number() {
  case $1 in
    '' | *[!0-9]* | 0?*) return 1 ;; # a leading zero would mean octal
  esac
}

read_knobs() {
  RETRIES=${RETRIES:-5}
  RETRY_DELAY=${RETRY_DELAY:-2}
  STALL_SECONDS=${STALL_SECONDS:-60}
  is_number "$RETRIES" || usage_error 'RETRIES must be a whole number.'
  is_number "$RETRY_DELAY" || usage_error 'RETRY_DELAY must be a whole number of seconds.'
  is_number "$STALL_SECONDS" || usage_error 'STALL_SECONDS must be a whole number of seconds.'
}

require_terminal() {
  [ -t 0 ] || usage_error "$1 is not set, and there is no terminal to ask for it on. Set the variable $1."
}

# The answer is not echoed, lest the link stay in a terminal's history that is then pasted somewhere. -n reads
# the terminal character by character: line by line, macOS takes no more than 1024 of them. A link that was
# wrapped arrives as several lines; what follows within a second belongs to it.
ask_url() {
  local more
  require_terminal PRESIGNED_URL
  printf 'Paste the URL from the mail and press Enter (it is not shown): ' >&2
  tty_settings=$(stty -g 2>/dev/null)
  IFS= read -r -s -n 16384 url || die 'no URL was given.'
  while IFS= read -r -s -t 1 -n 16384 more; do url=$url$more; done
  tty_settings=''
  warn ''
}

# Takes out what mail programs, terminals and shells put in: blanks, line breaks, quotes of any kind, angle
# brackets, backslashes, HTML's &amp;, and a %2A for the asterisk.
clean_url() {
  tr -cd '!-~' | tr -d "\"'\`<>\\\\" | sed -e 's/&amp;/\&/g' -e '/\*/!s/%2[Aa]/*/'
}

take_url() {
  unset url # or it would be exported, where the caller exports a variable of that name
  url=${PRESIGNED_URL:-}
  unset PRESIGNED_URL # so that no child inherits it
  [ -n "$url" ] || ask_url
  url=$(printf '%s' "$url" | clean_url)
  case $url in
    '') usage_error 'the URL is empty. Paste the link from the mail.' ;;
    http://?* | https://?*) ;;
    *) usage_error 'the URL does not begin with http:// or https://. Copy the whole link from the mail.' ;;
  esac
  case ${url%%\?*} in
    *\**) ;;
    *) usage_error "the URL has no * before its ?. Copy the text of the link in the mail, whole, not the" \
      "address behind it: it begins with https://download.llamameta.net/* and the * must stay." ;;
  esac
}

ask_models() {
  require_terminal MODEL_SIZE
  printf 'Models to download (%s), or Enter for all: ' "$ALL_MODELS" >&2
  IFS= read -r wanted || die 'no answer was given.'
}

# A name that is too long for a model may be a piece of the link: it is not shown.
unknown_model() {
  local what="unknown model '$1'"
  [ "${#1}" -le 16 ] || what='MODEL_SIZE holds something that is no model name'
  usage_error "$what. The models are $ALL_MODELS. Nothing was downloaded."
}

# Sets models: the names in lower case, as the folders have them, each once.
take_models() {
  local IFS=$' ,\t\r\n' wanted name
  if [ -n "${MODEL_SIZE+set}" ]; then wanted=$MODEL_SIZE; else ask_models; fi
  case ${wanted//[[:space:],]/} in
    '' | [aA][lL][lL]) wanted=$ALL_MODELS ;;
  esac
  models=''
  for name in $wanted; do
    add_model "$name"
  done
}

add_model() {
  local model
  model=$(printf '%s' "$1" | tr '[:upper:]' '[:lower:]')
  case $model in
    '') return ;; # between two commas
    7b | 13b | 70b | 7b-chat | 13b-chat | 70b-chat) ;;
    *) unknown_model "$1" ;;
  esac
  case " $models " in
    *" $model "*) ;;
    *) models="$models $model" ;;
  esac
}

take_target() {
  target=${TARGET_FOLDER:-.}
  case $target in
    /* | .) ;;
    *) target=./$target ;; # a name that begins with a dash is no option
  esac
}

# --- the models ---

shards_of() {
  case $1 in
    7b*) echo 1 ;;
    13b*) echo 2 ;;
    70b*) echo 8 ;;
  esac
}

gigabytes_of() {
  case $1 in
    7b*) echo 13 ;;
    13b*) echo 25 ;;
    70b*) echo 130 ;;
  esac
}

# --- the tools at hand ---

pick_downloader() {
  if command -v curl >/dev/null; then
    downloader=curl
    return
  fi
  command -v wget >/dev/null || die 'neither curl nor wget is installed. Install one of them.'
  downloader=wget
  wget_help=$(wget --help 2>&1)
  case $wget_help in
    *Wget2*) ;; # hangs at the link on its standard input
    *--input-file*) return ;;
  esac
  die 'this wget cannot be handed the link unseen (BusyBox? Wget2?). Install curl or GNU wget 1.'
}

pick_md5() {
  if command -v md5sum >/dev/null; then
    md5_tool=md5sum
  elif command -v md5 >/dev/null; then
    md5_tool=md5
  else
    die 'neither md5sum nor md5 is installed, so that nothing could be verified. Install one of them.'
  fi
}

# --- disk space ---

size_of() {
  if [ -f "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi
}

# How many KiB of a model's shards are still to come. The other files are small.
missing_kib() {
  local shards share shard=0 file part missing=0
  shards=$(shards_of "$1")
  share=$(($(gigabytes_of "$1") * 1048576 / shards))
  while [ "$shard" -lt "$shards" ]; do
    file=$target/llama-2-$1/consolidated.0$shard.pth
    part=$(($(size_of "$file.part") / 1024))
    if [ ! -f "$file" ] && [ "$part" -lt "$share" ]; then missing=$((missing + share - part)); fi
    shard=$((shard + 1))
  done
  echo "$missing"
}

# The fourth column of `df -P`, found by the percentage after it: the columns before it may hold blanks.
free_kib() {
  df -Pk "$target" 2>/dev/null | sed -n '2s/^.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*$/\1/p'
}

require_space() {
  local model need=0 free
  [ "${SKIP_SPACE_CHECK:-0}" = 1 ] && return
  for model in $models; do need=$((need + $(missing_kib "$model"))); done
  [ "$need" -gt 0 ] || return 0
  free=$(free_kib)
  if [ -z "$free" ]; then
    warn "warning: how much space is free in $target could not be read. About $((need / 1048576)) GB are needed."
  elif [ "$free" -lt "$need" ]; then
    die "not enough disk space in $target: about $(((need + 1048575) / 1048576)) GB are still to come," \
      "$((free / 1048576)) GB are free. Free some, choose fewer models, or set TARGET_FOLDER to another disk." \
      "(SKIP_SPACE_CHECK=1 goes on regardless.)"
  fi
}

# --- checksums ---

is_md5() {
  case $1 in
    *[!0-9a-f]*) return 1 ;;
  esac
  [ "${#1}" -eq 32 ]
}

# Prints the checksum that CHECKLIST has for NAME; fails if it has none.
listed_md5() { # checklist name
  local sum name rest
  while read -r sum name rest || [ -n "$sum" ]; do
    name=${name%$'\r'}
    name=${name#\*} # md5sum's mark for binary mode
    if [ "${name#./}" = "$2" ] && [ -z "$rest" ] && is_md5 "$sum"; then
      printf '%s\n' "$sum"
      return 0
    fi
  done <"$1"
  return 1
}

lists_all() { # checklist name...
  local checklist=$1 name
  shift
  for name in "$@"; do
    listed_md5 "$checklist" "$name" >/dev/null || return 1
  done
}

# A tool that fails is no mismatch: it must not cost a file of many gigabytes.
matches() { # file md5
  local sum
  case $md5_tool in
    md5sum) sum=$(md5sum <"$1") ;;
    md5) sum=$(md5 -r "$1") ;;
  esac
  sum=${sum%% *}
  is_md5 "$sum" || die "$md5_tool could not read $1. $AGAIN"
  [ "$sum" = "$2" ]
}

# --- one request ---
#
# Each asks for what FILE lacks and sets http_status (000: no answer) and tool_status. The user's curlrc is left
# out, for it may ask for a trace that shows the link; the proxy variables are heeded by both.

request_with_curl() { # url file meter?
  local quiet=--silent
  [ "$3" = yes ] && quiet=--no-silent
  http_status=$(printf 'url = "%s"\n' "$1" | curl -q --config - --globoff --location --fail "$quiet" \
    --connect-timeout "$STALL_SECONDS" --speed-limit 1000 --speed-time "$STALL_SECONDS" \
    --continue-at - --output "$2" --write-out '%{http_code}')
  tool_status=$?
}

# The log is read from a variable and only for its status lines: the rest of it may show the link.
request_with_wget() { # url file meter?
  local log meter=--quiet
  if [ "$3" = yes ]; then
    case $wget_help in
      *--show-progress*) meter=--show-progress ;;
    esac
  fi
  log=$(printf '%s\n' "$1" | wget --quiet "$meter" --server-response --tries=1 --timeout="$STALL_SECONDS" \
    --continue --output-document="$2" --output-file=- --input-file=-)
  tool_status=$?
  http_status=$(printf '%s\n' "$log" | sed -n 's|^ *HTTP/[0-9.]* *\([0-9][0-9][0-9]\).*|\1|p' | tail -n 1)
  http_status=${http_status:-000}
}

# The first * of the link stands for the path of the file.
request() { # path file
  local meter=no
  case $1 in
    *.pth) [ -t 2 ] && meter=yes ;;
  esac
  "request_with_$downloader" "${url%%\**}$1${url#*\*}" "$2" "$meter"
}

# 416 means that there is nothing beyond what FILE holds: the checksum will tell whether it is all of it.
is_complete() { # file
  [ -s "$1" ] || return 1
  case $http_status in
    2??) [ "$tool_status" -eq 0 ] ;;
    416) true ;;
    *) false ;;
  esac
}

# --- what went wrong, and what to do ---

die_if_refused() { # path
  case $http_status in
    408 | 425 | 429) ;;
    401 | 403)
      die "$1: the server refuses the link (status $http_status). It has expired (after 24 hours), was used up, or" \
        "is not for this model. Ask for a new one at $REQUEST_PAGE and run this again with it. $KEPT"
      ;;
    404 | 410)
      die "$1: no such file on the server (status $http_status). Either the link is not for this model: compare the" \
        "name with those in the mail; or the link was cut or changed: copy it whole. $KEPT"
      ;;
    416) ;;
    4??) die "$1: the server does not understand the link (status $http_status). Copy it whole from the mail. $KEPT" ;;
  esac
}

# Failures on this side, which trying again does not mend.
die_if_broken_here() { # path
  case $downloader-$tool_status in
    curl-23 | wget-3) die "$1: cannot write to $target. Is the disk full, or the folder read-only? $AGAIN" ;;
    curl-51 | curl-60 | curl-77 | wget-5)
      die "$1: the server's certificate is not trusted. Check this machine's clock and certificates, and whether a" \
        "proxy stands in between. $AGAIN"
      ;;
    curl-[123] | wget-2) die "$1: $downloader does not work here (exit status $tool_status)." ;;
    *-12[67]) die "$1: $downloader cannot be started (exit status $tool_status)." ;;
  esac
}

what_failed() {
  case $http_status in
    000) echo "no answer ($downloader exit status $tool_status)" ;;
    2??) echo 'the connection broke off' ;;
    *) echo "the server answered with status $http_status" ;;
  esac
}

give_up() { # path
  case $http_status in
    000)
      die "$1: the server cannot be reached ($downloader exit status $tool_status). Check the network, its name" \
        "service, and the proxy (https_proxy) if there is one. $AGAIN"
      ;;
    2??) die "$1: the connection breaks off again and again. $AGAIN" ;;
    *) die "$1: the server is in trouble (status $http_status). Try again later. $AGAIN" ;;
  esac
}

# --- one file ---

# Brings FILE to its full length, over as many requests as it takes. Only failures without a byte gained count.
transfer() { # path file
  local failures=0 delay=$RETRY_DELAY best size
  best=$(size_of "$2")
  while :; do
    request "$1" "$2"
    is_complete "$2" && return
    drop_if_empty "$2"
    if [ "$downloader-$tool_status" = curl-33 ]; then
      warn "  $1: the server cannot resume; starting over"
      rm -f "$2" || die "$1: cannot write to $target."
      continue # terminates: a request for an empty file does not end so
    fi
    die_if_refused "$1"
    die_if_broken_here "$1"
    size=$(size_of "$2")
    if [ "$size" -gt "$best" ]; then
      best=$size failures=0 delay=$RETRY_DELAY
    else
      failures=$((failures + 1))
    fi
    [ "$failures" -le "$RETRIES" ] || give_up "$1"
    warn "  $1: $(what_failed); trying again in $delay s"
    sleep "$delay"
    delay=$((delay * 2 < 60 ? delay * 2 : 60))
  done
}

drop_if_empty() { # file
  if [ -f "$1" ] && [ ! -s "$1" ]; then rm -f "$1"; fi
}

keep() { # file
  mv -f "$1.part" "$1" || die "cannot rename $1.part."
}

# In a clone of this library the name LICENSE is taken by the library's own.
license_name() {
  if [ "$target/download.sh" -ef "$0" ]; then echo LICENSE-llama-2; else echo LICENSE; fi
}

# For the small files that have no checksum.
fetch_plain() { # path name
  local file=$target/$2
  [ -s "$file" ] && return
  say "$1: downloading"
  rm -f "$file.part"
  transfer "$1" "$file.part"
  keep "$file"
}

# A new checklist replaces the old one only if it is one, and not, say, the login page of a hotel's network.
fetch_checklist() { # path name...
  local path=$1 file=$target/$1
  shift
  rm -f "$file.part"
  transfer "$path" "$file.part"
  if ! lists_all "$file.part" "$@"; then
    rm -f "$file.part"
    die "$path: what came is no checklist of $*. Does the network answer in the server's place (a login page)? $KEPT"
  fi
  keep "$file"
}

# Resumes PATH.part, verifies it, and gives it its name. One that fails is fetched once more, whole.
fetch_verified() { # path md5
  local path=$1 part=$target/$1.part try
  for try in 1 2; do
    announce "$path" "$part"
    transfer "$path" "$part"
    if matches "$part" "$2"; then
      keep "$target/$path"
      say "$path: verified"
      return
    fi
    rm -f "$part"
    [ "$try" = 1 ] && warn "$path: corrupt (its checksum differs); downloading it once more"
  done
  die "$path: corrupt twice in a row: its checksum is not the published one, and it was deleted. A proxy may change" \
    "what it passes on, or the server's copy is damaged. Try another network, or later. $AGAIN"
}

announce() { # path part
  local size
  size=$(size_of "$2")
  if [ "$size" -gt 0 ]; then
    say "$1: resuming after $((size / 1000000)) MB"
  else
    say "$1: downloading"
  fi
}

# --- a set of files with its checklist ---

all_there() { # folder name...
  local folder=$1 name
  shift
  for name in "$@"; do
    [ -f "$target/$folder$name" ] || return 1
  done
}

all_match() { # folder checklist name...
  local folder=$1 checklist=$target/$1$2 name
  shift 2
  [ -f "$checklist" ] && lists_all "$checklist" "$@" || return 1
  for name in "$@"; do
    matches "$target/$folder$name" "$(listed_md5 "$checklist" "$name")" || return 1
  done
}

# Brings the files to the state that the checklist describes. A set that is whole needs no network; otherwise the
# checklist is fetched anew, so that a damaged one condemns no good file. An existing file that does not match may
# be the beginning of one: it is resumed.
fetch_set() { # folder checklist name...
  local folder=$1 checklist=$2 name md5
  shift 2
  if all_there "$folder" "$@" && all_match "$folder" "$checklist" "$@"; then
    for name in "$@"; do say "$folder$name: already verified"; done
    return
  fi
  fetch_checklist "$folder$checklist" "$@"
  for name in "$@"; do
    md5=$(listed_md5 "$target/$folder$checklist" "$name")
    if [ -f "$target/$folder$name" ]; then
      if matches "$target/$folder$name" "$md5"; then
        say "$folder$name: already verified"
        continue
      fi
      mv -f "$target/$folder$name" "$target/$folder$name.part"
    fi
    fetch_verified "$folder$name" "$md5"
  done
}

make_folder() {
  mkdir -p "$1" || die "cannot make the folder $1. Set TARGET_FOLDER to one that you may write to."
  [ -w "$1" ] || die "the folder $1 is read-only. Set TARGET_FOLDER to one that you may write to."
}

fetch_model() {
  local folder=llama-2-$1/ shard=0 shards
  shards=$(shards_of "$1")
  make_folder "$target/$folder"
  set -- params.json
  while [ "$shard" -lt "$shards" ]; do
    set -- "$@" "consolidated.0$shard.pth"
    shard=$((shard + 1))
  done
  fetch_set "$folder" checklist.chk "$@"
}

main() {
  local model
  case ${1-} in
    '') ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) usage_error 'the only argument is --help. Settings are variables.' ;;
  esac
  read_knobs
  trap 'interrupted 129' HUP
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM
  take_url
  take_models
  take_target
  pick_downloader
  pick_md5
  make_folder "$target"
  require_space
  fetch_set '' tokenizer_checklist.chk tokenizer.model
  fetch_plain LICENSE "$(license_name)"
  fetch_plain USE_POLICY.md USE_POLICY.md
  for model in $models; do fetch_model "$model"; done
  say "Done: all files are in $target and verified."
}

main "$@"
