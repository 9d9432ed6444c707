# `make help` lists the targets; CONTRIBUTING.md says when to use which.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Targets share target/, .venv and .tools.
.NOTPARALLEL:

IMAGE ?= payment-sim-api
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
GRPC_PORT ?= 8030
OPS_PORT ?= 8031
# Every 10th cycle ends the receivers instead of the service: these are 20 kills and more.
CYCLES ?= 24

# The binaries of the package: payment-sim, and whatever stands in src/bin.
BINARIES := payment-sim $(basename $(notdir $(wildcard src/bin/*.rs)))
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
BENCH := bench/Cargo.toml

# Runs a command with the tools of the repository in its environment, setting them up first.
WITH_TOOLS := scripts/dev-env.sh exec

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: ## build and serve with the built-in defaults (needs Rust alone)
	cargo run --locked --release --bin payment-sim

.PHONY: build
build: ## release build into bin/
	cargo build --locked --release --bins
	mkdir -p bin
	for name in $(BINARIES); do install -m 755 "$(TARGET_DIR)/release/$$name" "bin/$$name"; done
	ln -sf payment-sim bin/payment-sim-api

.PHONY: test
test: ## every test, with a short crash test; sets up .venv and .tools itself
	$(WITH_TOOLS) cargo test --locked
	CRASH_CYCLES=3 $(WITH_TOOLS) cargo test --locked --features faults --test crash
	cargo build --locked
	PAYMENT_SIM_BIN=$(TARGET_DIR)/debug/payment-sim $(WITH_TOOLS) sh -c 'if [ -n "$$PAYMENT_SIM_VENV" ]; then python -m pytest tests/py; else echo "skipped: tests/py, there is no .venv"; fi'

.PHONY: lint
lint: ## formatting, clippy, rustdoc, protocol, dependencies, Dockerfile, YAML, scripts
	cargo fmt --all --check
	cargo fmt --manifest-path $(BENCH) --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --features faults -- -D warnings
	cargo clippy --locked --all-targets --manifest-path $(BENCH) --target-dir $(TARGET_DIR) -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --document-private-items
	scripts/lint.sh

.PHONY: ci
ci: dev-deps lint bench-smoke test ## what a change must pass: lint and test (.ci/run calls it)

.PHONY: crash-test
crash-test: ## kill -9 under load in CYCLES=24 cycles, receivers and queue dying too, with the negative controls
	CRASH_CYCLES=$(CYCLES) cargo test --locked --release --features faults --test crash -- --nocapture

.PHONY: bench
bench: bench-test bench-store bench-footprint bench-webhooks bench-requests bench-delivery ## the benchmarks below

.PHONY: bench-requests
bench-requests: bench-creates bench-creates-memory bench-gets bench-open-loop ## what calls cost: the four of them

# What is measured, and beside it in one folder all that measures.
.PHONY: bench-build
bench-build:
	cargo build --locked --release --bin payment-sim --target-dir $(TARGET_DIR)
	cargo build --locked --release --bins --manifest-path $(BENCH) --target-dir $(TARGET_DIR)

# Not in CI: the benchmarks build the dependencies once more, with features of their own.
.PHONY: bench-test
bench-test: ## the benchmarks' own tests
	cargo test --locked --lib --manifest-path $(BENCH) --target-dir $(TARGET_DIR)

.PHONY: bench-smoke
bench-smoke: ## allocations a request, against tests/allocations.json (UPDATE=1 writes it anew)
	cargo test --locked --test allocations -- --nocapture

.PHONY: bench-store
bench-store: bench-build ## whole payments a second through the store alone
	$(TARGET_DIR)/release/store $(ARGS)

.PHONY: bench-footprint
bench-footprint: bench-build ## memory and start-up time with 5 million payments stored
	$(TARGET_DIR)/release/footprint $(ARGS)

.PHONY: bench-webhooks
bench-webhooks: bench-build ## what receivers that hang, drip or reset cost a good one
	$(TARGET_DIR)/release/webhooks $(ARGS)

.PHONY: bench-creates
bench-creates: bench-build ## durable creates a second ÷ a bare tonic echo's, over 60 s
	$(TARGET_DIR)/release/creates $(ARGS)

.PHONY: bench-creates-memory
bench-creates-memory: bench-build ## the same with nothing on the disk, 5 pairs of 10 s
	$(TARGET_DIR)/release/creates store=memory $(ARGS)

.PHONY: bench-gets
bench-gets: bench-build ## reads a second among 5 million payments ÷ an echo of the same bytes
	$(TARGET_DIR)/release/gets $(ARGS)

.PHONY: bench-open-loop
bench-open-loop: bench-build ## latency at 30,000 creates a second, without coordinated omission
	$(TARGET_DIR)/release/open_loop $(ARGS)

.PHONY: bench-delivery
bench-delivery: bench-courier bench-whole bench-lateness ## what deliveries cost: the three of them

.PHONY: bench-courier
bench-courier: bench-build ## signed webhooks a second ÷ those of bare hyper connections
	$(TARGET_DIR)/release/courier $(ARGS)

.PHONY: bench-whole
bench-whole: bench-build ## whole payments a second with an outbox that does not grow, and what one costs
	$(TARGET_DIR)/release/whole $(ARGS)

.PHONY: bench-lateness
bench-lateness: bench-build ## how late payments are decided at 10,000 due a second
	$(TARGET_DIR)/release/lateness $(ARGS)

# The two commands of the first system's README, to the letter.
.PHONY: perf-test
perf-test: export PATH := $(CURDIR)/.tools/bin:$(PATH)
perf-test: dev-deps ## ghz against a running service: 1,000 creates, then 30 s of load; h2load on its pages
	@command -v ghz >/dev/null || { echo 'perf-test needs ghz, which `make dev-deps` installs where Go is' >&2; exit 1; }
	@curl -fsS -o /dev/null http://localhost:$(OPS_PORT)/readyz || { echo 'no service is ready on port $(OPS_PORT): start one with `make run`' >&2; exit 1; }
	ghz --insecure --proto proto/payment/v1/payment.proto \
	  --call payment.v1.PaymentService.CreatePaymentIntent \
	  -d '{"reservation_id":"perf-test","user_id":"user-test","amount":{"amount":100000,"currency":"KRW"},"scenario":"approve"}' \
	  -c 10 -n 1000 localhost:$(GRPC_PORT)
	ghz --insecure --proto proto/payment/v1/payment.proto \
	  --call payment.v1.PaymentService.CreatePaymentIntent \
	  -d '{"reservation_id":"load-test","user_id":"user-load","amount":{"amount":50000,"currency":"KRW"},"scenario":"random"}' \
	  -c 50 -z 30s localhost:$(GRPC_PORT)
	@if command -v h2load >/dev/null; then set -x; \
	  h2load --h1 -c 10 -n 20000 http://localhost:$(OPS_PORT)/health; \
	  h2load --h1 -c 10 -n 2000 http://localhost:$(OPS_PORT)/metrics; \
	else echo 'skipped: h2load on /health and /metrics, it is not installed (nghttp2 has it)'; fi

.PHONY: demo-aws
demo-aws: dev-deps ## payment to reservation on an emulated AWS, seen step by step
	cargo build --locked --bins
	$(WITH_TOOLS) sh -c 'python scripts/demo_aws.py "$(TARGET_DIR)/debug"'

.PHONY: grpcui
grpcui: ## a web page to call the service from
	@if command -v grpcui >/dev/null; then \
	  exec grpcui -plaintext localhost:$(GRPC_PORT); \
	else \
	  echo 'grpcui is not installed: go install github.com/fullstorydev/grpcui/cmd/grpcui@latest (grpcurl, in .tools/bin after `make dev-deps`, does the same from the command line)'; \
	fi

.PHONY: status
status: ## health and the main metrics of a running service
	@curl -fsS http://localhost:$(OPS_PORT)/health || { echo 'nothing answers on port $(OPS_PORT)' >&2; exit 1; }
	@echo
	@curl -fsS http://localhost:$(OPS_PORT)/metrics \
	  | grep -E '^(payment|grpc_server_handled|webhook_deliveries|events_published|outbox|idempotency|process_(resident|open|cpu))' \
	  | grep -v '_bucket{' || true

.PHONY: docker-build
docker-build: ## build the image
	docker build -t $(IMAGE):latest -t $(IMAGE):$(VERSION) .

.PHONY: docker-run
docker-run: docker-build ## build the image and run it with its data in a volume
	docker run --rm --name $(IMAGE) --read-only --cap-drop ALL --security-opt no-new-privileges \
	  -v payment-sim-data:/data -p $(GRPC_PORT):8030 -p $(OPS_PORT):8031 $(IMAGE):latest

.PHONY: k8s
k8s: ## render k8s/payment-sim-api.yaml from k8s/base
	$(WITH_TOOLS) sh -c 'kustomize build k8s/base >k8s/payment-sim-api.yaml.new && mv k8s/payment-sim-api.yaml.new k8s/payment-sim-api.yaml'

.PHONY: dev-deps
dev-deps: ## set up .venv and .tools for tests and linters
	scripts/dev-env.sh

.PHONY: clean
clean: ## remove what was built and set up; stored payments in data/ stay
	cargo clean
	rm -rf bin .venv .tools .run
