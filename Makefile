# One target a task. "make help" lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := bin
PROGRAMS := issuer sidecar gateway sallyport
LDFLAGS := -s -w
# What cmd/sidecar is compiled by in a release and in the benches. Compiling by
# a profile takes minutes more, so that a build for every day does without.
PROFILE := cmd/sidecar/pgo/default.pgo
PGO ?= off
TOOL := go tool -modfile=tools/go.mod
# The race detector needs a C compiler; without one the tests run all the same.
RACE := $(shell command -v gcc >/dev/null 2>&1 && echo -race)
# Files with tests that do a part of their work under the race detector, and the
# tests in them.
PARTLY = $(shell grep -rl --include='*_test.go' 'meshtest[.]Race\b' cmd internal)
PARTLY_TESTS = $(shell sed -nE 's/^func (Test[A-Za-z0-9]+).*/\1/p' $(PARTLY) | paste -sd'|')
# Compiled as the programs are: once, then, of all that is compiled without RACE.
PLAIN := CGO_ENABLED=0 GOFLAGS="$${GOFLAGS:-} -trimpath"
ARGS ?=
N ?= 4000
FUZZTIME ?= 60s

.PHONY: help
help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.PHONY: build
build: ## the four programs, in bin/
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ $(addprefix ./cmd/,$(filter-out sidecar,$(PROGRAMS)))
	@CGO_ENABLED=0 go build -trimpath -pgo=$(PGO) -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/sidecar

.PHONY: release
release: ## the four programs as they are to be shipped: the sidecar compiled by its profile
	@$(MAKE) --no-print-directory build PGO=$(PROFILE)

.PHONY: kubernetes-test
kubernetes-test: build ## the manifests and the pods of the injector, read by the types of Kubernetes
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/injector
	@cd test/kubernetes && PROGRAMS=$(CURDIR)/$(BIN) go test -count=1 ./...

VERSION ?= 0.0.0
# What a package is made of. Its test does without the profile, which takes minutes.
PACKAGED ?= release
.PHONY: package
package: ## the .deb and the .rpm, in bin/packages (VERSION=1.2.3)
	@$(MAKE) --no-print-directory $(PACKAGED)
	@rm -rf $(BIN)/packages && mkdir -p $(BIN)/packages
	@for p in deb rpm; do VERSION=$(VERSION) ARCH=$$(go env GOARCH) go tool -modfile=tools/package/go.mod nfpm package -f deploy/package/nfpm.yaml -p $$p -t $(BIN)/packages/ >&2; done

.PHONY: package-test
package-test: ## the .deb installed into a root of its own, its units looked at by systemd
	@$(MAKE) --no-print-directory package PACKAGED=build
	@PACKAGES=$(CURDIR)/$(BIN)/packages go test ./test/packages -count=1 -v | grep -vE '^(=== | *--- PASS|PASS|ok )'

.PHONY: issuer-pkcs11
issuer-pkcs11: ## the issuer with PKCS#11, in bin/; needs a C compiler
	@CGO_ENABLED=1 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/issuer-pkcs11 ./cmd/issuer

.PHONY: demo
demo: ## a small mesh on this machine: real processes, real denials (ARGS="--for 20s --json")
	@echo "compiling the four programs: about two minutes the first time" >&2
	@$(MAKE) --no-print-directory build
	@$(BIN)/sallyport demo $(ARGS)

.PHONY: test
test: ## every test, with the race detector where a C compiler is
	go vet $(RACE) ./...
	@# Tests wait much of the time: two packages more than there are cores at once.
	go test $(RACE) -vet=off -timeout 10m -p $$(($$(getconf _NPROCESSORS_ONLN) + 2)) $$(go list ./... | grep -vE '^sallyport/test(/manual)?$$')
	$(if $(RACE),$(PLAIN) go test -vet=off -timeout 10m -run '^($(PARTLY_TESTS))$$' $(addprefix ./,$(sort $(dir $(PARTLY)))))
	@# Compiled before the tests that start it, not beside them.
	-@cd tools/stepca && $(PLAIN) go build -o /dev/null .
	-@cd tools/h2spec && $(PLAIN) go build -o /dev/null github.com/summerwind/h2spec/cmd/h2spec
	-@cd tools/interop && $(PLAIN) go build -o /dev/null google.golang.org/grpc/interop/client google.golang.org/grpc/interop/server
	$(PLAIN) go test -vet=off -timeout 5m ./test/manual
	@# After the others, not beside them: these hold real processes to lives of
	@# a few seconds, which a test that takes every core would starve. Most of
	@# the time they wait, so one more than there are cores may run at once.
	go test $(RACE) -vet=off -timeout 15m -parallel $$(($$(getconf _NPROCESSORS_ONLN) + 1)) ./test

.PHONY: docs-test
docs-test: ## every command and configuration of the README and docs/, held against the programs or carried out
	@go test ./test/manual -count=1 -v | grep -vE '^(=== |--- PASS|PASS|ok )'

# What this version has to get on with: the newest tag below it, or without one an
# ancestor from before routes, rollouts, counts of calls and sallyport/1.
SKEW ?= $(shell git describe --tags --abbrev=0 HEAD^ 2>/dev/null || echo 41753fb)
.PHONY: skew-test
skew-test: build ## issuer, gateway and sidecars of the last tagged build beside these, each way about (SKEW=COMMIT)
	@rm -rf $(BIN)/skew && mkdir -p $(BIN)/skew/src
	@GIT_NO_LAZY_FETCH=1 git archive '$(SKEW)' | tar -x -C $(BIN)/skew/src || { echo "skew-test: this clone has no $(SKEW): git fetch --unshallow --tags" >&2; exit 1; }
	@cd $(BIN)/skew/src && CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o ../ ./cmd/issuer ./cmd/gateway ./cmd/sidecar
	@rm -rf $(BIN)/skew/src
	@E2E_BIN=$(CURDIR)/$(BIN) SKEW_BIN=$(CURDIR)/$(BIN)/skew go test $(RACE) -count=1 -vet=off -timeout 5m -run '^TestSkew$$' -v ./test | grep -E '^ *--- |^(FAIL|panic|ok)|_test.go'

.PHONY: check
check: ## format, vet, staticcheck, and the programs beside those of an older version
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "gofmt would change:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet $(RACE) ./...
	@$(PLAIN) go build -modfile=tools/go.mod -o $(BIN)/staticcheck honnef.co/go/tools/cmd/staticcheck
	GOFLAGS="$${GOFLAGS:-} $(RACE)" $(BIN)/staticcheck ./...
	@# A clone without the history has the wire of old, in internal/control/testdata.
	@if GIT_NO_LAZY_FETCH=1 git archive '$(SKEW)' go.mod >/dev/null 2>&1; then $(MAKE) --no-print-directory skew-test; \
	  else echo "skew-test is left out: this clone has no $(SKEW); to run it: git fetch --unshallow --tags, make skew-test"; fi

.PHONY: lint
lint: ## golangci-lint; compiling it takes minutes the first time
	$(TOOL) golangci-lint run ./...

.PHONY: vuln
vuln: ## govulncheck; needs to reach the Go vulnerability database
	$(TOOL) govulncheck ./...

.PHONY: bench
bench: ## the benchmarks of the judge, the HTTP engine and the audit log
	go test -run '^$$' -bench . -benchmem ./internal/http1 ./internal/authz ./internal/audit

.PHONY: bench-issuer
bench-issuer: ## SVIDs per second of a real issuer beside crypto/x509 alone (ARGS="-rounds 9")
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer
	@go build -o $(BIN)/bench-issuer ./bench/issuer
	@$(BIN)/bench-issuer -issuer $(BIN)/issuer $(ARGS)

.PHONY: bench-fleet
bench-fleet: ## N proxies on one issuer: an edit until the ack of each (N=4000)
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer
	@go build -o $(BIN)/bench-fleet ./bench/fleet
	@$(BIN)/bench-fleet -issuer $(BIN)/issuer -n $(N) $(ARGS)

.PHONY: bench-http1
bench-http1: ## a pair of sidecars beside pairs of nginx, HAProxy and net/http (ARGS="-rounds 9")
	@for p in nginx haproxy; do command -v $$p >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$p >/dev/null; }; done
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer
	@CGO_ENABLED=0 go build -trimpath -pgo=$(PROFILE) -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/sidecar
	@go build -o $(BIN)/bench-http1 ./bench/http1
	@$(BIN)/bench-http1 -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar $(ARGS)

.PHONY: h2spec
h2spec: ## h2spec against every listener of real sidecars that speaks HTTP/2
	@go test -count=1 -vet=off -run '^TestH2spec$$' -v ./test | grep -v '^=== '

.PHONY: pgo
pgo: ## the profile for PGO anew, from the loads of bench-http1, bench-h2 and bench-grpc
	@CGO_ENABLED=0 go build -trimpath -o $(BIN)/ ./cmd/issuer ./cmd/sidecar
	@for b in http1 h2; do go build -o $(BIN)/bench-$$b ./bench/$$b; done
	@for s in 64c-1k 64c-64k; do $(BIN)/bench-http1 -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar -scenes $$s -profile $(BIN)/pgo-$$s; done
	@$(BIN)/bench-h2 -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar -profile $(BIN)/pgo-h2
	@$(BIN)/bench-h2 -grpc -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar -profile $(BIN)/pgo-grpc
	@go tool pprof -proto $(foreach s,64c-1k 64c-64k h2 grpc,$(BIN)/pgo-$(s)-client $(BIN)/pgo-$(s)-server) | \
	  gunzip | LC_ALL=C sed "s|$(CURDIR)/$(BIN)/sidecar|$$(tr 'A-Za-z0-9/._-' x <<<'$(CURDIR)/$(BIN)/sidecar' | tr -d '\n')|" | gzip -n9 >cmd/sidecar/pgo/default.pgo # where it ran is nobody's business

.PHONY: bench-memory
bench-memory: ## what a sidecar holds at rest, and for each idle connection (ARGS="-conns 2000")
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer
	@CGO_ENABLED=0 go build -trimpath -pgo=$(PROFILE) -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/sidecar
	@go build -o $(BIN)/bench-memory ./bench/memory
	@$(BIN)/bench-memory -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar $(ARGS)

.PHONY: bench-h2 bench-grpc
bench-h2: ## the same over HTTP/2 (ARGS="-rounds 9")
bench-grpc: ## the same with unary calls of gRPC (ARGS="-rounds 9")
bench-h2 bench-grpc:
	@for p in nginx haproxy; do command -v $$p >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$p >/dev/null; }; done
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer
	@CGO_ENABLED=0 go build -trimpath -pgo=$(PROFILE) -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/sidecar
	@go build -o $(BIN)/bench-h2 ./bench/h2
	@$(BIN)/bench-h2 $(if $(findstring grpc,$@),-grpc) -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar $(ARGS)

.PHONY: interop
interop: ## client and server of grpc-go through a pair of sidecars, every case
	@go test ./test -run '^TestInterop$$' -count=1 -v | sed -E '/^(ok|PASS|FAIL)\s*/d'

.PHONY: gwconformance
gwconformance: ## the tests of the Gateway API for HTTPRoute and GRPCRoute against real sidecars
	@go build -o $(BIN)/ ./cmd/issuer ./cmd/sidecar ./cmd/sallyport
	@cd test/gwconformance && go test -c -vet=off -o $(CURDIR)/$(BIN)/gwconformance.test .
	@GWCONFORMANCE_BIN=$(CURDIR)/$(BIN) $(BIN)/gwconformance.test -test.v $(ARGS) | grep -E '^ *--- |^\{|^(FAIL|panic)|not ready yet|did not come'

.PHONY: page-test
page-test: ## the operator's page in Debian's Chromium: a tour, keyboard alone, axe-core, 1,000 services; screenshots in bin/page
	@cd test/page && $(PLAIN) go test -count=1 -vet=off -timeout 10m -v . | grep -E '^ *--- |^\{|^(FAIL|panic)|page_test.go'

.PHONY: bench-tcp
bench-tcp: ## streams through a pair of sidecars beside nginx, HAProxy and stunnel (ARGS="-rounds 9")
	@dpkg -s nginx libnginx-mod-stream haproxy stunnel4 >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq --no-install-recommends nginx libnginx-mod-stream haproxy stunnel4 >/dev/null; }
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer
	@CGO_ENABLED=0 go build -trimpath -pgo=$(PROFILE) -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/sidecar
	@go build -o $(BIN)/bench-tcp ./bench/tcp
	@$(BIN)/bench-tcp -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar $(ARGS)

.PHONY: bench-handshake
bench-handshake: ## new connections of mutual TLS to a sidecar, nginx and HAProxy (ARGS="-rounds 9")
	@dpkg -s nginx libnginx-mod-stream haproxy >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq --no-install-recommends nginx libnginx-mod-stream haproxy >/dev/null; }
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer
	@CGO_ENABLED=0 go build -trimpath -pgo=$(PROFILE) -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/sidecar
	@go build -o $(BIN)/bench-handshake ./bench/handshake
	@$(BIN)/bench-handshake -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar $(ARGS)

.PHONY: bench-dns
bench-dns: ## the nameserver of a sidecar beside unbound and dnsmasq, asked by dnsperf (ARGS="-rounds 9")
	@for p in dnsperf unbound dnsmasq; do command -v $$p >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends dnsperf unbound dnsmasq-base >/dev/null; }; done
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer
	@CGO_ENABLED=0 go build -trimpath -pgo=$(PROFILE) -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/sidecar
	@go build -o $(BIN)/bench-dns ./bench/dns
	@$(BIN)/bench-dns -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar $(ARGS)

.PHONY: bench-attack
bench-attack: ## what other traffic notices of crowds, slow heads, deaf peers and floods of resets (ARGS="-scenes in")
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer ./cmd/gateway
	@CGO_ENABLED=0 go build -trimpath -pgo=$(PROFILE) -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/sidecar
	@go build -o $(BIN)/bench-attack ./bench/attack
	@$(BIN)/bench-attack -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar -gateway $(BIN)/gateway $(ARGS)

.PHONY: bypass
bypass: ## every bypass of the corpus, of gateway, nameserver and kernel, and what became of it
	@BYPASS_TABLE=1 go test ./internal/egress ./internal/nameserver ./internal/capture/redirect -run '^TestBypass$$' -count=1 -v | awk ' \
	  /"name":"bypass"/ { match($$0, /"passed":[0-9]+/); p += substr($$0, RSTART+9, RLENGTH-9); match($$0, /"failed":[0-9]+/); f += substr($$0, RSTART+9, RLENGTH-9); n++; next } \
	  /^ *--- SKIP/ { s++; print } \
	  /^(open: |[0-9])/ || /FAIL/ { print } \
	  END { ok = f == 0 && n == 3 && s == 0; printf "{\"name\":\"bypass\",\"ok\":%s,\"cases\":{\"tried\":%d,\"passed\":%d,\"failed\":%d,\"skipped\":%d}}\n", ok ? "true" : "false", p+f, p, f, s; exit !ok }'

.PHONY: bench-egress
bench-egress: ## tunnels through a gateway beside Squid with client certificates and tinyproxy (ARGS="-rounds 5")
	@{ command -v squid && squid -v | grep -q openssl && command -v tinyproxy; } >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends squid-openssl tinyproxy-bin >/dev/null; }
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer ./cmd/gateway
	@go build -o $(BIN)/bench-egress ./bench/egress
	@$(BIN)/bench-egress -issuer $(BIN)/issuer -gateway $(BIN)/gateway $(ARGS)

.PHONY: bench-route
bench-route: ## what routes cost a call, part by part (ARGS="-rounds 9")
	@go build -o $(BIN)/bench-route ./bench/route
	@$(BIN)/bench-route $(ARGS)

.PHONY: bench-shadow
bench-shadow: ## what a call notices of a shadow that answers, hangs, or is dead (ARGS="-rounds 9")
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/issuer
	@CGO_ENABLED=0 go build -trimpath -pgo=$(PROFILE) -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/sidecar
	@go build -o $(BIN)/bench-shadow ./bench/shadow
	@$(BIN)/bench-shadow -issuer $(BIN)/issuer -sidecar $(BIN)/sidecar $(ARGS)

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (60s)
	@for p in $$(go list ./internal/... ./cmd/...); do \
	  for f in $$(go test -list '^Fuzz' $$p | grep '^Fuzz' || true); do \
	    echo "$$p $$f"; go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x $$p; \
	  done; \
	done

.PHONY: generate
generate: ## the gRPC code from mesh.proto; needs protoc
	go generate ./internal/control/...

.PHONY: sizes
sizes: build ## the stripped size of each program
	@for p in $(PROGRAMS); do printf '%-10s %5.1f MB\n' $$p $$(echo "$$(stat -c %s $(BIN)/$$p)/1000000" | awk -F/ '{print $$1/$$2}'); done
