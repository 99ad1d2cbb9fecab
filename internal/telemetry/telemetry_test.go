package telemetry

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

func scrape(t *testing.T, r *Registry) string {
	t.Helper()
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body, err := io.ReadAll(w.Result().Body)
	if err != nil || w.Code != 200 {
		t.Fatalf("scrape: %d %v %s", w.Code, err, body)
	}
	return string(body)
}

// use touches every handle once.
func use(r *Registry) {
	s := NewSignals(r, "inbound").Series("spiffe://mesh.test/web", "spiffe://mesh.test/payment", "charges")
	s.Begin()
	t := NewTrace()
	t.Sampled = true
	s.Observe(&Call{Code: 200, Took: 3 * time.Millisecond, First: time.Millisecond, Up: 10, Down: 20, Trace: &t, End: time.Unix(30, 0)})
	s.Observe(&Call{Code: 700, Took: time.Second, Flag: "cut_off"})
	s.Observe(&Call{Code: 200, Status: "14"})
	s.End()
	tunnel := NewSignals(r, "gateway").SeriesOf(ProtoTCP, "spiffe://mesh.test/web", "api.stripe.test", "")
	tunnel.Begin()
	tunnel.End()
	r.Saturation("inbound", "calls", func() float64 { return 0.25 })
	r.Retries("spiffe://mesh.test/payment", RetryStatus, true).Inc()
	r.Retries("spiffe://mesh.test/payment", RetryHedge, false).Inc()
	r.Ejections("spiffe://mesh.test/payment", "connect").Inc()
	r.Candidate("newly_denied", "pay-1").Inc()
	r.Shadow("next", "sent").Inc()
	r.Spans("sent").Inc()
	r.CertExpiry("svid").Set(time.Unix(100, 0))
	r.CertExpiry("none").Set(time.Time{})
	r.PolicyRevision().Set(7)
	r.PolicyRejected().Inc()
	r.Authz("pay-1", "allow").Inc()
	r.AuthzMismatch().Inc()
	r.AuditRecords("decision").Inc()
	r.TLSFailures("inbound", "expired").Inc()
	r.UpstreamConnects("payment", "ok").Inc()
	r.EgressTunnels("billing").Add(1)
	up, down := r.EgressBytes("billing", "api.stripe.test")
	up.Add(5)
	down.Add(6)
	r.Reloads("policy", "ok").Inc()
	r.RolloutSteps("take_back").Inc()
	r.DeliverySteps("roll_back").Inc()
	r.Rotations("ok").Inc()
	r.FederationFetches("other.example", "ok").Inc()
	r.TokenKeyFetches("https://ci.example", "ok").Inc()
	r.FederationRefreshed("other.example").Set(9)
	r.NameTimes("ready").Observe(20*time.Millisecond, 3)
	r.MetricsExports("sent").Inc()
}

func TestMetricsAreNamedAndCounted(t *testing.T) {
	r := NewRegistry()
	r.Home("mesh.test").now = func() time.Time { return time.Unix(40, 0) }
	use(r)
	got := scrape(t, r)
	for _, want := range []string{
		`sallyport_requests_total{code="200",dst="payment",flag="",grpc="",proto="http",reporter="inbound",route="charges",src="web",tls="mutual"} 1`,
		`sallyport_requests_total{code="none",dst="payment",flag="cut_off",grpc="",proto="http",reporter="inbound",route="charges",src="web",tls="mutual"} 1`,
		`sallyport_requests_total{code="200",dst="payment",flag="",grpc="14",proto="grpc",reporter="inbound",route="charges",src="web",tls="mutual"} 1`,
		`sallyport_request_ttfb_seconds_count{dst="payment",route="charges"} 1`,
		`sallyport_tcp_opened_total{dst="api.stripe.test",reporter="gateway",src="web"} 1`,
		`sallyport_tcp_closed_total{dst="api.stripe.test",reporter="gateway",src="web"} 1`,
		`sallyport_saturation{reporter="inbound",resource="calls"} 0.25`,
		`sallyport_saturation{reporter="process",resource="cpu"}`,
		`sallyport_saturation{reporter="process",resource="fds"}`,
		`sallyport_retries_total{budget="granted",dst="payment",reason="status"} 1`,
		`sallyport_retries_total{budget="spent",dst="payment",reason="hedge"} 1`,
		`sallyport_ejections_total{dst="payment",reason="connect"} 1`,
		`sallyport_policy_candidate_total{difference="newly_denied",rule="pay-1"} 1`,
		`sallyport_shadow_total{outcome="sent",shadow="next"} 1`,
		`sallyport_series_limit 2000`,
		`sallyport_series{metric="sallyport_retries_total"} 2`,
		`sallyport_request_duration_seconds_bucket{class="2xx",dst="payment",reporter="inbound",route="charges",src="web",le="0.005"} 2`,
		`sallyport_request_bytes_total{dst="payment",reporter="inbound",route="charges",src="web"} 10`,
		`sallyport_response_bytes_total{dst="payment",reporter="inbound",route="charges",src="web"} 20`,
		`sallyport_inflight{dst="payment",reporter="inbound"} 0`,
		`sallyport_cert_expiry_seconds{cert="svid"} 60`,
		`sallyport_policy_revision 7`,
		`sallyport_policy_rejected_total 1`,
		`sallyport_authz_total{effect="allow",rule="pay-1"} 1`,
		`sallyport_authz_mismatch_total 1`,
		`sallyport_audit_records_total{kind="decision"} 1`,
		`sallyport_tls_failures_total{reason="expired",reporter="inbound"} 1`,
		`sallyport_upstream_connects_total{dst="payment",result="ok"} 1`,
		`sallyport_egress_tunnels{src="billing"} 1`,
		`sallyport_egress_bytes_total{direction="up",dst="api.stripe.test",src="billing"} 5`,
		`sallyport_egress_bytes_total{direction="down",dst="api.stripe.test",src="billing"} 6`,
		`sallyport_policy_rollout_steps_total{step="take_back"} 1`,
		`sallyport_rollout_steps_total{step="roll_back"} 1`,
		`sallyport_reloads_total{result="ok",what="policy"} 1`,
		`sallyport_svid_rotations_total{result="ok"} 1`,
		`sallyport_federation_fetches_total{result="ok",trust_domain="other.example"} 1`,
		`sallyport_token_key_fetches_total{issuer="https://ci.example",result="ok"} 1`,
		`sallyport_federation_refreshed_timestamp_seconds{trust_domain="other.example"} 9`,
		`sallyport_dns_duration_seconds_bucket{answer="ready",le="0.025"} 3`,
		`sallyport_dns_duration_seconds_sum{answer="ready"} 0.06`,
		`sallyport_metrics_exports_total{result="sent"} 1`,
		`go_goroutines`, `process_open_fds`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("missing: %s", want)
		}
	}
	if strings.Contains(got, `cert="none"`) {
		t.Error("a certificate that is not there has an expiry")
	}
}

func TestMetricsPassPromlint(t *testing.T) {
	r := NewRegistry()
	use(r)
	problems, err := promlint.New(strings.NewReader(scrape(t, r))).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestNilHandlesCountNothing(t *testing.T) {
	use(nil)
	var e *Edges
	e.Add("a", "b", "http", Allowed, true, time.Now(), NoTime)
	e.Restore(e.Flush())
	if w := httptest.NewRecorder(); true {
		(*Registry)(nil).Handler().ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
		if w.Code != 404 {
			t.Errorf("got %d", w.Code)
		}
	}
}

func TestSeriesAreCapped(t *testing.T) {
	r := NewRegistry()
	s := NewSignals(r, "inbound")
	const flood = maxSeries + 500
	for i := range flood {
		s.Series("web", "payment", fmt.Sprint("route-", i)).Observe(&Call{Code: 200, Took: time.Millisecond, Up: 1, Down: 1})
		r.Authz(fmt.Sprint("rule-", i), "allow").Inc()
	}
	got := scrape(t, r)
	for _, want := range []string{
		`sallyport_requests_total{code="200",dst="other",flag="",grpc="",proto="http",reporter="inbound",route="other",src="other",tls="mutual"} 500`,
		`sallyport_authz_total{effect="allow",rule="other"} 500`,
		`sallyport_series_capped_total{metric="sallyport_authz_total"} 500`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("missing: %s", want)
		}
	}
	if n := strings.Count(got, "\nsallyport_requests_total{"); n > maxSeries+1 {
		t.Errorf("%d series, want at most %d", n, maxSeries+1)
	}
}

func TestCodesAreCappedToo(t *testing.T) {
	r := NewRegistry()
	s := NewSignals(r, "inbound")
	for i := range 20 {
		for code := range 700 {
			s.Series("web", "payment", fmt.Sprint("route-", i)).Observe(&Call{Code: code})
		}
	}
	got := scrape(t, r)
	if n := strings.Count(got, "\nsallyport_requests_total{"); n > maxSeries+501 {
		t.Errorf("%d series, want at most %d", n, maxSeries+501)
	}
	if !strings.Contains(got, `sallyport_series_capped_total{metric="sallyport_requests_total"}`) {
		t.Error("the cap does not show")
	}
}

func TestObserveAllocatesNothing(t *testing.T) {
	r := NewRegistry()
	x := NewSignals(r, "inbound").Series("web", "payment", "charges")
	e := NewEdges()
	now := time.Now()
	kept := NewTrace()
	kept.Sampled = true
	var buf [64]byte
	header := NewTrace().AppendTraceparent(nil)
	call := func() {
		x.Begin()
		x.Observe(&Call{Code: 200, Took: time.Millisecond, First: time.Microsecond, Up: 100, Down: 1000, Trace: &kept, End: now})
		x.End()
		r.Authz("pay-1", "allow").Inc()
		e.Add("web", "payment", "http", Allowed, true, now, 3)
		tr, _ := ParseTraceparent(header)
		tr.Child().AppendTraceparent(buf[:0])
	}
	call()
	if n := testing.AllocsPerRun(100, call); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestConcurrentUse(t *testing.T) {
	r := NewRegistry()
	s := NewSignals(r, "inbound")
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 500 {
				s.Series("a", "b", fmt.Sprint(i%7)).Observe(&Call{Code: 200 + (g+i)%5, Took: time.Millisecond, Up: 1, Down: 1})
			}
		})
	}
	wg.Wait()
	var sum int
	for line := range strings.SplitSeq(scrape(t, r), "\n") {
		if strings.HasPrefix(line, "sallyport_requests_total{") {
			var n int
			fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &n)
			sum += n
		}
	}
	if sum != 8*500 {
		t.Errorf("counted %d of %d calls", sum, 8*500)
	}
}

const goodTrace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

func TestAppendHex(t *testing.T) {
	b := make([]byte, 256)
	for i := range b {
		b[i] = byte(i)
	}
	if got, want := string(appendHex([]byte("-"), b)), "-"+hex.EncodeToString(b); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestParseTraceparent(t *testing.T) {
	for name, tc := range map[string]struct {
		in string
		ok bool
	}{
		"a header of the specification":           {goodTrace, true},
		"not sampled":                             {goodTrace[:53] + "00", true},
		"unknown flags":                           {goodTrace[:53] + "ff", true},
		"a higher version":                        {"01" + goodTrace[2:], true},
		"a higher version with more fields":       {"cc" + goodTrace[2:] + "-what-the-future", true},
		"a higher version with a dash at the end": {"cc" + goodTrace[2:] + "-", true},
		"a higher version with more and no dash":  {"cc" + goodTrace[2:] + ".x", false},
		"version 00 with more fields":             {goodTrace + "-01", false},
		"version ff":                              {"ff" + goodTrace[2:], false},
		"a version in upper case":                 {"0A" + goodTrace[2:], false},
		"an ID in upper case":                     {strings.Replace(goodTrace, "4bf9", "4BF9", 1), false},
		"flags in upper case":                     {goodTrace[:53] + "0A", false},
		"a trace of zeros":                        {"00-00000000000000000000000000000000-00f067aa0ba902b7-01", false},
		"a span of zeros":                         {"00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", false},
		"too short":                               {goodTrace[:54], false},
		"empty":                                   {"", false},
		"a blank before it":                       {" " + goodTrace, false},
		"a blank after it":                        {goodTrace + " ", false},
		"underscores for dashes":                  {strings.ReplaceAll(goodTrace, "-", "_"), false},
	} {
		tr, ok := ParseTraceparent([]byte(tc.in))
		if ok != tc.ok {
			t.Errorf("%s: ok %v, want %v", name, ok, tc.ok)
		}
		if !ok && tr != (Trace{}) {
			t.Errorf("%s: a refused header left %v", name, tr)
		}
	}
	tr, _ := ParseTraceparent([]byte(goodTrace))
	if got := string(tr.AppendTraceparent(nil)); got != goodTrace {
		t.Errorf("got %s", got)
	}
	if child := tr.Child(); child.ID != tr.ID || child.Span == tr.Span || !child.Sampled {
		t.Errorf("child %v of %v", child, tr)
	}
	if tr.String() != goodTrace[3:35] || (Trace{}).String() != "" || string(tr.AppendID(nil)) != tr.String() {
		t.Error("wrong text of the ID")
	}
	if (Trace{}).Child() == (Trace{}) {
		t.Error("the child of no trace is none")
	}
}

func FuzzParseTraceparent(f *testing.F) {
	f.Add([]byte(goodTrace))
	f.Add([]byte("cc" + goodTrace[2:] + "-x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		tr, ok := ParseTraceparent(b)
		if !ok {
			return
		}
		out := tr.AppendTraceparent(nil)
		if !bytes.Equal(out[2:53], b[2:53]) {
			t.Errorf("%q came back as %q", b, out)
		}
		if back, ok := ParseTraceparent(out); !ok || back != tr {
			t.Errorf("%q does not parse again", out)
		}
	})
}

func TestEdges(t *testing.T) {
	e := NewEdges()
	t1, t2 := time.Unix(1, 0), time.Unix(2, 0)
	e.Add("web", "payment", "http", Allowed, true, t2, 2)
	e.Add("web", "payment", "http", Errored, true, t1, 0)
	e.Add("bad", "payment", "http", Denied, false, t1, NoTime)
	e.Add("bad", "payment", "http", Allowed, true, t1, NoTime)
	want := []Edge{
		{Src: "bad", Dst: "payment", Proto: "http", Allowed: 1, Denied: 1, First: t1, Last: t1},
		{Src: "web", Dst: "payment", Proto: "http", Allowed: 2, Errors: 1, MTLS: true, First: t1, Last: t2, Took: []uint32{1, 0, 1}},
	}
	got := e.Flush()
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if left := e.Flush(); len(left) != 0 {
		t.Errorf("counted twice: %v", left)
	}
	e.Add("web", "payment", "http", Allowed, false, time.Unix(3, 0), NoTime)
	e.Restore(got)
	want[1].Allowed, want[1].MTLS, want[1].Last = 3, false, time.Unix(3, 0)
	if d := cmp.Diff(want, e.Flush()); d != "" {
		t.Error(d)
	}
}

func TestOneSourceLeavesRoomForOthers(t *testing.T) {
	e := NewEdges()
	for i := range 2 * maxEdges {
		e.Add("bad", fmt.Sprintf("host:r%d.example", i), ProtoTCP, Allowed, true, time.Unix(1, 0), NoTime)
	}
	e.Add("good", "host:api.example", ProtoTCP, Allowed, true, time.Unix(1, 0), NoTime)
	edges := e.Flush()
	rest := edges[0]
	for _, x := range edges {
		if x.Dst == OtherHost {
			rest = x
		}
	}
	if last := edges[len(edges)-1]; len(edges) != maxHostsOfSource+2 || last.Src != "good" || rest.Src != "bad" || rest.Allowed != 2*maxEdges-maxHostsOfSource {
		t.Errorf("%d edges, the rest %+v, the last %+v", len(edges), rest, last)
	}
}

func TestEdgesAreCapped(t *testing.T) {
	e := NewEdges()
	for i := range maxEdges + 100 {
		e.Add(fmt.Sprint(i), "payment", "http", Denied, false, time.Unix(1, 0), NoTime)
	}
	edges := e.Flush()
	if len(edges) != maxEdges+1 {
		t.Errorf("%d edges", len(edges))
	}
	for _, x := range edges {
		if x.Src == Other && x.Denied != 100 {
			t.Errorf("other has %d calls, want 100", x.Denied)
		}
	}
}

func BenchmarkObserve(b *testing.B) {
	x := NewSignals(NewRegistry(), "inbound").Series("web", "payment", "charges")
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			x.Observe(&Call{Code: 200, Took: time.Millisecond, First: time.Millisecond, Up: 100, Down: 1000})
		}
	})
}

func BenchmarkAuthz(b *testing.B) {
	r := NewRegistry()
	b.ReportAllocs()
	for b.Loop() {
		r.Authz("pay-1", "allow").Inc()
	}
}

func BenchmarkTrace(b *testing.B) {
	header := []byte(goodTrace)
	buf := make([]byte, 0, 64)
	b.ReportAllocs()
	for b.Loop() {
		t, _ := ParseTraceparent(header)
		buf = t.Child().AppendTraceparent(buf[:0])
	}
}
