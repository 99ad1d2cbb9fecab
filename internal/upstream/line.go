package upstream

import (
	"cmp"
	"errors"
	"net"
	"slices"
	"time"

	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/record"
)

const (
	// maxLines is how many lines there are to one endpoint, which may take few
	// calls on each.
	maxLines = 64
	// maxLanes is how many calls share a line of HTTP/2.
	maxLanes = 256
	// bodies is by how much the windows of all calls of HTTP/2 to one endpoint
	// may grow, bytes.
	bodies = 64 << 20
)

var errCrowded = errors.New("as many connections as there may be, and no room on them")

// A line is a connection that many calls share: to a proxy of our own, each on a
// stream of package hop, or of HTTP/2. The pool lends and keeps streams as it does
// connections.
type line struct {
	shared
	open  func() (net.Conn, error)
	gen   uint64
	until time.Time
	tls   *record.Conn
	epoch uint64
}

// shared is a connection that carries streams.
type shared interface {
	// Run serves it until it ends.
	Run() error
	// Live says whether it takes new streams.
	Live() bool
	// Drain has it end with the last stream.
	Drain()
	// Close ends it at once.
	Close()
}

// wireProto says what both ends agreed on.
func wireProto(tc *record.Conn) string { return tc.ConnectionState().NegotiatedProtocol }

// lineOn makes a line of a connection on which both ends agreed to it; nil when
// they did not. tc is nil for a plain connection.
func (p *Pool) lineOn(nc net.Conn, tc *record.Conn) *line {
	proto := ""
	if tc != nil {
		proto = wireProto(tc)
	} else if p.h2c {
		proto = http2.Proto
	}
	switch proto {
	case hop.Proto:
		h := hop.Dialled(tc, hop.Config{Idle: p.cfg.MaxIdleTime})
		return &line{shared: h, open: func() (net.Conn, error) { return opened(h.Open()) }}
	case http2.Proto:
		h := http2.Dialled(nc, p.http2())
		return &line{shared: h, open: func() (net.Conn, error) { return opened(h.Open()) }}
	}
	return nil
}

// opened keeps a nil stream from looking like one.
func opened[C net.Conn](c C, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return c, nil
}

// http2 bounds what a peer of HTTP/2 can make us hold. The connection has room
// for what all calls on it may have unread: one that nobody reads must not hold
// up those of others.
func (p *Pool) http2() http2.Config {
	const window = 64 << 10
	cfg := http2.Config{
		Streams: maxLanes, Head: cmp.Or(p.cfg.Limits.Head, 32<<10), Window: window, MaxWindow: window, Budget: p.bodies,
		Idle: p.cfg.MaxIdleTime, WriteTimeout: p.cfg.Limits.WriteTimeout,
	}
	if p.t.id.IsZero() {
		cfg.KeepAlive = -1 // the kernel says when an application of this machine has gone
	} else {
		cfg.MaxWindow = 4 * window // there may be a distance between us
	}
	cfg.Buffer = cfg.Streams * cfg.MaxWindow
	return cfg
}

// crowded says that no further line may be made.
func (p *Pool) crowded() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.lines) >= maxLines
}

// firstOn serves a line until it ends, and lends its first stream.
func (p *Pool) firstOn(l *line) (*Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.single = false
	p.lines = append(p.lines, l)
	go func() {
		_ = l.Run() // who is on it learns of its end
		p.mu.Lock()
		defer p.mu.Unlock()
		p.lines = slices.DeleteFunc(p.lines, func(x *line) bool { return x == l })
	}()
	c, err := p.on(l)
	if err != nil {
		l.Close()
		return nil, err
	}
	c.Reused = false
	if p.closed {
		l.Drain()
	}
	return c, nil
}

// on opens a stream on a line.
func (p *Pool) on(l *line) (*Conn, error) {
	s, err := l.open()
	if err != nil {
		return nil, err
	}
	return &Conn{Conn: http1.NewConn(s, p.cfg.Limits), pool: p, line: l, gen: l.gen, until: l.until, idle: time.Now(), tls: l.tls, epoch: l.epoch, Reused: true}, nil
}

// stream opens a stream on a line that may carry another call; nil when there
// is none with room. The caller holds the lock.
func (p *Pool) stream() *Conn {
	if len(p.lines) == 0 {
		return nil
	}
	gen, now := p.cfg.Generation(), time.Now()
	for _, l := range p.lines {
		if l.gen != gen || !l.until.IsZero() && !now.Before(l.until) {
			p.retire(l)
			continue
		}
		c, err := p.on(l)
		if err != nil {
			continue
		}
		if c.Stands() != nil {
			c.Discard()
			p.retire(l)
			continue
		}
		return c
	}
	return nil
}

// onLine says whether c is a stream.
func (c *Conn) onLine() bool { return c.line != nil }

// retire has a line end with the last call on it. The caller holds the lock.
func (p *Pool) retire(l *line) {
	l.Drain()
	p.idle = slices.DeleteFunc(p.idle, func(c *Conn) bool {
		if c.line == l {
			c.Discard() // never waits
		}
		return c.line == l
	})
}

// recheckLines has the lines end whose peer's proof holds no more. The calls on
// them are their borrowers' to end. The caller holds the lock.
func (p *Pool) recheckLines() (gone []Peer) {
	for _, l := range p.lines {
		if l.tls == nil {
			continue
		}
		if err := p.cfg.Standing(l.tls.ConnectionState()); err != nil && l.Live() {
			gone = append(gone, Peer{ID: p.t.id, Addr: p.t.addr, Err: err})
			p.retire(l)
		}
	}
	return gone
}

// maxDials is how many dials may be under way. A peer may turn out to be one on
// whose connections calls share, for which one does: nobody dials beside the
// first dial, and beside a line only when it is full.
func (p *Pool) maxDials() int {
	if p.single || p.t.id.IsZero() && !p.h2c {
		return p.cfg.MaxDials
	}
	return 1
}
