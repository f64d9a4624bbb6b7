#!/usr/bin/env bash
# Fetches Apache Flink into the cache, for `make bench` with `--peer flink`. Quick when it is there.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
. "$here/../../../scripts/lib.sh"

FLINK_VERSION=2.2.1
home="$FLOODMARK_CACHE/flink-$FLINK_VERSION"
if [ ! -d "$home" ]; then
  have java && have mvn || fail "Java 17 and Maven are missing: run scripts/setup-test.sh"
  have python3 && python3 -m pip --version >/dev/null 2>&1 || packages python3-pip
  say "fetching Apache Flink $FLINK_VERSION"
  rm -rf "$home.new"
  python3 -m pip install --quiet --no-deps --root-user-action=ignore --target "$home.new" \
    "apache-flink-libraries==$FLINK_VERSION" || fail "could not fetch Apache Flink $FLINK_VERSION"
  mvn --batch-mode --quiet --file "$here/pom.xml" dependency:copy-dependencies -DoutputDirectory="$home.new/more" ||
    fail "Maven could not fetch Flink's connector and gateway"
  mv "$home.new" "$home"
fi
ln -sfn "$home" "$FLOODMARK_CACHE/flink"
