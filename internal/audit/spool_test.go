package audit

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

// fill appends records until the spool takes no more, and returns how many it
// took.
func fill(t *testing.T, l *Log) (n uint64) {
	t.Helper()
	for {
		r := sample()
		err := l.Append(&r)
		if errors.Is(err, ErrSpoolFull) {
			if !strings.HasPrefix(r.ID, l.nonce+"r") {
				t.Errorf("the refusal has the id %q", r.ID)
			}
			return n
		}
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
}

func spoolOf(t *testing.T, l *Log) *Spool {
	t.Helper()
	s, err := l.Spool(SpoolConfig{MaxBytes: leastSpool})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// refusalID is the number in the id of a refusal.
func refusalID(t *testing.T, id string) uint64 {
	t.Helper()
	_, n, ok := RefusalOf(id)
	if !ok {
		t.Errorf("%s is no id of a refusal", id)
	}
	return n
}

func TestSpoolRefusesAndRecovers(t *testing.T) {
	l := NewMemory()
	s := spoolOf(t, l)
	first, second := s.Reader("first", 0), s.Reader("second", 0)
	n := fill(t, l)
	if st := s.State(); st.Bytes > st.Limit || st.Bytes < st.Limit*9/10 || st.NoRoom != 1 {
		t.Errorf("full: %+v", st)
	}
	done := sample()
	done.Done = true
	if err := l.Append(&done); err != nil {
		t.Errorf("a record of what has happened already: %v", err)
	}
	first.Delivered(n)
	r := sample()
	if err := l.Append(&r); !errors.Is(err, ErrSpoolFull) || !strings.Contains(err.Error(), "second") {
		t.Errorf("one of two readers has everything: %v", err)
	}
	second.Delivered(n / 2)
	recs := l.Records()
	if gap := recs[len(recs)-1]; gap.Kind != KindGap || gap.Reason != "refused" || gap.Count != 2 || gap.Total != 2 {
		t.Errorf("the room was not used for the gap: %+v", gap)
	}
	if gap, f := recs[len(recs)-1], (&Filter{ID: r.ID}); refusalID(t, r.ID) != 2 || !f.Match(&gap) || !gap.Refuses(1) || gap.Refuses(3) || gap.Refuses(0) {
		t.Errorf("the refusal %s is not in %+v", r.ID, gap)
	}
	if l.Append(&r) != nil || l.blocked.Load() || l.Healthy() != nil {
		t.Errorf("there is room, and it goes on: %v", l.Healthy())
	}
	for _, r := range []*Reader{first, second} {
		r.Delivered(l.seq)
	}
	if st := s.State(); st.Bytes != 0 || st.Oldest != 0 {
		t.Errorf("everything is delivered: %+v", st)
	}
	second.Delivered(l.seq + 1)
	if s.readers[1].seq != 0 {
		t.Error("a number of another log was believed")
	}
}

func TestSpoolKeepsWhatHasHappened(t *testing.T) {
	l := NewMemory()
	s := spoolOf(t, l)
	s.Reader("it", 0)
	r := sample()
	for l.Append(&r) == nil && !l.blocked.Load() {
	}
	for range 10 {
		r := sample()
		r.Done = true
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
	}
}

// A start finds what waits in the files of the log, by the cursor.
func TestSpoolSurvey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	cfg := Config{Path: path, Log: quiet(), MaxFile: 20_000}
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	live := spoolOf(t, l)
	live.Reader("it", 0)
	n := fill(t, l)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = Open(cfg); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	again := spoolOf(t, l)
	it := again.Reader("it", 0)
	for _, have := range []uint64{0, n / 3, n - 1, n} {
		live.readers[0].Delivered(have)
		it.Delivered(have)
		a, b := live.State().Bytes, again.State().Bytes
		exact := int64(float64(leastSpool) * float64(n-have) / float64(n))
		if d := a - b; d > 1500 || d < -1500 || a < exact-1500 || a > exact+1500 {
			t.Errorf("record %d of %d: %d bytes wait after a start, %d before, want about %d", have, n, b, a, exact)
		}
	}
}

// In a ledger a route that fails open goes on and nothing of it is forgotten,
// and one that fails closed goes on again once there is room.
func TestLedgerSpool(t *testing.T) {
	log := NewMemory()
	l, err := NewMemoryLedger(log, LedgerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Spool(SpoolConfig{MaxBytes: leastSpool})
	if err != nil {
		t.Fatal(err)
	}
	it := s.Reader("it", 0)
	known := func() Record {
		r := sample()
		r.Kind, r.Dir, r.Decision, r.Src = KindDecision, "in", Allow, "spiffe://corp.example/known"
		return r
	}
	r := known()
	if err := l.Append(&r); err != nil { // the first of its kind
		t.Fatal(err)
	}
	r.Tally.Done(200, "")
	fill(t, log)
	for _, tt := range []struct {
		name   string
		open   bool
		change func(*Record)
		ok     bool
	}{
		{"a counted call of a closed route", false, func(*Record) {}, false},
		{"a counted call of an open route", true, func(*Record) {}, true},
		{"the first call of a kind, of an open route", true, func(r *Record) { r.Src += "/new" }, true},
		{"the first call of a kind, of a closed route", false, func(r *Record) { r.Src += "/other" }, false},
		{"a denial of an open route", true, func(r *Record) { r.Decision = Deny }, true},
		{"a denial of a closed route", false, func(r *Record) { r.Decision = Deny }, false},
		{"a tunnel out", false, func(r *Record) { r.Kind = KindEgressOpen }, false},
		{"an issuance", false, func(r *Record) { r.Kind = KindIssue }, false},
	} {
		r := known()
		tt.change(&r)
		r.Open = tt.open
		if err := l.Append(&r); (err == nil) != tt.ok || !tt.ok && !errors.Is(err, ErrSpoolFull) || r.ID == "" {
			t.Errorf("%s: %v, id %q", tt.name, err, r.ID)
		} else if tt.ok {
			r.Tally.Done(200, "")
		}
	}
	it.Delivered(log.seq)
	if err := l.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	gaps, calls := map[string]uint64{}, uint64(0)
	for _, r := range log.Records() {
		switch r.Kind {
		case KindGap:
			gaps[r.Reason] += r.Count
		case KindRollup:
			calls += r.Count
		}
	}
	// One was refused to fill, five in the table; two of the open ones were
	// wanted in full.
	if gaps["refused"] != 6 || gaps["lost"] != 2 || calls != 4 {
		t.Errorf("gaps %v, %d calls", gaps, calls)
	}
}
