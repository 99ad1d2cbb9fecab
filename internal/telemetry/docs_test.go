package telemetry

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
)

// everything is a registry that exports each metric there is.
func everything(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	r := NewRegistry()
	use(r)
	r.Connections("inbound", "open").Add(1)
	r.ConnectionsRefused("inbound", "total").Inc()
	r.HopViolations("inbound", "kind").Inc()
	r.RequestsRefused("inbound", "rate").Inc()
	r.Names("virtual").Inc()
	r.BreakerOpen("payment").Set(1)
	r.ArchiveRecords("year", "kept").Inc()
	r.UpstreamCA("ok").Inc()
	r.IssuerMessages("/a/b").Inc()
	r.AuditSink("siem", "sent").Inc()
	r.AuditSinkError("siem").Inc()
	r.AuditSinkLag("siem", func() (float64, float64) { return 0, 0 })
	r.AuditSpool(func() Spool { return Spool{Limit: 1} })
	for range maxSeries + 1 {
		r.Authz(strings.Repeat("x", 1+len(r.authz.children)), "allow").Inc()
	}
	all, err := r.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*dto.MetricFamily{}
	for _, f := range all {
		if strings.HasPrefix(f.GetName(), "sallyport_") {
			out[f.GetName()] = f
		}
	}
	for _, f := range r.sized {
		if name, _ := f.size(); out[name] == nil {
			t.Errorf("%s is not exported by this test: use its handle", name)
		}
	}
	return out
}

var docRow = regexp.MustCompile("(?m)^\\| `(sallyport_[a-z_]+)` \\| (\\w+)[^|]*\\|([^|]*)\\|")

// The page names each metric that is exported, with its type and its labels, and
// none that is not.
func TestDocsNameEveryMetric(t *testing.T) {
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	left := everything(t)
	for _, m := range docRow.FindAllStringSubmatch(string(page), -1) {
		f := left[m[1]]
		if f == nil {
			t.Errorf("docs/metrics.md names %s, which is not exported", m[1])
			continue
		}
		delete(left, m[1])
		if typ := strings.ToLower(f.GetType().String()); typ != m[2] {
			t.Errorf("docs/metrics.md calls %s a %s, it is a %s", m[1], m[2], typ)
		}
		var want, got []string
		for l := range strings.SplitSeq(m[3], ",") {
			if l = strings.TrimSpace(l); l != "" {
				want = append(want, l)
			}
		}
		for _, l := range f.Metric[0].Label {
			got = append(got, l.GetName())
		}
		slices.Sort(want)
		if slices.Sort(got); !slices.Equal(want, got) {
			t.Errorf("docs/metrics.md gives %s the labels %v, it has %v", m[1], want, got)
		}
	}
	for name := range left {
		t.Errorf("docs/metrics.md does not name %s", name)
	}
}
