package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/mesh"
)

// recordAdmin writes down what an operator does, before it is done.
func (in *issuer) recordAdmin(_ context.Context, c control.AdminCall) error {
	r := audit.Record{Kind: audit.KindAdmin, Decision: audit.Allow, Verb: c.Method, Rule: c.Rule, Peer: c.Peer}
	if !c.Allowed {
		r.Decision = audit.Deny
	}
	if !c.Caller.IsZero() {
		r.Src = c.Caller.String()
	}
	if !c.On.IsZero() {
		r.Dst = c.On.String()
	}
	return in.audit.Append(&r)
}

// recordAnnounced writes down an endpoint that was refused for its address.
func (in *issuer) recordAnnounced(_ context.Context, a control.Announcement) error {
	return in.audit.Append(&audit.Record{
		Kind: audit.KindAttest, Decision: audit.Deny, Reason: "endpoint_address", Verb: "announce", Src: a.Agent.String(), Dst: a.Workload.String(), Peer: a.Peer,
		Detail: fmt.Sprintf("service %s at %s", a.Service, a.Address),
	})
}

// recordFaultStop writes down which faults an operator stops, before it is done.
func (in *issuer) recordFaultStop(s mesh.FaultStop) error {
	return in.audit.Append(&audit.Record{
		Kind: audit.KindPolicy, Decision: audit.Deny, Reason: "fault_stopped", Rule: s.Fault, Verb: "fault stop", Peer: s.By,
		Detail: "none that is to begin before " + s.Before.UTC().Format(time.RFC3339) + " touches a call",
	})
}

// recordsAtOnce bounds the records that wait for the disk together.
const recordsAtOnce = 64

// recordRevoked writes down what was revoked. It is in force already: a record
// that fails is said, and takes nothing back.
func (in *issuer) recordRevoked(list []mesh.RevokedSVID) {
	var g errgroup.Group
	g.SetLimit(recordsAtOnce)
	for _, v := range list {
		g.Go(func() error {
			return in.audit.Append(&audit.Record{
				Kind: audit.KindIssue, Decision: audit.Deny, Reason: v.Why, Dst: v.ID.String(), Verb: "revoke", Done: true,
				Detail: "serial " + v.Serial + ", would have ended " + v.Until.Add(-mesh.Grace).UTC().Format(time.RFC3339),
			})
		})
	}
	if err := g.Wait(); err != nil {
		in.log.Error("revocation not recorded", "err", err)
	}
}
