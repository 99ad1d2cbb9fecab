package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/meshtest"
)

// server accepts connections and hands them out.
func server(t *testing.T) (netip.AddrPort, <-chan net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	conns := make(chan net.Conn, 64)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conns <- c
		}
	}()
	return ln.Addr().(*net.TCPAddr).AddrPort(), conns
}

func get(t *testing.T, p *Pool, fresh bool) *Conn {
	t.Helper()
	c, err := p.Get(context.Background(), fresh)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPoolLendsTheConnectionUsedLast(t *testing.T) {
	addr, conns := server(t)
	p := NewLocal(addr, http1.Limits{})
	a, b := get(t, p, false), get(t, p, false)
	if a.Reused || b.Reused {
		t.Error("a dialled connection says that it was used before")
	}
	<-conns
	<-conns
	a.Put()
	b.Put()
	if c := get(t, p, false); c != b || !c.Reused {
		t.Errorf("got %p, want the connection that came back last, %p", c, b)
	}
	if c := get(t, p, true); c.Reused {
		t.Error("fresh lent a kept connection")
	}
	<-conns
}

// looking returns a pool of connections that do not find out themselves what
// became of them.
func looking(addr netip.AddrPort) *Pool {
	p := NewLocal(addr, http1.Limits{})
	p.connect = func(context.Context) (net.Conn, time.Time, error) {
		c, err := net.Dial("tcp", addr.String())
		return c, time.Time{}, err
	}
	return p
}

func TestPoolDropsWhatThePeerHasClosed(t *testing.T) {
	addr, conns := server(t)
	p := looking(addr)
	a := get(t, p, false)
	peer := <-conns
	a.Put()
	peer.Close()
	await(t, func() bool { return a.Stale() })
	if c := get(t, p, false); c == a || c.Reused {
		t.Error("lent a connection that the peer had closed")
	}
}

func TestPoolDropsWhatHasUnexpectedBytes(t *testing.T) {
	addr, conns := server(t)
	p := looking(addr)
	a := get(t, p, false)
	peer := <-conns
	a.Put()
	if _, err := peer.Write([]byte("HTTP/1.1 200 OK\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return a.Stale() })
	if c := get(t, p, false); c == a {
		t.Error("lent a connection on which an answer to nothing waits")
	}
}

// A connection that asks is lent without a look, since the exchange takes one
// before it sends anything.
func TestAStaleConnectionIsFoundOutUnused(t *testing.T) {
	for name, end := range map[string]func(peer net.Conn){
		"closed":           func(peer net.Conn) { peer.Close() },
		"answered nothing": func(peer net.Conn) { _, _ = peer.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) },
	} {
		for _, request := range []string{
			"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab",
			"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nab",
		} {
			addr, conns := server(t)
			p := NewLocal(addr, http1.Limits{})
			a := get(t, p, false)
			if !a.Asks() {
				t.Skip("connections here do not ask")
			}
			peer := <-conns
			a.Put()
			end(peer)
			await(t, func() bool { return a.Stale() })
			c := get(t, p, false)
			near, far := meshtest.Pipe()
			if _, err := far.Write([]byte(request)); err != nil {
				t.Fatal(err)
			}
			x := http1.Exchange{Down: http1.NewConn(near, http1.Limits{}), Up: c.Conn, Request: new(http1.Request)}
			if err := x.Down.ReadRequest(x.Request); err != nil {
				t.Fatal(err)
			}
			res, err := x.Run()
			if http1.FailedSide(err) != http1.Upstream || res.RequestBytesSent != 0 || res.ResponseSeen || !res.Replayable {
				t.Errorf("%s: %v, %+v; want a failure with nothing sent", name, err, res)
			}
		}
	}
}

// await asks until the kernel has delivered what was sent on loopback.
func await(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); {
		if time.Now().After(end) {
			t.Fatal("it did not happen")
		}
	}
}

func TestPoolDropsConnectionsOfAnOlderIdentity(t *testing.T) {
	addr, _ := server(t)
	gen := uint64(1)
	cfg := Config{Generation: func() uint64 { return gen }}
	p := newPool(cfg.withDefaults(), target{addr: addr})
	a := get(t, p, false)
	a.Put()
	gen++
	if c := get(t, p, false); c == a {
		t.Error("lent a connection made with the SVID of before")
	}
}

func TestPoolKeepsNoMoreThanItMay(t *testing.T) {
	addr, _ := server(t)
	cfg := Config{Generation: func() uint64 { return 0 }, MaxIdle: 1}
	p := newPool(cfg.withDefaults(), target{addr: addr})
	a, b := get(t, p, false), get(t, p, false)
	a.Put()
	b.Put()
	if n := len(p.idle); n != 1 || p.idle[0] != b {
		t.Errorf("kept %d connections, want the newest alone", n)
	}
	p.Close()
	get(t, p, false).Put()
	if len(p.idle) != 0 {
		t.Error("a closed pool keeps connections")
	}
}

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	billing = mesh.Service{Name: "billing", ID: spiffeid.RequireFromPath(td, "/billing"), Port: 8443, Protocol: "http"}
)

// services returns Services whose TLS fails at once: the tests below are about
// choosing, not about handshakes.
func services(t *testing.T, eps ...netip.AddrPort) *Services {
	t.Helper()
	s, err := New(Config{
		TLS: func(spiffeid.ID) *tls.Config {
			return &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { return errors.New("no") }}
		},
		Generation:     func() uint64 { return 0 },
		Standing:       func(tls.ConnectionState) error { return nil },
		ConnectTimeout: time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Use(snapshot(eps...))
	return s
}

func snapshot(eps ...netip.AddrPort) *mesh.Snapshot {
	s := &mesh.Snapshot{Services: []mesh.Service{billing}}
	for _, a := range eps {
		s.Endpoints = append(s.Endpoints, mesh.Endpoint{Service: "billing", Address: a})
	}
	return s
}

func TestServicesWithoutEndpoint(t *testing.T) {
	s := services(t)
	for _, name := range []mesh.ServiceName{"billing", "unknown"} {
		if _, err := s.Get(context.Background(), name, false); !errors.Is(err, ErrNoEndpoint) {
			t.Errorf("%s: got %v, want ErrNoEndpoint", name, err)
		}
	}
}

func TestServicesTryEveryEndpointOnce(t *testing.T) {
	closed := netip.MustParseAddrPort("127.0.0.1:1")
	other := netip.MustParseAddrPort("127.0.0.2:1")
	s := services(t, closed, other)
	_, err := s.Get(context.Background(), "billing", false)
	var ce *ConnectError
	if !errors.As(err, &ce) || ce.Service != "billing" {
		t.Fatalf("got %v, want a ConnectError for billing", err)
	}
	for tgt, p := range s.pools {
		if p.failures.Load() != 1 || p.restUntil.Load() == 0 {
			t.Errorf("%s: %d failures, want it tried once and resting", tgt.addr, p.failures.Load())
		}
	}
}

func TestUseKeepsThePoolsThatStay(t *testing.T) {
	a, b := netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.2:1")
	s := services(t, a, b)
	keep, drop := s.pools[target{a, billing.ID}], s.pools[target{b, billing.ID}]
	s.Use(snapshot(a))
	if s.pools[target{a, billing.ID}] != keep {
		t.Error("an endpoint that stayed lost its connections")
	}
	if !drop.closed {
		t.Error("the pool of an endpoint that went is still open")
	}
}

func TestNewNamesWhatIsMissing(t *testing.T) {
	_, err := New(Config{})
	if err == nil || err.Error() != "upstream: tls: missing\ngeneration: missing\nstanding: missing" {
		t.Errorf("got %v", err)
	}
}

func BenchmarkLocalPool(b *testing.B) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	p := NewLocal(ln.Addr().(*net.TCPAddr).AddrPort(), http1.Limits{})
	b.ReportAllocs()
	for b.Loop() {
		c, err := p.Get(context.Background(), false)
		if err != nil {
			b.Fatal(err)
		}
		c.Put()
	}
}

func TestPoolClosesWhatIsIdleForTooLong(t *testing.T) {
	addr, conns := server(t)
	p := NewLocal(addr, http1.Limits{})
	a, b := get(t, p, false), get(t, p, false)
	old := <-conns
	<-conns
	a.Put()
	b.Put()
	if p.timer == nil {
		t.Fatal("nothing watches over the idle connections")
	}
	p.mu.Lock()
	p.idle[0].idle = p.idle[0].idle.Add(-p.cfg.MaxIdleTime)
	p.mu.Unlock()
	p.sweep()
	if len(p.idle) != 1 || p.idle[0] != b || p.timer == nil {
		t.Errorf("kept %d connections, want the newer one and a timer for it", len(p.idle))
	}
	if _, err := old.Read(make([]byte, 1)); err == nil {
		t.Error("the older connection is still open")
	}
	p.mu.Lock()
	p.idle[0].idle = p.idle[0].idle.Add(-p.cfg.MaxIdleTime)
	p.mu.Unlock()
	if p.sweep(); len(p.idle) != 0 || p.timer != nil {
		t.Error("an empty pool still watches")
	}
}

func TestPoolDropsConnectionsWhosePeerHasExpired(t *testing.T) {
	addr, _ := server(t)
	p := NewLocal(addr, http1.Limits{})
	a := get(t, p, false)
	a.until = time.Now().Add(-time.Second)
	a.Put()
	if c := get(t, p, false); c == a {
		t.Error("lent a connection to a peer whose certificate has ended")
	}
}

func TestServicesAskThoseThatRestLast(t *testing.T) {
	good, conns := server(t)
	p := NewLocal(good, http1.Limits{})
	bad := NewLocal(netip.MustParseAddrPort("127.0.0.1:1"), http1.Limits{})
	s := &Services{known: map[mesh.ServiceName]*standing{}}
	g := s.groupOf("a", mesh.Routes{Balance: mesh.Balance{Policy: "round_robin"}}, []place{{pool: bad}, {pool: p}})
	get := func() (*Conn, error) { return g.lend(context.Background(), time.Now().UnixNano(), &Want{Fresh: true}) }
	start := time.Now()
	for range 8 {
		c, err := get()
		if err != nil {
			t.Fatal(err)
		}
		c.Discard()
		<-conns
	}
	if n, most := bad.failures.Load(), 1+int64(time.Since(start)/firstRest); n < 1 || int64(n) > most {
		t.Errorf("the endpoint that refuses was tried %d times, want once, or %d times in that time", n, most)
	}
	bad.restUntil.Store(0)
	g.all[0].rest.Store(0)
	g.all[1].rest.Store(time.Now().Add(time.Hour).UnixNano())
	c, err := get()
	if err != nil {
		t.Fatalf("one that rests was not asked when no other was left: %v", err)
	}
	c.Discard()
}

func TestClosedServicesKeepNothing(t *testing.T) {
	addr, _ := server(t)
	s := services(t)
	s.Close()
	s.Use(snapshot(addr, addr))
	if g := (*s.table.Load())["billing"]; len(g.all) != 1 {
		t.Errorf("one address makes %d endpoints", len(g.all))
	}
	for _, p := range s.pools {
		if !p.closed {
			t.Error("a pool made after Close keeps connections")
		}
	}
}
