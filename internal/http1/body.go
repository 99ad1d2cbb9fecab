package http1

import (
	"cmp"
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	bulkSize  = 64 << 10 // one read of a long body
	smallBody = 8 << 10  // a body up to this is gathered before it is sent on
	rateGrace = 5 * time.Second

	rateWindow = 10 * time.Second // of waiting, for which ChunkedRate counts
)

var (
	bulkPool = sync.Pool{New: func() any { return new([bulkSize]byte) }}
	bulks    atomic.Int32 // how many copyLength has in use
)

// maxBulks bounds them: 16 MiB. A transfer that finds none left reads less at a
// time.
const maxBulks = 256

// A bulk is what a long body is read into.
type bulk struct{ b []byte }

// hold sees that there is memory.
func (k *bulk) hold() []byte {
	switch {
	case k.b != nil:
	case bulks.Add(1) <= maxBulks:
		k.b = bulkPool.Get().(*[bulkSize]byte)[:]
	default:
		bulks.Add(-1)
		k.b = inPool.Get().(*[bufferSize]byte)[:]
	}
	return k.b
}

// rest gives it back.
func (k *bulk) rest() {
	switch {
	case k.b == nil:
	case len(k.b) == bulkSize:
		bulks.Add(-1)
		bulkPool.Put((*[bulkSize]byte)(k.b))
	default:
		inPool.Put((*[bufferSize]byte)(k.b))
	}
	k.b = nil
}

// CopyBody writes head and then the body that src is about to deliver to dst,
// head and first body bytes in one write. in is the framing on src; out is
// the framing on dst: Length (only from Length), Chunked, or UntilClose, which
// is the bare data. Trailers pass from responses, not from requests. n counts
// body bytes taken from src. At most one of the errors is set: it says which
// end failed.
func CopyBody(dst io.Writer, src *Conn, in Body, out Framing, head []byte) (n int64, readErr, writeErr error) {
	return copyBody(dst, src, in, out, &head)
}

// copyBody is CopyBody with a scratch buffer that begins as the head.
func copyBody(dst io.Writer, src *Conn, in Body, out Framing, scratch *[]byte) (n int64, readErr, writeErr error) {
	switch in.Framing {
	case Chunked:
		return copyChunked(dst, src, out == Chunked, scratch)
	case Length:
		if out == Chunked {
			return 0, nil, errors.New("a body of known length is not re-framed as chunked")
		}
		return copyLength(dst, src, in.Length, scratch)
	case UntilClose:
		return copyUntilClose(dst, src, out == Chunked, scratch)
	}
	_, writeErr = dst.Write(*scratch)
	return 0, nil, writeErr
}

func copyLength(dst io.Writer, src *Conn, length int64, scratch *[]byte) (n int64, readErr, writeErr error) {
	k := min(length, int64(src.w-src.r))
	*scratch = append(*scratch, src.scrubbed(src.buf[src.r:src.r+int(k)], k == length)...)
	if k == length {
		src.ended.Store(true)
	}
	if _, writeErr = dst.Write(*scratch); writeErr != nil {
		return 0, nil, writeErr
	}
	src.r += int(k)
	if n = k; n == length {
		return n, nil, nil
	}
	var into bulk
	defer into.rest()
	room := func() []byte {
		b := into.hold()
		return b[:min(int64(len(b)), length-n)]
	}
	var p pace
	for drained := k < bufferSize/2; n < length; {
		drained = drained && src.waits != nil
		if drained {
			into.rest() // nobody knows how long it takes
		}
		got, err := src.readBodyInto(room, drained, &p)
		if err != nil {
			return n, err, nil
		}
		drained = got < len(into.b)
		if n+int64(got) == length {
			src.ended.Store(true)
		}
		if piece := src.scrubbed(into.b[:got], n+int64(got) == length); len(piece) > 0 {
			if _, writeErr = dst.Write(piece); writeErr != nil {
				return n, nil, writeErr
			}
		}
		n += int64(got)
	}
	return n, nil, nil
}

// pace tells a slow body from a stalled or hostile one. Only time spent
// waiting for the sender counts: a receiver that holds things up is not the
// sender's fault.
type pace struct {
	n      int64
	waited time.Duration // in all
	idle   time.Duration // since the last byte
}

// slow says whether the bytes so far are less than the rate, in bytes per
// second, asks for.
func (p *pace) slow(rate int) bool {
	return p.waited > rateGrace && float64(p.n) < (p.waited-rateGrace).Seconds()*float64(rate)
}

// readBody reads body bytes past the buffer, which is empty. A request body
// of known length must keep up the least rate.
func (c *Conn) readBody(b []byte, p *pace) (int, error) {
	return c.readBodyInto(func() []byte { return b }, false, p)
}

// readBodyInto is readBody with a buffer that is asked for only, with await, when
// there is something to read.
func (c *Conn) readBodyInto(b func() []byte, await bool, p *pace) (int, error) {
	wait := c.bodyTimeout()
	rated := !c.trailers && c.lim.MinRate > 0
	if rated {
		wait = min(wait, rateGrace)
	}
	for {
		c.readWithin(wait)
		before := time.Now()
		var n int
		var err error
		if await {
			err = c.waits.Await()
		}
		if err == nil {
			n, err = c.nc.Read(b())
		}
		took := time.Since(before)
		p.n += int64(n)
		p.waited += took
		p.idle += took
		if n > 0 {
			p.idle = 0
		}
		switch {
		case rated && p.slow(c.lim.MinRate):
			return 0, ErrSlowBody
		case n > 0:
			return n, nil
		case err == nil:
			return 0, io.ErrNoProgress
		case err == io.EOF:
			return 0, io.ErrUnexpectedEOF
		case !rated || !errors.Is(err, os.ErrDeadlineExceeded) || p.idle >= c.bodyTimeout() || c.quit.Load():
			return 0, err
		}
	}
}

func (c *Conn) bodyTimeout() time.Duration { return cmp.Or(c.idle, c.lim.BodyTimeout) }

// window is pace for a body of unknown length, which may go on for days: a good
// beginning does not count later.
type window struct {
	n      int64         // bytes in all
	from   int64         // n when the window began
	waited time.Duration // in the window
}

// slow says, at the end of a window, whether the bytes in it are less than the
// rate, in bytes per second, asks for.
func (w *window) slow(rate int) bool {
	if rate <= 0 || w.waited < rateWindow {
		return false
	}
	slow := float64(w.n-w.from) < w.waited.Seconds()*float64(rate)
	w.from, w.waited = w.n, 0
	return slow
}

// fillBody is fill inside a chunked body. Of a request, w sees how long it takes.
func (c *Conn) fillBody(w *window) error {
	rate := c.lim.ChunkedRate
	if c.trailers || rate <= 0 {
		c.readWithin(c.bodyTimeout())
		return c.fill()
	}
	for idle := time.Duration(0); ; {
		c.readWithin(min(c.bodyTimeout(), rateWindow))
		before := time.Now()
		err := c.fill()
		took := time.Since(before)
		w.waited += took
		idle += took
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded) || idle >= c.bodyTimeout() || c.quit.Load():
			return err
		case w.slow(rate):
			return ErrSlowBody
		}
	}
}

// pass writes a piece of a body of unknown length that c reads. Of a response, w
// sees how long the client takes.
func (c *Conn) pass(dst io.Writer, b []byte, w *window) error {
	if !c.trailers || c.lim.ChunkedRate <= 0 {
		_, err := dst.Write(b)
		return err
	}
	before := time.Now()
	n, err := dst.Write(b)
	w.waited += time.Since(before)
	w.n += int64(n)
	return err
}

func copyChunked(dst io.Writer, src *Conn, framed bool, scratch *[]byte) (n int64, readErr, writeErr error) {
	d := decoder{scrub: src.scrub}
	var sent, taken window
	out := *scratch
	for {
		var k int
		out, k, readErr = d.feed(out, src.buf[src.r:src.w], framed)
		if src.scrub != nil && d.done() {
			out = appendChunk(out, src.scrub.rest(), framed)
		}
		switch {
		case readErr != nil || !d.done():
		case framed:
			out, readErr = d.appendLast(out, src.trailers, src.dropped, &src.lim)
			src.last = d.last
		default:
			_, readErr = d.fields(&src.lim)
		}
		if readErr != nil {
			return d.data, readErr, nil
		}
		src.r += k
		if d.done() {
			src.ended.Store(true)
		}
		if len(out) > 0 {
			*scratch = out
			if writeErr = src.pass(dst, out, &taken); writeErr != nil {
				return d.data, nil, writeErr
			}
			out = out[:0]
		}
		sent.n = d.data // framing is not what is waited for
		switch {
		case d.done():
			return d.data, nil, nil
		case sent.slow(src.lim.ChunkedRate):
			return d.data, ErrSlowBody, nil
		case taken.slow(src.lim.ChunkedRate):
			return d.data, nil, ErrSlowBody
		}
		if err := src.fillBody(&sent); err != nil {
			return d.data, truncated(err), nil
		}
	}
}

func copyUntilClose(dst io.Writer, src *Conn, framed bool, scratch *[]byte) (n int64, readErr, writeErr error) {
	var taken window
	out := *scratch
	for {
		n += int64(src.w - src.r)
		out = appendChunk(out, src.scrubbed(src.buf[src.r:src.w], false), framed)
		src.r = src.w
		if len(out) > 0 {
			*scratch = out
			if writeErr = src.pass(dst, out, &taken); writeErr != nil {
				return n, nil, writeErr
			}
			out = out[:0]
		}
		if taken.slow(src.lim.ChunkedRate) {
			return n, nil, ErrSlowBody
		}
		src.readWithin(src.bodyTimeout())
		switch err := src.fill(); {
		case err == io.EOF:
			out = appendChunk(out, src.scrubbed(nil, true), framed)
			if framed {
				out = append(out, "0\r\n\r\n"...)
			}
			if len(out) > 0 {
				_, writeErr = dst.Write(out)
			}
			return n, nil, writeErr
		case err != nil:
			return n, err, nil
		}
	}
}

func truncated(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Prefetch waits until the body of r, if small and of known length, has
// arrived, or else the first of its bytes; it sends 100 to a client that waits
// for it. Called before an upstream connection is borrowed, it keeps a slow
// client from holding one. Exchange calls it too.
func (c *Conn) Prefetch(r *Request) error { return c.Hold(r, smallBody) }

// Hold is Prefetch for a body of known length up to most bytes: a request that
// is to be sent again if need be.
func (c *Conn) Hold(r *Request, most int64) error {
	want := 1
	switch {
	case r.started || r.Body.Empty():
		return nil
	case r.streams():
		return nil // who streams both ways may wait for our first word
	case r.Body.Framing == Length && r.Body.Length <= most:
		want = int(r.Body.Length)
	}
	if want > smallBody && want > len(c.buf)-c.floor {
		b := make([]byte, want) // what was read of the head stays in the old one
		c.w = copy(b, c.buf[c.r:c.w])
		c.r, c.floor, c.buf = 0, 0, b
	}
	want = min(want, len(c.buf)-c.floor)
	if c.w-c.r >= want {
		return nil
	}
	if err := c.proceed(r); err != nil {
		return err
	}
	var p pace
	for c.w-c.r < want {
		c.compact()
		n, err := c.readBody(c.buf[c.w:], &p)
		if err != nil {
			return err
		}
		c.w += n
	}
	return nil
}

// gather looks whether the whole body of r is in the buffer. If so it appends
// the body as it goes to the upstream to out; raw is the number of buffered
// bytes it stands for, which stay there so that the request can be sent again,
// and data the number of body bytes.
func (c *Conn) gather(out []byte, r *Request) (_ []byte, raw int, data int64, whole bool, err error) {
	switch r.Body.Framing {
	case NoBody:
		return out, 0, 0, true, nil
	case Length:
		n := r.Body.Length
		if n > int64(c.w-c.r) {
			return out, 0, 0, false, nil
		}
		return append(out, c.buf[c.r:c.r+int(n)]...), int(n), n, true, nil
	}
	var d decoder
	was := len(out)
	out, raw, err = d.feed(out, c.buf[c.r:c.w], true)
	if err == nil && d.done() {
		out, err = d.appendLast(out, false, nil, &c.lim)
		return out, raw, d.data, err == nil, err
	}
	return out[:was], 0, 0, false, err
}

// compact moves unread bytes down to the head, so that all free space is
// behind them.
func (c *Conn) compact() {
	if c.r > c.floor {
		c.w = c.floor + copy(c.buf[c.floor:], c.buf[c.r:c.w])
		c.r = c.floor
	}
}

const continueHead = "HTTP/1.1 100 Continue\r\n\r\n"

// proceed tells a client that waits for it to send the body.
func (c *Conn) proceed(r *Request) error {
	if !r.Expect100 || r.continued {
		return nil
	}
	r.continued = true
	c.out = append(c.message(), continueHead...)
	_, err := c.Write(c.out)
	return err
}
