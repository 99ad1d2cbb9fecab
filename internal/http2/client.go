package http2

import (
	"bytes"
	"net"
	"net/http"

	"sallyport/internal/http1"
)

// Dialled makes a Conn of a connection that this end has dialled, to a server
// that is known to speak HTTP/2.
func Dialled(nc net.Conn, cfg Config) *Conn { return newConn(nc, cfg, nil) }

// Open makes a new lane. Each request written to it is a stream of its own.
func (c *Conn) Open() (*Lane, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil || c.leaving != staying:
		return nil, ErrClosing
	case len(c.lanes) >= min(c.limit, c.cfg.Streams):
		return nil, ErrFull
	}
	return c.newLane(), nil
}

// ask begins a call on the next stream. The lock of c is held.
func (l *Lane) ask() error {
	c := l.c
	switch {
	case l.werr != nil:
		return l.werr
	case l.id != 0:
		return errUnclear
	case c.leaving != staying || len(c.streams) >= c.limit:
		return ErrRefused // by us on behalf of the peer: nothing was sent
	case c.last >= maxStream-2:
		c.leave() // numbers are not used again
		return ErrRefused
	case c.last == 0:
		c.last = 1
	default:
		c.last += 2
	}
	l.carry(c.last)
	l.mu.Lock()
	l.fresh()
	l.mu.Unlock()
	return nil
}

// request makes the field section of a request of its head in HTTP/1.1, as
// package http1 writes it, with Host first, and says how long that is.
func (o *outgoing) request(p []byte, secure, extended bool) (n int, body framing, err error) {
	end := bytes.IndexByte(p, '\n')
	sp := bytes.IndexByte(p, ' ')
	last := bytes.LastIndexByte(p[:max(end, 0)], ' ')
	host, ok := bytes.CutPrefix(p[end+1:], hostIs)
	to := bytes.IndexByte(host, '\n')
	if !ok || sp < 1 || last <= sp || p[end-1] != '\r' || to < 1 || host[to-1] != '\r' {
		return 0, 0, errUnclear
	}
	method, target, host, lines := p[:sp], p[sp+1:last], host[:to-1], host[to+1:]
	o.head, o.asked, o.tunnel = string(method) == "HEAD", 0, false
	if string(method) == "CONNECT" {
		return 0, 0, errUnclear // tunnels are not for other makes
	}
	o.heads.begin()
	o.heads.block = appendAsked(o.heads.block, method, target, host, secure, false)
	n, said, err := o.heads.fields(lines)
	if err == nil && said.webSocket && string(method) == "GET" {
		if !extended {
			return 0, 0, ErrNoWebSocket
		}
		o.asked, o.proof = askedWebSocket, appendProof(o.proof[:0], lines[:n])
		o.heads.begin()
		o.heads.block = appendAsked(o.heads.block, method, target, host, secure, true)
		n, said, err = o.heads.fields(lines)
	}
	if err != nil {
		return 0, 0, err
	}
	n += len(p) - len(lines)
	o.block = o.heads.block
	switch {
	case o.asked == askedWebSocket:
		return n, bodyTunnel, nil
	case said.chunks:
		return n, bodyChunks, nil
	case said.length <= 1:
		return n, bodyNone, nil
	}
	o.left = said.length - 1
	return n, bodyLength, nil
}

// appendAsked appends the pseudo fields of a request.
func appendAsked(b, method, target, host []byte, secure, webSocket bool) []byte {
	switch {
	case webSocket:
		b = appendNamed(b, indexGET, connect)
		b = appendLine(b, protocol, websocket)
	case string(method) == "GET":
		b = appendIndexed(b, indexGET)
	case string(method) == "POST":
		b = appendIndexed(b, indexPOST)
	default:
		b = appendNamed(b, indexGET, method)
	}
	if secure {
		b = appendIndexed(b, indexHTTPS)
	} else {
		b = appendIndexed(b, indexHTTP)
	}
	if len(target) == 1 && target[0] == '/' {
		b = appendIndexed(b, indexSlash)
	} else {
		b = appendNamed(b, indexSlash, target)
	}
	return appendNamed(b, indexAuthority, host)
}

// What of the static table begins a request.
const (
	indexAuthority = 1 // with another value
	indexGET       = 2
	indexPOST      = 3
	indexSlash     = 4
	indexHTTP      = 6
	indexHTTPS     = 7
)

var (
	hostIs    = []byte("Host: ")
	connect   = []byte("CONNECT")
	protocol  = []byte(":protocol")
	websocket = []byte("websocket")
)

// appendNamed appends a field with a name of the static table.
func appendNamed(b []byte, index uint8, value []byte) []byte {
	b = appendInt(b, 0, 4, uint64(index))
	b = appendInt(b, 0, 7, uint64(len(value)))
	return append(b, value...)
}

// appendProof appends what answers the key of a request for a WebSocket in
// HTTP/1.1; nothing when there is no key.
func appendProof(b, lines []byte) []byte {
	for line := range bytes.Lines(lines) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		if is(name, "sec-websocket-key") {
			return http1.AppendWebSocketProof(b, bytes.TrimSpace(value))
		}
	}
	return b
}

// maxInterim bounds the interim answers to one call.
const maxInterim = 8

// answer takes in a field section from a server: an interim answer, an answer,
// or what ends it. The lock of c is held.
func (c *Conn) answer(h header, l *Lane, s *section) error {
	if l.answered() {
		return c.trailers(h, l, s)
	}
	end := h.flags&flagEnd != 0
	status, ok := s.isAnswer(end)
	switch {
	case s.large:
		return c.fault(l, EnhanceYourCalm, TooLarge)
	case !ok:
		return c.fault(l, Protocol, Malformed)
	}
	l.mu.Lock()
	reason := l.told(s, status, end)
	l.got.end = l.got.end || end && reason == ""
	l.mu.Unlock()
	if reason != "" {
		return c.fault(l, Protocol, reason)
	}
	if end {
		l.ends()
	}
	c.in.wakes(l)
	return nil
}

// isAnswer says whether the section is the head of an answer (RFC 9113 section
// 8.3.2), and of which status.
func (s *section) isAnswer(end bool) (status int, ok bool) {
	if s.bad || s.pseudo != pseudoStatus || len(s.status()) != 3 {
		return 0, false
	}
	for _, c := range s.status() {
		if c < '0' || c > '9' {
			return 0, false
		}
		status = status*10 + int(c-'0')
	}
	switch {
	case status < 100 || status > 599, status == http.StatusSwitchingProtocols:
		return 0, false
	case status < 200 && (end || s.length >= 0):
		return 0, false
	}
	return status, true
}

// told makes the head of an answer of the section. The locks of c and l are
// held.
func (l *Lane) told(s *section, status int, end bool) Reason {
	g := &l.got
	unread := bytes.Clone(g.text)
	b := append(g.store[:0], unread...)
	if l.out.asked == askedWebSocket && status/100 == 2 && !end {
		b = append(b, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: "...)
		b = append(append(append(b, l.out.proof...), "\r\n"...), s.lines...)
		g.raw, g.told = true, true
		g.store = append(b, "\r\n"...)
		g.text = g.store
		return ""
	}
	b = append(b, "HTTP/1.1 "...)
	b = append(append(append(b, s.status()...), ' '), http.StatusText(status)...)
	b = append(append(b, "\r\n"...), s.lines...)
	bare := l.out.head || status == http.StatusNoContent || status == http.StatusNotModified
	switch {
	case status < 200:
		if g.interim++; g.interim > maxInterim {
			return Flood
		}
	case bare && s.length >= 0:
		b = appendNumber(append(b, "Content-Length: "...), s.length)
	case bare:
	case end && s.length > 0:
		return BadSize
	case end:
		b = append(b, "Content-Length: 0\r\n"...)
	case s.length < 0, s.tailed: // HTTP/1.1 has no trailers behind a body of announced length
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
		g.chunks = true
	default:
		b = appendNumber(append(b, "Content-Length: "...), s.length)
	}
	if status >= 200 {
		g.told = true
		if g.want = s.length; bare {
			g.want = 0
		}
	}
	g.store = append(b, "\r\n"...)
	g.text = g.store
	return ""
}

// answered says whether the head of the answer is here, so that what comes next
// ends it.
func (l *Lane) answered() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.got.told
}
