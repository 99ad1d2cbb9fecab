package main

import (
	"context"
	"fmt"
	"net"

	"sallyport/internal/audit"
	"sallyport/internal/capture"
	"sallyport/internal/daemon"
	"sallyport/internal/handover"
	"sallyport/internal/svid"
)

// workloadAPI opens the socket of the Workload API and returns what serves it.
func (s *sidecar) workloadAPI() (func(context.Context) error, error) {
	w, err := svid.NewWorkloadAPI(svid.WorkloadConfig{
		Source: s.agent.Source(), Attest: localAttestor{s}, JWT: svid.NewJWTCache(s.agent, s.agent.Source()), Audit: s.recordDelivery, Log: s.log,
	})
	if err != nil {
		return nil, err
	}
	// Every local user may connect: who gets what is decided by attestation.
	ln, err := s.shift.Doors.Unix("workload.socket", s.cfg.Workload.Socket,
		func() (handover.Listener, error) { return capture.ListenUnix(s.cfg.Workload.Socket, 0o777) },
		func(ln *net.UnixListener) (handover.Listener, error) { return capture.AdoptUnix(ln) })
	if err != nil {
		return nil, daemon.Hint(err, "change workload.socket in the configuration")
	}
	return func(ctx context.Context) error { return w.Serve(ctx, ln) }, nil
}

// localAttestor says which entries a local process satisfies.
type localAttestor struct{ s *sidecar }

// Attest is svid.Attestor.
func (l localAttestor) Attest(ctx context.Context, p capture.Process) ([]string, error) {
	es, err := l.s.entriesOf(ctx, p)
	if err != nil {
		return nil, err
	}
	ids := make([]string, len(es))
	for i, e := range es {
		ids[i] = e.ID
	}
	return ids, nil
}

// recordDelivery writes down who got an identity, or why not, before it is
// sent.
func (s *sidecar) recordDelivery(d svid.Delivery) error {
	r := audit.Record{
		Kind: audit.KindAttest, Decision: audit.Allow, Verb: d.Method,
		Peer: fmt.Sprintf("pid %d uid %d %s", d.Process.PID, d.Process.UID, d.Process.ExePath),
	}
	if d.Err != nil {
		r.Decision, r.Reason, r.Detail = audit.Deny, "no_identity", d.Err.Error()
	}
	if len(d.IDs) > 0 {
		r.Src = d.IDs[0].String()
	}
	return s.audit.Append(&r)
}
