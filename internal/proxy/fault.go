package proxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
	"sallyport/internal/upstream"
)

// faultField names the fault in an answer that one made.
const faultField = "Sallyport-Fault"

// defaultActive is how many calls a fault holds at once.
const defaultActive = 100

// A fault is one that a policy has, as long as any has it.
type fault struct {
	*mesh.Fault
	key    string
	active atomic.Int32
	// live says that the record of its beginning is written, and its end has not
	// come.
	live atomic.Bool
	// over is closed at its end, which calls that it holds up do not outlast.
	over  chan struct{}
	timer *time.Timer // of its beginning, and then of its end
}

// faults are those of the policy in force. A fault touches nothing before the
// record of its beginning is kept, and nothing after Stop.
type faults struct {
	mu      sync.Mutex // guards the fields below
	known   map[string]*fault
	stopped bool
	// stops are those of the issuer; nil until it was heard.
	stops *mesh.FaultStops
	note  func(r audit.Record) error
}

// use takes the faults of a policy in place of those before: one that stays goes
// on, one that went is over.
func (fs *faults) use(now time.Time, p *policy) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	next := fs.match(p)
	for key, f := range fs.known {
		if next[key] != f {
			fs.end(f, "the policy has it no more")
		}
	}
	for key, f := range next {
		if fs.known[key] != f && !fs.stopped {
			fs.plan(f, now)
		}
	}
	fs.known = next
}

// lend gives a policy that is in force no more the faults that go on.
func (fs *faults) lend(p *policy) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.match(p)
}

// match gives a policy its faults, of which those that are known are the same. The
// caller holds the lock.
func (fs *faults) match(p *policy) map[string]*fault {
	next := map[string]*fault{}
	if p.faults == nil {
		return next
	}
	for set := range p.table.All {
		for _, r := range set.Routes {
			p.faults[r.ID] = nil
			for i := range r.Faults {
				key := set.File.Of() + "/" + r.Name + "/" + r.Faults[i].Name
				f := fs.known[key]
				if f == nil || !sameFault(f.Fault, r.Faults[i].Fault) {
					f = &fault{Fault: r.Faults[i].Fault, key: key, over: make(chan struct{})}
				}
				next[key] = f
				p.faults[r.ID] = append(p.faults[r.ID], f)
			}
		}
	}
	return next
}

func sameFault(a, b *mesh.Fault) bool {
	return a.Since.Equal(b.Since) && a.Until.Equal(b.Until) && a.Delay == b.Delay && a.Status == b.Status && a.GRPC == b.GRPC &&
		a.Reset == b.Reset && a.Bandwidth == b.Bandwidth && a.Share == b.Share && a.MaxActive == b.MaxActive && fmt.Sprint(a.Match, a.Callers) == fmt.Sprint(b.Match, b.Callers)
}

// plan has a fault begin when it is to, and end. The caller holds the lock.
func (fs *faults) plan(f *fault, now time.Time) {
	switch {
	case !now.Before(f.Until), fs.stops == nil, fs.stops.Of(f.key, f.Since) != nil:
		return
	case now.Before(f.Since):
		f.timer = time.AfterFunc(f.Since.Sub(now), func() { fs.turn(f) })
		return
	}
	if err := fs.note(faultRecord(f, "fault_begun", "until "+f.Until.UTC().Format(time.RFC3339))); err != nil {
		return // what nobody could learn of does not happen
	}
	f.live.Store(true)
	f.timer = time.AfterFunc(f.Until.Sub(now), func() { fs.turn(f) })
}

// turn begins or ends a fault whose time has come.
func (fs *faults) turn(f *fault) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	switch now := time.Now(); {
	case fs.stopped || fs.known[f.key] != f:
	case f.live.Load():
		fs.end(f, "its time is over")
	default:
		fs.plan(f, now)
	}
}

// end ends a fault. The caller holds the lock.
func (fs *faults) end(f *fault, why string) {
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	if f.live.Swap(false) {
		close(f.over)
		_ = fs.note(faultRecord(f, "fault_ended", why)) // it is over whether or not that is kept
	}
}

// stop ends all, until this process ends.
func (fs *faults) stop() (n int) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.stopped = true
	for _, f := range fs.known {
		if f.live.Load() {
			n++
		}
		fs.end(f, "stopped by hand")
	}
	return n
}

// heed takes what the issuer has stopped, in place of what it had before.
func (fs *faults) heed(now time.Time, stops *mesh.FaultStops) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.stops = stops
	for _, f := range fs.known {
		switch {
		case stops.Of(f.key, f.Since) != nil:
			fs.end(f, "stopped through the issuer")
		case f.timer == nil && !fs.stopped:
			fs.plan(f, now)
		}
	}
}

func faultRecord(f *fault, reason, detail string) audit.Record {
	return audit.Record{Kind: audit.KindPolicy, Decision: audit.Allow, Reason: reason, Rule: f.key, Dir: string(mesh.Out), Detail: detail}
}

// StopFaults ends every fault that this proxy makes, and lets none begin until
// the process ends. It says how many there were.
func (o *Outbound) StopFaults() int { return o.faults.stop() }

// Heed ends the faults that are stopped for all, and lets others begin. When it
// returns no call meets one of the former.
func (o *Outbound) Heed(stops *mesh.FaultStops) { o.faults.heed(time.Now(), stops) }

// fault is the one that the call meets, nil for none. Whoever gets one leaves it.
func (d *door) fault(x *call) *fault {
	r := x.to.route
	if r == nil || len(r.Faults) == 0 {
		return nil
	}
	was := x.look.Trace
	defer func() { x.look.Trace = was }()
	x.look.Trace[0] ^= byte(x.tries.n) // each try has its own chance, as with the real thing
	for i, f := range x.to.policy.faults[r.ID] {
		if f == nil || !f.acts() || x.req.Upgrade && f.real() || !r.Faults[i].Touches(&x.look) {
			continue
		}
		most := int32(f.MaxActive)
		if most == 0 {
			most = defaultActive
		}
		if f.active.Add(1) > most {
			f.active.Add(-1)
			continue
		}
		x.series = d.faulted(x, f.Name)
		return f
	}
	return nil
}

// faulted is where calls count that met a fault: apart, so that they say nothing
// of the backend to whoever judges it by its counters.
func (d *door) faulted(x *call, name string) *telemetry.Series {
	proto := telemetry.ProtoHTTP
	if x.opaque {
		proto = telemetry.ProtoTCP
	}
	return d.Signals.SeriesOf(proto, x.src, x.to.dst, string(x.known.name)+"/"+x.to.route.Name+"/fault:"+name)
}

// acts says whether it is in force now.
func (f *fault) acts() bool { return f.live.Load() && time.Now().Before(f.Until) }

func (f *fault) leave() { f.active.Add(-1) }

// A fake is an upstream as a fault has it be: behind it stands the real one, or
// nothing.
type fake struct {
	net.Conn // the real one; nil when what it says is said here
	f        *fault
	grpc     bool

	mu     sync.Mutex // guards the fields below
	gone   chan struct{}
	closed bool
	rd, wr time.Time
	slept  bool
	answer []byte
	told   bool // the answer is made
}

// instead makes the fault's upstream in place of a real one, which must be at
// rest.
func (f *fault) instead(up *upstream.Conn, grpc bool) *fake {
	k := &fake{f: f, grpc: grpc, gone: make(chan struct{})}
	if f.real() {
		k.Conn = up.NetConn()
	}
	return k
}

// real says that the real upstream answers, late or slowly.
func (f *fault) real() bool { return f.Status == 0 && f.GRPC == "" && !f.Reset }

// Write takes what the request is, after the delay.
func (k *fake) Write(p []byte) (int, error) {
	k.mu.Lock()
	slept := k.slept
	k.slept = true
	k.mu.Unlock()
	if !slept {
		if err := k.sleep(k.f.Delay, k.deadline(false)); err != nil {
			return 0, err
		}
	}
	if k.Conn != nil {
		return k.Conn.Write(p)
	}
	return len(p), nil
}

// Read gives the answer.
func (k *fake) Read(p []byte) (int, error) {
	if k.Conn != nil {
		if rate := k.f.Bandwidth; rate > 0 && k.f.acts() {
			// A tenth of a second at a time, so that it flows.
			p = p[:min(len(p), int(max(rate/10, 1)))]
			n, err := k.Conn.Read(p)
			if n > 0 {
				if serr := k.sleep(time.Duration(n)*time.Second/time.Duration(rate), k.deadline(true)); serr != nil {
					return n, serr
				}
			}
			return n, err
		}
		return k.Conn.Read(p)
	}
	if k.f.Reset {
		return 0, syscall.ECONNRESET
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.told {
		k.told, k.answer = true, k.f.says(k.grpc)
	}
	if len(k.answer) == 0 {
		return 0, io.EOF
	}
	n := copy(p, k.answer)
	k.answer = k.answer[n:]
	return n, nil
}

// says is the answer of a fault that answers.
func (f *fault) says(grpc bool) []byte {
	status, body := f.Status, refusalBody("fault "+f.Name, "")
	if f.GRPC != "" {
		status = http.StatusOK
		body = nil
	}
	b := []byte("HTTP/1.1 ")
	b = strconv.AppendInt(b, int64(status), 10)
	b = fmt.Appendf(b, " %s\r\n%s: %s\r\nConnection: close\r\n", http.StatusText(status), faultField, f.Name)
	switch {
	case f.GRPC != "":
		b = fmt.Appendf(b, "Content-Type: application/grpc\r\nGrpc-Status: %d\r\nGrpc-Message: fault %s\r\n", grpcCodes[f.GRPC], f.Name)
	case grpc:
		b = fmt.Appendf(b, "Content-Type: text/plain\r\n")
	default:
		b = fmt.Appendf(b, "Content-Type: application/json\r\n")
	}
	return append(fmt.Appendf(b, "Content-Length: %d\r\n\r\n", len(body)), body...)
}

func (k *fake) deadline(read bool) time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	if read {
		return k.rd
	}
	return k.wr
}

// sleep waits, unless it is closed, past the deadline, or the fault over first.
func (k *fake) sleep(d time.Duration, until time.Time) error {
	late := false
	if !until.IsZero() {
		if left := time.Until(until); left < d {
			d, late = left, true
		}
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-k.gone:
		return net.ErrClosed
	case <-k.f.over:
		return nil
	case <-t.C:
	}
	if late {
		return os.ErrDeadlineExceeded
	}
	return nil
}

// Close wakes whoever waits.
func (k *fake) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil
	}
	k.closed = true
	close(k.gone)
	if k.Conn != nil {
		return k.Conn.Close()
	}
	return nil
}

func (k *fake) SetReadDeadline(t time.Time) error {
	k.mu.Lock()
	k.rd = t
	k.mu.Unlock()
	if k.Conn != nil {
		return k.Conn.SetReadDeadline(t)
	}
	return nil
}

func (k *fake) SetWriteDeadline(t time.Time) error {
	k.mu.Lock()
	k.wr = t
	k.mu.Unlock()
	if k.Conn != nil {
		return k.Conn.SetWriteDeadline(t)
	}
	return nil
}

func (k *fake) SetDeadline(t time.Time) error {
	_ = k.SetReadDeadline(t) // the second one says the same
	return k.SetWriteDeadline(t)
}

func (k *fake) LocalAddr() net.Addr {
	if k.Conn != nil {
		return k.Conn.LocalAddr()
	}
	return &net.TCPAddr{}
}

func (k *fake) RemoteAddr() net.Addr {
	if k.Conn != nil {
		return k.Conn.RemoteAddr()
	}
	return &net.TCPAddr{}
}

// through runs the exchange once with what the fault has in the upstream's
// place.
func (x *call) through(f *fault, up *upstream.Conn, due time.Time) {
	k := f.instead(up, x.tries.grpc)
	fc := http1.NewConn(k, x.on.Limits)
	defer fc.Release()
	x.ex.Up = fc
	x.conn.bind(k, nil)
	x.run(k, due)
	if x.err == nil {
		x.tries.outcome, x.tries.judged = x.outcomeOf(), true
	}
	k.Close()
	x.ex.Up, x.res.UpstreamReusable = up.Conn, false
}

// meet has a stream meet its fault, if there is one: it waits, or comes to an
// end. One that is slow is made so with slowed.
func (d *door) meet(x *call) (*fault, *refusal) {
	f := d.fault(x)
	if f == nil {
		return nil, nil
	}
	k := &fake{f: f, gone: make(chan struct{})}
	stop := context.AfterFunc(x.ctx, func() { k.Close() })
	defer stop()
	if !x.conn.bind(k, nil) || k.sleep(f.Delay, time.Time{}) != nil || !f.real() {
		x.unbind()
		f.leave()
		x.broken = true
		return nil, &refusal{status: 503, reason: "fault", detail: "fault " + f.Name}
	}
	x.unbind()
	return f, nil
}

// slowed has what comes over a connection come as slowly as the fault says.
func (x *call) slowed(f *fault, up *upstream.Conn) {
	if f.Bandwidth > 0 {
		up.Conn = http1.NewConn(f.instead(up, false), x.on.Limits)
	}
}
