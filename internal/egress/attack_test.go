package egress

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/mux"
)

// A tunnel was opened while its destination asked for no server name, and came
// to ask for one before the first bytes: then a hello without one must not pass.
func TestNameIsAskedForBeforeTheHello(t *testing.T) {
	w := newWorld(t, nil)
	tun, ref := dial1(w, billing, "nameless.test:443")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	s := *w.snap.Load()
	s.Destinations = append(s.Destinations[:0:0], s.Destinations...)
	for i := range s.Destinations {
		if s.Destinations[i].Host == "nameless.test" {
			s.Destinations[i].SNI = sniStrict
		}
	}
	w.use(&s)
	w.gw.Rejudge()
	if _, err := tun.Write(records(rebuild(realHello("x.test")), 16000)); err != nil {
		t.Fatal(err)
	}
	if got, _ := io.ReadAll(io.LimitReader(tun, 100)); strings.HasPrefix(string(got), "\x16") {
		t.Errorf("the destination answered: %q", got)
	}
	if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != string(ReasonRevoked) || end.BytesUp != 0 {
		t.Errorf("recorded %+v", end)
	}
}

// Rows may ask for the environment of the gateway, when a tunnel is judged again
// as when it is opened.
func TestRejudgeKnowsTheEnvironment(t *testing.T) {
	inProd := func(c *Config) {
		j, err := authz.NewJudge(authz.JudgeConfig{Audit: c.Audit, Log: c.Log, Environment: "prod"})
		if err != nil {
			t.Fatal(err)
		}
		c.Judge = j
	}
	w := newWorldIn(t, inProd)
	w.use(w.policy(strings.Replace(access, "host:db.test, *, CONNECT, -, -, allow", "host:db.test, *, CONNECT, -, env.name=prod, allow", 1), ""))
	tun, ref := dial1(w, billing, "db.test:5432")
	if ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	const guard = "p, frozen, out, **, host:db.test, *, CONNECT, -, env.name=prod, deny\n"
	w.use(w.policy(access+guard, ""))
	w.gw.Rejudge()
	if _, err := io.Copy(io.Discard, tun); err == nil {
		t.Error("a tunnel that a row denies in this environment ended in order")
	}
	if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != string(ReasonRevoked) {
		t.Errorf("recorded %+v", end)
	}
}

// newWorldIn is newWorld with a judge that change puts in place.
func newWorldIn(t *testing.T, change func(*Config)) *world {
	var judge *authz.Judge
	w := newWorld(t, func(c *Config) { change(c); judge = c.Judge })
	w.judge = judge
	w.use(w.snap.Load())
	return w
}

// A tunnel that leads to an endpoint ends when the destination moves to another
// port of the same address, or has no endpoints any more.
func TestRejudgeFollowsTheEndpoints(t *testing.T) {
	other := mesh.Outlet{Address: "127.0.0.1:9"}
	for name, ends := range map[string][]mesh.Outlet{"another port": {other}, "none": nil} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			tun, ref := dial1(w, billing, "db.test:5432")
			if ref != nil {
				t.Fatalf("refused: %+v", ref)
			}
			s := *w.snap.Load()
			s.Destinations = append(s.Destinations[:0:0], s.Destinations...)
			for i := range s.Destinations {
				if s.Destinations[i].Host == "db.test" {
					s.Destinations[i].Endpoints = ends
				}
			}
			w.use(&s)
			w.gw.Rejudge()
			if _, err := io.Copy(io.Discard, tun); err == nil {
				t.Error("the tunnel ended in order")
			}
			if end := w.until("close", kind(audit.KindEgressClose)); end.Reason != string(ReasonRevoked) {
				t.Errorf("recorded %+v", end)
			}
		})
	}
}

// What a caller wrote into a target by mistake, a password or a token, is not
// kept.
func TestTargetsAreRecordedWithoutSecrets(t *testing.T) {
	for _, req := range []string{
		"CONNECT alice:hunter2@api.stripe.test:443 HTTP/1.1\r\nHost: a.test\r\n\r\n",
		"CONNECT api.stripe.test?key=hunter2:443 HTTP/1.1\r\nHost: a.test\r\n\r\n",
		"GET http://alice:hunter2@api.stripe.test/ HTTP/1.1\r\nHost: api.stripe.test\r\n\r\n",
		"GET http://api.stripe.test/?key=hunter2 HTTP/1.1\r\nHost: api.stripe.test\r\n\r\n",
	} {
		w := newWorld(t, nil)
		c := w.open1(billing)
		if _, err := io.WriteString(c, req); err != nil {
			t.Fatal(err)
		}
		w.until(req, func(r audit.Record) bool { return r.Decision == audit.Deny })
		if strings.Contains(w.lines(), "hunter2") {
			t.Errorf("%q: recorded %s", req, w.lines())
		}
		c.Close()
	}
}

func TestConnectionsOfOneCaller(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.ConnsPerCaller = 2 })
	first := w.open1(billing)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ; w.gw.connections(billing) == 0; <-tick.C { // its handshake is over here before it is there
		if t.Context().Err() != nil {
			t.Fatal("it is not counted")
		}
	}
	if _, ref := dial1(w, billing, "db.test:5432"); ref != nil {
		t.Fatalf("refused: %+v", ref)
	}
	c := w.open1(billing)
	_, _ = io.WriteString(c, "CONNECT db.test:5432 HTTP/1.1\r\nHost: db.test:5432\r\n\r\n")
	if b, _ := io.ReadAll(c); len(b) > 0 {
		t.Errorf("a third connection was answered: %q", b)
	}
	rec := w.until("refusal", denial(ReasonConnCap))
	if rec.Src != billing.String() || rec.Peer == "" {
		t.Errorf("recorded %+v", rec)
	}
	if _, ref := dial1(w, inventory, "db.test:5432"); ref == nil || ref.status != 403 {
		t.Errorf("another caller got %+v", ref)
	}
	first.Close()
	w.until("room again", func(audit.Record) bool { return w.gw.connections(billing) < 2 })
	if _, ref := dial1(w, billing, "db.test:5432"); ref != nil {
		t.Errorf("after one was closed: %+v", ref)
	}
}

// connections is how many connections a caller has.
func (g *Gateway) connections(id spiffeid.ID) int {
	g.crowd.mu.Lock()
	defer g.crowd.mu.Unlock()
	if m := g.crowd.of[id]; m != nil {
		return m.conns
	}
	return 0
}

// Whoever reaches the port can fail a handshake. The records of that are few,
// and their sum is exact.
func TestFloodOfFailedHandshakes(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.Rejudge = 20 * time.Millisecond })
	const all = 3 * refusedBurst
	var dials sync.WaitGroup
	for range all { // at once: one by one they would wait for each other
		dials.Go(func() {
			c, err := net.Dial("tcp", w.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_, _ = io.WriteString(c, "not TLS at all\r\n\r\n")
			_, _ = io.Copy(io.Discard, c)
		})
	}
	dials.Wait()
	sum := func() (n, records int) {
		for _, r := range w.audit.Records() {
			if r.Kind != audit.KindTLS {
				continue
			}
			records++
			more := 1
			if r.Reason == "flood" {
				if _, err := fmt.Sscanf(r.Detail, "%d more", &more); err != nil {
					t.Fatal(err)
				}
			}
			n += more
		}
		return n, records
	}
	w.until("the sum", func(audit.Record) bool { n, _ := sum(); return n == all })
	if _, n := sum(); n > all-refusedBurst/2 {
		t.Errorf("%d records of %d refused connections", n, all)
	}
}

func TestFlood(t *testing.T) {
	var f flood
	now := time.Unix(1000, 0)
	for i := range refusedBurst {
		if held, ok := f.take(now); !ok || held != 0 {
			t.Fatalf("record %d: %d, %v", i, held, ok)
		}
	}
	for range 7 {
		if _, ok := f.take(now); ok {
			t.Fatal("more than a burst at once")
		}
	}
	if held, ok := f.take(now.Add(refusedEvery)); !ok || held != 7 {
		t.Errorf("after an interval: %d, %v", held, ok)
	}
	if _, ok := f.take(now.Add(refusedEvery)); ok || f.rest() != 1 || f.rest() != 0 {
		t.Error("the rest is not the one that was held")
	}
}

// An HTTP/2 caller that opens no window for the answer must not keep the stream
// and its goroutine: a refusal, or the alert at the end of a tunnel.
func TestCallersThatDoNotRead(t *testing.T) {
	hello := records(rebuild(realHello("api.stripe.test"), sniBytes("evil.test")), 16000)
	for name, authority := range map[string]string{"a refusal": "evil.test:443", "an alert": "api.stripe.test:443"} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(c *Config) { c.Limits.HelloTimeout = 300 * time.Millisecond })
			f, connect := w.framed(t, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
			connect(1, authority)
			if authority == "api.stripe.test:443" {
				_ = f.WriteData(1, false, hello)
			}
			for {
				fr, err := f.ReadFrame()
				if err != nil {
					t.Fatalf("the stream goes on: %v", err)
				}
				if _, ok := fr.(*http2.RSTStreamFrame); ok {
					return
				}
			}
		})
	}
}

// framed is a connection of billing to the gateway by HTTP/2, on which frames are
// written by hand, and what asks for a tunnel on it.
func (w *world) framed(t *testing.T, settings ...http2.Setting) (*http2.Framer, func(id uint32, authority string)) {
	t.Helper()
	c, err := tls.Dial("tcp", w.addr, w.client(billing, "h2"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	_, _ = io.WriteString(c, http2.ClientPreface)
	f := http2.NewFramer(c, c)
	_ = f.WriteSettings(settings...)
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	return f, func(id uint32, authority string) {
		block.Reset()
		_ = enc.WriteField(hpack.HeaderField{Name: ":method", Value: "CONNECT"})
		_ = enc.WriteField(hpack.HeaderField{Name: ":authority", Value: authority})
		_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndHeaders: true})
	}
}

// Requests of a caller that has just broken off many are broken off before anybody
// has decided on them.
func TestFloodCostsNoDecisions(t *testing.T) {
	w := newWorldOf(t, nil, func(g *Gateway) {
		wear(g)
		g.restOfWorn = time.Hour
	})
	f, connect := w.framed(t)
	for n := range brokenBurst {
		id := uint32(2*n + 1)
		connect(id, "db.test:5432")
		if f.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
			break // it was too much already
		}
	}
	var err error
	for err == nil {
		_, err = f.ReadFrame()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection goes on")
	}
	if strings.Contains(w.lines(), "db.test") {
		t.Errorf("decided on what was broken off: %s", w.lines())
	}
}

// What such a caller means is served.
func TestWornCallersAreServed(t *testing.T) {
	w := newWorldOf(t, nil, wear)
	for name, dial := range map[string]func(*world, spiffeid.ID, string) (clientTunnel, *refused){"h2": dial2, "http/1.1": dial1} {
		if _, ref := dial(w, billing, "db.test:5432"); ref != nil {
			t.Errorf("over %s: refused: %+v", name, ref)
		}
	}
}

// wear has most of the patience with a caller used up, for good.
func wear(g *Gateway) {
	g.calmOf = mux.NewCalm[spiffeid.ID](brokenBurst, 0)
	g.calmOf.Spend(billing, brokenBurst*3/5)
}

// TestHandshakesOfAWornSourceWait has an address from which much came to nothing: its
// next handshakes wait, and are made.
func TestHandshakesOfAWornSourceWait(t *testing.T) {
	const wait = costHandshake * time.Second / brokenRate
	const burst = 100 * brokenBurst // of which a slow machine gives back little
	source := mux.SourceOf(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	w := newWorldOf(t, nil, func(g *Gateway) {
		g.vain = mux.NewCalm[mux.Source](burst, brokenRate)
		g.vain.Spend(source, burst*9/10)
	})
	for range 3 {
		began := time.Now()
		tun, ref := dial1(w, billing, "db.test:5432")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		if took := time.Since(began); took < wait {
			t.Errorf("it waited %v, want %v at least", took, wait)
		}
		echoes(t, tun)
	}
}
