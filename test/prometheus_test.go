package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"sallyport/internal/meshtest"
)

// rulesFile are the alerts that we ship.
const rulesFile = "../deploy/grafana/alerts.yaml"

// A real Prometheus scrapes real programs, takes the rules, and evaluates every
// expression of theirs; what the programs export passes promlint.
func TestPrometheusTakesTheRules(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "prometheus")
	meshtest.Need(t, "promtool")
	meshtest.Need(t, "curl")
	rules, err := filepath.Abs(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("promtool", "check", "rules", rules).CombinedOutput(); err != nil {
		t.Fatalf("promtool: %v\n%s", err, out)
	}
	w := newWorld(t, within)
	ports := map[string]string{"issuer": freePort(t), "gateway": freePort(t), "billing": freePort(t), "payment": freePort(t)}
	scraped := func(name string) string { return fmt.Sprintf("metrics: {listen: %q}\n", ports[name]) }
	b, err := os.ReadFile(w.path("issuer", "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	w.write("issuer", string(b)+scraped("issuer"))
	w.startIssuer()
	w.write("gateway", w.proxyConfig("gateway", w.token("gateway"))+fmt.Sprintf("listen: %s\nresolvers: [%q]\n", freePort(t), freePort(t))+scraped("gateway"))
	w.awaitReady(w.start("gateway", nil, "gateway", "run", "--config", w.path("gateway", "config.yaml")))
	bill, pay := &node{name: "billing"}, &node{name: "payment"}
	for _, n := range []*node{bill, pay} {
		w.join(n)
		w.write(n.name, w.sidecarConfig(n, w.token(n.name))+scraped(n.name))
	}
	w.startNode(bill)
	payment := w.startNode(pay)
	w.awaitReach(payment, "http://billing.mesh.internal/v1/charges/1")
	for name := range ports {
		problems, err := promlint.New(strings.NewReader(w.metrics(name))).Lint()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range problems {
			t.Errorf("%s: %s: %s", name, p.Metric, p.Text)
		}
	}
	at := w.startPrometheus("prometheus", rules, ports)
	native := w.startPrometheus("native", rules, ports, "--enable-feature=native-histograms") // which keeps no classic ones
	w.await("have every program scraped", func() bool {
		return len(query(t, at, "up == 1")) == len(ports) && len(query(t, at, `sallyport_requests_total{src="ns/shop/sa/payment",dst="ns/shop/sa/billing",reporter="inbound",code="200"}`)) > 0
	})
	if n := len(query(t, at, `histogram_quantile(0.99, sum by (dst, le) (sallyport_request_duration_seconds_bucket{reporter="inbound"})) > 0`)); n != 1 {
		t.Errorf("%d services have a latency, want 1", n)
	}
	w.await("have a latency by native histograms", func() bool {
		return len(query(t, native, `histogram_quantile(0.99, sum by (dst) (sallyport_request_duration_seconds{reporter="inbound"})) > 0`)) == 1
	})
	evaluated := w.evaluated(at)
	t.Logf("%d rules evaluated", evaluated)
	if evaluated == 0 {
		t.Error("Prometheus has taken no rule")
	}
}

// startPrometheus starts one that scrapes and evaluates every second, and tells
// where it answers.
func (w *world) startPrometheus(name, rules string, ports map[string]string, flags ...string) string {
	w.t.Helper()
	conf := fmt.Sprintf("global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [%q]\nscrape_configs:\n", rules)
	for program, addr := range ports {
		conf += fmt.Sprintf("  - {job_name: %s, static_configs: [{targets: [%q]}]}\n", program, addr)
	}
	addr := freePort(w.t)
	w.launch(name, nil, exec.Command("prometheus", append(flags, "--config.file="+w.write(name, conf), "--storage.tsdb.path="+w.path(name, "data"),
		"--web.listen-address="+addr, "--log.level=error")...))
	w.await("have Prometheus answer", func() bool {
		resp, err := http.Get("http://" + addr + "/-/ready")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return addr
}

// query asks for an expression, and gives the values that it has.
func query(t *testing.T, at, expr string) []json.RawMessage {
	t.Helper()
	var r struct {
		Status, Error string
		Data          struct{ Result []json.RawMessage }
	}
	get(t, "http://"+at+"/api/v1/query?query="+url.QueryEscape(expr), &r)
	if r.Status != "success" {
		t.Errorf("%s: %s", expr, r.Error)
	}
	return r.Data.Result
}

// evaluated waits until all rules were evaluated, runs the expression of each by
// itself, and tells how many there are.
func (w *world) evaluated(at string) (n int) {
	w.t.Helper()
	type rule struct{ Name, Query, Health, LastError string }
	var r struct {
		Data struct{ Groups []struct{ Rules []rule } }
	}
	w.await("have every rule evaluated", func() bool {
		get(w.t, "http://"+at+"/api/v1/rules", &r)
		for _, g := range r.Data.Groups {
			for _, x := range g.Rules {
				if x.Health == "unknown" {
					return false
				}
			}
		}
		return len(r.Data.Groups) > 0
	})
	for _, g := range r.Data.Groups {
		for _, x := range g.Rules {
			if n++; x.Health != "ok" {
				w.t.Errorf("%s: %s: %s", x.Name, x.Health, x.LastError)
			}
			query(w.t, at, x.Query)
		}
	}
	return n
}

func get(t *testing.T, at string, into any) {
	t.Helper()
	resp, err := http.Get(at)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		t.Fatalf("%s: %v", at, err)
	}
}
