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
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

const (
	// maxTaps is how many may look at once, tapRoom how many calls wait for one of
	// them. What comes when there is no room is counted, and nothing waits. One place
	// is kept for the proxy's own machine.
	maxTaps = 4
	tapRoom = 512
	// afarGap is the least time between two looks that begin through the issuer: each
	// is recorded.
	afarGap = time.Second
	// maxFields is how many fields of a request are shown.
	maxFields = 64
)

// Taps show calls to whoever looks, as they end. The zero value is ready, and nil
// has nobody look.
type Taps struct {
	all atomic.Pointer[[]*Tap] // nil when nobody looks

	mu   sync.Mutex // held to change all, and guards last
	last time.Time  // when a look through the issuer began
}

// A Tap is one who looks.
type Tap struct {
	// Calls are those that the filter sees.
	Calls  chan *mesh.Tapped
	filter mesh.TapFilter
	missed atomic.Uint64
	afar   bool // through the issuer
}

// Open begins to look; false says that too many do already.
func (t *Taps) Open(f mesh.TapFilter) (*Tap, bool) {
	one, err := t.open(f, false)
	return one, err == nil
}

func (t *Taps) open(f mesh.TapFilter, afar bool) (*Tap, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var have []*Tap
	if p := t.all.Load(); p != nil {
		have = *p
	}
	of := 0
	for _, one := range have {
		if one.afar {
			of++
		}
	}
	now := time.Now()
	switch {
	case len(have) >= maxTaps, afar && of >= maxTaps-1:
		return nil, errCrowded
	case afar && !t.last.IsZero() && now.Sub(t.last) < afarGap:
		return nil, errHasty
	case afar:
		t.last = now
	}
	one := &Tap{Calls: make(chan *mesh.Tapped, tapRoom), filter: f, afar: afar}
	have = append(slices.Clone(have), one)
	t.all.Store(&have)
	return one, nil
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
