package upstream

import (
	"net/netip"
	"slices"
	"time"

	"sallyport/internal/mesh"
)

// The kinds of Trouble.
const (
	// Ejected: calls avoid the endpoint.
	Ejected = "ejected"
	// Unhealthy: so do they, since a health check says so.
	Unhealthy = "unhealthy"
	// Open: calls to the service fail at once.
	Open = "open"
	// Closed: they do not any more, and Healthy: calls avoid the endpoint no more.
	// These are told of, and stand in no list.
	Closed  = "closed"
	Healthy = "healthy"
)

// A Trouble is what this proxy holds against a service or one of its endpoints.
type Trouble struct {
	Service mesh.ServiceName `json:"service"`
	// Dst is the identity of the service, as metrics have it.
	Dst  string `json:"dst"`
	Kind string `json:"kind"`
	// Address is of the endpoint; none for a service.
	Address netip.AddrPort `json:"address,omitzero"`
	Since   time.Time      `json:"since"`
	Until   time.Time      `json:"until,omitzero"` // zero: until something shows otherwise
	Why     string         `json:"why,omitempty"`
	// Cause is Why of an ejection in one word: connect, failures or share.
	Cause string `json:"cause,omitempty"`
}

// ejected describes an ejection. The caller holds the lock.
func (st *standing) ejected(e *endpoint) Trouble {
	return Trouble{Service: st.name, Dst: st.dst, Kind: Ejected, Address: e.addr, Since: time.Unix(0, e.since), Until: time.Unix(0, e.out.Load()), Why: e.why, Cause: causeOf(e.why)}
}

// cut describes the breaker.
func (st *standing) cut(now int64) Trouble {
	open, since, why := st.breaker.state()
	if !open {
		return Trouble{Service: st.name, Dst: st.dst, Kind: Closed, Since: time.Unix(0, now)}
	}
	return Trouble{Service: st.name, Dst: st.dst, Kind: Open, Since: time.Unix(0, since), Why: why}
}

// Troubles lists what is held against whom now, by service and address.
func (s *Services) Troubles() (list []Trouble) {
	now := time.Now().UnixNano()
	for _, g := range *s.table.Load() {
		list = g.troubles(list, now)
	}
	return inOrder(list)
}

// troubles appends what is held against the service.
func (st *standing) troubles(list []Trouble, now int64) []Trouble {
	if st.breaker != nil {
		if t := st.cut(now); t.Kind == Open {
			list = append(list, t)
		}
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, e := range st.whole {
		if e.out.Load() > now {
			list = append(list, st.ejected(e))
		}
		if e.sick.Load() {
			list = append(list, Trouble{Service: st.name, Dst: st.dst, Kind: Unhealthy, Address: e.addr, Since: time.Unix(0, e.sickSince), Why: e.sickWhy})
		}
	}
	return list
}

func inOrder(list []Trouble) []Trouble {
	slices.SortFunc(list, func(a, b Trouble) int {
		if a.Service != b.Service {
			if a.Service < b.Service {
				return -1
			}
			return 1
		}
		return a.Address.Compare(b.Address)
	})
	return list
}

// dialledTo tells of an attempt to connect.
func (p *Pool) dialledTo(err error) {
	if p.cfg.Dialled != nil {
		p.cfg.Dialled(p.t.id, err)
	}
}
