package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/mesh"
	"sallyport/internal/rollout"
)

// openRollouts makes what looks after the rollouts of routes.
func (in *issuer) openRollouts() (err error) {
	in.rollouts, err = rollout.New(rollout.Config{Book: in.registry, Store: in.store, Instance: in.instance, OnStep: in.recordDelivery, Log: in.log})
	return err
}

// deliveries is control.RolloutKeeper.
type deliveries struct{ *rollout.Conductor }

func (k deliveries) Rollouts(ctx context.Context) ([]mesh.Delivery, error) { return k.Deliveries(ctx) }

func (k deliveries) MoveRollout(ctx context.Context, m control.RolloutMove) (mesh.Delivery, error) {
	d, err := k.Move(ctx, m.Service, m.Route, m.Move, m.Force, m.By)
	if errors.Is(err, mesh.ErrDelivery) {
		err = control.Unready(err)
	}
	return d, err
}

func (k deliveries) TakeSamples(workload spiffeid.ID, list []mesh.Sample) { k.Take(workload, list) }

// recordDelivery writes down a step of the rollout of a route before it is made,
// with the figures that it goes by.
func (in *issuer) recordDelivery(e rollout.Event) error {
	by := e.Asked
	if by == "" {
		by = strings.TrimSpace("issuer " + in.name)
	}
	r := audit.Record{
		Kind: audit.KindPolicy, Decision: audit.Allow, Verb: "route rollout " + e.Step, Rule: string(e.Service) + "/" + e.Route,
		Revision: in.registry.Status().PolicyRevision,
		Detail:   fmt.Sprintf("by %s; step %d of %d, canary %s has %s; %s", by, e.Delivery.Step, len(e.Plan.Steps), e.Plan.Canary, e.Share, figures(e.Delivery)),
	}
	if strings.HasPrefix(by, "spiffe://") {
		r.Src = by
	}
	switch e.Step {
	case rollout.RollBack, rollout.Stall, rollout.Abort, rollout.Supersede:
		r.Decision = audit.Deny
	}
	if err := in.audit.Append(&r); err != nil {
		return err
	}
	in.metrics.DeliverySteps(e.Step).Inc()
	in.log.Info("rollout of a route", "step", e.Step, "service", e.Service, "route", e.Route, "share", e.Share, "by", by, "figures", figures(e.Delivery))
	return nil
}

// figures are those that a rollout was judged by.
func figures(d mesh.Delivery) string {
	v := d.Verdict
	if v.Verdict == "" {
		return "not judged yet"
	}
	s := fmt.Sprintf("%s: canary %d calls, %d failed, latency %s; others %d, %d, %s; errors of the canary %+.2f%% to %+.2f%% beyond",
		v.Verdict, v.Canary.Calls, v.Canary.Failed, v.Canary.Latency, v.Others.Calls, v.Others.Failed, v.Others.Latency, 100*v.Least, 100*v.Most)
	if d.Why != "" {
		s += "; " + d.Why
	}
	return s
}
