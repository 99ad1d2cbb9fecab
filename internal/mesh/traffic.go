package mesh

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Traffic is what a proxy says of the calls that it carries.
type Traffic struct {
	Ejections []Ejection `json:"ejections,omitempty"`
	// Demands are for whoever divides the limits, and kept by nobody.
	Demands []Demand `json:"-"`
	// Stops is the revision of the newest FaultStops that it acts on.
	Stops uint64 `json:"stops,omitempty"`
}

// Equal says whether both say the same, but for their demands.
func (t *Traffic) Equal(o *Traffic) bool {
	if t == nil || o == nil {
		return t == o
	}
	return t.Stops == o.Stops && slices.EqualFunc(t.Ejections, o.Ejections, func(a, b Ejection) bool {
		return a.Since.Equal(b.Since) && a.Service == b.Service && a.Address == b.Address && a.Kind == b.Kind && a.Why == b.Why
	})
}

// An Ejection is an endpoint that a proxy does not call, or a service.
type Ejection struct {
	Service ServiceName    `json:"service"`
	Address netip.AddrPort `json:"address,omitzero"`
	// Kind is "ejected", "unhealthy" or "open".
	Kind  string    `json:"kind"`
	Since time.Time `json:"since"`
	Why   string    `json:"why,omitempty"`
}

// A Demand is how many calls a second a proxy is asked for under a limit that is
// shared. It is never more than the limit: who is asked for more has no claim to
// more, and who only says so takes no more from others.
type Demand struct {
	Quota
	Calls uint32
}

// A Quota names a limit that is shared: that of a route, SERVICE/ROUTE, for all
// callers or for each.
type Quota struct {
	Route     string
	PerCaller bool
}

// SharedLimits are the limits of routes that proxies share, in calls a second.
func (s *Snapshot) SharedLimits() map[Quota]uint32 {
	var out map[Quota]uint32
	for i := range s.Routes {
		for _, r := range s.Routes[i].Routes {
			if r.Limit == nil || !r.Limit.Shared {
				continue
			}
			if out == nil {
				out = map[Quota]uint32{}
			}
			out[Quota{Route: s.Routes[i].Of() + "/" + r.Name, PerCaller: r.Limit.By == "caller"}] = uint32(r.Limit.Rate)
		}
	}
	return out
}

// A Total is what all proxies of an issuer are asked for under a limit that they
// share.
type Total struct {
	Quota
	Calls   uint64
	Proxies uint32
	// Issuers divide the limit evenly.
	Issuers uint32
}

// Part is how many of rate calls a second are for a proxy that is asked for own.
// While all together ask for less than there is, each has what it is asked for and
// an equal part of the rest; otherwise each has the same part of what it is asked
// for. The parts of all add up to rate.
func (t Total) Part(rate float64, own uint32) float64 {
	n, all := float64(max(t.Proxies, 1)), float64(max(t.Calls, uint64(own)))
	rate /= float64(max(t.Issuers, 1))
	if all < rate {
		return float64(own) + (rate-all)/n
	}
	return rate * float64(own+1) / (all + n)
}

// AllFaults stands for every fault in a FaultStop.
const AllFaults = "*"

// A FaultStop ends faults, by hand and before their time.
type FaultStop struct {
	// Fault is SERVICE/ROUTE/FAULT, or AllFaults.
	Fault string `json:"fault"`
	// Before: those that begin later are others, and not stopped.
	Before time.Time `json:"before"`
	At     time.Time `json:"at,omitzero"`
	By     string    `json:"by,omitempty"`
}

// maxFaultName bounds FaultStop.Fault.
const maxFaultName = 300

// Validate says what is wrong with a stop that somebody sent.
func (s FaultStop) Validate() error {
	if s.Fault != AllFaults && strings.Count(s.Fault, "/") != 2 || len(s.Fault) > maxFaultName || strings.ContainsFunc(s.Fault, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return fmt.Errorf("fault: %.64q is neither SERVICE/ROUTE/FAULT nor %q", s.Fault, AllFaults)
	}
	if s.Before.IsZero() {
		return fmt.Errorf("fault %s: a stop without a time", s.Fault)
	}
	return nil
}

// FaultStops are all stops in force. They are immutable.
type FaultStops struct {
	// Revision is that of the newest there ever was.
	Revision uint64
	All      []FaultStop
}

// Of returns the stop that holds for a fault which begins at since, nil for none.
func (s *FaultStops) Of(fault string, since time.Time) *FaultStop {
	if s == nil {
		return nil
	}
	for i := range s.All {
		if x := &s.All[i]; (x.Fault == AllFaults || x.Fault == fault) && since.Before(x.Before) {
			return x
		}
	}
	return nil
}

// The states of a FaultState.
const (
	FaultPlanned = "planned"
	FaultActive  = "active"
	FaultOver    = "over"
	FaultStopped = "stopped"
)

// A FaultState is a fault of the policy in force, and how it stands.
type FaultState struct {
	// Name is SERVICE/ROUTE/FAULT.
	Name    string    `json:"name"`
	State   string    `json:"state"`
	Does    string    `json:"does"`
	Share   Share     `json:"share"`
	Callers []string  `json:"callers"`
	Since   time.Time `json:"since"`
	Until   time.Time `json:"until"`
	// Stop is set when the State is FaultStopped.
	Stop *FaultStop `json:"stop,omitempty"`
}

// Faults are those of a snapshot as they stand at now, by name.
func (s *Snapshot) Faults(stops *FaultStops, now time.Time) []FaultState {
	out := []FaultState{}
	if s == nil {
		return out
	}
	for i := range s.Routes {
		for _, r := range s.Routes[i].Routes {
			for j := range r.Faults {
				f := &r.Faults[j]
				x := FaultState{
					Name: s.Routes[i].Of() + "/" + r.Name + "/" + f.Name, State: FaultActive, Does: f.does(), Share: f.Share,
					Callers: f.Callers, Since: f.Since, Until: f.Until,
				}
				switch stop := stops.Of(x.Name, f.Since); {
				case !now.Before(f.Until):
					x.State = FaultOver
				case stop != nil:
					x.State, x.Stop = FaultStopped, stop
				case now.Before(f.Since):
					x.State = FaultPlanned
				}
				out = append(out, x)
			}
		}
	}
	slices.SortFunc(out, func(a, b FaultState) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// does says in words what a fault does.
func (f *Fault) does() string {
	var what []string
	if f.Delay > 0 {
		what = append(what, "delay "+f.Delay.String())
	}
	switch {
	case f.Status > 0:
		what = append(what, fmt.Sprintf("status %d", f.Status))
	case f.GRPC != "":
		what = append(what, "grpc "+f.GRPC)
	case f.Reset:
		what = append(what, "reset")
	case f.Bandwidth > 0:
		what = append(what, fmt.Sprintf("%d bytes/s", f.Bandwidth))
	}
	return strings.Join(what, ", ")
}
