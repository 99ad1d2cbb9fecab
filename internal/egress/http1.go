package egress

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/record"
)

const established = "HTTP/1.1 200 Connection established\r\n\r\n"

// serveHTTP1 answers requests until one becomes a tunnel, and carries that.
func (g *Gateway) serveHTTP1(w *wire, tc *record.Conn, who *caller) {
	hc := http1.NewConn(tc, g.lim.Request)
	t := g.await1(w, hc, who)
	left := hc.Unread()
	hc.Release()
	if t != nil {
		g.tunnel1(g.base, t, &stream1{
			pipe: tc, w: w, left: left, abort: w.reset,
			rest: func() bool { return g.setIdle(w, true) }, wake: func() bool { return g.setIdle(w, false) },
		})
	}
}

// await1 answers requests until one becomes a tunnel; nil when the connection is
// to end.
func (g *Gateway) await1(w *wire, hc *http1.Conn, who *caller) *tunnel {
	a := &asker{hc: hc, who: who, abort: w.reset}
	var req http1.Request
	for g.setIdle(w, true) {
		err := hc.ReadRequest(&req)
		if !g.setIdle(w, false) {
			break
		}
		if err == nil && string(req.Method) != http.MethodConnect {
			if !g.ask(g.base, a, &req) {
				break
			}
			continue
		}
		t, ans := g.request1(g.base, who, &req, err)
		if t != nil || ans == nil {
			return t
		}
		if err == nil && (g.yields() || who.disproved.Load()) {
			req.KeepAlive = false
		}
		if !ans.write1(hc, &req, err) {
			break
		}
	}
	return nil
}

// write1 answers what ReadRequest returned, and reports whether the connection
// may carry another request.
func (a *answer) write1(hc *http1.Conn, req *http1.Request, err error) bool {
	if err != nil {
		req = nil
	} else if hc.Buffered() > 0 {
		req.KeepAlive = false // what follows was meant for the tunnel
	}
	var keep bool
	if req != nil && req.Form != http1.Authority && speaksGRPC(req) { // a 200 to CONNECT would be a tunnel
		keep, err = hc.WriteRefusal(req, http.StatusOK, http1.AppendGRPC(a.fields(), "application/grpc", a.status, a.text))
	} else {
		keep, err = hc.WriteError(req, a.status, a.fields(), a.body())
	}
	if err == nil && !keep {
		_ = hc.Linger()
	}
	return err == nil && keep
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

// request1 acts on what ReadRequest returned, which is a CONNECT if it is a
// request. Without tunnel and answer the connection just ends.
func (g *Gateway) request1(ctx context.Context, who *caller, req *http1.Request, err error) (t *tunnel, a *answer) {
	defer func(began time.Time) { g.counted(who, began, t, a) }(time.Now())
	if ans := g.unread(who, req, err); ans != nil || err != nil {
		return nil, ans
	}
	return g.open(ctx, who, string(req.Target), string(req.Get(originHeader)), g.traceOf(req.Get("traceparent")))
}

// unreadable says that something was sent, and is not to be made sense of.
func unreadable(err error) bool {
	var bad *http1.ProtocolError
	return errors.As(err, &bad) || errors.Is(err, http1.ErrHeadTimeout)
}

// unread is the answer to what could not be read, nil when there is nobody to
// answer.
func (g *Gateway) unread(who *caller, req *http1.Request, err error) *answer {
	var bad *http1.ProtocolError
	switch {
	case errors.As(err, &bad):
		ans := g.denyRequest(who, "", refuse(ReasonRequest, "%v; target %s", bad, clip(string(req.Target))))
		if ans.status == http.StatusBadRequest {
			ans.status = http1.StatusOf(err)
		}
		return ans
	case errors.Is(err, http1.ErrHeadTimeout):
		ans := g.denyRequest(who, "", refuse(ReasonRequest, "the request was not whole in time"))
		ans.status = http.StatusRequestTimeout
		return ans
	}
	return nil
}

// tunnel1 makes a tunnel of what carried its request, which is done with when it
// returns.
func (g *Gateway) tunnel1(ctx context.Context, t *tunnel, s *stream1) {
	_ = s.SetDeadline(time.Time{})
	if _, err := s.Write([]byte(established)); err != nil {
		s.Abort()
	}
	if t.asked != 0 {
		g.inside(ctx, t, s, &asker{abort: s.abort, rest: s.rest, wake: s.wake})
		s.linger()
		return
	}
	g.carry(t, s)
	if t.brokenOff() && context.Cause(ctx) != errHoarded { //nolint:errorlint // made by us
		if _, alone := s.pipe.(*record.Conn); alone {
			g.vain.Spend(s.w.from, costHandshake)
		}
		if !g.calmOf.Spend(t.who.id, 1) {
			s.w.Close()
		}
	}
	s.linger()
}

// A pipe carries requests of HTTP/1.1: a TLS connection, or a stream of one.
type pipe interface {
	net.Conn
	CloseWrite() error
	// Await waits until there is something to read.
	Await() error
}

// A stream1 is a pipe as the caller's side of a tunnel.
type stream1 struct {
	pipe
	w     *wire
	left  []byte // read before the tunnel began
	abort func() // breaks the pipe off
	// rest and wake are as an asker has them.
	rest, wake func() bool
}

func (s *stream1) Read(p []byte) (int, error) {
	if len(s.left) > 0 {
		n := copy(p, s.left)
		s.left = s.left[n:]
		return n, nil
	}
	return s.pipe.Read(p)
}

func (s *stream1) Await() error {
	if len(s.left) > 0 {
		return nil
	}
	return s.pipe.Await()
}

// CloseRead makes Read return.
func (s *stream1) CloseRead() { _ = s.SetReadDeadline(time.Unix(1, 0)) }

// Abort breaks off what would look like an orderly end if it were just closed.
func (s *stream1) Abort() { s.abort() }

// linger lets the caller read what was sent last: to close on bytes not yet
// read would break the pipe off and could destroy it.
func (s *stream1) linger() {
	_ = s.CloseWrite()
	_ = s.SetReadDeadline(time.Now().Add(time.Second))
	_, _ = io.CopyN(io.Discard, s.pipe, 256<<10)
	s.Close()
}
