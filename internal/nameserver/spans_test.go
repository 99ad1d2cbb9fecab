package nameserver

import (
	"context"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/miekg/dns"
	dto "github.com/prometheus/client_model/go"

	"sallyport/internal/telemetry"
)

// Each answer has a span when all traces are kept. A name that is refused is in
// none: whoever asks for it may mean it as a message.
func TestAnswersHaveSpans(t *testing.T) {
	tracer := telemetry.NewTracer(telemetry.TracerConfig{Sample: 1})
	r := newRig(t, func(c *Config) { c.Tracer = tracer })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	go r.ServeUDP(ctx, conn, payment) //nolint:errcheck // ends with ctx
	var got []string
	for _, name := range []string{"api.example.com.", "secret.elsewhere.example.", "billing.mesh.internal."} {
		m, _, err := (&dns.Client{Timeout: patience}).Exchange(ask(name, dns.TypeA, 0), conn.LocalAddr().String())
		if err != nil || m == nil {
			t.Fatal(err)
		}
		for _, s := range tracer.Next(ctx, 1, time.Minute) {
			said := map[string]string{}
			for _, a := range s.Attrs {
				said[a.Key] = a.Text
			}
			if s.Name != "question" || s.Kind != telemetry.Server || !s.Trace.Sampled || s.End.Before(s.Start) || said["sallyport.src"] != "ns/shop/sa/payment" {
				t.Errorf("%+v", s)
			}
			got = append(got, said["sallyport.result"]+" "+said["dns.question.name"]+" "+said["sallyport.rule"])
		}
	}
	if want := []string{"allowed api.example.com out-api", "denied  ", "mesh billing.mesh.internal "}; !slices.Equal(got, want) {
		t.Errorf("spans %q, want %q", got, want)
	}
	cancel()
	if n := r.answered(t); n != 3 {
		t.Errorf("%d answers have a time, want 3", n)
	}
}

// answered is how many answers are in the histogram.
func (r *rig) answered(t *testing.T) (n uint64) {
	t.Helper()
	for until := time.Now().Add(20 * time.Second); n < 3 && time.Now().Before(until); { // a batch is counted once it has been sent
		all, err := r.metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(f *dto.MetricFamily) bool { return f.GetName() == "sallyport_dns_duration_seconds" })
		if i < 0 {
			continue
		}
		n = 0
		for _, m := range all[i].Metric {
			n += m.GetHistogram().GetSampleCount()
		}
	}
	return n
}
