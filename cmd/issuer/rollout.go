package main

import (
	"fmt"
	"strings"

	"sallyport/internal/audit"
	"sallyport/internal/registry"
)

// recordRollout writes down a step of a rollout before it is made.
func (in *issuer) recordRollout(s registry.RolloutStep) error {
	by := s.By
	if in.name != "" && by == registry.ByItself {
		by += " " + in.name
	}
	r := audit.Record{
		Kind: audit.KindPolicy, Decision: audit.Allow, Verb: "rollout " + s.Step, Revision: s.Revision,
		Detail: fmt.Sprintf("by %s; set %s; %d canary proxies, %d acknowledged; %s", by, s.Set, s.Members, s.Acks, s.Why),
	}
	if strings.HasPrefix(by, "spiffe://") {
		r.Src = by
	}
	if s.Step == registry.StepTakeBack || s.Step == registry.StepHold {
		r.Decision = audit.Deny
	}
	if err := in.audit.Append(&r); err != nil {
		return err
	}
	in.metrics.RolloutSteps(s.Step).Inc()
	in.log.Info("rollout of policies", "step", s.Step, "revision", s.Revision, "proxies", s.Members, "acknowledged", s.Acks, "by", by, "why", s.Why)
	return nil
}
