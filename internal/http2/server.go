package http2

import (
	"bytes"
	"net"
	"net/http"

	"sallyport/internal/http1"
)

// Accepted makes a Conn of a connection that this end has accepted, whose client
// speaks HTTP/2: its preface comes first. accept is told of each new lane, on
// which a request waits, and must not block; on false the call is refused.
func Accepted(nc net.Conn, cfg Config, accept func(*Lane) bool) *Conn {
	return newConn(nc, cfg, accept)
}

// beginCall begins a call: on a lane that rests, else on a new one, for announce.
// The lock of c is held.
func (c *Conn) beginCall(h header, s *section) error {
	end := h.flags&flagEnd != 0
	c.last = h.stream
	full := c.leaving == gone || len(c.streams) >= c.cfg.Streams || c.err != nil
	if full || !s.large && !s.isRequest(end) {
		code := Protocol
		if full {
			code = RefusedStream
		}
		c.reset(h.stream, code)
		if c.leaving != gone { // else the peer has not heard it yet
			c.cfg.Violated(map[bool]Reason{true: TooMany, false: Malformed}[full])
		}
		return c.broken()
	}
	l, fresh := c.resting(), false
	if l == nil && len(c.lanes) < 2*c.cfg.Streams {
		l, fresh = c.newLane(), true
	}
	if l == nil { // calls that are over here are not yet over behind us
		c.reset(h.stream, RefusedStream)
		return c.noisy()
	}
	l.carry(h.stream)
	l.peerEnd = end
	l.mu.Lock()
	l.request(s, end)
	l.got.end = end
	l.mu.Unlock()
	if fresh {
		c.in.calls = append(c.in.calls, l)
	} else {
		c.in.wakes(l)
	}
	return nil
}

// announce tells of the new lanes, once for all that came together: a call that
// is broken off behind its very head costs nobody a goroutine. When the
// connection ends by err, they go with it.
func (c *Conn) announce(err error) error {
	in := &c.in
	for i, l := range in.calls {
		in.calls[i] = nil
		c.mu.Lock()
		if err != nil && !l.closed {
			delete(c.streams, l.id)
			delete(c.lanes, l)
			c.open.Store(int64(len(c.lanes)))
			l.id, l.closed = 0, true
		}
		l.known = !l.closed
		known := l.known
		c.mu.Unlock()
		if known && !c.accept(l) {
			_ = l.Reset(RefusedStream) // it never fails
			err = c.noisy()
		}
	}
	in.calls = in.calls[:0]
	return err
}

// resting takes the lane that has come to rest last.
func (c *Conn) resting() *Lane {
	for n := len(c.idle); n > 0; n = len(c.idle) {
		l := c.idle[n-1]
		c.idle[n-1] = nil
		c.idle = c.idle[:n-1]
		if !l.closed && l.werr == nil && l.resting {
			return l
		}
	}
	return nil
}

// isRequest says whether the section is the head of a request (RFC 9113 section
// 8.3.1, RFC 8441 section 4).
func (s *section) isRequest(end bool) bool {
	const plain = pseudoMethod | pseudoScheme | pseudoPath
	need, may := uint8(plain), uint8(plain|pseudoAuthority)
	switch {
	case string(s.method()) == "CONNECT" && s.pseudo&pseudoProtocol != 0:
		need, may = plain|pseudoAuthority|pseudoProtocol, plain|pseudoAuthority|pseudoProtocol
		if string(s.protocol()) != "websocket" || s.length >= 0 {
			return false
		}
	case string(s.method()) == "CONNECT":
		need, may = pseudoMethod|pseudoAuthority, pseudoMethod|pseudoAuthority
		if s.length >= 0 {
			return false
		}
	}
	switch {
	case s.bad, s.pseudo&need != need, s.pseudo&^may != 0:
		return false
	case end && s.length > 0:
		return false
	case !isMethod(s.method()), need&pseudoScheme != 0 && string(s.scheme()) != "http" && string(s.scheme()) != "https":
		return false
	}
	// Authority and path stand in lines of their own in HTTP/1.1, between blanks.
	return need&pseudoPath == 0 || isTarget(s.path(), s.method())
}

func isMethod(s []byte) bool {
	for _, c := range s {
		if (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return len(s) > 0
}

func isTarget(s, method []byte) bool {
	if len(s) == 0 || s[0] != '/' && (string(s) != "*" || string(method) != "OPTIONS") {
		return false
	}
	for _, c := range s {
		if c <= ' ' || c == 0x7f {
			return false
		}
	}
	return true
}

// webSocketKey is what a request for a WebSocket says in HTTP/1.1, and HTTP/2
// leaves out: it proves that the answer is to this very request, which a stream
// does by itself.
const webSocketLines = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: c2FsbHlwb3J0LWgyLXdzIQ==\r\n"

// request makes the head of a request of the section. The lock of l is held.
func (l *Lane) request(s *section, end bool) {
	l.fresh()
	l.out.restart()
	g := &l.got
	if s.large {
		l.rerr = &http1.ProtocolError{Status: http.StatusRequestHeaderFieldsTooLarge, Reason: http1.ReasonHeadTooLarge, Detail: "the head is larger than the limit"}
		g.begun = true
		return
	}
	target, method := s.path(), s.method()
	switch {
	case s.pseudo&pseudoProtocol != 0:
		method, l.out.asked = methodGET, askedWebSocket
	case string(method) == "CONNECT":
		target, l.out.asked = s.authority(), askedConnect
	}
	l.out.head = string(method) == "HEAD"
	b := append(append(append(g.store[:0], method...), ' '), target...)
	b = append(b, " HTTP/1.1\r\n"...)
	if s.pseudo&pseudoAuthority != 0 {
		b = appendField(b, "Host", s.authority())
	}
	// A Host that says something else makes two of them, which are refused.
	if s.hosted && !bytes.Equal(s.host, s.authority()) {
		b = appendField(b, "Host", s.host)
	}
	b = append(b, s.lines...)
	if len(s.cookies) > 0 {
		b = append(append(append(b, "Cookie: "...), s.cookies...), "\r\n"...)
	}
	switch {
	case l.out.asked == askedWebSocket:
		b = append(b, webSocketLines...)
		g.held = true
	case l.out.asked == askedConnect:
		g.held = true
	case s.length >= 0:
		b = appendNumber(append(b, "Content-Length: "...), s.length)
		g.want = s.length
	case !end:
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
		g.chunks = true
	case announces(method):
		b = append(b, "Content-Length: 0\r\n"...)
	}
	g.store = append(b, "\r\n"...)
	g.text = g.store
}

var methodGET = []byte("GET")

// announces says whether a request of this method that has no body says so.
func announces(method []byte) bool {
	return string(method) == "POST" || string(method) == "PUT" || string(method) == "PATCH"
}
