package egress

import (
	"net"
	"slices"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/mux"
)

const (
	// maxLanes is how many requests share a connection of HTTP/2 to a host.
	maxLanes = 100
	// laneWindow is what a host may send of an answer before it is read, at first
	// and at most; laneBodies is by how much the windows of all grow.
	laneWindow, laneMost = 64 << 10, 256 << 10
	laneBodies           = 64 << 20
)

// A line is a connection of HTTP/2 to a host, on which the requests of one workload
// are streams.
type line struct {
	*http2.Conn
	of *origin // what it is made of
}

// share makes a line of a new connection, and gives its first stream.
func (p *origins) share(o *origin) (*origin, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		o.nc.Close()
		return nil, refuse(ReasonShutdown, "the gateway is stopping")
	}
	if p.lines == nil {
		p.lines, p.bodies = make(map[originKey][]*line), mux.NewBudget(laneBodies)
	}
	l := &line{of: o, Conn: http2.Dialled(o.nc, http2.Config{
		Streams: maxLanes, Window: laneWindow, MaxWindow: laneMost, Buffer: maxLanes * laneMost, Budget: p.bodies, Idle: originIdle,
	})}
	s, err := l.stream()
	if err != nil {
		l.Close()
		return nil, refuse(ReasonDial, "%s: %v", o.key.host, err)
	}
	p.running.Go(func() {
		_ = l.Run() // who is on it learns of its end
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.lines[o.key] = slices.DeleteFunc(p.lines[o.key], func(x *line) bool { return x == l }); len(p.lines[o.key]) == 0 {
			delete(p.lines, o.key)
		}
	})
	if p.lines[o.key] = append(p.lines[o.key], l); len(p.lines[o.key]) > maxIdleOrigin {
		l.Drain()
	}
	return s, nil
}

// stream opens one for another request.
func (l *line) stream() (*origin, error) {
	s, err := l.Open()
	if err != nil {
		return nil, err
	}
	return &origin{Conn: http1.NewConn(net.Conn(s), http1.Limits{}), nc: s, tcp: l.of.tcp, line: l, key: l.of.key, to: l.of.to, born: l.of.born}, nil
}

// stream opens one on a line that may carry another request, nil without one.
func (p *origins) stream(key originKey, fits func(place) bool) *origin {
	p.mu.Lock()
	list := slices.Clone(p.lines[key])
	p.mu.Unlock()
	for _, l := range list {
		if time.Since(l.of.born) >= originAge || !fits(l.of.to) {
			l.Drain()
			continue
		}
		if o, err := l.stream(); err == nil {
			o.reused = true
			return o
		}
	}
	return nil
}

// closeLines ends them all. The caller holds the lock.
func (p *origins) closeLines() {
	for _, list := range p.lines {
		for _, l := range list {
			l.Close()
		}
	}
}
