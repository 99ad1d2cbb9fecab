package http2

import (
	"runtime"
	"slices"
	"sync"
	"time"
)

const (
	// share is what a lane may always have queued; the next comes when that is
	// on its way. So each lane gets its turn, however much another sends.
	share = 16 << 10
	// gather is how much may be queued by lanes that want more than that.
	gather = 64 << 10
	// crowded is from where on who has more than tiny to send waits in line, so
	// that what is queued stays bounded however many lanes there are.
	crowded = 256 << 10
	tiny    = 2 << 10
	// packed is from where on everybody does.
	packed = 2 * crowded
	// maxNotes bounds the queued frames that answer the peer, in bytes: it has
	// to read them.
	maxNotes = 64 << 10
	// keepBuffer is the size up to which a buffer is used again, restBuffer the
	// size of one that is kept while nothing is pending.
	keepBuffer = 256 << 10
	restBuffer = 32 << 10
	// company is how many calls must be on their way for a writer to wait until
	// the others have had their turn, so that what they write goes along.
	company = 2
)

// A writer is what is to be sent. It is guarded by the Conn's lock.
type writer struct {
	pend, spare []byte
	notes       int       // bytes in pend that answer the peer
	earned      int       // how many grants the data sent is worth
	batch       []*Lane   // those that have data in pend
	line        []*Lane   // those that wait for room, who came first in front
	flushing    bool      // somebody sends what was pending
	sent        uint64    // how often something was
	until       time.Time // the write deadline now set
	work        sync.Cond // for the goroutine that writes what nobody else does
}

// wake has the goroutine of the Conn write, soon.
func (o *writer) wake() { o.work.Signal() }

// answered counts what was queued since pend was so long; an error when the peer
// reads none of its answers.
func (o *writer) answered(was int) error {
	if o.notes += len(o.pend) - was; o.notes > maxNotes {
		return violated(EnhanceYourCalm, Unread)
	}
	o.wake()
	return nil
}

// turns gives those in front of the line their turn, as many as fit. One that
// does not use it calls turns again: somebody must be sending while others wait.
func (o *writer) turns() {
	n := 0
	for given := 0; n < len(o.line) && given < crowded/share && len(o.pend) < crowded; n++ {
		l := o.line[n]
		l.inLine = false
		if l.waits {
			l.turn = true
			l.room.Signal()
			given++
		}
	}
	o.line = slices.Delete(o.line, 0, n)
}

// write sends what nobody else does, until the connection ends, then what is
// left, and closes, unless the peer has yet to learn of a mistake.
func (c *Conn) write() {
	o := &c.out
	c.mu.Lock()
	for c.err == nil {
		if len(o.pend) == 0 || o.flushing {
			o.work.Wait()
			continue
		}
		c.flush()
	}
	c.cutAll()
	for o.flushing {
		o.work.Wait()
	}
	left := o.pend
	lingers := c.deaf && isViolation(c.err)
	c.mu.Unlock()
	if len(left) > 0 {
		_ = c.nc.SetWriteDeadline(time.Now().Add(lastWords))
		_, _ = c.nc.Write(left) // the connection has ended, one way or another
	}
	if !lingers {
		c.nc.Close() // which wakes who reads
	}
}

// cutAll ends the calls of a connection that the peer has ended, or by whose
// fault it did; those that we end ourselves are ours to see to. It gives the
// lock up.
func (c *Conn) cutAll() {
	if c.err == ErrClosing {
		return
	}
	var cuts []func()
	for l := range c.lanes {
		if l.cut != nil {
			cuts = append(cuts, l.cut)
		}
	}
	c.mu.Unlock()
	for _, cut := range cuts {
		cut()
	}
	c.mu.Lock()
}

// flush sends all that is pending. It is called with the lock held, which it
// gives up meanwhile.
func (c *Conn) flush() {
	o := &c.out
	o.flushing = true
	o.sent++
	if c.accompanied() {
		c.mu.Unlock()
		runtime.Gosched()
		c.mu.Lock()
	}
	b := o.pend
	o.pend, o.spare, o.notes = o.spare[:0], nil, 0
	for i, l := range o.batch {
		l.queued = 0
		l.room.Signal()
		o.batch[i] = nil
	}
	o.batch = o.batch[:0]
	o.turns()
	if d, now := c.cfg.WriteTimeout, time.Now(); c.err == nil && o.until.Sub(now) < d {
		o.until = now.Add(d + d/8)
		_ = c.nc.SetWriteDeadline(o.until) // a failure shows in the write
	}
	c.mu.Unlock()
	_, err := c.nc.Write(b)
	c.mu.Lock()
	o.flushing = false
	most := keepBuffer
	if len(o.pend) == 0 {
		if most = restBuffer; cap(o.pend) > most {
			o.pend = nil
		}
	}
	if cap(b) <= most {
		o.spare = b[:0]
	}
	if err != nil {
		c.endLocked(err)
	}
	if len(o.pend) > 0 || c.err != nil {
		o.wake()
	}
}

// accompanied says whether other calls are under way: at the end that opens
// streams these wait for an answer, at the other one they do not wait for the
// next request.
func (c *Conn) accompanied() bool {
	n := c.waiting.Load()
	if c.server {
		n = c.open.Load() - n
	}
	return n > company
}
