package nameserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
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
// host an address was told for: a connection to it is one to that host. Of an
// address of several hosts that is the one that was asked for last.
type Gateways struct {
	// Addresses are the gateways, asked in turn until one answers. Required.
	Addresses []netip.AddrPort
	// TLS is the configuration for one connection. Required.
	TLS func() *tls.Config

	mu    sync.Mutex // guards bound
	bound map[netip.Addr]binding
}

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
			g.bind(addrs, name, ttl)
			return addrs, ttl, nil
		}
		if errors.Is(err, ErrAbsent) {
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
	case m.Rcode == dns.RcodeNameError:
		return nil, ErrAbsent
	case m.Rcode != dns.RcodeSuccess:
		return nil, fmt.Errorf("answered %s", dns.RcodeToString[m.Rcode])
	}
	return m, nil
}

// bind remembers what addresses were told for.
func (g *Gateways) bind(addrs []netip.Addr, host string, ttl time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	if g.bound == nil {
		g.bound = map[netip.Addr]binding{}
	}
	if len(g.bound)+len(addrs) > maxBound {
		for a, b := range g.bound {
			if now.After(b.until) {
				delete(g.bound, a)
			}
		}
		if len(g.bound)+len(addrs) > maxBound {
			clear(g.bound) // their hosts are asked for again
		}
	}
	for _, a := range addrs {
		g.bound[a] = binding{host, now.Add(ttl + boundBeyond)}
	}
}

// Host tells for which host an address was told.
func (g *Gateways) Host(a netip.Addr) (string, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	b, ok := g.bound[a.Unmap()]
	return b.host, ok && time.Now().Before(b.until)
}
