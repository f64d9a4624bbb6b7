#!/usr/bin/env bash
# What the tests need beyond a build: a JDK and Maven for a real Kafka broker, Go for a real S3 server, and what lays networks
# between processes and cuts them.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
"$(dirname "$0")/setup-build.sh"

JAVA_WANTED=17
GO_WANTED=1.22

java_version() { java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p'; }

if ! have java || ! at_least "$(java_version)" "$JAVA_WANTED"; then packages openjdk-17-jdk-headless; fi
have mvn || packages maven
go_toolchain "$GO_WANTED" "the tests"
packages iproute2 nftables
kit="$(dirname "$0")/../tests/kit/setup.sh"
[ ! -e "$kit" ] || bash "$kit"
