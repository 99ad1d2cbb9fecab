package telemetry

// CertExpiry is when the named certificate expires, such as "svid",
// "intermediate" or "root".
func (r *Registry) CertExpiry(cert string) *Expiry {
	if r == nil {
		return nil
	}
	return r.expiry.get(labels{cert})
}

// PolicyRevision is the policy revision that the process acts on.
func (r *Registry) PolicyRevision() *Gauge {
	if r == nil {
		return nil
	}
	return r.revision.get(labels{})
}

// PolicyRejected counts policy revisions that the process refused.
func (r *Registry) PolicyRejected() *Counter {
	if r == nil {
		return nil
	}
	return r.rejected.get(labels{})
}

// DeliverySteps counts what was done to rollouts of routes.
func (r *Registry) DeliverySteps(step string) *Counter {
	if r == nil {
		return nil
	}
	return r.delivered.get(labels{step})
}

// RolloutSteps counts what was done to policies that a canary group tries.
func (r *Registry) RolloutSteps(step string) *Counter {
	if r == nil {
		return nil
	}
	return r.rollouts.get(labels{step})
}

// Authz counts decisions by the rule that decided ("" when none matched) and
// its effect, allow or deny. It allocates nothing for a pair it has seen.
func (r *Registry) Authz(rule, effect string) *Counter {
	if r == nil {
		return nil
	}
	return r.authz.get(labels{effect, rule})
}

// Candidate counts calls that a candidate policy would decide otherwise, by the
// kind of difference and the row that makes it.
func (r *Registry) Candidate(difference, rule string) *Counter {
	if r == nil {
		return nil
	}
	return r.candidate.get(labels{difference, rule})
}

// Shadow counts copies of calls for a shadow backend by what became of
// them, from a closed set.
func (r *Registry) Shadow(shadow, outcome string) *Counter {
	if r == nil {
		return nil
	}
	return r.shadow.get(labels{outcome, shadow})
}

// ArchiveRecords counts the records for an archive by result, "kept" or
// "dropped".
func (r *Registry) ArchiveRecords(archive, result string) *Counter {
	if r == nil {
		return nil
	}
	return r.archived.get(labels{result, archive})
}

// AuthzMismatch counts decisions on which index and oracle disagreed. One is
// an alarm.
func (r *Registry) AuthzMismatch() *Counter {
	if r == nil {
		return nil
	}
	return r.mismatch.get(labels{})
}

// AuditRecords counts audit records by kind.
func (r *Registry) AuditRecords(kind string) *Counter {
	if r == nil {
		return nil
	}
	return r.audit.get(labels{kind})
}

// TLSFailures counts failed handshakes. The reason is from a closed set of the
// caller, never text of the peer.
func (r *Registry) TLSFailures(reporter, reason string) *Counter {
	if r == nil {
		return nil
	}
	return r.tls.get(labels{reporter, reason})
}

// UpstreamConnects counts attempts to connect to a service, by result: "ok" or
// a reason from a closed set.
func (r *Registry) UpstreamConnects(dst, result string) *Counter {
	if r == nil {
		return nil
	}
	return r.connects.get(labels{result, r.service(dst)})
}

// Connections is the number of connections to a listener in a state, "open" or
// "proving" or "resting".
func (r *Registry) Connections(reporter, state string) *Gauge {
	if r == nil {
		return nil
	}
	return r.open.get(labels{reporter, state})
}

// ConnectionsRefused counts connections that a limit closed: "total", "peer",
// "handshakes" or "resets"; and at a gateway streams without an answer: "streams".
func (r *Registry) ConnectionsRefused(reporter, limit string) *Counter {
	if r == nil {
		return nil
	}
	return r.turned.get(labels{reporter, limit})
}

// HopViolations counts connections between proxies whose peer broke the
// protocol, by how, from a closed set.
func (r *Registry) HopViolations(reporter, reason string) *Counter {
	if r == nil {
		return nil
	}
	return r.broken.get(labels{reporter, reason})
}

// RequestsRefused counts requests that were refused before anybody judged them.
// The reason is from a closed set of the caller, never text of the peer.
func (r *Registry) RequestsRefused(reporter, reason string) *Counter {
	if r == nil {
		return nil
	}
	return r.unread.get(labels{reporter, reason})
}

// Names counts the questions that the nameserver has answered, by what became
// of them.
func (r *Registry) Names(result string) *Counter {
	if r == nil {
		return nil
	}
	return r.asked.get(labels{result})
}

// NameTimes counts how long answers of the nameserver took, by what they are:
// "ready", "made" or "real".
func (r *Registry) NameTimes(answer string) *Histogram {
	if r == nil {
		return nil
	}
	return r.named.get(labels{answer})
}

// EgressTunnels is the number of open tunnels of a caller.
func (r *Registry) EgressTunnels(src string) *Gauge {
	if r == nil {
		return nil
	}
	return r.tunnels.get(labels{r.service(src)})
}

// EgressBytes counts the bytes of tunnels from src to the host dst as the rule
// or the destination file names it: up leaves the mesh, down enters it.
func (r *Registry) EgressBytes(src, dst string) (up, down *Counter) {
	if r == nil {
		return nil, nil
	}
	src = r.service(src)
	return r.tunnelB.get(labels{"up", src, dst}), r.tunnelB.get(labels{"down", src, dst})
}

// Reloads counts reloads of what, such as "policy" or "config", by result "ok"
// or "refused".
func (r *Registry) Reloads(what, result string) *Counter {
	if r == nil {
		return nil
	}
	return r.reloads.get(labels{result, what})
}

// Rotations counts attempts to renew an SVID, by result "ok" or "failed".
func (r *Registry) Rotations(result string) *Counter {
	if r == nil {
		return nil
	}
	return r.rotations.get(labels{result})
}

// TokenKeyFetches counts looks at the keys of an issuer of tokens, by result
// "ok", "unchanged" or "error".
func (r *Registry) TokenKeyFetches(issuer, result string) *Counter {
	if r == nil {
		return nil
	}
	return r.tokenKeys.get(labels{result, issuer})
}

// UpstreamCA counts questions to the upstream authority of the CA, by result
// "ok" or "failed".
func (r *Registry) UpstreamCA(result string) *Counter {
	if r == nil {
		return nil
	}
	return r.askedUp.get(labels{result})
}

// IssuerMessages counts what reached the issuer by a method of its API: one
// message of a plain call, each of a stream.
func (r *Registry) IssuerMessages(method string) *Counter {
	if r == nil {
		return nil
	}
	return r.messages.get(labels{method})
}

// FederationFetches counts looks at the bundle endpoint of another trust
// domain, by result "ok" or "failed".
func (r *Registry) FederationFetches(trustDomain, result string) *Counter {
	if r == nil {
		return nil
	}
	return r.lookups.get(labels{result, trustDomain})
}

// FederationRefreshed is when the bundle of another trust domain was last found
// good, as Unix time in seconds; 0 when it was not since the start.
func (r *Registry) FederationRefreshed(trustDomain string) *Gauge {
	if r == nil {
		return nil
	}
	return r.federated.get(labels{trustDomain})
}

// AuditSink counts the audit records of a sink by result, "sent" or "refused".
func (r *Registry) AuditSink(sink, result string) *Counter {
	if r == nil {
		return nil
	}
	return r.sinks.get(labels{result, sink})
}

// AuditSinkError counts batches that a sink did not take.
func (r *Registry) AuditSinkError(sink string) *Counter {
	if r == nil {
		return nil
	}
	return r.sinkErrs.get(labels{sink})
}

// AuditSinkLag shows how many records wait for a sink, and for how many seconds
// the oldest has. lag is asked at each scrape, from any goroutine.
func (r *Registry) AuditSinkLag(sink string, lag func() (records, seconds float64)) {
	if r != nil {
		r.sinkLags.add(sink, lag)
	}
}

// What made a further try of a call necessary.
const (
	RetryStatus  = "status"  // the answer, as the route says
	RetryFailure = "failure" // there was none
	RetryRefused = "refused" // the peer had acted on nothing
	RetryHedge   = "hedge"   // a second one beside the first, which was late
)

// Retries counts further tries of calls to a service: those that its budget had
// room for, and those that were withheld.
func (r *Registry) Retries(dst, reason string, granted bool) *Counter {
	if r == nil {
		return nil
	}
	budget := "spent"
	if granted {
		budget = "granted"
	}
	return r.retries.get(labels{reason, budget, r.service(dst)})
}

// Ejections counts endpoints of a service that were put aside, by why, from a
// closed set.
func (r *Registry) Ejections(dst, reason string) *Counter {
	if r == nil {
		return nil
	}
	return r.ejections.get(labels{reason, r.service(dst)})
}

// BreakerOpen is 1 while the calls to a service fail at once.
func (r *Registry) BreakerOpen(dst string) *Gauge {
	if r == nil {
		return nil
	}
	return r.cutOff.get(labels{r.service(dst)})
}

// Spans counts spans by what became of them: "sent", "refused", "failed" or
// "dropped".
func (r *Registry) Spans(result string) *Counter {
	if r == nil {
		return nil
	}
	return r.spans.get(labels{result})
}

// MetricsExports counts times that the metrics were sent away, by result "sent",
// "refused" or "failed".
func (r *Registry) MetricsExports(result string) *Counter {
	if r == nil {
		return nil
	}
	return r.pushed.get(labels{result})
}
