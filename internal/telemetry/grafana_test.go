package telemetry

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
)

var (
	metricName = regexp.MustCompile(`sallyport_[a-z_]+`)
	matchers   = regexp.MustCompile(`\{([^{}]*)\}`)
	labelName  = regexp.MustCompile(`([a-z_]+)\s*(?:=~|!~|!=|=)`)
	grouping   = regexp.MustCompile(`\b(?:by|on) ?\(([^()]*)\)`)
	ruleExpr   = regexp.MustCompile(`(?m)^ +expr: '(.*)'$`)
)

// Every expression of a dashboard and of a rule reads metrics that are exported,
// by labels that they have, and every metric is looked at by one of them.
func TestDashboardsReadWhatIsExported(t *testing.T) {
	all := everything(t)
	left := map[string]bool{}
	for name := range all {
		left[name] = true
	}
	files, err := filepath.Glob("../../deploy/grafana/*.json")
	if err != nil || len(files) != 5 {
		t.Fatalf("%d dashboards: %v", len(files), err)
	}
	n := 0
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var d struct {
			UID, Title string
			Panels     []struct {
				Title   string
				Targets []struct{ Expr string }
			}
		}
		if err := json.Unmarshal(b, &d); err != nil || d.UID == "" || d.Title == "" {
			t.Fatalf("%s: %v", file, err)
		}
		for _, p := range d.Panels {
			for _, e := range p.Targets {
				lintExpr(t, file+": "+p.Title, e.Expr, all, left)
				n++
			}
		}
	}
	rules, err := os.ReadFile("../../deploy/grafana/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	exprs := ruleExpr.FindAllStringSubmatch(string(rules), -1)
	if strings.Count(string(rules), "alert:") != len(exprs) {
		t.Error("a rule has no expression in quotes")
	}
	for _, e := range exprs {
		lintExpr(t, "alerts.yaml", e[1], all, left)
	}
	for name := range left {
		if !strings.HasPrefix(name, "sallyport_audit_sink_lag_records") {
			t.Errorf("no dashboard and no rule looks at %s", name)
		}
	}
	t.Logf("%d expressions of dashboards, %d of rules", n, len(exprs))
}

func lintExpr(t *testing.T, where, expr string, all map[string]*dto.MetricFamily, left map[string]bool) {
	t.Helper()
	labels := map[string]bool{"job": true, "instance": true, "le": true}
	names := metricName.FindAllString(expr, -1)
	for _, name := range names {
		f := all[name]
		for _, suffix := range []string{"_bucket", "_count", "_sum"} {
			if base, ok := strings.CutSuffix(name, suffix); ok && f == nil {
				if f = all[base]; f != nil && f.GetType() != dto.MetricType_HISTOGRAM {
					f = nil
				}
			}
		}
		if f == nil {
			t.Errorf("%s: %s is not exported", where, name)
			continue
		}
		delete(left, f.GetName())
		for _, m := range f.Metric {
			for _, l := range m.Label {
				labels[l.GetName()] = true
			}
		}
	}
	if len(names) == 0 {
		t.Errorf("%s: %q reads nothing", where, expr)
	}
	var used []string
	for _, m := range matchers.FindAllStringSubmatch(expr, -1) {
		for _, l := range labelName.FindAllStringSubmatch(m[1], -1) {
			used = append(used, l[1])
		}
	}
	for _, g := range grouping.FindAllStringSubmatch(expr, -1) {
		used = append(used, strings.Split(strings.ReplaceAll(g[1], " ", ""), ",")...)
	}
	for _, l := range slices.Compact(used) {
		if !labels[l] {
			t.Errorf("%s: no metric of %q has the label %q", where, expr, l)
		}
	}
}
