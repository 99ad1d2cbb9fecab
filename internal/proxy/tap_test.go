package proxy

import (
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/tap"
)

// Who looks sees the calls of the filter, each after it has ended, and nothing of
// them that could be a secret.
func TestTapsShowCalls(t *testing.T) {
	var taps tap.Taps
	r := newRig(t, app(t, func(w http.ResponseWriter, q *http.Request) {
		_, _ = io.Copy(w, q.Body) // read to its end, so that room of the head could be used again
	}), func(r *rig) { r.inCfg.Taps, r.outCfg.Taps = &taps, &taps })
	all, ok := taps.Open(mesh.TapFilter{})
	out, _ := taps.Open(mesh.TapFilter{Reporter: "outbound", Method: "POST", Path: "/ok/", Status: "2xx"})
	never, _ := taps.Open(mesh.TapFilter{Status: "418"})
	if !ok {
		t.Fatal("nobody may look")
	}
	q, err := http.NewRequest(http.MethodPost, "http://billing.mesh.internal/ok/7?card=hidden-query", strings.NewReader(strings.Repeat("hidden-body ", 1000)))
	if err != nil {
		t.Fatal(err)
	}
	q.Header.Set("Authorization", "hidden-token")
	q.Header.Set("User-Agent", "agent/1")
	resp, err := r.client().Do(q)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%v %v", resp, err)
	}
	resp.Body.Close()
	seen := take(t, out)
	if seen.Reporter != "outbound" || seen.Method != "POST" || seen.Path != "/ok/7" || seen.Status != 200 || seen.Src != web.String() || seen.Dst != billing.String() || len(seen.Trace) != 32 || seen.Up == 0 || seen.Took <= 0 {
		t.Errorf("%+v", seen)
	}
	for _, want := range [][2]string{{"Authorization", "[hidden]"}, {"User-Agent", "agent/1"}} {
		if !slices.Contains(seen.Headers, want) {
			t.Errorf("fields %q, want %q", seen.Headers, want)
		}
	}
	if a, b := take(t, all), take(t, all); a.Reporter == b.Reporter {
		t.Errorf("who sees all sees %q twice", a.Reporter)
	}
	if len(never.Calls) != 0 {
		t.Errorf("a filter that nothing meets sees %+v", <-never.Calls)
	}
}

func take(t *testing.T, one *tap.Tap) *mesh.Tapped {
	t.Helper()
	select {
	case c := <-one.Calls:
		return c
	case <-time.After(patience):
		t.Fatal("no call is shown")
		return nil
	}
}
