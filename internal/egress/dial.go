package egress

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
)

// Names turns a name into addresses. A *Resolver is one. Absence is ErrNoHost.
// It is safe for concurrent use.
type Names interface {
	Lookup(ctx context.Context, name string) ([]netip.Addr, error)
}

const (
	defaultConnect = 5 * time.Second
	attemptDelay   = 250 * time.Millisecond // RFC 8305, section 5
	maxAttempts    = 8
)

// A Dialer connects to destinations: only to addresses that it resolved
// itself and its Guard let pass.
type Dialer struct {
	// Names resolves. Without it only destinations with endpoints are reached.
	Names Names
	// Guard screens every address. Required.
	Guard *Guard
}

// A Target is where a tunnel leads and how.
type Target struct {
	Host Host
	Port uint16
	How  mesh.Destination
	// Did is told of each part of it. Optional.
	Did func(name string, kind telemetry.Kind, began time.Time, err error)
}

// Dial opens a connection to t. It takes the proof that the call was allowed
// and refuses without it. The error is a *Refusal. Addresses that the Guard
// refuses are skipped; when all are refused, the refusal of the first is
// returned. What was skipped is in the returned note.
func (d *Dialer) Dial(ctx context.Context, proof authz.Grant, t Target) (conn *net.TCPConn, note string, err error) {
	if !proof.Covers("host:"+t.Host.String(), t.Port) {
		return nil, "", refuse(ReasonGrant, "%s port %d is not dialled without a grant for it", t.Host, t.Port)
	}
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(t.How.ConnectTimeout, defaultConnect))
	defer cancel()
	if t.Did == nil {
		t.Did = func(string, telemetry.Kind, time.Time, error) {}
	}
	found, err := d.addresses(ctx, t)
	if err != nil {
		return nil, "", err
	}
	var pass []netip.AddrPort
	var skipped []string
	var first error
	for _, ap := range found {
		if err := d.Guard.Screen(ap.Addr(), t.How.Private); err != nil {
			first = cmp.Or(first, err)
			skipped = append(skipped, ap.Addr().String())
			continue
		}
		pass = append(pass, netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
	}
	if len(skipped) > 0 {
		note = "skipped " + strings.Join(skipped, " ")
	}
	if len(pass) == 0 {
		return nil, note, first
	}
	if len(pass) > maxAttempts {
		pass = pass[:maxAttempts]
	}
	began := time.Now()
	conn, err = d.race(ctx, pass, t.How.Private)
	t.Did("dial", telemetry.Client, began, err)
	return conn, note, err
}

// addresses lists where t may be: what its destination says, itself when it is
// an address, or what DNS says, families in turn.
func (d *Dialer) addresses(ctx context.Context, t Target) ([]netip.AddrPort, error) {
	if len(t.How.Endpoints) > 0 {
		return t.How.Endpoints, nil
	}
	if a, ok := t.Host.Addr(); ok {
		return []netip.AddrPort{netip.AddrPortFrom(a, t.Port)}, nil
	}
	if d.Names == nil {
		return nil, refuse(ReasonResolve, "no resolver is configured, and the destination %s lists no endpoints", t.Host)
	}
	began := time.Now()
	addrs, err := d.Names.Lookup(ctx, t.Host.String())
	t.Did("dns", telemetry.Client, began, err)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return nil, refuse(ReasonTimeout, "%v", err)
	case err != nil:
		return nil, refuse(ReasonResolve, "%v", err)
	case len(addrs) == 0:
		return nil, refuse(ReasonResolve, "look up %s: no address", t.Host)
	}
	return inTurn(addrs, t.Port), nil
}

// inTurn alternates the families, each in the order given.
func inTurn(addrs []netip.Addr, port uint16) []netip.AddrPort {
	var families [2][]netip.Addr
	for _, a := range addrs {
		i := 0
		if a.Unmap().Is4() {
			i = 1
		}
		families[i] = append(families[i], a)
	}
	out := make([]netip.AddrPort, 0, len(addrs))
	for len(out) < len(addrs) {
		for i, f := range families {
			if len(f) > 0 {
				out = append(out, netip.AddrPortFrom(f[0], port))
				families[i] = f[1:]
			}
		}
	}
	return out
}

// race connects to the addresses in order, the next one when the one before
// has failed or has not answered for attemptDelay. The first connection wins;
// all attempts have ended when race returns.
func (d *Dialer) race(ctx context.Context, addrs []netip.AddrPort, allowed []netip.Prefix) (*net.TCPConn, error) {
	type result struct {
		conn *net.TCPConn
		err  error
	}
	racing, cancel := context.WithCancel(ctx)
	results := make(chan result)
	running, next := 0, 0
	begin := func() {
		ap := addrs[next]
		next++
		running++
		go func() {
			c, err := d.connect(racing, ap, allowed)
			results <- result{c, err}
		}()
	}
	begin()
	timer := time.NewTimer(attemptDelay)
	defer timer.Stop()
	var won *net.TCPConn
	var errs []error
	for running > 0 {
		select {
		case <-timer.C:
			if won == nil && next < len(addrs) {
				begin()
				timer.Reset(attemptDelay)
			}
		case r := <-results:
			running--
			switch {
			case r.err != nil:
				errs = append(errs, r.err)
			case won == nil:
				won = r.conn
				cancel()
			default:
				r.conn.Close()
			}
			if won == nil && r.err != nil && next < len(addrs) && ctx.Err() == nil {
				begin()
				timer.Reset(attemptDelay)
			}
		}
	}
	cancel()
	if won != nil {
		return won, nil
	}
	return nil, dialError(ctx, errs)
}

func dialError(ctx context.Context, errs []error) error {
	for _, err := range errs {
		var ref *Refusal
		if errors.As(err, &ref) {
			return ref
		}
	}
	for _, err := range errs {
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() || ctx.Err() != nil {
			return refuse(ReasonTimeout, "%v", err)
		}
	}
	return refuse(ReasonDial, "%v", errors.Join(errs...))
}

// connect dials one address. The kernel is given an address only after the
// Guard has seen it once more in the form that the kernel gets.
func (d *Dialer) connect(ctx context.Context, ap netip.AddrPort, allowed []netip.Prefix) (*net.TCPConn, error) {
	nd := net.Dialer{Control: func(_, address string, _ syscall.RawConn) error {
		got, err := netip.ParseAddrPort(address)
		if err != nil {
			return refuse(ReasonAddress, "address %s cannot be screened: %v", clip(address), err)
		}
		if got != ap {
			return refuse(ReasonAddress, "address %s is not the one that was screened", got)
		}
		return d.Guard.Screen(got.Addr(), allowed)
	}}
	c, err := nd.DialContext(ctx, "tcp", ap.String())
	if err != nil {
		return nil, err
	}
	// An address that is routed to this host though no interface has it shows
	// when both ends are the same.
	conn := c.(*net.TCPConn)
	local := conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	if exact, _ := named(ap.Addr(), allowed); local == ap.Addr() && !exact {
		conn.Close()
		return nil, refuse(ReasonLocal, "address %s belongs to this host; only private: [%s/%d] allows it", local, local, local.BitLen())
	}
	return conn, nil
}

// Validate reports every mistake by field.
func (d *Dialer) Validate() error {
	if d == nil || d.Guard == nil {
		return fmt.Errorf("dialer: guard: missing")
	}
	return nil
}
