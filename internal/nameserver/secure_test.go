package nameserver

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/meshtest"
	"sallyport/internal/svid"
)

var gatewayID = spiffeid.RequireFromPath(td, "/ns/edge/sa/gateway")

// A secured is a rig whose gateway answers over TLS.
type secured struct {
	*rig
	ca       *meshtest.CA
	dot, doh string
	standing atomic.Pointer[error]
}

func newSecured(t *testing.T, change func(*Config)) *secured {
	t.Helper()
	s := &secured{rig: newRig(t, func(c *Config) {
		c.Mesh = false
		if change != nil {
			change(c)
		}
	}), ca: meshtest.NewCA(t, td)}
	member := func(id spiffeid.ID) error {
		if !id.MemberOf(td) {
			return errors.New("a stranger")
		}
		return nil
	}
	standing := func(tls.ConnectionState) error {
		if err := s.standing.Load(); err != nil {
			return *err
		}
		return nil
	}
	source := meshtest.Source(t, s.ca, gatewayID)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 2)
	listen := func(serve func(net.Listener) error) string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() { done <- serve(ln) }()
		return ln.Addr().String()
	}
	s.dot = listen(func(ln net.Listener) error { return s.ServeTLS(ctx, ln, svid.ServerTLS(source, member, DoT), standing) })
	s.doh = listen(func(ln net.Listener) error { return s.ServeHTTPS(ctx, ln, svid.ServerTLS(source, member), standing) })
	t.Cleanup(func() {
		stop()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	return s
}

func (s *secured) as(id spiffeid.ID, alpn ...string) *tls.Config {
	return svid.ClientTLS(meshtest.Source(s.t, s.ca, id), gatewayID, alpn...)
}

func TestDoT(t *testing.T) {
	s := newSecured(t, nil)
	for _, tt := range []struct {
		why, want string
		conf      *tls.Config
	}{
		{"who may", "NOERROR | 247.", s.as(payment, DoT)},
		{"without ALPN", "NOERROR | 247.", s.as(payment)},
		{"who may not", "NXDOMAIN | SOA of . | EDE 18: no row lets this workload reach it", s.as(web, DoT)},
		{"no certificate", "", &tls.Config{InsecureSkipVerify: true}},
		{"a foreign one", "", svid.ClientTLS(meshtest.Source(t, meshtest.NewCA(t, td), payment), gatewayID)},
		{"another protocol", "", s.as(payment, "h2")},
	} {
		c := &dns.Client{Net: "tcp-tls", TLSConfig: tt.conf, Timeout: patience}
		m, _, err := c.Exchange(ask("api.example.com.", dns.TypeA, 1232), s.dot)
		if (err == nil) != (tt.want != "") || err == nil && !strings.HasPrefix(short(m), tt.want) {
			t.Errorf("%s: %s, %v; want %q", tt.why, short(m), err, tt.want)
		}
	}
	c := &dns.Client{Net: "tcp-tls", TLSConfig: s.as(payment, DoT), Timeout: patience}
	conn, err := c.Dial(s.dot)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, _, err := c.ExchangeWithConn(ask("api.example.com.", dns.TypeA, 0), conn); err != nil {
		t.Fatal(err)
	}
	revoked := errors.New("revoked")
	s.standing.Store(&revoked)
	if m, _, err := c.ExchangeWithConn(ask("api.example.com.", dns.TypeA, 0), conn); err == nil {
		t.Errorf("whose SVID was revoked is answered on an open connection: %s", short(m))
	}
}

func TestDoH(t *testing.T) {
	s := newSecured(t, nil)
	client := func(conf *tls.Config) *http.Client {
		tr := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr, Timeout: patience}
	}
	pay := client(s.as(payment, "h2", "http/1.1"))
	q := ask("api.example.com.", dns.TypeA, 0)
	q.Id = 0
	in := pack(t, q)
	evil := ask("evil.example.", dns.TypeA, 0)
	url := "https://" + s.doh + "/dns-query"
	for _, tt := range []struct {
		why, method, url, media string
		body                    []byte
		client                  *http.Client
		status                  int
		want, fresh             string
	}{
		{"POST", "POST", url, mediaType, in, pay, 200, "NOERROR | 247.", "max-age=30"},
		{"GET", "GET", url + "?dns=" + base64.RawURLEncoding.EncodeToString(in), "", nil, pay, 200, "NOERROR | 247.", "max-age=30"},
		{"over HTTP/1.1", "POST", url, mediaType, in, client(s.as(payment, "http/1.1")), 200, "NOERROR | 247.", "max-age=30"},
		{"a denied name", "POST", url, mediaType, pack(t, evil), pay, 200, "NXDOMAIN | SOA of .", "max-age=5"},
		{"who may not", "POST", url, mediaType, in, client(s.as(web, "h2")), 200, "NXDOMAIN | SOA of .", "max-age=5"},
		{"no good question", "POST", url, mediaType, append(bytes.Clone(in), 0), pay, 200, "FORMERR", "max-age=0"},
		{"an answer", "POST", url, mediaType, append([]byte{0, 0, 0x80}, in[3:]...), pay, 400, "", ""},
		{"half a header", "POST", url, mediaType, in[:5], pay, 400, "", ""},
		{"too long", "POST", url, mediaType, make([]byte, room+1), pay, 413, "", ""},
		{"another type", "POST", url, "text/plain", in, pay, 415, "", ""},
		{"PUT", "PUT", url, mediaType, in, pay, 405, "", ""},
		{"another path", "POST", "https://" + s.doh + "/", mediaType, in, pay, 404, "", ""},
		{"padding in base64", "GET", url + "?dns=" + base64.URLEncoding.EncodeToString(in) + "=", "", nil, pay, 400, "", ""},
		{"no question", "GET", url, "", nil, pay, 400, "", ""},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, tt.url, bytes.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", tt.media)
		resp, err := tt.client.Do(req)
		if err != nil {
			t.Errorf("%s: %v", tt.why, err)
			continue
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != tt.status {
			t.Errorf("%s: %d, %v; want %d", tt.why, resp.StatusCode, err, tt.status)
			continue
		}
		if tt.status != 200 {
			continue
		}
		if got := short(unpack(t, body)); !strings.HasPrefix(got, tt.want) || resp.Header.Get("Cache-Control") != tt.fresh || resp.Header.Get("Content-Type") != mediaType {
			t.Errorf("%s: %s, %v", tt.why, got, resp.Header)
		}
	}
	if _, err := client(&tls.Config{InsecureSkipVerify: true}).Get(url); err == nil {
		t.Error("who shows no certificate is answered")
	}
	revoked := errors.New("revoked")
	s.standing.Store(&revoked)
	resp, err := pay.Post(url, mediaType, bytes.NewReader(in))
	if err == nil {
		resp.Body.Close()
	}
	if err != nil || resp.StatusCode != 403 {
		t.Errorf("whose SVID was revoked: %v, %v", resp, err)
	}
}

// TestGateways has a sidecar told addresses by a gateway, which it then knows the
// host of.
func TestGateways(t *testing.T) {
	var fails atomic.Pointer[error] // read where a question is answered
	fail := func(err error) { fails.Store(&err) }
	fail(nil)
	s := newSecured(t, func(c *Config) {
		c.Real = func(context.Context, spiffeid.ID, string) ([]netip.Addr, time.Duration, error) {
			return []netip.Addr{netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("2001:db8::7")}, 30 * time.Second, *fails.Load()
		}
	})
	z := *s.zone.Load() // it is served already: another in its place
	z.real = []string{"real.example.com"}
	s.zone.Store(&z)
	g := &Gateways{Addresses: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort(s.dot)}, TLS: func() *tls.Config { return s.as(payment, DoT) }}
	addrs, ttl, err := g.Lookup(t.Context(), payment, "real.example.com")
	if err != nil || len(addrs) != 2 || ttl != 30*time.Second {
		t.Fatalf("%v for %s, %v", addrs, ttl, err)
	}
	for _, a := range append(addrs, netip.AddrFrom16(addrs[0].As16())) {
		if host, ok := g.Host(a); !ok || host != "real.example.com" {
			t.Errorf("%s was told for %q", a, host)
		}
	}
	if host, ok := g.Host(netip.MustParseAddr("203.0.113.8")); ok {
		t.Errorf("another address was told for %q", host)
	}
	if _, _, err := g.Lookup(t.Context(), payment, "evil.example"); !errors.Is(err, ErrAbsent) {
		t.Errorf("a name that the gateway denies: %v", err)
	}
	fail(ErrBudget)
	if _, _, err := g.Lookup(t.Context(), payment, "real.example.com"); !errors.Is(err, ErrBudget) {
		t.Errorf("a name beyond the budget: %v", err)
	}
	sidecar := newRig(t, func(c *Config) { c.Real = g.Lookup })
	sidecar.zone.Load().real = z.real
	m, _ := sidecar.both(payment, pack(t, ask("real.example.com.", dns.TypeA, 1232)))
	if got, want := short(m), "NXDOMAIN | SOA of . | EDE 17: budget.names of the destination is used up"; got != want {
		t.Errorf("a name beyond the budget, through a sidecar: %s, want %s", got, want)
	}
	if got := sidecar.recorded(); len(got) != 1 || !strings.HasPrefix(got[0], "deny host:real.example.com name_budget") {
		t.Errorf("the sidecar recorded %q", got)
	}
	fail(errors.New("down"))
	if _, _, err := g.Lookup(t.Context(), payment, "real.example.com"); err == nil || errors.Is(err, ErrAbsent) {
		t.Errorf("a gateway that cannot look it up: %v", err)
	}
	g.TLS = func() *tls.Config { return svid.ClientTLS(meshtest.Source(t, s.ca, payment), web, DoT) }
	if _, _, err := g.Lookup(t.Context(), payment, "real.example.com"); err == nil {
		t.Error("whoever answers is believed")
	}
}

// TestAnAddressIsOfOneHost has hosts point at what is another's.
func TestAnAddressIsOfOneHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := netip.MustParseAddr
		endpoint := at("203.0.113.1")
		g := &Gateways{Inside: func(a netip.Addr) bool { return a == endpoint }}
		for _, step := range []struct {
			host string
			asks []netip.Addr
			told []netip.Addr
		}{
			{"b.example", []netip.Addr{at("203.0.113.7")}, []netip.Addr{at("203.0.113.7")}},
			{"a.example", []netip.Addr{at("203.0.113.7"), at("203.0.113.8"), endpoint}, []netip.Addr{at("203.0.113.8")}},
			{"a.example", []netip.Addr{at("203.0.113.7")}, nil},
			{"b.example", []netip.Addr{at("203.0.113.7")}, []netip.Addr{at("203.0.113.7")}},
		} {
			if told := g.bind(step.asks, step.host, time.Second); !slices.Equal(told, step.told) {
				t.Errorf("%s was told %s, want %s", step.host, told, step.told)
			}
		}
		if host, ok := g.Host(at("203.0.113.7")); !ok || host != "b.example" {
			t.Errorf("the address of b.example is of %q", host)
		}
		endpoint = at("203.0.113.7") // it joined later
		if host, ok := g.Host(endpoint); ok {
			t.Errorf("the address of an endpoint is of %q", host)
		}
		endpoint = netip.Addr{}
		time.Sleep(boundBeyond + time.Second)
		if told := g.bind([]netip.Addr{at("203.0.113.7")}, "a.example", time.Second); len(told) != 1 {
			t.Error("an address that nobody has any more was not told")
		}
	})
}
