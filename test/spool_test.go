package test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sallyport/internal/audit"
)

// TestSpoolFull takes the only sink of a sidecar away until its spool is full:
// calls that must be recorded are refused, and once the sink is back they are
// taken again without a restart, and a gap record counts exactly the refused.
func TestSpoolFull(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	w.startIssuer()
	file := filepath.Join(w.policy, "services.yaml")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bill := []byte("  - name: billing\n")
	w.put(file, string(bytes.Replace(b, bill, append(bill, "    audit: full\n"...), 1)))
	peer := &webPeer{t: t, addr: freePort(t), section: "http: {url: \"http://%s/in\"}", take: takeNDJSON}
	pay, billing := &node{name: "payment"}, &node{name: "billing"}
	w.join(billing)
	w.join(pay)
	w.write("billing", w.sidecarConfig(billing, w.token("billing"))+
		"audit:\n  spool: {max_bytes: 65536}\n  sinks:\n    - {name: http, "+peer.config()+"}\n")
	peer.start()
	t.Cleanup(func() { peer.stop() })
	w.startNode(billing)
	payment := w.startNode(pay)
	load := func(d time.Duration) loadReply {
		return ask[loadReply](payment, "/load", loadRequest{URL: "http://billing.mesh.internal/v1/charges", For: d, Every: 2 * time.Millisecond})
	}
	w.await("reach billing", func() bool { return load(time.Millisecond).OK > 0 })

	peer.stop()
	var refused int
	for range 20 {
		if r := load(time.Second); r.OK < r.Made {
			refused = r.Made - r.OK
			break
		}
	}
	if refused == 0 {
		t.Fatal("no call was refused while nothing is delivered")
	}
	peer.start()
	w.await("be served again", func() bool {
		r := load(time.Millisecond)
		refused += r.Made - r.OK
		return r.OK > 0 && r.OK == r.Made
	})
	counted := func() (n int) {
		if err := audit.Each(w.path("billing", "audit.jsonl"), func(_ []byte, r *audit.Record) error {
			if r.Kind == audit.KindGap && r.Reason == "refused" {
				n += int(r.Count)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	w.await("find every refusal counted", func() bool { return counted() >= refused })
	if n := counted(); n != refused {
		t.Errorf("gap records count %d refusals, the caller saw %d", n, refused)
	}
	t.Logf("%d calls refused and counted", refused)
	w.awaitVerified(w.path("billing", "audit.jsonl"))
}
