package shadow

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"sallyport/internal/archive"
	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
)

// Marker is the field by which a shadow knows that it is one. Its value is 1.
const Marker = "Sallyport-Shadow"

// marks replaces what says of which trace the call is.
var marks = http1.NewNameSet("sallyport-shadow", "traceparent")

// limits are of heads that a proxy of ours has written.
var limits = http1.Limits{Head: 256 << 10, Headers: 1000, Target: 64 << 10, AllowParams: true, MinRate: -1}

// A sending is what became of a copy.
type sending struct {
	outcome string
	answer  *tape
	took    time.Duration
	trace   telemetry.Trace
}

// read is the answer; nil when there is none, or not all of it.
func (s *sending) read(method string) *archive.Answer {
	if s.outcome != outcomeAnswered {
		return nil
	}
	return readAnswer(s.answer, method)
}

func (s *sending) release() { s.answer.release() }

// of is the backend that is meant: without a name other endpoints of the service
// that was called.
func (c *Call) of(b mesh.Backend) mesh.Backend {
	if b.Service == "" && b.Address == "" {
		b.Service = c.Service
	}
	return b
}

// send makes the call again, to another backend.
func (m *Mirror) send(ctx context.Context, j *job, to mesh.Backend) *sending {
	to = j.call.of(to)
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	s := &sending{answer: m.tape(), trace: j.call.Trace.Child()}
	start := time.Now()
	for fresh := false; ; fresh = true {
		line, err := m.cfg.Lend(ctx, to, fresh)
		if err != nil {
			s.outcome = outcomeUnreachable
			m.cfg.Log.Debug("a shadow cannot be reached", "shadow", j.shadow.Name, "err", err)
			break
		}
		again, err := m.exchange(ctx, j, to.Service, line, s)
		if err == nil {
			s.outcome = outcomeAnswered
			break
		}
		if again && !fresh {
			s.answer.rewind()
			continue
		}
		m.cfg.Log.Debug("a shadow did not answer", "shadow", j.shadow.Name, "err", err)
		s.outcome = outcomeFailed
		if lost := s.answer.lost(); lost != "" {
			s.outcome = lost
		}
		break
	}
	if ctx.Err() != nil && s.outcome != outcomeAnswered {
		s.outcome = outcomeTimeout
	}
	s.took = time.Since(start)
	if s.trace.Sampled {
		m.cfg.Tracer.Keep(telemetry.Span{
			Trace: s.trace, Parent: j.call.Trace.Span, Name: "shadow " + j.shadow.Name, Kind: telemetry.Client, Start: start, End: start.Add(s.took), Failed: s.outcome != outcomeAnswered,
			Attrs: []telemetry.Attr{{Key: "sallyport.shadow", Text: "true"}, {Key: "sallyport.flag", Text: s.outcome}, {Key: "sallyport.dst", Text: string(to.Service)}},
		})
	}
	return s
}

// exchange says the request on a connection to a service and keeps the answer. Its
// Host is the service's, as of any call to it; that of the primary goes beside it,
// for a sidecar that knows of being a shadow's. Again says that nobody has acted
// on the request, so that it may be said on another one.
func (m *Mirror) exchange(ctx context.Context, j *job, to mesh.ServiceName, line Line, s *sending) (again bool, err error) {
	reusable := false
	defer func() { line.Done(reusable) }()
	defer context.AfterFunc(ctx, func() { line.Conn.Close() })()
	r := j.request.reader()
	if r == nil {
		return false, errors.New("the copy is lost")
	}
	down := http1.NewConn(&caller{r: r, answer: s.answer}, limits)
	defer down.Release()
	var req http1.Request
	if err := down.ReadRequest(&req); err != nil {
		return false, err
	}
	extra := append([]byte("Traceparent: "), s.trace.AppendTraceparent(nil)...)
	extra = append(extra, "\r\n"+Marker+": 1\r\n"...)
	edit := http1.Edit{Drop: marks, Extra: extra, Authority: []byte(string(to) + "." + mesh.Domain)}
	if req.Get("sallyport-host") == nil && !bytes.Equal(edit.Authority, req.Authority) {
		edit.Extra = fmt.Appendf(edit.Extra, "Sallyport-Host: %s\r\n", req.Authority)
	}
	x := http1.Exchange{Down: down, Up: line.Conn, Request: &req, ToUp: edit, Timeout: m.cfg.Timeout}
	res, err := x.Run()
	reusable = err == nil && res.UpstreamReusable && ctx.Err() == nil
	unseen := res.RequestBytesSent == 0 || errors.Is(err, hop.ErrRefused) || errors.Is(err, http2.ErrRefused)
	return err != nil && !res.ResponseSeen && line.Reused && (unseen || Safe(req.Method)), err
}

// A caller is the near end of a copied call: it says the request again and
// keeps the answer.
type caller struct {
	net.Conn // nil: nothing else is asked of it
	r        io.Reader
	answer   *tape
}

var errKept = errors.New("the answer cannot be kept")

func (c *caller) Read(b []byte) (int, error) { return c.r.Read(b) }

func (c *caller) Write(b []byte) (int, error) {
	c.answer.add(b)
	if c.answer.lost() != "" {
		return 0, errKept
	}
	return len(b), nil
}

func (c *caller) Close() error { return nil }

// Deadlines mean nothing: it never waits for long.

func (c *caller) SetDeadline(time.Time) error      { return nil }
func (c *caller) SetReadDeadline(time.Time) error  { return nil }
func (c *caller) SetWriteDeadline(time.Time) error { return nil }

// readAnswer reads an answer as it was written; nil when it is not whole.
func readAnswer(t *tape, method string) *archive.Answer {
	r := t.reader()
	if r == nil {
		return nil
	}
	resp, err := http.ReadResponse(bufio.NewReader(r), &http.Request{Method: method})
	if err != nil {
		return nil
	}
	m, err := readMessage(resp.Header, resp.Body)
	if err != nil {
		return nil
	}
	m.Trailers = fields(resp.Trailer)
	return &archive.Answer{Status: resp.StatusCode, Message: m}
}

// maxBody is the largest body that is looked at or kept, bytes. Of a larger one
// there is the hash.
const maxBody = 8 << 20

func readMessage(h http.Header, r io.Reader) (archive.Message, error) {
	body, err := io.ReadAll(io.LimitReader(r, maxBody+1))
	m := archive.Message{Headers: fields(h), Body: body}
	if err != nil || len(body) <= maxBody {
		return m, err
	}
	sum := sha256.New()
	sum.Write(body)
	if _, err := io.Copy(sum, r); err != nil {
		return m, err
	}
	m.Body, m.Omitted, m.SHA256 = nil, "the body is larger than 8 MiB", hex.EncodeToString(sum.Sum(nil))
	return m, nil
}

// readRequest reads a request as it was written; nil when it is not whole.
func readRequest(t *tape) *archive.Request {
	r := t.reader()
	if r == nil {
		return nil
	}
	req, err := http.ReadRequest(bufio.NewReader(r))
	if err != nil {
		return nil
	}
	m, err := readMessage(req.Header, req.Body)
	if err != nil {
		return nil
	}
	m.Trailers = fields(req.Trailer)
	path, query, _ := strings.Cut(req.RequestURI, "?")
	return &archive.Request{Method: req.Method, Host: req.Host, Path: path, Query: query, Message: m}
}
