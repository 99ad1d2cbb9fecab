package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

// TestHeard reads what a log of a proxy says of denials and tunnels, twice over.
func TestHeard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	log, err := audit.Open(audit.Config{Path: path, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	const web, billing, host = "spiffe://corp.example/ns/shop/sa/web", "spiffe://corp.example/ns/shop/sa/billing", "host:api.test"
	deny := audit.Record{Kind: audit.KindDecision, Decision: audit.Deny, Reason: "no_row", Dir: "in", Src: web, Dst: billing, Port: 8443, Verb: "GET", Path: "/x"}
	clock := time.Now().Add(-time.Hour) // of the issuer, behind the proxy's
	var ids []string
	for _, r := range []audit.Record{
		deny, deny,
		{Kind: audit.KindDecision, Decision: audit.Allow, Rule: "r-1", Dir: "in", Src: web, Dst: billing, Verb: "GET", Path: "/y"},
		{Kind: audit.KindEgressOpen, Decision: audit.Allow, Rule: "o-1", Dir: "out", Src: billing, Dst: host, Port: 443, Verb: "CONNECT", ID: "g-1"},
		{Kind: audit.KindEgressClose, Decision: audit.Allow, Rule: "o-1", Dir: "out", Src: billing, Dst: host, Port: 443, Verb: "CONNECT", ID: "g-1", BytesUp: 3, BytesDown: 5, Duration: time.Second, Reason: "done", Done: true},
		{Kind: audit.KindDecision, Decision: audit.Deny, Reason: "no_row", Dir: "out", Src: web, Dst: "host:evil.test", Port: 443, Verb: "CONNECT", Path: "-"},
	} {
		if err := log.Append(&r); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, r.ID)
	}
	var lines [][]byte
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	if err := audit.Each(path, func(line []byte, _ *audit.Record) error {
		lines = append(lines, bytes.TrimSuffix(bytes.Clone(line), []byte("\n")))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	h := newHeard(func() *mesh.Snapshot { return nil })
	h.now = func() time.Time { return clock }
	proxy, gateway := proxyNamed(web), proxyNamed("spiffe://corp.example/ns/edge/sa/gateway")
	h.take(gateway, leads(false), lines, 0)
	if n, p := len(h.Denials()), len(h.Passages()); n+p > 0 {
		t.Fatalf("a proxy is believed %d denials and %d tunnels of others", n, p)
	}
	h.take(gateway, leads(true), lines, 0)
	if n, p := len(h.Denials()), len(h.Passages()); n != 1 || p != 2 {
		t.Fatalf("a gateway is believed %d denials and %d tunnels, want one and two on the way out", n, p)
	}
	h = newHeard(func() *mesh.Snapshot { return nil })
	h.now = func() time.Time { return clock }
	h.take(proxy, leads(true), lines[:4], 0)
	h.take(proxy, leads(true), lines, 4) // the first four come again
	denials := map[string]uint64{}
	for _, d := range h.Denials() {
		denials[d.Dst] = d.N
		if d.Last.After(clock) {
			t.Errorf("a denial at %v, which is to come", d.Last)
		}
		if d.Dst == billing && d.ID != ids[1] {
			t.Errorf("the newest of the denials is told as %s, want %s", d.ID, ids[1])
		}
	}
	if denials[billing] != 2 || denials["host:evil.test"] != 1 || len(denials) != 2 {
		t.Errorf("denials %v", denials)
	}
	p := h.Passages()
	if len(p) != 2 || p[0].State != "closed" || p[0].Up != 3 || p[0].Down != 5 || p[0].Took != time.Second || p[1].State != "refused" {
		t.Errorf("passages %+v", p)
	}
}

func proxyNamed(workload string) proxyName {
	return proxyName{spiffeid.RequireFromString("spiffe://corp.example/spire/agent/join_token/a"), spiffeid.RequireFromString(workload)}
}

func leads(yes bool) func() bool { return func() bool { return yes } }

// TestHeardIsBounded floods it with kinds of denials, from one proxy and of one
// pair, from one and of many, and from many.
func TestHeardIsBounded(t *testing.T) {
	h := newHeard(func() *mesh.Snapshot { return nil })
	at := 0
	flood := func(by, dst func(i int) string) {
		for i := range 3 * maxPassages {
			at++
			r := audit.Record{Time: time.Unix(int64(at), 0), Kind: audit.KindDecision, Decision: audit.Deny, Dst: dst(i), Path: fmt.Sprint(at), ID: fmt.Sprint(at)}
			h.denied(proxyNamed(by(i)), &r)
			h.passed(proxyNamed(by(i)), &r)
		}
	}
	one := func(int) string { return "spiffe://corp.example/a" }
	some := func(i int) string { return fmt.Sprint("spiffe://corp.example/p", i%8) }
	host := func(i int) string { return fmt.Sprintf("host:h%d.test", i) }
	for _, c := range []struct {
		by, dst         func(int) string
		kinds, passages int
	}{
		{one, func(int) string { return "host:a.test" }, maxKindsOfPair, maxPassagesOfProxy},
		{one, host, maxKindsOfProxy, maxPassagesOfProxy},
		{some, host, maxKinds, maxPassages},
	} {
		flood(c.by, c.dst)
		if n := len(h.Denials()); n != c.kinds {
			t.Errorf("%d kinds of denials are kept, want %d", n, c.kinds)
		}
		if p := h.Passages(); len(p) != c.passages || p[len(p)-1].ID != fmt.Sprint(at) {
			t.Errorf("%d passages are kept, want the newest %d", len(p), c.passages)
		}
	}
}
