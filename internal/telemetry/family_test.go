package telemetry

import (
	"fmt"
	"io"
	"math"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
)

func TestIdleSeriesLeaveAndComeBack(t *testing.T) {
	r := NewRegistry()
	now := time.Unix(1000, 0)
	r.now = func() time.Time { return now }
	held := r.Retries("payment", RetryStatus, true)
	held.Add(3)
	r.Retries("billing", RetryStatus, true).Inc()
	r.PolicyRevision().Set(4)
	x := NewSignals(r, "inbound").Series("web", "payment", "")
	x.Begin()
	const payment, billing = `sallyport_retries_total{budget="granted",dst="payment",reason="status"} `, `sallyport_retries_total{budget="granted",dst="billing",reason="status"} `
	if got := scrape(t, r); !strings.Contains(got, payment+"3") || !strings.Contains(got, billing+"1") {
		t.Fatal("what was counted does not show")
	}
	now = now.Add(idleAfter)
	got := scrape(t, r)
	if strings.Contains(got, payment) || strings.Contains(got, billing) {
		t.Error("idle series are still shown")
	}
	if !strings.Contains(got, "sallyport_policy_revision 4") || !strings.Contains(got, `sallyport_inflight{dst="payment",reporter="inbound"} 1`) {
		t.Error("what stands at a value has left")
	}
	held.Inc()
	if got := scrape(t, r); !strings.Contains(got, payment+"4") {
		t.Error("a series whose handle is used again does not come back with its count")
	}
	runtime.GC()
	if got := scrape(t, r); strings.Contains(got, billing) {
		t.Error("a series that nobody holds is still there")
	}
	if r.Retries("payment", RetryStatus, true) != held {
		t.Error("the same labels have two handles")
	}
	runtime.KeepAlive(held)
	x.End()
}

func TestAFullMetricHasRoomAgain(t *testing.T) {
	r := NewRegistry()
	now := time.Unix(1000, 0)
	r.now = func() time.Time { return now }
	for i := range maxSeries {
		r.Authz(fmt.Sprint("rule-", i), "allow").Inc()
	}
	scrape(t, r)
	now = now.Add(idleAfter)
	r.Authz("new", "allow").Inc()
	if got := scrape(t, r); !strings.Contains(got, `sallyport_authz_total{effect="allow",rule="new"} 1`) {
		t.Error("no room after all was idle")
	}
}

func TestServiceOfAnIdentity(t *testing.T) {
	r := NewRegistry().Home("corp.example")
	for id, want := range map[string]string{
		"spiffe://corp.example/payment":        "payment",
		"spiffe://corp.example/ns/prod/sa/web": "ns/prod/sa/web",
		"spiffe://other.example/payment":       "other.example/payment",
		"spiffe://corp.example":                "corp.example",
		"gateway":                              "gateway",
		"":                                     "",
	} {
		if got := r.service(id); got != want {
			t.Errorf("%q is called %q, want %q", id, got, want)
		}
	}
}

// Every duration must be in the native bucket whose bounds hold it, and in the
// classic one.
func TestHistogramBuckets(t *testing.T) {
	for d := time.Duration(0); d < 200*time.Hour; d = d*13/11 + 7 {
		var h Histogram
		h.observe(d, nil, time.Time{})
		m := &dto.Metric{}
		h.write(m, time.Time{})
		out := m.GetHistogram()
		if out.GetSampleCount() != 1 || out.GetSampleSum() != d.Seconds() {
			t.Fatalf("%s: count %d, sum %g", d, out.GetSampleCount(), out.GetSampleSum())
		}
		for _, b := range out.Bucket {
			if in := d.Seconds() <= b.GetUpperBound(); in != (b.GetCumulativeCount() == 1) {
				t.Fatalf("%s: bucket to %g has %d", d, b.GetUpperBound(), b.GetCumulativeCount())
			}
		}
		if out.GetZeroCount() == 1 {
			if d.Seconds() > out.GetZeroThreshold() {
				t.Fatalf("%s is in the bucket of zero", d)
			}
			continue
		}
		k := float64(out.PositiveSpan[0].GetOffset())
		low, high := math.Exp2((k-1)/perOctave), math.Exp2(k/perOctave)
		if s := d.Seconds(); (s <= low || s > high) && s < math.Exp2(most) {
			t.Fatalf("%s is in bucket %g: over %g, up to %g", d, k, low, high)
		}
	}
}

func TestHistogramSpans(t *testing.T) {
	var h Histogram
	for range 3 {
		h.observe(time.Second, nil, time.Time{}) // bucket 0
	}
	h.observe(1050*time.Millisecond, nil, time.Time{}) // bucket 1
	h.observe(4*time.Second, nil, time.Time{})         // bucket 16
	m := &dto.Metric{}
	h.write(m, time.Time{})
	out := m.GetHistogram()
	got := ""
	for _, s := range out.PositiveSpan {
		got += fmt.Sprintf("%d+%d ", s.GetOffset(), s.GetLength())
	}
	if got += fmt.Sprint(out.PositiveDelta); got != "0+2 14+1 [3 -2 0]" {
		t.Errorf("spans and differences are %s", got)
	}
}

func TestExemplarsAreOfKeptTraces(t *testing.T) {
	r := NewRegistry()
	use(r)
	q := httptest.NewRequest("GET", "/metrics", nil)
	q.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, q)
	body, err := io.ReadAll(w.Result().Body)
	if err != nil || !strings.Contains(string(body), `# {trace_id="`) || !strings.HasSuffix(string(body), "# EOF\n") {
		t.Errorf("no exemplar in OpenMetrics: %v\n%.2000s", err, body)
	}
}

func BenchmarkHistogram(b *testing.B) {
	var h Histogram
	b.ReportAllocs()
	for b.Loop() {
		h.observe(3*time.Millisecond, nil, time.Time{})
	}
}
