# The front door. Each target sets up what it lacks (scripts/setup-*.sh), and is quick when nothing has changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo test check simulate fuzz bench image cluster cluster-down e2e e2e-kind generate fmt

# Built files and fetched tools live outside the clone, so that several clones share them.
export FLOODMARK_CACHE ?= $(HOME)/.cache/floodmark
export CARGO_TARGET_DIR ?= $(FLOODMARK_CACHE)/target
export PATH := $(FLOODMARK_CACHE)/tools/bin:$(PATH)
# RocksDB is compiled once and linked by all builds (scripts/setup-rocksdb.sh).
export ROCKSDB_LIB_DIR := $(or $(ROCKSDB_LIB_DIR),$(shell scripts/setup-rocksdb.sh --where))
export ROCKSDB_STATIC ?= 1
# The program that system tests, demo and bench run.
export FLOODMARK_BIN ?= $(CARGO_TARGET_DIR)/release/floodmark

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One selection of packages for all release builds: another one would compile shared dependencies anew.
RELEASED := -p floodmark -p floodmark-controller -p floodmark-tests -p floodmark-bench

build: ## Build the floodmark program, the demo and the benchmark (release)
	@scripts/setup-build.sh
	cargo build --release --locked $(RELEASED) --bins
	@echo "built $(FLOODMARK_BIN)"

demo: build ## Run a Nexmark job, kill it with -9, let it resume, and check its output: no Kafka, S3 or cluster needed
	$(CARGO_TARGET_DIR)/release/demo

test: build ## Run all tests: units, then the whole system against a real Kafka broker and S3 server
	@scripts/setup-test.sh
	cargo test --workspace --locked

check: ## Check formatting, lints, docs, generated files, dependencies and licences
	@scripts/setup-check.sh
	@scripts/check.sh

# How many random lives of jobs to simulate; a hundredth as many more keep their state in RocksDB, on a real disk.
SEEDS ?= 10000
SIMULATION := $(CARGO_TARGET_DIR)/release/floodmark-simulation
simulate: ## Run SEEDS=10000 random lives of jobs with faults of every kind, on all cores, and sum up what was found
	@scripts/setup-build.sh
	cargo build --release --quiet --locked $(RELEASED) -p floodmark-simulation --bin floodmark-simulation
	$(SIMULATION) --seeds $(SEEDS)
	$(SIMULATION) --seeds $$(( ($(SEEDS) + 99) / 100 )) --rocksdb

# Seconds for each fuzz target.
TIME ?= 60
fuzz: ## Fuzz every reader of stored bytes for TIME=60 seconds each (needs a nightly toolchain)
	@scripts/setup-build.sh
	@fuzz/run.sh $(TIME)

bench: build ## Measure pauses, incremental checkpoints, restores and throughput, each beside its goal, in about ten minutes
	@scripts/setup-test.sh
	$(CARGO_TARGET_DIR)/release/floodmark-bench

image: build ## Write the image floodmark:VERSION to a file, without Docker (the Dockerfile makes the same)
	@tests/cluster/image/build.sh

# A cluster of namespaces on this machine, or one of kind's, if Docker runs here: make cluster CLUSTER=kind
CLUSTER ?= namespaces
NODES ?= 3
cluster: ## Bring up a real Kubernetes cluster of NODES=3 on this machine, and say where its kubeconfig is
	@tests/cluster/$(CLUSTER).sh up --nodes $(NODES)

cluster-down: ## End that cluster, and leave nothing of it
	@tests/cluster/$(CLUSTER).sh down

e2e: build ## Prove the operator on a real cluster with a real Kafka broker and S3 server, from its chart and image (SCENARIO=part of a name)
	@scripts/e2e.sh $(SCENARIO)

e2e-kind: build ## The same on a cluster of kind's (Linux, with Docker, kind, kubectl and helm; as root)
	@CLUSTER=kind scripts/e2e.sh $(SCENARIO)

generate: ## Write generated files anew (crds/*.yaml, docs/openapi.json)
	@scripts/setup-build.sh
	cargo build --quiet --workspace --bin crdgen --bin apigen
	$(CARGO_TARGET_DIR)/debug/crdgen crds
	$(CARGO_TARGET_DIR)/debug/crdgen charts/floodmark/generated
	$(CARGO_TARGET_DIR)/debug/apigen > docs/openapi.json.new && mv docs/openapi.json.new docs/openapi.json

fmt: ## Format all code
	cargo fmt --all
