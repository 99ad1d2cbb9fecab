package egress

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/record"
)

// handover is a listener that is given connections instead of accepting them.
type handover struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newHandover() *handover {
	return &handover{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (h *handover) give(c net.Conn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.done:
		return false
	}
}

// Accept waits for a connection.
func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (h *handover) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

// Addr is of no address.
func (h *handover) Addr() net.Addr { return &net.TCPAddr{} }

// newHTTP2 makes the server of HTTP/2 connections that serveConn has shaken
// hands with.
func (g *Gateway) newHTTP2() *http.Server {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true) // TLS is under it, and over before
	return &http.Server{
		Handler:   http.HandlerFunc(g.serveStream),
		Protocols: protocols,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, handedKey{}, c)
		},
		MaxHeaderBytes: cmp.Or(g.lim.Request.Head, 8<<10),
		IdleTimeout:    5 * time.Minute,
		ErrorLog:       log.New(io.Discard, "", 0),
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: g.lim.Streams,
			MaxReadFrameSize:     16 << 10, // the least: the largest frame of a connection stays in memory
			// A peer that is gone without a word is found by pings.
			SendPingTimeout:  30 * time.Second,
			PingTimeout:      15 * time.Second,
			WriteByteTimeout: time.Minute,
			// What callers may send ahead of a destination that does not read.
			MaxReceiveBufferPerConnection: connWindow,
			MaxReceiveBufferPerStream:     streamWindow,
		},
	}
}

// handedKey is what streams find their connection by.
type handedKey struct{}

// handed is a connection that the HTTP/2 server gets. It knows nothing of TLS.
type handed struct {
	net.Conn
	w       *wire
	who     *caller
	unread  *unread
	hoarded func()      // there was no memory for what has come
	spared  atomic.Bool // since others hold it
}

// Read fails when there is no memory for what nobody has read.
func (h *handed) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	if !h.unread.came(p[:n]) {
		h.spared.Store(!h.who.firsts.Spent(connWindow))
		h.hoarded()
		return 0, errHoarded
	}
	return n, err
}

func (h *handed) Write(p []byte) (int, error) {
	h.unread.went(p)
	return h.Conn.Write(p)
}

// Close closes the wire too, for which serveHTTP2 waits.
func (h *handed) Close() error {
	defer h.w.Close()
	h.unread.end()
	return h.Conn.Close()
}

// serveHTTP2 gives the connection to the HTTP/2 server and waits for its end.
func (g *Gateway) serveHTTP2(w *wire, tc *record.Conn, who *caller) {
	g.mu.Lock()
	conns := g.h2conns
	g.mu.Unlock()
	hoarded := g.cfg.Metrics.RequestsRefused(reporter, "h2_hoarded").Inc
	if conns.give(&handed{Conn: tc, w: w, who: who, unread: newUnread(who.firsts), hoarded: hoarded}) {
		<-w.closed
	}
}

// serveStream serves one HTTP/2 stream, which is judged by itself.
func (g *Gateway) serveStream(w http.ResponseWriter, r *http.Request) {
	if !g.enter() {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	defer g.wg.Done()
	defer func() {
		if p := recover(); p != nil {
			g.logPanic(p)
			panic(http.ErrAbortHandler) // resets the stream, in silence
		}
	}()
	on, ok := r.Context().Value(handedKey{}).(*handed)
	if !ok {
		w.WriteHeader(http.StatusForbidden) // no handshake leads here
		return
	}
	if !g.asks(on.who) {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	answered := sync.OnceFunc(func() { g.answered(on.who) })
	defer answered()
	var t *tunnel
	defer func() { g.brokenOff(on, r, t) }()
	if !g.meant(r.Context(), on.who) {
		return
	}
	var ans *answer
	t, ans = g.request2(on.who, r)
	if ans != nil {
		// A caller that opens no window would keep the stream for ever.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(g.lim.HelloTimeout))
		h := w.Header()
		h.Set("Content-Type", "application/json")
		if ans.id != "" {
			h.Set(decisionHeader, ans.id)
		}
		if ans.status == http.StatusMethodNotAllowed {
			h.Set("Allow", http.MethodConnect)
		}
		if on.who.disproved.Load() {
			h.Set("Connection", "close") // which HTTP/2 says in a way of its own
		}
		w.WriteHeader(ans.status)
		if r.Method != http.MethodHead {
			_, _ = w.Write(ans.body())
		}
		return
	}
	answered() // a tunnel counts against limits of its own
	s := &stream2{w: w, r: r.Body, rc: http.NewResponseController(w)}
	defer s.finish()
	// What a stream has brought goes with it, and is not kept for a destination that
	// takes nothing.
	defer context.AfterFunc(r.Context(), func() {
		r.Body.Close()
		t.broke(true)
	})()
	w.WriteHeader(http.StatusOK)
	if err := s.rc.Flush(); err != nil {
		s.Abort()
	}
	if t.asked != 0 {
		always := func() bool { return true }
		g.inside(r.Context(), t, &lane2{stream2: s}, &asker{abort: s.Abort, rest: always, wake: always})
		return
	}
	g.carry(t, s)
}

// restOfWorn is how long a request of a caller waits that has broken off many.
const restOfWorn = 20 * time.Millisecond

// meant says whether a request still stands. One of a caller that has just broken
// off many is not acted on at once: most of a flood is broken off right behind its
// head, and then costs no decision and no connection outside.
func (g *Gateway) meant(ctx context.Context, who *caller) bool {
	if ctx.Err() == nil && g.calmOf.Worn(who.id) {
		select {
		case <-time.After(g.restOfWorn):
		case <-ctx.Done():
		}
	}
	return ctx.Err() == nil
}

// brokenOff takes note of a stream that its caller has reset before anything came
// back, and ends the connection of one who does that too often.
func (g *Gateway) brokenOff(on *handed, r *http.Request, t *tunnel) {
	if on.spared.Load() {
		return
	}
	if r.Context().Err() != nil && (t == nil || t.down.Load() == 0) && !g.calmOf.Spend(on.who.id, 1) {
		on.w.Close()
	}
}

func (g *Gateway) request2(who *caller, r *http.Request) (t *tunnel, a *answer) {
	defer func(began time.Time) { g.counted(who, began, t, a) }(time.Now())
	switch {
	case r.Method != http.MethodConnect:
		return nil, g.denyRequest(who, verbOf(r.Method), refuse(ReasonMethod, "only CONNECT is served; target %s", clip(r.RequestURI)))
	case len(r.Header["Host"]) > 0:
		return nil, g.denyRequest(who, http.MethodConnect, refuse(ReasonRequest, "host stands beside :authority"))
	case len(r.Header[":protocol"]) > 0:
		return nil, g.denyRequest(who, http.MethodConnect, refuse(ReasonRequest, "extended CONNECT is not served"))
	case r.ContentLength > 0: // RFC 9110 section 9.3.6
		return nil, g.denyRequest(who, http.MethodConnect, refuse(ReasonRequest, "CONNECT has a content-length, and has no content: send it without, what follows is the tunnel's"))
	}
	return g.open(r.Context(), who, r.Host, r.Header.Get(originHeader), g.traceOf([]byte(r.Header.Get("traceparent"))))
}

// verbOf keeps an odd method out of the records.
func verbOf(method string) string {
	if len(method) > 16 {
		return ""
	}
	return method
}

// A stream2 is an HTTP/2 stream as the caller's side of a tunnel. net/http can
// end a stream only as a whole, so when the destination ends first the caller
// reads that end and cannot send more.
type stream2 struct {
	w  http.ResponseWriter
	r  io.ReadCloser
	rc *http.ResponseController

	mu   sync.Mutex // guards over; rc must not be used once the handler is left
	over bool
}

func (s *stream2) Read(p []byte) (int, error) { return s.r.Read(p) }

func (s *stream2) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	if err == nil {
		err = s.rc.Flush()
	}
	return n, err
}

// CloseWrite cannot.
func (s *stream2) CloseWrite() error { return errWhole }

var past = time.Unix(1, 0)

// CloseRead makes Read return, and lets go what it has not read: a deadline would
// keep that.
func (s *stream2) CloseRead() { s.r.Close() }

// Abort resets the stream.
func (s *stream2) Abort() {
	s.r.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		_ = s.rc.SetWriteDeadline(past)
	}
}

func (s *stream2) finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
}

// A lane2 is a stream2 as a connection on which something else is spoken.
type lane2 struct {
	*stream2
	// Guarded by mu: until when what is written must be out, how many write, and what
	// resets the stream then. net/http would do so even if nobody writes.
	until   time.Time
	writing int
	late    *time.Timer
}

func (c *lane2) Write(p []byte) (int, error) {
	c.writes(1)
	defer c.writes(-1)
	return c.stream2.Write(p)
}

func (c *lane2) writes(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writing += n
	c.arm()
}

// arm is called under mu.
func (c *lane2) arm() {
	if c.late != nil {
		c.late.Stop()
		c.late = nil
	}
	if c.writing > 0 && !c.until.IsZero() {
		c.late = time.AfterFunc(time.Until(c.until), c.Abort)
	}
}

// Close resets the stream.
func (c *lane2) Close() error {
	c.Abort()
	return nil
}

// LocalAddr and RemoteAddr are of no address.
func (c *lane2) LocalAddr() net.Addr  { return &net.TCPAddr{} }
func (c *lane2) RemoteAddr() net.Addr { return &net.TCPAddr{} }

// SetDeadline sets both deadlines.
func (c *lane2) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline and SetWriteDeadline set one each. Writing that takes longer ends
// the stream.
func (c *lane2) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return net.ErrClosed
	}
	return c.rc.SetReadDeadline(t)
}

func (c *lane2) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.until = t
	c.arm()
	return nil
}
