package egress

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sallyport/internal/capture"
	"sallyport/internal/socket"
)

// A stream is the caller's side of a tunnel. CloseRead and Abort may be called
// while a Read or a Write waits.
type stream interface {
	io.ReadWriter
	// CloseWrite says that no more bytes go to the caller. It returns errWhole
	// when the protocol cannot say so without ending the other direction too.
	CloseWrite() error
	// CloseRead makes Read return; the caller is not told.
	CloseRead()
	// Abort breaks both directions off, so that the caller sees a failure.
	Abort()
}

// errWhole says that a stream ends in both directions or in none.
var errWhole = errors.New("the stream has no half close")

// A relay moves bytes both ways between a caller and a destination until both
// sides have ended, one breaks off, or stop is called. It may be stopped
// before it has either side.
type relay struct {
	idle    time.Duration  // without a byte either way; 0: no limit
	life    time.Duration  // from start; 0: no limit
	cancel  func()         // ends what goes on before run
	greet   *greeting      // for TLS: what may still name a server
	refused func(*Refusal) // told why greet breaks the relay off
	// spend takes bytes of a budget, and says when it is used up; nil for none.
	spend    func(up bool, n int) *Refusal
	panicked func(any) // told of a panic in a goroutine of run

	up, down atomic.Int64 // bytes handed to dest and to caller
	moved    atomic.Int64 // when a byte last moved, in nanoseconds since start
	start    time.Time

	mu     sync.Mutex // guards what follows
	caller stream
	dest   link
	ended  bool
	reason Reason
	cut    bool        // the caller broke it off, not the destination
	quiet  *time.Timer // calls look; nil without a limit
}

// stop breaks the relay off at once; the first reason counts.
func (r *relay) stop(reason Reason) { r.end(reason, true) }

// broke stops the relay because one side has failed.
func (r *relay) broke(caller bool) {
	r.mu.Lock()
	if !r.ended {
		r.cut = caller
	}
	r.mu.Unlock()
	r.stop(ReasonReset)
}

// brokenOff says that the caller has broken the relay off before anything came
// back.
func (r *relay) brokenOff() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reason == ReasonReset && r.cut && r.down.Load() == 0
}

// end ends the relay. Without abort the caller sees an orderly end, which is
// for who calls to finish.
func (r *relay) end(reason Reason, abort bool) {
	r.mu.Lock()
	if r.ended {
		r.mu.Unlock()
		return
	}
	r.ended, r.reason = true, reason
	if r.quiet != nil {
		r.quiet.Stop()
	}
	caller, dest := r.caller, r.dest
	r.mu.Unlock()
	r.cancel()
	if abort {
		// The caller comes first: run returns when the destination is closed,
		// and who called it then ends the caller's side in order.
		if caller != nil {
			caller.Abort()
		}
		if dest != nil {
			_ = dest.SetLinger(0) // a reset: what was sent is not the whole
		}
	}
	if dest != nil {
		dest.Close()
	}
	if !abort && caller != nil {
		caller.CloseRead()
	}
}

// setDest gives the relay its destination, and closes that when the relay has
// been stopped meanwhile.
func (r *relay) setDest(c link) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		c.Close()
		return false
	}
	r.dest = c
	return true
}

// setCaller gives the relay its caller, and aborts that when the relay has
// been stopped meanwhile.
func (r *relay) setCaller(s stream) bool {
	r.mu.Lock()
	ended := r.ended
	r.caller = s
	r.mu.Unlock()
	if ended {
		s.Abort()
	}
	return !ended
}

// why is the reason of the end; empty before it.
func (r *relay) why() Reason {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reason
}

// run blocks until both directions have ended. The destination is closed then.
func (r *relay) run() {
	downward, upward := r.begin()
	downward.pump()
	<-upward
	r.end(ReasonDone, false)
}

// begin has the upward direction move, of whose end it tells, and what waits for
// silence.
func (r *relay) begin() (downward *lane, done chan struct{}) {
	if r.idle > 0 {
		r.moved.Store(int64(time.Since(r.start)))
		r.mu.Lock()
		if !r.ended {
			r.quiet = time.AfterFunc(r.idle, r.look)
		}
		r.mu.Unlock()
	}
	dest := capture.NewDirect(r.dest).(destination)
	upward := &lane{r: r, src: r.caller, dst: dest, count: &r.up}
	downward = &lane{r: r, src: dest, dst: r.caller, count: &r.down}
	if r.greet != nil {
		upward.first = func() error { return r.greet.pass(upward, r.caller) }
		downward.ear = r.greet.hear
	}
	done = make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				r.panicked(p)
			}
		}()
		upward.pump()
	}()
	return downward, done
}

// look stops a relay in which nothing moves. A timer costs less than a goroutine
// that waits.
func (r *relay) look() {
	silent := time.Since(r.start) - time.Duration(r.moved.Load())
	if silent >= r.idle {
		r.stop(ReasonIdle)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.ended {
		r.quiet.Reset(r.idle - silent)
	}
}

type writeCloser interface {
	io.Writer
	CloseWrite() error
}

// A destination is a link, or what capture has made of it.
type destination interface {
	io.Reader
	writeCloser
}

// A lane is one direction of a relay.
type lane struct {
	r     *relay
	src   io.Reader
	dst   writeCloser
	count *atomic.Int64
	first func() error // moves what comes before all else; nil: nothing
	// ear is told what is about to move, nil at the end, and says why it may not; nil:
	// nobody.
	ear   func([]byte) error
	stuck bool // it was dst that failed
}

// pump moves bytes from src to dst and passes the end of src on. A failure on
// either side stops the whole relay.
func (l *lane) pump() {
	var err error
	if l.first != nil {
		err = l.first()
	}
	if err == nil {
		err = l.copy()
	}
	if l.ear != nil {
		_ = l.ear(nil)
	}
	var ref *Refusal
	switch {
	case err == io.EOF:
		err = l.dst.CloseWrite()
		l.stuck = err != nil
	case errors.As(err, &ref):
		l.r.refused(ref)
	}
	switch {
	case err == nil, errors.Is(err, syscall.ENOTCONN):
		// ENOTCONN: that side had ended already.
	case errors.Is(err, errWhole):
		l.r.end(ReasonDone, false)
	default:
		l.r.broke((l.count == &l.r.up) != l.stuck)
	}
}

// copy moves pieces as large as what has come. It returns io.EOF at the end of
// src.
func (l *lane) copy() error {
	from := socket.NewSource(l.src)
	defer from.Release()
	write := l.dst.Write
	if lent, ok := l.dst.(interface{ WriteLent([]byte) (int, error) }); ok {
		write = lent.WriteLent // what the Source gives is ours alone
	}
	for {
		b, err := from.Next()
		if err != nil {
			return err
		}
		if _, err := l.send(b, write); err != nil {
			return err
		}
	}
}

// Write writes to dst and counts.
func (l *lane) Write(b []byte) (int, error) { return l.send(b, l.dst.Write) }

func (l *lane) send(b []byte, write func([]byte) (int, error)) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	if l.ear != nil {
		if err := l.ear(b); err != nil {
			return 0, err
		}
	}
	l.r.moved.Store(int64(time.Since(l.r.start)))
	n, err := write(b)
	l.count.Add(int64(n))
	if l.stuck = err != nil; l.stuck {
		return n, err
	}
	l.r.moved.Store(int64(time.Since(l.r.start)))
	if l.r.spend != nil {
		if ref := l.r.spend(l.count == &l.r.up, n); ref != nil {
			return n, ref
		}
	}
	return n, nil
}
