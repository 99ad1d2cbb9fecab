package route

import "sallyport/internal/mesh"

// A Keeper finds the route that says how a call is recorded. Nil finds none.
type Keeper struct {
	set *Set
	// all is for every call, of routes that cannot be compiled.
	all *mesh.Route
}

// KeeperOf compiles those routes of a service which say how its calls are recorded,
// nil when none does.
func KeeperOf(snap *mesh.Snapshot, service mesh.ServiceName) *Keeper {
	of := snap.RoutesOf(service)
	if of == nil {
		return nil
	}
	file := mesh.Routes{Service: of.Service, Origin: of.Origin}
	for i := range of.Routes {
		if r := of.Routes[i]; r.Keeps() {
			r.Shadows, r.Faults = nil, nil
			file.Routes = append(file.Routes, r)
		}
	}
	if len(file.Routes) == 0 {
		return nil
	}
	c := compiler{members: membersOf(snap.Memberships), snap: snap}
	set, err := c.set(&file)
	if err != nil { // Compile has said so, and the snapshot is not in force
		return &Keeper{all: &mesh.Route{Audit: mesh.AuditFull, Fail: mesh.FailClosed}}
	}
	return &Keeper{set: set}
}

// Route is the most specific route that matches the call, nil when none does.
func (k *Keeper) Route(c *Call) *mesh.Route {
	switch {
	case k == nil:
		return nil
	case k.all != nil:
		return k.all
	}
	if e, _ := k.set.find(c); e != nil {
		return e.route.Route
	}
	return nil
}
