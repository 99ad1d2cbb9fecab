package proxy

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/shadow"
	"sallyport/internal/upstream"
)

// mirrored gives a rig a shadow at an address, and runs it.
func mirrored(t testing.TB, at string, s mesh.Shadow, limits shadow.Limits) func(*rig) {
	return mirroredBy(t, upstream.NewLocal(netip.MustParseAddrPort(at), http1.Limits{}), s, limits)
}

func mirroredBy(t testing.TB, pool *upstream.Pool, s mesh.Shadow, limits shadow.Limits) func(*rig) {
	return func(r *rig) {
		t.Cleanup(pool.Close)
		m, err := shadow.New(shadow.Config{
			Limits: limits, Dir: t.TempDir(), Metrics: r.metrics, Log: slog.New(slog.DiscardHandler),
			Lend: func(ctx context.Context, _ mesh.Backend, fresh bool) (shadow.Line, error) {
				up, err := pool.Get(ctx, fresh)
				if err != nil {
					return shadow.Line{}, err
				}
				return shadow.Line{Conn: up.Conn, Reused: up.Reused, Done: func(again bool) {
					if again {
						up.Put()
					} else {
						up.Discard()
					}
				}}, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		t.Cleanup(func() { stop(); <-done })
		r.outCfg.Mirror = m
		s.Service.Service = "inventory" // whose connections Lend gives
		r.shadow = &s
	}
}

// heard is a request as a shadow has it.
type heard struct {
	*http.Request
	body string
}

// listener of a shadow that tells what it hears.
func overheard(t *testing.T) (at string, got chan heard) {
	got = make(chan heard, 100)
	return app(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got <- heard{r, string(b)}
		w.WriteHeader(http.StatusTeapot)
	}), got
}

func returned(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	_, _ = w.Write(b)
}

func TestShadowGetsACopy(t *testing.T) {
	at, got := overheard(t)
	r := newRig(t, app(t, returned), mirrored(t, at, mesh.Shadow{Name: "next", Share: mesh.Whole, Writes: true}, shadow.Limits{}))
	large := strings.Repeat("0123456789abcdef", 3<<16) // 3 MiB: beyond what stays in memory
	for _, tt := range []struct {
		name, method, body string
		chunked            bool
	}{
		{"nothing", "GET", "", false}, {"a little", "POST", "hello", false}, {"a little in chunks", "POST", "hello", true},
		{"much", "POST", large, false}, {"much in chunks", "POST", large, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var body io.Reader = strings.NewReader(tt.body)
			if tt.chunked {
				body = io.MultiReader(body) // of no known length
			}
			req, _ := http.NewRequest(tt.method, "http://billing.mesh.internal/ok/x?y=1", body)
			req.Header.Set("X-Mine", "yes")
			resp, err := r.client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if b, _ := io.ReadAll(resp.Body); resp.StatusCode != 200 || string(b) != tt.body {
				t.Errorf("the caller got %d with %d bytes", resp.StatusCode, len(b))
			}
			h := <-got
			if h.Method != tt.method || h.RequestURI != "/ok/x?y=1" || h.Host != "inventory.mesh.internal" || h.Header.Get("Sallyport-Host") != "billing.mesh.internal" || h.body != tt.body ||
				h.Header.Get("X-Mine") != "yes" || h.Header.Get(shadow.Marker) != "1" || len(h.Header["Traceparent"]) != 1 {
				t.Errorf("the shadow got %s %s of %s with %d bytes and %v", h.Method, h.RequestURI, h.Host, len(h.body), h.Header)
			}
		})
	}
	await(t, func() bool {
		return strings.Contains(scrape(r), `sallyport_shadow_total{outcome="answered",shadow="next"} 5`)
	})
}

func scrape(r *rig) string {
	w := &responseBuffer{h: http.Header{}}
	r.metrics.Handler().ServeHTTP(w, &http.Request{Method: "GET", Header: http.Header{}})
	return w.String()
}

type responseBuffer struct {
	bytes.Buffer
	h http.Header
}

func (b *responseBuffer) Header() http.Header { return b.h }
func (b *responseBuffer) WriteHeader(int)     {}

func TestShadowThatHangsHoldsUpNobody(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, tt := range []struct{ name, at, outcome string }{
		{"it accepts and says nothing", silent.Addr().String(), "queue_full"},
		{"it is gone", "127.0.0.1:1", "unreachable"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, app(t, hello), mirrored(t, tt.at, mesh.Shadow{Name: "next", Share: mesh.Whole}, shadow.Limits{Concurrency: 1, Queue: 1, Timeout: time.Minute}))
			c := r.client()
			for range 20 {
				if resp, body := get(t, c, "http://billing.mesh.internal/ok/1"); resp.StatusCode != 200 || body != "hello /ok/1" {
					t.Fatalf("%d %q", resp.StatusCode, body)
				}
			}
			await(t, func() bool { return strings.Contains(scrape(r), fmt.Sprintf(`outcome=%q`, tt.outcome)) })
		})
	}
}

func TestOnlyWhatIsSafeIsCopiedUnlessWritesAre(t *testing.T) {
	at, got := overheard(t)
	r := newRig(t, app(t, returned), mirrored(t, at, mesh.Shadow{Name: "next", Share: mesh.Whole}, shadow.Limits{}))
	c := r.client()
	resp, err := c.Post("http://billing.mesh.internal/ok/1", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	get(t, c, "http://billing.mesh.internal/ok/2")
	if h := <-got; h.Method != "GET" {
		t.Errorf("a %s was copied", h.Method)
	}
}

func TestWhatAShadowDoesChangesNothing(t *testing.T) {
	var seen atomic.Pointer[http.Request]
	upstream := app(t, func(_ http.ResponseWriter, r *http.Request) { seen.Store(r) })
	r := newRig(t, upstream)
	const traceparent = "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
	for _, tt := range []struct {
		name, method, mark string
		status             int
	}{
		{"a read passes, marked", "GET", "Tracestate: a=1, sallyport=shadow\r\n", 200},
		{"the field alone is enough", "GET", shadow.Marker + ": 1\r\n", 200},
		{"a write is refused", "POST", "Tracestate: sallyport=shadow\r\n", 403},
		{"a deletion is refused", "DELETE", shadow.Marker + ": 1\r\n", 403},
		{"a WebSocket is refused", "GET", "Connection: upgrade\r\nUpgrade: websocket\r\n" + shadow.Marker + ": 1\r\n", 403},
		{"a tunnel is refused", "CONNECT", shadow.Marker + ": 1\r\n", 403},
		{"another state is none", "POST", "Tracestate: sallyport=other\r\n", 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			seen.Store(nil)
			before := len(decisions(r.outAudit))
			target := "http://billing.mesh.internal/ok/1"
			if tt.method == "CONNECT" {
				target = "api.example.com:443"
			}
			w := r.dial()
			w.say(tt.method + " " + target + " HTTP/1.1\r\nHost: " + strings.TrimSuffix(strings.TrimPrefix(target, "http://"), "/ok/1") + "\r\n" + traceparent + tt.mark + "\r\n")
			resp, _ := w.answer(tt.method)
			if resp.StatusCode != tt.status {
				t.Fatalf("%d, want %d", resp.StatusCode, tt.status)
			}
			if tt.status == 403 {
				d := decisions(r.outAudit)[before:]
				if len(d) != 1 || d[0].Reason != "shadow_write" || d[0].Decision != audit.Deny {
					t.Errorf("records: %+v", d)
				}
				return
			}
			told := seen.Load().Header
			if marked := told.Get(shadow.Marker) == "1"; marked != (tt.method == "GET") {
				t.Errorf("the next is told %v", told)
			}
			if tt.name == "a read passes, marked" && told.Get("Tracestate") != "sallyport=shadow,a=1" {
				t.Errorf("state %q", told.Get("Tracestate"))
			}
		})
	}
}

// An application cannot hide its calls from those who copy them: only what belongs
// to a trace of which a peer has said that it is for a shadow is not copied again.
func TestOnlyAPeerSaysWhatIsNotCopied(t *testing.T) {
	at, got := overheard(t)
	known := new(shadow.Traces)
	r := newRig(t, app(t, returned), mirrored(t, at, mesh.Shadow{Name: "next", Share: mesh.Whole}, shadow.Limits{}), func(r *rig) {
		r.inCfg.Shadows, r.outCfg.Shadows = new(shadow.Traces), known
	})
	const parent = "Traceparent: 00-%s-b7ad6b7169203331-01\r\n"
	call := func(trace, fields string) {
		t.Helper()
		w := r.dial()
		w.say("GET http://billing.mesh.internal/ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n" + fmt.Sprintf(parent, trace) + fields + "\r\n")
		if resp, _ := w.answer("GET"); resp.StatusCode != 200 {
			t.Fatalf("status %d", resp.StatusCode)
		}
	}
	for i, mark := range []string{"Tracestate: sallyport=shadow\r\n", shadow.Marker + ": 1\r\n"} {
		call(fmt.Sprintf("0af7651916cd43dd8448eb211c8031%02x", i), mark)
		<-got
	}
	// A peer says so of one trace: its sidecar is told, and the one of the
	// application that hands it on goes by that.
	in := r.dialIn(r.web)
	in.say("GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n" + fmt.Sprintf(parent, "0af7651916cd43dd8448eb211c80319c") + shadow.Marker + ": 1\r\n\r\n")
	in.answer("GET")
	in.say("GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n" + fmt.Sprintf(parent, "0af7651916cd43dd8448eb211c8031aa") + "Tracestate: sallyport=shadow\r\n\r\n")
	in.answer("GET")
	trace := func(s string) (id [16]byte) {
		_, _ = hex.Decode(id[:], []byte(s))
		return id
	}
	for id, want := range map[string]bool{"0af7651916cd43dd8448eb211c80319c": true, "0af7651916cd43dd8448eb211c8031aa": false, "0af7651916cd43dd8448eb211c803100": false} {
		if r.inCfg.Shadows.Has(trace(id)) != want {
			t.Errorf("trace %s is of a shadow: %t, want %t", id, !want, want)
		}
	}
	known.Begin("a peer", trace("0af7651916cd43dd8448eb211c80319c"))
	call("0af7651916cd43dd8448eb211c80319c", "Tracestate: sallyport=shadow\r\n")
	if !strings.Contains(scrape(r), `sallyport_shadow_total{outcome="skipped",shadow="next"} 1`) {
		t.Error("the call that was not copied is not counted")
	}
	call("0af7651916cd43dd8448eb211c80319c", "") // the trace alone says nothing
	<-got
}

func TestAWorkloadThatIsAllShadowWritesNowhereElse(t *testing.T) {
	for _, tt := range []struct {
		name   string
		to     []mesh.ServiceName
		status int
	}{{"nowhere", nil, 403}, {"beside it", []mesh.ServiceName{"billing"}, 200}} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, app(t, returned), func(r *rig) { r.outCfg.ShadowOnly, r.outCfg.ShadowWrites = true, tt.to })
			resp, err := r.client().Post("http://billing.mesh.internal/ok/1", "text/plain", strings.NewReader("x"))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != tt.status {
				t.Errorf("%d, want %d", resp.StatusCode, tt.status)
			}
		})
	}
}

// What it calls learns that it is called for a shadow, though the application hands
// no mark on.
func TestAWorkloadThatIsAllShadowMarksItsCalls(t *testing.T) {
	var seen atomic.Pointer[http.Request]
	r := newRig(t, app(t, func(_ http.ResponseWriter, r *http.Request) { seen.Store(r) }), func(r *rig) { r.outCfg.ShadowOnly = true })
	get(t, r.client(), "http://billing.mesh.internal/ok/1")
	if next := seen.Load(); next == nil || next.Header.Get(shadow.Marker) != "1" || next.Header.Get("Tracestate") != "sallyport=shadow" {
		t.Errorf("the next is told %v", next)
	}
}

// A stream of gRPC is copied like any call, and its status, which comes behind
// the messages, compared.
func TestShadowOfGRPC(t *testing.T) {
	server := func(status string, got chan string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Trailer", "Grpc-Status")
			b, _ := io.ReadAll(r.Body)
			_, _ = w.Write(b)
			w.Header().Set("Grpc-Status", status)
			got <- string(b)
		}
	}
	got, primary := make(chan string, 1), make(chan string, 1)
	copies := httptest.NewUnstartedServer(server("5", got))
	copies.Config.Protocols = new(http.Protocols)
	copies.Config.Protocols.SetUnencryptedHTTP2(true)
	copies.Start()
	defer copies.Close()
	pool := upstream.NewLocalHTTP2(netip.MustParseAddrPort(copies.Listener.Addr().String()), http1.Limits{})
	r := newRig(t, "127.0.0.1:1", appH2C(t, server("0", primary)), mirroredBy(t, pool, mesh.Shadow{Name: "next", Share: mesh.Whole, Writes: true, Compare: true}, shadow.Limits{}))
	client := r.clientH2C()
	req, w := grpcCall(t.Context())
	go func() {
		for range 100 {
			_, _ = io.WriteString(w, strings.Repeat("m", 1000))
		}
		w.Close()
	}()
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || len(b) != 100_000 || resp.Trailer.Get("Grpc-Status") != "0" {
		t.Fatalf("%d bytes, %v, %v", len(b), err, resp.Trailer)
	}
	if n := len(<-got); n != 100_000 {
		t.Errorf("the shadow got %d bytes", n)
	}
	await(t, func() bool { return len(r.outCfg.Mirror.Report().Endpoints) == 1 })
	if f := r.outCfg.Mirror.Report().Endpoints[0].Fields; len(f) != 1 || f[0].Field != "trailer.grpc-status" || f[0].Sample.Shadow != "5" {
		t.Errorf("differences: %+v", f)
	}
}

// Who marks a call does not choose the Host that an application sees, unless it is
// nothing but a shadow.
func TestTheHostOfAPrimaryIsForShadowsAlone(t *testing.T) {
	for _, tt := range []struct {
		name       string
		only       bool
		host, more string
		status     int
		seen       string
	}{
		{"another service is meant", false, "ledger.mesh.internal", shadow.Marker + ": 1\r\n", 421, ""},
		{"by the state of a trace", false, "ledger.mesh.internal", "Tracestate: sallyport=shadow\r\n", 421, ""},
		{"at a shadow as well", true, "ledger.mesh.internal", shadow.Marker + ": 1\r\n", 421, ""},
		{"that of a primary", false, "billing.mesh.internal", shadow.Marker + ": 1\r\nSallyport-Host: ledger.mesh.internal\r\n", 200, "billing.mesh.internal"},
		{"that of a primary, to a shadow", true, "billing.mesh.internal", shadow.Marker + ": 1\r\nSallyport-Host: ledger.mesh.internal\r\n", 200, "ledger.mesh.internal"},
		{"to a shadow, without the mark", true, "billing.mesh.internal", "Sallyport-Host: ledger.mesh.internal\r\n", 200, "billing.mesh.internal"},
		{"to a shadow, from outside of the mesh", true, "billing.mesh.internal", shadow.Marker + ": 1\r\nSallyport-Host: admin.test\r\n", 200, "billing.mesh.internal"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var seen atomic.Value
			seen.Store("")
			r := newRig(t, app(t, func(_ http.ResponseWriter, r *http.Request) { seen.Store(r.Host) }), func(r *rig) {
				r.inCfg.Name, r.inCfg.ShadowOnly = func() mesh.ServiceName { return "billing" }, tt.only
			})
			w := r.dialIn(r.web)
			w.say("GET /ok/1 HTTP/1.1\r\nHost: " + tt.host + "\r\nTraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n" + tt.more + "\r\n")
			if resp, _ := w.answer("GET"); resp.StatusCode != tt.status || seen.Load() != tt.seen {
				t.Errorf("status %d, the application saw %q; want %d and %q", resp.StatusCode, seen.Load(), tt.status, tt.seen)
			}
		})
	}
}
