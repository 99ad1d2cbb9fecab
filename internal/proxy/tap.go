package proxy

import (
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/tap"
)

// tapped has those who look see a call that has ended.
func (x *call) tapped(to *tap.Taps) {
	if !to.Watched() {
		return
	}
	seen := mesh.Tapped{
		Time: x.start.UTC(), Reporter: x.on.Reporter, Src: x.src, Dst: x.dst, Method: x.verb(), Path: x.path(), Status: x.status(), GRPC: x.grpc, Flag: x.flag(),
		Took: float64(time.Since(x.start).Microseconds()) / 1000, Up: x.res.ReqBytes, Down: x.res.RespBytes, Retries: x.tries.n, Shadow: x.marked,
	}
	if x.to != nil && x.to.route != nil {
		seen.Route = string(x.known.name) + "/" + x.to.route.Name
	}
	if x.refused != nil {
		seen.Decision, seen.Denied = x.refused.decision, x.refused.decision != ""
	} else if x.grant.Valid() {
		seen.Decision = x.grant.ID()
	}
	to.Show(&seen, func(s *mesh.Tapped) { s.Trace, s.Headers = x.traceText(), tap.Fields(x.req.Fields) })
}
