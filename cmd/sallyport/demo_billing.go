package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"
)

const (
	envVersion = "DEMO_VERSION"
	// headerBy says in answers which version of billing made them.
	headerBy       = "X-Answered-By"
	headerCustomer = "X-Customer"
	// headerSeen has the traces that the programs on the way were told.
	headerSeen    = "X-Seen"
	demoCustomers = 200
)

// billing is how a program behaves that plays billing, or a version of it.
type billing struct {
	version string
	manners atomic.Pointer[manners]
	calls   atomic.Int64
}

// manners are what a scenario asks of billing, as JSON in a PUT of /manners.
type manners struct {
	Status int           `json:"status,omitempty"` // of every answer; 0 for the right one
	Delay  time.Duration `json:"delay,omitempty"`
	Hang   bool          `json:"hang,omitempty"` // until the caller gives up
}

// behave changes the manners, and answers how many calls there were before.
func (b *billing) behave(w http.ResponseWriter, r *http.Request) {
	var m manners
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<10)).Decode(&m); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	b.manners.Store(&m)
	_ = json.NewEncoder(w).Encode(b.calls.Load())
}

// mannered is do, done as the scenario asks.
func (b *billing) mannered(do http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.calls.Add(1)
		w.Header().Set(headerBy, b.version)
		m := b.manners.Load()
		if m == nil {
			m = new(manners)
		}
		if m.Hang {
			<-r.Context().Done()
			return
		}
		if m.Delay > 0 {
			select {
			case <-r.Context().Done():
				return
			case <-time.After(m.Delay):
			}
		}
		if m.Status != 0 {
			http.Error(w, "as the scenario asks", m.Status)
			return
		}
		do(w, r)
	})
}

// charge is what a charge was. The amount of the next version is written
// otherwise, which is what a shadow is there to find.
func (b *billing) charge(w http.ResponseWriter, r *http.Request) {
	var amount any = 100
	if b.version == "next" {
		amount = "100.00"
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"charge": r.PathValue("id"), "amount": amount, "asked": b.calls.Load(), "card": "4000-0000-0000-0002",
	})
}

// readBack has payment read a charge.
func (a *demoApp) readBack(ctx context.Context) {
	start := time.Now()
	status, h, reply, err := a.do(ctx, http.MethodGet, "http://billing.mesh.internal/v1/charges/7", nil)
	if ctx.Err() != nil {
		return
	}
	e := demoEvent{Probe: "read", Want: "allow", Status: status, OK: err == nil && status == http.StatusOK, By: answeredBy(h), Took: time.Since(start)}
	if !e.OK {
		e.Detail = fmt.Sprintf("%.200s %v", reply, err)
	}
	a.say(e)
}

// answeredBy says who made an answer: a version of billing, a fault, or the
// sidecar, for a reason.
func answeredBy(h http.Header) string {
	if f := h.Get("Sallyport-Fault"); f != "" {
		return "fault"
	}
	return cmp.Or(h.Get(headerBy), h.Get("Sallyport-Refused"))
}
