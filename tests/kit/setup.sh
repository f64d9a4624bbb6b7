#!/usr/bin/env bash
# Fetches what the tests' servers consist of into the cache: a Kafka broker (Maven) and versitygw, an S3 server (Go).
# Needs Java, Maven and Go: scripts/setup-test.sh sees to that, and calls this. Quick when there is nothing to do.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
. "$here/../../scripts/lib.sh"

# Folders and names that tests/kit/src/ looks for.
KAFKA_VERSION="$(sed -n 's:.*<kafka.version>\(.*\)</kafka.version>.*:\1:p' "$here/kafka/pom.xml")"
VERSITYGW_VERSION=v1.8.0

kafka="$FLOODMARK_CACHE/kafka-$KAFKA_VERSION"
if [ ! -d "$kafka" ]; then
  say "fetching Kafka $KAFKA_VERSION"
  have mvn || fail "Maven is missing: run scripts/setup-test.sh"
  rm -rf "$kafka.new"
  mkdir -p "$kafka.new"
  mvn --batch-mode --quiet -Dstyle.color=never --file "$here/kafka/pom.xml" dependency:copy-dependencies \
    -DincludeScope=runtime -DoutputDirectory="$kafka.new" ||
    fail "Maven could not fetch Kafka $KAFKA_VERSION"
  mv "$kafka.new" "$kafka"
fi
ln -sfn "$kafka" "$FLOODMARK_CACHE/kafka"

gateway="$TOOLS/versitygw-$VERSITYGW_VERSION"
if [ ! -x "$gateway/versitygw" ]; then
  say "building versitygw $VERSITYGW_VERSION (an S3 server)"
  have go || fail "Go is missing: run scripts/setup-test.sh"
  GOBIN="$gateway" go install -ldflags="-s -w" "github.com/versity/versitygw/cmd/versitygw@$VERSITYGW_VERSION" ||
    fail "Go could not build versitygw $VERSITYGW_VERSION"
fi
ln -sfn "$gateway/versitygw" "$FLOODMARK_CACHE/versitygw"
