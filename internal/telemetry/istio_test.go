package telemetry

import (
	"os"
	"strings"
	"testing"
	"time"
)

// What is shown under Istio's names is what is counted under ours, without the
// routes.
func TestIstioNamesSayTheSame(t *testing.T) {
	r := NewRegistry().Home("mesh.test")
	r.IstioNames()
	const web, pay = "spiffe://mesh.test/ns/shop/sa/web", "spiffe://mesh.test/ns/shop/sa/payment"
	in, out := NewSignals(r, "inbound"), NewSignals(r, "outbound")
	for _, route := range []string{"charges", "refunds"} {
		in.Series(web, pay, route).Observe(&Call{Code: 200, Took: 3 * time.Millisecond, Up: 10, Down: 20})
	}
	out.Series(web, pay, "charges").Observe(&Call{Code: 503, Flag: "circuit_open", Took: time.Minute})
	in.Series("spiffe://other.example/ns/x/sa/y", pay, "").Observe(&Call{Code: 200, Status: "14", Took: time.Millisecond})
	NewSignals(r, "issuer").SeriesOf(ProtoGRPC, "", "issuer", "/a/b").Observe(&Call{Code: 200})
	s := NewSignals(r, "gateway").SeriesOf(ProtoTCP, web, "api.stripe.test", "")
	s.Begin()
	s.Observe(&Call{Up: 5, Down: 6})
	s.End()
	got := scrape(t, r)
	const (
		ends   = `destination_canonical_service="payment",destination_principal="spiffe://mesh.test/ns/shop/sa/payment",destination_service="payment.shop",destination_service_name="payment",destination_service_namespace="shop",destination_workload="payment",destination_workload_namespace="shop"`
		from   = `source_canonical_service="web",source_principal="spiffe://mesh.test/ns/shop/sa/web",source_workload="web",source_workload_namespace="shop"`
		safe   = `connection_security_policy="mutual_tls",`
		stripe = safe + `destination_canonical_service="api.stripe.test",destination_principal="unknown",destination_service="api.stripe.test",destination_service_name="api.stripe.test",destination_service_namespace="unknown",destination_workload="api.stripe.test",destination_workload_namespace="unknown",reporter="source",request_protocol="tcp",`
	)
	for _, want := range []string{
		`istio_requests_total{` + safe + ends + `,grpc_response_status="",reporter="destination",request_protocol="http",response_code="200",response_flags="-",` + from + `} 2`,
		`istio_requests_total{` + safe + ends + `,grpc_response_status="",reporter="source",request_protocol="http",response_code="503",response_flags="UO",` + from + `} 1`,
		`grpc_response_status="14",reporter="destination",request_protocol="grpc",response_code="200",response_flags="-",source_canonical_service="y",source_principal="spiffe://other.example/ns/x/sa/y",source_workload="y",source_workload_namespace="x"} 1`,
		`istio_request_duration_milliseconds_bucket{` + safe + ends + `,reporter="destination",request_protocol="http",` + from + `,le="5"} 2`,
		`istio_request_duration_milliseconds_sum{` + safe + ends + `,reporter="destination",request_protocol="http",` + from + `} 6`,
		`istio_request_duration_milliseconds_bucket{` + safe + ends + `,reporter="source",request_protocol="http",` + from + `,le="10000"} 0`,
		`istio_request_duration_milliseconds_count{` + safe + ends + `,reporter="source",request_protocol="http",` + from + `} 1`,
		`istio_request_bytes_sum{` + safe + ends + `,reporter="destination",request_protocol="http",` + from + `} 20`,
		`istio_response_bytes_count{` + safe + ends + `,reporter="destination",request_protocol="http",` + from + `} 2`,
		`istio_tcp_sent_bytes_total{` + stripe + from + `} 6`,
		`istio_tcp_received_bytes_total{` + stripe + from + `} 5`,
		`istio_tcp_connections_opened_total{` + stripe + from + `} 1`,
		`istio_tcp_connections_closed_total{` + stripe + from + `} 1`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("missing: %s", want)
		}
	}
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(got) {
		if strings.Contains(line, `"issuer"`) && strings.HasPrefix(line, "istio_") {
			t.Errorf("a call to the issuer is none of a workload: %s", line)
		}
		name, typ, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "# TYPE "), " ")
		if strings.HasPrefix(line, "# TYPE istio_") && !strings.Contains(string(page), "| `"+name+"` | "+typ+" |") {
			t.Errorf("docs/metrics.md does not name %s, a %s", name, typ)
		}
	}
	if t.Failed() {
		for line := range strings.Lines(got) {
			if strings.HasPrefix(line, "istio_") {
				t.Log(line)
			}
		}
	}
}

// Calls that differ in what Istio has one word for are one series: two of the same
// labels fail the whole scrape.
func TestIstioNamesNoSeriesTwice(t *testing.T) {
	r := NewRegistry().Home("mesh.test")
	r.IstioNames()
	const web, pay = "spiffe://mesh.test/ns/shop/sa/web", "spiffe://mesh.test/ns/shop/sa/payment"
	in := NewSignals(r, "inbound")
	for _, flag := range []string{"rate", "limit", "rate"} {
		in.Series(web, pay, "").Observe(&Call{Code: 429, Flag: flag})
	}
	for _, reporter := range []string{"outbound", "gateway"} { // the same side, to Istio
		s := NewSignals(r, reporter).SeriesOf(ProtoTCP, web, "api.stripe.test", "")
		s.Begin()
		s.Observe(&Call{Up: 5, Down: 6})
		s.End()
	}
	for _, host := range []string{"", "unknown"} {
		NewSignals(r, "gateway").Series(web, host, "").Observe(&Call{Code: 502, Flag: "resolve"})
	}
	if _, err := r.Gather(); err != nil {
		t.Fatal(err)
	}
	got := scrape(t, r)
	for _, want := range []string{`response_code="429",response_flags="RL",source_canonical_service="web"`, `istio_tcp_connections_opened_total`, `response_code="502",response_flags="resolve"`} {
		n, last := 0, ""
		for line := range strings.Lines(got) {
			if strings.HasPrefix(line, "istio_") && strings.Contains(line, want) {
				n, last = n+1, strings.TrimSpace(line)
			}
		}
		if n != 1 || !(strings.HasSuffix(last, " 3") || strings.HasSuffix(last, " 2")) {
			t.Errorf("%s: %d series, the last %s", want, n, last)
		}
	}
}
