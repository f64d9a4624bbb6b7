# The front door. Each target sets up what it lacks (scripts/setup-*.sh), and is quick when nothing has changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo test test-units test-system check bench generate fmt

# Built files and fetched tools live outside the clone, so that several clones share them.
export FLOODMARK_CACHE ?= $(HOME)/.cache/floodmark
export CARGO_TARGET_DIR ?= $(FLOODMARK_CACHE)/target
export PATH := $(FLOODMARK_CACHE)/tools/bin:$(PATH)
# The program that system tests, demo and bench run.
export FLOODMARK_BIN ?= $(CARGO_TARGET_DIR)/release/floodmark

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the floodmark program (release)
	@scripts/setup-build.sh
	cargo build --release --locked -p floodmark
	@echo "built $(FLOODMARK_BIN)"

demo: build ## Run a Nexmark job, kill it with -9, let it resume, and check its output: no Kafka, S3 or cluster needed
	cargo run --release --locked -p floodmark-tests --bin demo

test: test-units test-system ## Run all tests: units, then the whole system against a real Kafka broker and S3 server

test-units: ## Run the crates' own tests
	@scripts/setup-test.sh
	cargo test --workspace --exclude floodmark-tests --locked

test-system: build ## Run the whole-system tests: crashes, restarts, bad input
	@scripts/setup-test.sh
	cargo test --release --locked -p floodmark-tests

check: ## Check formatting, lints, docs, generated files, dependencies and licences
	@scripts/setup-check.sh
	@scripts/check.sh

bench: build ## Measure CPU-seconds per million events against a real Kafka broker
	@scripts/setup-test.sh
	cargo run --release --locked -p floodmark-bench

generate: ## Write generated files anew (crds/streamjob.yaml)
	@scripts/setup-build.sh
	cargo run --quiet -p floodmark-crds --bin crdgen > crds/streamjob.yaml.new && mv crds/streamjob.yaml.new crds/streamjob.yaml

fmt: ## Format all code
	cargo fmt --all
