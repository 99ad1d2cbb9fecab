package http1

import (
	"cmp"
	"errors"
	"io"
	"net/http"
	"sync/atomic"
	"time"
)

// ErrNotAccepted is returned when Exchange.Accept refused the response.
var ErrNotAccepted = errors.New("response not accepted")

// ErrNotReplayable is returned when Run is called again after body bytes of
// the request were consumed.
var ErrNotReplayable = errors.New("request was sent already and cannot be replayed")

// An upstream that answers at the last byte often overtakes the upload by some
// microseconds. So a response waits earlyGrace for the upload to finish, or
// lastGrace when only the last write is left, before the two count as out of
// step.
const earlyGrace = 5 * time.Millisecond

// lastGrace is a variable for tests.
var lastGrace = 250 * time.Millisecond

// An Exchange forwards one request from Down to Up and its response back. Keep
// one for the life of a downstream connection and set the fields anew for each
// request.
type Exchange struct {
	// Down is the client's connection, from which Request was read.
	Down *Conn
	// Up is the connection to the upstream.
	Up *Conn
	// Request is the head that was read from Down. Not a CONNECT.
	Request *Request
	// ToUp and ToDown change the two heads.
	ToUp, ToDown Edit
	// Timeout is how long to wait for the response head, counted from the end
	// of the request; it ends up to an eighth later. Default: the
	// ResponseTimeout of Up.
	Timeout time.Duration
	// Idle is how long nothing may come of a body, either way. Default: the
	// BodyTimeout of the side that it comes from.
	Idle time.Duration
	// Accept, when set, sees the final response before any of it is written.
	// On false Run stops with ErrNotAccepted; Up is then to be closed.
	Accept func(*Response) bool
	// Settle, when set, may be called by who reads Up, with the result, once the
	// answer has gone to Down; Run returns ErrSettled then, when Down has more. It
	// must not block, and Accept may take it away.
	Settle func(Result)
	// Scrub, when set, takes a text out of the body of the response, and out of its
	// trailers. Interim responses do not pass then; the head is for Accept to Clean.
	Scrub *Scrub
	// Tee, when set, sees what is written to Up and to Down.
	Tee Tee

	// Response is the final response head, valid until Up is used again.
	Response Response

	res      Result
	upload   *upload
	answered time.Time // when a head was last read; zero while there is an upload
	hand     handing
}

// Result says what an exchange did, also when it failed.
type Result struct {
	// Status of the final response; 0 when none was read.
	Status int
	// ReqBytes and RespBytes are body bytes, without framing.
	ReqBytes, RespBytes int64
	// RequestBytesSent counts bytes, head included, handed to Up. Above zero
	// the upstream may have acted on the request.
	RequestBytesSent int64
	// ResponseSeen says that Up sent at least one byte. Without it, an
	// upstream error on a pooled connection most likely means that the
	// upstream had closed it before.
	ResponseSeen bool
	// ResponseStarted says that bytes of the final response were written to
	// Down; without it the caller may still answer with WriteError.
	ResponseStarted bool
	// Replayable says that Run may be called again with another Up.
	Replayable bool
	// UpstreamReusable says that Up may be pooled. If not, close it.
	UpstreamReusable bool
	// DownstreamReusable says that Down may carry the next request. If not,
	// close it with Linger, or with Close after an error, so that the client
	// sees the response cut off.
	DownstreamReusable bool
	// Upgraded says that 101 was passed on: a Tunnel takes both connections now.
	Upgraded bool
	// Whole says that all of the request was handed to Up.
	Whole bool
}

// A Tee gets a copy of an exchange as it was written: heads and framed bodies. Its
// methods wait for nothing and keep no b; Sent may be called while the others are.
type Tee interface {
	// Again begins a try: what was seen before is void.
	Again()
	// Sent are bytes of the request.
	Sent(b []byte)
	// Hinted are bytes of an interim response.
	Hinted(b []byte)
	// Answered are bytes of the final response.
	Answered(b []byte)
}

// teed writes to a connection, and shows what it has written.
type teed struct {
	*Conn
	to func(b []byte)
}

func (t teed) Write(b []byte) (int, error) {
	n, err := t.Conn.Write(b)
	t.to(b[:n])
	return n, err
}

// upload is a request body on its way in a goroutine of its own.
type upload struct {
	n        int64
	readErr  error
	writeErr error
	over     atomic.Bool
	done     chan struct{}
}

// ends waits for the end of the upload.
func (u *upload) ends(within time.Duration) bool {
	t := time.NewTimer(within)
	defer t.Stop()
	select {
	case <-u.done:
		return true
	case <-t.C:
		return false
	}
}

func (u *upload) running() bool { return u != nil && !u.over.Load() }

// Run forwards the request and the response. The error, nil on success, is a
// *SideError, ErrNotAccepted or ErrNotReplayable; StatusOf says how to answer
// it as long as the result has no ResponseStarted. A request without body, or
// with one that is small or at hand, runs in the calling goroutine alone and
// can be replayed until the response has started.
func (x *Exchange) Run() (Result, error) {
	x.res, x.upload, x.answered = Result{}, nil, time.Time{}
	if x.Tee != nil {
		x.Tee.Again()
	}
	x.Down.idle, x.Up.idle, x.Up.last, x.Up.scrub = x.Idle, x.Idle, nil, x.Scrub
	err := x.run()
	if err == ErrSettled { //nolint:errorlint // made here
		return x.res, err
	}
	if err != nil {
		x.res.UpstreamReusable, x.res.DownstreamReusable = false, false
	}
	x.res.Replayable = !x.Request.started && !x.res.ResponseStarted && FailedSide(err) != Client
	return x.res, err
}

// Whole says, to Accept, that Run may be called again if it refuses the response.
func (x *Exchange) Whole() bool { return x.upload == nil }

// Trailer is the value of a field that came after the body of the response, nil
// when it is absent; valid as Response is.
func (x *Exchange) Trailer(name string) []byte { return get(x.Up.last, name) }

func (x *Exchange) run() error {
	r, down, up := x.Request, x.Down, x.Up
	switch {
	case r.started:
		return ErrNotReplayable
	case r.Form == Authority:
		return &SideError{Client, "read", refuseAs(http.StatusMethodNotAllowed, ReasonMethod, "CONNECT is not forwarded")}
	}
	if err := down.Prefetch(r); err != nil {
		r.started = true // what follows on Down is not a request
		return &SideError{Client, "read", err}
	}
	up.out = AppendRequest(up.message(), r, &x.ToUp)
	out, raw, data, whole, err := down.gather(up.out, r)
	up.out = out
	if err != nil {
		r.started = true
		return &SideError{Client, "read", err}
	}
	if whole {
		now := up.Now()
		x.arm(now) // the answer may be waited for at once
		up.Tell(now)
		n, err := up.request(up.out)
		if x.res.RequestBytesSent = int64(n); err != nil {
			return &SideError{Upstream, "write", err}
		}
		if x.Tee != nil {
			x.Tee.Sent(up.out)
		}
		x.res.ReqBytes, x.res.Whole = data, true
		up.restWrite()
		if over, err := x.leave(raw); over {
			return err
		}
	} else if err := x.startUpload(); err != nil {
		return err
	}
	if err := x.await(whole); err != nil {
		return x.join(err)
	}
	if x.Accept != nil && !x.Accept(&x.Response) {
		return x.join(ErrNotAccepted)
	}
	if whole {
		down.r += raw
		r.started = true
	}
	return x.join(x.respond())
}

// startUpload sends the head and streams the body from its own goroutine.
func (x *Exchange) startUpload() error {
	r, down, up := x.Request, x.Down, x.Up
	if up.Asks() && up.Stale() {
		return &SideError{Upstream, "write", errSpent}
	}
	if err := down.proceed(r); err != nil {
		return &SideError{Client, "write", err}
	}
	r.started = true
	down.ended.Store(false)
	up.Now() // is long ago by the time that it may be written
	down.Now()
	u := &upload{done: make(chan struct{})}
	x.upload = u
	x.res.RequestBytesSent = int64(len(up.out))
	var to io.Writer = up
	if x.Tee != nil {
		to = teed{up, x.Tee.Sent}
	}
	go func() {
		defer close(u.done)
		u.n, u.readErr, u.writeErr = copyBody(to, down, r.Body, r.Body.Framing, &up.out)
		u.over.Store(true)
		if u.readErr != nil {
			up.Close() // wakes whoever waits for the response
		}
	}()
	return nil
}

// join waits for the upload, breaking it off when it has not ended, and gives
// the error that came first.
func (x *Exchange) join(err error) error {
	u := x.upload
	if u == nil {
		return err
	}
	if u.running() {
		x.res.UpstreamReusable, x.res.DownstreamReusable = false, false
		x.Up.Close()
		x.Down.quit.Store(true)
		for stop := false; !stop; {
			// Again and again, since the upload sets deadlines of its own.
			_ = x.Down.nc.SetReadDeadline(time.Unix(1, 0))
			select {
			case <-u.done:
				stop = true
			case <-time.After(5 * time.Millisecond):
			}
		}
		x.Down.quit.Store(false)
		x.Down.readEnd = time.Time{}
		x.res.ReqBytes = u.n
		x.res.RequestBytesSent += u.n
		return err
	}
	<-u.done
	x.res.ReqBytes = u.n
	x.res.RequestBytesSent += u.n
	x.res.Whole = u.writeErr == nil && u.readErr == nil
	if !x.res.Whole {
		x.res.UpstreamReusable, x.res.DownstreamReusable = false, false
	}
	if err != nil && u.readErr != nil && FailedSide(err) == Upstream {
		return &SideError{Client, "read", u.readErr}
	}
	return err
}

// await reads response heads until the final one. Armed says that the time for
// the first one is running already.
func (x *Exchange) await(armed bool) error {
	up, r := x.Up, x.Request
	method := r.Verb()
	for interim := 0; ; {
		uploading := x.upload.running()
		if !armed {
			x.arm(time.Now())
		}
		armed = false
		err := up.readResponse(&x.Response, method)
		if _, refused := err.(*ProtocolError); refused || err == nil || up.w > up.r {
			x.res.ResponseSeen = true
		}
		if x.upload == nil {
			x.answered = time.Now()
			x.Down.Tell(x.answered)
		}
		if err != nil {
			if uploading && (errors.Is(err, ErrIdleTimeout) || errors.Is(err, ErrHeadTimeout)) {
				continue // the time counts from the end of the request
			}
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return &SideError{Upstream, "read", err}
		}
		if !x.Response.Informational() {
			break
		}
		if interim++; interim > up.lim.Interim {
			return &SideError{Upstream, "read", refuseAs(http.StatusBadGateway, ReasonInterim, "more interim responses than the limit")}
		}
		if err := x.interim(); err != nil {
			return err
		}
	}
	x.res.Status = x.Response.Status
	if x.Response.Upgrade && !r.Upgrade {
		return &SideError{Upstream, "read", refuseAs(http.StatusBadGateway, ReasonUpgrade, "101 that nobody asked for")}
	}
	return nil
}

func (x *Exchange) arm(now time.Time) {
	x.Up.readFrom(now, cmp.Or(x.Timeout, x.Up.lim.ResponseTimeout))
}

// interim passes an interim response on. 100 is ours to say, and a client of
// HTTP/1.0 knows none (RFC 9110 section 15.2).
func (x *Exchange) interim() error {
	if x.Response.Status == http.StatusContinue || x.Request.Minor == 0 || x.Scrub != nil {
		return nil
	}
	down := x.Down
	down.out = AppendResponse(down.message(), &x.Response, Body{}, &Edit{Drop: x.ToDown.Drop})
	n, err := down.Write(down.out)
	if x.Tee != nil {
		x.Tee.Hinted(down.out[:n])
	}
	if err != nil {
		return &SideError{Client, "write", err}
	}
	return nil
}

// respond passes the final response on.
func (x *Exchange) respond() error {
	r, resp, down, up := x.Request, &x.Response, x.Down, x.Up
	// Where the client is told nothing of the connection, it can be told at the
	// end what became of it.
	duplex := x.Down.duplex()
	early := !duplex && x.overtaken()
	edit := x.ToDown
	edit.Close = edit.Close || early || !r.KeepAlive
	body := resp.Body
	switch body.Framing {
	case Chunked, UntilClose:
		body.Framing = Chunked
		if r.Minor == 0 {
			body.Framing, edit.Close = UntilClose, true
		}
	}
	down.out = AppendResponse(down.message(), resp, body, &edit)
	x.res.ResponseStarted = true
	up.dropped = edit.Drop
	whole := body.Framing == NoBody || body.Framing == Length && body.Length <= int64(up.w-up.r)
	var to io.Writer = down
	if x.Tee != nil {
		to = teed{down, x.Tee.Answered}
	}
	n, readErr, writeErr := copyBody(to, up, resp.Body, body.Framing, &down.out)
	x.res.RespBytes = n
	switch {
	case readErr != nil:
		var pe *ProtocolError
		if errors.As(readErr, &pe) {
			pe.Status = http.StatusBadGateway
		}
		return &SideError{Upstream, "read", readErr}
	case writeErr != nil:
		return &SideError{Client, "write", writeErr}
	}
	if duplex {
		early = x.overtaken()
	}
	if whole && !resp.Upgrade && x.upload == nil { // all that took time is the write, which the deadline allows for
		down.Tell(x.answered)
		up.Tell(x.answered)
	}
	x.res.Upgraded = resp.Upgrade
	x.res.UpstreamReusable = resp.KeepAlive && !early && !resp.Upgrade && up.w == up.r && !x.ToUp.Close
	x.res.DownstreamReusable = !edit.Close && !early && !resp.Upgrade
	return nil
}

// overtaken says whether the response came before the request was complete;
// then neither connection carries another request.
func (x *Exchange) overtaken() bool {
	u := x.upload
	if u == nil {
		return false
	}
	if r := x.Request; u.running() && r.streams() && !x.Down.duplex() {
		return true // whoever speaks both ways waits for no end
	}
	if u.running() && !u.ends(earlyGrace) && !(x.Down.ended.Load() && u.ends(lastGrace)) {
		return true
	}
	<-u.done
	return u.readErr != nil || u.writeErr != nil
}
