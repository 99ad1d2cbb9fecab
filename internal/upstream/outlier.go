package upstream

import (
	"cmp"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"sallyport/internal/mesh"
)

// A history is what one endpoint has shown. Its ejection is changed under the
// lock of its group, and read without.
type history struct {
	row atomic.Int32
	// unmade counts those of the row that were failures to connect.
	unmade atomic.Int32
	window counts
	// out is until when the endpoint is put aside, 0 when it is not.
	out atomic.Int64

	// Of the ejections, under the group's lock.
	since int64
	times int
	why   string
}

func outlierDefaults(cfg mesh.Outlier) mesh.Outlier {
	cfg.Consecutive = cmp.Or(cfg.Consecutive, 5)
	cfg.Minimum = cmp.Or(cfg.Minimum, 10)
	cfg.Interval = cmp.Or(cfg.Interval, 10*time.Second)
	cfg.Ejection = cmp.Or(cfg.Ejection, 30*time.Second)
	cfg.MaxEjection = max(cmp.Or(cfg.MaxEjection, 300*time.Second), cfg.Ejection)
	cfg.MaxShare = cmp.Or(cfg.MaxShare, mesh.Whole/2)
	return cfg
}

// Why an endpoint is put aside, after a number.
const (
	unconnected = "consecutive connect errors"
	inARow      = "consecutive failures"
)

// causeOf is what suspect has said in one word.
func causeOf(why string) string {
	switch {
	case strings.HasSuffix(why, unconnected):
		return "connect"
	case strings.HasSuffix(why, inARow):
		return "failures"
	}
	return "share"
}

// suspect counts a call and says why the endpoint should be put aside, or
// nothing.
func (r *history) suspect(cfg *mesh.Outlier, now int64, o Outcome, connected bool) string {
	switch o {
	case Ignored:
		return ""
	case OK:
		if r.row.Load() != 0 {
			r.row.Store(0)
			r.unmade.Store(0)
		}
	case Failed:
		n, unmade := r.row.Add(1), r.unmade.Load()
		if !connected {
			unmade = r.unmade.Add(1)
		}
		switch {
		case int(n) < cfg.Consecutive:
		case unmade >= n:
			return fmt.Sprintf("%d "+unconnected, n)
		default:
			return fmt.Sprintf("%d "+inARow, n)
		}
	}
	if cfg.Success == 0 {
		return ""
	}
	r.window.add(now, o != OK, false)
	if o == OK {
		return ""
	}
	if n, bad, _ := r.window.sum(now); n >= int64(cfg.Minimum) && (n-bad)*mesh.Whole < n*int64(cfg.Success) {
		return fmt.Sprintf("%d of %d calls failed", bad, n)
	}
	return ""
}

// eject puts the endpoint aside for its nth time, which is n times as long. The
// caller holds the group's lock and has looked at the caps.
func (r *history) eject(cfg *mesh.Outlier, now int64, why string) {
	// Each interval without ejection makes up for one.
	if was := r.out.Load(); was != 0 {
		r.times = max(r.times-int((now-was)/int64(cfg.Interval)), 0)
	}
	r.times++
	r.since, r.why = now, why
	r.row.Store(0)
	r.unmade.Store(0)
	r.window.reset()
	r.out.Store(now + int64(min(cfg.Ejection*time.Duration(r.times), cfg.MaxEjection)))
}

// mayEject says whether one more of n may be put aside, with out of them aside
// now: one always may, and one always stays.
func mayEject(n, out int, share mesh.Share) bool {
	most := max(n*int(share)/mesh.Whole, 1)
	return out+1 <= min(most, n-1)
}
