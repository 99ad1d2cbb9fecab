package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/nameserver"
	"sallyport/internal/svid"
)

// NamesConfig has the workload's DNS questions answered here, by the policy and
// without asking anybody: services and hosts outside that rows let it reach have
// virtual addresses, all else does not exist. With capture, or --isolate,
// whatever the workload asks of any DNS server arrives here; otherwise
// resolv.conf must name Listen. Without Listen nothing is answered.
type NamesConfig struct {
	// Listen is host:port on loopback, for UDP and TCP, by custom
	// 127.0.0.1:15053.
	Listen netip.AddrPort `yaml:"listen"`
	// IPv4Only gives no virtual addresses of IPv6. Default: no, where the machine
	// has IPv6.
	IPv4Only bool `yaml:"ipv4_only"`
	// Search are the suffixes that the workload's resolver appends to names.
	// Default: those in /etc/resolv.conf.
	Search []string `yaml:"search"`
	// PerPattern is how many names below one pattern the workload may use in a
	// day. Default 1024.
	PerPattern int `yaml:"per_pattern"`
	// Label is the longest label that stands for the star of a pattern, 1 to 63.
	// Default 63.
	Label int `yaml:"label"`
	// Rate is how many questions a second the workload may ask, and how many at
	// once, up to 1000000; what is beyond gets no answer. Default: any number.
	Rate int `yaml:"rate"`
	// Gateways are where gateways serve DNS over TLS, asked in turn for the
	// addresses of hosts whose destination says dns: real. They prove
	// egress.gateway. Without them such hosts have virtual addresses, too.
	Gateways []netip.AddrPort `yaml:"gateways"`
	// SelfTest is "on", or "off" to be ready also when the questions of the
	// system's resolver do not arrive here. Default "on".
	SelfTest string `yaml:"self_test"`
}

// Validate reports every mistake by the name of its field.
func (c *Config) validateNames() error {
	n := c.Names
	var errs []error
	bad := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("names.%s: "+format, append([]any{field}, args...)...))
	}
	if n.Listen.IsValid() {
		switch {
		case !n.Listen.Addr().IsLoopback():
			bad("listen", "%s is not a loopback address; only programs on this machine may ask", n.Listen)
		case c.Capture.Enabled() && (n.Listen.Addr() != netip.AddrFrom4([4]byte{127, 0, 0, 1}) || n.Listen.Port() == 0):
			bad("listen", `is where captured questions arrive; write "127.0.0.1:15053"`)
		case n.Listen == c.Outbound.Listen:
			bad("listen", "%s is outbound.listen", n.Listen)
		}
	}
	for i, s := range n.Search {
		if err := mesh.CheckHost(s); err != nil {
			bad(fmt.Sprintf("search[%d]", i), "%w", err)
		}
	}
	if len(n.Gateways) > 0 && len(c.Egress.Addresses) == 0 {
		bad("gateways", "are asked for hosts outside, and egress.addresses names no way there")
	}
	if n.PerPattern < 0 || n.PerPattern > 1<<15 {
		bad("per_pattern", "%d is not between 1 and %d; leave it out for the default", n.PerPattern, 1<<15)
	}
	if n.Label < 0 || n.Label > 63 {
		bad("label", "%d is not between 1 and 63; leave it out for the default", n.Label)
	}
	if n.Rate < 0 || n.Rate > 1_000_000 {
		bad("rate", "%d is not between 1 and 1000000; leave it out for any number", n.Rate)
	}
	if s := n.SelfTest; s != "" && s != "on" && s != "off" {
		bad("self_test", "%q is neither on nor off", s)
	}
	return errors.Join(errs...)
}

// resolvConf is what the system's resolver reads.
const resolvConf = "/etc/resolv.conf"

// openNames makes what answers the workload's questions, if anything does.
func (s *sidecar) openNames() error {
	c := s.cfg.Names
	if !c.Listen.IsValid() {
		return nil
	}
	search := c.Search
	if len(search) == 0 {
		r, err := nameserver.SystemResolver(resolvConf)
		if err != nil {
			return err
		}
		search = r.Search
	}
	conf := nameserver.Config{
		Book: s.addresses, Record: s.audit.Append, Log: s.log, Metrics: s.metrics, Tracer: s.tracer, IPv4Only: c.IPv4Only || !hasIPv6(), Mesh: true,
		Endpoints: s.cfg.Capture.Unknown != toGateway, Search: search, PerPattern: c.PerPattern, Label: c.Label, Rate: c.Rate,
	}
	if len(c.Gateways) > 0 {
		s.real = &nameserver.Gateways{Addresses: c.Gateways, TLS: func() *tls.Config {
			return svid.ClientTLS(s.agent.Source(), s.cfg.Egress.Gateway, nameserver.DoT)
		}}
		if conf.Endpoints { // otherwise they lead nowhere, and could block a host
			s.real.Inside = s.endpointAt
		}
		conf.Real = s.real.Lookup
	}
	var err error
	s.names, err = nameserver.New(conf)
	return err
}

// nameDoors are where the workload asks: over UDP and TCP, with capture also at
// the loopback address of IPv6.
func (s *sidecar) nameDoors(self spiffeid.ID, within func(field string, a netip.AddrPort) net.Listener) (out []door, err error) {
	if s.names == nil {
		return nil, nil
	}
	for _, a := range s.cfg.nameAddresses(s.virtual) {
		udp, c, err := s.nameSocket(a)
		if err != nil {
			return out, err
		}
		out = append(out,
			door{udp, func(ctx context.Context, ln net.Listener) error {
				defer ln.Close()
				return s.names.ServeUDP(ctx, c, self)
			}},
			door{within("names.listen", a), func(ctx context.Context, ln net.Listener) error {
				return s.names.Serve(ctx, ln, func(c net.Conn) nameserver.Peer {
					ask := s.isWorkload(c)
					return func(context.Context) (spiffeid.ID, error) { return self, ask() }
				})
			}})
	}
	return out, nil
}

// A roomDoor stands among listeners to be closed with them.
type roomDoor struct{ *net.UDPConn }

func (r roomDoor) Accept() (net.Conn, error) { return nil, errors.ErrUnsupported }
func (r roomDoor) Addr() net.Addr            { return r.LocalAddr() }

// nameAddresses are those at which names are asked for.
func (c *Config) nameAddresses(captured bool) []netip.AddrPort {
	if !c.Names.Listen.IsValid() {
		return nil
	}
	out := []netip.AddrPort{c.Names.Listen}
	if captured && hasIPv6() && c.Names.Listen.Addr().Is4() {
		out = append(out, twin(c.Names.Listen))
	}
	return out
}

// nameSocket opens a socket for questions. A process that takes over has that of
// the process before: the kernel would spread questions over two.
func (s *sidecar) nameSocket(a netip.AddrPort) (net.Listener, *net.UDPConn, error) {
	if s.room != nil {
		if c, ok := s.room.Names(a); ok {
			return roomDoor{c}, c, nil
		}
	}
	ln, c, err := s.shift.Doors.UDP("names.listen/udp", a.String())
	if err != nil {
		return nil, nil, daemon.Hint(fmt.Errorf("names.listen: %w", err), "free the port, or change names.listen in the configuration")
	}
	return ln, c, nil
}

// holdAddresses has only one of two processes give names their addresses: the
// one that answers.
func (s *sidecar) holdAddresses(held bool) {
	pass := s.addresses.Adopt
	if held {
		pass = s.addresses.Yield
	}
	if err := pass(); err != nil {
		s.log.Error("virtual addresses are not handed over; programs may have to look names up again", "err", err)
	}
}

const (
	readyNames = "names"
	// After a self-test that failed the next comes sooner.
	selfTestEvery, selfTestAgain = 30 * time.Second, time.Second
)

// testNames sees, as long as the sidecar serves, that what the system's resolver
// asks arrives here.
func (s *sidecar) testNames(ctx context.Context, g *errgroup.Group) {
	if s.names == nil {
		return
	}
	g.Go(func() error { return s.names.Run(ctx) })
	if s.cfg.Names.SelfTest == "off" {
		return
	}
	if s.shift.Tie == nil {
		s.ready.Expect(readyNames)
	}
	g.Go(func() error {
		select {
		case <-s.shift.Adopted(): // until then the process before may be the one that answers
		case <-ctx.Done():
			return nil
		}
		for failed := false; ctx.Err() == nil; {
			err := s.selfTest(ctx)
			if err != nil && ctx.Err() == nil && !failed {
				s.log.Error("the workload's questions do not arrive here", "err", err)
			}
			failed = err != nil
			s.ready.Set(readyNames, err)
			if err != nil {
				daemon.Pause(ctx, selfTestAgain)
			} else {
				daemon.Pause(ctx, selfTestEvery)
			}
		}
		return nil
	})
}

// selfTest asks as the system's resolver would. Of a captured workload's it can
// only be seen that the rules are in force: the sidecar's own questions go out.
func (s *sidecar) selfTest(ctx context.Context) error {
	if s.cfg.Capture.Enabled() {
		if err := s.names.Reached(ctx, nil, netip.AddrPortFrom(s.cfg.Capture.Probe(), 53)); err != nil {
			return daemon.Hint(fmt.Errorf("the rules of capture are not in force: %w", err), "sidecar capture install --config FILE")
		}
		return nameserver.Beside("/")
	}
	r, err := nameserver.SystemResolver(resolvConf)
	if err != nil {
		return err
	}
	var from *net.UDPConn
	if s.room != nil {
		from = s.room.Asker()
	}
	for _, a := range r.Servers {
		if err := s.names.Reached(ctx, from, a); err != nil {
			return daemon.Hint(err, fmt.Sprintf("write %q into %s, or self_test: off", "nameserver "+s.cfg.Names.Listen.Addr().String(), resolvConf))
		}
	}
	return nameserver.Beside("/")
}
