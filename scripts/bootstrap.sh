# shellcheck shell=bash
# Sourced by launch.sh and scripts/check: the environment in .venv, made or renewed when needed.
#
#   ember_environment run|dev     sets EMBER_PYTHON_PATH to the interpreter to use
#
# Where there is an NVIDIA driver, "run" is "cuda": with what compiles the CUDA kernels.
#
# EMBER_PYTHON=... names another interpreter: it is used as it is and nothing is installed.
# .venv holds a stamp of what was installed (pyproject.toml, constraints.txt, where the checkout
# lies); while it matches, nothing but the stamp is read. The stamp is written last, so an
# installation that was cut short is done again. Messages and pip's output go to stderr.

EMBER_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
EMBER_VENV=$EMBER_ROOT/.venv
EMBER_STAMP=$EMBER_VENV/.ember-stamp
EMBER_UNFINISHED=$EMBER_VENV/.ember-unfinished # while the first installation is not done

ember_say() {
  printf 'ember-pp: %s\n' "$*" >&2
}

ember_die() {
  ember_say "$@"
  exit 2
}

ember_environment() {
  local kind=$1
  if [[ -n ${EMBER_PYTHON:-} ]]; then
    ember_use_interpreter
    return
  fi
  [[ $kind != run ]] || ! ember_has_driver || kind=cuda
  EMBER_PYTHON_PATH=$EMBER_VENV/bin/python
  ember_is_ready "$kind" || ember_install_locked "$kind"
}

ember_has_driver() {
  [[ -e /proc/driver/nvidia/version ]] || command -v nvidia-smi >/dev/null
}

# Another interpreter need not have ember_pp itself, only what it imports.
ember_use_interpreter() {
  EMBER_PYTHON_PATH=$(command -v -- "$EMBER_PYTHON") ||
    ember_die "EMBER_PYTHON=$EMBER_PYTHON: no such interpreter"
  ember_is_recent "$EMBER_PYTHON_PATH" ||
    ember_die "EMBER_PYTHON=$EMBER_PYTHON: is no working Python of version 3.11 or newer"
  export PYTHONPATH=$EMBER_ROOT${PYTHONPATH:+:$PYTHONPATH}
}

# The stamp's first line is "run", "cuda" or "dev"; each does for those before it, so a checkout
# that machines with and without a GPU share is not installed over and over.
ember_is_ready() {
  local have_kind have_key
  [[ -x $EMBER_VENV/bin/python && -r $EMBER_STAMP ]] || return 1
  { read -r have_kind && read -r have_key; } <"$EMBER_STAMP" || return 1
  [[ $have_key == "$(ember_key)" ]] && [[ $(ember_larger "$1" "$have_kind") == "$have_kind" ]]
}

ember_larger() {
  local kind
  for kind in dev cuda run; do
    if [[ $1 == "$kind" || $2 == "$kind" ]]; then
      printf '%s' "$kind"
      return
    fi
  done
}

ember_key() {
  local sums
  sums=$(cat -- "$EMBER_ROOT/pyproject.toml" "$EMBER_ROOT/constraints.txt" | cksum)
  printf '%s %s' "$sums" "$EMBER_ROOT"
}

# Two runs at once: the second waits, then finds the environment ready.
ember_install_locked() (
  set -euo pipefail
  if command -v flock >/dev/null; then
    exec 9>"$EMBER_ROOT/.venv.lock"
    flock --nonblock 9 || {
      ember_say "waiting for another run that is installing into .venv"
      flock 9
    }
    ! ember_is_ready "$1" || exit 0
  fi
  ember_install "$1"
)

ember_install() {
  local kind=$1 have_kind='' extras=''
  # Once development tools or the kernel compiler are in, a renewal keeps them.
  [[ ! -r $EMBER_STAMP ]] || read -r have_kind <"$EMBER_STAMP" || true
  kind=$(ember_larger "$kind" "$have_kind")
  [[ $kind == run ]] || extras="[$kind]"
  ember_make_venv
  ember_say "installing into .venv (torch is large: minutes the first time)"
  rm -f -- "$EMBER_STAMP"
  PIP_DISABLE_PIP_VERSION_CHECK=1 "$EMBER_VENV/bin/python" -m pip install --quiet \
    --constraint "$EMBER_ROOT/constraints.txt" --editable "$EMBER_ROOT$extras" >&2 ||
    ember_die "installing failed: pip's message is above; run this again to go on"
  printf '%s\n%s\n' "$kind" "$(ember_key)" >"$EMBER_STAMP.new"
  mv -f -- "$EMBER_STAMP.new" "$EMBER_STAMP"
  rm -f -- "$EMBER_UNFINISHED"
  ember_say ".venv is ready"
}

# A .venv that these scripts began and never finished is begun again; one that somebody else
# made is only added to.
ember_make_venv() {
  local python
  [[ ! -e $EMBER_UNFINISHED ]] || rm -rf -- "$EMBER_VENV"
  [[ ! -x $EMBER_VENV/bin/python ]] || return 0
  python=$(ember_find_python)
  ember_say "making .venv with $("$python" --version)"
  mkdir -p -- "$EMBER_VENV"
  : >"$EMBER_UNFINISHED"
  "$python" -m venv "$EMBER_VENV" >&2 || ember_die "making .venv failed: the message is above"
}

ember_find_python() {
  local name has_old=''
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    command -v "$name" >/dev/null || continue
    if ! ember_is_recent "$name"; then
      has_old=$has_old${has_old:+, }$name
    elif "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      printf '%s' "$name"
      return
    else
      ember_say "$name has no venv module (on Debian and Ubuntu: apt install python3-venv)"
    fi
  done
  ember_die "needs Python 3.11 or newer with its venv module${has_old:+; too old: $has_old};" \
    "install one, or name it: EMBER_PYTHON=/path/to/python (used as it is, nothing installed)"
}

ember_is_recent() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}
