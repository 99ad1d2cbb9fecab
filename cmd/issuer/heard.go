package main

import (
	"bytes"
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
)

// heard is what the records of proxies say that the page shows at once: who is
// refused, and who leaves the mesh. It is lost at a restart; the logs are not.
type heard struct {
	policies func() *mesh.Snapshot

	mu       sync.Mutex // guards the fields below
	denials  map[denialKey]*denial
	passages map[string]*page.Passage
	order    []string // of passages, the oldest first
	set      *authz.Set
	of       *mesh.Snapshot
}

type denialKey struct{ src, dst, verb, path, reason, rule string }

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
// come twice. Most are neither denial nor tunnel and cost a search each.
func (h *heard) take(lines [][]byte, before uint64) {
	for _, l := range lines {
		if !bytes.Contains(l, denyMark) && !bytes.Contains(l, egressMark) {
			continue
		}
		r, _, err := audit.ParseLine(append(l[:len(l):len(l)], '\n'))
		if err != nil || r.Seq <= before {
			continue
		}
		h.mu.Lock()
		if r.Decision == audit.Deny {
			h.denied(&r)
		}
		if r.Kind == audit.KindEgressOpen || r.Kind == audit.KindEgressClose || r.Decision == audit.Deny && strings.HasPrefix(r.Dst, "host:") {
			h.passed(&r)
		}
		h.mu.Unlock()
	}
}

// denied counts a denial. mu is held.
func (h *heard) denied(r *audit.Record) {
	k := denialKey{r.Src, r.Dst, r.Verb, r.Path, r.Reason, r.Rule}
	d := h.denials[k]
	if d == nil {
		if len(h.denials) >= maxKinds {
			h.forget()
		}
		d = &denial{first: r.Time}
		h.denials[k] = d
	}
	d.n += max(r.Count, 1)
	if !r.Time.Before(d.last.Time) {
		d.last, d.by = *r, nil
	}
}

// forget drops the kind that was last seen longest ago. mu is held.
func (h *heard) forget() {
	var oldest denialKey
	var at time.Time
	for k, d := range h.denials {
		if at.IsZero() || d.last.Time.Before(at) {
			oldest, at = k, d.last.Time
		}
	}
	delete(h.denials, oldest)
}

// passed takes note of a tunnel. mu is held.
func (h *heard) passed(r *audit.Record) {
	key := r.ID
	if r.Kind == audit.KindRollup {
		key += "/" + strconv.FormatUint(r.Seq, 10)
	}
	p := h.passages[key]
	if p == nil {
		if len(h.order) >= maxPassages {
			delete(h.passages, h.order[0])
			h.order = h.order[1:]
		}
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

func newHeard(policies func() *mesh.Snapshot) *heard {
	return &heard{policies: policies, denials: map[denialKey]*denial{}, passages: map[string]*page.Passage{}}
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
