package egress

import (
	"strings"
	"testing"

	"sallyport/internal/audit"
)

// TestKeptConnectionsAreUsedAgainWhereTheyFit looks at whom the second request
// shares a connection with.
func TestKeptConnectionsAreUsedAgainWhereTheyFit(t *testing.T) {
	const anybody = access + "p, rows, out, **, host:shop.test, *, *, **, -, allow\n"
	for name, tt := range map[string]struct {
		between func(w *world, s *site)
		other   bool // it is another workload
		conns   int
	}{
		"by the same workload": {func(*world, *site) {}, false, 1},
		"by another workload":  {func(*world, *site) {}, true, 2},
		"after a row has come": {func(w *world, s *site) {
			w.use(w.policy(anybody+"p, more, out, **, host:old.test, *, *, **, -, allow\n", s.originated("shop.test")))
		}, false, 1},
		"at one endpoint of two": {func(w *world, s *site) {
			w.use(w.policy(anybody, strings.Replace(s.originated("shop.test"), s.addr+`"`, s.addr+`", "127.0.0.1:1"`, 1)))
		}, false, 2},
		"when it is old": {func(w *world, _ *site) {
			w.gw.origins.mu.Lock()
			defer w.gw.origins.mu.Unlock()
			for _, list := range w.gw.origins.idle {
				for _, o := range list {
					o.born = o.born.Add(-originAge)
				}
			}
		}, false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			w, s := askWorld(t)
			w.use(w.policy(anybody, s.originated("shop.test")))
			const request = "GET http://shop.test/v1/a HTTP/1.1\r\nHost: shop.test\r\n\r\n"
			h := w.streamsOn(billing)
			w.askOnStream(h).ask(t, request)
			w.until("the end", kind(audit.KindEgressClose)) // when the connection is kept
			tt.between(w, s)
			if tt.other {
				h = w.streamsOn(inventory)
			}
			if res, _ := w.askOnStream(h).ask(t, request); res.StatusCode != 200 {
				t.Errorf("the second: %d", res.StatusCode)
			}
			if n := s.connected(); n != tt.conns {
				t.Errorf("%d connections were made, want %d", n, tt.conns)
			}
		})
	}
}
