package nameserver

import (
	"strings"
	"time"

	"sallyport/internal/telemetry"
)

// What an answer is, by the work that it took.
const (
	isReady = "ready" // made before, for all who ask
	isMade  = "made"  // for this question
	isReal  = "real"  // has addresses that were looked up
)

// told counts an answer that was not ready, says how long it took, and may keep a
// span of it.
func (a *answerer) told(r Result, began time.Time) {
	end := time.Now()
	what := isMade
	if a.met != nil && a.met.real {
		what = isReal
	}
	a.names.counter(r).Inc()
	a.names.cfg.Metrics.NameTimes(what).Observe(end.Sub(began), 1)
	if a.names.cfg.Tracer != nil {
		a.span(a.met, r, what, began, end)
	}
}

// span keeps the span of an answer, if it is one of those that are kept. A
// question says of no trace that it is part of it, so each begins one. That of a
// refusal is kept by chance alone: whoever asks for ever new names would leave no
// room for the spans of others, and a record has it.
func (a *answerer) span(e *entry, r Result, what string, began, end time.Time) {
	tracer := a.names.cfg.Tracer
	t := telemetry.NewTrace()
	tracer.Begin(&t)
	if !t.Sampled && r != Failed && !tracer.Slow(end.Sub(began)) {
		return
	}
	s := telemetry.Span{
		Trace: t, Name: "question", Kind: telemetry.Server, Start: began, End: end, Failed: r == Failed,
		Attrs: []telemetry.Attr{
			{Key: "sallyport.reporter", Text: "nameserver"}, {Key: "sallyport.src", Text: strings.TrimPrefix(a.who.Path(), "/")},
			{Key: "sallyport.answer", Text: what}, {Key: "sallyport.result", Text: string(r)},
		},
	}
	if e != nil && (r == Allowed || r == Inside || r == Failed) { // a name that is refused may be a message
		s.Attrs = append(s.Attrs, telemetry.Attr{Key: "dns.question.name", Text: e.name})
	}
	if e != nil && e.rule != "" {
		s.Attrs = append(s.Attrs, telemetry.Attr{Key: "sallyport.rule", Text: e.rule})
	}
	tracer.Keep(s)
}
