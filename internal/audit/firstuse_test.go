package audit

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// The first call of a caller, destination and rule in 24 hours is kept in full,
// whenever the calls come, and no other of the kind is.
func TestFirstUseInADay(t *testing.T) {
	type use struct {
		at   time.Duration
		path string
		kept bool
	}
	const one, other = "/v1/charges", "/v1/reports"
	// steady calls every few seconds until the end, on one path.
	steady := func(until time.Duration) (out []use) {
		for at := time.Duration(0); at < until; at += 7 * time.Second {
			out = append(out, use{at, one, at == 0})
		}
		return out
	}
	for _, tt := range []struct {
		name string
		uses []use
	}{
		{"once in 25 hours", []use{{0, one, true}, {25 * time.Hour, one, true}, {50 * time.Hour, one, true}}},
		{"once in 23 hours", []use{{0, one, true}, {23 * time.Hour, one, false}, {46 * time.Hour, one, true}, {69 * time.Hour, one, false}}},
		{"in the day and just after it", []use{{0, one, true}, {24*time.Hour - time.Minute, one, false}, {24*time.Hour + time.Minute, one, true}}},
		// The cell is there when the day ends, and gone when the next call comes.
		{"all day, and then a pause", append(steady(24*time.Hour),
			use{24*time.Hour + 10*time.Minute, one, true}, use{24*time.Hour + 11*time.Minute, one, false})},
		{"all day, and the next on another path", append(steady(24*time.Hour),
			use{24*time.Hour + time.Minute, other, true}, use{24*time.Hour + 2*time.Minute, one, false}, use{24*time.Hour + 3*time.Minute, other, false})},
		{"two paths, one of them rare", []use{{0, one, true}, {time.Second, other, false}, {24*time.Hour + 20*time.Second, other, true},
			{24*time.Hour + 21*time.Second, one, false}, {48 * time.Hour, one, false}, {48*time.Hour + 30*time.Second, one, true}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, log := memoryLedger(t, LedgerConfig{})
				ctx, end := context.WithCancel(t.Context())
				defer end()
				go l.runCounts(ctx)
				start := time.Now()
				for _, u := range tt.uses {
					time.Sleep(time.Until(start.Add(u.at)))
					synctest.Wait()
					r := sample()
					r.Path = u.path
					if err := l.Append(&r); err != nil {
						t.Fatal(err)
					}
					r.Tally.Done(200, "")
					if _, _, cell := cellOf(r.ID); cell == u.kept { // a call that is kept has an id of its own
						t.Errorf("after %s, %s: kept in full: %v, want %v", u.at, u.path, !cell, u.kept)
					}
				}
				if err := l.Flush(t.Context()); err != nil {
					t.Fatal(err)
				}
				if sums, _ := counted(log.Records()); sums[""] != uint64(len(tt.uses)) {
					t.Errorf("%d calls are counted of %d", sums[""], len(tt.uses))
				}
			})
		})
	}
}
