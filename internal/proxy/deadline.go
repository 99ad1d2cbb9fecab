package proxy

import (
	"net"
	"strconv"
	"sync"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/record"
)

// A call's deadline goes on with it: in the field that gRPC has for it, and for
// all calls in one of ours, in milliseconds. A workload may set it, too, for a
// call that it makes: it is a bound, so that it can only make the call end
// sooner.
const (
	timeoutField = "sallyport-timeout-ms"
	// attemptField counts the tries of a call, from the second on.
	attemptField = "sallyport-attempt"
	// refusedField says for what reason, of a closed set, a proxy answered in the
	// service's place.
	refusedField = "sallyport-refused"
)

// longest is the longest deadline that is carried on. What asks for more has
// none.
const longest = 24 * time.Hour

// asked is how long the request says that it may take, 0 when it says nothing
// that can be read.
func asked(r *http1.Request, grpc bool) time.Duration {
	var least time.Duration
	if n, ok := number(r.Get(timeoutField)); ok && n > 0 && n <= longest.Milliseconds() {
		least = time.Duration(n) * time.Millisecond
	}
	if grpc {
		if d := grpcTimeout(r.Get("grpc-timeout")); d > 0 && (least == 0 || d < least) {
			least = d
		}
	}
	return least
}

// deadline holds a call to what its caller waits for, whom its certificate makes
// one of the mesh, and tells the application.
func (in *Inbound) deadline(x *call) *refusal {
	if within := asked(&x.req, http1.IsGRPC(x.req.Get("content-type"))); within > 0 {
		x.tries.until = x.start.Add(within)
		x.extra = appendDeadline(x.extra, time.Until(x.tries.until), false)
	}
	if n, ok := number(x.req.Get(attemptField)); ok && n > 1 {
		x.extra = append(x.extra, "Sallyport-Attempt: "...)
		x.extra = append(strconv.AppendInt(x.extra, n, 10), '\r', '\n')
	}
	return nil
}

// number reads up to eight digits.
func number(b []byte) (n int64, ok bool) {
	if len(b) == 0 || len(b) > 8 {
		return 0, false
	}
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

// grpcTimeout reads a timeout of gRPC (PROTOCOL-HTTP2, "Timeout"); 0 for what is
// none, or longer than is carried on.
func grpcTimeout(b []byte) time.Duration {
	if len(b) < 2 {
		return 0
	}
	n, ok := number(b[:len(b)-1])
	var unit time.Duration
	switch b[len(b)-1] {
	case 'H':
		unit = time.Hour
	case 'M':
		unit = time.Minute
	case 'S':
		unit = time.Second
	case 'm':
		unit = time.Millisecond
	case 'u':
		unit = time.Microsecond
	case 'n':
		unit = time.Nanosecond
	}
	if !ok || unit == 0 || n > int64(longest/unit) {
		return 0
	}
	return max(time.Duration(n)*unit, 1)
}

// appendDeadline appends what the next one is told of the time that is left.
func appendDeadline(b []byte, left time.Duration, grpc bool) []byte {
	ms := max(left.Milliseconds(), 1)
	b = append(b, "Sallyport-Timeout-Ms: "...)
	b = strconv.AppendInt(b, ms, 10)
	b = append(b, '\r', '\n')
	if !grpc {
		return b
	}
	b = append(b, "Grpc-Timeout: "...)
	b = strconv.AppendInt(b, ms, 10)
	return append(b, "m\r\n"...)
}

// withoutDeadline is drop and what gRPC says of its deadline.
func withoutDeadline(drop *http1.NameSet) *http1.NameSet {
	switch drop {
	case dropped:
		return droppedTimed
	case droppedWithState:
		return droppedWithStateTimed
	}
	return drop
}

// A cutter ends what a call waits for when its time is up. A call has one, which
// is armed for each of its tries.
type cutter struct {
	mu    sync.Mutex // guards the fields below
	timer *time.Timer
	due   time.Time
	what  net.Conn // nil: it is not armed
	fired bool
}

// arm has what closed when it is due. Zero is never.
func (c *cutter) arm(what net.Conn, due time.Time) {
	if due.IsZero() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.what, c.due, c.fired = what, due, false
	left := time.Until(due)
	if c.timer == nil {
		c.timer = time.AfterFunc(left, c.fire)
	} else {
		c.timer.Reset(left)
	}
}

// disarm says whether it came too late.
func (c *cutter) disarm() (fired bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.what != nil {
		c.timer.Stop()
		c.what = nil
	}
	fired, c.fired = c.fired, false
	return fired
}

func (c *cutter) fire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.what == nil {
		return
	}
	if left := time.Until(c.due); left > 0 { // it went off for an earlier try
		c.timer.Reset(left)
		return
	}
	c.fired = true
	closeNow(c.what)
	c.what = nil
}

// closeNow closes without a farewell, for which it could have to wait.
func closeNow(c net.Conn) {
	if t, ok := c.(*record.Conn); ok {
		c = t.NetConn()
	}
	c.Close()
}
