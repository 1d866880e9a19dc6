# `make help` says what there is.
.DEFAULT_GOAL := help
.PHONY: help demo test lab-test soak fuzz bench lab-bench lint dashboard-pictures clean

# Tests that boot QEMU take a processor each.
TEST_THREADS ?= 2

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: ## Migrate a running guest between two agents on this machine
	scripts/setup demo
	scripts/demo

test: ## Every test, in the lab VM too, and a few seconds of each fuzz target
	scripts/setup test
	TEST_THREADS=$(TEST_THREADS) scripts/test

lab-test: ## The tests on a real RDMA stack and other kernels, in the lab VM (LAB="6.12 -- NAME")
	scripts/setup test
	scripts/lab-test $(LAB)

fuzz: ## Each reader of foreign bytes, for FUZZ_SECONDS (default 600)
	scripts/setup test
	scripts/fuzz long

soak: ## 200 migrations in a row with random kills (RAMFERRY_SOAK, RAMFERRY_SOAK_SEED)
	scripts/setup test
	RAMFERRY_SOAK=$${RAMFERRY_SOAK:-200} cargo test --locked --package ramferry --test voyage -- \
		--show-output soak::

lint: ## Formatting, clippy, documentation, dependencies, shell scripts, API
	scripts/setup test
	scripts/lint

bench: ## Speed and cost beside this host's limits, into target/bench/native.json
	scripts/setup test
	cargo bench --locked --package ramferry --bench native

lab-bench: ## Speed over RDMA beside QEMU's own, in the lab VM, into target/bench/lab.json (PARTS="still running rates probes")
	scripts/setup test
	scripts/lab-bench $(PARTS)

dashboard-pictures: ## The dashboards over real migrations, drawn into docs/pictures
	scripts/setup pictures
	scripts/dashboard-pictures

clean: ## Remove everything that was built or fetched
	rm -rf target
