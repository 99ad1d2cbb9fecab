package egress

import (
	"time"

	"sallyport/internal/telemetry"
)

// counted counts what has become of a request that began then: it was refused,
// or is a tunnel, which counts when it ends. Who denied it does not matter.
func (g *Gateway) counted(who *caller, began time.Time, t *tunnel, a *answer) {
	if t != nil {
		t.began = began
		return
	}
	if a == nil {
		return
	}
	now := time.Now()
	g.signals.SeriesOf(telemetry.ProtoTCP, who.id.String(), "", "").Observe(&telemetry.Call{Code: a.status, Flag: string(a.reason), Took: now.Sub(began), End: now})
}

// begins counts t as running until the function that it returns is called. The
// destination is what the policy calls it, never what a caller wrote.
func (g *Gateway) begins(t *tunnel) (over func()) {
	x := g.signals.SeriesOf(telemetry.ProtoTCP, t.call.Src.String(), t.how.Host, "")
	x.Begin()
	open := time.Now()
	return func() {
		x.End()
		c := telemetry.Call{Code: 200, End: time.Now(), First: open.Sub(t.began), Up: t.up.Load(), Down: t.down.Load()}
		c.Took = c.End.Sub(t.began)
		if why := t.why(); why != ReasonDone {
			c.Flag = string(why)
		}
		x.Observe(&c)
		g.tapped(t, c.Code, nil, 0, nil)
	}
}

// asked counts a request that the gateway has made in its caller's stead, or has
// not; f is nil when it was refused.
func (g *Gateway) asked(who *caller, began time.Time, f *fetch, a *answer) {
	c := telemetry.Call{End: time.Now()}
	c.Took = c.End.Sub(began)
	dst := ""
	if f != nil {
		dst, c.Code, c.Up, c.Down = f.how.Host, f.status, f.up.Load(), f.down.Load()
		g.told(f.tunnel, a)
		g.tapped(f.tunnel, f.status, a, f.more, f.req)
	}
	if a != nil {
		c.Code, c.Flag = a.status, string(a.reason)
	}
	g.signals.Series(who.id.String(), dst, "").Observe(&c)
}
