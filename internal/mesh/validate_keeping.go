package mesh

import "slices"

// Keeps says whether the route says how its calls are recorded.
func (r *Route) Keeps() bool { return r.Audit != "" || r.Fail != "" }

// keeping checks how the calls of a route are recorded. That is done by the sidecar
// of the service, which goes by what it knows of a call for certain: a route may
// ask for nothing else, or a caller could choose what is recorded of his calls.
func (c *routeChecker) keeping(r *Route) {
	c.word("audit", r.Audit, AuditFull, AuditCounted)
	c.word("fail", r.Fail, FailOpen, FailClosed)
	field := "audit"
	if r.Audit == "" {
		field = "fail"
	}
	if k := c.keepingOf(r); r.Fail == FailOpen && k.Full {
		c.say(r.Fail, "fail: \"open\" contradicts audit: \"full\", of the route or of its service: what must be recorded must not happen unrecorded")
	}
	for _, b := range r.Backends {
		if b.Service != "" && b.Service != c.file.Service {
			c.say(string(b.Service), "%s: %q is another service, whose own routes say how its calls are recorded", field, clip(string(b.Service)))
		}
	}
	if r.Rewrite.Path != "" || r.Rewrite.Prefix != "" {
		c.say("rewrite:", "%s: the service sees the path that rewrite makes: write %[1]s into a route that matches that path", field)
	}
	translated := slices.ContainsFunc(c.file.Routes, func(x Route) bool { return x.Translate != nil })
	for i := range r.Matches {
		m := &r.Matches[i]
		switch {
		case len(m.Headers)+len(m.Query)+len(m.Claims) > 0 || m.Region != nil:
			c.say(field+":", "%s: goes by path, method, grpc and from: what else a call has is its caller's to choose", field)
		case translated && m.GRPC == nil && (m.Path != nil || m.Method != ""):
			c.say(field+":", "%s: calls to a service that is translated are recorded as methods of gRPC: match them by grpc", field)
		}
	}
}

// keepingOf is how the calls of a route are recorded where it does not say fail.
func (c *routeChecker) keepingOf(r *Route) Keeping {
	k := Keeping{}
	if svc := c.known[c.file.Service]; svc != nil {
		k = svc.Keeping()
	}
	return k.By(&Route{Audit: r.Audit})
}
