#!/usr/bin/env bash
# Compiles RocksDB into the cache, once for each version: a static library that dev and release builds of all clones share.
#
# The sources are those of the crate librocksdb-sys that Cargo.lock names; ROCKSDB_LIB_DIR, which the Makefile sets, then tells
# that crate to link the library instead of compiling its own (1,000 CPU-seconds for each profile and target folder). Files are
# compiled in groups, each as one translation unit, as RocksDB's own `make unity.a` does with all of them: that reads the
# headers once for each group and takes a third of the time.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

# Goes up when the recipe below changes.
RECIPE=1
GROUP_FILES=10

version=$(sed -n '/^name = "librocksdb-sys"$/{n;s/^version = "\(.*\)"$/\1/p}' Cargo.lock)
[ -n "$version" ] || fail "Cargo.lock names no librocksdb-sys"
home="$FLOODMARK_CACHE/rocksdb-$version-$RECIPE"
[ "${1:-}" != --where ] || { printf '%s\n' "$home"; exit; }
case "${ROCKSDB_LIB_DIR:-$home}" in
  "$home") ;;
  "$FLOODMARK_CACHE"/rocksdb-*) fail "ROCKSDB_LIB_DIR names the library of another version: unset it, or set it to $home" ;;
  # Somebody's own library is taken as it is, and its folder never touched.
  *) exit 0 ;;
esac
[ ! -e "$home/librocksdb.a" ] || exit 0

packages g++ binutils
# Where cargo unpacked the sources of a crate, which begin with $1.
metadata=$(cargo metadata --locked --format-version 1 | tr ',' '\n')
crate() { sed -n "s|.*\"manifest_path\":\"\(.*/$1-[^/]*\)/Cargo.toml\".*|\1|p" <<<"$metadata" | head -n 1; }
source=$(crate librocksdb-sys) lz4=$(crate lz4-sys) zstd=$(crate zstd-sys)
for found in "$source/rocksdb/include/rocksdb/c.h" "$lz4/liblz4/lib/lz4.h" "$zstd/zstd/lib/zstd.h"; do
  [ -e "$found" ] || fail "the sources of RocksDB are not where they were expected: $found"
done

# Checksums in hardware: any x86-64 machine since 2011, any 64-bit Arm server.
case $(uname -m) in
  x86_64) machine=(-msse4.2 -mpclmul) ;;
  aarch64) machine=(-march=armv8-a+crc+crypto) ;;
  *) machine=() ;;
esac
flags=(
  -std=c++20 -O2 -fPIC -ffunction-sections -fdata-sections -w -include cstdint "${machine[@]}"
  -DNDEBUG -DHAVE_ALIGNED_NEW -DHAVE_UINT128_EXTENSION -DOS_LINUX -DROCKSDB_PLATFORM_POSIX -DROCKSDB_LIB_IO_POSIX
  -DROCKSDB_SCHED_GETCPU_PRESENT -DROCKSDB_AUXV_GETAUXVAL_PRESENT -DROCKSDB_FALLOCATE_PRESENT -DROCKSDB_RANGESYNC_PRESENT
  -DLZ4=1 -DZSTD=1
  "-I$source/rocksdb/include" "-I$source/rocksdb" "-I$source" "-I$lz4/liblz4/lib" "-I$zstd/zstd/lib"
)

# Two builds at once must not meet; a build that was killed leaves a folder that the next one of its kind removes.
mkdir -p "$FLOODMARK_CACHE"
exec 9>"$FLOODMARK_CACHE/rocksdb.lock"
have flock && flock 9
[ ! -e "$home/librocksdb.a" ] || exit 0
work="$home.new"
rm -rf "$work"
mkdir -p "$work"

{ grep -v '^util/build_version.cc$' "$source/rocksdb_lib_sources.txt" | sed 's|^\s*\(.*\S\)\s*$|rocksdb/\1|'; echo build_version.cc; } |
  sed "s|.*|#include \"$source/&\"|" | split -l "$GROUP_FILES" -d -a 3 --additional-suffix=.cc - "$work/group-"
groups=$(find "$work" -name 'group-*.cc' | wc -l)
jobs=${CARGO_BUILD_JOBS:-$(nproc 2>/dev/null || echo 2)}
say "compiling RocksDB ${version#*+} ($groups groups of files, $jobs at a time; once, some minutes)"
# g++ reads its flags from a file: the steps that xargs starts then need nothing but the name of their group.
printf '"%s"\n' "${flags[@]}" >"$work/flags"
started=$SECONDS
find "$work" -name 'group-*.cc' | sort |
  xargs -P "$jobs" -I{} bash -c 'g++ "@$0/flags" -c "$1" -o "${1%.cc}.o" && echo "==>   $(basename "${1%.cc}")" >&2' "$work" {} ||
  fail "RocksDB did not compile: see above"
ar crs "$work/librocksdb.a" "$work"/group-*.o
rm -f "$work"/group-*.o
rm -rf "$home"
mv "$work" "$home"
say "compiled RocksDB in $((SECONDS - started)) s: $home/librocksdb.a"
