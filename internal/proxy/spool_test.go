package proxy

import (
	"strings"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
)

// A full spool refuses calls with an id that its gap record counts, and stops
// doing so as soon as there is room.
func TestFullSpoolRefuses(t *testing.T) {
	log := audit.NewMemory()
	ledger, err := audit.NewMemoryLedger(log, audit.LedgerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	spool, err := ledger.Spool(audit.SpoolConfig{MaxBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	reader := spool.Reader("a sink", 0)
	r := newRig(t, app(t, hello), func(r *rig) {
		j, err := authz.NewJudge(authz.JudgeConfig{Audit: ledger, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		r.judge, r.inCfg.Judge, r.inCfg.Audit = j, j, ledger
	})
	w := r.dialIn(r.web)
	for _, tt := range []struct {
		name   string
		before func()
		status int
	}{
		{"room", func() {}, 200},
		{"no room", func() {
			for ledger.Append(&audit.Record{Kind: audit.KindAdmin, Detail: strings.Repeat("x", 900)}) == nil {
			}
		}, 503},
		{"room again", func() { seq, _ := log.Head(); reader.Delivered(seq) }, 200},
	} {
		tt.before()
		w.say(okRequest)
		resp, body := w.answer("GET")
		id := resp.Header.Get("Sallyport-Decision")
		if resp.StatusCode != tt.status || tt.status == 503 && (!strings.Contains(id, "-r") || !has(body, id)) {
			t.Errorf("%s: got %d %q %s", tt.name, resp.StatusCode, id, body)
		}
	}
	var refused uint64
	for _, rec := range log.Records() {
		if rec.Kind == audit.KindGap && rec.Reason == "refused" {
			refused += rec.Count
		}
	}
	if refused != 2 { // the record that filled it, and the call
		t.Errorf("gap records count %d refusals, want 2", refused)
	}
}
