package telemetry

import (
	"context"
	"encoding/binary"
	"math"
	"sync"
	"time"
)

// A Kind says which part a span has in a call, as OpenTelemetry numbers them.
type Kind uint8

// The kinds of spans.
const (
	Internal Kind = 1
	Server   Kind = 2
	Client   Kind = 3
)

// A Span is a piece of a call that took time.
type Span struct {
	// Trace names the trace and the span, Parent the span around it, if any.
	Trace  Trace
	Parent [8]byte
	// Link is a trace that this one goes on from, without having been believed.
	Link Trace
	Name string
	Kind Kind
	// Start and End are when; Failed says that it came to nothing.
	Start, End time.Time
	Failed     bool
	Attrs      []Attr
}

// An Attr is something that is said of a span: Text, or N when Text is empty.
type Attr struct {
	Key, Text string
	N         int64
}

// Child makes a span within s. It ends when s does, until somebody says when.
func (s *Span) Child(name string, kind Kind, start time.Time) Span {
	return Span{Trace: s.Trace.Child(), Parent: s.Trace.Span, Name: name, Kind: kind, Start: start, End: s.End}
}

// TracerConfig says which traces are kept.
type TracerConfig struct {
	// Sample is the share of traces begun here that are kept. 0: none.
	Sample float64
	// Slow is how long a call takes at least that is kept in any case. Default
	// 1 s.
	Slow time.Duration
	// Queue is how many spans wait for Next. Default 4096.
	Queue int
	// PerSecond bounds how many are kept: callers say of a trace that it is to be.
	// Default 1000.
	PerSecond int
	// Metrics counts the spans that are not kept, and shows how full the queue is.
	// Optional.
	Metrics *Registry
}

// A Tracer decides which traces are kept, and has their spans until they are sent
// away. It starts no goroutine. A nil Tracer keeps nothing.
type Tracer struct {
	below   uint64 // traces whose number is below are kept
	slow    time.Duration
	spans   chan *Span
	dropped *Counter

	mu     sync.Mutex // guards the fields below
	rate   float64
	tokens float64
	at     time.Time
}

// NewTracer returns a tracer.
func NewTracer(c TracerConfig) *Tracer {
	if c.Slow == 0 {
		c.Slow = time.Second
	}
	if c.Queue == 0 {
		c.Queue = 4096
	}
	if c.PerSecond == 0 {
		c.PerSecond = 1000
	}
	t := &Tracer{slow: c.Slow, spans: make(chan *Span, c.Queue), dropped: c.Metrics.Spans("dropped"), rate: float64(c.PerSecond), tokens: float64(c.PerSecond)}
	c.Metrics.Saturation("traces", "queue", func() float64 { return float64(len(t.spans)) / float64(cap(t.spans)) })
	if share := min(max(c.Sample, 0), 1); share == 1 {
		t.below = math.MaxUint64
	} else {
		t.below = uint64(math.Ldexp(share, 64))
	}
	return t
}

// Begin decides about a trace that begins here. Its ID is random, so that nobody
// has to throw dice again.
func (t *Tracer) Begin(x *Trace) {
	if t != nil {
		x.Sampled = binary.BigEndian.Uint64(x.ID[8:]) < t.below || t.below == math.MaxUint64
	}
}

// Slow says whether a call that took so long is kept in any case.
func (t *Tracer) Slow(took time.Duration) bool { return t != nil && took >= t.slow }

// Keep takes the spans of a call, all or none. It never waits.
func (t *Tracer) Keep(spans ...Span) {
	if t == nil || len(spans) == 0 {
		return
	}
	if !t.room(len(spans)) {
		t.dropped.Add(int64(len(spans)))
		return
	}
	for i := range spans {
		select {
		case t.spans <- &spans[i]:
		default:
			t.dropped.Inc()
		}
	}
}

// room says whether n more spans may be kept now.
func (t *Tracer) room(n int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if !t.at.IsZero() {
		t.tokens = min(t.rate, t.tokens+now.Sub(t.at).Seconds()*t.rate)
	}
	if t.at = now; t.tokens < float64(n) || len(t.spans)+n > cap(t.spans) {
		return false
	}
	t.tokens -= float64(n)
	return true
}

// Next waits for a span, and takes what else comes within wait, at most limit. It
// returns what there is when ctx ends.
func (t *Tracer) Next(ctx context.Context, limit int, wait time.Duration) (batch []*Span) {
	select {
	case s := <-t.spans:
		batch = append(batch, s)
	case <-ctx.Done():
		return t.rest(limit)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for len(batch) < limit {
		select {
		case s := <-t.spans:
			batch = append(batch, s)
		case <-timer.C:
			return batch
		case <-ctx.Done():
			return append(batch, t.rest(limit-len(batch))...)
		}
	}
	return batch
}

// rest takes what is there.
func (t *Tracer) rest(limit int) (batch []*Span) {
	for len(batch) < limit {
		select {
		case s := <-t.spans:
			batch = append(batch, s)
		default:
			return batch
		}
	}
	return batch
}
