package control

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"sallyport/internal/mesh"
)

func TestWhereAnEndpointMayStand(t *testing.T) {
	s := &Server{cfg: ServerConfig{Endpoints: []netip.Prefix{
		netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("2001:db8:1::/48"), netip.MustParsePrefix("127.0.0.0/8"),
	}}, machine: func() ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}, nil
	}}
	for _, tt := range []struct {
		name, at, from string
		want           bool
	}{
		{"where it comes from", "203.0.113.5", "203.0.113.5", true},
		{"where it comes from, in the form of IPv6", "::ffff:203.0.113.5", "203.0.113.5", true},
		{"where it comes from, seen in the form of IPv6", "203.0.113.5", "::ffff:203.0.113.5", true},
		{"where it comes from by IPv6", "2001:db8:2::5", "2001:db8:2::5", true},
		{"a neighbour", "203.0.113.6", "203.0.113.5", false},
		{"a neighbour by IPv6", "2001:db8:2::6", "2001:db8:2::5", false},
		{"the other family", "203.0.113.5", "2001:db8:2::5", false},
		{"an allowed network", "10.1.2.3", "203.0.113.5", true},
		{"an allowed network, in the form of IPv6", "::ffff:10.1.2.3", "203.0.113.5", true},
		{"an allowed network of IPv6", "2001:db8:1::9", "203.0.113.5", true},
		{"beside an allowed network", "10.2.0.1", "203.0.113.5", false},
		{"the issuer itself", "192.0.2.1", "203.0.113.5", false},
		{"loopback from elsewhere, though allowed", "127.0.0.1", "203.0.113.5", false},
		{"loopback of IPv6 from elsewhere", "::1", "203.0.113.5", false},
		{"loopback in the form of IPv6 from elsewhere", "::ffff:127.0.0.1", "203.0.113.5", false},
		{"loopback from the issuer's machine", "127.0.0.2", "127.0.0.1", true},
		{"loopback from the issuer's machine by its other address", "127.0.0.1", "192.0.2.1", true},
		{"the issuer's machine from its loopback", "192.0.2.1", "127.0.0.1", true},
		{"the issuer's machine by IPv6 from its loopback", "2001:db8::1", "::1", true},
		{"elsewhere from the issuer's machine", "203.0.113.5", "127.0.0.1", false},
	} {
		may, err := s.mayStand(netip.MustParseAddr(tt.at), netip.MustParseAddr(tt.from))
		if err != nil || may != tt.want {
			t.Errorf("%s: %s from %s: %v, %v, want %v", tt.name, tt.at, tt.from, may, err, tt.want)
		}
	}
	if may, err := s.mayStand(netip.MustParseAddr("203.0.113.5"), netip.Addr{}); may || err != nil {
		t.Errorf("from nowhere: %v, %v", may, err)
	}
	s.machine = func() ([]netip.Addr, error) { return nil, errBroken }
	if may, err := s.mayStand(netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.1")); !may || err != nil {
		t.Errorf("a machine that does not tell its addresses, the same: %v, %v", may, err)
	}
	if may, err := s.mayStand(netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.1")); may || !errors.Is(err, errBroken) {
		t.Errorf("a machine that does not tell its addresses: %v, %v", may, err)
	}
}

// refusedOnce subscribes until the issuer has said no, and returns why.
func refusedOnce(t *testing.T, c *Client, h Hello) (why error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h.OnState = func(err error) {
		if why == nil {
			why = err
		}
		cancel()
	}
	if err := c.Subscribe(ctx, h, newWatcher()); err != nil {
		t.Errorf("Subscribe: %v", err)
	}
	return why
}

func TestAForeignEndpointIsRefusedAndRecorded(t *testing.T) {
	var told []Announcement
	broken := false
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		c.OnAnnounce = func(_ context.Context, a Announcement) error {
			told = append(told, a)
			if broken {
				return errBroken
			}
			return nil
		}
	})
	c, _ := r.joined("node-b")
	h := billingHello()
	foreign := netip.MustParseAddrPort("203.0.113.5:15006") // documentation: no machine has it
	h.Endpoints = []mesh.Endpoint{{Service: "billing", Address: foreign}}
	err := refusedOnce(t, c, h)
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), `endpoint of billing at 203.0.113.5:15006: this proxy comes from 127.0.0.1, not from there; next: `) ||
		!strings.Contains(err.Error(), `endpoints.allow: ["203.0.113.5/32"]`) {
		t.Errorf("refused with %v", err)
	}
	if len(told) != 1 || told[0].Agent != agentID("node-b") || told[0].Workload != billing || told[0].Service != "billing" || told[0].Address != foreign || !strings.HasPrefix(told[0].Peer, "127.0.0.1:") {
		t.Errorf("recorded %+v", told)
	}
	if n := read(r.reg, func() int { return len(r.reg.announced) }); n != 0 {
		t.Errorf("%d endpoints are announced", n)
	}
	broken = true
	if err := refusedOnce(t, c, h); err == nil || strings.Contains(err.Error(), "endpoints.allow") {
		t.Errorf("without a record the proxy is told %v", err)
	}
}

func TestRefusedEndpointsAreRecordedAtABoundedRate(t *testing.T) {
	records := 0
	r := newRig(t, newCA(t, td), func(c *ServerConfig) {
		c.OnAnnounce = func(context.Context, Announcement) error { records++; return nil }
	})
	e := mesh.Endpoint{Service: "billing", Address: netip.MustParseAddrPort("203.0.113.5:15006"), Agent: agentID("node-b")}
	var err error
	for range 3 * refusalBurst {
		err = r.srv.checkAddress(t.Context(), e, billing)
	}
	if records < refusalBurst || records > 2*refusalBurst || !strings.Contains(err.Error(), "try again in") {
		t.Errorf("%d records, at last %v", records, err)
	}
}

func TestAnAllowedEndpointIsAnnounced(t *testing.T) {
	r := newRig(t, newCA(t, td), func(c *ServerConfig) { c.Endpoints = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")} })
	c, _ := r.joined("node-b")
	h := billingHello()
	h.Endpoints[0].Address = netip.MustParseAddrPort("203.0.113.5:15006")
	w := newWatcher()
	subscribe(t, c, h, w)
	recv(t, "snapshot", w.snaps)
	e := h.Endpoints[0]
	e.Agent = agentID("node-b")
	if n := read(r.reg, func() int { return r.reg.announced[e] }); n != 1 {
		t.Errorf("announced %d times, want once", n)
	}
}
