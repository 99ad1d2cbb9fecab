package hop

import (
	"runtime"
	"slices"
	"sync"
	"time"
)

const (
	// share is what a stream may always have queued; the next comes when that
	// is on its way. So each stream gets its turn, however much another sends.
	share = 16 << 10
	// gather is how much may be queued by streams that want more than that.
	gather = 64 << 10
	// crowded is from where on who has more than tiny to send waits in line, so
	// that what is queued stays bounded however many streams there are.
	crowded = 256 << 10
	tiny    = 2 << 10
	// maxNotes bounds the queued frames other than data, in bytes: those that
	// answer a peer which does not read.
	maxNotes = 64 << 10
	// company is how many calls must be on their way for a writer to wait until
	// the others have had their turn, so that what they write goes along.
	company = 2
)

// A writer is what is to be sent. It is guarded by the Conn's lock.
type writer struct {
	pend     []byte
	lent     *buffer   // of which pend is; nil while nothing is pending
	notes    int       // bytes of frames other than data in pend
	batch    []*Stream // those that have data in pend
	line     []*Stream // those that wait for room, who came first in front
	flushing bool      // somebody sends what was pending
	until    time.Time // the write deadline now set
	work     sync.Cond // for the goroutine that writes what nobody else does
}

// A buffer is for what is about to be sent.
type buffer struct{ b []byte }

var bufferPool = sync.Pool{New: func() any { return &buffer{make([]byte, 0, firstBuffer)} }}

const (
	firstBuffer = 4 << 10
	// keepBuffer is the size up to which a buffer is used again.
	keepBuffer = 512 << 10
)

func takeBuffer() *buffer { return bufferPool.Get().(*buffer) }

func (b *buffer) giveBack() {
	if cap(b.b) <= keepBuffer {
		b.b = b.b[:0]
		bufferPool.Put(b)
	}
}

// wake has the goroutine of the Conn write, soon.
func (o *writer) wake() { o.work.Signal() }

func (o *writer) hello(streams int) { o.control(note{kindHello, 0, uint64(streams)}) }

// control queues a frame other than data; false when there are too many.
func (o *writer) control(n note) bool {
	was := len(o.pend)
	o.pend = n.append(o.pending(headerSize + 8))
	o.notes += len(o.pend) - was
	return o.notes <= maxNotes
}

// pending is what n more bytes are appended to. It grows in few steps: append alone
// copies what is queued again for each quarter of it.
func (o *writer) pending(n int) []byte {
	if o.lent == nil {
		o.lent = takeBuffer()
		o.pend = o.lent.b
	}
	if need := len(o.pend) + n; need > cap(o.pend) {
		for _, size := range []int{2 * share, 2 * gather, keepBuffer} {
			if need <= size {
				return append(make([]byte, 0, size), o.pend...)
			}
		}
	}
	return o.pend
}

// turns gives those in front of the line their turn, as many as fit. One that
// does not use it calls turns again: somebody must be sending while others wait.
func (o *writer) turns() {
	n := 0
	for given := 0; n < len(o.line) && given < crowded/share; n++ {
		s := o.line[n]
		s.inLine = false
		if s.waits {
			s.turn = true
			s.room.Signal()
			given++
		}
	}
	o.line = slices.Delete(o.line, 0, n)
}

// write sends what nobody else does, until the connection ends, then what is
// left, and closes.
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
	c.mu.Unlock()
	if len(left) > 0 {
		_ = c.nc.SetWriteDeadline(time.Now().Add(lastWords))
		_, _ = c.nc.Write(left) // the connection has ended, one way or another
	}
	c.nc.Close()
}

// cutAll ends the streams of a connection that the peer has ended, or by whose
// fault it did; those that we end ourselves are ours to see to. It gives the
// lock up.
func (c *Conn) cutAll() {
	if c.err == ErrClosing {
		return
	}
	var cuts []func()
	for s := range c.held {
		if s.cut != nil {
			cuts = append(cuts, s.cut)
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
	if c.accompanied() {
		c.mu.Unlock()
		runtime.Gosched()
		c.mu.Lock()
	}
	b, lent := o.pend, o.lent
	o.pend, o.lent, o.notes = nil, nil, 0
	for i, s := range o.batch {
		s.queued = 0
		s.room.Signal()
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
	lent.b = b
	lent.giveBack()
	c.mu.Lock()
	o.flushing = false
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
	if c.accept != nil {
		n = c.open.Load() - n
	}
	return n > company
}
