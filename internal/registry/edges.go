package registry

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

const (
	// minute and hour are the two sizes of the windows that edges are counted
	// in. Every call is counted in both, so that nothing is to be rolled up
	// later: the small ones go after keepMinutes, the large ones after keepHours.
	minute      = time.Minute
	hour        = time.Hour
	keepMinutes = 3 * time.Hour
	keepHours   = 30 * 24 * time.Hour
	// flushEvery is what a crash may lose of the map. It is no audit.
	flushEvery = 10 * time.Second
	// maxEdges bounds the edges of a window; what comes after is counted as one
	// edge between "other" and "other".
	maxEdges = 20_000
	// maxDecoded bounds what is unpacked of one window, bytes, and maxCached how
	// many windows are kept unpacked.
	maxDecoded = 64 << 20
	maxCached  = 256
)

// edges counts who called whom, in windows of the present.
type edges struct {
	mu sync.Mutex // guards the fields below
	// now are the windows that calls are counted in, by their size.
	now map[time.Duration]*tally
	// over are those that have ended and are not in the store yet.
	over []*tally
	// cache has windows of the store as they were last read.
	cache map[string]cachedWindow

	// flushing lets one goroutine write at a time. It comes before mu.
	flushing sync.Mutex
}

// A tally is a window that is being counted.
type tally struct {
	size  time.Duration
	start time.Time
	sums  map[mesh.Pair]*mesh.Edge
	dirty bool
}

type cachedWindow struct {
	revision int64
	mesh.Window
}

// window is what was counted, sharing nothing. The mutex of edges is held.
func (t *tally) window() mesh.Window {
	w := mesh.Window{From: t.start, To: t.start.Add(t.size), Edges: make([]mesh.Edge, 0, len(t.sums))}
	for _, e := range t.sums {
		c := *e
		c.Took = slices.Clone(c.Took)
		w.Edges = append(w.Edges, c)
	}
	slices.SortFunc(w.Edges, mesh.CompareEdges)
	return w
}

// add counts. The mutex of edges is held.
func (t *tally) add(e mesh.Edge) {
	t.dirty = true
	sum := t.sums[e.Pair()]
	if sum == nil && len(t.sums) >= maxEdges {
		e.Src, e.Dst, e.Proto, e.MTLS = "other", "other", "other", false
		sum = t.sums[e.Pair()]
	}
	if sum == nil {
		e.Took = slices.Clone(e.Took)
		t.sums[e.Pair()] = &e
		return
	}
	sum.Add(e)
}

// AddEdges adds what proxies counted since they last said. It is counted in the
// windows of now, whenever it was: when a call was made a proxy alone knows.
func (r *Registry) AddEdges(list []mesh.Edge) {
	now := r.cfg.Now().UTC()
	x := &r.edges
	x.mu.Lock()
	defer x.mu.Unlock()
	x.turn(now)
	for _, e := range list {
		if e.Last.After(now) {
			e.Last = now
		}
		if e.First.After(e.Last) {
			e.First = e.Last
		}
		for _, t := range x.now {
			t.add(e)
		}
	}
}

// turn begins the windows of now. mu is held.
func (x *edges) turn(now time.Time) {
	if x.now == nil {
		x.now = map[time.Duration]*tally{}
	}
	for _, size := range []time.Duration{minute, hour} {
		start := now.Truncate(size)
		t := x.now[size]
		if t != nil && t.start.Equal(start) {
			continue
		}
		if t != nil && t.dirty {
			x.over = append(x.over, t)
		}
		x.now[size] = &tally{size: size, start: start, sums: map[mesh.Pair]*mesh.Edge{}}
	}
}

// keepEdges writes what was counted into the store until ctx ends, and once
// more then.
func (r *Registry) keepEdges(ctx context.Context) {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for done := false; !done; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			done = true
		}
		if err := r.flushEdges(context.WithoutCancel(ctx)); err != nil && !errors.Is(err, store.ErrClosed) {
			r.cfg.Log.Warn("map not kept; trying again", "error", err)
		}
	}
}

// flushEdges writes the windows that have changed, and removes those of minutes
// that this process has written and that are too old.
func (r *Registry) flushEdges(ctx context.Context) error {
	x := &r.edges
	x.flushing.Lock()
	defer x.flushing.Unlock()
	now := r.cfg.Now().UTC()
	x.mu.Lock()
	x.turn(now)
	due := x.over
	for _, t := range x.now {
		if t.dirty {
			due = append(due, t)
		}
	}
	ops := make([]store.Op, 0, 2*len(due))
	var err error
	for _, t := range due {
		t.dirty = false // what comes after this is written the next time
		op := store.Op{Kind: store.KindEdges, Key: r.edgesKey(t.size, t.start), Expires: t.start.Add(t.size + keepHours)}
		if t.size == minute {
			op.Expires = t.start.Add(t.size + keepMinutes)
			ops = append(ops, store.Op{Kind: store.KindEdges, Key: r.edgesKey(minute, t.start.Add(-keepMinutes-minute)), Delete: true})
		}
		var e error
		op.Value, e = packWindow(t.window())
		err = errors.Join(err, e)
		ops = append(ops, op)
	}
	x.over = nil
	x.mu.Unlock()
	if len(ops) == 0 || err != nil {
		return err
	}
	if _, err := r.write(ctx, ops...); err != nil {
		x.mu.Lock()
		defer x.mu.Unlock()
		for _, t := range due {
			t.dirty = true
			if t != x.now[t.size] && len(x.over) < 4*int(keepMinutes/minute) {
				x.over = append(x.over, t)
			}
		}
		return fmt.Errorf("keep the map: %w", err)
	}
	return nil
}

// edgesKey orders windows by size and time. Each process writes its own.
func (r *Registry) edgesKey(size time.Duration, start time.Time) string {
	return edgesPrefix(size) + start.UTC().Format(time.RFC3339) + "/" + r.cfg.Instance + "@" + r.started.UTC().Format(time.RFC3339Nano)
}

func edgesPrefix(size time.Duration) string {
	if size == minute {
		return "m/"
	}
	return "h/"
}

// Windows are who called whom from one time to another: in minutes as far back
// as those are kept, and in hours before. Windows are whole, so that the first
// may begin before from.
func (r *Registry) Windows(ctx context.Context, from, to time.Time) ([]mesh.Window, error) {
	if err := r.flushEdges(ctx); err != nil {
		return nil, err
	}
	from, to = from.UTC(), to.UTC()
	fine := r.cfg.Now().UTC().Add(-keepMinutes + minute).Truncate(hour).Add(hour)
	if !from.Before(fine) {
		return r.windows(ctx, minute, from.Truncate(minute), to)
	}
	out, err := r.windows(ctx, hour, from.Truncate(hour), minTime(to, fine))
	if err == nil && fine.Before(to) {
		var more []mesh.Window
		more, err = r.windows(ctx, minute, fine, to)
		out = append(out, more...)
	}
	return out, err
}

func minTime(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// windows reads those of a size that begin at from or later, before to.
func (r *Registry) windows(ctx context.Context, size time.Duration, from, to time.Time) (out []mesh.Window, err error) {
	prefix := edgesPrefix(size)
	after, end := prefix+from.Format(time.RFC3339), prefix+to.Add(size-1).Truncate(size).Format(time.RFC3339)
	for {
		page, err := r.cfg.Store.List(ctx, store.KindEdges, after, 64)
		if err != nil {
			return nil, fmt.Errorf("read the map: %w", err)
		}
		for _, rec := range page {
			if !strings.HasPrefix(rec.Key, prefix) || rec.Key >= end {
				return out, nil
			}
			w, err := r.edges.unpack(rec)
			if err != nil {
				return nil, err
			}
			out = append(out, w)
		}
		if len(page) < 64 {
			return out, nil
		}
		after = page[len(page)-1].Key
	}
}

// unpack reads a window, from the cache if it is as it was.
func (x *edges) unpack(rec store.Record) (mesh.Window, error) {
	x.mu.Lock()
	c, known := x.cache[rec.Key]
	x.mu.Unlock()
	if known && c.revision == rec.Revision {
		return c.Window, nil
	}
	w, err := unpackWindow(rec.Value)
	if err != nil {
		return w, fmt.Errorf("read the map: window %s: %w", rec.Key, err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.cache == nil || len(x.cache) >= maxCached {
		x.cache = map[string]cachedWindow{}
	}
	x.cache[rec.Key] = cachedWindow{rec.Revision, w}
	return w, nil
}

func packWindow(w mesh.Window) ([]byte, error) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if err := json.NewEncoder(z).Encode(w); err != nil {
		return nil, fmt.Errorf("pack a window of edges: %w", err)
	}
	if err := z.Close(); err != nil {
		return nil, fmt.Errorf("pack a window of edges: %w", err)
	}
	return b.Bytes(), nil
}

func unpackWindow(b []byte) (w mesh.Window, err error) {
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return w, err
	}
	err = json.NewDecoder(io.LimitReader(z, maxDecoded)).Decode(&w)
	return w, err
}
