package proxy

import (
	"encoding/hex"
	"strings"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/telemetry"
)

// tracing is what a call knows of its trace beside the trace itself. Of most
// calls no trace is kept, and nothing here takes time.
type tracing struct {
	parent [8]byte         // the span that called, none for a trace that begins here
	link   telemetry.Trace // that was not believed
	b3     b3Form          // in which the trace came as well, and goes on
	// at is where the name of the span begins in extra, at3 the same for B3; the
	// span of a try takes the place of that of the call.
	at, at3 int
	steps   []step
}

// A step is a part of a call whose trace is kept.
type step struct {
	name       string
	kind       telemetry.Kind
	id         [8]byte // zero: none that others know
	start, end time.Time
	try        int // which one, from 1; 0 for what is none
	status     int
	failed     bool
}

type b3Form uint8

const (
	b3None b3Form = iota
	b3Single
	b3Fields
)

// traceOf continues the caller's trace, or begins one. The state of a trace
// that ends here does not go on. One that is not trusted is only linked to.
func (x *call) traceOf(trusted bool) {
	t := &x.tracing
	t.parent, t.link, t.b3, t.at3, t.steps = [8]byte{}, telemetry.Trace{}, b3None, 0, t.steps[:0]
	x.ex.ToUp.Drop = dropped
	said, ok := telemetry.ParseTraceparent(x.req.Get("traceparent"))
	decided := ok
	if b := x.b3(); !ok && b.Decided || b.Trace.ID != [16]byte{} && !ok {
		said, decided = b.Trace, b.Decided
		ok = said.ID != [16]byte{}
	}
	if ok && !trusted {
		t.link, ok, decided = said, false, false
	}
	if ok {
		t.parent, x.trace = said.Span, said.Child()
	} else {
		sampled := said.Sampled && decided
		x.trace = telemetry.NewTrace()
		x.trace.Sampled = sampled
		x.ex.ToUp.Drop = droppedWithState
	}
	if !decided {
		x.on.Tracer.Begin(&x.trace)
	}
	x.traceID = ""
	x.appendTrace()
	if x.req.Form != http1.Authority {
		x.requestID()
	}
}

// b3 reads what Zipkin's libraries say of the trace.
func (x *call) b3() (b telemetry.B3) {
	var single, trace, span, sampled, flags []byte
	for i := range x.req.Fields {
		f := &x.req.Fields[i]
		if n := len(f.Name); n != 2 && (n < 10 || n > 12 || f.Name[1] != '-') {
			continue
		}
		switch {
		case is(f.Name, "b3"):
			single = f.Value
		case is(f.Name, "x-b3-traceid"):
			trace = f.Value
		case is(f.Name, "x-b3-spanid"):
			span = f.Value
		case is(f.Name, "x-b3-sampled"):
			sampled = f.Value
		case is(f.Name, "x-b3-flags"):
			flags = f.Value
		}
	}
	ok := false
	if single != nil {
		if b, ok = telemetry.ParseB3(single); ok {
			x.tracing.b3 = b3Single
			return b
		}
	}
	if trace != nil || sampled != nil || flags != nil {
		if b, ok = telemetry.ParseB3Fields(trace, span, sampled, flags); ok {
			x.tracing.b3 = b3Fields
		}
	}
	return b
}

// appendTrace tells the next of the trace.
func (x *call) appendTrace() {
	t := &x.tracing
	x.extra = append(x.extra, "Traceparent: "...)
	t.at = len(x.extra) + len("00-") + 2*len(x.trace.ID) + len("-")
	x.extra = x.trace.AppendTraceparent(x.extra)
	x.extra = append(x.extra, '\r', '\n')
	switch t.b3 {
	case b3Single:
		x.extra = append(x.extra, "B3: "...)
		t.at3 = len(x.extra) + 2*len(x.trace.ID) + len("-")
		x.extra = append(x.trace.AppendB3(x.extra), '\r', '\n')
	case b3Fields:
		t.at3 = len(x.extra) + len("X-B3-TraceId: ") + 2*len(x.trace.ID) + len("\r\nX-B3-SpanId: ")
		x.extra = x.trace.AppendB3Fields(x.extra)
	}
}

// kept says that the spans of the call are kept whatever becomes of it.
func (x *call) kept() bool { return x.trace.Sampled && x.on.Tracer != nil }

// clock is the time if the call's trace is kept.
func (x *call) clock() (t time.Time) {
	if x.kept() {
		t = time.Now()
	}
	return t
}

// did notes a part of the call that began when clock said.
func (x *call) did(name string, began time.Time, r *refusal) {
	if !began.IsZero() {
		x.tracing.steps = append(x.tracing.steps, step{name: name, kind: telemetry.Internal, start: began, end: time.Now(), failed: r != nil && !r.own})
	}
}

// goesTo begins a try, whose span is the parent of what the next one does.
func (x *call) goesTo() {
	if !x.kept() {
		return
	}
	t := &x.tracing
	s := step{name: "upstream", kind: telemetry.Client, id: x.trace.Child().Span, start: time.Now(), try: x.tries.n + 1}
	if x.tries.n > 0 {
		s.name = "retry"
	}
	hex.Encode(x.extra[t.at:], s.id[:])
	if t.at3 > 0 {
		hex.Encode(x.extra[t.at3:], s.id[:])
	}
	t.steps = append(t.steps, s)
}

// cameBack ends the try under way, if there is one.
func (x *call) cameBack() {
	if n := len(x.tracing.steps); n > 0 && x.kept() {
		if s := &x.tracing.steps[n-1]; s.try > 0 && s.end.IsZero() {
			s.end, s.status = time.Now(), x.res.Status
			s.failed = x.err != nil || x.tries.dropped || x.res.Status >= 500
		}
	}
}

// spans keeps the spans of a call that has ended, if its trace is kept, or if it
// went badly: then what is known is kept all the same.
func (x *call) spans(c *telemetry.Call) {
	tr := x.on.Tracer
	if tr == nil {
		return
	}
	failed := c.Code == 0 && !x.tunnel || c.Code >= 500 || c.Flag == "cut_off"
	denied := x.refused != nil && x.refused.decision != ""
	if !x.trace.Sampled && !failed && !denied && x.tries.n == 0 && (x.tunnel || !tr.Slow(c.Took)) {
		return
	}
	root := telemetry.Span{
		Trace: x.trace, Parent: x.tracing.parent, Link: x.tracing.link, Kind: telemetry.Client, Start: x.start, End: c.End, Failed: failed || denied,
		Name: "call", Attrs: x.attrs(c, denied),
	}
	if x.who != nil {
		root.Kind, root.Name = telemetry.Server, "serve"
	}
	if _, dst := x.series.Ends(); dst != "" {
		root.Name += " " + dst
	}
	out := append(make([]telemetry.Span, 0, 1+len(x.tracing.steps)), root)
	for i := range x.tracing.steps {
		out = append(out, x.span(&root, &x.tracing.steps[i]))
	}
	tr.Keep(out...)
}

func (x *call) span(root *telemetry.Span, s *step) telemetry.Span {
	child := root.Child(s.name, s.kind, s.start)
	if s.id != [8]byte{} {
		child.Trace.Span = s.id
	}
	if !s.end.IsZero() {
		child.End = s.end
	}
	child.Failed = s.failed
	if s.status > 0 {
		child.Attrs = append(child.Attrs, telemetry.Attr{Key: "http.response.status_code", N: int64(s.status)})
	}
	if s.try > 1 {
		child.Attrs = append(child.Attrs, telemetry.Attr{Key: "http.request.resend_count", N: int64(s.try - 1)})
	}
	if s.name == "policy" && x.grant.Valid() {
		child.Attrs = append(child.Attrs, telemetry.Attr{Key: "sallyport.rule", Text: strings.Clone(x.grant.Rule())})
	}
	return child
}

// attrs say what the call was. Neither its path nor anything else that a client
// has written is among them, but for the method.
func (x *call) attrs(c *telemetry.Call, denied bool) []telemetry.Attr {
	src, dst := x.series.Ends()
	out := []telemetry.Attr{
		{Key: "http.request.method", Text: strings.Clone(x.verb())}, {Key: "sallyport.reporter", Text: x.on.Reporter},
		{Key: "sallyport.src", Text: src}, {Key: "sallyport.dst", Text: dst},
	}
	if c.Code > 0 {
		out = append(out, telemetry.Attr{Key: "http.response.status_code", N: int64(c.Code)})
	}
	if x.tries.n > 0 {
		out = append(out, telemetry.Attr{Key: "sallyport.retries", N: int64(x.tries.n)})
	}
	add := func(key, text string) {
		if text != "" {
			out = append(out, telemetry.Attr{Key: key, Text: strings.Clone(text)})
		}
	}
	add("sallyport.flag", c.Flag)
	add("rpc.response.status_code", c.Status)
	if x.to != nil && x.to.route != nil {
		add("http.route", string(x.known.name)+"/"+x.to.route.Name)
	}
	if x.marked {
		add("sallyport.shadow", "true")
	}
	if denied {
		add("sallyport.decision_id", x.refused.decision)
	} else if x.grant.Valid() {
		add("sallyport.decision_id", x.grant.ID())
	}
	return out
}
