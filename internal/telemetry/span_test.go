package telemetry

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const (
	b3Trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	b3Span  = "00f067aa0ba902b7"
)

func TestParseB3(t *testing.T) {
	for name, tc := range map[string]struct {
		in               string
		ok, kept, stated bool
	}{
		"kept":                     {b3Trace + "-" + b3Span + "-1", true, true, true},
		"for debugging":            {b3Trace + "-" + b3Span + "-d", true, true, true},
		"not kept":                 {b3Trace + "-" + b3Span + "-0", true, false, true},
		"undecided":                {b3Trace + "-" + b3Span, true, false, false},
		"with a parent":            {b3Trace + "-" + b3Span + "-1-" + b3Span, true, true, true},
		"half an ID":               {b3Trace[:16] + "-" + b3Span + "-1", true, true, true},
		"a state alone":            {"0", true, false, true},
		"a word for a state":       {"x", false, false, false},
		"upper case":               {strings.ToUpper(b3Trace) + "-" + b3Span + "-1", false, false, false},
		"a trace of zeros":         {strings.Repeat("0", 32) + "-" + b3Span + "-1", false, false, false},
		"a span of zeros":          {b3Trace + "-0000000000000000-1", false, false, false},
		"a state of two letters":   {b3Trace + "-" + b3Span + "-11", false, false, false},
		"a parent that is cut off": {b3Trace + "-" + b3Span + "-1-" + b3Span[1:], false, false, false},
		"cut off":                  {b3Trace + "-" + b3Span[1:], false, false, false},
		"nothing":                  {"", false, false, false},
	} {
		b, ok := ParseB3([]byte(tc.in))
		if ok != tc.ok || b.Trace.Sampled != tc.kept || b.Decided != tc.stated {
			t.Errorf("%s: ok %v, kept %v, decided %v", name, ok, b.Trace.Sampled, b.Decided)
		}
		if !ok && b != (B3{}) {
			t.Errorf("%s: what was refused left %v", name, b)
		}
	}
	b, ok := ParseB3Fields([]byte(b3Trace), []byte(b3Span), []byte("true"), nil)
	if !ok || !b.Trace.Sampled || !b.Decided {
		t.Errorf("fields: %v %v", b, ok)
	}
	if got := string(b.Trace.AppendB3(nil)); got != b3Trace+"-"+b3Span+"-1" {
		t.Errorf("got %s", got)
	}
	if got := string(b.Trace.AppendB3Fields(nil)); got != "X-B3-TraceId: "+b3Trace+"\r\nX-B3-SpanId: "+b3Span+"\r\nX-B3-Sampled: 1\r\n" {
		t.Errorf("got %q", got)
	}
	if _, ok := ParseB3Fields([]byte(b3Trace), nil, []byte("1"), nil); ok {
		t.Error("a trace without a span is taken")
	}
	if b, ok := ParseB3Fields(nil, nil, nil, []byte("1")); !ok || !b.Trace.Sampled {
		t.Error("the flag for debugging alone is not taken")
	}
}

func FuzzParseB3(f *testing.F) {
	f.Add([]byte(b3Trace + "-" + b3Span + "-1-" + b3Span))
	f.Add([]byte("0"))
	f.Fuzz(func(t *testing.T, in []byte) {
		b, ok := ParseB3(in)
		if !ok || b.Trace.ID == [16]byte{} {
			return
		}
		out := b.Trace.AppendB3(nil)
		if back, ok := ParseB3(out); !ok || back.Trace != b.Trace {
			t.Errorf("%q came back as %q", in, out)
		}
	})
}

func TestTheShareOfTracesIsKept(t *testing.T) {
	for _, tc := range []struct{ share, least, most float64 }{{0, 0, 0}, {0.01, 0.005, 0.015}, {0.5, 0.47, 0.53}, {1, 1, 1}} {
		tr := NewTracer(TracerConfig{Sample: tc.share})
		n, kept := 20_000, 0
		for range n {
			x := NewTrace()
			if tr.Begin(&x); x.Sampled {
				kept++
			}
		}
		if share := float64(kept) / float64(n); share < tc.least || share > tc.most {
			t.Errorf("%g of traces are kept, want %g", share, tc.share)
		}
	}
	x := NewTrace()
	if (*Tracer)(nil).Begin(&x); x.Sampled || (*Tracer)(nil).Slow(time.Hour) {
		t.Error("without a tracer traces are kept")
	}
	(*Tracer)(nil).Keep(Span{})
}

func TestSpansAreBoundedAndBatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRegistry()
		tr := NewTracer(TracerConfig{Queue: 10, PerSecond: 20, Metrics: r})
		for range 6 {
			tr.Keep(Span{Name: "a"}, Span{Name: "b"}) // the last one finds no room
		}
		if got := tr.Next(t.Context(), 4, time.Second); len(got) != 4 {
			t.Errorf("a batch of %d", len(got))
		}
		begun := time.Now()
		if got := tr.Next(t.Context(), 100, time.Second); len(got) != 6 || time.Since(begun) != time.Second {
			t.Errorf("a batch of %d after %s", len(got), time.Since(begun))
		}
		tr.Keep(make([]Span, 21)...) // more than a second may have
		if got := scrape(t, r); !strings.Contains(got, `sallyport_trace_spans_total{result="dropped"} 23`) {
			t.Error("what was dropped is not counted")
		}
		tr.Keep(Span{Name: "last"})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		n := 0
		for range 3 {
			n += len(tr.Next(ctx, 10, time.Second))
		}
		if n != 1 {
			t.Errorf("%d spans at the end, want 1", n)
		}
	})
}
