#!/usr/bin/env bash
# Writes the image of Floodmark to a file, without Docker: the same content as ../../../Dockerfile's.
#   build.sh [PROGRAM]      PROGRAM is the floodmark to put into it (default: $FLOODMARK_BIN, the release build);
#                           floodmark-controller is taken from beside it
# On standard output: the file, $FLOODMARK_CACHE/images/floodmark-VERSION.tar. The image's name is floodmark:VERSION.
#
# Below the program is a layer of Debian's (or Ubuntu's) packages of this machine's release: those whose libraries the program
# was linked with here, certificates, and what says which release it is. It is made once for each version of them.
set -euo pipefail
umask 022
here="$(cd "$(dirname "$0")" && pwd)"
repository="$(cd "$here/../../.." && pwd)"
# shellcheck source=scripts/lib.sh
. "$repository/scripts/lib.sh"

# Goes up when the recipe of the base layer changes.
RECIPE=1
USER_ID=65532

program=${1:-${FLOODMARK_BIN:-${CARGO_TARGET_DIR:-$FLOODMARK_CACHE/target}/release/floodmark}}
controller="$(dirname "$program")/floodmark-controller"
for file in "$program" "$controller"; do [ -x "$file" ] || fail "there is no program at $file: make build"; done
for tool in apt-get apt-cache dpkg-deb dpkg-query; do
  have "$tool" || fail "an image is built of Debian's packages, and there is no $tool here: use the Dockerfile instead"
done
packages python3 binutils
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$repository/Cargo.toml" | head -n 1)
images="$FLOODMARK_CACHE/images"
mkdir -p "$images"

# The package that brings a file. On merged systems dpkg knows some files by the path that they had before.
owner() {
  local file
  file=$(realpath "$1")
  { dpkg-query --search "$file" 2>/dev/null || dpkg-query --search "${file#/usr}" 2>/dev/null; } | sed 's/:.*//' | head -n 1
}
wanted=(base-files ca-certificates)
readelf -h "$program" >/dev/null || fail "$program is not a program of this machine"
for library in $(ldd "$program" "$controller" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^\s*\(\/[^ ]*\) (.*/\1/p'); do
  package=$(owner "$library")
  [ -n "$package" ] || fail "no package brings $library, with which $program is linked: build it on a machine where one does"
  wanted+=("$package")
done
mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" | sort -u)

candidates() {
  local package
  for package in "${wanted[@]}"; do
    printf '%s=%s\n' "$package" "$(apt-cache policy "$package" | sed -n 's/^ *Candidate: //p')"
  done
}
chosen=$(candidates)
# Lists of packages that are absent or too old to download from are fetched once.
refresh() { as_root apt-get -qq update; chosen=$(candidates); }
! grep -qE '=(\(none\))?$' <<<"$chosen" || refresh
key() { { echo "$RECIPE"; printf '%s\n' "$chosen"; } | sha256sum | cut -c 1-12; }

build_base() {
  local root="$1/root" deb
  # shellcheck disable=SC2086 # one word for each package
  (cd "$1" && rm -f ./*.deb && apt-get -qq -o APT::Sandbox::User=root download $chosen >&2) || return 1
  mkdir -p "$root"/usr/{bin,lib,lib64,sbin}
  for link in bin lib lib64 sbin; do ln -sfn "usr/$link" "$root/$link"; done
  # Scanners look for what is installed in the last of these folders.
  mkdir -p "$root/var/lib/dpkg/status.d"
  for deb in "$1"/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar --extract --keep-directory-symlink --directory "$root"
    dpkg-deb --field "$deb" >"$root/var/lib/dpkg/status.d/$(dpkg-deb --field "$deb" Package)"
  done
  # What a package's own script does after unpacking.
  mkdir -p "$root/etc/ssl/certs"
  find "$root/usr/share/ca-certificates" -name '*.crt' | sort | xargs cat >"$root/etc/ssl/certs/ca-certificates.crt"
  printf 'root:x:0:0:root:/root:/usr/sbin/nologin\nfloodmark:x:%s:%s::/nonexistent:/usr/sbin/nologin\n' $USER_ID $USER_ID >"$root/etc/passwd"
  printf 'root:x:0:\nfloodmark:x:%s:\n' $USER_ID >"$root/etc/group"
  chmod 1777 "$root/tmp"
  # Licences stay.
  rm -rf "$root"/usr/share/{bug,info,lintian,locale,man}
  find "$root/usr/share/doc" -type f ! -name copyright -delete
}

exec 9>"$images/.lock"
have flock && flock 9
work=$(mktemp -d "$images/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
base="$images/base-$(key).tar"
if [ ! -e "$base" ]; then
  say "making the image's base layer of $(tr '\n' ' ' <<<"$chosen")"
  if ! build_base "$work"; then
    refresh
    base="$images/base-$(key).tar"
    build_base "$work" || fail "the packages of the base layer could not be had: see above"
  fi
  tar --create --file "$work/base.tar" --directory "$work/root" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner .
  mv "$work/base.tar" "$base"
fi
mkdir -p "$work/program/usr/local/bin"
install -m 755 "$program" "$work/program/usr/local/bin/floodmark"
install -m 755 "$controller" "$work/program/usr/local/bin/floodmark-controller"
image="$images/floodmark-$version.tar"
python3 "$here/archive.py" "$image" "floodmark:$version" --entrypoint /usr/local/bin/floodmark --user "$USER_ID:$USER_ID" \
  "$base" "$work/program"
say "image floodmark:$version, $(($(stat -c %s "$image") >> 20)) MiB"
printf '%s\n' "$image"
