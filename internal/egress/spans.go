package egress

import (
	"time"

	"sallyport/internal/telemetry"
)

// spans are those of one tunnel until it is open. All is noted, since what goes
// badly is kept whatever its caller says, and a tunnel costs far more than that.
type spans struct {
	trace  telemetry.Trace
	parent [8]byte
	start  time.Time
	parts  []telemetry.Span
}

// traceOf continues the trace that a caller names, or begins one.
func (g *Gateway) traceOf(traceparent []byte) spans {
	s := spans{start: time.Now()}
	if t, ok := telemetry.ParseTraceparent(traceparent); ok {
		s.trace, s.parent = t.Child(), t.Span
	} else if g.cfg.Tracer != nil {
		s.trace = telemetry.NewTrace()
		g.cfg.Tracer.Begin(&s.trace)
	}
	return s
}

// did notes a part of what opens the tunnel.
func (s *spans) did(name string, kind telemetry.Kind, began time.Time, err error) {
	whole := telemetry.Span{Trace: s.trace}
	part := whole.Child(name, kind, began)
	part.End, part.Failed = time.Now(), err != nil
	s.parts = append(s.parts, part)
}

// told keeps the spans of a tunnel that was opened, or refused.
func (g *Gateway) told(t *tunnel, a *answer) {
	tr, s := g.cfg.Tracer, &t.spans
	now := time.Now()
	if tr == nil || !s.trace.Sampled && a == nil && !tr.Slow(now.Sub(s.start)) {
		return
	}
	src, dst := g.signals.SeriesOf(telemetry.ProtoTCP, t.call.Src.String(), t.how.Host, "").Ends()
	root := telemetry.Span{
		Trace: s.trace, Parent: s.parent, Name: "egress", Kind: telemetry.Server, Start: s.start, End: now, Failed: a != nil,
		Attrs: []telemetry.Attr{
			{Key: "http.request.method", Text: "CONNECT"}, {Key: "sallyport.reporter", Text: reporter},
			{Key: "sallyport.src", Text: src}, {Key: "sallyport.dst", Text: dst}, {Key: "server.port", N: int64(t.call.Port)},
		},
	}
	add := func(key, text string) {
		if text != "" {
			root.Attrs = append(root.Attrs, telemetry.Attr{Key: key, Text: text})
		}
	}
	id := t.id
	if a != nil {
		id = a.id
		add("sallyport.flag", string(a.reason))
	}
	add("sallyport.decision_id", id)
	add("sallyport.rule", t.rule)
	tr.Keep(append([]telemetry.Span{root}, s.parts...)...)
}
