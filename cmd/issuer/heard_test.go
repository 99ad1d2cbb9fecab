package main

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

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
	h.take(lines[:4], 0)
	h.take(lines, 4) // the first four come again
	denials := map[string]uint64{}
	for _, d := range h.Denials() {
		denials[d.Dst] = d.N
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

// TestHeardIsBounded floods it with kinds of denials.
func TestHeardIsBounded(t *testing.T) {
	h := newHeard(func() *mesh.Snapshot { return nil })
	for i := range 3 * maxPassages {
		r := audit.Record{Time: time.Unix(int64(i), 0), Kind: audit.KindDecision, Decision: audit.Deny, Dst: "host:a.test", Path: time.Duration(i).String(), ID: time.Duration(i).String()}
		h.denied(&r)
		h.passed(&r)
	}
	if n := len(h.Denials()); n != maxKinds {
		t.Errorf("%d kinds of denials are kept, want %d", n, maxKinds)
	}
	if p := h.Passages(); len(p) != maxPassages || p[len(p)-1].ID != time.Duration(3*maxPassages-1).String() {
		t.Errorf("%d passages are kept, want the newest %d", len(p), maxPassages)
	}
}
