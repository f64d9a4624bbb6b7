# The image of Floodmark: docker build --tag floodmark:0.1.0 .
# The chart's pods run it as it is: not as root, with a root file system that can't be written to.
# (tests/cluster/image/build.sh makes the same for the tests, where no Docker runs.)

FROM rust:1.95.0-bookworm AS build
# The toolchain of this image; rust-toolchain.toml asks for lints, too.
ENV RUSTUP_TOOLCHAIN=1.95.0 FLOODMARK_CACHE=/cache CARGO_TARGET_DIR=/cache/target ROCKSDB_STATIC=1
WORKDIR /floodmark
COPY . .
RUN scripts/setup-build.sh
RUN ROCKSDB_LIB_DIR=$(scripts/setup-rocksdb.sh --where) cargo build --release --locked -p floodmark -p floodmark-controller --bins

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libssl3 libstdc++6 zlib1g \
    && rm -rf /var/lib/apt/lists/* \
    && echo 'floodmark:x:65532:65532::/nonexistent:/usr/sbin/nologin' >>/etc/passwd \
    && echo 'floodmark:x:65532:' >>/etc/group
COPY --from=build /cache/target/release/floodmark /cache/target/release/floodmark-controller /usr/local/bin/
USER 65532:65532
WORKDIR /
ENTRYPOINT ["/usr/local/bin/floodmark"]
