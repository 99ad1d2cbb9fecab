package main

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/route"
)

// An ownService is the workload's service in a snapshot. Each call asks for it,
// so it is looked for once.
type ownService struct {
	snap *mesh.Snapshot
	id   spiffeid.ID
	mesh.Service
	hosts  map[string]bool // that its routes have it see
	keeper *route.Keeper   // by its routes, how calls to it are recorded
}

// service is the workload's service in the policy in force, zero while there is
// none.
func (s *sidecar) service() *ownService {
	snap := s.agent.Snapshot()
	self, err := s.agent.Self()
	if err != nil || snap == nil {
		return &ownService{}
	}
	if own := s.found.Load(); own != nil && own.snap == snap && own.id == self.ID {
		return own
	}
	svc, _ := snap.ServiceByID(self.ID)
	own := &ownService{snap, self.ID, svc, snap.RoutesOf(svc.Name).Hosts(), route.KeeperOf(snap, svc.Name)}
	s.found.Store(own)
	return own
}

// port is the port that rules name for the workload's service.
func (s *sidecar) port() uint16 { return s.service().Port }

// name is the name of the workload's service.
func (s *sidecar) name() mesh.ServiceName { return s.service().Name }

// host says whether the routes of the workload's service have it see a host.
func (s *sidecar) host(host []byte) bool { return s.service().hosts[string(host)] }

// recorder finds the route that says how a call to the service is recorded.
func (s *sidecar) recorder() *route.Keeper { return s.service().keeper }

// stream says how streams are carried, if the workload's service speaks TCP.
func (s *sidecar) stream() (mesh.Stream, bool) {
	own := s.service()
	return own.Stream, own.Protocol == mesh.TCP
}
