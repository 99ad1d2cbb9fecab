package upstream

import (
	"cmp"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// checked is a group of one endpoint with a health check, before h.
func checked(t *testing.T, h http.HandlerFunc, cfg mesh.Health) *group {
	t.Helper()
	cfg.Timeout = cmp.Or(cfg.Timeout, time.Minute) // a stall says nothing of who is asked
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	s := &Services{known: map[mesh.ServiceName]*standing{}}
	p := NewLocal(netip.MustParseAddrPort(srv.Listener.Addr().String()), http1.Limits{})
	t.Cleanup(p.Close)
	return s.groupOf("a", mesh.Routes{Health: &cfg}, []place{{pool: p}})
}

func TestHealthChecksSayWhoIsWell(t *testing.T) {
	name := "shop.Billing"
	says := func(b ...byte) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			q, _ := io.ReadAll(r.Body)
			if r.URL.Path != "/grpc.health.v1.Health/Check" || string(q) != "\x00\x00\x00\x00\x0e\x0a\x0cshop.Billing" {
				w.WriteHeader(400)
				return
			}
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Trailer", "Grpc-Status")
			_, _ = w.Write(b)
			w.Header().Set("Grpc-Status", "0")
		}
	}
	status := func(code int, fields ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if len(fields) > 0 {
				w.Header().Set(fields[0], fields[1])
			}
			w.WriteHeader(code)
		}
	}
	for _, tt := range []struct {
		name string
		h    http.HandlerFunc
		cfg  mesh.Health
		want string
	}{
		{"HTTP", status(204), mesh.Health{HTTP: "/healthz"}, ""},
		{"HTTP that fails", status(500), mesh.Health{HTTP: "/healthz"}, "status 500"},
		{"HTTP that policy refuses", status(403, "Sallyport-Decision", "x"), mesh.Health{HTTP: "/healthz"}, "says nothing"},
		{"HTTP that hangs", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, mesh.Health{HTTP: "/", Timeout: 50 * time.Millisecond}, "context deadline exceeded"},
		{"TCP", status(500), mesh.Health{TCP: true}, ""},
		{"gRPC that serves", says(0, 0, 0, 0, 2, 8, 1), mesh.Health{GRPC: &name}, ""},
		{"gRPC that does not", says(0, 0, 0, 0, 2, 8, 2), mesh.Health{GRPC: &name}, "not serving"},
		{"gRPC that says nothing", says(), mesh.Health{GRPC: &name}, "not serving"},
		{"gRPC that says too much", says(append([]byte{0, 0, 0, 0, 2, 8, 1}, make([]byte, 1<<20)...)...), mesh.Health{GRPC: &name}, "the answer is longer than 1024 bytes"},
	} {
		g := checked(t, tt.h, tt.cfg)
		got := ""
		if err := g.ask(t.Context(), g.all[0]); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestWatchPutsAsideAndTakesBack(t *testing.T) {
	var bad atomic.Bool
	bad.Store(true)
	g := checked(t, func(w http.ResponseWriter, _ *http.Request) {
		if bad.Load() {
			w.WriteHeader(503)
		}
	}, mesh.Health{HTTP: "/", Interval: time.Millisecond, Unhealthy: 2, Healthy: 2})
	told := make(chan Trouble, 8)
	g.change = func(x Trouble) { told <- x }
	s := &Services{}
	s.table.Store(&map[mesh.ServiceName]*group{"a": g})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Watch(ctx) }()
	if x := <-told; x.Kind != Unhealthy || x.Why != "status 503" {
		t.Errorf("told %+v", x)
	}
	if list := s.Troubles(); len(list) != 1 || list[0].Kind != Unhealthy {
		t.Errorf("troubles %+v", list)
	}
	bad.Store(false)
	if x := <-told; x.Kind != Healthy {
		t.Errorf("told %+v", x)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
