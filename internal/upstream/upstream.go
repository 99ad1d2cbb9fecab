// Package upstream reaches a service: it knows where the endpoints are, picks
// one, and lends out connections that are kept alive between calls.
//
// A connection between proxies is mutual TLS to the one identity the service
// has; a connection to the local application is plain. Calls to a proxy of our
// own share few connections (package hop), and so do those to what speaks HTTP/2
// (package http2); a goroutine serves each until it ends. Apart from that the package judges nothing and holds no
// goroutine: the caller's dials, a crowd of callers in turn, and a timer closes
// what was kept unused for too long.
package upstream

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/capture"
	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/mux"
	"sallyport/internal/record"
	"sallyport/internal/socket"
)

// ErrNoEndpoint is returned when a service has no endpoint at all.
var ErrNoEndpoint = errors.New("no endpoint")

// A ConnectError says that no endpoint of a service could be connected to.
// Nothing of the call has been sent.
type ConnectError struct {
	Service mesh.ServiceName
	Err     error
}

func (e *ConnectError) Error() string { return fmt.Sprintf("connect to %s: %v", e.Service, e.Err) }

func (e *ConnectError) Unwrap() error { return e.Err }

// Config is what a set of Services needs.
type Config struct {
	// TLS returns the client side of a connection that must prove to be want.
	// Required.
	TLS func(want spiffeid.ID) *tls.Config
	// Generation counts the identities held so far. A kept connection that was
	// made under an older one is not used again. Required.
	Generation func() uint64
	// Standing looks again at what a peer has proved in its handshake; an error
	// says that it holds no more. It is asked after each Recheck. Required.
	Standing func(tls.ConnectionState) error
	// Limits bound what an upstream may answer. Zero means http1's defaults.
	Limits http1.Limits
	// ConnectTimeout bounds TCP and TLS together. Default 5 s.
	ConnectTimeout time.Duration
	// MaxDials is how many connections to one endpoint are made at once. Further
	// calls wait for one that comes back, or for their turn: a crowd that finds
	// a peer cold would otherwise make a handshake each, and all would be late.
	// Default 16, which is 160 connections a second at 100 ms each.
	MaxDials int
	// MaxIdle is how many connections are kept to one endpoint. What is not
	// needed ages out; a bound below what is needed now and then would have
	// handshakes made over and over. Default 4,096.
	MaxIdle int
	// MaxIdleTime is how long a connection is kept unused. It must be shorter
	// than the peer's idle limit. Default 50 s.
	MaxIdleTime time.Duration
	// Zone is where this proxy stands; endpoints of the same zone can be
	// preferred. Optional.
	Zone string
	// Changed is told of each ejection, of what health checks find, and when a
	// breaker opens or closes. It
	// is called on the way of a call and must be quick. Optional.
	Changed func(Trouble)
	// Dialled is told of each attempt to connect. It must be quick. Optional.
	Dialled func(to spiffeid.ID, err error)
}

func (c Config) validate() error {
	var errs []error
	if c.TLS == nil {
		errs = append(errs, errors.New("tls: missing"))
	}
	if c.Generation == nil {
		errs = append(errs, errors.New("generation: missing"))
	}
	if c.Standing == nil {
		errs = append(errs, errors.New("standing: missing"))
	}
	return errors.Join(errs...)
}

func (c Config) withDefaults() Config {
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 5 * time.Second
	}
	if c.MaxDials == 0 {
		c.MaxDials = 16
	}
	if c.MaxIdle == 0 {
		c.MaxIdle = 4096
	}
	if c.MaxIdleTime == 0 {
		c.MaxIdleTime = 50 * time.Second
	}
	return c
}

// Services holds the endpoints of every service of a snapshot. It is safe for
// concurrent use.
type Services struct {
	cfg   Config
	table atomic.Pointer[map[mesh.ServiceName]*group]
	// version counts the tables.
	version atomic.Uint64
	// epoch counts the calls of Recheck.
	epoch atomic.Uint64

	mu    sync.Mutex // guards the fields below
	pools map[target]*Pool
	known map[mesh.ServiceName]*standing
	// closed is set by Close: what is put in force afterwards keeps nothing.
	closed bool
}

// A target is one address and the identity that must be met there.
type target struct {
	addr netip.AddrPort
	id   spiffeid.ID
}

// New returns Services that know no endpoint yet.
func New(cfg Config) (*Services, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("upstream: %w", err)
	}
	s := &Services{cfg: cfg.withDefaults(), pools: map[target]*Pool{}}
	s.table.Store(&map[mesh.ServiceName]*group{})
	return s, nil
}

// Use makes the endpoints of snap the ones that new calls go to. Connections
// to endpoints that stay are kept; those to endpoints that went are closed as
// soon as they are idle.
func (s *Services) Use(snap *mesh.Snapshot) {
	for _, p := range s.replace(snap) {
		p.Close() // may wait for peers, so no lock is held
	}
}

// replace puts snap in force and returns the pools that it has no use for.
func (s *Services) replace(snap *mesh.Snapshot) (gone []*Pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	live, known := map[target]*Pool{}, map[mesh.ServiceName]*standing{}
	table := map[mesh.ServiceName]*group{}
	for _, svc := range snap.Services {
		var list []place
		for _, ep := range snap.EndpointsOf(svc.Name) {
			t := target{ep.Address, svc.ID}
			p := live[t]
			if p == nil {
				p = s.pools[t]
			}
			if p == nil {
				p = newPool(s.cfg, t)
				p.epoch = &s.epoch
				p.closed = s.closed
			}
			live[t] = p
			list = append(list, place{p, ep.Labels})
		}
		var cfg mesh.Routes
		if r := snap.RoutesOf(svc.Name); r != nil {
			cfg = *r
		}
		g := s.groupOf(svc.Name, cfg, list)
		known[svc.Name], table[svc.Name] = g.standing, g
	}
	s.known = known
	old := s.pools
	s.pools = live
	s.table.Store(&table)
	s.version.Add(1)
	for t, p := range old {
		if live[t] == nil {
			gone = append(gone, p)
		}
	}
	return gone
}

// Get is Lend for a call of which nothing is told.
func (s *Services) Get(ctx context.Context, name mesh.ServiceName, fresh bool) (*Conn, error) {
	return s.Lend(ctx, &Want{Service: name, Fresh: fresh})
}

// A Peer is who was at the other end of a connection.
type Peer struct {
	ID   spiffeid.ID
	Addr netip.AddrPort
	Err  error // why what it proved holds no more
}

// Recheck closes the idle connections whose peer's proof holds no more, and
// says whose they were. One that is lent is its borrower's to close: Stands
// says so.
func (s *Services) Recheck() (gone []Peer) {
	s.epoch.Add(1)
	s.mu.Lock()
	pools := slices.Collect(maps.Values(s.pools))
	s.mu.Unlock()
	for _, p := range pools {
		gone = append(gone, p.recheck()...)
	}
	return gone
}

// Close closes every idle connection. Lent ones are closed when they come back.
func (s *Services) Close() {
	s.mu.Lock()
	s.closed = true
	pools := slices.Collect(maps.Values(s.pools))
	s.mu.Unlock()
	for _, p := range pools {
		p.Close()
	}
}

// A Pool keeps the connections to one address, last in, first out, so that few
// stay warm and the rest age out. It is safe for concurrent use.
type Pool struct {
	cfg Config
	t   target
	// epoch is that of the Services; nil for the local application.
	epoch *atomic.Uint64
	// restUntil is when an endpoint that refused a connection is tried again
	// before the others, in Unix nanoseconds.
	restUntil atomic.Int64
	failures  atomic.Int32

	// h2c says that the application speaks HTTP/2 and nothing else; bodies bounds
	// what it has sent and nobody has read.
	h2c    bool
	bodies *mux.Budget

	mu     sync.Mutex // guards the fields below
	idle   []*Conn    // the one that came back last at the end
	lines  []*line
	single bool // the peer takes one call at a time on a connection
	closed bool
	timer  *time.Timer // closes what is idle for too long; set while any is
	// dialling counts the dials under way and the rights to dial that were
	// given to waiters; queue has the waiters, of *waiter, the first in front.
	dialling int
	queue    list.List
	moved    time.Time // when a connection was last made, or handed to a waiter

	// connect is dial, or what Through and tests have in its place.
	connect func(context.Context) (net.Conn, time.Time, error)
}

// NewLocal returns a pool of plain connections to the local application.
func NewLocal(addr netip.AddrPort, limits http1.Limits) *Pool {
	cfg := Config{Limits: limits, Generation: func() uint64 { return 0 }}
	return newPool(cfg.withDefaults(), target{addr: addr})
}

// NewLocalHTTP2 is NewLocal for an application that speaks HTTP/2, with prior
// knowledge.
func NewLocalHTTP2(addr netip.AddrPort, limits http1.Limits) *Pool {
	p := NewLocal(addr, limits)
	p.h2c = true
	return p
}

// Through has the pool connect by dial, to an application that stands in another
// network namespace. It is called before the pool is used.
func (p *Pool) Through(dial func(context.Context) (net.Conn, error)) {
	p.connect = func(ctx context.Context) (net.Conn, time.Time, error) {
		ctx, cancel := context.WithTimeout(ctx, p.cfg.ConnectTimeout)
		defer cancel()
		nc, err := dial(ctx)
		if err != nil {
			return nil, time.Time{}, err
		}
		return capture.NewDirect(nc), time.Time{}, nil
	}
}

func newPool(cfg Config, t target) *Pool {
	p := &Pool{cfg: cfg, t: t, bodies: mux.NewBudget(bodies)}
	p.connect = p.dial
	return p
}

// A Conn is a lent connection.
type Conn struct {
	*http1.Conn
	// Reused reports that the connection has served a call before: the peer may
	// have closed it in the meantime.
	Reused bool

	pool *Pool
	line *line // nil: the connection is its own
	gen  uint64
	// until is when the peer's certificates end; what it proved then holds no
	// more. Zero for a plain connection.
	until time.Time
	idle  time.Time
	// tls is nil for a plain connection; epoch is when its peer's proof was
	// last looked at.
	tls   *record.Conn
	epoch uint64
	lease
}

// Until is when the peer's certificates end; zero for a plain connection.
func (c *Conn) Until() time.Time { return c.until }

// Stands is an error when what the peer proved holds no more. The borrower
// asks after it has made the connection known to whoever closes such, so that
// a Recheck meanwhile passes none by.
func (c *Conn) Stands() error {
	if c.tls == nil {
		return nil
	}
	e := c.pool.epoch.Load()
	if e == c.epoch {
		return nil
	}
	if err := c.pool.cfg.Standing(c.tls.ConnectionState()); err != nil {
		return err
	}
	c.epoch = e
	return nil
}

// usable says whether a kept connection may carry another call.
func (c *Conn) usable(gen uint64, now time.Time) bool {
	return c.gen == gen && now.Sub(c.idle) < c.pool.cfg.MaxIdleTime &&
		(c.until.IsZero() || now.Before(c.until)) && (c.Asks() || !c.Stale()) && c.Stands() == nil
}

// Get lends the connection that was used last, or dials, or waits for either
// while enough others dial.
func (p *Pool) Get(ctx context.Context, fresh bool) (*Conn, error) {
	return p.get(ctx, &Want{Fresh: fresh})
}

func (p *Pool) get(ctx context.Context, want *Want) (*Conn, error) {
	now := want.now()
	c, w := p.enter(want.Fresh)
	for c != nil {
		if c.usable(p.cfg.Generation(), now) {
			c.Reused = true
			c.Tell(now)
			return c, nil
		}
		c.Discard()
		c, w = p.enter(want.Fresh)
	}
	return p.seek(ctx, want, w)
}

// seek gets a connection where none was at hand: when it is w's turn, or by the
// right to dial that nil stands for.
func (p *Pool) seek(ctx context.Context, want *Want, w *waiter) (*Conn, error) {
	if want.Connect > 0 || !want.Until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = want.within(ctx, p.cfg.ConnectTimeout)
		defer cancel()
	}
	for {
		var c *Conn
		if w != nil {
			var err error
			if c, err = p.wait(ctx, w); err != nil {
				return nil, err
			}
			w = nil
		}
		for ; c != nil; c, w = p.enter(want.Fresh) {
			now := time.Now()
			if c.usable(p.cfg.Generation(), now) {
				c.Reused = true
				c.Tell(now)
				return c, nil
			}
			c.Discard()
		}
		if w == nil {
			return p.open(ctx, want)
		}
	}
}

// open dials by the right that enter or a turn gave.
func (p *Pool) open(ctx context.Context, want *Want) (c *Conn, err error) {
	defer func() { p.dialled(c != nil) }()
	if p.crowded() {
		return nil, fmt.Errorf("%s: %w", p.t.addr, errCrowded)
	}
	gen := p.cfg.Generation()
	var epoch uint64
	if p.epoch != nil {
		epoch = p.epoch.Load() // before the handshake looks
	}
	for range maxCrossed {
		if c, err = p.make(ctx, want, gen, epoch); !errors.Is(err, hop.ErrClosing) || ctx.Err() != nil {
			break
		}
	}
	return c, err
}

// maxCrossed is how often a peer may end a connection that it has just made,
// since it is about to end itself: another process may be there by now.
const maxCrossed = 3

// firstRest is how long an endpoint rests after a connection that was not made.
const firstRest = 250 * time.Millisecond

// make makes a connection, and lends it.
func (p *Pool) make(ctx context.Context, want *Want, gen, epoch uint64) (*Conn, error) {
	nc, until, err := p.connect(ctx)
	p.dialledTo(err)
	if err != nil && want.spent() {
		// It says little of the endpoint, and that it is dead may be the cause:
		// calls go elsewhere for a moment, and nothing is held against it.
		p.restUntil.Store(time.Now().Add(firstRest).UnixNano())
		return nil, err
	}
	if err != nil {
		n := min(p.failures.Add(1), 6)
		p.restUntil.Store(time.Now().Add(firstRest << (n - 1)).UnixNano())
		return nil, err
	}
	p.failures.Store(0)
	p.restUntil.Store(0)
	tc, _ := nc.(*record.Conn)
	if l := p.lineOn(nc, tc); l != nil {
		l.gen, l.until, l.tls, l.epoch = gen, until, tc, epoch
		return p.firstOn(l)
	}
	p.mu.Lock()
	p.single = true
	p.mu.Unlock()
	return &Conn{Conn: http1.NewConn(nc, p.cfg.Limits), pool: p, gen: gen, until: until, tls: tc, epoch: epoch}, nil
}

// pop takes the connection that came back last. The caller holds the lock.
func (p *Pool) pop() *Conn {
	n := len(p.idle)
	if n == 0 {
		return nil
	}
	c := p.idle[n-1]
	p.idle[n-1] = nil
	p.idle = p.idle[:n-1]
	return c
}

// dial connects and says until when the peer's certificates hold.
func (p *Pool) dial(ctx context.Context) (net.Conn, time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.ConnectTimeout)
	defer cancel()
	d := net.Dialer{Control: socket.Tune}
	nc, err := d.DialContext(ctx, "tcp", p.t.addr.String())
	if err != nil {
		return nil, time.Time{}, err
	}
	nc = capture.NewDirect(nc)
	if p.t.id.IsZero() {
		return nc, time.Time{}, nil
	}
	tc, err := record.Client(ctx, nc, p.cfg.TLS(p.t.id))
	if err != nil {
		nc.Close()
		return nil, time.Time{}, fmt.Errorf("handshake with %s at %s: %w", p.t.id, p.t.addr, err)
	}
	var until time.Time
	for _, c := range tc.ConnectionState().PeerCertificates {
		if until.IsZero() || c.NotAfter.Before(until) {
			until = c.NotAfter
		}
	}
	return tc, until, nil
}

// Put gives a connection back that is ready for another call.
func (c *Conn) Put() {
	p := c.pool
	c.idle = c.Now()
	c.Rest()
	c.leave()
	p.mu.Lock()
	var out *Conn
	switch {
	case p.closed, c.Stands() != nil:
		out = c
	case p.queue.Len() > 0 && c.gen == p.cfg.Generation() && p.handOn(c):
	case len(p.idle) >= p.cfg.MaxIdle:
		out = p.idle[0]
		p.idle = append(slices.Delete(p.idle, 0, 1), c)
	default:
		p.idle = append(p.idle, c)
	}
	if p.timer == nil && !p.closed {
		p.timer = time.AfterFunc(p.cfg.MaxIdleTime, p.sweep)
	}
	p.mu.Unlock()
	if out != nil {
		out.Discard()
	}
}

// recheck closes the idle connections that do not stand. Put looks under the
// same lock, so that none comes back unseen.
func (p *Pool) recheck() (gone []Peer) {
	p.mu.Lock()
	gone = p.recheckLines()
	var out []*Conn
	p.idle = slices.DeleteFunc(p.idle, func(c *Conn) bool {
		err := c.Stands()
		if err != nil {
			out = append(out, c)
		}
		if err != nil && !c.onLine() {
			gone = append(gone, Peer{ID: p.t.id, Addr: p.t.addr, Err: err})
		}
		return err != nil
	})
	p.mu.Unlock()
	for _, c := range out {
		c.Discard()
	}
	return gone
}

// sweep closes what has been idle for too long. The pool is used from the
// other end, so that what lies deep would otherwise stay for ever.
func (p *Pool) sweep() {
	now := time.Now()
	p.mu.Lock()
	n := 0
	for n < len(p.idle) && now.Sub(p.idle[n].idle) >= p.cfg.MaxIdleTime {
		n++
	}
	old := slices.Clone(p.idle[:n])
	p.idle = slices.Delete(p.idle, 0, n)
	p.timer = nil
	if len(p.idle) > 0 && !p.closed {
		p.timer = time.AfterFunc(p.idle[0].idle.Add(p.cfg.MaxIdleTime).Sub(now), p.sweep)
	}
	p.mu.Unlock()
	for _, c := range old {
		c.Discard()
	}
}

// Discard closes a connection that no further call may use.
func (c *Conn) Discard() {
	c.Abandon()
	c.Conn.Release()
}

// Abandon is Discard of a connection that something may still be at work on.
func (c *Conn) Abandon() {
	c.leave()
	c.Conn.Close()
}

// Close closes the idle connections; lent ones are closed when they come back.
func (p *Pool) Close() {
	p.mu.Lock()
	idle := p.idle
	p.idle, p.closed = nil, true
	for _, l := range p.lines {
		l.Drain()
	}
	if p.timer != nil {
		p.timer.Stop()
		p.timer = nil
	}
	p.mu.Unlock()
	for _, c := range idle {
		c.Discard()
	}
}
