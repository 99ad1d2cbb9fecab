package page

import (
	"context"
	"errors"
	"sync"
	"time"

	"sallyport/internal/mesh"
)

const (
	// One visitor has so many live views and searches at once. More are refused,
	// and do not wait: what waits holds its place, too.
	maxStreamsEach  = 4
	maxSearchesEach = 1
	// A chart is shared by all who ask for it within sharedFor, and for as long
	// as making it took sharedTimes over: a month takes longer than two seconds.
	sharedFor   = 2 * time.Second
	sharedTimes = 5
	// maxCharts bounds those that are kept, chartsAtOnce those that are made at
	// once, and chartTime how long one may take.
	maxCharts    = 16
	chartsAtOnce = 2
	chartTime    = time.Minute
)

// errBusy is what is wrong when a visitor asks for too much at once.
var errBusy = errors.New("you have a search that is not done; wait for it")

// A crowd counts what visitors do at once.
type crowd struct {
	mu sync.Mutex // guards what follows
	n  map[string]int
}

// begin takes one of the places that a visitor has for a thing. When there is
// one, end gives it back.
func (w *crowd) begin(c *visitor, what string, most int) (end func(), ok bool) {
	key := what + "\n" + c.by() + "\n" + c.session
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.n[key] >= most {
		return nil, false
	}
	if w.n == nil {
		w.n = map[string]int{}
	}
	w.n[key]++
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.n[key]--; w.n[key] == 0 {
			delete(w.n, key)
		}
	}, true
}

// charts are those that were made last.
type charts struct {
	making chan struct{} // the right to make one

	mu   sync.Mutex // guards what follows
	list map[chartKey]*drawn
}

// A chartKey is how long a chart is, and how long ago its end.
type chartKey struct{ span, ago time.Duration }

type drawn struct {
	done  chan struct{} // closed when the fields below are there
	chart mesh.Chart
	err   error
	until time.Time
}

// chart is Config.Chart, made once for all who ask for the same.
func (p *Page) chart(ctx context.Context, from, to time.Time) (mesh.Chart, error) {
	key := chartKey{to.Sub(from).Truncate(sharedFor), p.cfg.Now().Sub(to).Truncate(sharedFor)}
	x := &p.charts
	x.mu.Lock()
	d := x.list[key]
	if d != nil && !d.over() {
		x.mu.Unlock()
		select {
		case <-d.done:
			return d.chart, d.err
		case <-ctx.Done():
			return mesh.Chart{}, ctx.Err()
		}
	}
	d = &drawn{done: make(chan struct{})}
	for k, o := range x.list {
		if len(x.list) >= maxCharts || o.over() {
			delete(x.list, k)
		}
	}
	x.list[key] = d
	x.mu.Unlock()
	defer close(d.done)
	// Whoever asked first may go: the others wait for it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), chartTime)
	defer cancel()
	select {
	case x.making <- struct{}{}:
		defer func() { <-x.making }()
	case <-ctx.Done():
		d.err = ctx.Err()
		return d.chart, d.err
	}
	began := time.Now()
	d.chart, d.err = p.cfg.Chart(ctx, from, to)
	if now := time.Now(); d.err == nil {
		d.until = now.Add(max(sharedFor, sharedTimes*now.Sub(began)))
	}
	return d.chart, d.err
}

// over says that a chart was made and is too old, or has failed.
func (d *drawn) over() bool {
	select {
	case <-d.done:
		return !time.Now().Before(d.until)
	default:
		return false
	}
}
