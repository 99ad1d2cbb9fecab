package egress

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/singleflight"
)

// ErrNoHost is returned by Lookup when the servers say that the name does not
// exist or has no address.
var ErrNoHost = errors.New("no such host")

// A Server is one recursive resolver.
type Server struct {
	Addr netip.AddrPort
	// Net is "udp" (default; TCP follows when an answer is cut or looks
	// forged) or "tcp".
	Net string
}

// ResolverConfig says whom a Resolver asks.
type ResolverConfig struct {
	// Servers are asked in this order, each in turn until one answers.
	// Required.
	Servers []Server
	// Timeout bounds one question to one server. Default 2 s.
	Timeout time.Duration
	// Names is how many names are remembered. Default 4096.
	Names int
}

// Validate reports every mistake by field.
func (c ResolverConfig) Validate() error {
	var errs []error
	if len(c.Servers) == 0 {
		errs = append(errs, errors.New("servers: at least one is needed"))
	}
	for i, s := range c.Servers {
		if !s.Addr.IsValid() || s.Addr.Port() == 0 {
			errs = append(errs, fmt.Errorf("servers[%d]: address and port are needed", i))
		}
		if s.Net != "" && s.Net != "udp" && s.Net != "tcp" {
			errs = append(errs, fmt.Errorf("servers[%d]: %q is not udp or tcp", i, s.Net))
		}
	}
	if c.Timeout < 0 {
		errs = append(errs, fmt.Errorf("timeout: %v is negative", c.Timeout))
	}
	if c.Names < 0 {
		errs = append(errs, fmt.Errorf("names: %d is negative", c.Names))
	}
	return errors.Join(errs...)
}

const (
	minTTL      = 5 * time.Second
	maxTTL      = 300 * time.Second
	negativeTTL = 5 * time.Second
	maxChain    = 8  // CNAMEs in one answer
	maxAddrs    = 32 // addresses kept of one answer
)

// A Resolver asks its own servers and never the system: no search list, no
// hosts file, no cgo. It is safe for concurrent use; a question in flight has
// its own goroutine, which ends with the timeouts.
type Resolver struct {
	servers []Server
	timeout time.Duration
	names   int
	now     func() time.Time
	flight  singleflight.Group

	mu    sync.Mutex // guards cache
	cache map[string]cached
}

type cached struct {
	addrs   []netip.Addr // empty: the name has no address
	expires time.Time
}

// NewResolver makes a Resolver.
func NewResolver(c ResolverConfig) (*Resolver, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("resolver: %w", err)
	}
	return &Resolver{
		servers: slices.Clone(c.Servers),
		timeout: cmp.Or(c.Timeout, 2*time.Second),
		names:   cmp.Or(c.Names, 4096),
		now:     time.Now,
		cache:   make(map[string]cached),
	}, nil
}

// Lookup returns the addresses of name, a normal form of ParseName: those of A
// and AAAA together, IPv6 first. ErrNoHost says that there is none; any other
// error, that no server gave an answer to trust.
func (r *Resolver) Lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	if addrs, ok := r.cached(name); ok {
		return orAbsent(name, addrs)
	}
	done := r.flight.DoChan(name, func() (any, error) {
		if addrs, ok := r.cached(name); ok { // since it was looked for
			return addrs, nil
		}
		limit := 2 * r.timeout * time.Duration(len(r.servers))
		asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
		defer cancel()
		return r.ask(asking, name)
	})
	select {
	case <-ctx.Done():
		return nil, fmt.Errorf("look up %s: %w", name, context.Cause(ctx))
	case res := <-done:
		if res.Err != nil {
			return nil, fmt.Errorf("look up %s: %w", name, res.Err)
		}
		return orAbsent(name, res.Val.([]netip.Addr))
	}
}

func orAbsent(name string, addrs []netip.Addr) ([]netip.Addr, error) {
	if len(addrs) == 0 {
		return nil, fmt.Errorf("look up %s: %w", name, ErrNoHost)
	}
	return slices.Clone(addrs), nil
}

func (r *Resolver) cached(name string) ([]netip.Addr, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.cache[name]
	if !ok || !r.now().Before(c.expires) {
		return nil, false
	}
	return c.addrs, true
}

func (r *Resolver) keep(name string, addrs []netip.Addr, ttl time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	if len(r.cache) >= r.names {
		for n, c := range r.cache {
			if !now.Before(c.expires) {
				delete(r.cache, n)
			}
		}
		for n := range r.cache {
			if len(r.cache) < r.names {
				break
			}
			delete(r.cache, n)
		}
	}
	r.cache[name] = cached{addrs: addrs, expires: now.Add(ttl)}
}

// ask puts both questions at once and keeps the answer.
func (r *Resolver) ask(ctx context.Context, name string) ([]netip.Addr, error) {
	type result struct {
		addrs []netip.Addr
		ttl   time.Duration
		err   error
	}
	six := make(chan result, 1)
	go func() {
		addrs, ttl, err := r.query(ctx, name, dns.TypeAAAA)
		six <- result{addrs, ttl, err}
	}()
	addrs4, ttl4, err4 := r.query(ctx, name, dns.TypeA)
	v6 := <-six
	addrs := append(v6.addrs, addrs4...)
	if len(addrs) == 0 {
		// One family that failed may have had the addresses: not an absence.
		if err := cmp.Or(err4, v6.err); err != nil {
			return nil, err
		}
		r.keep(name, nil, negativeTTL)
		return nil, nil
	}
	ttl := maxTTL
	for _, part := range []result{v6, {addrs4, ttl4, err4}} {
		if len(part.addrs) > 0 {
			ttl = min(ttl, part.ttl)
		}
		if part.err != nil {
			ttl = minTTL
		}
	}
	r.keep(name, addrs, max(ttl, minTTL))
	return addrs, nil
}

// query asks each server, and all of them once more, until one answers.
func (r *Resolver) query(ctx context.Context, name string, typ uint16) ([]netip.Addr, time.Duration, error) {
	var last error
	for range 2 {
		for _, s := range r.servers {
			if err := ctx.Err(); err != nil {
				return nil, 0, cmp.Or(last, err)
			}
			m, err := r.exchange(ctx, s, name, typ)
			if err != nil {
				last = fmt.Errorf("server %s: %w", s.Addr, err)
				continue
			}
			if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
				last = fmt.Errorf("server %s: answered %s", s.Addr, dns.RcodeToString[m.Rcode])
				continue
			}
			return collect(m, name, typ)
		}
	}
	return nil, 0, last
}

// exchange puts one question to one server. Over UDP the name goes out in
// random case, and an answer that does not repeat it to the letter is asked
// for again over TCP, where nobody off the path can answer.
func (r *Resolver) exchange(ctx context.Context, s Server, name string, typ uint16) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	if s.Net != "tcp" {
		q := question(mixCase(name), typ)
		client := dns.Client{Net: "udp", UDPSize: 1232, Timeout: r.timeout}
		m, _, err := client.ExchangeContext(ctx, q, s.Addr.String())
		switch {
		case err != nil && ctx.Err() != nil:
			return nil, err
		case err == nil && !m.Truncated && answers(m, q):
			return m, nil
		}
	}
	q := question(name, typ)
	client := dns.Client{Net: "tcp", Timeout: r.timeout}
	m, _, err := client.ExchangeContext(ctx, q, s.Addr.String())
	if err != nil {
		return nil, err
	}
	if !answers(m, q) {
		return nil, errors.New("the answer is not to our question")
	}
	if m.Truncated {
		return nil, errors.New("the answer is cut off over TCP")
	}
	return m, nil
}

func question(name string, typ uint16) *dns.Msg {
	q := new(dns.Msg)
	q.SetQuestion(name+".", typ)
	q.SetEdns0(1232, false)
	return q
}

// answers reports whether m is a response to q, its question repeated exactly.
func answers(m, q *dns.Msg) bool {
	return m.Response && m.Id == q.Id && m.Opcode == dns.OpcodeQuery &&
		len(m.Question) == 1 && m.Question[0] == q.Question[0]
}

// mixCase sets the case of each letter by chance (draft-vixie-dnsext-dns0x20).
func mixCase(name string) string {
	b := []byte(name)
	coins := make([]byte, len(b))
	rand.Read(coins)
	for i, c := range b {
		if 'a' <= c && c <= 'z' && coins[i]&1 == 1 {
			b[i] = c - 'a' + 'A'
		}
	}
	return string(b)
}

// collect follows the CNAMEs of name inside the answer and takes the addresses
// at their end. Records of any other owner are not looked at.
func collect(m *dns.Msg, name string, typ uint16) ([]netip.Addr, time.Duration, error) {
	ttl := maxTTL
	owner := name
	for range maxChain + 1 {
		var next string
		var addrs []netip.Addr
		for _, rr := range m.Answer {
			h := rr.Header()
			if h.Class != dns.ClassINET || !strings.EqualFold(strings.TrimSuffix(h.Name, "."), owner) {
				continue
			}
			switch v := rr.(type) {
			case *dns.CNAME:
				target, err := ParseName(v.Target)
				if err != nil || (next != "" && next != target) {
					return nil, 0, fmt.Errorf("%s has more than one CNAME, or one that is not a host name", owner)
				}
				next = target
			case *dns.A:
				if a, ok := netip.AddrFromSlice(v.A); ok && typ == dns.TypeA && len(addrs) < maxAddrs {
					addrs = append(addrs, a.Unmap())
				}
			case *dns.AAAA:
				if a, ok := netip.AddrFromSlice(v.AAAA); ok && typ == dns.TypeAAAA && len(addrs) < maxAddrs {
					addrs = append(addrs, a)
				}
			default:
				continue
			}
			ttl = min(ttl, time.Duration(h.Ttl)*time.Second)
		}
		if next == "" || len(addrs) > 0 {
			return addrs, ttl, nil
		}
		owner = next
	}
	return nil, 0, fmt.Errorf("%s leads through more than %d CNAMEs", name, maxChain)
}
