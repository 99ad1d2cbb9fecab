package test

import (
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/internal/audit"
)

// TestAuditKeep has a sidecar keep a megabyte of its log under load, with a sink
// that is down for a while, and kills it again and again; and the issuer its copy.
// Nothing goes that the sink has not got, and what is left verifies, with evidence
// of the rest.
func TestAuditKeep(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 10*time.Minute)
	const keep = "  keep: {max_bytes: 1048576, without_sink: true}\n"
	w.write("issuer", fmt.Sprintf("trust_domain: %s\ndata_dir: %s\nlisten: %s\npolicies: %s\naudit:\n%s", trustDomain, w.path("issuer"), w.issuer, w.policy, keep))
	issuer := w.startIssuer()
	w.serveBilling("audit: full")
	peer := &webPeer{t: t, addr: freePort(t), section: "http: {url: \"http://%s/in\"}", take: takeNDJSON}
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.join(pay)
	w.write("billing", w.sidecarConfig(bill, w.token("billing"))+"audit:\n"+keep+"  sinks:\n    - {name: http, "+peer.config()+"}\n")
	peer.start()
	t.Cleanup(func() { peer.stop() })
	billing := w.startNode(bill)
	payment := w.startNode(pay)
	const charges = "http://billing.mesh.internal/v1/charges"
	w.awaitReach(payment, charges)
	log := w.path("billing", "audit.jsonl")
	first := func() uint64 {
		t.Helper()
		_, n, _, err := audit.Begin(log)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	load := func(d time.Duration) {
		t.Helper()
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				ask[loadReply](payment, "/load", loadRequest{URL: charges, For: d, Every: time.Millisecond})
			})
		}
		if all.Wait(); t.Failed() {
			t.FailNow() // ask ends its own goroutine only
		}
	}
	peer.stop()
	for last := uint64(0); last < 4000; {
		load(time.Second)
		var err error
		if last, err = audit.LastSeq(log); err != nil {
			t.Fatal(err)
		}
	}
	billing.kill()
	billing = w.startNode(bill) // the keeper looks at once
	if n := first(); n != 1 {
		t.Fatalf("the sink is down, and the log begins with record %d", n)
	}
	peer.start()
	for kills, from := 0, uint64(1); kills < 3; kills++ {
		w.awaitReach(payment, charges)
		w.await("see records removed", func() bool { load(100 * time.Millisecond); return first() > from })
		from = first()
		billing.kill() // perhaps within a removal
		if r := w.sallyport("audit", "verify", log); r.Code != 0 && r.Code != 3 {
			t.Fatalf("after a kill: %s", r.Output)
		}
		billing = w.startNode(bill)
	}
	w.awaitReach(payment, charges)
	out := w.awaitVerified(log)
	last, err := audit.LastSeq(log)
	if err != nil {
		t.Fatal(err)
	}
	w.await("see the sink at the end", func() bool { return uint64(len(sent(peer))) >= last })
	seen := sent(peer)
	for n := uint64(1); n <= last; n++ {
		if !seen[n] {
			t.Fatalf("the sink has not got record %d of %d", n, last)
		}
	}
	if !strings.Contains(out, "pass  kept from record ") || !strings.Contains(out, "by audit.keep.max_bytes 1048576, evidence signed") {
		t.Errorf("the removal is not told:\n%s", out)
	}
	t.Logf("%d records, kept from %d, sink has all:\n%s", last, first(), out)

	issuer.stop()
	w.startIssuer()
	copies, err := filepath.Glob(w.path("issuer", "received", "*billing*.jsonl"))
	if err != nil || len(copies) != 1 {
		t.Fatal(copies, err)
	}
	w.await("see the copy kept by the rule", func() bool {
		r := w.sallyport("audit", "verify", w.path("issuer", "received"))
		if r.Code == 1 || r.Code == 2 {
			t.Fatal(r.Output)
		}
		return r.Code == 0 && strings.Contains(r.Output, "kept from record ")
	})
	w.awaitVerified(w.path("issuer", "audit.jsonl"))
}

// sent has the numbers of the records that a peer has got.
func sent(p *webPeer) map[uint64]bool {
	out := map[uint64]bool{}
	for _, line := range p.lines() {
		out[seqOf(line)] = true
	}
	return out
}
