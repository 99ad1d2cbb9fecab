package nameserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// askTime bounds a question to one gateway.
	askTime = 5 * time.Second
	// boundBeyond is for how long an address leads to a host after it should have
	// been forgotten, and maxBound how many are remembered.
	boundBeyond = time.Minute
	maxBound    = 1 << 14
)

// Gateways ask gateways, over TLS, for the addresses of hosts, and remember which
// host an address was told for: a connection to it is one to that host. An address
// of several hosts is told for the first of them alone, while a program may know it
// for that: who owns one host must not take what goes to another.
type Gateways struct {
	// Addresses are the gateways, asked in turn until one answers. Required.
	Addresses []netip.AddrPort
	// TLS is the configuration for one connection. Required.
	TLS func() *tls.Config
	// Inside says that an address is one of the mesh, which stands for no host.
	// Optional.
	Inside func(netip.Addr) bool

	mu    sync.Mutex // guards bound
	bound map[netip.Addr]binding
}

// errTaken is returned for a host all of whose addresses stand for others.
var errTaken = errors.New("its addresses are told for others")

type binding struct {
	host  string
	until time.Time
}

// Lookup is a Config.Real.
func (g *Gateways) Lookup(ctx context.Context, _ spiffeid.ID, name string) ([]netip.Addr, time.Duration, error) {
	var errs []error
	for _, a := range g.Addresses {
		addrs, ttl, err := g.ask(ctx, a, name)
		if err == nil {
			told := g.bind(addrs, name, ttl)
			if len(told) == 0 && len(addrs) > 0 {
				return nil, 0, errTaken
			}
			return told, ttl, nil
		}
		if errors.Is(err, ErrAbsent) || errors.Is(err, ErrBudget) {
			return nil, 0, err
		}
		errs = append(errs, fmt.Errorf("gateway %s: %w", a, err))
	}
	return nil, 0, errors.Join(errs...)
}

// ask puts the questions for both families to a gateway.
func (g *Gateways) ask(ctx context.Context, to netip.AddrPort, name string) (addrs []netip.Addr, ttl time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	d := tls.Dialer{Config: g.TLS()}
	nc, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, 0, err
	}
	defer nc.Close()
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	for _, typ := range []uint16{dns.TypeA, dns.TypeAAAA} {
		m, err := exchange(nc, name, typ)
		if err != nil {
			return nil, 0, err
		}
		for _, rr := range m.Answer {
			var raw net.IP
			switch v := rr.(type) {
			case *dns.A:
				raw = v.A
			case *dns.AAAA:
				raw = v.AAAA
			}
			if a, ok := netip.AddrFromSlice(raw); ok {
				addrs = append(addrs, a.Unmap())
				ttl = time.Duration(rr.Header().Ttl) * time.Second
			}
		}
	}
	return addrs, ttl, nil
}

func exchange(nc net.Conn, name string, typ uint16) (*dns.Msg, error) {
	q := new(dns.Msg)
	q.SetQuestion(name+".", typ)
	q.SetEdns0(maxSize, false)
	c := &dns.Conn{Conn: nc}
	if err := c.WriteMsg(q); err != nil {
		return nil, err
	}
	m, err := c.ReadMsg()
	switch {
	case err != nil:
		return nil, err
	case m.Id != q.Id || !m.Response || len(m.Question) != 1 || m.Question[0] != q.Question[0]:
		return nil, errors.New("the answer is not to our question")
	case m.Rcode == dns.RcodeNameError && explained(m, dns.ExtendedErrorCodeFiltered):
		return nil, ErrBudget
	case m.Rcode == dns.RcodeNameError:
		return nil, ErrAbsent
	case m.Rcode != dns.RcodeSuccess:
		return nil, fmt.Errorf("answered %s", dns.RcodeToString[m.Rcode])
	}
	return m, nil
}

// explained says that an answer gives an extended error as its cause.
func explained(m *dns.Msg, code uint16) bool {
	opt := m.IsEdns0()
	return opt != nil && slices.ContainsFunc(opt.Option, func(o dns.EDNS0) bool {
		e, ok := o.(*dns.EDNS0_EDE)
		return ok && e.InfoCode == code
	})
}

// bind remembers what addresses are told for, and returns those that may be.
func (g *Gateways) bind(addrs []netip.Addr, host string, ttl time.Duration) (told []netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	if g.bound == nil {
		g.bound = map[netip.Addr]binding{}
	}
	if len(g.bound)+len(addrs) > maxBound {
		for a, b := range g.bound {
			if !now.Before(b.until) {
				delete(g.bound, a)
			}
		}
	}
	for _, a := range addrs {
		b, known := g.bound[a]
		switch {
		case known && b.host != host && now.Before(b.until), !known && len(g.bound) >= maxBound, g.inside(a):
			continue
		}
		g.bound[a] = binding{host, now.Add(ttl + boundBeyond)}
		told = append(told, a)
	}
	return told
}

func (g *Gateways) inside(a netip.Addr) bool { return g.Inside != nil && g.Inside(a) }

// Host tells for which host an address was told.
func (g *Gateways) Host(a netip.Addr) (string, bool) {
	a = a.Unmap()
	g.mu.Lock()
	b, ok := g.bound[a]
	g.mu.Unlock()
	return b.host, ok && time.Now().Before(b.until) && !g.inside(a)
}
