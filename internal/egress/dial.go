package egress

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/socket"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// Names turns a name into addresses. A *Resolver is one. Absence is ErrNoHost.
// It is safe for concurrent use.
type Names interface {
	Lookup(ctx context.Context, name string) ([]netip.Addr, error)
}

const (
	attemptDelay = 250 * time.Millisecond // RFC 8305, section 5
	maxAttempts  = 8                      // of the addresses of an endpoint
	maxRanked    = 64                     // of them which of these: a hostile answer has thousands
)

// A Dialer connects to destinations: only to addresses that it resolved
// itself and its Guard let pass.
type Dialer struct {
	// Names resolves. Without it only destinations with endpoints are reached.
	Names Names
	// Guard screens every address. Required.
	Guard *Guard
	// Secrets are what proxies are shown. Default: none.
	Secrets *Secrets
	// Roots are whom the certificates of proxies must lead to. Default: those of the
	// system.
	Roots *x509.CertPool
	// Outside remembers which proxies do not answer. Required where there are any.
	Outside *upstream.Outside
}

// A Target is where a tunnel leads and how.
type Target struct {
	Host Host
	Port uint16
	How  mesh.Destination
	// Did is told of each part of it. Optional.
	Did func(name string, kind telemetry.Kind, began time.Time, err error)
	// Try is told which addresses do not answer, and says which are tried last. Nil:
	// nothing is known of them.
	Try *upstream.Try
	// Avoid are addresses that have just failed: they come last.
	Avoid []netip.AddrPort
}

// Dial opens a connection to t. It takes the proof that the call was allowed
// and refuses without it. The error is a *Refusal. Addresses that the Guard
// refuses are skipped; when all are refused, the refusal of the first is
// returned. What was skipped is in the returned note.
func (d *Dialer) Dial(ctx context.Context, proof authz.Grant, t Target) (conn link, at place, note string, err error) {
	return d.seek(ctx, proof, &t, nil)
}

// seek is Dial, unless have says of one of the places that are chosen that there is
// a connection to it already: then it makes none.
func (d *Dialer) seek(ctx context.Context, proof authz.Grant, t *Target, have func([]place) bool) (link, place, string, error) {
	if !proof.Covers("host:"+t.Host.String(), t.Port) {
		return nil, place{}, "", refuse(ReasonGrant, "%s port %d is not dialled without a grant for it", t.Host, t.Port)
	}
	if t.Did == nil {
		t.Did = noSpans
	}
	w := walk{d: d, t: t, have: have}
	for _, list := range t.choices() {
		if w.visit(ctx, list); w.over || ctx.Err() != nil {
			break
		}
	}
	slices.SortStableFunc(w.later, func(a, b stop) int { return cmp.Compare(a.rank, b.rank) })
	for _, s := range w.later {
		if w.over || ctx.Err() != nil {
			break
		}
		w.dial(ctx, s)
	}
	note := ""
	if len(w.skipped) > 0 {
		note = "skipped " + strings.Join(w.skipped, " ")
	}
	switch {
	case w.over:
		return w.conn, w.at, note, nil
	case w.err == nil:
		w.err = cmp.Or(w.refused, context.Cause(ctx))
	}
	return nil, place{}, note, w.err
}

func noSpans(string, telemetry.Kind, time.Time, error) {}

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

// race connects to the places in order, the next one when the one before
// has failed or has not answered for attemptDelay. The first connection wins;
// all attempts have ended when race returns. Failed is told of those that failed
// before.
func (d *Dialer) race(ctx context.Context, places []place, t *Target, failed func(place, error)) (link, place, error) {
	type result struct {
		conn link
		at   place
		err  error
	}
	racing, cancel := context.WithCancel(ctx)
	results := make(chan result)
	running, next := 0, 0
	begin := func() {
		at := places[next]
		next++
		running++
		go func() {
			c, at, err := d.reach(racing, at, t)
			results <- result{c, at, err}
		}()
	}
	begin()
	timer := time.NewTimer(attemptDelay)
	defer timer.Stop()
	var won result
	var errs []error
	for running > 0 {
		select {
		case <-timer.C:
			if won.conn == nil && next < len(places) {
				begin()
				timer.Reset(attemptDelay)
			}
		case r := <-results:
			running--
			switch {
			case r.err != nil:
				errs = append(errs, r.err)
				if won.conn == nil {
					failed(r.at, r.err)
				}
			case won.conn == nil:
				won = r
				cancel()
			default:
				r.conn.Close()
			}
			if won.conn == nil && r.err != nil && next < len(places) && ctx.Err() == nil {
				begin()
				timer.Reset(attemptDelay)
			}
		}
	}
	cancel()
	if won.conn != nil {
		return won.conn, won.at, nil
	}
	return nil, place{}, dialError(ctx, errs)
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
	nd := net.Dialer{Control: func(network, address string, c syscall.RawConn) error {
		got, err := netip.ParseAddrPort(address)
		if err != nil {
			return refuse(ReasonAddress, "address %s cannot be screened: %v", clip(address), err)
		}
		if got != ap {
			return refuse(ReasonAddress, "address %s is not the one that was screened", got)
		}
		if err := d.Guard.Screen(got.Addr(), allowed); err != nil {
			return err
		}
		return socket.Tune(network, address, c)
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
