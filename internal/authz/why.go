package authz

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// keptDenials is how many of the last denials a Judge can explain, and
	// keptSets by how many policies they may have been made: a Set of 10,000
	// rows takes some MiB.
	keptDenials = 512
	keptSets    = 3
)

// denials is the last denials of a Judge.
type denials struct {
	mu   sync.Mutex // guards the fields below
	ring [keptDenials]refused
	next int
	sets []*Set
}

type refused struct {
	id   string
	call Call
	set  *Set
	// unkept is why the record could not be kept; nil when it was.
	unkept error
}

// keep takes note of a denial. The copy does not hold on to the caller's
// buffers.
func (k *denials) keep(id string, c *Call, set *Set, unkept error) {
	d := refused{id: strings.Clone(id), call: *c, set: set, unkept: unkept}
	for _, s := range []*string{&d.call.Dst, &d.call.Verb, &d.call.Path, &d.call.SNI, &d.call.Peer, &d.call.Trace} {
		*s = strings.Clone(*s)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ring[k.next] = d
	k.next = (k.next + 1) % keptDenials
	if slices.Contains(k.sets, set) {
		return
	}
	if k.sets = append(k.sets, set); len(k.sets) <= keptSets {
		return
	}
	old := k.sets[0]
	k.sets = slices.Delete(k.sets, 0, 1)
	for i := range k.ring {
		if k.ring[i].set == old {
			k.ring[i] = refused{}
		}
	}
}

// find returns the newest denial with the id.
func (k *denials) find(id string) (refused, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := range keptDenials {
		if d := &k.ring[(k.next-1-i+keptDenials)%keptDenials]; d.id == id && id != "" {
			return *d, true
		}
	}
	return refused{}, false
}

// A Why is the account of a denial that a Judge still knows.
type Why struct {
	ID   string    `json:"id"`
	Time time.Time `json:"time"`
	Account
}

// Why explains one of the last denials by the policy that made it. Denials of
// a flood that share an id are explained by the newest.
func (j *Judge) Why(id string) (Why, bool) {
	d, ok := j.denials.find(id)
	if !ok {
		return Why{}, false
	}
	w := Why{ID: id, Time: d.call.Now, Account: d.set.Account(&d.call)}
	if d.unkept != nil {
		w.unrecorded(fmt.Sprintf("whatever the rows say, the call was refused since its record could not be kept: %v", d.unkept))
	}
	return w, true
}

// unrecorded makes the account that of a call which no row would have helped.
func (w *Why) unrecorded(why string) {
	w.Allow, w.Reason, w.Rule, w.Origin = false, Unrecorded, "", ""
	w.Nearest, w.Add, w.NoAdd = nil, "", why
}

// WhyHandler answers "GET /why/{id}" on the admin socket of a proxy. It is for
// operators: callers must not see rules.
func (j *Judge) WhyHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		why, ok := j.Why(r.PathValue("id"))
		if !ok {
			http.Error(w, "this proxy knows no such denial any more", http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		// An operator who has gone is no failure of ours.
		_ = json.NewEncoder(w).Encode(why)
	})
}
