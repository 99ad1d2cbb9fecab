package proxy

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/mesh"
)

const (
	// maxTaps is how many may look at once, tapRoom how many calls wait for one of
	// them. What comes when there is no room is counted, and nothing waits.
	maxTaps = 4
	tapRoom = 512
	// maxTapped is how many fields of a request are shown.
	maxTapped = 64
)

// Taps show calls to whoever looks, as they end. While nobody does, a call costs
// one look at a pointer. The zero value is ready.
type Taps struct {
	all atomic.Pointer[[]*Tap] // nil when nobody looks

	mu sync.Mutex // held to change all
}

// A Tap is one who looks.
type Tap struct {
	// Calls are those that the filter sees.
	Calls  chan *mesh.Tapped
	filter mesh.TapFilter
	missed atomic.Uint64
}

// Open begins to look; false says that too many do already.
func (t *Taps) Open(f mesh.TapFilter) (*Tap, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var have []*Tap
	if p := t.all.Load(); p != nil {
		have = *p
	}
	if len(have) >= maxTaps {
		return nil, false
	}
	one := &Tap{Calls: make(chan *mesh.Tapped, tapRoom), filter: f}
	have = append(slices.Clone(have), one)
	t.all.Store(&have)
	return one, true
}

// Close ends a look.
func (t *Taps) Close(one *Tap) {
	t.mu.Lock()
	defer t.mu.Unlock()
	left := slices.DeleteFunc(slices.Clone(*t.all.Load()), func(x *Tap) bool { return x == one })
	if len(left) == 0 {
		t.all.Store(nil)
		return
	}
	t.all.Store(&left)
}

// show has those who look see a call that has ended.
func (t *Taps) show(x *call) {
	if t == nil {
		return
	}
	if all := t.all.Load(); all != nil {
		x.tapped(*all)
	}
}

func (x *call) tapped(all []*Tap) {
	seen := mesh.Tapped{
		Time: x.start.UTC(), Reporter: x.on.Reporter, Src: x.src, Dst: x.dst, Method: x.verb(), Path: x.path(), Status: x.status(), GRPC: x.grpc, Flag: x.flag(),
		Took: float64(time.Since(x.start).Microseconds()) / 1000, Up: x.res.ReqBytes, Down: x.res.RespBytes, Retries: x.tries.n, Shadow: x.marked,
	}
	if x.to != nil && x.to.route != nil {
		seen.Route = string(x.known.name) + "/" + x.to.route.Name
	}
	if x.refused != nil {
		seen.Decision, seen.Denied = x.refused.decision, x.refused.decision != ""
	} else if x.grant.Valid() {
		seen.Decision = x.grant.ID()
	}
	whole := false // its texts are copied, and its fields are there
	for _, one := range all {
		if !one.filter.Sees(&seen) {
			continue
		}
		if len(one.Calls) == cap(one.Calls) {
			one.missed.Add(1)
			continue
		}
		if !whole {
			whole = true
			for _, text := range []*string{&seen.Src, &seen.Dst, &seen.Method, &seen.Path, &seen.GRPC, &seen.Decision} {
				*text = strings.Clone(*text) // the next call takes their room
			}
			seen.Trace, seen.Headers = x.traceText(), x.shownFields()
		}
		own := seen
		own.Missed = one.missed.Swap(0)
		select {
		case one.Calls <- &own:
		default:
			one.missed.Add(own.Missed + 1)
		}
	}
}

// harmless are the fields whose values are shown. Of all others only the name is:
// nobody knows what an application puts into its own.
var harmless = []string{
	"accept", "accept-encoding", "accept-language", "cache-control", "connection", "content-encoding", "content-length", "content-type", "grpc-accept-encoding", "grpc-encoding", "grpc-timeout",
	"if-modified-since", "if-unmodified-since", "range", "te", "traceparent", "transfer-encoding", "upgrade", "user-agent", "x-request-id",
}

// hidden stands for a value that is not shown.
const hidden = "[hidden]"

func (x *call) shownFields() (out [][2]string) {
	for i := range x.req.Fields {
		if len(out) == maxTapped {
			break
		}
		f := &x.req.Fields[i]
		value := hidden
		if slices.ContainsFunc(harmless, func(name string) bool { return is(f.Name, name) }) {
			value = string(f.Value)
		}
		out = append(out, [2]string{string(f.Name), value})
	}
	return out
}
