package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// dnsServer answers on one loopback port over UDP and TCP.
type dnsServer struct {
	addr   netip.AddrPort
	asked  atomic.Int64
	overT  atomic.Int64
	mu     sync.Mutex // guards answer
	answer func(q dns.Question, m *dns.Msg, udp bool)
}

func (s *dnsServer) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	s.asked.Add(1)
	_, udp := w.LocalAddr().(*net.UDPAddr)
	if !udp {
		s.overT.Add(1)
	}
	m := new(dns.Msg)
	m.SetReply(r)
	s.mu.Lock()
	s.answer(r.Question[0], m, udp)
	s.mu.Unlock()
	if m.Opcode == dns.OpcodeUpdate { // the test's sign for: say nothing
		return
	}
	_ = w.WriteMsg(m)
}

func silent(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }

// rrs adds records; "@" stands for the question's own name.
func rrs(q dns.Question, m *dns.Msg, lines ...string) {
	for _, l := range lines {
		rr, err := dns.NewRR(strings.Replace(l, "@", q.Name, 1))
		if err != nil {
			panic(err)
		}
		m.Answer = append(m.Answer, rr)
	}
}

func (s *dnsServer) set(f func(q dns.Question, m *dns.Msg, udp bool)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = f
}

func startDNS(t testing.TB, f func(q dns.Question, m *dns.Msg, udp bool)) *dnsServer {
	t.Helper()
	s := &dnsServer{answer: f}
	var pc net.PacketConn
	var ln net.Listener
	for try := 0; pc == nil; try++ {
		var err error
		if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		s.addr = ln.Addr().(*net.TCPAddr).AddrPort()
		if pc, err = net.ListenPacket("udp", s.addr.String()); err != nil {
			pc = nil
			ln.Close() // another took the port for UDP
			if try == 20 {
				t.Fatal(err)
			}
		}
	}
	for _, srv := range []*dns.Server{{PacketConn: pc, Handler: s}, {Listener: ln, Handler: s}} {
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		go srv.ActivateAndServe()
		<-started
		t.Cleanup(func() { srv.Shutdown() })
	}
	return s
}

func (s *dnsServer) resolver(t testing.TB, c ResolverConfig) *Resolver {
	t.Helper()
	if c.Servers == nil {
		c.Servers = []Server{{Addr: s.addr}}
	}
	r, err := NewResolver(c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func lookup(t *testing.T, r *Resolver, name string) string {
	t.Helper()
	addrs, err := r.Lookup(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(addrs)
}

func TestLookup(t *testing.T) {
	tests := []struct {
		name   string
		answer func(q dns.Question, m *dns.Msg, udp bool)
		want   string // "" is any error, "none" is ErrNoHost
	}{
		{"IPv4 and IPv6", func(q dns.Question, m *dns.Msg, _ bool) {
			if q.Qtype == dns.TypeA {
				rrs(q, m, "@ 60 IN A 1.1.1.1", "@ 60 IN A 10.0.0.1")
			} else {
				rrs(q, m, "@ 60 IN AAAA 2606:4700::1")
			}
		}, "[2606:4700::1 1.1.1.1 10.0.0.1]"},
		{"row 63: IPv6 only", func(q dns.Question, m *dns.Msg, _ bool) {
			if q.Qtype == dns.TypeAAAA {
				rrs(q, m, "@ 60 IN AAAA 2606:4700::1")
			}
		}, "[2606:4700::1]"},
		{"an answer of the other type is not looked at", func(q dns.Question, m *dns.Msg, _ bool) {
			rrs(q, m, "@ 60 IN A 1.1.1.1")
		}, "[1.1.1.1]"},
		{"a chain of CNAMEs in the answer", func(q dns.Question, m *dns.Msg, _ bool) {
			if q.Qtype == dns.TypeA {
				rrs(q, m, "@ 60 IN CNAME a.cdn.example.", "b.cdn.example. 60 IN A 1.1.1.2", "A.cdn.example. 60 IN CNAME b.cdn.example.")
			}
		}, "[1.1.1.2]"},
		{"addresses of other owners are not looked at", func(q dns.Question, m *dns.Msg, _ bool) {
			rrs(q, m, "other.example. 60 IN A 6.6.6.6", "@ 60 IN TXT x")
		}, "none"},
		{"additional records are not looked at", func(q dns.Question, m *dns.Msg, _ bool) {
			rrs(q, m, "@ 60 IN A 6.6.6.6")
			m.Extra, m.Answer = m.Answer, nil
		}, "none"},
		{"a CNAME that leads nowhere", func(q dns.Question, m *dns.Msg, _ bool) {
			rrs(q, m, "@ 60 IN CNAME gone.example.", "x.example. 60 IN A 6.6.6.6")
		}, "none"},
		{"a loop of CNAMEs", func(q dns.Question, m *dns.Msg, _ bool) {
			rrs(q, m, "@ 60 IN CNAME a.example.", "a.example. 60 IN CNAME "+q.Name)
		}, ""},
		{"two CNAMEs of one owner", func(q dns.Question, m *dns.Msg, _ bool) {
			rrs(q, m, "@ 60 IN CNAME a.example.", "@ 60 IN CNAME b.example.")
		}, ""},
		{"a name that does not exist", func(q dns.Question, m *dns.Msg, _ bool) { m.Rcode = dns.RcodeNameError }, "none"},
		{"no data", func(q dns.Question, m *dns.Msg, _ bool) {}, "none"},
		{"SERVFAIL", func(q dns.Question, m *dns.Msg, _ bool) { m.Rcode = dns.RcodeServerFailure }, ""},
		{"REFUSED", func(q dns.Question, m *dns.Msg, _ bool) { m.Rcode = dns.RcodeRefused }, ""},
		{"SERVFAIL that carries an address", func(q dns.Question, m *dns.Msg, _ bool) {
			m.Rcode = dns.RcodeServerFailure
			rrs(q, m, "@ 60 IN A 6.6.6.6")
		}, ""},
		{"no A, and SERVFAIL for AAAA", func(q dns.Question, m *dns.Msg, _ bool) {
			if q.Qtype == dns.TypeAAAA {
				m.Rcode = dns.RcodeServerFailure
			}
		}, ""},
		{"an A, and SERVFAIL for AAAA", func(q dns.Question, m *dns.Msg, _ bool) {
			if q.Qtype == dns.TypeAAAA {
				m.Rcode = dns.RcodeServerFailure
			} else {
				rrs(q, m, "@ 60 IN A 1.1.1.1")
			}
		}, "[1.1.1.1]"},
		{"cut off over UDP", func(q dns.Question, m *dns.Msg, udp bool) {
			m.Truncated = udp
			if !udp && q.Qtype == dns.TypeA {
				rrs(q, m, "@ 60 IN A 1.1.1.1")
			}
		}, "[1.1.1.1]"},
		{"row 99: the case of the name not repeated over UDP", func(q dns.Question, m *dns.Msg, udp bool) {
			if udp {
				m.Question[0].Name = strings.ToUpper(q.Name)
				if q.Name == m.Question[0].Name {
					m.Question[0].Name = strings.ToLower(q.Name)
				}
				rrs(q, m, "@ 60 IN A 6.6.6.6")
			} else if q.Qtype == dns.TypeA {
				rrs(q, m, "@ 60 IN A 1.1.1.1")
			}
		}, "[1.1.1.1]"},
		{"row 99: another question answered", func(q dns.Question, m *dns.Msg, _ bool) {
			m.Question[0].Name = "evil.example."
			rrs(q, m, "@ 60 IN A 6.6.6.6")
		}, ""},
		{"silence over UDP", func(q dns.Question, m *dns.Msg, udp bool) { silent(m) }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := startDNS(t, tt.answer)
			timeout := 10 * time.Second
			if tt.want == "" { // only here may a server say nothing
				timeout = 200 * time.Millisecond
			}
			r := s.resolver(t, ResolverConfig{Timeout: timeout})
			addrs, err := r.Lookup(t.Context(), "api.example.com")
			switch {
			case tt.want == "" && (err == nil || errors.Is(err, ErrNoHost)):
				t.Errorf("got %v, %v; want an error that is not absence", addrs, err)
			case tt.want == "none" && !errors.Is(err, ErrNoHost):
				t.Errorf("got %v, %v; want ErrNoHost", addrs, err)
			case tt.want != "" && tt.want != "none" && fmt.Sprint(addrs) != tt.want:
				t.Errorf("got %v, %v; want %s", addrs, err, tt.want)
			}
		})
	}
}

func TestLookupOverTCPOnly(t *testing.T) {
	s := startDNS(t, func(q dns.Question, m *dns.Msg, _ bool) { rrs(q, m, "@ 60 IN A 1.1.1.1") })
	r := s.resolver(t, ResolverConfig{Servers: []Server{{Addr: s.addr, Net: "tcp"}}})
	if got := lookup(t, r, "api.example.com"); got != "[1.1.1.1]" || s.overT.Load() != s.asked.Load() {
		t.Errorf("got %s, %d of %d over TCP", got, s.overT.Load(), s.asked.Load())
	}
}

func TestLookupAsksTheNextServer(t *testing.T) {
	bad := startDNS(t, func(_ dns.Question, m *dns.Msg, _ bool) { m.Rcode = dns.RcodeServerFailure })
	good := startDNS(t, func(q dns.Question, m *dns.Msg, _ bool) { rrs(q, m, "@ 60 IN A 1.1.1.1") })
	r := good.resolver(t, ResolverConfig{Servers: []Server{{Addr: bad.addr}, {Addr: good.addr}}})
	if got := lookup(t, r, "api.example.com"); got != "[1.1.1.1]" {
		t.Errorf("got %s", got)
	}
}

func TestLookupRemembers(t *testing.T) {
	tests := []struct {
		ttl  int
		kept time.Duration
	}{{0, 5 * time.Second}, {60, 60 * time.Second}, {86400, 300 * time.Second}}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("for TTL %d", tt.ttl), func(t *testing.T) {
			ip := "1.1.1.1"
			s := startDNS(t, func(q dns.Question, m *dns.Msg, _ bool) {
				if q.Qtype == dns.TypeA {
					rrs(q, m, fmt.Sprintf("@ %d IN A %s", tt.ttl, ip))
				}
			})
			r := s.resolver(t, ResolverConfig{})
			now := time.Now()
			r.now = func() time.Time { return now }
			first := lookup(t, r, "api.example.com")
			s.set(func(q dns.Question, m *dns.Msg, _ bool) {
				if q.Qtype == dns.TypeA {
					rrs(q, m, "@ 60 IN A 127.0.0.1")
				}
			})
			now = now.Add(tt.kept - time.Millisecond)
			if got := lookup(t, r, "api.example.com"); got != first {
				t.Errorf("row 60: within the TTL the answer went from %s to %s", first, got)
			}
			now = now.Add(time.Millisecond)
			if got := lookup(t, r, "api.example.com"); got != "[127.0.0.1]" {
				t.Errorf("after the TTL still %s", got)
			}
		})
	}
}

func TestLookupForgetsWhenFull(t *testing.T) {
	s := startDNS(t, func(q dns.Question, m *dns.Msg, _ bool) { rrs(q, m, "@ 60 IN A 1.1.1.1") })
	r := s.resolver(t, ResolverConfig{Names: 3})
	for i := range 10 {
		lookup(t, r, fmt.Sprintf("n%d.example.com", i))
	}
	if len(r.cache) != 3 {
		t.Errorf("%d names kept, want 3", len(r.cache))
	}
}

func TestLookupAsksOnceForMany(t *testing.T) {
	release := make(chan struct{})
	s := startDNS(t, func(q dns.Question, m *dns.Msg, _ bool) {
		<-release
		rrs(q, m, "@ 60 IN A 1.1.1.1")
	})
	r := s.resolver(t, ResolverConfig{Timeout: time.Minute}) // who asks again counts twice
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Lookup(gone, "api.example.com"); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that left got %v", err)
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { _, _ = r.Lookup(t.Context(), "api.example.com") })
	}
	close(release)
	wg.Wait()
	if got := lookup(t, r, "api.example.com"); got != "[1.1.1.1]" || s.asked.Load() != 2 {
		t.Errorf("got %s after %d questions, want 2", got, s.asked.Load())
	}
}
