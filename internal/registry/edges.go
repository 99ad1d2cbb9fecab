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

	"github.com/spiffe/go-spiffe/v2/spiffeid"

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
	// maxWindow bounds what a window takes as JSON, bytes: less than maxDecoded,
	// so that what is written can be read again, and packed less than what the
	// store keeps in one value. It has room for maxEdges edges between ends of
	// ordinary length.
	maxWindow = 32 << 20
	// maxOfAgent and maxBytesOfAgent bound what one agent adds to a window: it
	// must not take the room of all others.
	maxOfAgent      = 4096
	maxBytesOfAgent = 8 << 20
	// maxDecoded bounds what is unpacked of one window, bytes, and maxCached what
	// is kept unpacked of all.
	maxDecoded = 64 << 20
	maxCached  = 96 << 20
)

// edges counts who called whom, in windows of the present.
type edges struct {
	mu sync.Mutex // guards the fields below
	// now are the windows that calls are counted in, by their size.
	now map[time.Duration]*tally
	// over are those that have ended and are not in the store yet.
	over []*tally
	// cache has windows of the store as they were last read.
	cache  map[string]cachedWindow
	cached int // bytes of cache

	// flushing lets one goroutine write at a time. It comes before mu.
	flushing sync.Mutex
}

// A tally is a window that is being counted.
type tally struct {
	size  time.Duration
	start time.Time
	sums  map[mesh.Pair]*mesh.Edge
	dirty bool
	// bytes is what sums take at most as JSON, by what each agent has added.
	bytes int
	by    map[spiffeid.ID]share
}

// A share is what one agent has added to a window.
type share struct{ edges, bytes int }

type cachedWindow struct {
	revision int64
	bytes    int
	mesh.Window
}

// weight is what an edge takes as JSON at most, bytes: its keys, counts, times
// and whole histogram, beside the texts, none of which is escaped.
func weight(e *mesh.Edge) int {
	return len(e.Src) + len(e.Dst) + len(e.Proto) + 256 + 11*mesh.Buckets
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

// add counts what an agent has told. The mutex of edges is held.
func (t *tally) add(agent spiffeid.ID, e mesh.Edge) {
	t.dirty = true
	sum := t.sums[e.Pair()]
	if sum == nil && !t.room(agent, weight(&e)) {
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

// room takes the place of one more edge of an agent, if there is one.
func (t *tally) room(agent spiffeid.ID, size int) bool {
	has := t.by[agent]
	if len(t.sums) >= maxEdges || t.bytes+size > maxWindow || has.edges >= maxOfAgent || has.bytes+size > maxBytesOfAgent {
		return false
	}
	t.bytes += size
	t.by[agent] = share{has.edges + 1, has.bytes + size}
	return true
}

// AddEdges adds what the proxies of an agent counted since they last said. It is
// counted in the windows of now, whenever it was: when a call was made a proxy
// alone knows.
func (r *Registry) AddEdges(agent spiffeid.ID, list []mesh.Edge) {
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
			t.add(agent, e)
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
		x.now[size] = &tally{size: size, start: start, sums: map[mesh.Pair]*mesh.Edge{}, by: map[spiffeid.ID]share{}}
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

// flushEdges writes the windows that have changed, each by itself: one that the
// store does not take keeps none of the others from it.
func (r *Registry) flushEdges(ctx context.Context) error {
	x := &r.edges
	x.flushing.Lock()
	defer x.flushing.Unlock()
	x.mu.Lock()
	x.turn(r.cfg.Now().UTC())
	due := x.over
	for _, t := range x.now {
		if t.dirty {
			due = append(due, t)
		}
	}
	windows := make([]mesh.Window, len(due))
	for i, t := range due {
		t.dirty = false // what comes after this is written the next time
		windows[i] = t.window()
	}
	x.over = nil
	x.mu.Unlock()
	var errs []error
	for i, t := range due { // packing takes time, in which calls are counted
		err := r.keepWindow(ctx, t.size, windows[i])
		if errors.Is(err, store.ErrInvalid) {
			r.cfg.Log.Error("a window of the map is not kept", "window", r.edgesKey(t.size, t.start), "error", err)
			continue // it is as invalid the next time
		}
		if err == nil {
			continue
		}
		errs = append(errs, err)
		x.mu.Lock()
		t.dirty = true
		if t != x.now[t.size] && len(x.over) < 4*int(keepMinutes/minute) {
			x.over = append(x.over, t)
		}
		x.mu.Unlock()
	}
	if len(errs) > 0 {
		return fmt.Errorf("keep the map: %w", errors.Join(errs...))
	}
	return nil
}

// keepWindow writes a window, and removes the one of a minute that this process
// has written and that is too old.
func (r *Registry) keepWindow(ctx context.Context, size time.Duration, w mesh.Window) (err error) {
	op := store.Op{Kind: store.KindEdges, Key: r.edgesKey(size, w.From), Expires: w.To.Add(keepHours)}
	if op.Value, err = packWindow(w); err != nil {
		return err
	}
	ops := []store.Op{op}
	if size == minute {
		ops[0].Expires = w.To.Add(keepMinutes)
		ops = append(ops, store.Op{Kind: store.KindEdges, Key: r.edgesKey(minute, w.From.Add(-keepMinutes-minute)), Delete: true})
	}
	_, err = r.write(ctx, ops...)
	return err
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

// EachWindow reads who called whom from one time to another: in minutes as far
// back as those are kept, and in hours before. Windows are whole, so that the
// first may begin before from. They come one after another, since all of them
// may be more than there is room for; see must not change them.
func (r *Registry) EachWindow(ctx context.Context, from, to time.Time, see func(mesh.Window)) error {
	if err := r.flushEdges(ctx); err != nil {
		return err
	}
	from, to = from.UTC(), to.UTC()
	fine := r.cfg.Now().UTC().Add(-keepMinutes + minute).Truncate(hour).Add(hour)
	if !from.Before(fine) {
		return r.windows(ctx, minute, from.Truncate(minute), to, see)
	}
	err := r.windows(ctx, hour, from.Truncate(hour), minTime(to, fine), see)
	if err == nil && fine.Before(to) {
		err = r.windows(ctx, minute, fine, to, see)
	}
	return err
}

func minTime(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// windows reads those of a size that begin at from or later, before to. One that
// cannot be read is passed over: the others are no worse for it.
func (r *Registry) windows(ctx context.Context, size time.Duration, from, to time.Time, see func(mesh.Window)) error {
	prefix := edgesPrefix(size)
	after, end := prefix+from.Format(time.RFC3339), prefix+to.Add(size-1).Truncate(size).Format(time.RFC3339)
	for {
		page, err := r.cfg.Store.List(ctx, store.KindEdges, after, listed)
		if err != nil {
			return fmt.Errorf("read the map: %w", err)
		}
		for _, rec := range page {
			if !strings.HasPrefix(rec.Key, prefix) || rec.Key >= end {
				return nil
			}
			w, err := r.edges.unpack(rec)
			if err != nil {
				r.cfg.Log.Warn("a window of the map cannot be read, and is passed over", "window", rec.Key, "error", err)
				continue
			}
			see(w)
		}
		if len(page) < listed {
			return nil
		}
		after = page[len(page)-1].Key
	}
}

// listed is how many windows are read from the store at once, packed.
const listed = 16

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
		return w, err
	}
	c = cachedWindow{revision: rec.Revision, Window: w}
	for i := range w.Edges {
		e := &w.Edges[i]
		c.bytes += 160 + len(e.Src) + len(e.Dst) + len(e.Proto) + 4*cap(e.Took)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.cached -= x.cache[rec.Key].bytes
	delete(x.cache, rec.Key)
	if c.bytes > maxCached/4 {
		return w, nil // it would drive out many others
	}
	for k, o := range x.cache { // any: a map is read as a whole
		if x.cached+c.bytes <= maxCached {
			break
		}
		x.cached -= o.bytes
		delete(x.cache, k)
	}
	if x.cache == nil {
		x.cache = map[string]cachedWindow{}
	}
	x.cache[rec.Key] = c
	x.cached += c.bytes
	return w, nil
}

func packWindow(w mesh.Window) ([]byte, error) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	enc := json.NewEncoder(z)
	enc.SetEscapeHTML(false) // no browser reads it, and weight counts what is written
	if err := enc.Encode(w); err != nil {
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
