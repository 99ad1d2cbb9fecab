package test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

// versions are two instances of billing, one of each version, that payment
// calls by routes.
type versions struct {
	*stage
	client *http.Client
	calls  [2]atomic.Int64 // that came to each
}

func newVersions(t *testing.T) *versions {
	v := &versions{stage: newStage(t, time.Minute, "billing-2")}
	tr := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: v.out}), MaxIdleConnsPerHost: 16}
	t.Cleanup(tr.CloseIdleConnections)
	v.client = &http.Client{Transport: tr, Timeout: within}
	for i, n := range []string{"billing", "billing-2"} {
		app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			v.calls[i].Add(1)
			fmt.Fprintf(w, "v%d", i+1)
		}))
		t.Cleanup(app.Close)
		v.procs[n].stop()
		v.write(n, v.stageConfig(n, strings.TrimPrefix(app.URL, "http://"))+fmt.Sprintf("workload: {labels: version=v%d}\n", i+1))
		v.begin(n)
	}
	for _, n := range []string{"billing", "billing-2"} {
		v.awaitReady(v.procs[n])
	}
	if err := os.Mkdir(v.path("policies", "routes"), 0o700); err != nil {
		t.Fatal(err)
	}
	v.weigh(10000, 0)
	v.await("routes to both", func() bool { return v.on("anybody") == "v1" })
	return v
}

// weigh gives both versions a weight. The file is replaced, as a checkout does.
func (v *versions) weigh(one, two int) {
	v.t.Helper()
	next := v.path("next.yaml")
	v.put(next, fmt.Sprintf(`service: billing
subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
routes:
  - name: charges
    matches: [{path: {prefix: /v1/charges}}]
    backends:
      - {subset: v1, weight: %d}
      - {subset: v2, weight: %d}
    sticky: {by: header, name: X-User}
`, one, two))
	if err := os.Rename(next, filepath.Join(v.policy, "routes", "billing.yaml")); err != nil {
		v.t.Fatal(err)
	}
}

// on says which version a user is on; empty when the call fails.
func (v *versions) on(user string) string {
	req, err := http.NewRequestWithContext(v.t.Context(), "GET", "http://billing.mesh.internal/v1/charges/1", nil)
	if err != nil {
		return ""
	}
	req.Header.Set("X-User", user)
	resp, err := v.client.Do(req)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		return ""
	}
	return string(b)
}

// synced says whether payment's sidecar acts on the newest policy.
func (v *versions) synced() bool {
	a := v.admin()
	defer a.Close()
	st, err := a.Status(v.t.Context())
	if err != nil {
		return false
	}
	proxies, err := a.Proxies(v.t.Context())
	return err == nil && slices.ContainsFunc(proxies, func(p mesh.Proxy) bool {
		return p.Workload.Path() == "/ns/shop/sa/payment" && p.PolicyRevision == st.PolicyRevision && p.State == mesh.Synced
	})
}

// Callers are moved from one version to another and back, by weights in a file:
// each part is what the file says, a caller that was moved stays moved, and no
// call fails.
func TestRoutes(t *testing.T) {
	t.Parallel()
	v := newVersions(t)
	const users = 2000
	all := func() map[string]string {
		out := map[string]string{}
		for i := range users {
			user := fmt.Sprintf("user-%d", i)
			if out[user] = v.on(user); out[user] == "" {
				t.Fatalf("a call of %s failed", user)
			}
		}
		return out
	}
	part := func(sides map[string]string) (n int) {
		for _, s := range sides {
			if s == "v2" {
				n++
			}
		}
		return n
	}
	v.weigh(9900, 100)
	v.await("1 %", v.synced)
	v.await("a caller of the canary", func() bool { return part(all()) > 0 })
	one := all()
	v.weigh(9500, 500)
	v.await("5 %", func() bool { return v.synced() && part(all()) > 2*part(one) })
	five := all()
	t.Logf("of %d callers %d are on v2 at 1 %%, %d at 5 %%", users, part(one), part(five))
	if n := part(one); n < users/200 || n > users/50 {
		t.Errorf("1 %% of %d callers is %d", users, n)
	}
	if n := part(five); n < users*3/100 || n > users*7/100 {
		t.Errorf("5 %% of %d callers is %d", users, n)
	}
	for user, side := range one {
		if side == "v2" && five[user] != "v2" {
			t.Errorf("%s was moved back", user)
		}
	}

	v.changeUnderLoad(t)

	// After the proxy has acknowledged that v2 gets nothing, nothing starts there.
	v.weigh(10000, 0)
	v.await("the way back", func() bool { return v.on("user-0") == "v1" && v.synced() })
	before := v.calls[1].Load()
	if n := part(all()); n != 0 || v.calls[1].Load() != before {
		t.Errorf("%d calls reached v2 after the proxy had acknowledged that none does", v.calls[1].Load()-before)
	}
}

// changeUnderLoad swaps the versions again and again while calls are made.
func (v *versions) changeUnderLoad(t *testing.T) {
	t.Helper()
	load := &traffic{name: "calls while weights change"}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	halt := sync.OnceFunc(func() { close(stop); wg.Wait() })
	defer halt() // also when the test fails
	load.run(&wg, stop, 8, func(w, n int) error {
		if v.on(fmt.Sprintf("load-%d-%d", w, n%100)) == "" {
			return fmt.Errorf("call %d failed", n)
		}
		return nil
	})
	var took []time.Duration
	for i := range 8 {
		want, one, two := "v2", 0, 10000
		if i%2 == 1 {
			want, one, two = "v1", 10000, 0
		}
		begin := time.Now()
		v.weigh(one, two)
		v.await("all calls on "+want, func() bool { return v.on("watcher") == want })
		took = append(took, time.Since(begin))
	}
	halt()
	noneFailed(t, []*traffic{load})
	slices.Sort(took)
	t.Logf("a change of weights was in force after %v", took)
	if took[len(took)/2] > within/2 {
		t.Errorf("half of the changes took more than %v", took[len(took)/2])
	}
}
