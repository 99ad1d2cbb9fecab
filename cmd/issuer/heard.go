package main

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/page"
)

const (
	// maxKinds bounds the kinds of denials that are kept, and maxPassages the
	// tunnels: what was longest ago goes.
	maxKinds    = 512
	maxPassages = 2048
	// What one proxy says, and what is said of one pair, must not drive out the
	// rest: a workload chooses the path of what it is refused.
	maxKindsOfProxy    = 256
	maxKindsOfPair     = 32
	maxPassagesOfProxy = 1024
)

// heard is what the records of proxies say that the page shows at once: who is
// refused, and who leaves the mesh. It is lost at a restart; the logs are not.
type heard struct {
	policies func() *mesh.Snapshot
	now      func() time.Time

	mu       sync.Mutex // guards the fields below
	denials  map[denialKey]*denial
	passages map[passageKey]*page.Passage
	order    []passageKey // of passages, the oldest first
	set      *authz.Set
	of       *mesh.Snapshot
}

type denialKey struct {
	by                                 proxyName
	src, dst, verb, path, reason, rule string
}

type passageKey struct {
	by proxyName
	id string
}

// A denial is what was refused in one way, and its newest record.
type denial struct {
	last  audit.Record
	first time.Time
	n     uint64
	// told is the account of last by the policies that it was made by.
	told authz.Recorded
	by   *authz.Set
}

var (
	denyMark   = []byte(`"decision":"deny"`)
	egressMark = []byte(`"kind":"egress_`)
)

// take reads lines of a proxy after the record that was known before: lines may
// come twice. Most are neither denial nor tunnel and cost a search each. A proxy
// is believed what concerns itself: calls from or to its workload, and at a
// gateway those that leave the mesh.
func (h *heard) take(by proxyName, gateway func() bool, lines [][]byte, before uint64) {
	now := h.now()
	for _, l := range lines {
		if !bytes.Contains(l, denyMark) && !bytes.Contains(l, egressMark) {
			continue
		}
		r, _, err := audit.ParseLine(append(l[:len(l):len(l)], '\n'))
		if err != nil || r.Seq <= before {
			continue
		}
		out := strings.HasPrefix(r.Dst, "host:")
		if own := by.workload.String(); r.Src != own && r.Dst != own && !((out || r.Dst == "") && gateway()) {
			continue
		}
		if r.Time.After(now) {
			r.Time = now // or nothing would be newer, nor driven out
		}
		h.mu.Lock()
		if r.Decision == audit.Deny {
			h.denied(by, &r)
		}
		if r.Kind == audit.KindEgressOpen || r.Kind == audit.KindEgressClose || r.Decision == audit.Deny && out {
			h.passed(by, &r)
		}
		h.mu.Unlock()
	}
}

// denied counts a denial. mu is held.
func (h *heard) denied(by proxyName, r *audit.Record) {
	k := denialKey{by, r.Src, r.Dst, r.Verb, r.Path, r.Reason, r.Rule}
	d := h.denials[k]
	if d == nil {
		h.makeRoom(k)
		d = &denial{first: r.Time}
		h.denials[k] = d
	}
	d.n += max(r.Count, 1)
	if !r.Time.Before(d.last.Time) {
		d.last, d.by = *r, nil
	}
}

// makeRoom drops the kind that was last seen longest ago: of the pair when there
// are too many of it, of the proxy, or of all. mu is held.
func (h *heard) makeRoom(k denialKey) {
	ofPair := func(o denialKey) bool { return o.by == k.by && o.src == k.src && o.dst == k.dst }
	ofProxy := func(o denialKey) bool { return o.by == k.by }
	pair, proxy := 0, 0
	for o := range h.denials {
		if ofProxy(o) {
			proxy++
			if ofPair(o) {
				pair++
			}
		}
	}
	switch {
	case pair >= maxKindsOfPair:
		h.forget(ofPair)
	case proxy >= maxKindsOfProxy:
		h.forget(ofProxy)
	case len(h.denials) >= maxKinds:
		h.forget(func(denialKey) bool { return true })
	}
}

// forget drops the kind of some that was last seen longest ago. mu is held.
func (h *heard) forget(among func(denialKey) bool) {
	var oldest denialKey
	var at time.Time
	for k, d := range h.denials {
		if among(k) && (at.IsZero() || d.last.Time.Before(at)) {
			oldest, at = k, d.last.Time
		}
	}
	delete(h.denials, oldest)
}

// passed takes note of a tunnel. mu is held.
func (h *heard) passed(by proxyName, r *audit.Record) {
	key := passageKey{by, r.ID}
	if r.Kind == audit.KindRollup {
		key.id += "/" + strconv.FormatUint(r.Seq, 10)
	}
	p := h.passages[key]
	if p == nil {
		h.makeWay(by)
		p = &page.Passage{ID: r.ID, Src: r.Src, Dst: r.Dst, Rule: r.Rule, Port: r.Port, Opened: r.Time}
		h.passages[key], h.order = p, append(h.order, key)
	}
	p.Reason, p.Detail = r.Reason, r.Detail
	switch {
	case r.Kind == audit.KindEgressOpen:
		p.State = "open"
	case r.Kind == audit.KindEgressClose:
		p.State, p.Up, p.Down, p.Took, p.Completed = "closed", r.BytesUp, r.BytesDown, r.Duration, r.Time
		p.Opened = r.Time.Add(-r.Duration)
	default:
		p.State, p.Completed = "refused", r.Time
	}
}

// makeWay drops the oldest tunnel: of the proxy when it has too many, or of all.
// mu is held.
func (h *heard) makeWay(by proxyName) {
	n, first := 0, -1
	for i, k := range h.order {
		if k.by == by {
			if n++; first < 0 {
				first = i
			}
		}
	}
	switch {
	case n >= maxPassagesOfProxy:
	case len(h.order) >= maxPassages:
		first = 0
	default:
		return
	}
	delete(h.passages, h.order[first])
	h.order = slices.Delete(h.order, first, first+1)
}

func newHeard(policies func() *mesh.Snapshot) *heard {
	return &heard{policies: policies, now: time.Now, denials: map[denialKey]*denial{}, passages: map[passageKey]*page.Passage{}}
}

// Denials are the kinds of denials with their accounts, by the policies in force.
func (h *heard) Denials() []page.Denial {
	snap := h.policies()
	h.mu.Lock()
	defer h.mu.Unlock()
	if snap != h.of || h.set == nil {
		h.of = snap
		h.set = nil
		if snap != nil {
			h.set, _ = authz.Compile(snap) // what is in force compiles; without, nothing is explained
		}
	}
	out := make([]page.Denial, 0, len(h.denials))
	for _, d := range h.denials {
		if d.by != h.set || d.by == nil {
			d.told, d.by = h.set.Recorded(&d.last), h.set
		}
		out = append(out, page.Denial{Recorded: d.told, N: d.n, First: d.first, Last: d.last.Time})
	}
	return out
}

// Passages are the tunnels, the oldest first.
func (h *heard) Passages() []page.Passage {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]page.Passage, 0, len(h.order))
	for _, id := range h.order {
		out = append(out, *h.passages[id])
	}
	return out
}
