package http1

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// An answer that has come whole can go on to the client from the goroutine that
// has read it off a connection which many calls share: nobody is woken for it.
// The owner of the exchange waits for the client's next request meanwhile, and
// takes over whatever is not as simple as that.

// ErrSettled is returned by Run when Settle was called: the exchange is over, and
// the client has sent more, or is gone.
var ErrSettled = errors.New("exchange settled where the answer was read")

// handed is a connection on which something else than a reader can take what
// comes. It claims that first, which no Recall overtakes: the next exchange must
// not get what is meant for this one. Left says that it will not be asked.
type handed interface {
	Answer(h interface {
		Claim() bool
		Take(p []byte) bool
		Left()
	}) bool
	Recall()
}

// A tryer writes what can be written without waiting.
type tryer interface {
	TryWrite(p []byte) (int, error)
}

// A handing is how far an exchange is whose answer is left to who reads it.
type handing struct {
	state    atomic.Int32
	work     sync.Mutex // held from when the owner could wait for a final state
	raw      int        // bytes of the request's body on Down
	sent     int        // of Down.out
	failed   error      // of that
	panicked any
}

// The states of a handing. The first two are not final: the owner leaves Down and
// Up alone.
const (
	handWaits    int32 = iota // for the answer
	handTakes                 // who reads works on it
	handRecalled              // the owner has taken it back
	handLeft                  // the owner is to read the answer
	handBegun                 // the owner is to write the rest of it
	handPanicked              // the owner is to panic
	handSettled               // there is nothing left to do
)

// hand is the Exchange for who reads.
type hand Exchange

// leave leaves the answer to who reads it, if it may be simple enough, and waits
// for the client. Over is false when the owner is to read it after all.
func (x *Exchange) leave(raw int) (over bool, err error) {
	r, down, up := x.Request, x.Down, x.Up
	if x.Settle == nil || x.Tee != nil || up.hands == nil || up.buf != nil || down.tries == nil || down.waits == nil ||
		down.w-down.r != raw || !r.KeepAlive || r.Upgrade || r.Expect100 || x.ToDown.Close {
		return false, nil
	}
	h := &x.hand
	h.raw, h.sent, h.failed = raw, 0, nil
	h.state.Store(handWaits)
	if !up.hands.Answer((*hand)(x)) {
		return false, nil
	}
	came := down.waits.Await() == nil
	if h.state.CompareAndSwap(handWaits, handRecalled) {
		up.hands.Recall()
	}
	for h.state.Load() == handTakes {
		h.work.Lock() // it does not take long
		//lint:ignore SA2001 what is waited for is that it is free
		h.work.Unlock()
	}
	switch h.state.Load() {
	case handSettled:
		down.asked = came
		return true, ErrSettled
	case handPanicked:
		panic(h.panicked)
	case handBegun:
		down.readEnd = time.Time{}
		return true, x.goOn()
	case handLeft:
		down.readEnd = time.Time{}
	}
	return false, nil
}

// goOn writes what is left of the answer.
func (x *Exchange) goOn() error {
	err := x.hand.failed
	if rest := x.Down.out; err == nil && x.hand.sent < len(rest) {
		_, err = x.Down.Write(rest[x.hand.sent:])
	}
	if err == nil || err == ErrNotAccepted { //nolint:errorlint // set here
		return err
	}
	return &SideError{Client, "write", err}
}

// Claim takes the exchange away from the owner, unless it has taken it back.
func (h *hand) Claim() bool { return (*Exchange)(h).hand.state.CompareAndSwap(handWaits, handTakes) }

// Take takes the answer, once it is claimed, if it lies whole in p and both
// connections live on.
func (h *hand) Take(p []byte) (took bool) {
	x := (*Exchange)(h)
	x.hand.work.Lock()
	defer func() {
		if p := recover(); p != nil {
			x.hand.panicked, took = p, true
			x.tell(handPanicked)
		}
		x.hand.work.Unlock()
	}()
	n := x.simple(p)
	if n == 0 {
		x.tell(handLeft)
		return false
	}
	down, up, res := x.Down, x.Up, &x.res
	if x.Accept != nil && !x.Accept(&x.Response) { // it is asked once
		res.Status, res.ResponseSeen, x.hand.failed = x.Response.Status, true, ErrNotAccepted
		x.tell(handBegun)
		return true
	}
	last := x.ToDown.Close // Accept may have heard of a drain
	down.r += x.hand.raw
	x.Request.started = true
	*res = Result{
		Status: x.Response.Status, ReqBytes: res.ReqBytes, RespBytes: int64(len(p) - n), RequestBytesSent: res.RequestBytesSent, Whole: true,
		ResponseSeen: true, ResponseStarted: true, UpstreamReusable: x.Response.KeepAlive && !x.ToUp.Close, DownstreamReusable: !last,
	}
	down.out = append(AppendResponse(down.message(), &x.Response, x.Response.Body, &x.ToDown), p[n:]...)
	if err := down.writeWithin(); err != nil {
		x.hand.failed = err
	} else {
		x.hand.sent, x.hand.failed = down.tries.TryWrite(down.out)
	}
	if x.hand.failed != nil || x.hand.sent < len(down.out) || last || x.Settle == nil {
		x.tell(handBegun)
		return true
	}
	up.Tell(x.answered)
	down.readFrom(x.answered, down.lim.IdleTimeout)
	x.Settle(*res)
	down.Rest()
	down.Tell(x.answered)
	x.hand.state.Store(handSettled)
	return true
}

// simple says how long the head of the answer in p is; 0 when it is for the
// owner.
func (x *Exchange) simple(p []byte) int {
	n, lim, r := headEnd(p, 0), &x.Up.lim, &x.Response
	if n == 0 || n > lim.Head {
		return 0
	}
	*r = Response{Fields: r.Fields[:0]}
	if r.parse(p[:n-2], lim, x.Request.Verb(), &x.Up.said) != nil || r.Informational() || r.Upgrade {
		return 0
	}
	switch b := r.Body; {
	case b.Framing == NoBody && n == len(p), b.Framing == Length && b.Length == int64(len(p)-n):
	default:
		return 0
	}
	x.answered = time.Now()
	x.Down.Tell(x.answered)
	return n
}

// Left has the owner see what became of Up.
func (h *hand) Left() {
	x := (*Exchange)(h)
	if !h.Claim() {
		return
	}
	x.hand.work.Lock()
	defer x.hand.work.Unlock()
	x.tell(handLeft)
}

// tell wakes the owner to go on from state.
func (x *Exchange) tell(state int32) {
	_ = x.Down.nc.SetReadDeadline(time.Unix(1, 0)) // where it fails, the owner has woken
	x.hand.state.Store(state)
}
