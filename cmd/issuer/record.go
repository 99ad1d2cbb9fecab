package main

import (
	"context"

	"sallyport/internal/audit"
	"sallyport/internal/control"
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
