package egress

import (
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/mesh"
	"sallyport/internal/tap"
)

// Who looks at a gateway sees what goes out and what may not, each once it has ended,
// and nothing of it that could be a secret.
func TestTapsShowWhatGoesOut(t *testing.T) {
	s := startSite(t, "shop.test")
	var taps tap.Taps
	w := newWorld(t, func(c *Config) { c.Taps = &taps })
	w.use(w.policy(asking, s.originated("shop.test")+"  - host: '*.shop.test'\n    proto: http\n"))
	all, _ := taps.Open(mesh.TapFilter{Reporter: "gateway"})
	denied, _ := taps.Open(mesh.TapFilter{Status: "denied"})
	saw := func(name string, want mesh.Tapped) *mesh.Tapped {
		t.Helper()
		var got *mesh.Tapped
		select {
		case got = <-all.Calls:
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: nothing is shown", name)
		}
		want.Reporter, want.Src = "gateway", billing.String()
		same := *got
		same.Time, same.Took, same.Trace, same.Decision, same.Headers, same.Up, same.Down = time.Time{}, 0, "", "", nil, 0, 0
		if d := cmp.Diff(want, same); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if got.Decision == "" || got.Time.IsZero() {
			t.Errorf("%s: decision %q at %s", name, got.Decision, got.Time)
		}
		return got
	}

	c := w.askOnStream(w.streamsOn(billing))
	c.ask(t, "POST http://shop.test/v1/a?card=hidden-query HTTP/1.1\r\nHost: shop.test\r\nAuthorization: hidden-token\r\nUser-Agent: agent/1\r\nContent-Length: 12\r\n\r\nhidden-body!")
	got := saw("a request", mesh.Tapped{Dst: "host:shop.test", Method: "POST", Path: "/v1/a", Status: 200})
	for _, want := range [][2]string{{"Authorization", "[hidden]"}, {"User-Agent", "agent/1"}} {
		if !slices.Contains(got.Headers, want) {
			t.Errorf("fields %q, want %q", got.Headers, want)
		}
	}
	if got.Up == 0 || got.Down == 0 {
		t.Errorf("%d bytes up and %d down", got.Up, got.Down)
	}
	c.ask(t, "GET http://shop.test/v1/keys/x HTTP/1.1\r\nHost: shop.test\r\n\r\n")
	saw("a request that a row denies", mesh.Tapped{Dst: "host:shop.test", Method: "GET", Path: "/v1/keys/x", Status: 403, Flag: "policy", Denied: true})
	c = w.askOnStream(w.streamsOn(billing))
	c.ask(t, "GET http://x.shop.test/v1/a HTTP/1.1\r\nHost: x.shop.test\r\n\r\n")
	saw("a request for a host of a pattern", mesh.Tapped{Dst: "host:x.shop.test", Route: "*.shop.test", Method: "GET", Path: "/v1/a", Status: 403, Flag: "policy", Denied: true})
	c = w.askOnStream(w.streamsOn(billing))
	c.ask(t, "GET https://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n")
	saw("a request for no host", mesh.Tapped{Method: "GET", Path: "-", Status: 400, Flag: "request"})

	for name, dial := range map[string]dialFunc{"HTTP/1.1": dial1, "HTTP/2": dial2, "streams": dialStream} {
		tun, ref := dial(w, billing, "db.test:5432")
		if ref != nil {
			t.Fatalf("%s: %+v", name, ref)
		}
		_, _ = io.WriteString(tun, "five!")
		_, _ = io.ReadFull(tun, make([]byte, 5))
		_ = tun.CloseWrite()
		_, _ = io.Copy(io.Discard, tun)
		tun.Close()
		if got := saw(name, mesh.Tapped{Dst: "host:db.test", Method: "CONNECT", Path: "-", Status: 200}); got.Up != 5 || got.Down != 5 {
			t.Errorf("%s: %d bytes up and %d down", name, got.Up, got.Down)
		}
		if _, ref := dial(w, billing, "evil.test:443"); ref == nil {
			t.Fatalf("%s: let through", name)
		}
		saw(name, mesh.Tapped{Dst: "host:evil.test", Method: "CONNECT", Path: "-", Status: 403, Flag: "policy", Denied: true})
	}
	for range 5 { // two requests and three tunnels
		if d := <-denied.Calls; !d.Denied || strings.Contains(d.Path, "hidden") {
			t.Errorf("%+v", d)
		}
	}
	if len(all.Calls)+len(denied.Calls) != 0 {
		t.Errorf("%d calls more are shown", len(all.Calls)+len(denied.Calls))
	}
}
