# SPDX-License-Identifier: Apache-2.0
#
# make demo   builds bin/sallyport and runs the main job on this machine: two nodes, real traffic
# make test   installs what the tests need and runs everything that CI runs
# make help   lists the rest

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
export CGO_ENABLED := 0
TOOLS := $(CURDIR)/out/tools
export PATH := $(TOOLS):$(PATH)
GOFLAGS_BUILD := -trimpath -buildvcs=false
GO_FILES := $(shell find agent bpf cmd policies userspace vmtests -name '*.go' 2>/dev/null)
EMBEDDED := $(wildcard bpf/*.o) $(shell find cmd policies userspace -name '*.yaml' -o -name '*.fga' 2>/dev/null)
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
APT_PACKAGES := clang llvm libbpf-dev protobuf-compiler nginx-light curl wrk swtpm swtpm-tools openssl iproute2 procps gcc libc6-dev xz-utils cpio
PROTOC_GEN_GRPC := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

# What runs on goroutines of its own; the epoll engine's coroutines are held by
# the conformance suite of both engines.
RACE_PACKAGES := ./userspace/line ./userspace/netloop ./userspace/token ./userspace/identity ./userspace/authority \
	./userspace/anomaly ./userspace/pipeline ./userspace/proxy/... ./policies/compile ./policies/watch \
	./agent/keys ./agent/appcerts ./agent/hosts ./agent/revocations ./agent/control ./agent/metrics ./agent/workload ./agent/sockets ./agent/datapath

.PHONY: help build demo test deps unit race e2e lint generate bench vmtest clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

build: bin/sallyport ## bin/sallyport

bin/sallyport: go.mod go.sum $(GO_FILES) $(EMBEDDED)
	go build $(GOFLAGS_BUILD) -ldflags '-s -w -X main.version=$(VERSION)' -o $@ ./cmd/sallyport

demo: build ## two nodes on this machine, real traffic, one line a case (root)
	bin/sallyport demo

deps: ## installs what the tests need (Debian, Ubuntu; root)
	@missing=""; for p in $(APT_PACKAGES); do \
	  dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  command -v apt-get >/dev/null || { echo "install these first:$$missing" >&2; exit 1; }; \
	  apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
	@mkdir -p $(TOOLS)
	@GOBIN=$(TOOLS) go install google.golang.org/protobuf/cmd/protoc-gen-go
	@GOBIN=$(TOOLS) go install $(PROTOC_GEN_GRPC)

test: deps build unit race e2e ## everything that CI runs (root)

unit: ## unit tests, fuzz seeds, BPF programs in the live kernel (root)
	go vet ./...
	SALLYPORT_TEST_STRICT=1 go test -count=1 -p 2 ./...

race: ## the race detector over what is concurrent
	CGO_ENABLED=1 go test -race -count=1 $(RACE_PACKAGES)

e2e: build ## the demo, judged by what its programs saw (root)
	bin/sallyport demo

bench: build ## measures Sallyport beside nginx and haproxy, into docs/performance.md; half an hour, on an idle machine (root)
	-@$(MAKE) --no-print-directory deps APT_PACKAGES='$(APT_PACKAGES) libnginx-mod-stream haproxy'
	go run ./cmd/sallyport/internal/bench -write docs/performance.md $(BENCH_FLAGS)

lint: ## golangci-lint with the chosen list
	go run $(GOLANGCI) run ./...

KERNELS := 6.1 6.12
vmtest: ## the tests of the kernel half in virtual machines, a kernel each (Debian; slow)
	@command -v qemu-system-x86_64 >/dev/null && command -v xz >/dev/null || { apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-system-x86 xz-utils >/dev/null; }
	@for k in $(KERNELS); do go test -count=1 -timeout 20m ./vmtests -kernel $$k || failed=1; done; [ -z "$${failed:-}" ]

generate: ## BPF objects and generated Go (clang, protoc)
	go generate ./bpf/... ./userspace/... ./agent/... ./policies/...

clean: ## what was built
	rm -rf bin out
