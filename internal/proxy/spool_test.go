package proxy

import (
	"strings"
	"sync"
	"testing"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/route"
)

// A full spool refuses calls with an id that its gap record counts, and stops
// doing so as soon as there is room.
func TestFullSpoolRefuses(t *testing.T) {
	r, log, fill, drain := spooled(t)
	w := r.dialIn(r.web)
	for _, tt := range []struct {
		name   string
		before func()
		status int
	}{
		{"room", func() {}, 200},
		{"no room", fill, 503},
		{"room again", drain, 200},
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

// spooled is a rig whose calls are recorded in log. fill leaves no room in its
// spool, drain has a sink take all of it.
func spooled(t *testing.T, change ...func(*rig)) (r *rig, log *audit.Log, fill, drain func()) {
	t.Helper()
	log = audit.NewMemory()
	ledger, err := audit.NewMemoryLedger(log, audit.LedgerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	spool, err := ledger.Spool(audit.SpoolConfig{MaxBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	reader := spool.Reader("a sink", 0)
	r = newRig(t, app(t, hello), append(change, func(r *rig) {
		j, err := authz.NewJudge(authz.JudgeConfig{Audit: ledger, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		r.judge, r.inCfg.Judge, r.inCfg.Audit = j, j, ledger
	})...)
	return r, log, func() {
			for ledger.Append(&audit.Record{Kind: audit.KindAdmin, Detail: strings.Repeat("x", 900)}) == nil {
			}
		}, func() {
			seq, _ := log.Head()
			reader.Delivered(seq)
		}
}

// A route says which calls have records of their own, and which go on without:
// those that are denied have one whatever it says.
func TestARouteSaysHowItsCallsAreRecorded(t *testing.T) {
	r, log, fill, _ := spooled(t, func(r *rig) {
		r.routes = `
service: billing
routes:
  - {name: money, audit: full, matches: [{path: {prefix: /ok/money}}]}
  - {name: quiet, audit: counted, fail: open, matches: [{path: {prefix: /ok/money/quote}, method: GET}]}
  - {name: aside, matches: [{path: {prefix: /ok/money}, headers: [{name: X-Aside, present: true}]}]}
  - {name: probe, fail: open, matches: [{path: {exact: /ok/health}}, {path: {exact: /no/health}}]}
`
		keeper := sync.OnceValue(func() *route.Keeper { return route.KeeperOf(r.snap.Load(), "billing") })
		r.inCfg.Keeper = func() *route.Keeper { return keeper() }
	})
	w := r.dialIn(r.web)
	call := func(path string, fields ...string) int {
		w.say("GET " + path + " HTTP/1.1\r\nHost: billing.mesh.internal\r\n" + strings.Join(append(fields, ""), "\r\n") + "\r\n")
		resp, _ := w.answer("GET")
		return resp.StatusCode
	}
	ours := func(path string) (n int) {
		for _, rec := range log.Records() {
			if rec.Kind == audit.KindDecision && rec.Path == path {
				n++
			}
		}
		return n
	}
	for _, tt := range []struct {
		path, field        string
		status, afterwards int // without and with a full spool
		records            int // of four calls
	}{
		{"/ok/money/1", "", 200, 503, 4},
		{"/ok/money/2", "X-Aside: 1", 200, 503, 4}, // what the caller chooses changes nothing
		{"/ok/money/quote", "", 200, 200, 0},
		{"/ok/plain", "", 200, 503, 0},
		{"/ok/health", "", 200, 200, 0},
		{"/no/health", "", 403, 403, 4},
	} {
		var fields []string
		if tt.field != "" {
			fields = append(fields, tt.field)
		}
		if tt.records == 0 { // the first of its kind has a record anyway
			call("/ok/first", fields...)
		}
		for range 4 {
			if got := call(tt.path, fields...); got != tt.status {
				t.Errorf("%s: got %d, want %d", tt.path, got, tt.status)
			}
		}
		if n := ours(tt.path); n != tt.records {
			t.Errorf("%s: four calls have %d records, want %d", tt.path, n, tt.records)
		}
		defer func() {
			if got := call(tt.path, fields...); got != tt.afterwards {
				t.Errorf("%s without room for records: got %d, want %d", tt.path, got, tt.afterwards)
			}
		}()
	}
	fill()
}
