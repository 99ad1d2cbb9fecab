package egress

import (
	"testing"

	"sallyport/internal/audit"
)

// TestTunnelsForRequestsCount has them held without a request: each is bounded as
// any other, recorded, and leaves room for what is asked in it.
func TestTunnelsForRequestsCount(t *testing.T) {
	for name, dial := range map[string]dialFunc{"HTTP/1.1": dial1, "HTTP/2": dial2, "streams": dialStream} {
		t.Run(name, func(t *testing.T) {
			w, s := askWorldWith(t, Limits{TunnelsPerCaller: 2})
			first := w.askInside(dial, "shop.test:80")
			second := w.askInside(dial, "shop.test:80")
			if _, ref := dial(w, billing, "shop.test:80"); ref == nil || ref.status != 429 || ref.id == "" {
				t.Errorf("the third: %+v", ref)
			}
			w.until("the refusal", denial(ReasonTunnelCap))
			for _, c := range []*askConn{first, second} {
				if res, body := c.ask(t, "GET /v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"); res.StatusCode != 200 || body != "served" {
					t.Errorf("a request: %d %q", res.StatusCode, body)
				}
				<-s.seen
			}
			opened := 0
			for _, r := range w.audit.Records() {
				if r.Kind == audit.KindEgressOpen && r.Src == billing.String() && r.Dst == "host:shop.test" && r.ID != "" {
					opened++
				}
			}
			if n := w.gw.Tunnels(); n != 2 || opened != 2 {
				t.Errorf("%d tunnels are open, %d recorded", n, opened)
			}
			w.use(w.policy(access, s.originated("shop.test")))
			w.gw.Rejudge()
			w.until("the end", func(r audit.Record) bool { return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonRevoked) })
		})
	}
}

// TestTunnelsForRequestsNeedTheirRecord are not opened without.
func TestTunnelsForRequestsNeedTheirRecord(t *testing.T) {
	w, _ := askWorld(t)
	w.refusing.Store(true)
	if _, ref := dialStream(w, billing, "shop.test:80"); ref == nil || ref.status != 503 {
		t.Errorf("%+v", ref)
	}
	w.refusing.Store(false)
	if n := w.gw.Tunnels(); n != 0 {
		t.Errorf("%d tunnels are open", n)
	}
}
