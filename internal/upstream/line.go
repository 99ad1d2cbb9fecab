package upstream

import (
	"crypto/tls"
	"slices"
	"time"

	"sallyport/internal/hop"
	"sallyport/internal/http1"
)

// A line is a connection to a proxy of our own: many calls share it, each on a
// stream, which the pool lends and keeps as it does connections.
type line struct {
	*hop.Conn
	gen   uint64
	until time.Time
	tls   *tls.Conn
	epoch uint64
}

// wireProto says what both ends agreed on.
func wireProto(tc *tls.Conn) string { return tc.ConnectionState().NegotiatedProtocol }

// firstOn makes a line of a connection on which the peer has agreed to it,
// serves it until it ends, and lends its first stream.
func (p *Pool) firstOn(tc *tls.Conn, gen uint64, until time.Time, epoch uint64) (*Conn, error) {
	l := &line{Conn: hop.Dialled(tc, hop.Config{Idle: p.cfg.MaxIdleTime}), gen: gen, until: until, tls: tc, epoch: epoch}
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
	s, err := l.Open()
	if err != nil {
		return nil, err
	}
	return &Conn{Conn: http1.NewConn(s, p.cfg.Limits), pool: p, gen: l.gen, until: l.until, idle: time.Now(), tls: l.tls, epoch: l.epoch, Reused: true}, nil
}

// stream opens a stream on a line that may carry another call; nil when there
// is none with room. The caller holds the lock.
func (p *Pool) stream() *Conn {
	if len(p.lines) == 0 {
		return nil
	}
	gen, now := p.cfg.Generation(), time.Now()
	for _, l := range p.lines {
		if l.gen != gen || !now.Before(l.until) {
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
func (c *Conn) onLine() bool {
	_, ok := c.NetConn().(*hop.Stream)
	return ok
}

// retire has a line end with the last call on it. The caller holds the lock.
func (p *Pool) retire(l *line) {
	l.Drain()
	p.idle = slices.DeleteFunc(p.idle, func(c *Conn) bool {
		s, ok := c.NetConn().(*hop.Stream)
		if ok = ok && s.Conn() == l.Conn; ok {
			c.Discard() // never waits
		}
		return ok
	})
}

// recheckLines has the lines end whose peer's proof holds no more. The calls on
// them are their borrowers' to end. The caller holds the lock.
func (p *Pool) recheckLines() (gone []Peer) {
	for _, l := range p.lines {
		if err := p.cfg.Standing(l.tls.ConnectionState()); err != nil && l.Live() {
			gone = append(gone, Peer{ID: p.t.id, Addr: p.t.addr, Err: err})
			p.retire(l)
		}
	}
	return gone
}

// maxDials is how many dials may be under way. A peer may turn out to be one of
// our own, for which one connection does: nobody dials beside the first dial,
// and beside a line only when it is full.
func (p *Pool) maxDials() int {
	if p.t.id.IsZero() || p.single {
		return p.cfg.MaxDials
	}
	return 1
}
