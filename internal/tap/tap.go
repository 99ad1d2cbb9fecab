// Package tap shows calls that have ended at a proxy to whoever looks: on the
// proxy's admin socket, or through the issuer.
//
// It owns no goroutine. A proxy tells Taps of each call; while nobody looks, that
// costs one look at a pointer, and nobody who looks holds up a call. Who may look is
// for others to say; that somebody does is in the audit before anything is shown.
package tap

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

const (
	// maxTaps is how many may look at once, tapRoom how many calls wait for one of
	// them. What comes when there is no room is counted, and nothing waits.
	maxTaps = 4
	tapRoom = 512
	// maxFields is how many fields of a request are shown.
	maxFields = 64
)

// Taps show calls to whoever looks, as they end. The zero value is ready, and nil
// has nobody look.
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

// Watched says whether anybody looks.
func (t *Taps) Watched() bool { return t != nil && t.all.Load() != nil }

// Show has those who look see a call that has ended. rest, which may be nil, fills
// in what filters do not ask for, and is called if anybody sees the call. The texts
// of both may be gone once Show returns.
func (t *Taps) Show(seen *mesh.Tapped, rest func(*mesh.Tapped)) {
	if t == nil {
		return
	}
	all := t.all.Load()
	if all == nil {
		return
	}
	whole := false // its texts are copied, and the rest is there
	for _, one := range *all {
		if !one.filter.Sees(seen) {
			continue
		}
		if len(one.Calls) == cap(one.Calls) {
			one.missed.Add(1)
			continue
		}
		if !whole {
			whole = true
			if rest != nil {
				rest(seen)
			}
			for _, text := range []*string{&seen.Src, &seen.Dst, &seen.Method, &seen.Path, &seen.GRPC, &seen.Decision} {
				*text = strings.Clone(*text) // the next call takes their room
			}
		}
		own := *seen
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
var harmless = http1.NewNameSet(
	"accept", "accept-encoding", "accept-language", "cache-control", "connection", "content-encoding", "content-length", "content-type", "grpc-accept-encoding", "grpc-encoding", "grpc-timeout",
	"if-modified-since", "if-unmodified-since", "range", "te", "traceparent", "transfer-encoding", "upgrade", "user-agent", "x-request-id",
)

// hidden stands for a value that is not shown.
const hidden = "[hidden]"

// Fields are the fields of a request as they are shown.
func Fields(of []http1.Field) (out [][2]string) {
	for i := range of[:min(len(of), maxFields)] {
		value := hidden
		if harmless.Has(of[i].Name) {
			value = string(of[i].Value)
		}
		out = append(out, [2]string{string(of[i].Name), value})
	}
	return out
}
