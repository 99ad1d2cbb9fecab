package egress

import (
	"net/http"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/tap"
)

// tapped has those who look see what a request or a tunnel has come to: a is what its
// caller was told in the host's place, nil when that was the status of the host, or
// that there is a tunnel. req is what has come, nil for CONNECT.
func (g *Gateway) tapped(t *tunnel, status int, a *answer, retries int, req *http1.Request) {
	if !g.cfg.Taps.Watched() {
		return
	}
	seen := mesh.Tapped{
		Time: t.spans.start.UTC(), Reporter: reporter, Src: t.call.Src.String(), Dst: t.call.Dst, Method: t.call.Verb, Path: t.call.Path, Status: status, Decision: t.id,
		Took: float64(time.Since(t.spans.start).Microseconds()) / 1000, Up: t.up.Load(), Down: t.down.Load(), Retries: retries,
	}
	if why := t.why(); why != "" && why != ReasonDone {
		seen.Flag = string(why)
	}
	if a != nil {
		seen.Status, seen.Decision, seen.Denied = a.status, a.id, a.status == http.StatusForbidden
		if a.reason != "" {
			seen.Flag = string(a.reason)
		}
	}
	if t.how.Host != "" && t.how.Host != t.host.String() {
		seen.Route = t.how.Host // the pattern that covers the host
	}
	g.cfg.Taps.Show(&seen, func(s *mesh.Tapped) {
		s.Trace = t.call.Trace
		if req != nil {
			s.Headers = tap.Fields(req.Fields)
		}
	})
}

// tappedUnread has those who look see what named no host that could be judged.
func (g *Gateway) tappedUnread(who *caller, verb string, a *answer) {
	if !g.cfg.Taps.Watched() {
		return
	}
	g.cfg.Taps.Show(&mesh.Tapped{
		Time: time.Now().UTC(), Reporter: reporter, Src: who.id.String(), Method: verb, Path: "-", Status: a.status, Flag: string(a.reason), Decision: a.id,
	}, nil)
}
