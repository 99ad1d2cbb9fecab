package egress

import (
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/record"
	"sallyport/internal/telemetry"
)

// lookback keeps what was read through it, so that bytes the HTTP engine has
// taken beyond a head can be given to the tunnel.
type lookback struct {
	*record.Conn
	seen []byte
}

func (l *lookback) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	l.seen = append(l.seen, p[:n]...)
	return n, err
}

// keep forgets all but the last n bytes and returns those.
func (l *lookback) keep(n int) []byte {
	l.seen = append(l.seen[:0], l.seen[len(l.seen)-n:]...)
	return l.seen
}

const established = "HTTP/1.1 200 Connection established\r\n\r\n"

// serveHTTP1 answers requests until one becomes a tunnel, and carries that.
func (g *Gateway) serveHTTP1(w *wire, tc *record.Conn, who *caller) {
	lb := &lookback{Conn: tc}
	hc := http1.NewConn(lb, g.lim.Request)
	var req http1.Request
	for {
		if !g.setIdle(w, true) {
			break
		}
		err := hc.ReadRequest(&req)
		if !g.setIdle(w, false) {
			break
		}
		t, ans := g.request1(who, &req, err)
		if t != nil {
			left := lb.keep(hc.Buffered())
			hc.Release()
			g.tunnel1(t, w, tc, left)
			return
		}
		if ans == nil {
			break
		}
		r := &req
		if err != nil {
			r = nil
		} else if hc.Buffered() > 0 {
			req.KeepAlive = false // what follows was meant for the tunnel
		}
		if g.yields() {
			req.KeepAlive = false
		}
		lb.keep(hc.Buffered())
		keep, err := hc.WriteError(r, ans.status, ans.fields(), ans.body())
		if err != nil {
			break
		}
		if !keep {
			_ = hc.Linger()
			break
		}
	}
	hc.Release()
}

// fields are the header lines of an answer.
func (a *answer) fields() []byte {
	var b []byte
	if a.id != "" {
		b = append(b, decisionHeader+": "+a.id+"\r\n"...)
	}
	if a.status == http.StatusMethodNotAllowed {
		b = append(b, "Allow: CONNECT\r\n"...)
	}
	return b
}

// request1 acts on what ReadRequest returned. Without tunnel and answer the
// connection just ends.
func (g *Gateway) request1(who *caller, req *http1.Request, err error) (*tunnel, *answer) {
	var bad *http1.ProtocolError
	switch {
	case errors.As(err, &bad):
		ans := g.denyRequest(who, "", refuse(ReasonRequest, "%v; target %s", bad, clip(string(req.Target))))
		if ans.status == http.StatusBadRequest {
			ans.status = http1.StatusOf(err)
		}
		return nil, ans
	case errors.Is(err, http1.ErrHeadTimeout):
		ans := g.denyRequest(who, "", refuse(ReasonRequest, "the request was not whole in time"))
		ans.status = http.StatusRequestTimeout
		return nil, ans
	case err != nil:
		return nil, nil
	case string(req.Method) != http.MethodConnect:
		return nil, g.denyRequest(who, req.Verb(), refuse(ReasonMethod, "only CONNECT is served; target %s", clip(string(req.Target))))
	}
	trace := ""
	if tr, ok := telemetry.ParseTraceparent(req.Get("traceparent")); ok {
		trace = tr.String()
	}
	return g.open(g.base, who, string(req.Target), string(req.Get(originHeader)), trace)
}

// tunnel1 makes a tunnel of an HTTP/1.1 connection; left is what came with its
// request. The connection is done with when it returns.
func (g *Gateway) tunnel1(t *tunnel, w *wire, tc *record.Conn, left []byte) {
	_ = tc.SetDeadline(time.Time{})
	s := &stream1{Conn: tc, w: w, left: left}
	if _, err := tc.Write([]byte(established)); err != nil {
		s.Abort()
	}
	g.carry(t, s)
	if t.why() == ReasonReset && t.down.Load() == 0 {
		g.calmOf.Spend(t.who.id, 1)
	}
	s.linger()
}

// A stream1 is a whole TLS connection as the caller's side of a tunnel.
type stream1 struct {
	*record.Conn
	w    *wire
	left []byte // read before the tunnel began
}

func (s *stream1) Read(p []byte) (int, error) {
	if len(s.left) > 0 {
		n := copy(p, s.left)
		s.left = s.left[n:]
		return n, nil
	}
	return s.Conn.Read(p)
}

// Await waits until there is something to read.
func (s *stream1) Await() error {
	if len(s.left) > 0 {
		return nil
	}
	return s.Conn.Await()
}

// CloseRead makes Read return.
func (s *stream1) CloseRead() { _ = s.SetReadDeadline(time.Unix(1, 0)) }

// Abort resets the connection: a bare end would look like an orderly one.
func (s *stream1) Abort() {
	if tc, ok := s.w.Conn.(*net.TCPConn); ok {
		_ = tc.SetLinger(0)
	}
	s.w.Close()
}

// linger lets the caller read what was sent last: to close on bytes not yet
// read would reset the connection and could destroy it.
func (s *stream1) linger() {
	_ = s.CloseWrite()
	_ = s.SetReadDeadline(time.Now().Add(time.Second))
	_, _ = io.CopyN(io.Discard, s.Conn, 256<<10)
	s.w.Close()
}
